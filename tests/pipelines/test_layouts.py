"""How weights, activations and numbers are laid out on the workers changes no more of a run than it says."""

import contextlib
import itertools
import json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.models.bert.modeling_bert import BertIntermediate
from upath import UPath

from models import precision
from models.fixedpoint import FloatSum
from models.objectives import ClassificationObjective
from models.precision import LossScale
from models.spec import ClassifierSpec
from models.training import LaneTrainer
from pipelines.audit import compare
from pipelines.finetune import FinetuneSettings
from pipelines.prepared import Prepared
from pipelines.training.checkpoints import Checkpoints
from pipelines.training.classifying import Classifying
from pipelines.training.lanes import feed_over
from pipelines.training.pace import Pace
from pipelines.training.state import LeftError
from pipelines.training.worker import WorkerJob, train_lanes
from tests.groups import run_group
from tests.pipelines.tiny import TOPIC, make_encoder, make_prepared

LANES, MICROBATCH, EPOCHS = 4, 4, 2
ROWS = {"train": 100, "validation": 40, "test": 8}


class Leaving:
    """Has the workers leave after some steps of theirs; nobody listens."""

    def __init__(self, after: int | None) -> None:
        self._left = after

    def began(self, steps: int) -> Pace:
        return Pace(60, 60)

    def ordered_to_leave(self) -> bool:
        if self._left is None:
            return False
        self._left -= 1
        return self._left < 0

    def news(self, values: dict[str, Any]) -> None:
        pass

    def tell(self, sentence: str) -> None:
        print(sentence)


def train_here(job: WorkerJob, rank: int, workers: int, leave_after: int | None) -> None:
    """One worker's part; the first one keeps what the run's state is at its end."""
    torch.set_num_threads(1)
    precision.supported = lambda device, wanted: True
    checkpoints = Checkpoints(job.work / "checkpoints", print, rank, workers)
    try:
        state = train_lanes(job, checkpoints, Leaving(leave_after), rank, workers, torch.device("cpu"))
    except LeftError:
        return
    if rank == 0:
        torch.save({"losses": state.losses, "ledger": state.ledger.entries, "skipped": state.skipped}, f"{job.out}/end")


def _worker(
    rank: int, workers: int, port: int, jobs: Sequence[WorkerJob], leave_after: int | None, harm: Callable[[int], None]
) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    harm(rank)
    for job in jobs:
        train_here(job, rank, workers, leave_after)
    dist.destroy_process_group()


def no_harm(rank: int) -> None:
    pass


def train_on(
    workers: int,
    *jobs: WorkerJob,
    leave_after: int | None = None,
    harm: Callable[[int], None] = no_harm,
) -> None:
    """Runs the jobs in new processes, one after another."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    run_group(_worker, (workers, port, jobs, leave_after, harm), workers)


class Run:
    """What came of a run."""

    def __init__(self, job: WorkerJob) -> None:
        self.weights = load_file(f"{job.out}/model/model.safetensors")
        end = torch.load(f"{job.out}/end", weights_only=False)
        self.losses, self.skipped = end["losses"], end["skipped"]
        self.audit = compare(job.feed, Prepared(job.lesson.prepared), end["ledger"], job.steps).sentence

    def drift(self, other: "Run") -> float:
        """The largest difference of a weight."""
        assert self.weights.keys() == other.weights.keys()
        return max(float((self.weights[name] - other.weights[name]).abs().max()) for name in self.weights)

    def assert_same(self, other: "Run") -> None:
        assert self.losses == other.losses
        assert self.drift(other) == 0
        assert self.audit == "exact"

    def assert_near(self, other: "Run", loss: float, weight: float) -> None:
        """The same run but for rounding."""
        torch.testing.assert_close(self.losses, other.losses, atol=loss, rtol=0)
        assert self.audit == "exact"
        drift = self.drift(other)
        print(f"weights drift by {drift:.1e}")
        assert drift < weight


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_prepared(folder / "prepared", (TOPIC,), rows=ROWS, chunk_rows=16)
    make_encoder(folder / "encoder", layers=3)
    return folder


Job = Callable[..., WorkerJob]


@pytest.fixture
def job(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Makes runs that have not begun."""
    monkeypatch.setattr(precision, "supported", precision.supported)  # What is set in this process is undone.

    def make(name: str, **settings: Any) -> WorkerJob:
        given = {"precision": "fp32", "epochs": EPOCHS, "learning_rate": 3e-3, "trackers": ()} | settings
        chosen = FinetuneSettings(encoder=str(data / "encoder"), lanes=LANES, microbatch=MICROBATCH, **given)
        prepared = Prepared(UPath(data / "prepared"))
        (tmp_path / name).mkdir()
        feed = feed_over(prepared.index.splits["train"], LANES, MICROBATCH, chosen.seed)
        lesson = Classifying(
            settings=chosen,
            prepared=prepared.folder,
            encoder=str(data / "encoder"),
            spec=ClassifierSpec(labels=(TOPIC,), max_length=prepared.index.max_length),
            class_weights={},
        )
        return WorkerJob(
            lesson=lesson,
            out=UPath(tmp_path / name),
            work=UPath(tmp_path / name / "work"),
            feed=feed,
            steps=EPOCHS * feed.steps,
            validate_every=feed.steps,
            patience=chosen.patience,
            recipe="toy",
            fingerprint="none",
        )

    return make


