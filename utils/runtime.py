"""The machine a command runs on: device and dtype choices with their reasons, library versions, memory."""

import atexit
import ctypes
import gc
import hashlib
import importlib
import os
import platform
import sys
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError

if TYPE_CHECKING:
    import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_LARGE = 2**24  # bytes
PACKAGES = ("torch", "transformers", "mergekit", "safetensors", "tokenizers", "datasets", "pandas", "numpy")


def let_waiting_threads_sleep() -> None:
    """Have OpenMP threads sleep if they wait for long, unless the user said otherwise; to be called before torch is imported.

    By default they spin, which takes the cores from whatever else runs: with one other busy process on two cores,
    measuring takes 2.5 times as long. To go to sleep at once costs a sixth of the time where the cores are free; a
    thousand turns of the loop (libgomp's only) cost nothing where they are not.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def import_libraries(*names: str) -> None:
    """Import modules while Python's cyclic garbage collector rests, and leave what they made out of its sight for good.

    torch, transformers and mergekit make about a million objects that live as long as the process. Looking through them
    again and again, while they are made and once more when the process ends, takes about 3 s of processor time in a
    merge. Does nothing if all are imported already, so that what a program has dropped between two calls is collected as
    ever.

    Raises:
        ImportError: as an import statement.
    """
    if all(name in sys.modules for name in names):
        return
    enabled = gc.isenabled()
    gc.disable()
    try:
        for name in names:
            importlib.import_module(name)
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)  # the interpreter's last collections then find nothing to look through


def quiet_libraries() -> None:
    """Import the libraries, and keep their own progress bars and chatter off the screen; their errors still show."""
    import_libraries("torch", "transformers", "transformers.modeling_utils", "accelerate", "pandas")

    import transformers
    from datasets.utils.logging import disable_progress_bar

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bar()


def versions() -> dict[str, str]:
    """Python's and the libraries' versions."""
    return {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}


@cache
def sources_sha256() -> str:
    """SHA-256 over this project's own code: work that other code has begun is not gone on with, whatever it is called."""
    digest, folder = hashlib.sha256(), Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def versions_line(*packages: str) -> str:
    """A line with Python's version and those of the libraries that a command's numbers depend on."""
    return ", ".join([f"versions: python {platform.python_version()}", *(f"{one} {_version(one)}" for one in packages)])


@cache
def _version(package: str) -> str:
    """Kept, since a package's metadata is parsed for it, and a search writes the versions with every recipe."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def choose_device(asked: str) -> tuple["torch.device", str]:
    """Turn `auto`, `cpu`, `cuda` or `cuda:n` into a device and the reason for it.

    Raises:
        UserError: anything else, or a GPU that is not there.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "auto":
        return (torch.device("cuda:0"), "a GPU is there") if count else (torch.device("cpu"), "no GPU is there")
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise UserError(f"--device {asked!r} is unknown; use auto, cpu, cuda or cuda:n", "device-unknown") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {asked!r} is not supported; use auto, cpu, cuda or cuda:n", "device-unknown")
    if device.type == "cpu":
        return torch.device("cpu"), "asked for"  # cpu:1 is the same place
    if not count:
        text = f"--device {asked}: torch {torch.__version__} sees no CUDA GPU; use --device cpu"
        raise UserError(text, "device-missing")
    device = torch.device("cuda", device.index or 0)
    if device.index >= count:
        raise UserError(f"--device {asked}: there are {count} GPUs, numbered from 0", "device-missing")
    return device, "asked for"


def choose_devices(device: str, devices: str | None = None) -> tuple[list["torch.device"], str]:
    """The devices of `--devices`, a comma between them, else that of `--device`; and a line about them.

    Raises:
        UserError: a device that is not there, or devices of different kinds.
    """
    chosen = [choose_device(asked.strip()) for asked in (devices or device).split(",")]
    found = [one for one, _ in chosen]
    if len({one.type for one in found}) > 1:
        raise UserError(
            f"--devices {devices}: CPU and GPU give different roundings; name devices of one kind",
            "devices-of-two-kinds",
        )
    return found, f"device: {', '.join(map(device_name, found))}, {chosen[0][1]}"


# What a processor must have to multiply matrices of 16-bit numbers: names of `torch.cpu.get_capabilities`.
_MULTIPLIES = {
    "bfloat16": ("avx512_bf16", "amx_bf16", "bf16"),
    "float16": ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


def computing_dtype(stored: str, device: "torch.device") -> str:
    """The dtype to compute in with weights of dtype `stored`: that one, or float32 where the device is slow in it.

    A processor without instructions for 16-bit numbers multiplies them 7 to 13 times as slowly as float32 (AVX2, torch
    2.13); products of the same weights in float32 are then both faster and without the rounding of every activation.

    Args:
        stored: a torch dtype's name.
        device: where it is computed.
    """
    if device.type != "cpu" or stored not in _MULTIPLIES:
        return stored
    import torch

    there = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # torch before 2.12
    return stored if any(there.get(name) for name in _MULTIPLIES[stored]) else "float32"


def available_bytes(device: "torch.device") -> int:
    """Memory that a process could still take on the device: free GPU memory, or the host's available memory."""
    if device.type == "cuda":
        import torch

        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # freed, and not given back
        return torch.cuda.mem_get_info(device)[0] + kept
    return available_host_bytes()


def available_host_bytes() -> int:
    """Memory of the host that a process could still take."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_host_bytes() -> int:
    """The most memory of the host that this process has held so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def return_freed_memory() -> None:
    """Hand memory that was freed back to the system, where the C library can (glibc keeps much of it otherwise)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def give_back_what_is_freed() -> None:
    """From now on, have the C library (glibc) hand large pieces of memory back to the system the moment they are freed.

    Otherwise it keeps up to 32 MiB a piece for the next one, and what it keeps is in pieces that do not fit it: mergekit's
    temporaries, just below that size, took up to half as much again as they need.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, _LARGE)
        set_option(_TRIM_THRESHOLD, _LARGE)


def device_name(device: "torch.device") -> str:
    """What to call a device in a printout."""
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"


def devices_used(name: str, *, all_of_them: bool = False) -> list["torch.device"]:
    """The device of a name, or with `all_of_them` every GPU."""
    import torch

    if all_of_them:
        return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    return [torch.device(name)]


def peak_gpu_memory(devices: "Sequence[torch.device]") -> str:
    """A clause with the most memory that this process held on one of the GPUs; empty on the CPU."""
    import torch

    peaks = [torch.cuda.max_memory_allocated(device) for device in devices if device.type == "cuda"]
    return f", peak GPU memory {gigabytes(max(peaks))}" if peaks else ""


def gigabytes(count: float) -> str:
    """A byte count for people: `1.25 GB`, or MB below 0.1 GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
