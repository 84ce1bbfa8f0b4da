"""Pieces of work on a cluster of Ray: placed by their share of GPUs and CPUs, done again where a machine was lost.

Ray places, retries and counts; this file says what a piece is to Ray, and turns what can go wrong before and while into
one sentence. Ray is imported here alone, where `--ray` asks for it.
"""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError, brief
from utils.workers import node_probe, ray_piece
from utils.workers.piece import OnProgress, Piece
from utils.workers.results import find_result

if TYPE_CHECKING:
    import torch

REMEDY = "pip install -r requirements-ray.txt"
_RETRIES = 3  # of a task whose machine or process was lost
_CONNECT_SECONDS = 5
_LOOK_SECONDS = 120
_WAIT_SECONDS = 30
_LATE_SECONDS = 60  # that a network folder may take to show what another machine wrote


@dataclass(frozen=True)
class ClusterShare:
    """What a piece takes of a machine.

    `gpus` may be a part of one (0.5: two pieces share a GPU); None is one where the cluster has GPUs, else 0. `cpus` are
    torch's threads, too, on which the last bits of sums depend: they are the same for every piece.
    """

    gpus: float | None = None
    cpus: int = 1


@dataclass(frozen=True)
class RayWorkers:
    """A cluster that this process is connected to (`Workers`). `say` takes a line if it has to wait."""

    ray: Any
    gpus: float
    cpus: int
    say: Callable[[str], None] = lambda line: None

    @property
    def device(self) -> "torch.device":
        """What pieces compute on, wherever they run."""
        import torch

        return torch.device("cuda" if self.gpus else "cpu")

    @property
    def at_once(self) -> int:
        """How many pieces the cluster does at a time, as it is now."""
        return max(1, sum(_fits(node["Resources"], self.gpus, self.cpus) for node in _alive(self.ray)))

    def describe(self) -> str:
        """A line for people."""
        nodes = _alive(self.ray)
        share = f"{self.gpus:g} GPU and " if self.gpus else ""
        return (
            f"cluster: {len(nodes)} machine{'s' if len(nodes) > 1 else ''}, Ray {self.ray.__version__}; each task takes "
            f"{share}{self.cpus} CPU{'s' if self.cpus > 1 else ''}, {self.at_once} at a time"
        )

    def refuse_unlike(self, folder: Path, models: Mapping[Path, Sequence[Path]]) -> None:
        """Have every machine look at what it has to share with this one, before any work.

        Args:
            folder: where results will lie.
            models: files of weights by model folder.

        Raises:
            UserError: a machine has other versions, other code, or does not see a folder.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        shared = node_probe.shared_places(folder, models)
        look = node_probe.looking()
        given = node_probe.arguments(shared)
        remote = self.ray.remote(look)
        found = {}
        try:
            asked = {
                f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})": remote.options(
                    num_cpus=0,
                    max_retries=0,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
                ).remote(*given)
                for node in _alive(self.ray)
            }
            for machine, answer in asked.items():
                try:
                    found[machine] = self.ray.get(answer, timeout=_LOOK_SECONDS)
                except self.ray.exceptions.RayError as error:
                    raise UserError(
                        f"{machine} does not answer: {brief(error)}; take it from the cluster (ray stop, there) or start "
                        "it again",
                        "workers-no-answer",
                    ) from error
        finally:
            shared.mark.unlink(missing_ok=True)
        node_probe.refuse_unlike(found, shared, look(*given))

    def run(
        self,
        pieces: Sequence[Piece],
        folder: Path | None,
        on_progress: OnProgress,
        on_result: Callable[[Piece, Any], None] = lambda piece, value: None,
    ) -> list[Any]:
        """Do all pieces as Ray's tasks; as `Workers.run`. A folder is needed: results come through it.

        `on_result` is given each result as soon as it is there.
        """
        if folder is None:
            raise ValueError("pieces on a cluster need a folder for their results")
        results: dict[str, Any] = {}
        asked: dict[Any, Piece] = {}
        remote = self.ray.remote(ray_piece.entrance()).options(
            num_cpus=self.cpus,
            num_gpus=self.gpus,
            max_retries=_RETRIES,
            runtime_env={"env_vars": ray_piece.environment(node_probe.ROOT)},
        )
        for piece in pieces:
            if (found := find_result(folder, piece)) is not None:
                results[piece.name] = found.value
                on_result(piece, found.value)
                on_progress(piece.label, piece.steps)
            else:
                task = remote.remote(os.getcwd(), ray_piece.to_bytes(piece), str(folder), self.gpus, self.cpus)
                asked[task] = piece
        try:
            for piece in self._as_they_end(asked):
                results[piece.name] = value = _read(folder, piece)
                on_result(piece, value)
                on_progress(piece.label, piece.steps)
        finally:
            for task in asked:
                self.ray.cancel(task, force=True)
        return [results[piece.name] for piece in pieces]

    def _as_they_end(self, asked: dict[Any, Piece]) -> Iterator[Piece]:
        """Pieces as their tasks end, which are taken from `asked`."""
        warned = False
        while asked:
            ended, _ = self.ray.wait(list(asked), num_returns=1, timeout=_WAIT_SECONDS)
            if not ended and not warned and not self._can_go_on():
                self.say(
                    "no machine of the cluster can take a task at present; waiting for one (ray start --address ..., there)"
                )
                warned = True
            for task in ended:
                piece = asked.pop(task)
                self._raise_if_failed(task, piece)
                yield piece

    def _can_go_on(self) -> bool:
        return any(_fits(node["Resources"], self.gpus, self.cpus) for node in _alive(self.ray))

    def _raise_if_failed(self, task: Any, piece: Piece) -> None:
        errors = self.ray.exceptions
        try:
            self.ray.get(task)
        except errors.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from error
            raise
        except errors.RayError as error:
            raise UserError(
                f"{piece.label or piece.name}: its machine or its process was lost {_RETRIES + 1} times ({brief(error)}); "
                "is there memory enough for as many tasks at a time? Give each a larger share (--ray_cpus, --ray_gpus); "
                "typed again, the command goes on with what is missing",
                "workers-lost",
            ) from error


@contextlib.contextmanager
def ray_workers(
    address: str, share: ClusterShare, say: Callable[[str], None] = lambda line: None
) -> Iterator[RayWorkers]:
    """Connect to a cluster for as long as the context lasts.

    Args:
        address: of its head (`host:port`), `auto` for the one that this machine belongs to, or `local` for a new one
            of this machine alone. A program that is connected already keeps its cluster.
        share: what a piece takes.
        say: prints.

    Raises:
        UserError: Ray is not installed; no cluster answers at the address, or one of another version; no machine of it
            has what a piece takes.
    """
    ray = require_ray()
    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            _connect(ray, address)
            stack.callback(ray.shutdown)
        nodes = _alive(ray)
        gpus = share.gpus if share.gpus is not None else float(any(node["Resources"].get("GPU") for node in nodes))
        if not any(_fits(node["Resources"], gpus, share.cpus) for node in nodes):
            raise UserError(
                f"--ray {address}: a task takes {share.cpus} CPUs and {gpus:g} GPUs, which no machine of the cluster has; "
                "lower --ray_cpus or --ray_gpus, or start a machine with more (ray start --num-cpus, --num-gpus)",
                "workers-share-too-large",
            )
        yield RayWorkers(ray, gpus, share.cpus, say)


def require_ray() -> Any:
    """Import Ray.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere unless the user asks for it
    try:
        import ray
    except ModuleNotFoundError as error:
        raise UserError(f"--ray needs Ray: {REMEDY}", "workers-ray-missing") from error
    return ray


