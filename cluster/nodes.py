"""What the nodes of the cluster have room for at this moment, and which of them are going away."""

import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import state

_ANSWER_SECONDS = 1.0


@dataclass(frozen=True)
class Room:
    """How many times the nodes that answer and stay have some resources, each time on one node."""

    free: int
    total: int
    """Free or not."""


def room(bundle: Mapping[str, float], held: Mapping[str, int]) -> Room:
    """The room for the resources of `bundle`; those that are held, so often on each node by its id, count as free."""
    available = state.available_resources_per_node()
    nodes = list(_staying())
    return Room(
        free=sum(_fits(available.get(node["NodeID"], {}), bundle) + held.get(node["NodeID"], 0) for node in nodes),
        total=sum(_fits(node["Resources"], bundle) for node in nodes),
    )


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
