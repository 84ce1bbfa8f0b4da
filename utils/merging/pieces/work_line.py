"""Jobs in stages, worked on by several threads: the steps of a stage in any order, and all of them before the next stage.

The next job is begun when nothing else is left to do, so that few are under way at once. Threads are worth it because
torch, reading and writing let go of Python's lock while they work.
"""

import threading
from collections.abc import Callable, Iterable
from typing import Generic, Protocol, TypeVar

_SECONDS = 0.05  # between two calls of `meanwhile`

Tools = TypeVar("Tools")
Step = Callable[[Tools], None]


class Job(Protocol[Tools]):
    """What is worked on. `next_stage` is called by one thread at a time, steps by several."""

    def next_stage(self, tools: Tools) -> list[Step[Tools]]:
        """The steps of the next stage, once all handed out are done; none after the last stage."""


class WorkLine(Generic[Tools]):
    """Jobs on their way through a number of threads."""

    def __init__(self, jobs: Iterable[Job[Tools]], make_tools: Callable[[], Tools]) -> None:
        """Take the jobs, begun in this order, and what makes each thread's own tools."""
        self._jobs, self._make_tools = iter(jobs), make_tools
        self._changed = threading.Condition()
        self._ready: list[tuple[Job[Tools], Step[Tools]]] = []
        self._undone: dict[Job[Tools], int] = {}  # steps handed out and not done, of jobs under way
        self._failure: BaseException | None = None
        self._stopped = False

    def run(self, threads: int, meanwhile: Callable[[], None]) -> None:
        """Do all jobs; `meanwhile` is called from this thread again and again. Raises the first error of a step."""
        workers = [threading.Thread(target=self._work, name=f"worker-{n}", daemon=True) for n in range(threads)]
        for worker in workers:
            worker.start()
        try:
            while any(worker.is_alive() for worker in workers):
                meanwhile()
                next(worker for worker in workers if worker.is_alive() or worker is workers[-1]).join(_SECONDS)
        finally:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()
            for worker in workers:
                worker.join()
            meanwhile()  # after an interrupt, too: what is done by then is worth knowing
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        try:
            tools = self._make_tools()
            while (task := self._take()) is not None:
                job, step = task
                if step is not None:
                    step(tools)
                if self._is_last_of_stage(job, step):
                    self._enter(job, job.next_stage(tools))
        except BaseException as error:
            with self._changed:
                self._failure = self._failure or error
                self._stopped = True
                self._changed.notify_all()

    def _take(self) -> tuple[Job[Tools], Step[Tools] | None] | None:
        """The next step; a new job without a step, for its first stage; None if there will be no more."""
        with self._changed:
            while not self._stopped:
                if self._ready:
                    return self._ready.pop()
                job = next(self._jobs, None)
                if job is not None:
                    self._undone[job] = 0
                    return job, None
                if not self._undone:
                    return None
                self._changed.wait()
        return None

    def _is_last_of_stage(self, job: Job[Tools], step: Step[Tools] | None) -> bool:
        with self._changed:
            self._undone[job] -= step is not None
            return not self._undone[job]

    def _enter(self, job: Job[Tools], steps: list[Step[Tools]]) -> None:
        with self._changed:
            if steps:
                self._undone[job] = len(steps)
                self._ready.extend((job, step) for step in reversed(steps))
            else:
                del self._undone[job]
            self._changed.notify_all()
