"""The least that measuring can do: bring every weight file to where it is computed with, and compute nothing.

    python3 benchmarks/read_floor.py DEVICE FILE ...

On a GPU by several threads, each with two pinned buffers, so that reading and copying overlap; the weights are not kept.
On the CPU the files are read into one buffer. The time to start torch and the GPU is left out.
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BLOCK = 32 * 2**20
READERS = 4


def main() -> None:
    """Read, and print the seconds that took."""
    device, *files = sys.argv[1:]
    seconds = read_to_gpu(device, files) if device.startswith("cuda") else read(files)
    print(f"measured in {seconds:.2f} s")


def read(files: list[str]) -> float:
    """Seconds to read all files into memory, a block at a time."""
    start, buffer = time.perf_counter(), memoryview(bytearray(BLOCK))
    for file in files:
        with open(file, "rb", buffering=0) as source:
            while source.readinto(buffer):
                pass
    return time.perf_counter() - start


def read_to_gpu(device: str, files: list[str]) -> float:
    """Seconds until all bytes of all files have been in the GPU's memory."""
    import torch

    blocks = [(file, start) for file in files for start in range(0, os.path.getsize(file), BLOCK)]
    with ThreadPoolExecutor(READERS) as pool:
        lanes = [Lane(torch.device(device)) for _ in range(READERS)]
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for done in [pool.submit(lane.take, blocks[place::READERS]) for place, lane in enumerate(lanes)]:
            done.result()
        torch.cuda.synchronize(device)
        return time.perf_counter() - start


class Lane:
    """One reader: two pinned buffers, so that one is read into while the other one is copied to the GPU."""

    def __init__(self, device: "torch.device") -> None:
        import torch

        self.stream = torch.cuda.Stream(device)
        self.slots = [torch.empty(BLOCK, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.target = torch.empty(2, BLOCK, dtype=torch.uint8, device=device)
        self.copied = [torch.cuda.Event() for _ in range(2)]

    def take(self, blocks: list[tuple[str, int]]) -> None:
        """Read blocks of files and send them to the GPU."""
        import torch

        with torch.cuda.stream(self.stream):
            for turn, (file, start) in enumerate(blocks):
                slot = turn % 2
                self.copied[slot].synchronize()  # its last copy; an event that was never recorded is done
                with open(file, "rb", buffering=0) as source:
                    source.seek(start)
                    count = source.readinto(memoryview(self.slots[slot].numpy()))
                self.target[slot, :count].copy_(self.slots[slot][:count], non_blocking=True)
                self.copied[slot].record(self.stream)


if __name__ == "__main__":
    main()
