"""One thread that does what may block, in the order in which it was asked, so that the event loop need not."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import ParamSpec, TypeVar

import outcome
import trio

T = TypeVar("T")
P = ParamSpec("P")


class Worker:
    """A thread of its own, started when it is first needed."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._thread: Thread | None = None

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the function in the thread and return what it returns. Once asked for, it is done: no cancelling."""
        task = trio.lowlevel.current_task()
        token = trio.lowlevel.current_trio_token()

        def job() -> None:
            result = outcome.capture(function, *args, **kwargs)
            token.run_sync_soon(trio.lowlevel.reschedule, task, result)

        self._put(job)
        result: T = await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        return result

    def stop(self) -> None:
        """Return when everything that was asked for has been done; the thread is gone then."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _put(self, job: Callable[[], object]) -> None:
        self._jobs.put(job)
        if self._thread is None:
            self._thread = Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
