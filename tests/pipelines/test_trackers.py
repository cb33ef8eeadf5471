"""Training curves reach TensorBoard, MLflow and Weights & Biases, and go on in the same place after a restart."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from upath import UPath

from pipelines.training.trackers import tracking

SETTINGS = {"learning_rate": 1e-4}


def test_tensorboard_hides_what_a_killed_worker_wrote_too_far(tmp_path: Path) -> None:
    # Begun, begun anew before any checkpoint, and gone on from the checkpoint after step 3.
    for done, value in ((0, 0.5), (0, 1.0), (3, 2.0)):
        with tracking(["tensorboard"], UPath(tmp_path), done, "recipe", "abc", SETTINGS) as trackers:
            for step in range(done + 1, 7):
                trackers[0].log(step, {"train/loss": value})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 2.0),
        (5, 2.0),
        (6, 2.0),
    ]


def test_mlflow_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    for first in (0, 3):
        with tracking(["mlflow"], UPath(tmp_path), first, "recipe", "abc", SETTINGS) as trackers:
            for step in range(first, first + 3):
                trackers[0].log(step, {"train/loss": 1.0 / (step + 1)})
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.data.params == {"learning_rate": "0.0001"}
    assert run.data.tags["fingerprint"] == "abc"
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train.loss")
    assert [metric.step for metric in history] == list(range(6))


def test_wandb_offline_needs_no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with tracking(["wandb"], UPath(tmp_path), 0, "recipe", "abc", SETTINGS) as trackers:
        trackers[0].log(1, {"train/loss": 0.5})
    assert list(tmp_path.glob("wandb/offline-run-*-abc/*.wandb"))
