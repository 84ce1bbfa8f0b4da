"""What is refused of a cluster before any work, each with its code: no Ray, no cluster, machines that are not alike."""

import socket
import sys
from pathlib import Path

import pytest

from tests.commands_here import refused_here
from tests.refusals import refused
from utils.commands.ray_flags import RayFlags
from utils.workers import node_probe
from utils.workers.ray_cluster import ClusterShare, ray_workers, require_ray


def test_without_ray_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with refused("workers-ray-missing") as caught:
        require_ray()
    assert "pip install -r requirements-ray.txt" in str(caught.value)


@pytest.mark.parametrize(
    ("address", "code"),
    [
        ("head", "workers-bad-address"),
        ("10.0.0.1:port", "workers-bad-address"),
        ("127.0.0.1:{port}", "workers-no-cluster"),
        ("no-such-host.invalid:6379", "workers-no-cluster"),
    ],
)
def test_an_address_without_a_cluster(address, code, monkeypatch):
    """(`auto` finds any cluster of this machine, those of other tests too.)"""
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        port = taken.getsockname()[1]
        with refused(code), ray_workers(address.format(port=port), ClusterShare()):
            raise AssertionError("there is a cluster")


def test_command_1_ends_before_work(pair, unread):
    pytest.importorskip("ray")
    words = ("lewis_importance.py", "--config", "pair.yaml", "--out_dir", "out")
    refused_here("workers-no-cluster", *words, "--ray", "127.0.0.1:1", cwd=pair)
    refused_here("flag-no-effect", *words, "--ray_cpus", 2, cwd=pair)


@pytest.mark.parametrize(("device", "devices"), [("cpu", None), ("auto", "cpu,cpu")])
def test_devices_of_this_machine_do_not_go_with_a_cluster(device, devices):
    with refused("flag-no-effect"):
        RayFlags("auto").refuse_devices(device, devices)


@pytest.fixture
def shared(tmp_path) -> node_probe.Shared:
    """A marked work folder and a model of one file."""
    (tmp_path / "work").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    return node_probe.shared_places(tmp_path / "work", {tmp_path / "model": [tmp_path / "model" / "model.safetensors"]})


def seen(shared: node_probe.Shared) -> dict:
    return node_probe.looking()(*node_probe.arguments(shared))


def test_a_machine_that_sees_what_this_one_sees_is_taken(shared):
    node_probe.refuse_unlike({"node": seen(shared)}, shared, seen(shared))


def test_relative_paths_are_seen_by_a_machine_that_begins_in_another_folder(shared, monkeypatch):
    root = shared.mark.parents[1]
    monkeypatch.chdir(root)
    model = Path("model")
    relative = node_probe.shared_places(Path("work"), {model: [model / "model.safetensors"]})
    given, here = node_probe.arguments(relative), seen(relative)
    monkeypatch.chdir(root.parent)
    node_probe.refuse_unlike({"node": node_probe.looking()(*given)}, relative, here)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda shared: shared.mark.unlink(), "workers-folder-unseen"),
        (lambda shared: shared.mark.write_text("another run's"), "workers-folder-unseen"),
        (lambda shared: Path(shared.mark.parents[1], "model", "model.safetensors").unlink(), "workers-folder-unseen"),
        (
            lambda shared: Path(shared.mark.parents[1], "model", "model.safetensors").write_bytes(b"other"),
            "workers-folder-unseen",
        ),
    ],
)
def test_a_folder_that_a_machine_does_not_see_as_it_is_here(shared, change, code):
    here = seen(shared)
    change(shared)
    with refused(code):
        node_probe.refuse_unlike({"node": seen(shared)}, shared, here)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"cwd": False}, "workers-folder-unseen"),
        ({"code": "other"}, "workers-code-differs"),
        ({"versions": {"torch": "1.0"}}, "workers-versions-differ"),
        ({"versions": {"python": "3.8.1"}}, "workers-versions-differ"),
    ],
)
def test_a_machine_with_other_software(shared, change, code):
    here = seen(shared)
    with refused(code):
        node_probe.refuse_unlike({"node": {**here, **change}}, shared, here)


def test_a_patch_release_of_python_is_no_difference(shared):
    here = seen(shared)
    patched = {**here["versions"], "python": here["versions"]["python"].rpartition(".")[0] + ".99"}
    node_probe.refuse_unlike({"node": {**here, "versions": patched}}, shared, here)
