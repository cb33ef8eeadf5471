"""Showing what is in a store: a line for each artifact, or all there is to know about one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from rich.tree import Tree
from upath import UPath

from cluster.store import Artifact, Store, is_local, read_artifact
from models.settings import InputError
from pipelines.training.interruptions import GROUPS, interruptions
from recipes.printing import plain_table

if TYPE_CHECKING:
    from pipelines.audit import Audit

_COUNTS = ("rows_in", "rows_out", "rejected")
_HEADLINES = (
    *_COUNTS,
    "tokens",
    "tokens_per_second",
    "perplexity",
    "engine",
    "agreement",
    "texts_per_second",
    "accuracy",
    "macro_f1",
)
_OF_OTHERS = ("baseline", "validation", "without_pretraining")


def find_artifact(reference: str, store_url: str) -> tuple[Store, Artifact]:
    """The artifact that `reference` names: a path, a fingerprint or the beginning of one, with or without `STAGE/`.

    Raises:
        InputError: there is none, or there are several.
    """
    if "://" in reference or UPath(reference).is_dir():
        path = UPath(reference).absolute() if "://" not in reference else UPath(reference)
        if artifact := read_artifact(path):
            return Store(path.parent.parent), artifact
        raise InputError(f"{reference} holds no finished artifact: there is no artifact.json in it.")
    store = existing_store(store_url)
    stage, _, prefix = reference.rpartition("/")
    found = [
        artifact
        for artifact in store.artifacts()
        if artifact.record.fingerprint.startswith(prefix) and stage in ("", artifact.record.stage)
    ]
    match found:
        case [artifact]:
            return store, artifact
        case []:
            raise InputError(f"{store_url} has no artifact {reference}; `shoal status --store {store_url}` lists all.")
        case _:
            names = ", ".join(f"{each.record.stage}/{each.record.fingerprint}" for each in found)
            raise InputError(f"{reference} is not enough to tell which of {names} is meant.")


def existing_store(url: str) -> Store:
    """The store at `url`, which must be there already (reading should make nothing).

    Raises:
        InputError: there is none.
    """
    try:
        root = UPath(url).expanduser() if "://" not in url else UPath(url)
        found = root.is_dir()
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"the store {url} cannot be read: {error}.") from error
    if not found:
        raise InputError(f"there is no store at {url}; name another with --store.")
    return Store(UPath(Path(root.path).absolute()) if is_local(root) else root)


def status_table(store: Store) -> Table:
    """All finished artifacts, oldest first within a stage, with their sizes and chief metrics."""
    table = Table(box=None, pad_edge=False)
    for name, right in (("artifact", 0), ("recipe", 0), ("made", 0), ("took", 1), ("size", 1), ("metrics", 0)):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for artifact in sorted(store.artifacts(), key=lambda each: (each.record.stage, each.record.created)):
        record = artifact.record
        table.add_row(
            f"{record.stage}/{record.fingerprint}",
            record.recipe,
            record.created[:16].replace("T", " "),
            f"{record.seconds:,.1f} s",
            size(record.bytes),
            headline(record.metrics),
        )
    return table


def headline(metrics: dict[str, Any]) -> str:
    """The best known of the metrics, in a few words; those of a label column follow its name and a dot."""
    return ", ".join(
        f"{name} {number(value)}"
        for name, value in metrics.items()
        if name.rpartition(".")[2] in _HEADLINES and name.partition(".")[0] not in _OF_OTHERS
    )


def summary_rows(artifacts: Mapping[str, Artifact]) -> list[tuple[str, str, str]]:
    """What a whole recipe came to: its data, and its classifier beside the baseline."""
    prepared, tuned, evaluated = (artifacts[name].record.metrics for name in ("prepare", "finetune", "evaluate"))
    rows = [(name.replace("_", " "), number(prepared[name]), "") for name in _COUNTS if name in prepared]
    for name, value in evaluated.items():
        measure = name.rpartition(".")[2]
        if measure in ("accuracy", "macro_f1") and not name.startswith(("baseline.", "without_pretraining.")):
            baseline = evaluated.get(f"baseline.{name}")
            rows.append((name.replace("_", "-"), number(value), number(baseline) if baseline is not None else ""))
    for stage, metrics in (("training", tuned), ("evaluation", evaluated)):
        if "texts_per_second" in metrics:
            rows.append((f"texts/s in {stage}", number(metrics["texts_per_second"]), ""))
    return rows


def reports(artifacts: Mapping[str, Artifact]) -> list[str]:
    """Where the artifacts' reports and model card stand."""
    names = ("report.html", "model_card.md")
    return [str(path) for each in artifacts.values() for name in names if (path := each.path / name).exists()]


