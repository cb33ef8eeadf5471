"""The endpoint's speed beside others: the same MiniLM classifier, texts of real lengths, open-loop load.

    python benchmarks/serving.py                                # Shoal, a pipeline under uvicorn, plain Ray Serve
    python benchmarks/serving.py --others VENV                  # and infinity_emb and LitServe, from a venv:
                                                              # pip install 'infinity-emb[all]==0.0.78' litserve==0.2.19

Each server has two workers of one thread (infinity_emb, which has one worker, two threads). For single texts and lists
of 32 it prints the highest rate at which 99% of the requests are answered within the limit, and the latencies at 30% of
it. Beside them stands what two processes of the bare engine compute in a loop, without a server. Load comes from
another process of the same machine. What else runs on a machine can only slow a contestant down: with `--rounds` all
have several turns, and each row is the best of them.
"""

import argparse
import multiprocessing
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endpoints import (
    HERE,
    Server,
    highest_rate,
    model_folder,
    plain_ray,
    run_load,
    running,
    shoal,
    tweets,
    write_bodies,
)
from machine import describe_machine
from rich.console import Console
from rich.table import Table

from models.onnx_engine import load_onnx_engine
from models.torch_engine import load_torch_engine

LIST = 32
ENGINES: dict[str, Callable[[Path], Any]] = {
    "torch": lambda folder: load_torch_engine(folder / "model", threads=1),
    "int8": lambda folder: load_onnx_engine(folder / "onnx"),
}


def _engine_loop(kind: str, folder: Path, texts: list[str], size: int, seconds: float, results: Any) -> None:
    engine = ENGINES[kind](folder)
    groups = [texts[at : at + size] for at in range(0, len(texts), size)]
    engine.classify(groups[0])
    results["barrier"].wait()
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        engine.classify(groups[done % len(groups)])
        done += 1
    results["queue"].put(done * size / (time.perf_counter() - started))


def _engine_alone(kind: str, folder: Path, texts: list[str], size: int, seconds: float) -> float:
    """Texts/s of two processes, each with an engine of one thread."""
    context = multiprocessing.get_context("spawn")
    results = {"barrier": context.Barrier(2), "queue": context.Queue()}
    arguments = (kind, folder, texts, size, seconds, results)
    workers = [context.Process(target=_engine_loop, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = sum(results["queue"].get(timeout=300) for _ in workers)
    for worker in workers:
        worker.join()
    return float(found)


def _contestants(others: Path | None) -> list[Server]:
    uvicorn = [sys.executable, "-m", "uvicorn", "pipeline_server:app", "--port", "PORT", "--workers", "2"]
    servers = [
        Server("FastAPI + transformers pipeline", [*uvicorn, "--log-level", "warning"], "/classify"),
        plain_ray(),
        shoal("torch"),
        shoal("onnx"),
    ]
    if others is None:
        return servers
    infinity = [str(others / "bin/infinity_emb"), "v2", "--model-id", "MODEL", "--engine", "torch", "--device", "cpu"]
    litserve = [str(others / "bin/python"), str(HERE / "servers/litserve_server.py"), "PORT"]
    return [
        *servers[:1],
        Server(
            "infinity_emb 0.0.78",
            [*infinity, "--port", "PORT", "--no-bettertransformer", "--served-model-name", "minilm"],
            "/classify",
            lambda given: {"model": "minilm", "input": list(given)},
            threads=2,  # it has one worker
        ),
        Server("LitServe 0.2.19", litserve, "/classify"),
        *servers[1:],
    ]


def main() -> None:
    """Measures each contestant, single texts first, then lists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--others", type=Path, help="A venv with infinity_emb and LitServe.")
    parser.add_argument("--only", help="A part of the names to measure.")
    parser.add_argument("--limit-ms", type=float, default=100.0, help="The 99th percentile allowed for single texts.")
    parser.add_argument("--list-limit-ms", type=float, default=1000.0, help="The same for lists.")
    parser.add_argument("--seconds", type=float, default=8.0, help="Of each load.")
    parser.add_argument("--rounds", type=int, default=1, help="How often each has its turn.")
    given = parser.parse_args()
    console = Console(width=max(120, Console().width))
    texts = tweets(512)
    sizes = {1: given.limit_ms, LIST: given.list_limit_ms}
    header = ["", *(f"{'single texts' if size == 1 else f'lists of {size}'}: {w}" for size in sizes for w in _FIGURES)]
    table = Table(*header)
    best: dict[str, dict[int, Found]] = defaultdict(dict)

    def tell(name: str, size: int, found: Found) -> None:
        console.print(f"{name}, {size} at a time: {', '.join(filter(None, found.cells(size)))}", style="dim")
        if size not in best[name] or found.rate > best[name][size].rate:
            best[name][size] = found

    with model_folder() as folder:
        for _ in range(given.rounds):
            for kind in ENGINES:
                for size in sizes:
                    texts_s = _engine_alone(kind, folder, texts, size, given.seconds)
                    tell(f"engine alone, {kind}", size, Found(texts_s / size))
            for server in _contestants(given.others):
                if given.only and given.only not in server.name:
                    continue
                with running(server, folder) as url:
                    for size, limit in sizes.items():
                        bodies = write_bodies(folder / "bodies.jsonl", server, texts, size)
                        run_load(url, bodies, 20 / size, 3)
                        highest = highest_rate(url, bodies, 60 / size, limit, given.seconds)
                        calm = run_load(url, bodies, 0.3 * highest, 10) if highest else {}
                        tell(server.name, size, Found(highest, calm.get("p50_ms"), calm.get("p99_ms")))
    for name, found in best.items():
        table.add_row(name, *(cell for size in sizes for cell in found[size].cells(size)))
    console.print(describe_machine())
    console.print(table)


@dataclass(frozen=True)
class Found:
    """What a contestant carries, in requests/s, and its latencies at 30% of that."""

    rate: float
    p50_ms: float | None = None
    p99_ms: float | None = None

    def cells(self, size: int) -> list[str]:
        """The row's cells, for requests of so many texts."""
        return [
            f"{self.rate * size:,.0f}",
            *("" if each is None else f"{each:.1f}" for each in (self.p50_ms, self.p99_ms)),
        ]


_FIGURES = ("texts/s", "p50 at 30%, ms", "p99")


if __name__ == "__main__":
    main()
