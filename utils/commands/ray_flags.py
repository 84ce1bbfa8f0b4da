"""`--ray` and what belongs to it, as several commands take them."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.workers.ray_cluster import ClusterShare, ray_workers

if TYPE_CHECKING:
    from utils.workers.ray_cluster import RayWorkers


@dataclass(frozen=True)
class RayFlags:
    """A cluster's address, and what a task takes of a machine (`utils/workers/ray_cluster.py`)."""

    address: str
    gpus: float | None = None
    cpus: int = 1

    @classmethod
    def taken(cls, flags: dict[str, Any]) -> "RayFlags | None":
        """Take the flags out of a command's, by name; None without `--ray`.

        Raises:
            UserError: a share of a cluster that was not asked for.
        """
        address, gpus, cpus = (flags.pop(name) for name in ("ray", "ray_gpus", "ray_cpus"))
        if address is not None:
            return cls(address, gpus, 1 if cpus is None else cpus)
        for name, value in (("ray_gpus", gpus), ("ray_cpus", cpus)):
            if value is not None:
                raise UserError(f"--{name} does nothing without --ray ADDRESS", "flag-no-effect")
        return None

    def refuse_devices(self, device: str, devices: str | None) -> None:
        """Refuse flags that name devices of this machine, where the cluster's are used."""
        if device != "auto" or devices:
            flag = f"--devices {devices}" if devices else f"--device {device}"
            raise UserError(
                f"{flag} does nothing with --ray, which places tasks itself; give --ray_gpus 0 for CPUs, --ray_gpus 1 (or "
                "0.5: two tasks share one) for GPUs",
                "flag-no-effect",
            )


@contextlib.contextmanager
def connected(ray: RayFlags | None, say: Callable[[str], None]) -> "Iterator[RayWorkers | None]":
    """A connection to the cluster that was asked for, if one was.

    Raises:
        UserError: as `ray_workers`.
    """
    if ray is None:
        yield None
        return

    with ray_workers(ray.address, ClusterShare(ray.gpus, ray.cpus), say) as workers:
        say(workers.describe())
        yield workers
