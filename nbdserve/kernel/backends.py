"""Who answers for a device: nbdserve in the background, with its connections given to the kernel, or qemu-nbd."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from nbdserve.errors import NbdserveError, ProtocolError
from nbdserve.kernel.netlink import Connection, NbdNetlink
from nbdserve.kernel.records import Process, Record, Records
from nbdserve.kernel.system import KernelError, System, find_program, run, wait_until
from nbdserve.protocol.constants import TransmissionFlags
from nbdserve.protocol.handshake import HandshakeState
from nbdserve.protocol.handshake_client import ClientHandshake

_ANSWER_SECONDS = 30.0
_STOP_SECONDS = 60.0  # the server may have much to flush
_CONNECTED_SECONDS = 15.0
_FLAGS_OF_THE_KERNEL = (  # drivers/block/nbd.c knows no others
    TransmissionFlags.HAS_FLAGS
    | TransmissionFlags.READ_ONLY
    | TransmissionFlags.SEND_FLUSH
    | TransmissionFlags.SEND_FUA
    | TransmissionFlags.SEND_TRIM
    | TransmissionFlags.CAN_MULTI_CONN
)

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Request:
    """What the user wants to have as a device.

    Attributes:
        image: an absolute path, or an NBD URI.
        format, snapshot, passphrase_file: as nbdserve's options of that name; the file by its absolute path.
        device: the name of a device (nbd3), or None for any that is free.
        connections: between the kernel and the server.
        seconds: after which an unanswered request counts its connection as dead, and for which requests wait for the
            server to come back when all are; then they fail.
    """

    image: str
    format: str | None = None
    read_only: bool = False
    snapshot: str | None = None
    device: str | None = None
    connections: int = 2
    seconds: int = 60
    passphrase_file: str | None = None


def nbdserve_options(request: Request, socket_path: str) -> list[str]:
    """The arguments with which nbdserve serves for a device."""
    return [
        *(["--read-only"] if request.read_only else []),
        *(["--format", request.format] if request.format else []),
        *(["--snapshot", request.snapshot] if request.snapshot else []),
        *(["--passphrase-file", request.passphrase_file] if request.passphrase_file else []),
        *("--socket", socket_path, "--", request.image),
    ]


def qemu_nbd_command(request: Request, device: str) -> list[str]:
    """What connects a device to qemu-nbd, which goes on in the background."""
    return [
        *("qemu-nbd", f"--connect=/dev/{device}"),
        *(["--read-only"] if request.read_only else []),
        *([f"--format={request.format}"] if request.format else []),
        *([f"--load-snapshot=snapshot.name={request.snapshot}"] if request.snapshot else []),
        *("--", request.image),
    ]


# Our own server


def connect_native(request: Request, records: Records, tell: Tell) -> Record:
    """Start a server, and have the kernel connect a device to it.

    Raises:
        NbdserveError: that failed, and nothing is left of it.
    """
    log = records.new_file("log")
    command = [sys.executable, "-m", "nbdserve", *nbdserve_options(request, str(log.with_suffix(".sock")))]
    record = Record("", request.image, "native", Process(0, 0), tuple(command), request.connections, request.seconds)
    record = _start(replace(record, log=str(log)), tell)
    try:
        with NbdNetlink() as netlink, ExitStack() as stack:
            index = None if request.device is None else int(request.device.removeprefix("nbd"))
            sockets, connection = _negotiated(record, stack)
            return replace(record, device=f"nbd{netlink.connect(sockets, connection, index)}")
    except BaseException:
        stop_server(record)
        records.remove(record)
        raise


def reconnect_native(record: Record, tell: Tell) -> Record:
    """Start the dead server of a device again, and replace the dead connections."""
    if record.server.is_alive:
        raise KernelError(f"/dev/{record.device}: its server is alive; nothing to reconnect")
    record = _start(record, tell)
    try:
        with NbdNetlink() as netlink, ExitStack() as stack:
            sockets, connection = _negotiated(record, stack)
            netlink.reconfigure(int(record.device.removeprefix("nbd")), sockets, connection)
    except BaseException:
        stop_server(record)
        raise
    return record


def _start(record: Record, tell: Tell) -> Record:
    """The record with a server that is ready; what it says meanwhile is told."""
    log = Path(record.log)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [_own_place(), os.getenv("PYTHONPATH")]))}
    with log.open("wb") as stream:
        # In "/", so that it keeps no file system from being unmounted, and finds no module of somebody else there.
        server = subprocess.Popen(
            record.command,
            cwd="/",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stream,
            start_new_session=True,
        )
    assert server.stdout is not None
    try:
        with server.stdout:
            is_ready = bool(server.stdout.readline())
    except BaseException:
        server.terminate()
        raise
    said = log.read_text(errors="replace")
    lines = [line.removeprefix("nbdserve: ") for line in said.splitlines()]
    process = Process.of(server.pid)
    if not is_ready or process is None:
        server.wait()
        log.unlink()
        raise KernelError("; ".join(lines) or "the server died without a word")
    server.returncode = 0  # it outlives us, on purpose: Popen must not warn of that
    for line in lines:
        tell(line)
    return replace(record, server=process, log_shown=len(said))


def _own_place() -> str:
    return str(Path(__file__).parent.parent.parent)


def _negotiated(record: Record, stack: ExitStack) -> tuple[list[socket.socket], Connection]:
    """Connections to the server that the kernel can take over, and what it has to know of them."""
    sockets = []
    path = str(Path(record.log).with_suffix(".sock"))
    for _ in range(record.connections):
        connection = stack.enter_context(socket.socket(socket.AF_UNIX))
        connection.settimeout(_ANSWER_SECONDS)
        try:
            connection.connect(path)
            export = _negotiate(connection)
        except (OSError, ProtocolError) as error:
            raise KernelError(f"the server of {record.image} does not answer: {error}") from None
        connection.settimeout(None)
        sockets.append(connection)
    size, flags = export
    size -= size % 512  # the kernel counts in sectors
    known = int(flags & _FLAGS_OF_THE_KERNEL)
    return sockets, Connection(size, known, record.seconds, record.seconds, f"nbdserve {record.image}"[:255])


def _negotiate(connection: socket.socket) -> tuple[int, TransmissionFlags]:
    handshake = ClientHandshake(structured=False, contexts=())  # the kernel understands simple replies only
    while handshake.state is HandshakeState.NEGOTIATING:
        connection.sendall(handshake.data_to_send())
        if handshake.state is HandshakeState.NEGOTIATING:
            data = connection.recv(1 << 12)
            if not data:
                handshake.connection_lost()
            handshake.receive(data)
    connection.sendall(handshake.data_to_send())
    export = handshake.agreement.export
    return export.size, export.flags


# qemu-nbd


def connect_qemu(request: Request, system: System, records: Records) -> Record:
    """Let qemu-nbd connect a device.

    A free device is chosen under its lock, so that two of us never choose the same; if another program is quicker,
    qemu-nbd fails and the next one is tried.

    Raises:
        NbdserveError: that failed, and nothing is left of it.
    """
    if find_program("qemu-nbd") is None:
        raise KernelError("qemu-nbd is not installed (package qemu-utils); --backend native needs no QEMU")
    for device in system.devices():
        if request.device not in (None, device.name):
            continue
        with records.lock(device.name, wait=False) as ours:
            if not ours or device.is_connected:
                continue
            command = qemu_nbd_command(request, device.name)
            try:
                run(command)
            except KernelError:
                current = system.device(device.name)
                if current is not None and current.is_connected and request.device is None:
                    continue
                raise
            return _connected_by_qemu(request, device.name, command, system, records)
    if request.device is not None:
        raise KernelError(f"/dev/{request.device} is in use, or does not exist; leave --device out for a free one")
    raise KernelError("all of the kernel's NBD devices are in use; detach one ('nbdattach --list' shows them)")


def _connected_by_qemu(request: Request, name: str, command: list[str], system: System, records: Records) -> Record:
    """Wait until the process that went to the background has connected the device."""

    def is_connected() -> bool:
        device = system.device(name)
        return device is not None and device.is_connected and device.size > 0

    if not wait_until(is_connected, _CONNECTED_SECONDS):
        raise KernelError(f"qemu-nbd has not connected /dev/{name} within {_CONNECTED_SECONDS:.0f} s")
    device = system.device(name)
    process = Process.of(device.pid) if device is not None and device.pid is not None else None
    if process is None:
        raise KernelError(f"qemu-nbd has died while it connected /dev/{name}")
    record = Record(name, request.image, "qemu", process, tuple(command), 1, request.seconds)
    records.put(record)
    return record


# Both


def disconnect(record: Record | None, index: int) -> None:
    """Have the kernel let go of the server. Raises NbdserveError if it does not."""
    if record is not None and record.backend == "qemu" and find_program("qemu-nbd") is not None:
        run(["qemu-nbd", "--disconnect", f"/dev/nbd{index}"])
        return
    with NbdNetlink() as netlink:
        netlink.disconnect(index)


def stop_server(record: Record) -> None:
    """End the server of a device that is disconnected, and wait for what it has to write.

    Raises:
        KernelError: it does not end, or something went wrong in it.
    """
    if not record.server.stop(_STOP_SECONDS):
        raise KernelError(
            f"the server of {record.image} (process {record.server.pid}) does not end; the image is in use"
        )
    if complaints := record.complaints:
        raise KernelError(f"the server of {record.image} said: {complaints[-1].removeprefix('nbdserve: ')}")


def choose_backend() -> str:
    """The native one where the kernel offers netlink here, else qemu-nbd."""
    try:
        with NbdNetlink():
            return "native"
    except NbdserveError:
        if find_program("qemu-nbd") is None:
            raise
        return "qemu"
