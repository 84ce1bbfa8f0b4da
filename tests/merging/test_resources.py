"""Which device a merge takes when none is asked for."""

from pathlib import Path

import pytest
import torch
from mergekit import merge_methods

from utils.merging import resources
from utils.merging.pieces import choice as direct_tensors
from utils.merging.resources import ENOUGH_THREADS, choose_merge_device
from utils.merging.settings import MergeSettings

GPU = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch):
    """A function that sets what the machine has: a GPU or none, and a number of threads."""

    def have(threads: int, gpu: bool = True) -> None:
        device = GPU if gpu else torch.device("cpu")

        def choose(asked: str) -> tuple[torch.device, str]:
            return (device, "it is there") if asked == "auto" else (torch.device(asked), "asked for")

        monkeypatch.setattr(resources, "choose_device", choose)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    return have


def chosen(method: str = "ties", **flags) -> tuple[torch.device, str]:
    settings = MergeSettings(Path("out"), Path("recipe.yaml"), **flags)
    return choose_merge_device(settings, merge_methods.get(method))


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties", "task_arithmetic", "linear"])
def test_with_enough_threads_what_can_be_merged_in_pieces_is_merged_on_the_cpu(machine, method):
    machine(ENOUGH_THREADS)
    device, why = chosen(method)
    assert device == torch.device("cpu")
    assert method in why and "--device cuda:0" in why  # the way to the GPU is named


@pytest.mark.parametrize(
    "method, flags",
    [
        ("dare_ties", {}),
        ("della", {}),
        ("slerp", {}),
        ("ties", {"fast_selection": False}),
        ("ties", {"low_cpu_memory": True}),
        ("ties", {"read_to_gpu": True}),
    ],
)
def test_the_gpu_is_taken_for_what_goes_through_mergekits_executor(machine, method, flags):
    machine(64)
    assert chosen(method, **flags)[0] == GPU


def test_few_threads_leave_the_work_to_the_gpu(machine):
    machine(ENOUGH_THREADS - 1)
    assert chosen()[0] == GPU


def test_code_of_mergekits_that_is_not_known_leaves_the_work_to_the_gpu(machine, monkeypatch):
    machine(64)
    monkeypatch.setattr(direct_tensors, "REPLACED", frozenset())
    assert chosen()[0] == GPU


@pytest.mark.parametrize("asked", ["cuda:0", "cpu"])
def test_what_is_asked_for_is_taken(machine, asked):
    machine(64)
    assert chosen(device=asked) == (torch.device(asked), "asked for")


def test_without_a_gpu_nothing_is_said_of_one(machine):
    machine(64, gpu=False)
    assert chosen() == (torch.device("cpu"), "it is there")
