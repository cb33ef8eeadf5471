"""sweep: rungs that compare like with like, trials that lose nothing, and a result that fine-tuning takes over."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from pydantic import ValidationError
from torch import nn
from upath import UPath

from cluster.claim import claimed
from models.optimizer import build_optimizer, build_schedule, wsd_rate
from models.settings import InputError
from pipelines import finetune, sweep
from pipelines.finetune import FinetuneSettings
from pipelines.progress import Progress
from pipelines.stage import Task
from pipelines.sweep import SweepSettings, SweepStageSettings, space_problem
from pipelines.sweeping import trial as trial_module
from pipelines.sweeping.ladder import Rung, ladder
from pipelines.sweeping.report import worth
from pipelines.sweeping.resuming import begin
from pipelines.sweeping.space import Distribution, with_values
from pipelines.sweeping.trial import Trial, TrialJob
from tests.pipelines.tiny import artifact, make_encoder, make_prepared

ROWS = {"train": 192, "validation": 64, "test": 8}
SPACE = {"finetune.learning_rate": {"log_uniform": [1e-4, 1e-2]}, "finetune.warmup": {"uniform": [0.0, 0.3]}}


def cost(rungs: list[Rung], reached: int) -> int:
    """Steps that a trial has taken when it was scored at rung `reached`, from 0: its trunk and all of its branches."""
    return rungs[reached].fork + sum(rung.end - rung.fork for rung in rungs[: reached + 1])


@given(st.integers(1, 400), st.floats(0, 0.9), st.floats(0.05, 1), st.integers(1, 5), st.floats(1.5, 5))
def test_rungs_rise_to_the_full_run(steps: int, warmup: float, decay: float, rungs: int, reduction: float) -> None:
    found = ladder(steps, warmup, decay, rungs, reduction)
    assert 1 <= len(found) <= rungs
    assert found[-1].end == steps
    ends = [rung.end for rung in found]
    assert ends == sorted(set(ends))
    assert all(0 <= rung.fork < rung.end for rung in found)
    assert [rung.fork for rung in found] == sorted(rung.fork for rung in found), "a trunk only goes on"
    assert cost(found, len(found) - 1) >= steps


def test_a_trunk_is_the_same_wherever_a_trial_is_stopped() -> None:
    rungs = ladder(900, 0.1, 0.2, 3, 3.0)
    assert [(rung.fork, rung.end) for rung in rungs] == [(130, 140), (282, 330), (738, 900)]
    assert [rung.number for rung in rungs] == [1, 2, 3]
    assert [rung.number for rung in ladder(4, 0.5, 0.2, 3, 3.0)] == [2, 3], "the full run has the highest one"
    ways = [[wsd_rate(step, 90, rung.fork, rung.end) for step in range(rung.end)] for rung in rungs]
    for rung, way in zip(rungs, ways, strict=True):
        assert way[: rung.fork] == ways[-1][: rung.fork]
        assert way[-1] == pytest.approx(1 / (rung.end - rung.fork + 1)), "nearly nothing at its end"
    assert cost(rungs, 1) == 282 + 10 + 48


def test_a_warm_up_counts_by_its_rates() -> None:
    ends = [ladder(900, warmup, 0.2, 3, 3.0)[0].end for warmup in (0.0, 0.1, 0.2)]
    assert ends == [100, 45 + 95, 180 + 40], "a long one leaves half of the steps after it at the least"


def test_the_last_rung_is_the_schedule_of_the_fine_tuning() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), 0.1, 0.0)
    schedule = build_schedule(optimizer, "wsd", 50, 0.1, 0.2)
    (last,) = ladder(50, 0.1, 0.2, 1, 3.0)
    rates = []
    for _ in range(50):
        rates.append(schedule.get_last_lr()[0] / 0.1)
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([wsd_rate(step, 5, last.fork, last.end) for step in range(50)])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_prepared(folder / "prepared", rows=ROWS, noise=0.2, chunk_rows=16)
    make_encoder(folder / "encoder")
    return folder


def settings(data: Path, epochs: int = 2, **own: Any) -> SweepStageSettings:
    tuned = {"encoder": str(data / "encoder"), "epochs": epochs, "microbatch": 4, "trackers": ()}
    return SweepStageSettings(
        sweep=SweepSettings(**({"space": SPACE, "trials": 6} | own)), finetune=FinetuneSettings(**tuned)
    )


def task(chosen: SweepStageSettings, data: Path, out: Path) -> Task:
    out.mkdir(parents=True, exist_ok=True)
    return Task(chosen, {"prepare": artifact(data / "prepared", "prepare")}, UPath(out), Progress(), "toy")


def trials_of(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "trials.json").read_text())
    return found


def job_of(data: Path, work: Path) -> TrialJob:
    chosen = settings(data)
    lesson = finetune.lesson_of(task(chosen, data, work), chosen.finetune.model_copy(update={"schedule": "wsd"}))
    return TrialJob(lesson, UPath(work), 3, 3.0)


def climb(job: TrialJob, values: dict[str, Any], rungs: int = 3) -> list[dict[str, Any]]:
    """What a trial is found to be worth at its first rungs, all in one process."""
    torch.set_num_threads(1)
    trial = object.__new__(Trial)
    found = []
    for place in range(rungs):
        trial.setup({"values": values, "place": place}, None if place else job)
        told = trial.step()
        assert told["done"]
        found.append(json.loads(told["rungs"])[-1])
    return found


def test_a_trial_begun_again_tells_what_it_told_and_ends_in_the_same_scores(data: Path, tmp_path: Path) -> None:
    values = {"finetune.learning_rate": 3e-3, "finetune.warmup": 0.1}
    calm = climb(job_of(data, tmp_path / "calm"), values)
    assert [rung["rung"] for rung in calm] == [1, 2, 3]
    assert [rung["whole"] for rung in calm] == [False, False, True]
    assert calm[-1]["texts"] > 2 * ROWS["train"], "the branches count as work done"
    job = job_of(data, tmp_path / "disturbed")
    again = [climb(job, values, rungs)[-1] for rungs in (1, 2, 3)]  # Each time by a process that knows nothing.
    clocks = {"overhead_seconds", "began_at", "ended_at"}
    plain, repeated = (
        [{name: value for name, value in rung.items() if name not in clocks} for rung in rungs]
        for rungs in (calm, again)
    )
    assert repeated == plain
    assert not any(math.isclose(rung["metrics"]["log_loss"], calm[0]["metrics"]["log_loss"]) for rung in calm[1:])


def test_values_that_cannot_be_trained_end_their_trial_alone(data: Path, tmp_path: Path) -> None:
    (found,) = climb(job_of(data, tmp_path), {"finetune.learning_rate": 1e30, "finetune.warmup": 0.0}, 1)
    assert found["score"] == 0.0
    assert "lower finetune.learning_rate" in found["failed"]


def test_full_memory_is_no_property_of_the_values(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"finetune.learning_rate": 3e-3, "finetune.warmup": 0.1}
    job = job_of(data, tmp_path)
    with monkeypatch.context() as full:

        def build(*_: Any, **__: Any) -> None:
            raise MemoryError("no room")

        full.setattr(trial_module, "trainer_of", build)
        with pytest.raises(InputError, match="memory does not suffice"):
            climb(job, values, 1)
    assert climb(job, values, 1)[0]["rung"] == 1, "nothing of it is kept"


@pytest.mark.usefixtures("ray_session")
def test_the_best_settings_are_found_and_taken_over(data: Path, tmp_path: Path) -> None:
    start = [{"finetune.learning_rate": 3e-3, "finetune.warmup": 0.1}]
    space = SPACE | {"finetune.learning_rate": {"log_uniform": [1e-8, 1e-2]}}  # Most of it learns nothing.
    chosen = settings(data, epochs=8, rungs=2, start=start, space=space)
    metrics = sweep.run(task(chosen, data, tmp_path / "sweep"))
    trials = trials_of(tmp_path / "sweep")
    assert len(trials) == metrics["trials"] == 6
    assert start[0] in [each["values"] for each in trials]
    whole = [each for each in trials if each["rungs"][-1]["whole"]]
    stopped = [each for each in trials if each["ended"].startswith("stopped at rung")]
    assert len(whole) + len(stopped) == 6
    assert stopped, "what falls behind is not trained to the end"
    best = max(whole, key=lambda each: float(each["rungs"][-1]["score"]))
    values = yaml.safe_load((tmp_path / "sweep" / "best.yaml").read_text())
    fixed = {"finetune.schedule": "wsd", "finetune.decay": 0.2, "finetune.patience": None}
    assert values == best["values"] | fixed
    report = (tmp_path / "sweep" / "report.html").read_text()
    assert "finetune.learning_rate" in report
    assert list((tmp_path / "sweep" / "tensorboard").glob("trial-*/events*"))
    inputs = {
        "prepare": artifact(data / "prepared", "prepare"),
        "sweep": artifact(tmp_path / "sweep", "sweep"),
    }
    out = tmp_path / "out"
    out.mkdir()
    tuned = finetune.run(Task(chosen.finetune, inputs, UPath(out), Progress(), "toy"))
    assert tuned["swept.finetune.learning_rate"] == values["finetune.learning_rate"]
    history = json.loads((out / "history.json").read_text())
    # The last rung of a trial is that very run.
    assert history["validations"][-1] == best["rungs"][-1]["metrics"]
    assert best["rungs"][-1]["score"] > 0.5


@pytest.mark.usefixtures("ray_session")
@pytest.mark.slow
@pytest.mark.parametrize("stop", ["median", "none"])
def test_other_ways_to_search_and_to_stop(stop: str, data: Path, tmp_path: Path) -> None:
    # Most of it learns nothing.
    space = SPACE | {"finetune.learning_rate": {"log_uniform": [1e-8, 1e-2]}}
    chosen = settings(data, search="random", stop=stop, trials=8, rungs=2, epochs=6, space=space)
    metrics = sweep.run(task(chosen, data, tmp_path / "sweep"))
    assert metrics["finished"] == 8 if stop == "none" else 1 <= metrics["finished"] < 8
    scored = [each["rungs"][0]["ended_at"] for each in trials_of(tmp_path / "sweep")]
    assert scored.index(max(scored)) >= 4, "those that are begun first do not wait for all others"


@pytest.mark.usefixtures("ray_session")
def test_a_small_space_is_tried_once_and_what_cannot_be_built_is_left_out(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {"finetune.encoder.config.num_attention_heads": {"choice": [1, 2, 3]}}
    chosen = settings(data, space=space, trials=9, rungs=1, search="random")
    encoder = {"hidden_size": 32, "layers": 1, "heads": 2, "config": {"num_attention_heads": 2}}
    tuned = FinetuneSettings(**chosen.finetune.model_dump() | {"encoder": encoder})
    metrics = sweep.run(task(chosen.model_copy(update={"finetune": tuned}), data, tmp_path / "sweep"))
    assert (metrics["trials"], metrics["finished"]) == (3, 2)
    ends = {
        each["values"]["finetune.encoder.config.num_attention_heads"]: each["ended"]
        for each in trials_of(tmp_path / "sweep")
    }
    assert (ends[1], ends[2]) == ("finished", "finished")
    assert ends[3].startswith("cannot be trained: finetune.encoder: bert cannot be made so")
    assert "all of sweep.space has been tried: 3 sets of values" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_trial_whose_process_is_killed_goes_on(data: Path, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill_one() -> None:
        records = tmp_path / "sweep" / "work" / "trials"
        while not list(records.glob("*/trial.json")):
            time.sleep(0.02)
        while not killed:
            kill_what_trains()

    def kill_what_trains() -> None:
        for process in psutil.Process().children(recursive=True):  # Of this session's cluster alone.
            with contextlib.suppress(psutil.Error):  # Others come and go meanwhile.
                if " ".join(process.cmdline()).startswith("ray::ResourceTrainable.train"):
                    process.kill()
                    killed.append(process.pid)
                    return

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    metrics = sweep.run(task(settings(data, epochs=8, stop="none", trials=4), data, tmp_path / "sweep"))
    thread.join(5)
    assert killed
    assert metrics["finished"] == 4


@pytest.mark.slow
def test_a_sweep_grows_with_its_cluster_and_survives_a_lost_node(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.pipelines.sweep_run", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            out, _ = process.communicate(timeout=600)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    found = json.loads(out.splitlines()[-1])
    assert found["finished"] == 6
    assert "was lost and goes on from its last rung" in found["told"]


SCRIPT = """
import sys
from pathlib import Path
from cluster.connect import connected
from pipelines import sweep
from tests.pipelines.test_sweep import settings, task
with connected("local", cpus=2):
    sweep.run(task(settings(Path(sys.argv[1]), trials=int(sys.argv[3])), Path(sys.argv[1]), Path(sys.argv[2])))