@contextlib.contextmanager
def counting(kind: type[nn.Module]) -> Iterator[list[None]]:
    """An item for each forward pass of such a module while the block runs."""
    calls: list[None] = []
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, *_: calls.append(None) if isinstance(module, kind) else None
    )
    yield calls
    hook.remove()


def test_activation_checkpointing_changes_no_bit(job: Job) -> None:
    """Dropout is on: what is computed again must draw the same masks."""
    plain, again = job("plain", dropout=0.2), job("again", dropout=0.2, activation_checkpointing=True)
    others = job("others", dropout=0.2, activation_checkpointing=True)
    computed = []
    for each in (plain, again):
        with counting(BertIntermediate) as calls:
            train_here(each, 0, 1, None)
        computed.append(len(calls))
    assert computed[1] > 1.3 * computed[0], "two of three layers are computed twice in training"
    train_on(2, others)
    Run(again).assert_same(Run(plain))
    Run(others).assert_same(Run(plain))


@pytest.mark.slow
def test_half_precision_ends_in_the_same_bits_on_any_number_of_workers(job: Job) -> None:
    full, half, others = job("full"), job("half", precision="fp16"), job("others", precision="fp16")
    for each in (full, half):
        train_here(each, 0, 1, None)
    train_on(3, others, leave_after=3)
    train_on(2, others)
    Run(others).assert_same(Run(half))
    Run(half).assert_near(Run(full), loss=0.02, weight=0.01)
    assert Run(half).drift(Run(full)) > 0


def test_a_sharded_run_is_the_run_but_for_rounding(job: Job) -> None:
    """With four lanes on three workers some have nothing to do in a step's second turn, and all must take part."""
    alone = job("alone", exact=False)
    train_here(alone, 0, 1, None)
    spread = job("spread", exact=False, fsdp=True)
    lean = job("lean", exact=False, fsdp=True, precision="bf16", activation_checkpointing=True)
    head, head_alone = (job(name, exact=False, fsdp=name == "head", tune="head") for name in ("head", "head alone"))
    train_here(head_alone, 0, 1, None)
    train_on(3, spread, lean, head)
    Run(head).assert_near(Run(head_alone), loss=1e-5, weight=1e-4)
    Run(spread).assert_near(Run(alone), loss=1e-5, weight=1e-4)
    Run(lean).assert_near(Run(alone), loss=0.02, weight=0.01)
    assert Run(lean).drift(Run(alone)) > 1e-5, "it computes in half precision"


