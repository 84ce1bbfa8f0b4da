"""The least that measuring can do: bring every weight file to where it is computed with, and compute nothing.

    python3 benchmarks/read_floor.py DEVICE FILE ...

On a GPU through two pinned buffers, so that reading and copying overlap; the weights are not kept. On the CPU the files
are read into one buffer. The time to start torch and the GPU is left out.
"""

import os
import sys
import time

BLOCK = 64 * 2**20


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

    place = torch.device(device)
    slots = [torch.empty(BLOCK, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    target = torch.empty(2, BLOCK, dtype=torch.uint8, device=place)
    copied = [torch.cuda.Event() for _ in slots]
    torch.cuda.synchronize(place)
    start, turn = time.perf_counter(), 0
    with torch.cuda.device(place):
        for file in files:
            with open(file, "rb", buffering=0) as source:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                while True:
                    slot = turn % 2
                    copied[slot].synchronize()  # its last copy; an event that was never recorded is done
                    count = source.readinto(memoryview(slots[slot].numpy()))
                    if not count:
                        break
                    target[slot, :count].copy_(slots[slot][:count], non_blocking=True)
                    copied[slot].record()
                    turn += 1
        torch.cuda.synchronize(place)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
