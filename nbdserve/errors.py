"""Every error this package raises on purpose, under one root.

A message is one line that says what is wrong, where, and what to do about it: the command lines print it as it is.
Failures of the host's storage stay OSError, because their errno is what the client has to be told.
"""

from __future__ import annotations


class NbdserveError(Exception):
    """Root of all errors below."""


class OpenError(NbdserveError):
    """An image, or something it refers to, cannot be opened."""


class FormatError(OpenError):
    """A file is not what its format promises: damaged, truncated, or never that format at all."""


class Unsupported(OpenError):
    """A valid image uses a feature that is not handled here; the message names it."""


class Locked(OpenError):
    """Another process uses the image in a way that excludes us."""


class ReadOnly(NbdserveError):
    """A write was asked of a device that was opened read-only."""


class ProtocolError(NbdserveError):
    """The peer broke the NBD protocol in a way that leaves no common ground: the connection dies."""


class RequestError(NbdserveError):
    """One request fails and the connection carries on.

    Args:
        code: an NBD error number (protocol.constants.ErrorCode), which equals Linux's errno where both exist.
        text: what to tell the client, in words.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
