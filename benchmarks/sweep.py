"""The sweep: the score reached against the compute spent, in texts trained on, beside searches without early stopping.

MiniLM on the tweets to one airline, one epoch, learning rate and warm-up; each search tries 16 sets of values, with
three seeds. All use Shoal's trials, so that a text costs the same; what differs is what is proposed and what stopped:

(a) random search, every trial trained to the end: what a plain Ray Tune script does;
(b) Optuna's TPE, every trial trained to the end;
(c) Shoal: TPE, rungs and ASHA.

Scores are macro-F1 on the validation split, of trials that were trained to the end. Told is how much of (a)'s compute
(b) and (c) had spent when they first had a trial as good as the best of (a), and the best they had at a third of it.

The best score of many noisy ones is partly luck, the more so the more there are. So in the end the best values of each
search are trained again with other seeds, three times (`--again`), and the means are told too.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from machine import describe_machine
from rich.console import Console
from rich.table import Table

from cluster.connect import connected
from cluster.store import Store
from pipelines.progress import Progress
from pipelines.stage import complete
from recipes.loading import load_recipe
from recipes.planning import plan

RECIPE = Path(__file__).parent.parent / "recipes" / "airline.yaml"
GIVEN = [
    "finetune.epochs=1",
    "finetune.lanes=1",
    "finetune.microbatch=16",
    "finetune.workers=1",
    "prepare.validation_share=0.25",
    "prepare.max_length=48",
]
SEARCHES = {
    "(a) random, all to the end": "{{trials: {trials}, search: random, stop: none, rungs: 1, seed: {seed}}}",
    "(b) TPE, all to the end": "{{trials: {trials}, search: tpe, stop: none, rungs: 1, seed: {seed}}}",
    "(c) Shoal: TPE, rungs, ASHA": "{{trials: {trials}, search: tpe, stop: asha, rungs: 3, seed: {seed}}}",
}


def texts_at(trials: list[dict[str, Any]], now: float) -> float:
    """Texts that all trials had been trained on by then; of what was on its way to a rung, the share of its time."""
    spent = 0.0
    for each in trials:
        before = 0
        for rung in each["rungs"]:
            share = (now - rung["began_at"]) / (rung["ended_at"] - rung["began_at"])
            spent += (rung["texts"] - before) * min(max(share, 0.0), 1.0)
            before = rung["texts"]
    return spent


def whole_rungs(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last rungs of the trials that were trained to the end."""
    return [rung for each in trials for rung in each["rungs"] if rung["whole"]]


def texts_until(trials: list[dict[str, Any]], wanted: float) -> int | None:
    """Texts that all trials had been trained on when one of them was whole and as good."""
    reached = [rung["ended_at"] for rung in whole_rungs(trials) if rung["score"] >= wanted]
    return round(texts_at(trials, min(reached))) if reached else None


def best_within(trials: list[dict[str, Any]], texts: float) -> float | None:
    """The best score when all trials had been trained on so many texts; None where none was whole."""
    found = [rung["score"] for rung in whole_rungs(trials) if texts_at(trials, rung["ended_at"]) <= texts]
    return max(found, default=None)


def best_values(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """The values of the best trial."""
    whole = [each for each in trials if each["rungs"] and each["rungs"][-1]["whole"]]
    found: dict[str, Any] = max(whole, key=lambda each: (each["rungs"][-1]["score"], -each["rungs"][-1]["loss"]))[
        "values"
    ]
    return found


def main() -> None:
    """Runs each search with each seed, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--airlines", default="united")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--again", type=int, default=3, help="How often the best values are trained again.")
    given = parser.parse_args()
    console, progress = Console(), Progress(Console(stderr=True))
    table = Table(
        "seed",
        "",
        "texts trained on",
        "best macro-F1",
        "as good as (a) after",
        "share of (a)'s compute",
        "best at a third",
    )
    shares: dict[str, list[float]] = {name: [] for name in SEARCHES}
    overheads: list[float] = []
    found: dict[tuple[str, int], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch, connected("local"):
        store = Store.open(scratch)
        for seed in range(given.seeds):
            best, whole = 0.0, 0
            for name, search in SEARCHES.items():
                wanted = search.format(trials=given.trials, seed=seed)
                airlines = rf"data.where.text=(?i)@({given.airlines})"
                stages = plan(load_recipe(RECIPE, [*GIVEN, airlines, f"sweep={wanted}"]))
                artifact = complete(stages["sweep"], store, progress, "airline")
                trials = json.loads((artifact.path / "trials.json").read_text(encoding="utf-8"))
                overheads += [rung["overhead_seconds"] for each in trials for rung in each["rungs"][:1]]
                score, spent = artifact.record.metrics["best_score"], artifact.record.metrics["texts_trained"]
                best, whole = (best, whole) if best else (score, spent)
                reached = texts_until(trials, best)
                shares[name].append(reached / whole if reached else float("inf"))
                found[name, seed] = best_values(trials)
                third = best_within(trials, whole / 3)
                told = (f"{reached:,}", f"{reached / whole:.2f}") if reached else ("not reached", "-")
                shown = f"{third:.4f}" if third else "-"
                table.add_row(str(seed), name, f"{spent:,}", f"{score:.4f}", *told, shown)
                console.print(
                    f"seed {seed}, {name}: {spent:,} texts, {score:.4f}, as (a) after {told[0]}, {shown} at a third",
                    style="dim",
                )
        again = _train_again(found, given, store, progress)
    console.print(describe_machine())
    console.print(table)
    for name, each in shares.items():
        console.print(f"{name}: as good as the best of (a) at {statistics.median(each):.2f} of its compute (median)")
        if given.again:
            console.print(f"{name}: its best values trained again: {statistics.mean(again[name]):.4f} (mean)")
    console.print(f"from the start of a trial to its first step: {statistics.median(overheads):.2f} s (median)")


def _train_again(
    found: dict[tuple[str, int], dict[str, Any]], given: argparse.Namespace, store: Store, progress: Progress
) -> dict[str, list[float]]:
    """The scores of each search's best values with other seeds of the training."""
    scores: dict[str, list[float]] = {name: [] for name in SEARCHES}
    seeds = [101 + number for number in range(given.again)]
    points = {
        json.dumps({**values, "finetune.seed": seed}, sort_keys=True) for values in found.values() for seed in seeds
    }
    if not points:
        return scores
    space = {
        "finetune.learning_rate": {"log_uniform": [1e-5, 1e-3]},
        "finetune.warmup": {"uniform": [0, 0.2]},
        "finetune.seed": {"choice": [*seeds, 0]},
    }
    start = [json.loads(point) for point in sorted(points)]
    wanted = {"trials": len(start), "start": start, "space": space, "search": "random", "stop": "none", "rungs": 1}
    airlines = rf"data.where.text=(?i)@({given.airlines})"
    stages = plan(load_recipe(RECIPE, [*GIVEN, airlines, f"sweep={json.dumps(wanted)}"]))
    artifact = complete(stages["sweep"], store, progress, "airline")
    for each in json.loads((artifact.path / "trials.json").read_text(encoding="utf-8")):
        values = {path: value for path, value in each["values"].items() if path != "finetune.seed"}
        for (name, _), best in found.items():
            if best == values:
                scores[name].append(each["rungs"][-1]["score"])
    return scores


if __name__ == "__main__":
    main()
