"""What cannot run where it is meant to is told at once."""

import socket

import pytest
import ray

from cluster.connect import require_shared, room_for
from cluster.store import ClusterError


@pytest.mark.usefixtures("ray_session")
def test_what_this_machine_can_never_hold_is_told() -> None:
    room_for(4, 0, "a worker", "finetune.threads")
    with pytest.raises(
        ClusterError, match=r"a worker: 5 CPUs are needed, but this machine has 4; lower finetune\.threads"
    ):
        room_for(5, 0, "a worker", "finetune.threads")
    with pytest.raises(ClusterError, match=r"2 replicas: 2 GPUs are needed, but this machine has 0"):
        room_for(2, 2, "2 replicas", "serve.gpus")


@pytest.mark.usefixtures("ray_session")
def test_a_store_beside_the_command_is_refused_where_there_are_several_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    require_shared("shoal-store")
    others = [{"Alive": alive, "NodeManagerHostname": name} for name, alive in (("gone", False), ("other", True))]
    nodes = ray.nodes()
    assert nodes[0]["NodeManagerHostname"] == socket.gethostname()
    # A host of another name takes network namespaces of its own, so the list of nodes is made up.
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, *others])
    for shared in ("s3://bucket/shoal", "/mnt/shared/shoal", "~/shared"):
        require_shared(shared)
    with pytest.raises(ClusterError, match="the store shoal-store is a folder of this host, but the cluster has 2"):
        require_shared("shoal-store")
