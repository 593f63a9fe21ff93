"""The transmission loop of one connection, with its fast path.

Theory of operation. One receive takes whatever the socket has; every whole request in it is handled before the next
await; small replies gather in one buffer and leave in one send. What the page cache answers at once is answered right
here: small reads by preadv straight into the reply buffer (HostFile.nowait makes it fail where the disk would be
needed), large ones by sendfile, writes into mapped space by pwrite. Everything that may block goes to a worker thread
(requests.RequestHandler), whose reply is sent when it is ready, so a slow disk stalls only those who wait for it.

Invariants:

- A pin (block.pins) is held from the lookup of an extent until its bytes have been read, written or handed to the
  socket, so no freed host space is reused under it. Pages that sendfile has queued survive reuse, because formats
  punch a hole before they reuse space (HostFile.punch_hole).
- The socket is claimed (_claim_socket) while the bytes of one reply leave, so replies never mix.
- What waits in worker threads is bounded in number and in bytes; beyond that the client is not read from.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import trio

from nbdserve.block import BlockDevice, Computed, Data, Extent
from nbdserve.errors import NbdserveError
from nbdserve.protocol import replies
from nbdserve.protocol.constants import SIMPLE_REPLY_MAGIC, Command, CommandFlags
from nbdserve.protocol.messages import Agreement
from nbdserve.protocol.transmission_server import HEADER, PLAIN_READ, PLAIN_WRITE, RequestReader
from nbdserve.server.requests import Payload, RequestHandler
from nbdserve.server.transport import Transport

_READ, _WRITE, _DISC = int(Command.READ), int(Command.WRITE), int(Command.DISC)
_DF = int(CommandFlags.DF)

_LARGE_READ = 64 << 10  # from here on sendfile beats a copy
_GATHERED = 384 << 10  # bytes of small replies that leave without waiting for more
_REPLY_BYTES = _GATHERED + 2 * _LARGE_READ
_MAXIMUM_RUNS = 256  # extents of one read that are sent from the loop; their chunk headers fit into the buffer
_INLINE_WRITE = 1 << 20  # larger writes are worth a worker thread, so that others get their turn

_TURN = 0.002  # seconds that one connection may keep the loop before it lets others run
_SPINS = 60  # looks at an empty socket before parking; each costs about a microsecond
_SOON = 0.0005  # seconds; a client that came back this soon is worth spinning for
_SLOW_WRITE = 0.02  # seconds; a disk that holds a write up this long gets its writes from threads for a while
_SLOW_SPELL = 2.0  # seconds

_MAXIMUM_WAITING = 64  # requests of one connection in worker threads
_MAXIMUM_WAITING_BYTES = 64 << 20


class Transmission:
    """One connection after its handshake.

    Args:
        transport: the connected socket.
        device, agreement: what it serves, as agreed.
        workers: limits how many worker threads the whole server uses.
        report: told, in one line, of failures that the user of the server should know about.
    """

    def __init__(
        self,
        transport: Transport,
        device: BlockDevice,
        agreement: Agreement,
        workers: trio.CapacityLimiter,
        report: Callable[[str], None],
    ) -> None:
        self._transport = transport
        self._device = device
        self._structured = agreement.structured
        self._handler = RequestHandler(device, agreement, report)
        self._reader = RequestReader(agreement.export.maximum_block)
        self._maximum = agreement.export.maximum_block
        self._workers = workers
        self._view = memoryview(bytearray(_REPLY_BYTES))
        self._socket_taken = False
        self._socket_queue = trio.lowlevel.ParkingLot()
        self._parked: trio.CancelScope | None = None
        self._stopping = False
        self._waiting = 0
        self._waiting_bytes = 0
        self._room = trio.Event()
        self._spins = 0
        self._client_is_quiet = False
        self._writes_wait_until = 0.0

    def stop(self) -> None:
        """Take no more requests; run() returns when those in flight have been answered."""
        self._stopping = True
        if self._parked is not None:
            self._parked.cancel()

    async def run(self, trailing: bytes) -> None:
        """Serve until the client leaves or stop() is called.

        Args:
            trailing: what came in behind the handshake.

        Raises:
            ProtocolError: the client is out of step.
            OSError: the connection broke.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            while trailing:
                space = self._reader.space()
                count = min(len(space), len(trailing))
                space[:count] = trailing[:count]
                trailing = trailing[count:]
                self._reader.received(count)
                with self._device.pins.held():
                    if await self._serve_batch():
                        return
            await self._receive_and_serve()

    async def _receive_and_serve(self) -> None:
        while not self._stopping and not await self._take_turn():
            if self._client_is_quiet:
                await self._park()
            else:
                await trio.lowlevel.checkpoint()

    async def _take_turn(self) -> bool:
        """Serve until the client is quiet or others should get their turn; True when it has said goodbye or gone."""
        receive_nowait, reader, clock = self._transport.receive_nowait, self._reader, time.perf_counter
        turn_ends = clock() + _TURN
        spins = 0
        self._client_is_quiet = False
        with self._device.pins.held():
            while clock() < turn_ends:
                try:
                    count = receive_nowait(reader.space())
                except BlockingIOError:
                    spins += 1
                    if spins > self._spins:
                        self._client_is_quiet = True
                        return False
                    continue
                if not count:
                    return True
                spins = 0
                reader.received(count)
                if await self._serve_batch():
                    return True
        return False

    async def _park(self) -> None:
        """Wait for the client; and learn whether it tends to come back so soon that looking again pays."""
        parked_at = time.perf_counter()
        with trio.CancelScope() as self._parked:
            await self._transport.wait_readable()
        self._parked = None
        self._spins = _SPINS if time.perf_counter() - parked_at < _SOON else 0

    async def _serve_batch(self) -> bool:
        """Handle every whole request received; True when the client has said goodbye."""
        filled = 0
        while True:
            filled = self._answer_at_hand(filled)
            if filled > _GATHERED:
                await self._send_gathered(filled)
                filled = 0
                continue
            request = self._reader.next_request()
            if request is None or request[1] == _DISC:
                if filled:
                    await self._send_gathered(filled)
                return request is not None
            filled = await self._answer_one(filled, *request)

    def _answer_at_hand(self, filled: int) -> int:
        """Answer the small reads and writes that come next, as long as nothing has to be waited for.

        Args:
            filled: bytes of replies that are in the buffer already; returns how many there are now.
        """
        buffer, position, end = self._reader.pending()
        view, size, device, structured = self._view, self._device.size, self._device, self._structured
        unpack, locate, preadv = HEADER.unpack_from, device.locate, os.preadv
        pack_data, pack_simple = replies.DATA_CHUNK.pack_into, replies.SIMPLE_REPLY.pack_into
        header = replies.DATA_CHUNK.size if structured else replies.SIMPLE_REPLY.size
        head, done = HEADER.size, replies.SIMPLE_REPLY.size
        while (body := position + head) <= end and filled <= _GATHERED:
            kind, cookie, offset, length = unpack(buffer, position)
            if kind == PLAIN_READ:
                if not 0 < length < _LARGE_READ or offset + length > size:
                    break
                place = locate(offset, length)
                if place is None:
                    break
                file, host_offset = place
                data = filled + header
                try:
                    if preadv(file.fd, (view[data : data + length],), host_offset, file.nowait) != length:
                        break
                except OSError:  # needs the disk, or fails: a worker finds out
                    break
                if structured:
                    pack_data(view, filled, replies.LAST_DATA, cookie, 8 + length, offset)
                else:
                    pack_simple(view, filled, SIMPLE_REPLY_MAGIC, 0, cookie)
                filled = data + length
                position = body
            elif kind == PLAIN_WRITE:
                behind = body + length
                if behind > end or not self._write_here(offset, buffer[body:behind]):
                    break
                pack_simple(view, filled, SIMPLE_REPLY_MAGIC, 0, cookie)
                filled += done
                position = behind
            else:
                break
        self._reader.skip_to(position)
        return filled

    async def _answer_one(
        self, filled: int, flags: int, command: int, cookie: int, offset: int, length: int, payload: memoryview | None
    ) -> int:
        """Answer a request of any kind, or have it answered; takes and returns the fill of the reply buffer."""
        if command == _READ and _LARGE_READ <= length <= self._maximum and not flags & ~_DF:
            runs = self._runs_at_hand(flags, offset, length) if offset + length <= self._device.size else None
            if runs is not None:
                await self._send_runs(filled, cookie, offset, length, runs)
                return 0
        elif command == _WRITE and payload is not None and not flags and self._write_here(offset, payload):
            return replies.put_simple_reply(self._view, filled, cookie)
        if filled:
            await self._send_gathered(filled)
        await self._hand_over(flags, command, cookie, offset, length, payload)
        return 0

    def _write_here(self, offset: int, payload: memoryview) -> bool:
        """Write without leaving the loop if that can be done at once."""
        length = len(payload)
        if offset + length > self._device.size or not 0 < length <= _INLINE_WRITE:
            return False
        started = time.perf_counter()
        if started < self._writes_wait_until:
            return False
        try:
            if not self._device.write_nowait(offset, payload):
                return False
        except (OSError, NbdserveError):
            return False  # the worker meets the same error and reports it
        ended = time.perf_counter()
        if ended - started > _SLOW_WRITE:
            self._writes_wait_until = ended + _SLOW_SPELL
        return True

    # Large reads, from the host's files straight into the socket

    def _runs_at_hand(self, flags: int, offset: int, length: int) -> list[Extent] | None:
        """The extents of a large read if none of them needs the disk or a computation; None: a worker's job."""
        if not self._transport.sends_files:
            return None
        runs: list[Extent] = []
        end = offset + length
        while offset < end:
            try:
                extent = self._device.map_nowait(offset, end - offset)
            except (OSError, NbdserveError):
                return None  # as above
            if extent is None or isinstance(extent, Computed) or len(runs) == _MAXIMUM_RUNS:
                return None
            if isinstance(extent, Data) and not extent.file.is_cached(extent.host_offset, extent.length):
                return None
            runs.append(extent)
            offset += extent.length
        return runs if len(runs) == 1 or (self._structured and not flags) else None

    async def _send_runs(self, filled: int, cookie: int, offset: int, length: int, runs: list[Extent]) -> None:
        """Send what is gathered and, behind it, a reply whose data lies in files or is zeros."""
        view, send, end = self._view, self._transport.send, offset + length
        await self._claim_socket()
        try:
            for extent in runs:
                last = offset + extent.length == end
                if not self._structured:
                    filled = replies.put_simple_reply(view, filled, cookie)
                elif isinstance(extent, Data):
                    filled = replies.put_data_chunk(view, filled, cookie, offset, extent.length, last)
                else:
                    filled = replies.put_hole_chunk(view, filled, cookie, offset, extent.length, last)
                if isinstance(extent, Data):
                    await send([view[:filled]], more=True)
                    await self._transport.send_file(extent.file, extent.host_offset, extent.length)
                    filled = 0
                elif not self._structured:
                    await send([view[:filled], bytes(extent.length)])
                    filled = 0
                offset += extent.length
            if filled:
                await send([view[:filled]])
        finally:
            self._release_socket()

    # Everything else, in worker threads

    async def _hand_over(
        self, flags: int, command: int, cookie: int, offset: int, length: int, payload: memoryview | None
    ) -> None:
        held: Payload = payload
        if payload is not None and self._reader.is_borrowed(payload):
            held = bytes(payload)
        cost = min(length, self._maximum) if command in (_READ, _WRITE) else 0
        while self._waiting and (
            self._waiting >= _MAXIMUM_WAITING or self._waiting_bytes + cost > _MAXIMUM_WAITING_BYTES
        ):
            self._room = trio.Event()
            await self._room.wait()
        self._waiting += 1
        self._waiting_bytes += cost
        self._nursery.start_soon(self._answer, cost, flags, command, cookie, offset, length, held)

    async def _answer(
        self, cost: int, flags: int, command: int, cookie: int, offset: int, length: int, payload: Payload
    ) -> None:
        reply = await trio.to_thread.run_sync(
            self._handler.handle, flags, command, cookie, offset, length, payload, limiter=self._workers
        )
        await self._claim_socket()
        try:
            await self._transport.send(reply)
        finally:
            self._release_socket()
        self._waiting -= 1
        self._waiting_bytes -= cost
        self._room.set()

    async def _send_gathered(self, filled: int) -> None:
        """Send the first `filled` bytes of the reply buffer."""
        sent = 0 if self._socket_taken else self._transport.send_nowait(self._view[:filled])
        if sent < filled:
            await self._claim_socket()
            try:
                await self._transport.send([self._view[sent:filled]])
            finally:
                self._release_socket()

    # Who may send. trio.Lock takes a turn through the scheduler even when it is free, which costs more than a read.

    async def _claim_socket(self) -> None:
        if self._socket_taken:
            await self._socket_queue.park()
        self._socket_taken = True

    def _release_socket(self) -> None:
        if self._socket_queue:
            self._socket_queue.unpark()  # it stays taken: handed over, so that nobody waits forever
        else:
            self._socket_taken = False
