"""How long exact selection takes, against the sorts and kthvalue it replaces.

    python3 -m benchmarks.selection --threads 1 --repeats 5
    python3 -m benchmarks.selection --device cuda --repeats 20

Run it in the project's folder. Every contender computes the same mask, in turns within each repeat; printed are the median
and the fastest time of each, and the ratio of its median to ours. Values are random, seeded: normal deltas, deltas of
which most are zero (as between two bfloat16 models), and the metric |W| * sqrt(s) of a linear weight.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from utils.selection import band_mask, smallest_per_row_mask, top_k_mask

Contenders = dict[str, Callable[[], Tensor]]  # the first one is ours


def mask_at(indices: Tensor, like: Tensor) -> Tensor:
    mask = torch.zeros(like.numel(), dtype=torch.bool, device=like.device)
    mask[indices] = True
    return mask.view(like.shape)


def largest(delta: Tensor, share: float) -> Contenders:
    """The `share` of largest magnitude: by whole-tensor sorts of float32 magnitudes, and by the value at the rank."""
    k = int(delta.numel() * share)

    def magnitudes() -> Tensor:
        return delta.abs().flatten().float()

    def by_kthvalue() -> Tensor:
        found = magnitudes()
        return (found >= found.kthvalue(delta.numel() - k + 1).values).view(delta.shape)

    return {
        "top_k_mask": lambda: top_k_mask(delta, k),
        "argsort": lambda: mask_at(torch.argsort(magnitudes(), descending=True)[:k], delta),
        "sort, stable": lambda: mask_at(torch.sort(magnitudes(), descending=True, stable=True).indices[:k], delta),
        "kthvalue (ties kept)": by_kthvalue,
    }


def band(delta: Tensor, share: float, outliers: float) -> Contenders:
    """As `largest`, with a share of outliers left out first."""
    k, skip = int(delta.numel() * share), int(delta.numel() * outliers)
    return {
        "band_mask": lambda: band_mask(delta, skip, k),
        "argsort": lambda: mask_at(
            torch.argsort(delta.abs().flatten().float(), descending=True)[skip : skip + k], delta
        ),
    }


def smallest_of_rows(metric: Tensor, share: float) -> Contenders:
    k = int(metric.shape[1] * share)

    def by_sort() -> Tensor:
        mask = torch.zeros(metric.shape, dtype=torch.bool, device=metric.device)
        return mask.scatter_(1, torch.sort(metric, dim=1, stable=True).indices[:, :k], True)

    return {
        "smallest_per_row_mask": lambda: smallest_per_row_mask(metric, k),
        "sort, stable": by_sort,
        "kthvalue (ties kept)": lambda: metric <= metric.kthvalue(k, dim=1, keepdim=True).values,
    }


def cases(device: str) -> dict[str, Contenders]:
    """Every case by its name; their tensors take about 250 MB together."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    delta = normal(4096, 2816).mul_(0.01)
    sparse = delta.masked_fill(torch.rand(delta.shape, device=device, generator=generator) < 0.6, 0)
    metric = normal(4096, 1024).abs() * torch.rand(1024, device=device, generator=generator)
    return {
        "11.5M bfloat16, 33 % kept": largest(delta.bfloat16(), 0.33),
        "11.5M bfloat16, 60 % zeros, 50 % kept": largest(sparse.bfloat16(), 0.5),
        "11.5M bfloat16, band of 33 % under the top 1 %": band(delta.bfloat16(), 0.33, 0.01),
        "11.5M float16, 33 % kept": largest(delta.half(), 0.33),
        "16.7M float32, 33 % kept": largest(normal(4096, 4096), 0.33),
        "rows of 4096 x 1024 float32, 50 % taken": smallest_of_rows(metric, 0.5),
    }


def times(contenders: Contenders, repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each run; one untimed run of each comes first."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, work in contenders.items():
            wait()
            start = time.perf_counter()
            work()
            wait()
            if turn:
                taken[name].append(time.perf_counter() - start)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.device}, {options.threads} thread(s), medians of {options.repeats}")
    for name, contenders in cases(options.device).items():
        taken = times(contenders, options.repeats, options.device)
        ours = statistics.median(next(iter(taken.values())))
        print(f"\n{name}")
        for contender, seconds in taken.items():
            median = statistics.median(seconds)
            print(
                f"  {contender:24s} {median * 1e3:9.2f} ms   (fastest {min(seconds) * 1e3:9.2f})   {median / ours:6.1f} x"
            )


if __name__ == "__main__":
    main()
