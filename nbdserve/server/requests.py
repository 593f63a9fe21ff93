"""One request in, the bytes of its reply out: everything that a client may ask for in the transmission phase.

Synchronous, and run in worker threads: it may block on the disk. The transmission loop answers the common cases by
itself (transmission.py) and hands all others over, so this is also the one place that checks requests against the
specification's rules and turns failures into error replies.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import suppress

from nbdserve.block import BlockDevice, Data
from nbdserve.errors import NbdserveError, ReadOnly, RequestError
from nbdserve.protocol import replies
from nbdserve.protocol.constants import Command, CommandFlags, ErrorCode
from nbdserve.protocol.messages import Agreement
from nbdserve.server.replies import sparse_read, status_extents

_MAXIMUM_STATUS = 1 << 15  # descriptors of one reply; a client asks on from where a shorter answer ends

_ALLOWED_FLAGS = {
    Command.READ: CommandFlags.DF,
    Command.WRITE: CommandFlags.FUA,
    Command.FLUSH: CommandFlags(0),
    Command.TRIM: CommandFlags.FUA,
    Command.CACHE: CommandFlags(0),
    Command.WRITE_ZEROES: CommandFlags.FUA | CommandFlags.NO_HOLE | CommandFlags.FAST_ZERO,
    Command.BLOCK_STATUS: CommandFlags.REQ_ONE,
}

_WIRE_ERRORS = {
    errno.EPERM: ErrorCode.EPERM,
    errno.EACCES: ErrorCode.EPERM,
    errno.EROFS: ErrorCode.EPERM,
    errno.ENOMEM: ErrorCode.ENOMEM,
    errno.ENOSPC: ErrorCode.ENOSPC,
    errno.EDQUOT: ErrorCode.ENOSPC,
    errno.EFBIG: ErrorCode.ENOSPC,
}

Reply = Sequence[bytes | bytearray]
Payload = bytes | memoryview | None


class RequestHandler:
    """Answers the requests of one connection.

    Args:
        report: told, in one line, of failures that are the host's or the image's rather than the client's.
    """

    def __init__(self, device: BlockDevice, agreement: Agreement, report: Callable[[str], None]) -> None:
        self._device = device
        self._structured = agreement.structured
        self._contexts = tuple(agreement.contexts)
        self._maximum = agreement.export.maximum_block
        self._report = report

    def handle(self, flags: int, command: int, cookie: int, offset: int, length: int, payload: Payload) -> Reply:
        """Carry out a request; a failure of any kind becomes its error reply."""
        try:
            return self._carry_out(flags, command, cookie, offset, length, payload)
        except RequestError as error:
            return [self._error(cookie, error.code, error.text)]
        except ReadOnly:
            return [self._error(cookie, ErrorCode.EPERM, "the export is read-only")]
        except MemoryError:
            return [self._error(cookie, ErrorCode.ENOMEM, "the server is out of memory")]
        except OSError as error:
            code = _WIRE_ERRORS.get(error.errno or 0, ErrorCode.EIO)
            if code != ErrorCode.EPERM:
                self._report(str(error))
            return [self._error(cookie, code, error.strerror or "input/output error")]
        except NbdserveError as error:
            self._report(str(error))
            return [self._error(cookie, ErrorCode.EIO, "the image is damaged at this place")]

    def _carry_out(self, flags: int, command: int, cookie: int, offset: int, length: int, payload: Payload) -> Reply:
        allowed = _ALLOWED_FLAGS.get(command)  # type: ignore[call-overload]
        if allowed is None:
            raise RequestError(ErrorCode.EINVAL, f"command {command} is not known here")
        if flags & ~int(allowed):  # ~ of an IntFlag forgets the bits that have no name
            raise RequestError(ErrorCode.EINVAL, f"flags {flags:#x} do not fit command {command}")
        device = self._device
        if command == Command.FLUSH:
            device.flush()
            return [self._done(cookie)]
        self._check_range(command, offset, length)
        match command:
            case Command.READ:
                return self._read(flags, cookie, offset, length)
            case Command.BLOCK_STATUS:
                return self._block_status(flags, cookie, offset, length)
            case Command.CACHE:
                self._prefetch(offset, length)
            case Command.WRITE:
                if payload is None:
                    raise RequestError(ErrorCode.EINVAL, f"a write may carry at most {self._maximum} bytes")
                self._check_writable()
                device.write(offset, payload)
            case Command.TRIM:
                self._check_writable()
                device.discard(offset, length)
            case Command.WRITE_ZEROES:
                self._check_writable()
                if flags & CommandFlags.FAST_ZERO and not device.zeroes_fast:
                    raise RequestError(ErrorCode.ENOTSUP, "zeroing is no faster than writing here")
                device.zero(offset, length, unmap=not flags & CommandFlags.NO_HOLE)
        if flags & CommandFlags.FUA:
            device.flush()
        return [self._done(cookie)]

    def _check_range(self, command: int, offset: int, length: int) -> None:
        size = self._device.size
        if offset + length > size:
            code = ErrorCode.ENOSPC if command in (Command.WRITE, Command.WRITE_ZEROES) else ErrorCode.EINVAL
            raise RequestError(code, f"{length} bytes at {offset} reach past the end of the export, {size}")

    def _check_writable(self) -> None:
        if self._device.read_only:
            raise RequestError(ErrorCode.EPERM, "the export is read-only")

    def _read(self, flags: int, cookie: int, offset: int, length: int) -> Reply:
        if length > self._maximum:
            raise RequestError(ErrorCode.EINVAL, f"a read may ask for at most {self._maximum} bytes")
        if not self._structured:
            return [replies.simple_reply(cookie), self._device.read(offset, length)]
        if not length:
            return [replies.none_chunk(cookie)]
        if flags & CommandFlags.DF:
            data = self._device.read(offset, length)
            header = bytearray(replies.DATA_CHUNK.size)
            replies.put_data_chunk(header, 0, cookie, offset, length, True)
            return [header, data]
        return list(sparse_read(self._device, cookie, offset, length))

    def _block_status(self, flags: int, cookie: int, offset: int, length: int) -> Reply:
        if not self._contexts:
            raise RequestError(ErrorCode.EINVAL, "no metadata context was negotiated")
        if not length:
            raise RequestError(ErrorCode.EINVAL, "a block status needs a length")
        limit = 1 if flags & CommandFlags.REQ_ONE else _MAXIMUM_STATUS
        runs = status_extents(self._device.extents(offset, length), limit)
        last = self._contexts[-1]
        return [replies.status_chunk(cookie, context, runs, context == last) for context in self._contexts]

    def _prefetch(self, offset: int, length: int) -> None:
        for extent in self._device.extents(offset, length):
            if isinstance(extent, Data):
                with suppress(OSError):  # advice: a host that cannot take it does no harm
                    os.posix_fadvise(extent.file.fd, extent.host_offset, extent.length, os.POSIX_FADV_WILLNEED)

    def _done(self, cookie: int) -> bytes:
        return replies.simple_reply(cookie)

    def _error(self, cookie: int, code: int, text: str) -> bytes:
        return replies.error_chunk(cookie, code, text) if self._structured else replies.simple_reply(cookie, code)
