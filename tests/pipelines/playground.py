"""A small cluster whose nodes and workers can be killed, drained and added: several raylets on this host."""

import contextlib
import threading
import time
from typing import Any

import psutil
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

DRAIN_SECONDS = 15.0


class Playground:
    """A cluster with a head that has no room for workers, and nodes with room for one each."""

    def __init__(self, nodes: int) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100_000_000})
        self.nodes: list[Any] = []
        for _ in range(nodes):
            self.add()

    def add(self) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=1, object_store_memory=100_000_000))

    def worker(self) -> None:
        """SIGKILL of a training worker."""
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # Others come and go meanwhile.
                if "RayTrainWorker" in " ".join(process.cmdline() or [process.name()]):
                    process.kill()
                    return
        raise LookupError("there is no training worker")

    def raylet(self) -> None:
        """SIGKILL of a node's raylet."""
        node = self.nodes.pop(0)
        node.all_processes["raylet"][0].process.kill()

    def host(self) -> None:
        """SIGKILL of a node: its raylet and all that runs on it."""
        raylet = psutil.Process(self.nodes.pop(0).all_processes["raylet"][0].process.pid)
        for process in (raylet, *raylet.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                process.kill()

    def drain(self) -> None:
        """A node is told that it goes away, and goes."""
        node = self.nodes.pop(0)
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + DRAIN_SECONDS) * 1000)
        accepted, why = GcsClient(address=self.cluster.address).drain_node(node.node_id, reason, "reclaimed", deadline)
        assert accepted, why
        gone = threading.Timer(DRAIN_SECONDS, self.cluster.remove_node, (node,), {"allow_graceful": False})
        gone.daemon = True
        gone.start()

    def below(self) -> None:
        """No node is left, for a while."""
        while self.nodes:
            self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)
        time.sleep(10)
        self.add()
