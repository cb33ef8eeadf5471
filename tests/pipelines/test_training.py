"""Fine-tuning in this process: every setting trains, and leaves a classifier that loads and learnt."""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from upath import UPath

from models import precision
from models.architectures import ScratchEncoder
from models.feed import Feed
from models.labels import LabelColumn, total_classes
from models.objectives import ClassificationObjective
from models.settings import InputError
from models.torch_engine import load_torch_engine
from pipelines import finetune
from pipelines.audit import compare
from pipelines.finetune import FinetuneSettings
from pipelines.ledgers import read_ledger
from pipelines.prepared import Prepared, SplitIndex
from pipelines.progress import Progress
from pipelines.stage import Task
from pipelines.training import classifying, fitting
from pipelines.training.checkpoints import Checkpoints
from pipelines.training.pace import Pace
from pipelines.training.worker import WorkerJob, train_lanes
from pipelines.training.workers import Outcome
from tests.pipelines.tiny import MOOD, TOPIC, artifact, make_encoder, make_prepared

ROWS = {"train": 96, "validation": 32, "test": 8}


class KilledError(Exception):
    """Stands for a worker's end."""


class Watched(Checkpoints):
    """Checkpoints of the one worker, which is killed after `kill_after` of them, if that is set."""

    def __init__(self, folder: Path, kill_after: int | None = None) -> None:
        super().__init__(UPath(folder), pytest.fail)
        self.kill_after = kill_after
        self.taken: list[int] = []

    def save(self, steps: int, *arguments: Any) -> None:
        super().save(steps, *arguments)
        assert self.wait()
        self.taken.append(steps)
        if len(self.taken) == self.kill_after:
            raise KilledError


class LoneChannel:
    """There is nobody to tell, and nobody who gives orders."""

    def __init__(self, settings: FinetuneSettings) -> None:
        self._bounds = settings.checkpoint_seconds

    def began(self, steps: int) -> Pace:
        return Pace(self._bounds.min, self._bounds.max)

    def ordered_to_leave(self) -> bool:
        return False

    def news(self, values: dict[str, Any]) -> None:
        pass

    def tell(self, sentence: str) -> None:
        pass


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("gpt2"), decoder=True)


