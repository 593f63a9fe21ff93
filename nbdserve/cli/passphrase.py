"""The passphrase of encrypted images: from a file, from standard input, or typed."""

from __future__ import annotations

import sys
from pathlib import Path

from nbdserve.errors import OpenError

_MOST = 8 << 20  # bytes; what cryptsetup takes from a key file


class Passphrase:
    """What --passphrase-file names; read when it is needed, and once only."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._content: bytes | None = None

    def __call__(self) -> bytes:
        """The passphrase, byte for byte.

        Raises:
            OpenError: it cannot be read, or there is none.
        """
        if self._content is None:
            self._content = self._typed() if self._name == "-" else self._stored()
            if not self._content:
                raise OpenError(f"--passphrase-file {self._name}: is empty; an encrypted image has a passphrase")
        return self._content

    def ask_now(self) -> None:
        """Read it if a person has to type it, because later there will be no terminal."""
        if self._name == "-":
            self()

    def _stored(self) -> bytes:
        try:
            with Path(self._name).open("rb") as file:
                content = file.read(_MOST + 1)
        except OSError as error:
            raise OpenError(f"--passphrase-file {self._name}: {error.strerror}") from None
        if len(content) > _MOST:
            raise OpenError(f"--passphrase-file {self._name}: is longer than {_MOST >> 20} MiB; check the name")
        return content

    def _typed(self) -> bytes:
        if not sys.stdin.isatty():
            return sys.stdin.buffer.read(_MOST)
        from getpass import getpass

        try:
            return getpass("Passphrase: ").encode()
        except EOFError:
            return b""
