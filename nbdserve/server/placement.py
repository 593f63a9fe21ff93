"""Keep off the processor that a client on the same host runs on.

Linux wakes the reader of a local socket on its writer's processor, because the bytes are in that one's cache, and on a
host with few processors leaves it there when both are busy (select_task_rq_fair() and select_idle_cpu() in
kernel/sched/fair.c). Client and server then take turns on one processor while another is idle, and large transfers
take twice as long. So a busy connection looks now and then where its client runs, and moves away from there. Nothing
is pinned: the set of processors that the thread may use is the same afterwards.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress

_PEER_CREDENTIALS = struct.Struct("=iII")  # struct ucred: process, user, group
_SO_INCOMING_CPU = 49  # asm-generic/socket.h
_PROCESSOR_FIELD = 36  # of /proc/PID/stat, counted behind the command's name

Locator = Callable[[], int]


def client_locator(sock: socket.socket) -> Locator | None:
    """A function that tells on which processor this connection's client ran last; None if it is on another host.

    The function raises OSError or ValueError when the client has gone.
    """
    if sock.family == socket.AF_UNIX:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        process = _PEER_CREDENTIALS.unpack(credentials)[0]
        return (lambda: _last_processor(process)) if process > 0 else None
    if sock.getsockname()[0] == sock.getpeername()[0]:
        # What is sent to the own host is received by the sender's processor.
        return lambda: sock.getsockopt(socket.SOL_SOCKET, _SO_INCOMING_CPU)
    return None


def _last_processor(process: int) -> int:
    with open(f"/proc/{process}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[_PROCESSOR_FIELD])


def keep_apart(client: Locator) -> None:
    """Move the calling thread to another processor if the client runs on this one."""
    with suppress(OSError, ValueError, IndexError):
        allowed = os.sched_getaffinity(0)
        here = ctypes.CDLL(None).sched_getcpu()
        if len(allowed) > 1 and here in allowed and client() == here:
            os.sched_setaffinity(0, allowed - {here})
            os.sched_setaffinity(0, allowed)