def print_artifact(artifact: Artifact, store: Store, console: Console) -> None:
    """Prints an artifact's lineage: what it is, its settings, metrics, versions, and what it was made from."""
    record = artifact.record
    facts = {
        "recipe": record.recipe,
        "made": f"{record.created} in {record.seconds:,.1f} s",
        "size": size(record.bytes),
        "path": str(artifact.path),
    }
    console.print(f"[bold]{record.stage}[/bold] {record.fingerprint}", highlight=False)
    for name, value in facts.items():
        console.print(Text(f"  {name:8}{value}"), soft_wrap=True)
    for title, content in (
        ("settings", record.settings),
        ("metrics", record.metrics),
        ("versions", record.versions),
    ):
        console.print(f"[bold]{title}[/bold]")
        text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False, default_flow_style=None, width=110)
        console.print(Text("".join(f"  {line}\n" for line in text.splitlines()).rstrip()), soft_wrap=True)
    console.print("[bold]made from[/bold]")
    console.print(_ancestry(artifact, store))


def print_audit(artifact: Artifact, result: "Audit", console: Console) -> None:
    """Prints what an audit found of each epoch, what disturbed the run, and its verdict in the last line."""
    header = ("epoch", "steps", "rows consumed once", "not consumed", "more than once", "skipped", "lanes astray")
    counts = [
        (e.number, e.steps, e.consumed - e.repeated, e.missing, e.repeated, e.skipped, len(e.astray))
        for e in result.epochs
    ]
    console.print(plain_table([[f"{value:,}" for value in each] for each in counts], header, numbers=True))
    disturbed = interruptions(json.loads((artifact.path / GROUPS).read_text(encoding="utf-8")))
    if disturbed:
        told = [
            [
                each.time,
                f"{each.step:,}",
                f"{each.recomputed:,}",
                f"{each.seconds:,.1f}",
                f"{each.before} -> {each.after}",
                each.cause,
            ]
            for each in disturbed
        ]
        console.print(plain_table(told, ("interrupted", "at step", "recomputed", "seconds lost", "workers", "cause")))
    left_out = json.loads((artifact.path / "skipped.json").read_text(encoding="utf-8"))
    if left_out:
        places = [[each["epoch"] + 1, each["step"], each["lane"], each["reason"]] for each in left_out]
        rows = [" ".join(map(str, each["rows"])) for each in left_out]
        table = [[*map(str, place), its_rows] for place, its_rows in zip(places, rows, strict=True)]
        console.print(plain_table(table, ("skipped in epoch", "step", "lane", "for", "rows")))
    console.print(result.sentence, highlight=False)


def _ancestry(artifact: Artifact, store: Store) -> Group:
    return Group(*(_branch(name, identity, store) for name, identity in artifact.record.inputs.items()))


def _branch(name: str, identity: str, store: Store) -> Tree:
    tree = Tree(Text(f"{name} {identity}"))
    if parent := store.find_input(name, identity):
        tree.label = Text(f"{name} {identity}  {headline(parent.record.metrics)}")
        for further, its_identity in parent.record.inputs.items():
            tree.add(_branch(further, its_identity, store))
    return tree


def size(count: float) -> str:
    """Bytes in a unit that reads well."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def number(value: Any) -> str:
    """A count with commas, a share with four digits, a rate with one."""
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
