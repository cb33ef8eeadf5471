"""How long the first request waits at an endpoint that rests without replicas (`serve.min_replicas=0`).

    python benchmarks/cold_start.py    # some minutes

MiniLM with a fresh head, answered by torch and by its int8 export, each three times: seconds from the request to its
answer. That is the start of a replica's process, the loading and warming up of the model, and what Ray and HAProxy need
to notice; the weights are in the page cache. Beside it stands the next request, for which all is there.
"""

import argparse
import json
import os
import socket
import tempfile
import time
import urllib.request
from pathlib import Path

from machine import describe_machine
from ray import serve as ray_serve
from rich.console import Console
from rich.table import Table
from serving import make_model
from upath import UPath

from cluster.connect import connected
from serve.app import APPLICATION, serve_model, stop
from serve.model import ServedModel
from serve.settings import ServeSettings

BODY = json.dumps({"texts": ["The flight was late again."]}).encode()
ENGINES = {"torch, bf16": "torch", "ONNX, int8": "onnx"}


def _rest() -> None:
    """Waits until no replica is left, and HAProxy knows it."""
    while ray_serve.status().applications[APPLICATION].deployments["Classifier"].replica_states:
        time.sleep(0.2)
    time.sleep(2)


def _ask(url: str) -> float:
    """Seconds to an answer."""
    started = time.perf_counter()
    request = urllib.request.Request(f"{url}/v1/classify", BODY, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        answer.read()
    return time.perf_counter() - started


def main() -> None:
    """Measures each engine, and prints the machine with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3, help="How often each engine is woken.")
    given = parser.parse_args()
    table = Table("engine", "seconds to the first answer", "to the second")
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch, connected("local", cpus=2):
        folder = Path(scratch)
        make_model(folder)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = int(probe.getsockname()[1])
        for name, engine in ENGINES.items():
            settings = ServeSettings(port=port, engine=engine, min_replicas=0, max_replicas=1, rest_after_s=1)
            url = serve_model(settings, ServedModel("minilm", "bench", UPath(folder / "model"), UPath(folder / "onnx")))
            first, second = [], []
            for _ in range(given.times):
                _rest()
                first.append(_ask(url))
                second.append(_ask(url))
            table.add_row(name, ", ".join(f"{each:.1f}" for each in first), ", ".join(f"{each:.3f}" for each in second))
        stop()
    console = Console()
    console.print(f"{describe_machine()}; load average {os.getloadavg()[0]:.1f} at the end")
    console.print(table)


if __name__ == "__main__":
    main()