"""


@pytest.mark.slow
def test_a_killed_sweep_goes_on_with_its_finished_trials(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(data), str(tmp_path / "sweep"), "5"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    first = subprocess.Popen(command, env=environment, start_new_session=True)
    trials = tmp_path / "sweep" / "work" / "trials"
    deadline = time.monotonic() + 120
    while sum(bool(json.loads(path.read_text())["rungs"]) for path in trials.glob("*/trial.json")) < 3:
        assert first.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    kept = {path.parent.name: json.loads(path.read_text()) for path in trials.glob("*/trial.json")}
    subprocess.run(command, env=environment, check=True, timeout=300)
    for name, record in kept.items():
        now = json.loads((trials / name / "trial.json").read_text())
        assert now["rungs"][: len(record["rungs"])] == record["rungs"]
    found = trials_of(tmp_path / "sweep")
    assert len(found) == 5
    assert any(each["ended"] == "finished" for each in found)


def test_a_recipe_that_changed_since_is_told(data: Path, tmp_path: Path) -> None:
    before = task(settings(data), data, tmp_path / "sweep" / "one")
    begin(before, anew=False)
    begin(before, anew=False)
    after = task(settings(data, trials=9), data, tmp_path / "sweep" / "two")
    with pytest.raises(
        InputError, match=r"broken off after 0 trials, .*: sweep\.trials was 6 and is 9\. Undo that .* sweep\.anew=true"
    ):
        begin(after, anew=False)
    with claimed(before.out, print):
        begin(task(settings(data, trials=8), data, tmp_path / "sweep" / "beside"), anew=False)
    (tmp_path / "sweep" / "beside" / "artifact.json").write_text("{}")
    begin(after, anew=True)
    begin(after, anew=False)
    (tmp_path / "sweep" / "two" / "artifact.json").write_text("{}")
    begin(task(settings(data, trials=3), data, tmp_path / "sweep" / "three"), anew=False)


def test_what_the_sweep_replaces_makes_no_other_sweep(data: Path) -> None:
    first = settings(data)
    tuned = first.finetune.model_copy(update={"learning_rate": 0.5, "patience": 3, "schedule": "cosine"})
    assert first.model_copy(update={"finetune": tuned}).identity() == first.identity()
    tuned = first.finetune.model_copy(update={"weight_decay": 0.5})
    assert first.model_copy(update={"finetune": tuned}).identity() != first.identity()


def test_class_weights_and_decay_are_those_of_the_trial(data: Path, tmp_path: Path) -> None:
    base = {"finetune.learning_rate": 3e-3, "finetune.warmup": 0.1}
    scores = [
        climb(job_of(data, tmp_path / name), base | more, 1)[0]["metrics"]["log_loss"]
        for name, more in (
            ("plain", {}),
            ("weights", {"finetune.class_weights": {"animal": 9.0}}),
            ("decay", {"finetune.decay": 0.9}),
        )
    ]
    assert len(set(scores)) == 3


def test_the_best_trial_is_one_that_could_be_trained() -> None:
    failed = {"rungs": [{"rung": 2, "score": 0.0, "loss": 0.0, "whole": False, "failed": "the loss is not finite"}]}
    stopped = {"rungs": [{"rung": 1, "score": 0.9, "loss": 0.5, "whole": False}]}
    whole, surer = ({"rungs": [{"rung": 3, "score": 0.8, "loss": loss, "whole": True}]} for loss in (0.5, 0.4))
    assert sorted([whole, failed, stopped, surer], key=worth, reverse=True) == [surer, whole, stopped, failed]


def test_values_of_all_kinds_are_drawn() -> None:
    from pipelines.figures import parallel_coordinates, scores

    assert "<svg" in scores({"rung 1": [(None, 0.5), (0.1, 0.6), ("a", 0.7)]}, "dropout", "macro_f1")
    assert "<svg" in scores({"rung 1": [(1e-4, 0.5)]}, "rate", "macro_f1", log=True)
    lines = [([1e-4, None], 0.5), ([1e-3, "none"], 0.7)]
    assert "<svg" in parallel_coordinates(["rate", "weights"], [True, False], lines, "macro_f1")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"uniform": [0.3, 0.1]}, "uniform: the first bound, 0.3, must be below the second, 0.1"),
        ({"log_uniform": [0, 0.1]}, "log_uniform: the bounds must be above 0, and 0 is not"),
        ({"int": [3, 3]}, "int: the first bound, 3, must be below the second, 3"),
        ({"choice": [1]}, "choice must have at least two values, none twice"),
        ({"choice": [1, 1]}, "choice must have at least two values, none twice"),
        ({"choice": [True, 1]}, "choice must have at least two values, none twice"),
        ({}, "must be one of log_uniform, uniform, int, choice"),
        ({"uniform": [0, 1], "int": [0, 1]}, "must be one of log_uniform, uniform, int, choice"),
        ({"normal": [0, 1]}, "Extra inputs"),
    ],
)
def test_distributions_that_are_none_are_told(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        Distribution.model_validate(given)


def test_a_distribution_is_optunas() -> None:
    rate = Distribution(log_uniform=(1e-5, 1e-3))
    assert rate.optuna == FloatDistribution(1e-5, 1e-3, log=True)
    assert rate.holds(1e-4)
    assert not rate.holds(1e-2)
    assert not rate.holds(True)
    assert Distribution(choice=("a", None)).holds(None)
    assert not Distribution(int=(1, 3)).holds(2.5)


@pytest.mark.parametrize(
    ("path", "distribution", "told"),
    [
        ("finetune.learning_rte", {"uniform": [0.1, 0.2]}, "finetune.learning_rte is no setting"),
        ("finetune.encoder.layers", {"int": [1, 2]}, "finetune.encoder.layers is no setting"),
        ("prepare.max_length", {"int": [8, 64]}, "'prepare.max_length' is no setting of finetune; all trials share"),
        ("learning_rate", {"uniform": [0.1, 0.2]}, "'learning_rate' is no setting of finetune"),
        ("finetune.microbatch", {"log_uniform": [8, 32]}, "finetune.microbatch cannot be 16.88"),
        ("finetune.epochs", {"int": [1, 3]}, "finetune.epochs decides how long a trial is"),
        ("finetune.workers", {"int": [1, 3]}, "finetune.workers says how a run is carried out"),
        ("finetune.warmup", {"uniform": [0.0, 1.5]}, "finetune.warmup cannot be 1.5: Input should be less than 1"),
        ("finetune.threads", {"int": [1, 2]}, "finetune.threads decides how much room a trial takes"),
        ("finetune.lanes", {"int": [1, 4]}, "finetune.lanes cannot be 1: finetune.workers may be 2"),
        ("finetune.class_weights", {"choice": ["none", "odd"]}, "finetune.class_weights cannot be odd"),
    ],
)
def test_a_space_that_does_not_fit_is_told(path: str, distribution: dict[str, Any], told: str) -> None:
    tuned = FinetuneSettings(encoder="some/encoder", workers=2)
    problem = space_problem(SweepSettings(space={path: distribution}), tuned)
    assert problem is not None
    assert told in problem


def test_a_model_that_must_be_sharded_is_not_swept() -> None:
    tuned = FinetuneSettings(encoder="some/encoder", fsdp=True, exact=False)
    assert (space_problem(SweepSettings(), tuned) or "").startswith("finetune.fsdp: a sweep trains each trial on one")


def test_a_space_reaches_into_parts() -> None:
    tuned = FinetuneSettings(encoder={"layers": 2})
    odd = space_problem(SweepSettings(space={"finetune.encoder.heads": {"int": [1, 8]}}), tuned)
    assert (
        odd == "sweep.space: finetune.encoder.heads cannot be 3: must divide hidden_size, which is 256, and 3 does not"
    )
    assert space_problem(SweepSettings(space={"finetune.encoder.width": {"int": [1, 8]}}), tuned) == (
        "sweep.space: finetune.encoder.width is no setting"
    )
    assert space_problem(SweepSettings(space={"finetune.encoder.layers": {"int": [1, 4]}}), tuned) is None
    assert with_values(tuned, {"finetune.encoder.layers": 3}, "finetune").encoder.layers == 3


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"space": {}}, "is empty: name at least one setting"),
        ({"trials": 1, "start": [{}, {}]}, "start: has 2 points, and there are only 1 trials"),
        ({"start": [{"finetune.warmup": 0.1}]}, r"start\.0: must have a value for each of finetune\.learning_rate"),
        (
            {"start": [{"finetune.learning_rate": 1.0, "finetune.warmup": 0.1}]},
            r"start\.0: 1\.0 is not in sweep\.space for finetune\.learning_rate",
        ),
    ],
)
def test_a_sweep_that_cannot_begin_is_told(own: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        SweepSettings(**own)
