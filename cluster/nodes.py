"""What the nodes of the cluster have room for at this moment, and which of them are going away."""

import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray._private.state import state

_ANSWER_SECONDS = 1.0


def free_room(bundle: Mapping[str, float], held: Mapping[str, int]) -> int:
    """How many times the resources of `bundle` are free, each on one node that answers and stays.

    Those that are held, so many times on each node by its id, count as free.
    """
    available = state.available_resources_per_node()
    nodes = [node["NodeID"] for node in _staying()]
    return sum(_fits(available.get(node, {}), bundle) + held.get(node, 0) for node in nodes)


def total_room(bundle: Mapping[str, float]) -> int:
    """How many times the nodes that answer and stay have the resources of `bundle`, free or not."""
    return sum(_fits(node["Resources"], bundle) for node in _staying())


def draining() -> dict[str, int]:
    """The nodes that are to go away, by id, and when, in milliseconds since 1970; 0 where that is not known."""
    drained: dict[str, int] = state.get_draining_nodes() or {}
    return drained


def _fits(resources: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    wanted = {name: amount for name, amount in bundle.items() if amount > 0}
    return int(min(resources.get(name, 0.0) // amount for name, amount in wanted.items())) if wanted else 0


def _staying() -> Iterator[dict[str, Any]]:
    """Nodes that are up and not being drained.

    Ray hears of a raylet that died, or a host that is gone, only when its health checks have failed for a while; a
    connection to its port is refused, or not answered, at once.
    """
    going = draining()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in going]
    with ThreadPoolExecutor(max(len(nodes), 1)) as threads:
        answers = threads.map(_answers, nodes)
    return (node for node, answered in zip(nodes, answers, strict=True) if answered)


def _answers(node: dict[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), _ANSWER_SECONDS).close()
    except OSError:
        return False
    return True
