"""`mergekit-yaml`, unchanged but for one more line at the end: how long its executor ran, writing included.

python3 benchmarks/timed_mergekit.py RECIPE OUTPUT [options of mergekit-yaml]
"""

import time
from collections.abc import Iterator
from typing import Any

import torch
from mergekit.graph import Executor
from mergekit.multigpu_executor import MultiGPUExecutor
from mergekit.scripts.run_yaml import main


def time_runs(executor: type) -> None:
    """Make an executor print the seconds of its run."""
    run = executor.run

    def timed(*arguments: Any, **keywords: Any) -> Iterator[Any]:
        start = time.perf_counter()
        yield from run(*arguments, **keywords)
        peak = ""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            held = max(torch.cuda.max_memory_allocated(gpu) for gpu in range(torch.cuda.device_count()))
            peak = f", peak GPU memory {held / 1e9:.3f} GB" if held else ""
        print(f"merged in {time.perf_counter() - start:.2f} s{peak}", flush=True)

    executor.run = timed


if __name__ == "__main__":
    for executor in (Executor, MultiGPUExecutor):
        time_runs(executor)
    main()
