"""prepare: text and labels from anywhere become a clean, split, tokenised, shuffled dataset (Ray Data).

Three passes of Ray Data tasks, each resumable part by part, with files in between:

1. clean: a unit (a byte range of a source) is decoded and cleaned, and its rows are spilled by key range;
2. gather: a partition (a key range) of all units is freed of duplicates, dealt to splits and sorted by key;
3. tokenise: a range of a split's final rows becomes a Parquet file of whole chunks.

The keys make the order (see `splitting`), so the result depends on the data and the settings alone. Memory: a task
holds one unit (at most 32 MiB of source) or one partition (about 64 MiB), some four times over; the driver holds
counts. Cost: about 95% of the time is the tokenizer's (and ftfy's, where texts are damaged).
"""

import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import Field

from cluster.store import local_copy, telling_storage_errors, upload_tree, write_whole
from models.settings import InputError, Settings
from models.text import TextSettings
from pipelines.parts import run_parts
from pipelines.prepared import INDEX, SPLITS, Index, SplitFile, SplitIndex
from pipelines.preparing.chunking import chunk_rows_for, masked_counts, partitions_for, step_counts
from pipelines.preparing.clean_pass import CleanPass
from pipelines.preparing.cleaning import CleaningSettings, check_classes
from pipelines.preparing.data import DataSettings
from pipelines.preparing.dataset_tokenizer import copy_tokenizer, train_tokenizer
from pipelines.preparing.gather_pass import GatherPass, pieces_of, sample_texts
from pipelines.preparing.names import names_identity, with_names
from pipelines.preparing.rejected import write_rejected
from pipelines.preparing.report import write_report
from pipelines.preparing.sources import find_sources, sources_identity
from pipelines.preparing.splitting import SplittingSettings
from pipelines.preparing.tokenise_pass import TokenisePass, file_plan
from pipelines.preparing.tokenising import TokenisingSettings, TokenizerSettings
from pipelines.preparing.units import Unit, cut, unit_bytes
from pipelines.pretrained import TOKENIZER_FILES, encoder_identity
from pipelines.stage import Task

NAME = "prepare"
FORMAT = 4


class PrepareSettings(TokenisingSettings, SplittingSettings, CleaningSettings):
    """How the text is cleaned, split and tokenised."""

    chunk_rows: int | None = Field(
        None,
        ge=1,
        description="Rows in a chunk; by default, a 24th (or 48th ...) of the training set, 32 to 4096.",
    )


class PrepareStageSettings(Settings):
    """All that decides what `prepare` writes."""

    data: DataSettings
    prepare: PrepareSettings
    encoder: str | None = Field(None, description="Whose tokenizer is used, where none is trained.")


def externals(settings: PrepareStageSettings) -> dict[str, str]:
    """Identities of the source data, of the encoder's tokenizer and of the names to mask."""
    found = {"data": sources_identity(settings.data)}
    if settings.encoder and settings.prepare.tokenizer is None:
        found["tokenizer"] = encoder_identity(settings.encoder, TOKENIZER_FILES)
    return found | names_identity(settings.prepare)


