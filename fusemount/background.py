"""A command that goes on in the background: its caller returns when it is ready, or with the reason why not."""

from __future__ import annotations

import os
import signal
import sys
import syslog
from collections.abc import Callable

from nbdserve.errors import NbdserveError, OpenError

Ready = Callable[[], None]
Log = Callable[[str], None]


def in_background(serve: Callable[[Ready, Log], None]) -> None:
    """Call `serve` in a child process, and return when it has called the `ready` that it is given.

    Until then the child has the terminal and says there itself what is wrong. Afterwards its log goes to syslog. To be
    called before any threads are started.

    In the child this returns when `serve` does, and raises what it raises.

    Raises:
        OpenError: the child died of a signal. If it ended with a status, so does this process.
    """
    from_child, to_parent = os.pipe()
    child = os.fork()
    if child:
        os.close(to_parent)
        try:
            is_ready = os.read(from_child, 1)
        except KeyboardInterrupt:
            os.kill(child, signal.SIGTERM)
            raise
        if is_ready:
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            raise OpenError(f"the process behind the mount died of signal {os.WTERMSIG(status)}")
        os._exit(os.WEXITSTATUS(status))
    os.close(from_child)
    os.setsid()

    def ready() -> None:
        os.chdir("/")
        sys.stdout.flush()
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(nothing, fd)
        os.close(nothing)
        os.write(to_parent, b"1")
        os.close(to_parent)

    syslog.openlog("fusemount", syslog.LOG_PID, syslog.LOG_DAEMON)

    def log(line: str) -> None:
        syslog.syslog(syslog.LOG_ERR, line)

    try:
        serve(ready, log)
    except (NbdserveError, OSError) as error:
        log(str(error))
        raise
