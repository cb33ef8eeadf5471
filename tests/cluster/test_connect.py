"""What cannot run where it is meant to is told at once."""

import pytest
import ray

from cluster import connect
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


HERE, OTHER, GONE = (
    {"Alive": name != "gone", "NodeManagerHostname": name, "Resources": {"CPU": cpus}}
    for name, cpus in (("here", 2), ("other", 2), ("gone", 2))
)
HEAD = HERE | {"Resources": {}}


@pytest.mark.parametrize("nodes", [[HERE, OTHER], [HEAD], [HEAD, OTHER]])
def test_a_store_beside_the_command_is_refused_where_others_work(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, object]]
) -> None:
    # Hosts of other names take network namespaces of their own, so the list of nodes is made up.
    monkeypatch.setattr(connect, "is_own", lambda: False)
    monkeypatch.setattr(ray, "nodes", lambda: [HERE, GONE])
    require_shared("shoal-store")
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    for shared in ("s3://bucket/shoal", "/mnt/shared/shoal", "~/shared"):
        require_shared(shared)
    with pytest.raises(ClusterError, match="the store shoal-store is a folder of this host, but the cluster works on"):
        require_shared("shoal-store")
