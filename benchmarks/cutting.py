"""How long it takes to cut one expert's layer to a tenth: the search for the entries, and their fit.

    python3 benchmarks/cutting.py --threads 1
    python3 benchmarks/cutting.py --shapes 4096x14336 --repeats 1

Layers of random numbers, their inputs with much in common (half as many directions as channels, and some noise), in the
memory of one process; the least of the repeats counts. Written to `benchmarks/results/cutting.csv`, one row a shape, seconds
for the whole layer and nanoseconds an entry.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
import torch
from torch import Tensor

from benchmarks.contenders import machine
from utils.merging.guided.mask import kept_entries
from utils.merging.guided.refit import refitted
from utils.merging.guided.support import joint_support
from utils.publishing.files import publish_files

RESULTS = Path(__file__).resolve().parent / "results" / "cutting.csv"
SHAPES = "1024x1024,2816x1024,1024x2816,1024x4096"  # outputs x inputs
DENSITY, RIDGE = 0.1, 1e-3


def drawn(outputs: int, inputs: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """A change in float64, the Gram matrix of inputs in float32, what the outputs count."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2 * inputs, inputs // 2, generator=generator) @ torch.randn(
        inputs // 2, inputs, generator=generator
    )
    tokens += inputs**0.5 / 4 * torch.randn(tokens.shape, generator=generator)
    gram = tokens.T @ tokens / len(tokens)
    change = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    return change.to(device), gram.to(device), torch.rand(outputs, generator=generator) + 0.1


def least(repeats: int, device: str, work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """The least seconds that some work takes, and its result."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best, result


def measured(shape: tuple[int, int], device: str, repeats: int) -> tuple[float, float]:
    """Seconds of the search and of the fit of one layer."""
    change, gram, outputs = drawn(*shape, device)
    k = kept_entries(change.numel(), DENSITY)
    search, mask = least(repeats, device, lambda: joint_support(change, k, gram, outputs, RIDGE))
    fit, _ = least(repeats, device, lambda: refitted(change, mask, gram, RIDGE))
    return search, fit


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="outputs x inputs, by comma")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    rows = []
    for text in flags.shapes.split(","):
        outputs, inputs = (int(part) for part in text.split("x"))
        seconds = measured((outputs, inputs), flags.device, flags.repeats)
        entry = [round(1e9 * one / outputs / inputs) for one in seconds]
        rows.append((outputs, inputs, *(round(one, 2) for one in seconds), *entry, flags.threads, machine()))
    columns = ("outputs", "inputs", "search_s", "fit_s", "search_ns_entry", "fit_ns_entry", "threads", "machine")
    table = pd.DataFrame(rows, columns=list(columns))
    print(table.drop(columns="machine").to_string(index=False))
    publish_files(flags.out.parent, {flags.out.name: table.to_csv(index=False).encode()}, overwrite=True)
    print(f"{machine()}; wrote {flags.out}")


if __name__ == "__main__":
    main()
