"""Reading weights by system calls, as the commands do, against mapping them into memory, as safetensors does.

    python3 benchmarks/reading.py --shape llama-365m --runs 41

Both read every tensor of one model, whose files are in the page cache, and convert it to float32, as computing on a CPU does.
They take turns, and which goes first changes from pair to pair. For the time that passes and for processor time, medians are
printed, the median of the ratios of the pairs, and between which ratios that median lies with 95 % certainty (by ranks, so
that a few disturbed pairs do not matter).
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

from benchmarks.shapes import SHAPES, build_pair
from utils.models.headers import TensorHeader, read_headers
from utils.models.tensor_files import TensorFiles

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


def summary(pairs: Sequence[tuple[float, float]]) -> str:
    """Medians of both, and the median ratio with its interval: order statistics of a sign test at 95 %."""
    calls, maps = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = sorted(call / mapped for call, mapped in pairs)
    reach = math.floor((len(ratios) - 1.96 * math.sqrt(len(ratios))) / 2)
    low, high = (ratios[max(0, reach)], ratios[min(len(ratios) - 1, len(ratios) - 1 - reach)])
    return (
        f"system calls {calls:.3f} s, maps {maps:.3f} s; calls / maps {statistics.median(ratios):.3f} "
        f"({low:.3f} to {high:.3f}, {len(ratios)} pairs)"
    )


def main() -> None:
    """Time both, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-365m", choices=SHAPES)
    parser.add_argument("--runs", type=int, default=41)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = build_pair(args.shape, Path(folder), None)["base"]
        headers = read_headers(model, model.name)
        by_calls(headers)
        by_maps(headers)
        found = []
        for number in range(args.runs):
            order = (by_calls, by_maps) if number % 2 else (by_maps, by_calls)
            taken = {read: seconds(read, headers) for read in order}
            found.append((taken[by_calls], taken[by_maps]))
    for place, clock in enumerate(CLOCKS):
        print(f"{clock}: {summary([(calls[place], maps[place]) for calls, maps in found])}")


if __name__ == "__main__":
    main()