Run = Callable[..., tuple[dict[str, Any], Path]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the stage with its one worker in this process; gives its metrics and its folder."""
    torch.set_num_threads(1)

    def run_stage(
        settings: dict[str, Any],
        labels: Sequence[LabelColumn] = (TOPIC,),
        checkpoints: Watched | None = None,
        **data: Any,
    ) -> tuple[dict[str, Any], Path]:
        def train_here(job: WorkerJob, progress: Progress) -> Outcome:
            own = checkpoints or Watched(tmp_path / "checkpoints")
            return Outcome(train_lanes(job, own, LoneChannel(job.settings), 0, 1, torch.device("cpu")), 1, [{}])

        monkeypatch.setattr(finetune, "train", train_here)
        prepared = tmp_path / "prepared"
        if not prepared.exists():
            make_prepared(prepared, labels, **({"rows": ROWS, "noise": 0.0, "chunk_rows": 16} | data))
        defaults = {"epochs": 2, "learning_rate": 3e-3, "microbatch": 4, "trackers": ()}
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        chosen = FinetuneSettings(**(defaults | settings))
        return finetune.run(
            Task(chosen, {"prepare": artifact(prepared, "prepare")}, UPath(out), Progress(), "toy")
        ), out

    return run_stage


def losses(out: Path) -> list[float]:
    found: list[float] = json.loads((out / "history.json").read_text())["losses"]
    return found


def assert_usable(metrics: dict[str, Any], out: Path, labels: Sequence[LabelColumn] = (TOPIC,)) -> None:
    """Finite losses, one validation an epoch, and a classifier that answers for each label column."""
    assert all(math.isfinite(loss) for loss in losses(out))
    assert len(losses(out)) == metrics["steps"]
    history = json.loads((out / "history.json").read_text())
    assert len(history["validations"]) == metrics["epochs"]
    assert "Training loss" in (out / "report.html").read_text()
    engine = load_torch_engine(out / "model")
    pairs = ["the"] if engine.spec.pair else None
    (answer,) = engine.classify(["the very good cat"], pairs)
    assert set(answer.labels) == {column.name for column in labels}
    assert engine.logits(engine.encode(["cat"], pairs)).shape == (1, total_classes(labels))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "fp32"},
        {"exact": False},
        {"clip": 0.01},
        {"label_smoothing": 0.2},
        {"class_weights": "balanced"},
        {"class_weights": {"tool": 3.0}},
        {"schedule": "cosine"},
        {"schedule": "constant", "warmup": 0.0},
        {"weight_decay": 0.0, "dropout": 0.0},
        {"lanes": 1},
        {"lanes": 16},
        {"metric": "accuracy", "patience": 1},
        {"encoder": ScratchEncoder(hidden_size=32, layers=1, heads=2)},
    ],
    ids=str,
)
def test_every_setting_trains(settings: dict[str, Any], run: Run, bert: Path) -> None:
    metrics, out = run({"encoder": str(bert)} | settings)
    assert_usable(metrics, out)
    assert metrics["precision"] == settings.get("precision", metrics["precision"])


def test_the_rule_is_learnt(run: Run, bert: Path) -> None:
    metrics, out = run({"encoder": str(bert), "epochs": 8, "dropout": 0.0})
    assert metrics["validation.accuracy"] > 0.95
    said = [
        answer.labels["topic"].label
        for answer in load_torch_engine(out / "model").classify(["the cat", "a very good axe"])
    ]
    assert said == ["animal", "tool"]


def test_a_decoder_without_padding_token_learns_too(run: Run, gpt2: Path) -> None:
    metrics, out = run({"encoder": str(gpt2), "epochs": 8, "dropout": 0.0}, decoder=True)
    assert_usable(metrics, out)
    assert metrics["validation.accuracy"] > 0.9
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["pad_token_id"] == 3
    assert config["attn_pdrop"] == config["embd_pdrop"] == config["resid_pdrop"] == 0.0


def test_several_columns_one_of_them_multi_label(run: Run, bert: Path) -> None:
    labels = (TOPIC, MOOD)
    metrics, out = run({"encoder": str(bert), "metric": "mood.micro_f1", "class_weights": "balanced"}, labels)
    assert_usable(metrics, out, labels)
    assert {"validation.topic.accuracy", "validation.mood.micro_f1"} <= metrics.keys()


def test_a_multi_label_column_alone_with_smoothing(run: Run, bert: Path) -> None:
    metrics, out = run({"encoder": str(bert), "label_smoothing": 0.1}, (MOOD,))
    assert_usable(metrics, out, (MOOD,))


def test_pairs_of_texts(run: Run, bert: Path) -> None:
    metrics, out = run({"encoder": str(bert)}, pair=True)
    assert_usable(metrics, out)
    assert load_torch_engine(out / "model").spec.pair


def test_rows_without_a_label_add_nothing(run: Run, bert: Path) -> None:
    metrics, out = run({"encoder": str(bert)}, missing=0.5)
    assert_usable(metrics, out)


def test_only_the_head_is_trained(run: Run, bert: Path) -> None:
    metrics, out = run({"encoder": str(bert), "tune": "head"})
    assert_usable(metrics, out)
    before, after = load_file(bert / "model.safetensors"), load_file(out / "model" / "model.safetensors")
    assert all(torch.equal(after[f"bert.{name}"], value) for name, value in before.items())


def test_it_stops_early_by_the_metric_asked_for(run: Run, bert: Path) -> None:
    metrics, _ = run({"encoder": str(bert), "epochs": 20, "patience": 2, "learning_rate": 1e-9, "metric": "accuracy"})
    assert metrics["stopped_early"]
    assert metrics["epochs"] == 3
    assert metrics["best_epoch"] == 1


def test_divergence_is_told_in_a_sentence(run: Run, bert: Path) -> None:
    with pytest.raises(InputError, match=r"epoch 0, step \d+.*learning[_ ]rate"):
        run({"encoder": str(bert), "learning_rate": 1e30, "clip": 1e30})


@pytest.mark.filterwarnings("error::UserWarning")
def test_steps_without_texts_change_nothing(run: Run, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unmerged(split: SplitIndex, lanes: int, microbatch: int, seed: int) -> Feed:
        """As for stored chunks that are too large to be put together."""
        return Feed(split.rows, split.chunk_rows, lanes, microbatch, seed)

    monkeypatch.setattr(finetune, "feed_over", unmerged)
    # The last of three chunks has 2 rows: it fills one of the four steps that a chunk lasts.
    rows = {"train": 34, "validation": 16, "test": 4}
    metrics, out = run({"encoder": str(bert), "lanes": 1, "epochs": 3}, rows=rows)
    assert_usable(metrics, out)
    assert metrics["steps"] == 3 * (4 + 4 + 1)
    assert min(losses(out)) > 0


def test_a_run_ends_in_the_precision_that_it_began_with(
    run: Run, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"encoder": str(bert), "checkpoint_seconds": 1e-9}
    monkeypatch.setattr(precision, "supported", lambda device, wanted: True)
    with pytest.raises(KilledError):
        run(settings, checkpoints=Watched(tmp_path / "begun", kill_after=2))
    monkeypatch.setattr(precision, "supported", lambda device, wanted: wanted == "fp32")
    assert run(settings, checkpoints=Watched(tmp_path / "begun"))[0]["precision"] == "bf16"
    metrics, out = run(settings)
    assert metrics["precision"] == "fp32"
    told = losses(out)
    run(settings | {"precision": "fp32"}, checkpoints=Watched(tmp_path / "asked for"))
    assert losses(out) == told


def test_checkpoints_come_by_the_clock_and_a_killed_run_goes_on(
    run: Run, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"encoder": str(bert), "epochs": 4, "checkpoint_seconds": 10.0, "trackers": ("tensorboard",)}
    calm = Watched(tmp_path / "calm")
    _, out = run(settings, checkpoints=calm)
    assert not calm.taken
    wanted, model = losses(out), load_file(out / "model" / "model.safetensors")
    shutil.rmtree(out / "tensorboard")

    # The clock goes on by a second each time it is looked at.
    ticks = itertools.count()
    monkeypatch.setattr(fitting.time, "monotonic", lambda: float(next(ticks)))
    killed, went_on = (Watched(tmp_path / "checkpoints", kill_after) for kill_after in (3, None))
    with pytest.raises(KilledError):
        run(settings, checkpoints=killed)
    _, out = run(settings, checkpoints=went_on)
    places = killed.taken + went_on.taken
    assert len(places) == 5
    assert len(set(np.diff(places))) == 1, "neither an epoch's end nor a restart moves them"
    assert losses(out) == wanted
    found = load_file(out / "model" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in model.items())
    curves = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in curves.Scalars("train/loss")] == list(range(1, len(wanted) + 1))
    assert len(curves.Scalars("validation/accuracy")) == 4


class FaultyObjective(ClassificationObjective):
    """Fails for one microbatch, which it knows by the seed of its draws."""

    fault: ClassVar[str]
    seed: ClassVar[int]

    def __call__(self, logits: torch.Tensor, labels: Mapping[str, torch.Tensor]) -> torch.Tensor:
        loss = super().__call__(logits, labels)
        if torch.initial_seed() != self.seed:
            return loss
        match self.fault:
            case "loss":
                return loss * math.nan
            case "gradient":
                return loss + (logits * 0).sqrt().sum()
            case _:
                return loss + torch.ones(1 << 50).sum()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("loss", "the loss is not finite"),
        ("gradient", "the gradient is not finite"),
        ("memory", "memory does not suffice"),
    ],
)
def test_a_bad_microbatch_ends_the_run_or_is_skipped(
    fault: str, told: str, exact: bool, run: Run, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"encoder": str(bert), "dropout": 0.0, "exact": exact}
    run(settings | {"epochs": 1})
    prepared = Prepared(UPath(tmp_path / "prepared"))
    feed = finetune.feed_over(prepared.index.splits["train"], 4, 4, 0)
    monkeypatch.setattr(classifying, "ClassificationObjective", FaultyObjective)
    FaultyObjective.fault, FaultyObjective.seed = fault, feed.draw_seed(1, 2, 1)
    with pytest.raises(InputError, match=rf"^{told}.* at epoch 1, step 2, lane 1 \(rows \d+, .*bad_microbatch=skip\.$"):
        run(settings, checkpoints=Watched(tmp_path / "stopped"))
    metrics, out = run(settings | {"bad_microbatch": "skip"}, checkpoints=Watched(tmp_path / "skipping"))
    assert_usable(metrics, out)
    (left_out,) = json.loads((out / "skipped.json").read_text())
    assert (left_out["epoch"], left_out["step"], left_out["lane"]) == (1, 2, 1)
    assert told in left_out["reason"]
    assert metrics["skipped_texts"] == len(left_out["rows"]) == 4
    assert (
        compare(feed, prepared, read_ledger(UPath(out)), 2 * feed.steps).sentence
        == "exact, but for 4 rows that were skipped"
    )