def run(task: Task) -> dict[str, Any]:
    """Prepares the data into `task.out`.

    The tokenizer is that of `pack`, where that is among the task's inputs.

    Raises:
        InputError: the data or the encoder is not as the settings say, or no usable rows are left.
        ClusterError: the store cannot be written.
    """
    settings: PrepareStageSettings = task.settings
    prepare = settings.prepare
    clock = _Clock()
    with telling_storage_errors(str(task.out)):
        task.work.mkdir(parents=True, exist_ok=True)
        if prepare.tokenizer is None:
            _copy_tokenizer(task)
    clock.lap("tokenizer")

    sources = find_sources(settings.data, task.work / "fetched")
    target = unit_bytes(sources)
    cuts = [cut(source, target, settings.data.quotes) for source in sources]
    units = [Unit(source, *bounds) for source, ends in zip(sources, cuts, strict=True) for bounds in ends]
    clock.lap("look")

    partitions = partitions_for(sources)
    # Of the settings each pass gets its own part: to load this module costs a worker seconds.
    splitting = prepare.only(SplittingSettings)
    cleaning = with_names(prepare.only(CleaningSettings))
    clean = CleanPass(settings.data, cleaning, splitting, partitions, str(task.work))
    cleaned = run_parts("clean", units, clean, task.work / "clean", task.progress)
    clock.lap("clean")

    given = frozenset(code for result in cleaned for code in result["given"])
    gathering = GatherPass(settings.data, splitting, given, str(task.work))
    pieces = pieces_of(units, cleaned, partitions)
    gathered = run_parts("gather", pieces, gathering, task.work / "gather", task.progress)
    steps = step_counts(cleaned + gathered)
    counts = {split: [result["rows"].get(split, 0) for result in gathered] for split in SPLITS}
    rows_in = sum(result["rows"] for result in cleaned)
    _check_usable(settings, rows_in, steps, counts, _label_counts(gathered))
    labels = gathering.label_columns(_label_counts(gathered))
    if prepare.tokenizer is not None:
        with telling_storage_errors(str(task.out)):
            _train_tokenizer(task, prepare.tokenizer, counts["train"])
    clock.lap("gather")

    chunk_rows = prepare.chunk_rows or chunk_rows_for(sum(counts["train"]))
    text_bytes = sum(result["text_bytes"] for result in gathered)
    files = file_plan(counts, chunk_rows, text_bytes)
    tokenising = TokenisePass(labels, prepare.max_length, chunk_rows, str(task.work), str(task.out))
    written = run_parts("tokenise", files, tokenising, task.work / "tokenise", task.progress)
    clock.lap("tokenise")

    splits = {}
    for split in SPLITS:
        parts = [(file, result) for file, result in zip(files, written, strict=True) if file.split == split]
        if parts:
            splits[split] = SplitIndex(
                rows=sum(result["rows"] for _, result in parts),
                chunk_rows=chunk_rows,
                files=tuple(SplitFile(name=file.name, chunks=result["chunks"]) for file, result in parts),
                tokens=sum(result["tokens"] for _, result in parts),
                truncated=sum(result["truncated"] for _, result in parts),
            )
    index = Index(
        labels=labels,
        pair=settings.data.text_pair is not None,
        max_length=prepare.max_length,
        splits=splits,
        text=cleaning.only(TextSettings),
        columns=settings.data.columns,
    )
    with telling_storage_errors(str(task.out)):
        rejected = write_rejected(task.work, task.out / "rejected", units, cleaned, gathered)
        write_whole(task.out / INDEX, index.model_dump_json(indent=2))
    rows_out = sum(split.rows for split in splits.values())
    if rows_in != rows_out + rejected:
        raise AssertionError(f"rows were lost: {rows_in} in, {rows_out} out and {rejected} rejected")
    clock.lap("write")

    lengths: Counter[int] = Counter()
    for result in written:
        lengths.update({int(length): count for length, count in result["lengths"].items()})
    megabytes = sum(source.size for source in sources) / 1e6
    metrics = {
        "rows_in": rows_in,
        "rows_out": rows_out,
        "rejected": rejected,
        **{f"rejected_{step}": count["dropped"] for step, count in steps.items() if count["dropped"]},
        **{f"changed_{step}": count["changed"] for step, count in steps.items() if count["changed"]},
        **masked_counts(cleaned),
        "conflicting_duplicates": sum(result["conflicts"] for result in gathered),
        **{f"{name}_rows": split.rows for name, split in splits.items()},
        "tokens": sum(split.tokens for split in splits.values()),
        "truncated": sum(split.truncated for split in splits.values()),
        "chunk_rows": chunk_rows,
        "classes": sum(len(label.classes) for label in labels),
        "megabytes": round(megabytes, 3),
        "megabytes_per_second": round(megabytes / clock.total, 2),
        **{f"seconds_{name}": seconds for name, seconds in clock.laps.items()},
    }
    _tell(task, steps, metrics)
    with telling_storage_errors(str(task.out)):
        write_report(task.out / "report.html", task.recipe, metrics, steps, _label_counts(gathered), labels, lengths)
    return metrics


