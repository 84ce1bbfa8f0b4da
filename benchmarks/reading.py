"""Reading weights by system calls, as the commands do, against mapping them into memory, as safetensors does.

    python3 benchmarks/reading.py --shape llama-365m --runs 7

Both read every tensor of one model, whose files are in the page cache, and convert it to float32, as computing on a CPU does.
They take turns; medians and the median of the ratios are printed.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors import safe_open

from benchmarks.shapes import SHAPES, build_pair
from utils.models.headers import read_headers
from utils.models.tensor_files import TensorFiles


def by_calls(model: Path) -> None:
    """Each tensor is read into memory of its own."""
    headers = read_headers(model, model.name)
    with TensorFiles({header.file for header in headers.values()}) as files:
        for header in headers.values():
            files.read_whole(header).to(torch.float32)


def by_maps(model: Path) -> None:
    """Each tensor is pages of its file."""
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safetensors' own handle is no mapping)
                tensors.get_tensor(name).to(torch.float32)


def seconds(read: Callable[[Path], None], model: Path) -> float:
    """How long reading took."""
    start = time.perf_counter()
    read(model)
    return time.perf_counter() - start


def main() -> None:
    """Time both, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-365m", choices=SHAPES)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = build_pair(args.shape, Path(folder), None)["base"]
        by_calls(model)
        pairs = [(seconds(by_calls, model), seconds(by_maps, model)) for _ in range(args.runs)]
    calls, maps = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = sorted(call / mapped for call, mapped in pairs)
    print(
        f"system calls {calls:.3f} s, maps {maps:.3f} s; calls / maps {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
    )


if __name__ == "__main__":
    main()
