"""The least a merge can do: read every weight file once, write one model, compute nothing.

    python3 benchmarks/copy_floor.py OUTPUT FILE ...

Of the bytes read, the first third is written (three models in, one out), 8 MiB at a time.
"""

import os
import sys
import time
from pathlib import Path

BLOCK = 8 * 2**20


def main() -> None:
    """Read and write, and print the seconds that took."""
    output, *files = map(Path, sys.argv[1:])
    output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    left = sum(file.stat().st_size for file in files) // 3
    buffer = memoryview(bytearray(BLOCK))
    with open(output / "model.safetensors", "wb", buffering=0) as target:
        for file in files:
            with open(file, "rb", buffering=0) as source:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                while count := source.readinto(buffer):
                    if left:
                        target.write(buffer[: min(count, left)])
                        left -= min(count, left)
    print(f"merged in {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