class _Clock:
    """Seconds of each phase. A resumed run's are of what was left to do."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = round(now - self._last, 2)
        self._last = now

    @property
    def total(self) -> float:
        return max(self._last - self._started, 1e-9)


def _copy_tokenizer(task: Task) -> None:
    settings: PrepareStageSettings = task.settings
    done = task.work / "tokenizer.done"
    if "pack" in task.inputs and not done.exists():
        with local_copy(task.inputs["pack"].path / "tokenizer") as folder:
            upload_tree(Path(folder), task.out / "tokenizer")
        done.touch()
    if done.exists():
        return
    if settings.encoder is None:
        raise InputError("prepare needs a tokenizer: name finetune.encoder, or set prepare.tokenizer to train one.")
    with tempfile.TemporaryDirectory() as scratch:
        copy_tokenizer(settings.encoder, settings.prepare.max_length, task.out / "tokenizer", Path(scratch))
    done.touch()


def _train_tokenizer(task: Task, tokenizer: TokenizerSettings, train_rows: list[int]) -> None:
    settings: PrepareStageSettings = task.settings
    done = task.work / "tokenizer.done"
    if not done.exists():
        texts = list(sample_texts(task.work, train_rows, pair=settings.data.text_pair is not None))
        with tempfile.TemporaryDirectory() as scratch:
            train_tokenizer(tokenizer, settings.prepare.max_length, texts, task.out / "tokenizer", Path(scratch))
        done.touch()


LabelCounts = dict[str, dict[str, Counter[str]]]
"""Rows by label column, split and class."""


def _label_counts(gathered: list[dict[str, Any]]) -> LabelCounts:
    counts: LabelCounts = {}
    for result in gathered:
        for column, splits in result["labels"].items():
            for split, classes in splits.items():
                counts.setdefault(column, {}).setdefault(split, Counter()).update(classes)
    return counts


def _check_usable(
    settings: PrepareStageSettings,
    rows_in: int,
    steps: dict[str, dict[str, int]],
    counts: dict[str, list[int]],
    labels: LabelCounts,
) -> None:
    if not any(sum(parts) for parts in counts.values()):
        lost = ", ".join(f"{count['dropped']} at {step}" for step, count in steps.items() if count["dropped"])
        raise InputError(f"no usable row is left of {rows_in} read" + (f" (dropped: {lost})." if lost else "."))
    for label in settings.data.labels:
        classes = {name for split in labels.get(label.column, {}).values() for name in split}
        check_classes(label.column, len(classes))
        if len(classes) < (1 if label.multi else 2):
            only = f"the single class {next(iter(classes))!r}" if classes else "no class"
            raise InputError(f"the label column {label.column!r} has {only}; at least two are needed to learn from.")
    shares = {"train": 1.0, "validation": settings.prepare.validation_share, "test": settings.prepare.test_share}
    for split, parts in counts.items():
        if not sum(parts) and shares[split]:
            rows = sum(map(sum, counts.values()))
            raise InputError(
                f"the {split} split came out empty from {rows} usable rows; give more rows"
                + (f", or change prepare.{split}_share (0 leaves it out)." if split != "train" else ".")
            )


def _tell(task: Task, steps: dict[str, dict[str, int]], metrics: dict[str, Any]) -> None:
    rows: list[tuple[str, ...]] = [("rows in", f"{metrics['rows_in']:,}", "")]
    for step, count in steps.items():
        if count["dropped"] or count["changed"]:
            dropped = f"-{count['dropped']:,}" if count["dropped"] else ""
            rows.append((f"  {step}", dropped, f"{count['changed']:,} changed" if count["changed"] else ""))
    rows.append(("rows out", f"{metrics['rows_out']:,}", f"{metrics['rejected']:,} rejected"))
    rows += [(f"  {split}", f"{metrics[f'{split}_rows']:,}", "") for split in SPLITS if f"{split}_rows" in metrics]
    rows.append(("tokens", f"{metrics['tokens']:,}", f"{metrics['truncated']:,} texts cut"))
    task.progress.table("rows in = rows out + rejected", rows)
