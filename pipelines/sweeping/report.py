"""The report of a sweep: what each trial came to, and what of its settings mattered."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from upath import UPath

from cluster.store import is_local
from pipelines import figures
from pipelines.report import Cell, Figure, Section, Table, Text, render
from pipelines.sweeping.board import BUDGET, FAILED, LOSS, RUNG, SCORE, TEXTS, WHOLE
from pipelines.sweeping.space import Distribution

_LEAST = 4


def importances(space: Mapping[str, Distribution], trials: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of the scores' variance that each setting explains (fANOVA, Hutter et al. 2014), at the last rung that at
    least half of the trials were scored at; empty where those are too few.
    """
    for rung in reversed(range(1, max(each["rungs"][-1][RUNG] for each in trials) + 1)):
        scored = [
            (each["values"], at[SCORE])
            for each in trials
            for at in each["rungs"]
            if at[RUNG] == rung and FAILED not in at
        ]
        if len(scored) >= max(_LEAST, len(trials) // 2):
            break
    else:
        return {}
    if len({score for _, score in scored}) < 2:
        return {}
    study = optuna.create_study(direction="maximize")
    for values, score in scored:
        study.add_trial(
            optuna.trial.create_trial(
                params=dict(values),
                distributions={path: distribution.optuna for path, distribution in space.items()},
                value=score,
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {path: float(value) for path, value in found.items()}


def write_report(
    out: UPath,
    recipe: str,
    metric: str,
    space: Mapping[str, Distribution],
    trials: Sequence[Mapping[str, Any]],
    weights: Mapping[str, float],
    metrics: Mapping[str, Any],
) -> None:
    """Writes `report.html`. `trials` have `values`, `rungs` and why they `ended`, in the order they were begun;
    `weights` are the settings' `importances`.
    """
    order = sorted(trials, key=worth, reverse=True)
    rows: list[list[Cell]] = [
        [
            place + 1,
            *(_cell(each["values"][path]) for path in space),
            each["rungs"][-1][RUNG],
            each["rungs"][-1][SCORE],
            each["rungs"][-1][TEXTS],
            each["ended"],
        ]
        for place, each in enumerate(order)
    ]
    names = [path.removeprefix("finetune.") for path in space]
    table = Table(["", *names, "rung", metric, "texts trained on", "how it ended"], rows, digits=6)
    blocks = [
        Figure(
            figures.scores(
                {
                    f"rung {rung}": [
                        (each["values"][path], at[SCORE]) for each in trials for at in each["rungs"] if at[RUNG] == rung
                    ]
                    for rung in range(1, max(each["rungs"][-1][RUNG] for each in trials) + 1)
                },
                path,
                metric,
                log=distribution.log_uniform is not None,
            ),
            f"{metric} against {path}; at a rung, all trials had been trained on an equal share of the tokens "
            "that come after their warm-up.",
        )
        for path, distribution in space.items()
    ]
    lines = [([each["values"][path] for path in space], each["rungs"][-1][SCORE]) for each in trials]
    logs = [distribution.log_uniform is not None for distribution in space.values()]
    together = Figure(
        figures.parallel_coordinates(names, logs, lines, metric),
        "Each line is a trial, darker where its score is high.",
    )
    progress = {
        f"trial {place + 1}": [(float(at[BUDGET]), at[SCORE]) for at in each["rungs"]]
        for place, each in enumerate(order[:12])
        if each["rungs"][0][TEXTS]
    }
    sections = [
        Section("Trials", [table]),
        Section("Scores", blocks),
        Section("All settings together", [together]),
        Section(
            "Progress",
            [Figure(figures.curves(progress, "tokens of a run that ends there", metric), "The twelve best trials.")],
        ),
    ]
    if weights:
        told = (
            "How much of the differences between scores at one rung each setting explains (fANOVA). Of few trials this "
            "is a hint, no more."
        )
        sections.append(
            Section("What mattered", [Figure(figures.bars(weights, "share of the variance"), ""), Text(told)])
        )
    facts = [
        (f"best {metric}", f"{metrics['best_score']:.4f}"),
        ("trials", f"{metrics['trials']}"),
        ("to the end", f"{metrics['finished']}"),
        ("texts trained on", f"{metrics['texts_trained']:,}"),
    ]
    render(out / "report.html", f"{recipe}: the sweep".removeprefix(": "), sections, facts=facts)


def write_hparams(out: UPath, metric: str, trials: Sequence[Mapping[str, Any]]) -> None:
    """Writes the trials for TensorBoard's HParams page, each with its scores over the tokens."""
    from torch.utils.tensorboard import SummaryWriter

    for number, each in enumerate(trials):
        folder = out / "tensorboard" / f"trial-{number:03d}"
        with SummaryWriter(folder.path if is_local(folder) else str(folder)) as writer:
            last = each["rungs"][-1]
            writer.add_hparams(
                {path: value if value is not None else "none" for path, value in each["values"].items()},
                {f"hparam/{metric}": last[SCORE], "hparam/rung": last[RUNG]},
                run_name=".",
            )
            for at in each["rungs"]:
                writer.add_scalar(f"rungs/{metric}", at[SCORE], at[BUDGET])


def worth(trial: Mapping[str, Any]) -> tuple[bool, bool, int, float, float]:
    """What trials are ordered by: those that could be trained, to the end, then by rung, then by score and loss."""
    last = trial["rungs"][-1]
    return FAILED not in last, last[WHOLE], last[RUNG], last[SCORE], -last[LOSS]


def _cell(value: Any) -> Cell:
    return value if isinstance(value, int | float | str) or value is None else str(value)
