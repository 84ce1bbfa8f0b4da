"""Clusters of Ray for tests: small, on this machine, without a dashboard."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STORE = 80 * 2**20  # bytes, about the least that Ray takes


@contextmanager
def own_ray(cpus: int = 2, gpus: int = 0) -> Iterator[None]:
    """Ray in this process, for as long as the context lasts."""
    import ray

    ray.init(
        address="local",
        num_cpus=cpus,
        num_gpus=gpus,
        include_dashboard=False,
        object_store_memory=STORE,
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def several_nodes(*cpus: int) -> Iterator[tuple[Any, list[Any]]]:
    """A cluster of nodes with so many CPUs each, and its nodes; the first is the head, which this process joins."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        nodes = [add_node(cluster, number) for number in cpus]
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster, nodes
    finally:
        ray.shutdown()
        cluster.shutdown()


def add_node(cluster: Any, cpus: int) -> Any:
    """Another node of a cluster."""
    return cluster.add_node(num_cpus=cpus, num_gpus=0, object_store_memory=STORE, include_dashboard=False)
