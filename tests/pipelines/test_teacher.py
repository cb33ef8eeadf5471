"""A teacher is asked once for each row; what it said is read like labels, on any number of workers."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.special import log_softmax
from upath import UPath

from cluster.store import Store
from models.classifier import load, save
from models.distillation import TEACHER
from models.labels import LabelColumn
from models.settings import InputError
from models.spec import SPEC, ClassifierSpec, label_config
from models.torch_engine import load_torch_engine
from pipelines import finetune, teacher
from pipelines.finetune import FinetuneSettings
from pipelines.parts import Result
from pipelines.prepared import Prepared
from pipelines.progress import Progress
from pipelines.stage import Task
from pipelines.training.lanes import feed_over, text_batches
from pipelines.training.soft_targets import SoftTargets
from pipelines.training.worker import WorkerJob, train_lanes
from pipelines.training.workers import Outcome
from tests.finished_stages import PRINTS, put_artifacts
from tests.pipelines.test_layouts import Run as RunOnWorkers
from tests.pipelines.test_layouts import train_on
from tests.pipelines.test_training import LoneChannel, Watched
from tests.pipelines.tiny import MOOD, TOPIC, artifact, make_classifier, make_encoder, make_prepared

ROWS = {"train": 96, "validation": 64, "test": 8}


def in_this_process(
    name: str,
    parts: Sequence[int],
    work: Callable[[int, int], Result],
    folder: UPath,
    progress: Progress,
    gpus: int = 0,
) -> list[Result]:
    return [work(number, part) for number, part in enumerate(parts)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, and an encoder that is to learn."""
    folder = tmp_path_factory.mktemp("folders")
    make_classifier(folder / "teacher")
    make_encoder(folder / "encoder", layers=2)
    return folder


@pytest.fixture
def asking_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "run_parts", in_this_process)
    monkeypatch.setattr(teacher, "_LEAST_ROWS", 32)
    torch.set_num_threads(1)
    teacher._engine.cache_clear()


Make = Callable[..., Task]


@pytest.fixture
def make(folders: Path, tmp_path: Path, asking_here: None) -> Make:
    """Tasks over a small prepared dataset."""

    def make_task(
        labels: Sequence[LabelColumn] = (TOPIC,), data: dict[str, Any] | None = None, **settings: Any
    ) -> Task:
        prepared = tmp_path / "prepared"
        if not prepared.exists():
            make_prepared(prepared, labels, **({"rows": ROWS, "noise": 0.0, "chunk_rows": 16} | (data or {})))
        defaults = {"encoder": str(folders / "encoder"), "microbatch": 4, "trackers": (), "precision": "fp32"}
        taught = {"teacher": str(folders / "teacher"), "learning_rate": 3e-3}
        chosen = FinetuneSettings(**(defaults | taught | settings))
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        return Task(chosen, {"prepare": artifact(prepared, "prepare")}, UPath(out), Progress(), "toy")

    return make_task


