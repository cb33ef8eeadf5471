"""Where training curves go: TensorBoard event files, MLflow, Weights & Biases."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from upath import UPath

from cluster.store import is_local
from models.settings import InputError

TrackerName = Literal["tensorboard", "mlflow", "wandb"]


class Tracker(Protocol):
    """Takes numbers as training goes on."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def flush(self) -> None:
        """Writes all of it: a run that is killed goes on from here, and will not tell it again."""
        ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files below `<artifact>/tensorboard`; after a restart from `step`, what came later is hidden.

    Steps count from 1, so that a run which starts anew, before its first checkpoint, hides all of the last try.
    """

    def __init__(self, folder: UPath, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        target = folder / "tensorboard"
        where = target.path if is_local(target) else str(target)
        self._writer = SummaryWriter(where, purge_step=step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class MLflow:
    """A run of the MLflow server (or folder) that MLFLOW_TRACKING_URI names; one run for one artifact."""

    def __init__(self, recipe: str, fingerprint: str, settings: Mapping[str, Any], section: str) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise InputError(f"{section}.trackers: mlflow is not installed; run pip install mlflow-skinny.") from error
        self._mlflow = mlflow
        experiment = mlflow.set_experiment(recipe)
        found = mlflow.search_runs(
            [experiment.experiment_id], f"tags.fingerprint = '{fingerprint}'", output_format="list", max_results=1
        )
        mlflow.start_run(run_id=found[0].info.run_id if found else None, tags={"fingerprint": fingerprint})
        if not found:
            mlflow.log_params({name: str(value) for name, value in settings.items()})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics({name.replace("/", "."): value for name, value in values.items()}, step=step)

    def flush(self) -> None:
        """Nothing is kept back."""

    def close(self) -> None:
        self._mlflow.end_run()


class WandB:
    """A Weights & Biases run, going on under the artifact's fingerprint; WANDB_MODE=offline needs no account."""

    def __init__(self, recipe: str, fingerprint: str, settings: Mapping[str, Any], section: str, folder: UPath) -> None:
        try:
            import wandb
        except ImportError as error:
            raise InputError(f"{section}.trackers: wandb is not installed; run pip install wandb.") from error
        local = Path(folder.path) if is_local(folder) else Path(os.environ.get("WANDB_DIR", "."))
        local.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=recipe, id=fingerprint, resume="allow", config=dict(settings), dir=local, settings={"silent": True}
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """It writes what it has by itself, at once."""

    def close(self) -> None:
        self._run.finish()


@contextlib.contextmanager
def tracking(
    names: Sequence[TrackerName],
    folder: UPath,
    step: int,
    recipe: str,
    fingerprint: str,
    settings: Mapping[str, Any],
    section: str = "finetune",
) -> Iterator[list[Tracker]]:
    """The named trackers, open while the block runs. `step` is where the run goes on; `section` is the recipe's."""
    trackers: list[Tracker] = []
    try:
        for name in names:
            match name:
                case "tensorboard":
                    trackers.append(TensorBoard(folder, step))
                case "mlflow":
                    trackers.append(MLflow(recipe, fingerprint, settings, section))
                case "wandb":
                    trackers.append(WandB(recipe, fingerprint, settings, section, folder))
        yield trackers
    finally:
        for tracker in trackers:
            tracker.close()
