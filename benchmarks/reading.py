"""Reading weights by system calls, as the commands do, against mapping them into memory, as safetensors does.

    python3 benchmarks/reading.py
    python3 benchmarks/reading.py --shape llama-365m --blocks 4 --runs 41

Both read every tensor of one model, whose files are in the page cache, and convert it to float32, as computing on a CPU does.
They take turns, and which goes first changes from pair to pair. For the time that passes and for processor time, medians are
printed, the median of the ratios of the pairs, and between which ratios that median lies with 95 % certainty (by ranks, so
that a few disturbed pairs do not matter). What is printed is added to `benchmarks/results/reading.txt`.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors import safe_open

from benchmarks.contenders import machine
from benchmarks.shapes import ROOT, SHAPES, build_pair
from utils.models.headers import TensorHeader, read_headers
from utils.models.tensor_files import TensorFiles

RESULTS = ROOT / "benchmarks" / "results" / "reading.txt"
FEWEST = 6  # pairs: between the smallest and the largest of 5 ratios the median lies with 94 % alone
CLOCKS = {"time that passes": time.perf_counter, "processor time": time.process_time}


def by_calls(headers: Mapping[str, TensorHeader]) -> None:
    """Each tensor is read into memory of its own, headers being known."""
    with TensorFiles({header.file for header in headers.values()}) as files:
        for header in headers.values():
            files.read_whole(header, torch.float32)


def by_maps(headers: Mapping[str, TensorHeader]) -> None:
    """Each tensor is pages of its file."""
    for file in sorted({header.file for header in headers.values()}):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safetensors' own handle is no mapping)
                tensors.get_tensor(name).to(torch.float32)


def seconds(
    read: Callable[[Mapping[str, TensorHeader]], None], headers: Mapping[str, TensorHeader]
) -> tuple[float, ...]:
    """How long reading took, by each clock."""
    start = [clock() for clock in CLOCKS.values()]
    read(headers)
    return tuple(clock() - begun for clock, begun in zip(CLOCKS.values(), start, strict=True))


def beyond(count: int) -> int:
    """How many of the smallest and of the largest of `count` values are left out of the 95 % interval of their median.

    The median lies below the k-th smallest value or above the k-th largest with the probability 2 P(B < k), B binomial
    with one half (the sign test): the largest k is taken for which this is at most 5 %, and k - 1 values are left out.
    """
    tail, k = 0.0, 0
    while 2 * (tail + math.comb(count, k) / 2**count) <= 0.05:
        tail += math.comb(count, k) / 2**count
        k += 1
    if not k:
        raise ValueError(f"{count} pairs are too few for such an interval; {FEWEST} give one")
    return k - 1


def summary(pairs: Sequence[tuple[float, float]]) -> str:
    """Medians of both, and the median ratio with its interval."""
    calls, maps = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = sorted(call / mapped for call, mapped in pairs)
    left_out = beyond(len(ratios))
    low, high = ratios[left_out], ratios[-1 - left_out]
    return (
        f"system calls {calls:.3f} s, maps {maps:.3f} s; calls / maps {statistics.median(ratios):.3f} "
        f"({low:.3f} to {high:.3f}, {len(ratios)} pairs)"
    )


def main() -> None:
    """Time both, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-365m", choices=SHAPES)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file that the lines printed are added to")
    parser.add_argument("--runs", type=int, default=41, help="pairs, 6 or more: of fewer there is no such interval")
    args = parser.parse_args()
    if args.runs < FEWEST:
        parser.error(f"--runs {args.runs} gives no 95 % interval; give {FEWEST} or more")
    with tempfile.TemporaryDirectory() as folder:
        SHAPES[args.shape] = SHAPES[args.shape] | {"num_hidden_layers": args.blocks}
        model = build_pair(args.shape, Path(folder), None)["base"]
        headers = read_headers(model, model.name)
        by_calls(headers)
        by_maps(headers)
        found = []
        for number in range(args.runs):
            order = (by_calls, by_maps) if number % 2 else (by_maps, by_calls)
            taken = {read: seconds(read, headers) for read in order}
            found.append((taken[by_calls], taken[by_maps]))
    lines = [f"{machine()}: {args.shape}, {args.blocks} blocks, converted to float32"]
    lines += [
        f"{clock}: {summary([(calls[place], maps[place]) for calls, maps in found])}"
        for place, clock in enumerate(CLOCKS)
    ]
    print(*lines, sep="\n")
    with open(args.results, "a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


if __name__ == "__main__":
    main()