def trained(task: Task, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs the stage with its one worker in this process; gives the classifier's folder."""

    def train_here(job: WorkerJob, progress: Progress) -> Outcome:
        own = Watched(Path(task.work.path) / "checkpoints")
        return Outcome(train_lanes(job, own, LoneChannel(job.settings), 0, 1, torch.device("cpu")), 1, [{}])

    monkeypatch.setattr(finetune, "train", train_here)
    finetune.run(task)
    return Path(task.out.path) / "model"


def validation_texts(task: Task) -> list[str]:
    texts: list[str] = Prepared(task.inputs["prepare"].path).read_split("validation", ["text"])["text"].to_pylist()
    return texts


def test_a_student_comes_to_say_what_the_teacher_says(
    make: Make, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the labels are missing, and the others wrong half of the time: they teach nothing."""
    data = {"noise": 0.5, "missing": 0.5, "rows": ROWS | {"train": 640}}
    # One validation: nothing is chosen by labels that are wrong.
    task = make(data=data, epochs=1, teacher_weight=1.0, dropout=0.0, learning_rate=1e-2)
    student, texts = trained(task, monkeypatch), validation_texts(task)
    engines = [load_torch_engine(each, precision="fp32") for each in (folders / "teacher", student)]
    p, q = (log_softmax(each.logits(each.encode(texts)), axis=1) for each in engines)
    assert (np.exp(p) * (p - q)).sum(1).mean() < 0.3 * (np.exp(p) * (p - np.log(0.5))).sum(1).mean()
    assert (p.argmax(1) == q.argmax(1)).mean() > 0.95


def test_a_student_of_fewer_layers_loads_as_such(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, spec = load(trained(make(epochs=1, keep_layers=1), monkeypatch))
    assert model.config.num_hidden_layers == len(model.base_model.encoder.layer) == 1
    assert spec.labels == (TOPIC,)


def reordered(folder: Path, out: Path) -> Path:
    """The same classifier of topics and moods, with its columns and classes in another order."""
    model, tokenizer, spec = load(folder)
    labels = tuple(
        column.model_copy(update={"classes": tuple(reversed(column.classes))}) for column in reversed(spec.labels)
    )
    with torch.no_grad():
        for values in (model.classifier.weight, model.classifier.bias):
            values.copy_(values.flip(0))
    for name, value in label_config(labels).items():
        setattr(model.config, name, value)
    out.mkdir()
    save(model, tokenizer, ClassifierSpec(labels=labels, max_length=spec.max_length), out)
    return out


def test_columns_and_classes_in_another_order_teach_the_same(make: Make, tmp_path: Path) -> None:
    labels = (TOPIC, MOOD)
    straight = make_classifier(tmp_path / "straight", labels, steps=3)
    task = make(labels, teacher=str(straight))
    prepared = Prepared(task.inputs["prepare"].path)
    table = teacher.soft_targets(str(straight), prepared, task)
    assert len(table.files) == 3
    engine = load_torch_engine(straight, precision="fp32")
    texts = prepared.read_split("train", ["text"])["text"].to_pylist()
    wanted = engine.logits(engine.encode(texts))
    np.testing.assert_allclose(table.read(0, 6), wanted, atol=1e-5)
    other = replace(task, out=UPath(tmp_path / "other"))
    turned = teacher.soft_targets(str(reordered(straight, tmp_path / "turned")), prepared, other)
    np.testing.assert_allclose(turned.read(0, 6), wanted, atol=1e-5)


def test_a_lane_reads_the_teachers_logits_of_its_rows_whoever_owns_it(make: Make) -> None:
    task = make()
    prepared = Prepared(task.inputs["prepare"].path)
    table = teacher.soft_targets(task.settings.teacher, prepared, task)
    split = prepared.index.splits["train"]
    said = dict(zip(prepared.read_split("train", ["row"])["row"].to_pylist(), table.read(0, split.chunks), strict=True))
    feed = feed_over(split, 4, 4, 0)
    assert feed.chunk_rows > split.chunk_rows
    seen = 0
    for workers in (1, 2, 3):
        for rank in range(workers):
            lanes = range(rank, 4, workers)
            batch = text_batches(prepared, feed, lanes, 0, table)
            for epoch, step, lane in ((e, s, lane) for e in range(2) for s in range(feed.steps) for lane in lanes):
                if found := batch(epoch, step, lane):
                    seen += len(found.rows)
                    np.testing.assert_array_equal(found.labels[TEACHER], [said[row] for row in found.rows])
    assert seen == 3 * 2 * split.rows


@given(data=st.data(), rows=st.integers(1, 200), chunk_rows=st.integers(1, 40), file_chunks=st.integers(1, 5))
@hypothesis.settings(max_examples=40)
def test_any_chunks_are_read_as_they_were_written(
    data: st.DataObject, rows: int, chunk_rows: int, file_chunks: int
) -> None:
    logits = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    chunks = -(-rows // chunk_rows)
    first = data.draw(st.integers(0, chunks - 1))
    count = data.draw(st.integers(1, chunks + 1))
    with tempfile.TemporaryDirectory() as folder:
        table = SoftTargets(UPath(folder) / "table", 3, rows, chunk_rows, file_chunks)
        for file in table.files:
            own = table.chunks(file)
            table.write(file, logits[own.start * chunk_rows : own.stop * chunk_rows])
        found = table.read(first, count)
    assert np.array_equal(found, logits[first * chunk_rows : (first + count) * chunk_rows])


@pytest.mark.slow
def test_two_workers_end_in_the_same_bits(make: Make, tmp_path: Path) -> None:
    task = make(data={"missing": 0.5}, epochs=2)
    lesson = finetune.lesson_of(task, task.settings)
    feed = feed_over(Prepared(lesson.prepared).index.splits["train"], 4, 4, 0)
    jobs = []
    for workers in (1, 2):
        out = UPath(tmp_path / f"on {workers}")
        out.mkdir()
        jobs.append(WorkerJob(lesson, out, out / "work", feed, 2 * feed.steps, feed.steps, None, "toy", "none"))
        train_on(workers, jobs[-1])
    RunOnWorkers(jobs[1]).assert_same(RunOnWorkers(jobs[0]))


def test_a_teacher_that_cannot_teach_this_is_told_before_it_is_asked(make: Make, folders: Path, tmp_path: Path) -> None:
    task = make((TOPIC, MOOD))
    with pytest.raises(InputError, match=r"^finetune\.teacher: .*teacher cannot teach this: it predicts 'topic', not"):
        finetune.run(task)
    other = shutil.copytree(folders / "teacher", tmp_path / "pairs")
    _, _, spec = load(other)
    (other / SPEC).write_text(spec.model_copy(update={"pair": True}).model_dump_json())
    with pytest.raises(InputError, match=r"^finetune\.teacher: .* takes pairs of texts, which the data does not have"):
        finetune.run(make(teacher=str(other)))


def test_numbers_that_are_not_finite_are_told(make: Make, folders: Path, tmp_path: Path) -> None:
    model, tokenizer, spec = load(folders / "teacher")
    with torch.no_grad():
        model.classifier.bias[0] = torch.inf
    (tmp_path / "broken").mkdir()
    save(model, tokenizer, spec, tmp_path / "broken")
    with pytest.raises(InputError, match=r"^finetune\.teacher: .*broken gives numbers that are not finite"):
        finetune.run(make(teacher=str(tmp_path / "broken")))


def test_what_is_no_classifier_is_told(folders: Path) -> None:
    encoder = str(folders / "encoder")
    with pytest.raises(
        InputError, match=r"^finetune\.teacher: .* is no classifier: there is no classifier\.json in it"
    ):
        finetune.externals(FinetuneSettings(encoder=encoder, teacher=encoder))
    with pytest.raises(InputError, match=r"^finetune\.teacher: .*nowhere/model does not exist"):
        finetune.externals(FinetuneSettings(encoder=encoder, teacher="nowhere/model"))


def test_the_teacher_counts_by_what_it_is_not_by_its_name(folders: Path, tmp_path: Path) -> None:
    encoder, first = str(folders / "encoder"), folders / "teacher"
    copied = shutil.copytree(first, tmp_path / "copied")
    plain, one, other = (
        FinetuneSettings(encoder=encoder, teacher=each and str(each)) for each in (None, first, copied)
    )
    assert plain.identity() == one.identity() == other.identity()
    assert "teacher" not in finetune.externals(plain)
    assert finetune.externals(one) == finetune.externals(other)
    (copied / "classifier.json").write_text((copied / "classifier.json").read_text() + "\n")
    assert finetune.externals(one) != finetune.externals(other)
    softer = FinetuneSettings(encoder=encoder, teacher=str(first), teacher_temperature=4)
    assert softer.identity() != one.identity()
    store = Store.open(str(tmp_path / "store"))
    made = put_artifacts(store)["finetune"]
    inside = FinetuneSettings(encoder=encoder, teacher=str(made.path / "model"))
    assert finetune.externals(inside)["teacher"] == PRINTS["finetune"]
    found = store.find_input("teacher", PRINTS["finetune"])
    assert found is not None
    assert found.path == made.path, "lineage leads on from it"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"teacher_weight": 0.5}, "teacher_weight: there is no teacher; name one with finetune.teacher"),
        ({"teacher_temperature": 1}, "teacher_temperature: there is no teacher"),
        ({"keep_layers": 0}, "keep_layers: must keep at least one layer, not 0"),
        ({"keep_layers": [2, 0]}, "keep_layers: must name layers from 0 on, each once, in their order"),
        ({"keep_layers": []}, "keep_layers: must name layers"),
        ({"keep_layers": 1, "encoder": {"size": "tiny"}}, "keep_layers: an encoder from scratch has as many as"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_told(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as error:
        FinetuneSettings(**({"encoder": "somewhere"} | settings))
    assert told in str(error.value)
