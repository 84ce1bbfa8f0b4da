"""Jobs in stages: order, threads, errors."""

import threading
import time

import pytest

from utils.merging.pieces.work_line import WorkLine


class Staged:
    """A job that records which step of which stage ran, and fails if one runs out of order."""

    def __init__(self, name: int, sizes: list[int], log: list, begun: list) -> None:
        self.name, self.sizes, self.log, self.begun = name, list(sizes), log, begun
        self.stage, self.left = -1, 0

    def next_stage(self, tools):
        assert self.left == 0, "a stage began before the one before was done"
        if self.stage < 0:
            self.begun.append(self.name)
        self.stage += 1
        if self.stage == len(self.sizes):
            self.log.append((self.name, "end"))
            return []
        self.left = self.sizes[self.stage]
        return [lambda tools, step=step: self.run(step, tools) for step in range(self.left)]

    def run(self, step, tools):
        time.sleep(0.001)
        tools.append(threading.current_thread().name)
        self.log.append((self.name, self.stage, step))
        with _lock:
            self.left -= 1


_lock = threading.Lock()


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_all_steps_are_done_stage_by_stage(threads):
    sizes = [[3, 1], [], [1], [5, 2, 4], [2]]
    log, begun, tools = [], [], []

    def make_tools():
        tools.append([])
        return tools[-1]

    jobs = [Staged(name, stages, log, begun) for name, stages in enumerate(sizes)]
    WorkLine(jobs, make_tools).run(threads, lambda: None)
    expected = {
        (n, stage, step) for n, stages in enumerate(sizes) for stage, s in enumerate(stages) for step in range(s)
    }
    assert {entry for entry in log if len(entry) == 3} == expected
    assert [entry for entry in log if entry[1] == "end"] and len(log) == len(expected) + len(sizes)
    assert begun == list(range(len(sizes)))
    assert len(tools) == threads and all(len(set(used)) <= 1 for used in tools), "tools are a thread's own"


def test_steps_of_several_threads_run_side_by_side():
    barrier = threading.Barrier(3, timeout=20)

    class Meeting:
        done = False

        def next_stage(self, tools):
            steps = [] if self.done else [lambda tools: barrier.wait()] * 3
            self.done = True
            return steps

    WorkLine([Meeting()], list).run(3, lambda: None)


def test_an_error_stops_the_line_and_is_raised():
    done = []

    class Failing:
        def next_stage(self, tools):
            return [self.fail, *[lambda tools: done.append(1)] * 500]

        def fail(self, tools):
            raise MemoryError("here")

    with pytest.raises(MemoryError, match="here"):
        WorkLine([Failing()], list).run(2, lambda: None)
    assert len(done) < 500


def test_an_interrupt_of_the_waiting_thread_stops_the_line():
    class Endless:
        def next_stage(self, tools):
            return [lambda tools: time.sleep(0.005)]

    def interrupt():
        raise KeyboardInterrupt

    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        WorkLine([Endless()], list).run(2, interrupt)
    assert set(threading.enumerate()) <= before


def test_news_are_collected_at_the_end():
    calls = []
    WorkLine([], list).run(2, lambda: calls.append(1))
    assert calls
