"""Devices by name, byte counts for people.

python -m pytest tests/test_runtime.py
"""

import gc
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from tests.refusals import refused
from utils.runtime import available_bytes, choose_device, computing_dtype, gigabytes, import_libraries, versions


def gpus(monkeypatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("asked", "count", "device"),
    [
        ("auto", 0, "cpu"), ("auto", 2, "cuda:0"), ("cpu", 2, "cpu"), ("cpu:1", 0, "cpu"), ("cuda", 2, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
    ],
)  # fmt: skip
def test_devices(monkeypatch, asked, count, device):
    gpus(monkeypatch, count)
    assert choose_device(asked)[0] == torch.device(device)


@pytest.mark.parametrize(
    ("asked", "count", "code"),
    [
        ("cuda", 0, "device-missing"),
        ("cuda:2", 2, "device-missing"),
        ("cuda:-1", 2, "device-unknown"),
        ("CUDA", 2, "device-unknown"),
        ("", 0, "device-unknown"),
        ("meta", 0, "device-unknown"),
        ("mps", 0, "device-unknown"),
    ],
)
def test_devices_refused(monkeypatch, asked, count, code):
    gpus(monkeypatch, count)
    with refused(code) as caught:
        choose_device(asked)
    assert f"--device {asked}" in str(caught.value).replace("'", "")


@pytest.mark.parametrize(
    ("stored", "device", "capabilities", "expected"),
    [
        ("bfloat16", "cpu", {}, "float32"),
        ("bfloat16", "cpu", {"avx512_f": True, "avx512_fp16": True}, "float32"),
        ("bfloat16", "cpu", {"amx_bf16": True}, "bfloat16"),
        ("bfloat16", "cpu", {"bf16": True}, "bfloat16"),
        ("float16", "cpu", {"avx512_bf16": True}, "float32"),
        ("float16", "cpu", {"fp16_arith": True}, "float16"),
        ("float32", "cpu", {}, "float32"),
        ("float64", "cpu", {}, "float64"),
        ("bfloat16", "cuda", {}, "bfloat16"),
    ],
)
def test_few_bits_are_computed_in_where_the_device_multiplies_them(monkeypatch, stored, device, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert computing_dtype(stored, torch.device(device)) == expected


def test_memory_and_versions():
    assert 0 < available_bytes(torch.device("cpu")) < 2**60
    assert versions()["torch"] == torch.__version__.partition("+")[0] or versions()["torch"] == torch.__version__
    assert [gigabytes(count) for count in (0, 99_000_000, 100_000_000, 1.5e12)] == [
        "0.0 MB",
        "99.0 MB",
        "0.10 GB",
        "1500.00 GB",
    ]


def probe(code: str) -> list[str]:
    """The words that a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr
    return done.stdout.split()


def test_libraries_are_imported_with_the_collector_at_rest_and_out_of_its_sight():
    code = (
        "import gc; from utils.runtime import import_libraries\n"
        "runs = []; gc.callbacks.append(lambda phase, info: runs.append(phase))\n"
        "import_libraries('pydantic', 'numpy')\n"
        "print(len(runs), gc.get_freeze_count() > 10_000, gc.isenabled())\n"
        "import pydantic, numpy; loop = []; loop.append(loop); del loop; print(gc.collect() >= 1)"
    )
    assert probe(code) == ["0", "True", "True", "True"]


def test_what_a_program_drops_later_stays_collectable():
    code = (
        "import gc; from utils.runtime import import_libraries\n"
        "import_libraries('json'); before = gc.get_freeze_count()\n"
        "import_libraries('json'); print(gc.get_freeze_count() == before)\n"
        "gc.disable(); import_libraries('pydantic'); print(gc.isenabled())"
    )
    assert probe(code) == ["True", "False"]


def test_a_library_that_is_missing_is_said_and_the_collector_runs_on():
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        import_libraries("no_such_library")
    assert gc.isenabled()
