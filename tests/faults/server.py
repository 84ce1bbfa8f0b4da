"""A process that has imported everything once, and forks for every command line that it is given.

    python -m tests.faults.server

Reads a JSON object from each line of stdin and answers with one on stdout:

{"words": ["utils/merger.py", "--output_path", ...], "cwd": folder, "log": file, "root": folder, "at": 3, "error": 28}
{"code": 2, "stdout": "...", "stderr": "...", "seconds": 0.4, "processor": 0.3, "peak_kb": 61234}

`code` is negative for a signal, as in `subprocess`. With "root" the calls that change files below it (with "reads": that read
them) are counted, and at number "at" (0: never) one fails with "error" (0: the process is killed). With "forks" those of the
processes that the command forks are counted instead, of each by itself. With "stops", two FIFOs, the process writes a byte to
the first before each such call, and waits for one from the second. With "stacks", a file, the stack of Python before each such
call is written there. Needs `shim.c` loaded before the C library then. With
"snapshots" a pass writes down where it stands at every block. After "limit" seconds the process is killed.

What a command imports while it works is imported here once it has ended, so that the next fork has it.
"""

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def serve() -> None:
    """Answer until stdin ends."""
    sys.path.insert(0, str(ROOT))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print while they are imported is no answer
    _import_all()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), file=answers, flush=True)


def _import_all() -> None:
    import accelerate  # noqa: F401
    import optuna  # noqa: F401
    import pandas  # noqa: F401
    import pyarrow  # noqa: F401
    import torch
    import transformers.conversion_mapping

    import lewis_importance  # noqa: F401
    import lewis_merge  # noqa: F401
    import utils.commands.decide
    import utils.commands.decide_pictures
    import utils.commands.decide_report
    import utils.commands.evaluate
    import utils.commands.measure
    import utils.commands.merge
    import utils.commands.merge_report
    import utils.commands.search
    import utils.evaluator
    import utils.guidance.guided_recipe
    import utils.mergekit_api
    import utils.merger
    import utils.merging.pieces.choice
    import utils.merging.preflight
    import utils.merging.result_check
    import utils.merging.run
    import utils.searcher

    transformers.conversion_mapping.get_checkpoint_conversion_mapping("llama")  # builds its table once
    utils.merging.pieces.choice.replaced_code()
    torch.set_num_threads(1)


def _run(asked: dict) -> dict:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as imported:
        gc.freeze()  # a fork that collects garbage would copy every page of what is here
        start = time.perf_counter()
        child = os.fork()
        if not child:
            _be_the_command(asked, out.fileno(), err.fileno(), imported.fileno())
        with _killed_after(asked.get("limit", 120), child):
            _, status, usage = os.wait4(child, 0)
        texts = []
        for file in (out, err, imported):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        _import(texts[2].splitlines())
        return {
            "code": os.waitstatus_to_exitcode(status),
            "stdout": texts[0],
            "stderr": texts[1],
            "seconds": time.perf_counter() - start,
            "processor": usage.ru_utime + usage.ru_stime,
            "peak_kb": usage.ru_maxrss,
        }


@contextlib.contextmanager
def _killed_after(seconds: float, child: int) -> Iterator[None]:
    def kill(number: int, frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, kill)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))  # 0 would be never
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _be_the_command(asked: dict, out: int, err: int, imported: int) -> None:
    code, before = 1, set(sys.modules)
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.chdir(asked["cwd"])
        script, *words = asked["words"]
        sys.argv = [str(ROOT / script), *words]
        if megabytes := asked.get("memory_mb"):
            limit = _address_space() + megabytes * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        if asked.get("snapshots"):
            from utils.passes import snapshots

            snapshots.SECONDS, snapshots.MOST_SHARE = -1.0, float("inf")
        from utils.errors import run_command

        main = sys.modules[script.removesuffix(".py").replace("/", ".")].main
        if asked.get("root"):
            library = ctypes.CDLL(None)
            if asked.get("stops"):
                library.faults_stop(*map(os.fsencode, asked["stops"]))
            if asked.get("stacks"):
                faulthandler.register(signal.SIGUSR1, open(asked["stacks"], "w"), all_threads=False)  # noqa: SIM115
                library.faults_signal(signal.SIGUSR1)
            root, log = os.fsencode(asked["root"]), os.fsencode(asked["log"])
            chosen = [asked.get(key, 0) for key in ("reads", "forks", "at", "error")]
            library.faults_arm(root, *chosen, log)
        run_command(main, one_result=True)
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 0 if ending.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os.write(imported, "\n".join(name for name in sys.modules if name not in before).encode())
        os._exit(code)


def _import(names: Iterable[str]) -> None:
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    serve()
