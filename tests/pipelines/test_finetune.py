"""Fine-tuning: the same run on any number of workers and through any interruption, and what it leaves behind."""

import io
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForSequenceClassification

from cluster.store import Artifact, ClusterError, Store
from models.classifier import load
from models.feed import Feed
from models.settings import InputError
from pipelines import finetune
from pipelines.finetune import FinetuneSettings
from pipelines.progress import Progress
from pipelines.stage import Task
from pipelines.training.lanes import feed_over
from tests.making import make_encoder, make_prepared, open_store, read_json


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def prepared(store: Store) -> Artifact:
    return make_prepared(store)


def make_task(store: Store, prepared: Artifact, name: str, **settings: Any) -> Task:
    defaults: dict[str, Any] = {"epochs": 3, "learning_rate": 1e-3, "metric": "accuracy", "trackers": ()}
    return Task(
        settings=FinetuneSettings(**(defaults | settings)),
        inputs={"prepare": prepared},
        out=store.folder("finetune", name),
        progress=Progress(),
        recipe="test",
    )


def weights(task: Task) -> dict[str, torch.Tensor]:
    return load_file(str(task.out / "model" / "model.safetensors"))


def assert_same_run(task: Task, other: Task) -> None:
    ours, theirs = weights(task), weights(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert read_json(task.out / "history.json") == read_json(other.out / "history.json")


@pytest.fixture(scope="module")
def undisturbed(store: Store, prepared: Artifact, encoder: Path, ray_session: None) -> Task:
    """One worker, 4 lanes, bf16, dropout on, 36 steps and more."""
    task = make_task(store, prepared, "undisturbed", encoder=str(encoder), epochs=3)
    finetune.run(task)
    return task


@pytest.mark.parametrize(
    "workers", [3, pytest.param(2, marks=pytest.mark.long), pytest.param(4, marks=pytest.mark.long)]
)
def test_any_number_of_workers_ends_in_the_same_bits(
    workers: int, undisturbed: Task, store: Store, prepared: Artifact
) -> None:
    encoder = undisturbed.settings.encoder
    task = make_task(store, prepared, f"workers-{workers}", encoder=encoder, workers=workers)
    assert finetune.run(task)["workers"] == workers
    assert len(read_json(task.out / "history.json")["losses"]) >= 30  # type: ignore[arg-type]
    assert_same_run(task, undisturbed)


def training_workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # Others come and go meanwhile.
            if "RayTrainWorker" in " ".join(process.cmdline() or [process.name()]):
                found.append(process)
    return found


CHECKPOINT = "checkpoints/*/checkpoint.json"


@contextmanager
def killing_a_worker(work: Path, sign: str | None = CHECKPOINT) -> Iterator[list[int]]:
    """SIGKILLs one training worker once there is a file like `sign` in the run's folder; without, at once."""
    killed: list[int] = []

    def kill() -> None:
        end = time.monotonic() + 120
        while not killed and time.monotonic() < end:
            time.sleep(0.05)
            if (sign is None or list(work.glob(sign))) and (victims := training_workers()):
                os.kill(victims[-1].pid, signal.SIGKILL)
                killed.append(victims[-1].pid)

    thread = threading.Thread(target=kill)
    thread.start()
    yield killed
    thread.join()


LONGER: dict[str, Any] = {"epochs": 12, "checkpoint_seconds": 0.3}


@pytest.fixture(scope="module")
def calm(store: Store, prepared: Artifact, encoder: Path, ray_session: None) -> Task:
    """A longer run, undisturbed."""
    task = make_task(store, prepared, "calm", encoder=str(encoder), **LONGER)
    finetune.run(task)
    return task


@pytest.mark.parametrize(
    "sign", [CHECKPOINT, pytest.param(None, marks=pytest.mark.slow)], ids=["while it trains", "while it starts"]
)
def test_a_killed_worker_changes_nothing(
    sign: str | None, calm: Task, store: Store, prepared: Artifact, encoder: Path
) -> None:
    task = make_task(store, prepared, f"killed-{sign is None}", encoder=str(encoder), workers=2, **LONGER)
    with killing_a_worker(Path(task.work.path), sign) as killed:
        finetune.run(task)
    assert killed
    assert_same_run(task, calm)


def test_a_run_broken_off_goes_on_from_there_with_other_workers(
    calm: Task, store: Store, prepared: Artifact, encoder: Path
) -> None:
    broken = make_task(store, prepared, "broken-off", encoder=str(encoder), max_failures=0, **LONGER)
    with killing_a_worker(Path(broken.work.path)) as killed, pytest.raises(ClusterError, match="to go on"):
        finetune.run(broken)
    assert killed
    went_on = make_task(
        store, prepared, "broken-off", encoder=str(encoder), workers=3, trackers=("tensorboard",), **LONGER
    )
    finetune.run(went_on)
    assert_same_run(went_on, calm)
    (event_file,) = Path((went_on.out / "tensorboard").path).iterdir()
    curves = EventAccumulator(str(event_file)).Reload()
    assert curves.Scalars("train/loss")[0].step > 1, "it began at the beginning"


def test_what_others_hold_is_not_waited_for(
    store: Store, prepared: Artifact, encoder: Path, undisturbed: Task, ray_session: None
) -> None:
    other = ray.remote(num_cpus=2)(Counter).remote()
    ray.get(other.most_common.remote())
    told = io.StringIO()
    task = make_task(store, prepared, "beside", encoder=str(encoder), workers=4)
    task = replace(task, progress=Progress(Console(file=told, width=200)))
    finetune.run(task)
    assert json.loads((task.out / "groups.json").read_text())[0]["workers"] == 2
    assert_same_run(task, undisturbed)
    ray.kill(other)


def test_the_result_loads_as_any_classifier(undisturbed: Task) -> None:
    folder = Path((undisturbed.out / "model").path)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert theirs.config.id2label == {0: "negative", 1: "positive"}
    ours, tokenizer, spec = load(folder)
    inputs = tokenizer("word2 word4 word6", return_tensors="pt")
    torch.testing.assert_close(theirs(**inputs).logits, ours(**inputs).logits)
    assert spec.labels[0].name == "sentiment"


@dataclass(frozen=True)
class FeedWithAFaultyLane(Feed):
    """Meets a mistake where only the worker that owns lane 1 sees it."""

    met: str = ""

    def draw_seed(self, epoch: int, step: int, lane: int) -> int:
        if (step, lane) == (3, 1):
            with Path(self.met).open("a") as file:
                file.write("once")
            raise InputError("row 7 of tickets.csv is broken.")
        return super().draw_seed(epoch, step, lane)


def test_a_mistake_that_one_worker_meets_ends_all_at_once(
    store: Store, prepared: Artifact, encoder: Path, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met = tmp_path / "met"

    def faulty(*arguments: Any) -> Feed:
        return FeedWithAFaultyLane(**asdict(feed_over(*arguments)), met=str(met))

    monkeypatch.setattr(finetune, "feed_over", faulty)
    task = make_task(store, prepared, "mistaken", encoder=str(encoder), workers=2)
    started = time.monotonic()
    with pytest.raises(InputError, match=r"^row 7 of tickets.csv is broken\.$"):
        finetune.run(task)
    assert time.monotonic() - started < 120
    assert met.read_text() == "once"


@dataclass(frozen=True)
class FeedWithoutMemory(Feed):
    """Memory does not suffice for one microbatch, where only the worker that owns lane 1 sees it."""

    def draw_seed(self, epoch: int, step: int, lane: int) -> int:
        if (epoch, step, lane) == (1, 3, 1):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().draw_seed(epoch, step, lane)


@pytest.mark.slow
def test_all_workers_skip_what_one_has_no_memory_for(
    store: Store, prepared: Artifact, encoder: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "feed_over", lambda *arguments: FeedWithoutMemory(**asdict(feed_over(*arguments))))
    settings = {"encoder": str(encoder), "epochs": 2, "bad_microbatch": "skip"}
    alone, together = (
        make_task(store, prepared, f"skipping-{workers}", workers=workers, **settings) for workers in (1, 2)
    )
    for task in (alone, together):
        assert finetune.run(task)["skipped_texts"] == 8
    assert_same_run(together, alone)
    assert read_json(together.out / "skipped.json") == read_json(alone.out / "skipped.json")


def test_an_encoder_that_is_none_is_told(tmp_path: Path, hub_away: None) -> None:
    with pytest.raises(InputError, match=r"is no encoder: there is no config.json"):
        finetune.externals(FinetuneSettings(encoder=str(tmp_path)))
    with pytest.raises(InputError, match="does not exist"):
        finetune.externals(FinetuneSettings(encoder="./nowhere/at/all"))
    with pytest.raises(InputError, match="neither a folder here nor an encoder that the hub gives"):
        finetune.externals(FinetuneSettings(encoder="no-such-owner/no-such-encoder"))


def test_an_unknown_class_weight_or_metric_is_told(store: Store, prepared: Artifact, encoder: Path) -> None:
    with pytest.raises(InputError, match=r"finetune.class_weights: 'angry' is no class; there are negative, positive"):
        finetune.run(make_task(store, prepared, "weights", encoder=str(encoder), class_weights={"angry": 2.0}))
    with pytest.raises(InputError, match=r"finetune.metric"):
        finetune.run(make_task(store, prepared, "metric", encoder=str(encoder), metric="acuracy"))
