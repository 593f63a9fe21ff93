"""Replies into a connection's socket: one after the other, never mixed, the data of large reads without a detour.

Theory of operation. Small replies gather in one buffer, which the transmission loop fills and which leaves in one
send. Behind them may go the data of a large read: from the page cache straight into the socket by sendfile, or, where
the socket encrypts or the file must not be sent so (HostFile.may_be_sent), through the buffer.

Invariant: the socket is claimed while the bytes of one reply, or of one chunk of it, leave. A send that needs no
waiting happens between two awaits and claims nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import trio

from nbdserve.block import Data, Extent, HostFile, HostOffset
from nbdserve.protocol import replies
from nbdserve.server.transport import Buffer, Transport

GATHERED: Final = 384 << 10
"""Bytes of small replies that leave without waiting for more."""

LARGE_READ: Final = 64 << 10
"""Bytes from which on sendfile beats a copy; a smaller read may be appended to GATHERED bytes of replies."""

_BUFFER_BYTES = GATHERED + 2 * LARGE_READ
_PIECE = 256 << 10  # bytes of a large read that are copied and sent at a time


class ReplySender:
    """The way out of one connection.

    Args:
        transport: the connected socket.
        structured: whether structured replies were agreed on.

    Attributes:
        view: the buffer that small replies gather in; how much of it is filled is the caller's to know.
    """

    def __init__(self, transport: Transport, structured: bool) -> None:
        self.view = memoryview(bytearray(_BUFFER_BYTES))
        self._transport = transport
        self._structured = structured
        self._taken = False
        self._queue = trio.lowlevel.ParkingLot()

    async def send_gathered(self, filled: int) -> None:
        """Send the first `filled` bytes of the buffer."""
        sent = 0 if self._taken else self._transport.send_nowait(self.view[:filled])
        if sent < filled:
            await self.send([self.view[sent:filled]])

    async def send(self, reply: Iterable[Buffer]) -> None:
        """Send a reply that somebody else has put together."""
        await self._claim()
        try:
            await self._transport.send(reply)
        finally:
            self._release()

    async def send_placed(
        self, filled: int, cookie: int, offset: int, length: int, file: HostFile, host_offset: HostOffset
    ) -> None:
        """Send what is gathered and, behind it, a reply whose data lies in one piece of a file, by sendfile."""
        filled = self._put_header(filled, cookie, offset, length, True)
        sent = 0
        if not self._taken:
            sent = self._transport.send_nowait(self.view[:filled], more=True)
            if sent == filled:
                sent += self._transport.send_file_nowait(file, host_offset, length)
                if sent == filled + length:
                    return
        await self._claim()
        try:
            if sent < filled:
                await self._transport.send([self.view[sent:filled]], more=True)
                sent = filled
            of_file = sent - filled
            await self._transport.send_file(file, host_offset + of_file, length - of_file)
        finally:
            self._release()

    async def send_copied(
        self, cookie: int, offset: int, length: int, file: HostFile, host_offset: HostOffset, *, whole: bool
    ) -> int:
        """Send as much of a reply's data as the page cache has, through the buffer, in which nothing may be gathered.

        Args:
            whole: the reply must not be cut into chunks.

        Returns:
            Bytes of the range that were sent; the rest needs the disk and is still to be answered.
        """
        done = 0
        while done < length and (not whole or length <= _PIECE):
            piece = min(length - done, _PIECE)
            data = self._put_header(0, cookie, offset + done, piece, done + piece == length)
            if not file.read_at_hand(host_offset + done, self.view[data : data + piece]):
                break
            await self.send_gathered(data + piece)
            done += piece
        return done

    async def send_runs(self, filled: int, cookie: int, offset: int, runs: Sequence[Extent]) -> None:
        """Send what is gathered and, behind it, a reply whose data lies in files or is zeros, in more than one run."""
        view, send = self.view, self._transport.send
        await self._claim()
        try:
            for number, extent in enumerate(runs, 1):
                last = number == len(runs)
                if isinstance(extent, Data):
                    filled = self._put_header(filled, cookie, offset, extent.length, last)
                    await send([view[:filled]], more=True)
                    await self._transport.send_file(extent.file, extent.host_offset, extent.length)
                    filled = 0
                elif self._structured:
                    filled = replies.put_hole_chunk(view, filled, cookie, offset, extent.length, last)
                else:
                    filled = replies.put_simple_reply(view, filled, cookie)
                    await send([view[:filled], bytes(extent.length)])
                    filled = 0
                offset += extent.length
            if filled:
                await send([view[:filled]])
        finally:
            self._release()

    def _put_header(self, filled: int, cookie: int, offset: int, length: int, last: bool) -> int:
        if self._structured:
            return replies.put_data_chunk(self.view, filled, cookie, offset, length, last)
        return replies.put_simple_reply(self.view, filled, cookie)

    # Who may send. trio.Lock takes a turn through the scheduler even when it is free, which costs more than a read.

    async def _claim(self) -> None:
        if self._taken:
            await self._queue.park()
        self._taken = True

    def _release(self) -> None:
        if self._queue:
            self._queue.unpark()  # it stays taken: handed over, so that nobody waits forever
        else:
            self._taken = False
