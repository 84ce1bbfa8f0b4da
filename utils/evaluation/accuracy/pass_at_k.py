"""Whether code that a model wrote passes its tests, for the tasks of lm-eval's beside this file. Nothing is fetched.

pass@k is the chance that at least one of k answers passes, estimated without bias from n answers of which c pass:
1 - C(n - c, k) / C(n, k) (arXiv 2107.03374).

Answers run in a process of their own each, in an empty folder, without the caller's environment, and with
limits on time, memory and file sizes. That keeps a clumsy answer from doing harm, not a hostile one: lm-eval asks for
`confirm_run_unsafe_code`, and a container is the place to run it in.
"""

import concurrent.futures
import contextlib
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

SECONDS = 10.0  # for one answer
_MEMORY = 4 * 2**30
_FILE_BYTES = 2**24
_LIMITED = f"""
import os, resource, sys
for kind, most in (
    (resource.RLIMIT_CPU, {math.ceil(SECONDS)}),
    (resource.RLIMIT_AS, {_MEMORY}),
    (resource.RLIMIT_FSIZE, {_FILE_BYTES}),
    (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(kind, (most, most))
os.execv(sys.argv[1], sys.argv[1:])
"""
_FEWSHOT_TASKS = (2, 3, 4)  # of MBPP, whose authors prompt with them


def pass_at_1(references: str | Sequence[str], predictions: Sequence[str] | Sequence[Sequence[str]]) -> float:
    """pass@1 of one problem's answers, as lm-eval calls a metric.

    Args:
        references: the problem's tests, code that raises where one fails.
        predictions: the answer, or all the answers as a list in the list.
    """
    tests = references if isinstance(references, str) else references[0]
    first = predictions[0]
    answers = [first] if isinstance(first, str) else list(first)
    return pass_at_k(len(answers), sum(_known_passes(answer, tests) for answer in answers), 1)


def pass_at_k(answers: int, passed: int, k: int) -> float:
    """The chance that one of k answers passes, from `answers` of which `passed` do.

    Raises:
        ValueError: fewer answers than k.
    """
    if k > answers:
        raise ValueError(f"pass@{k} cannot be estimated from {answers} answers")
    return 1.0 - math.comb(answers - passed, k) / math.comb(answers, k)


def run_side_by_side(responses: Iterable[Sequence[str]], docs: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Answers as they come, all run against their rows' tests on all cores by then (MBPP), as a filter of lm-eval's.

    The metric, which is asked row by row, finds what came of it.
    """
    answers, rows = [list(own) for own in responses], list(docs)
    pairs = {(answer, "\n".join(doc["test_list"])) for own, doc in zip(answers, rows, strict=True) for answer in own}
    with concurrent.futures.ThreadPoolExecutor(_cores()) as pool:
        list(pool.map(lambda pair: _known_passes(*pair), pairs))
    return answers


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache(maxsize=2**14)
def _known_passes(answer: str, tests: str) -> bool:
    return passes(answer, tests)


def passes(answer: str, tests: str, seconds: float = SECONDS) -> bool:
    """Run an answer and its tests in a process of its own; whether it came to its end without an error in time."""
    token = secrets.token_hex(16)  # an answer that leaves early, even with exit code 0, does not print it
    with tempfile.TemporaryDirectory(prefix="answer_") as folder:
        script = Path(folder) / "answer.py"
        script.write_text(f"{answer}\n{tests}\nprint({token!r}, flush=True)\n", encoding="utf-8", errors="replace")
        process = subprocess.Popen(
            _words(script),
            cwd=folder,
            env={"PATH": os.defpath, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            output = b""
        finally:
            _end(process)
    return process.returncode == 0 and output.rstrip().endswith(token.encode())


def completed(responses: Iterable[Sequence[str]], docs: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Each answer behind the beginning that its prompt is (HumanEval), as a filter of lm-eval's."""
    return [[doc["prompt"] + answer for answer in answers] for answers, doc in zip(responses, docs, strict=True)]


def tasks_2_to_4(docs: Any) -> Any:
    """The rows of MBPP's prompt split that its authors show as examples; all where they are not among them."""
    chosen = [place for place, doc in enumerate(docs) if doc.get("task_id") in _FEWSHOT_TASKS]
    return docs.select(chosen or range(len(docs)))


def _words(script: Path) -> list[str]:
    """What runs the answer; where the system has limits, a first program sets them and becomes the second, since a fork
    that calls Python functions is not safe beside other threads."""
    words = [sys.executable, "-I", str(script)]
    return [sys.executable, "-I", "-S", "-c", _LIMITED, *words] if os.name == "posix" else words


def _end(process: subprocess.Popen) -> None:
    """End the answer's process and those it started."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.communicate()
