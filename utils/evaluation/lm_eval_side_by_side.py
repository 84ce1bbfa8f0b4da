"""lm-eval's tasks on several devices: a process for each, since generating token by token keeps one core busy.

A process does one candidate after the other, and the next candidate goes to whoever is free. The same GPU may be named
several times: while one process waits for its core, the GPU works for another.
"""

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from utils.errors import UserError
from utils.evaluation.candidates import Candidate
from utils.evaluation.lm_eval_scores import Accuracy, AccuracyTasks, accuracy, find_tasks
from utils.evaluation.scoring import Scorer
from utils.evaluation.whole_models import whole_model
from utils.runtime import quiet_libraries


def accuracy_side_by_side(
    scorers: Sequence[Scorer],
    candidates: Sequence[Candidate],
    tasks: AccuracyTasks,
    batch_size: int,
    on_begin: Callable[[Candidate], None],
    on_result: Callable[[Candidate, Accuracy], None],
) -> list[str]:
    """Have all candidates do the tasks.

    Args:
        scorers: one for each process, with its device.
        candidates: who does the tasks.
        tasks: what `find_tasks` gave.
        batch_size: prompts at a time of each process.
        on_begin: called here with a candidate that goes to a process.
        on_result: called here with its results.

    Returns:
        A sentence for each candidate that has no results.
    """
    waiting, failures = list(candidates), []
    with _processes(scorers[: len(waiting)], tasks, batch_size) as free:
        busy: dict[Connection, Candidate] = {}
        while (waiting and free) or busy:
            while waiting and free:
                connection, one = free.pop(), waiting.pop(0)
                connection.send(one)
                busy[connection] = one
                on_begin(one)
            for connection in wait(list(busy)):
                one = busy.pop(connection)
                try:
                    found = connection.recv()
                except EOFError:  # killed, for memory perhaps: the other processes go on
                    failures.append(f"{one.name} did not get through lm-eval's tasks: its process ended")
                    continue
                free.append(connection)
                if isinstance(found, UserError):
                    failures.append(f"{one.name} did not get through lm-eval's tasks: {found}")
                else:
                    on_result(one, found)
    return failures + [f"{one.name} did not do lm-eval's tasks: all processes ended" for one in waiting]


@contextmanager
def _processes(scorers: Sequence[Scorer], tasks: AccuracyTasks, batch_size: int) -> Iterator[list[Connection]]:
    """A process for each scorer, ready for candidates, for as long as the context lasts."""
    if any(scorer.settings.device.type == "cuda" for scorer in scorers):
        torch.cuda.empty_cache()  # the processes need what this one holds for nothing
        # Keys and values grow with every token: blocks that cannot grow are kept by each process until the GPU is full.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    context = get_context("spawn")  # a forked process cannot use the GPU
    started: list[BaseProcess] = []
    connections = []
    try:
        for scorer in scorers:
            ours, theirs = context.Pipe()
            what = pickle.dumps((scorer.config, tuple(scorer.tasks), scorer.settings))
            arguments = (theirs, what, tasks.asked, tasks.confirmed, batch_size)
            started.append(context.Process(target=serve, args=arguments, daemon=True))
            started[-1].start()
            theirs.close()  # here; so that the end of the process is the end of what it sends
            connections.append(ours)
        yield list(connections)
    finally:
        for connection in connections:
            connection.close()
        for process in started:
            process.terminate()
            process.join()


def serve(connection: Connection, what: bytes, asked: Sequence[str], confirmed: bool, batch_size: int) -> None:
    """In a process: answer every candidate that comes with its `Accuracy`, or with the `UserError` in its place."""
    quiet_libraries()
    config, tasks, settings = pickle.loads(what)
    torch.set_num_threads(settings.threads)
    if settings.device.index is not None:  # a model's own kernels may be written for the current GPU
        torch.cuda.set_device(settings.device)
    found = find_tasks(asked, confirmed)
    scorer = Scorer(config, tasks, settings)
    while True:
        try:
            one = connection.recv()
        except EOFError:
            return
        try:
            with whole_model(one, scorer.preparing, settings.scratch) as whole:
                result = accuracy(one.name, whole, found, batch_size)
        except UserError as error:
            result = error
        connection.send(result)