def _connect(ray: Any, address: str) -> None:
    _refuse_closed_port(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, AssertionError) as error:
        if "version mismatch" in str(error).lower():
            raise UserError(
                f"--ray {address}: the cluster runs another version of Ray or Python than this process ({brief(error)}); "
                "install the same on every machine and start the cluster again",
                "workers-ray-version",
            ) from error
        raise UserError(
            f"--ray {address}: no cluster of Ray can be joined there ({brief(error)}); start one with `ray start --head` "
            "here, `ray start --address HEAD:6379` on the others, and give --ray auto",
            "workers-no-cluster",
        ) from error


def _refuse_closed_port(address: str) -> None:
    """Refuse an address that nobody listens at; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        if address in ("auto", "local"):
            return
        raise UserError(
            f"--ray {address!r} is not an address; give auto, or HOST:PORT of the head", "workers-bad-address"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--ray {address}: nobody answers there ({brief(error)}); start a cluster with `ray start --head` and give "
            "the address that it prints, or auto on one of its machines",
            "workers-no-cluster",
        ) from error


def _alive(ray: Any) -> list[Mapping[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _fits(resources: Mapping[str, float], gpus: float, cpus: int) -> int:
    """How many pieces a machine does at a time."""
    by_cpus = int(resources.get("CPU", 0) // cpus)
    return min(by_cpus, int(resources.get("GPU", 0) / gpus + 1e-6)) if gpus else by_cpus


def _read(folder: Path, piece: Piece) -> Any:
    """A result that another machine has written."""
    until = time.monotonic() + _LATE_SECONDS
    while (found := find_result(folder, piece)) is None:
        if time.monotonic() > until:
            raise UserError(
                f"{piece.label or piece.name} is done, but its result does not appear in {folder}: do all machines share "
                "this folder?",
                "workers-folder-unseen",
            )
        time.sleep(0.2)
        os.listdir(folder)  # has a network folder look again
    return found.value
