"""The transmission loop of one connection, with its fast path.

Theory of operation. One receive takes whatever the socket has; every whole request in it is handled before the next
await; small replies gather in one buffer and leave in one send. What the page cache answers at once is answered right
here: small reads by preadv straight into the reply buffer (HostFile.nowait makes it fail where the disk would be
needed), large ones mostly by sendfile (sending.ReplySender), writes into mapped space by pwrite. Everything that may
block goes to a worker thread (requests.RequestHandler), whose reply is sent when it is ready, so a slow disk stalls
only those who wait for it.

Invariants:

- A pin (block.pins) is held from the lookup of an extent until its bytes have been read, written or handed to the
  socket, so no freed host space is reused under it. Pages that sendfile has queued survive reuse, because formats
  punch a hole before they reuse space (HostFile.punch_hole).
- What waits in worker threads is bounded in number and in bytes; beyond that the client is not read from.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable

import trio

from nbdserve.block import BlockDevice, Computed, Data, Extent
from nbdserve.errors import NbdserveError
from nbdserve.protocol import replies
from nbdserve.protocol.constants import SIMPLE_REPLY_MAGIC, Command, CommandFlags
from nbdserve.protocol.messages import Agreement
from nbdserve.protocol.transmission_server import HEADER, PLAIN_READ, PLAIN_WRITE, RequestReader
from nbdserve.server.requests import Payload, Reply, RequestHandler
from nbdserve.server.sending import GATHERED, LARGE_READ, ReplySender
from nbdserve.server.transport import Transport

_READ, _WRITE, _DISC = int(Command.READ), int(Command.WRITE), int(Command.DISC)
_DF = int(CommandFlags.DF)

_MAXIMUM_RUNS = 256  # extents of one read that are sent from the loop; their chunk headers fit into the buffer
_PAGE_MASK = 4095  # what is not whole pages may need old bytes from the disk first
_INLINE_WRITE = 1 << 20  # larger writes are worth a worker thread, so that others get their turn

_BULK = 32 << 20  # bytes of large reads and writes, after which a look at where the client runs pays
_TURN = 0.002  # seconds that one connection may keep the loop before it lets others run
_PATIENCE = 0.0002  # seconds of looking at an empty socket before parking
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
        self._sender = ReplySender(transport, agreement.structured)
        self._parked: trio.CancelScope | None = None
        self._stopping = False
        self._waiting = 0
        self._waiting_bytes = 0
        self._room = trio.Event()
        self._writes: deque[tuple[int, int, int, int, bytes | memoryview]] = (
            deque()
        )  # cost, flags, cookie, offset, data
        self._writers = 0
        self._patience = 0.0
        self._bulk = 0
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
            if self._bulk > _BULK:
                self._bulk = 0
                self._transport.keep_apart()
            if self._client_is_quiet:
                await self._park()
            else:
                await trio.lowlevel.checkpoint()

    async def _take_turn(self) -> bool:
        """Serve until the client is quiet or others should get their turn; True when it has said goodbye or gone."""
        receive_nowait, reader, clock = self._transport.receive_nowait, self._reader, time.perf_counter
        now = clock()
        turn_ends = now + _TURN
        give_up = now + (0 if self._waiting else self._patience)
        self._client_is_quiet = False
        with self._device.pins.held():
            while now < turn_ends:
                try:
                    count = receive_nowait(reader.space())
                except BlockingIOError:
                    now = clock()
                    if now >= give_up:
                        self._client_is_quiet = True
                        return False
                    continue
                if not count:
                    return True
                reader.received(count)
                if await self._serve_batch():
                    return True
                now = clock()
                # Whoever looks again and again keeps worker threads from running.
                give_up = now + (0 if self._waiting else self._patience)
        return False

    async def _park(self) -> None:
        """Wait for the client; and learn whether it tends to come back so soon that looking again pays."""
        parked_at = time.perf_counter()
        with trio.CancelScope() as self._parked:
            await self._transport.wait_readable()
        self._parked = None
        self._patience = _PATIENCE if time.perf_counter() - parked_at < _SOON else 0

    async def _serve_batch(self) -> bool:
        """Handle every whole request received; True when the client has said goodbye."""
        filled = 0
        while True:
            filled = self._answer_at_hand(filled)
            if filled > GATHERED:
                await self._sender.send_gathered(filled)
                filled = 0
                continue
            request = self._reader.next_request()
            if request is None or request[1] == _DISC:
                if filled:
                    await self._sender.send_gathered(filled)
                return request is not None
            filled = await self._answer_one(filled, *request)

    def _answer_at_hand(self, filled: int) -> int:
        """Answer the small reads and writes that come next, as long as nothing has to be waited for.

        Args:
            filled: bytes of replies that are in the buffer already; returns how many there are now.
        """
        buffer, position, end = self._reader.pending()
        view, size, device, structured = self._sender.view, self._device.size, self._device, self._structured
        unpack, locate, preadv = HEADER.unpack_from, device.locate, os.preadv
        pack_data, pack_simple = replies.DATA_CHUNK.pack_into, replies.SIMPLE_REPLY.pack_into
        header = replies.DATA_CHUNK.size if structured else replies.SIMPLE_REPLY.size
        head, done = HEADER.size, replies.SIMPLE_REPLY.size
        locate_writable, pwrite = device.locate_writable, os.pwrite
        started = time.perf_counter()
        writes_here = started >= self._writes_wait_until
        while (body := position + head) <= end and filled <= GATHERED:
            kind, cookie, offset, length = unpack(buffer, position)
            if kind == PLAIN_READ:
                if not 0 < length < LARGE_READ or offset + length > size:
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
                if behind > end:
                    break
                place = locate_writable(offset, length) if writes_here and offset + length <= size else None
                if place is None or (place[1] | length) & _PAGE_MASK or not 0 < length < LARGE_READ:
                    if not self._write_here(offset, buffer[body:behind]):
                        break
                else:
                    try:
                        if pwrite(place[0].fd, buffer[body:behind], place[1]) != length:
                            break
                    except OSError:  # the worker meets it as well and reports it
                        break
                pack_simple(view, filled, SIMPLE_REPLY_MAGIC, 0, cookie)
                filled += done
                position = behind
            else:
                break
        self._reader.skip_to(position)
        self._note_slowness(started)
        return filled

    async def _answer_one(
        self, filled: int, flags: int, command: int, cookie: int, offset: int, length: int, payload: memoryview | None
    ) -> int:
        """Answer a request of any kind, or have it answered; takes and returns the fill of the reply buffer."""
        if command == _READ and LARGE_READ <= length <= self._maximum and not flags & ~_DF:
            filled, answered = await self._read_large(filled, flags, cookie, offset, length)
            if answered == length:
                return filled
            offset += answered
            length -= answered
        elif command == _WRITE and payload is not None and not flags and self._write_here(offset, payload):
            return replies.put_simple_reply(self._sender.view, filled, cookie)
        if filled:
            await self._sender.send_gathered(filled)
        await self._hand_over(flags, command, cookie, offset, length, payload)
        return 0

    def _write_here(self, offset: int, payload: bytes | memoryview) -> bool:
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
        self._bulk += length if length >= LARGE_READ else 0
        self._note_slowness(started)
        return True

    def _note_slowness(self, started: float) -> None:
        """Leave writes to worker threads for a while if the disk has held up what began then."""
        ended = time.perf_counter()
        if ended - started > _SLOW_WRITE:
            self._writes_wait_until = ended + _SLOW_SPELL

    # Large reads, without a worker thread

    async def _read_large(self, filled: int, flags: int, cookie: int, offset: int, length: int) -> tuple[int, int]:
        """Answer a large read, or the beginning of one, from the page cache.

        Returns:
            The fill of the reply buffer, and how many bytes of the range are answered; a worker has to do the rest.
        """
        device, sender = self._device, self._sender
        if offset + length > device.size:
            return filled, 0
        place = device.locate(offset, length)
        if place is not None and self._transport.sends_files and place[0].may_be_sent:
            if not place[0].is_cached(place[1], length):
                return filled, 0
            self._bulk += length
            await sender.send_placed(filled, cookie, offset, length, *place)
            return 0, length
        if place is not None:
            if filled:
                await sender.send_gathered(filled)
            self._bulk += length
            whole = not self._structured or bool(flags)
            return 0, await sender.send_copied(cookie, offset, length, *place, whole=whole)
        runs = self._runs_at_hand(flags, offset, length)
        if runs is None:
            return filled, 0
        await sender.send_runs(filled, cookie, offset, runs)
        return 0, length

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
                return None  # the worker meets the same error and reports it
            if extent is None or isinstance(extent, Computed) or len(runs) == _MAXIMUM_RUNS:
                return None
            if isinstance(extent, Data) and not extent.file.is_cached(extent.host_offset, extent.length):
                return None
            runs.append(extent)
            offset += extent.length
        return runs if len(runs) == 1 or (self._structured and not flags) else None

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
        if command != _WRITE or held is None:
            self._nursery.start_soon(self._answer, cost, flags, command, cookie, offset, length, held)
            return
        self._writes.append((cost, flags, cookie, offset, held))
        if self._writers < self._device.useful_writers:
            self._writers += 1
            self._nursery.start_soon(self._answer_writes)

    async def _answer_writes(self) -> None:
        """Have writes done that could not be done at once, one after the other.

        What kept them waiting may have gone with the one before them, an allocation for instance; so each is tried here
        once more. Were all of them in threads, they would get into each other's way, and into that of those to come.
        """
        while self._writes:
            cost, flags, cookie, offset, payload = self._writes.popleft()
            with self._device.pins.held():
                done = not flags and self._write_here(offset, payload)
            if done:
                await self._reply(cost, [replies.simple_reply(cookie)])
            else:
                await self._answer(cost, flags, _WRITE, cookie, offset, len(payload), payload)
        self._writers -= 1

    async def _answer(
        self, cost: int, flags: int, command: int, cookie: int, offset: int, length: int, payload: Payload
    ) -> None:
        reply = await trio.to_thread.run_sync(
            self._handler.handle, flags, command, cookie, offset, length, payload, limiter=self._workers
        )
        await self._reply(cost, reply)

    async def _reply(self, cost: int, reply: Reply) -> None:
        await self._sender.send(reply)
        self._waiting -= 1
        self._waiting_bytes -= cost
        self._room.set()
