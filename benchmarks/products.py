"""How fast this machine multiplies activations by weights, in float32 and in 16 bits: why `--dtype auto` is what it is.

    python3 benchmarks/products.py --threads 1 --repeats 5
    python3 benchmarks/products.py --device cuda --repeats 20

Every dtype multiplies the same shapes, in turns within each repeat; printed are billions of operations a second, the
median of the repeats, and its ratio to float32's. Written to `benchmarks/results/products.csv`, one row a shape and dtype.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
import torch

from benchmarks.contenders import machine
from utils.publishing.files import publish_files
from utils.runtime import computing_dtype

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "products.csv"
SHAPES = ((4096, 192, 512), (2048, 1024, 1024), (512, 2048, 2048))  # tokens, inputs, outputs
DTYPES = ("float32", "bfloat16", "float16")


def rate(tokens: int, inputs: int, outputs: int, dtype: str, device: str) -> float:
    """Billions of additions and multiplications a second of one product."""
    x = torch.randn(tokens, inputs, device=device).to(getattr(torch, dtype))
    weight = torch.randn(outputs, inputs, device=device).to(getattr(torch, dtype))
    start = time.perf_counter()
    torch.nn.functional.linear(x, weight)
    if device == "cuda":
        torch.cuda.synchronize()
    return 2e-9 * tokens * inputs * outputs / (time.perf_counter() - start)


def measured(device: str, threads: int, repeats: int) -> pd.DataFrame:
    """One row a shape and dtype; the first repeat warms up and is left out."""
    rows = []
    for shape in SHAPES:
        rates: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
        for _ in range(repeats + 1):
            for dtype in DTYPES:
                rates[dtype].append(rate(*shape, dtype, device))
        for dtype in DTYPES:
            found = statistics.median(rates[dtype][1:])
            of_float32 = found / statistics.median(rates["float32"][1:])
            chosen = computing_dtype(dtype, torch.device(device))
            rows.append((*shape, dtype, round(found, 1), round(of_float32, 3), chosen, threads, machine()))
    columns = ("tokens", "inputs", "outputs", "dtype", "gflops", "of_float32", "computed_in", "threads", "machine")
    return pd.DataFrame(rows, columns=list(columns))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    table = measured(flags.device, flags.threads, flags.repeats)
    print(table.drop(columns="machine").to_string(index=False))
    publish_files(flags.out.parent, {flags.out.name: table.to_csv(index=False).encode()}, overwrite=True)
    print(f"{machine()}; wrote {flags.out}")


if __name__ == "__main__":
    main()