def _keep_norms(folder: Path, rank: int) -> None:
    """Leaves the norms of the vectors' gradients, step by step, before they are clipped."""
    clip, norms = FloatSum.clip, []

    def keeping(self: FloatSum, most: float) -> None:
        each = nn.utils.get_total_norm
        found = [each([p.grad]) for p in self._parameters if p.grad is not None and p.grad.shape[0] == p.numel()]
        norms.append([float(norm.full_tensor() if isinstance(norm, DTensor) else norm) for norm in found])
        (folder / f"norms-{rank}").write_text(json.dumps(norms))
        clip(self, most)

    FloatSum.clip = keeping  # type: ignore[method-assign]


def test_gradients_of_shards_are_those_of_one_worker(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam forgives a wrong factor, so that weights do not tell."""
    monkeypatch.setattr(FloatSum, "clip", FloatSum.clip)
    _keep_norms(tmp_path, 9)
    train_here(job("alone", exact=False), 0, 1, None)
    train_on(3, job("spread", exact=False, fsdp=True), harm=partial(_keep_norms, tmp_path))
    alone, *others = (json.loads((tmp_path / f"norms-{rank}").read_text()) for rank in (9, 0, 1, 2))
    for norms in others:
        np.testing.assert_allclose(norms, alone, rtol=1e-3, atol=1e-9)  # Those of keys are nothing but rounding.


def test_a_sharded_run_that_leaves_in_the_middle_of_validation_loses_nothing(job: Job) -> None:
    """Validation borrows weights and has no backward pass that gives them back."""
    calm, moved = (job(name, exact=False, fsdp=True, precision="bf16") for name in ("calm", "moved"))
    train_on(2, calm)
    train_on(2, moved, leave_after=moved.feed.steps + 1)
    (left,) = (Path(moved.work.path) / "checkpoints").iterdir()
    assert left.name.startswith(f"{moved.feed.steps:012d}-")
    assert not (Path(moved.work.path) / "best").exists(), "it was in the middle of it"
    train_on(2, moved)
    Run(moved).assert_same(Run(calm))


def test_any_layout_goes_on_from_the_checkpoint_of_any_other(job: Job) -> None:
    """Four replicas take a checkpoint at step 3 and leave, then three shards at step 6, and two replicas end it."""
    calm, moved = job("calm", exact=False), job("moved", exact=False)
    train_here(calm, 0, 1, None)
    train_on(4, moved, leave_after=2)
    object.__setattr__(moved.lesson, "settings", moved.settings.model_copy(update={"fsdp": True}))
    train_on(3, moved, leave_after=2)
    files = [file.name for file in (Path(moved.work.path) / "checkpoints").glob("000000000006-*/*.distcp")]
    assert len(files) == 3
    object.__setattr__(moved.lesson, "settings", moved.settings.model_copy(update={"fsdp": False}))
    train_on(2, moved)
    Run(moved).assert_near(Run(calm), loss=1e-5, weight=1e-4)


def test_an_order_to_leave_is_heard_during_validation(job: Job) -> None:
    calm, moved = job("calm"), job("moved")
    train_here(calm, 0, 1, None)
    train_on(2, moved, leave_after=moved.feed.steps)
    (left,) = (Path(moved.work.path) / "checkpoints").iterdir()
    assert left.name.startswith(f"{moved.feed.steps:012d}-")
    assert not (Path(moved.work.path) / "best").exists(), "it has not validated yet"
    train_on(3, moved)
    Run(moved).assert_same(Run(calm))


def test_overflows_in_half_precision_take_the_step_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale that is far too high comes down without losing a row."""
    monkeypatch.setattr(LossScale.__init__, "__defaults__", (2.0**40, 0, 5))
    scales: list[float] = []
    step = LaneTrainer.step

    def watched(self: LaneTrainer, *arguments: Any, **named: Any) -> Any:
        result = step(self, *arguments, **named)
        scales.append(self.scale.value)
        return result

    monkeypatch.setattr(LaneTrainer, "step", watched)
    half = job("half", precision="fp16")
    train_here(half, 0, 1, None)
    assert Run(half).audit == "exact"
    assert scales[0] < 2.0**32
    assert any(later == 2 * before for before, later in itertools.pairwise(scales)), "it rises again"


def _high_scale(rank: int) -> None:
    LossScale.__init__.__defaults__ = (2.0**30, 0, 5)  # type: ignore[misc]


def test_a_worker_without_a_lane_to_run_scales_as_the_others(job: Job) -> None:
    """With as many workers as lanes, those whose lane is dry know of an overflow from the others alone."""
    others = [job(name, exact=False, precision="fp16", fsdp=name == "spread") for name in ("replicated", "spread")]
    train_on(4, *others, harm=_high_scale)
    alone = job("alone", exact=False, precision="fp16")
    train_here(alone, 0, 1, None)
    for each in others:
        Run(each).assert_near(Run(alone), loss=0.01, weight=0.005)


def _no_loss(rank: int) -> None:
    """The second worker's third microbatch has no finite loss."""
    loss = ClassificationObjective.__call__

    def harmed(self: ClassificationObjective, logits: Tensor, labels: Mapping[str, Tensor]) -> Tensor:
        harmed.calls += 1  # type: ignore[attr-defined]
        bad = rank == 1 and harmed.calls == 3  # type: ignore[attr-defined]
        return loss(self, logits, labels) * (float("nan") if bad else 1)

    harmed.calls = 0  # type: ignore[attr-defined]
    ClassificationObjective.__call__ = harmed  # type: ignore[method-assign]


def test_a_sharded_run_skips_a_bad_microbatch_on_all_workers(job: Job) -> None:
    spread = job("spread", exact=False, fsdp=True, bad_microbatch="skip")
    train_on(2, spread, harm=_no_loss)
    (skipped,) = Run(spread).skipped
    assert skipped["lane"] % 2 == 1, "of the second worker"
    assert Run(spread).audit == "exact, but for 4 rows that were skipped"


def _no_memory(rank: int) -> None:
    def harmed(self: ClassificationObjective, logits: Tensor, labels: Mapping[str, Tensor]) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    if rank == 1:
        ClassificationObjective.__call__ = harmed  # type: ignore[method-assign]


def test_a_sharded_run_tells_where_memory_does_not_suffice(job: Job) -> None:
    with pytest.raises(Exception, match=r"memory does not suffice at epoch 0, step 0, lane [13] \(rows "):
        train_on(2, job("spread", exact=False, fsdp=True, bad_microbatch="skip"), harm=_no_memory)


def test_sharding_is_not_called_exact(data: Path) -> None:
    with pytest.raises(ValueError, match="set exact to false"):
        FinetuneSettings(encoder="any", fsdp=True)


@pytest.mark.slow
def test_compiled_layers_end_in_the_same_bits_on_any_number_of_workers(job: Job) -> None:
    alone, others = job("alone", dropout=0.2, compile=True), job("others", dropout=0.2, compile=True)
    lean = job("lean", dropout=0.2, compile=True, activation_checkpointing=True)
    graphs = torch._dynamo.utils.counters["stats"]
    train_here(alone, 0, 1, None)
    assert graphs["unique_graphs"] > 0
    train_on(3, others, leave_after=3)
    train_on(2, others)
    Run(others).assert_same(Run(alone))
    train_here(lean, 0, 1, None)
    Run(lean).assert_near(Run(alone), loss=1e-3, weight=0.02)
    plain, compiled = job("plain", dropout=0.0), job("compiled", dropout=0.0, compile=True)
    for each in (plain, compiled):
        train_here(each, 0, 1, None)
    Run(compiled).assert_near(Run(plain), loss=1e-4, weight=1e-4)
    assert Run(compiled).drift(Run(plain)) > 0
    spread = job("spread", dropout=0.0, compile=True, exact=False, fsdp=True, activation_checkpointing=True)
    train_on(3, spread)
    Run(spread).assert_near(Run(plain), loss=1e-4, weight=1e-3)
