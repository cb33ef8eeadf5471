"""pack: label-free text from several sources becomes rows of tokens without padding, to pretrain on (Ray Data).

The first two passes are those of `prepare` (clean, gather), over all sources: a document that two of them have is kept
once. Then, each pass resumable part by part:

3. tokens: documents are tokenised, whole; each one's length is known from here on;
4. weigh, where sources have weights: how many tokens each of an epoch's rounds has;
5. pack: a file's part of the stream of documents becomes full rows (`models.packing`), written in whole chunks.

No token is lost and none is padding, but in the last row of each split. The result is a prepared dataset
(`pipelines.prepared`) without labels, whose rows have two more columns: `starts`, where in the row its documents (or
parts of them) begin, and `documents`, which rows of the sources they are.
"""

import hashlib
import json
from collections import Counter
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from cluster.store import telling_storage_errors, write_whole
from models.settings import InputError, Settings
from models.text import TextSettings
from pipelines.parts import run_parts
from pipelines.prepared import INDEX, Index, SplitFile, SplitIndex
from pipelines.preparing.chunking import masked_counts, partitions_for, step_counts
from pipelines.preparing.clean_pass import CleanPass
from pipelines.preparing.cleaning import CleaningSettings
from pipelines.preparing.corpus import CorpusClean, CorpusSource, find_corpus, telling_source
from pipelines.preparing.corpus_tokenizer import copy_corpus_tokenizer, end_and_unknown, train_corpus_tokenizer
from pipelines.preparing.gather_pass import GatherPass, pieces_of
from pipelines.preparing.names import names_identity, with_names
from pipelines.preparing.pack_pass import (
    Copies,
    PackPass,
    TokenPass,
    shares_to_times,
)
from pipelines.preparing.pack_plan import PACKED_SPLITS, plan_files
from pipelines.preparing.pack_report import write_report
from pipelines.preparing.rejected import write_rejected
from pipelines.preparing.sources import sources_identity
from pipelines.preparing.splitting import SplittingSettings
from pipelines.preparing.tokenise_pass import OutputFile, file_plan
from pipelines.preparing.tokenising import TokenizerSettings
from pipelines.preparing.units import Unit, cut, unit_bytes
from pipelines.pretrained import TOKENIZER_FILES, encoder_identity
from pipelines.stage import Task

NAME = "pack"
FORMAT = 1

_MOST_TIMES = 100
# The training split of a prepared dataset, which the same digests have made, has validation rows of its own.
_SALT = 1


class PackSettings(CleaningSettings):
    """The texts to pretrain on, and the rows that they become."""

    sources: tuple[CorpusSource, ...] = Field(description="Where the texts are; one source alone needs no list.")
    length: int = Field(128, ge=8, description="Tokens in a row; longer documents are split, none is cut.")
    tokenizer: TokenizerSettings | None = Field(
        None, description="A tokenizer to train on the texts; by default, that of the encoder that goes on learning."
    )
    deduplicate: Literal["exact", "none"] = Field("exact", description="Of equal texts, one is kept.")
    validation_share: float = Field(
        0.02, gt=0, lt=1, description="Share of the documents for validation, where no source gives that split."
    )
    seed: int = Field(0, description="Seed of the shuffle.")
    chunk_rows: int | None = Field(
        None, ge=1, description="Rows in a chunk; by default, a 24th (or 48th ...) of the training set, 32 to 4096."
    )

    @field_validator("sources", mode="before")
    @classmethod
    def _one_alone(cls, given: Any) -> Any:
        listed = (given,) if isinstance(given, str | dict | Settings) else given
        if not isinstance(listed, list | tuple):
            return listed
        return tuple({"source": each} if isinstance(each, str) else each for each in listed)

    @model_validator(mode="after")
    def _weighed_together(self) -> Self:
        if not self.sources:
            raise ValueError("sources: name at least one")
        weighed = [source.weight is not None for source in self.sources]
        if any(weighed) and not all(weighed):
            number = weighed.index(False)
            raise ValueError(
                f"sources.{number}.weight is missing, but other sources have one; give all of them or none"
            )
        return self


class PackStageSettings(Settings):
    """All that decides what `pack` writes."""

    pack: PackSettings
    encoder: str | None = Field(None, description="Whose tokenizer is used, where none is trained.")
    sentinels: bool = Field(False, description="Whether a trained tokenizer has T5's tokens for dropped spans.")


def externals(settings: PackStageSettings) -> dict[str, str]:
    """Identities of the sources, of the encoder's tokenizer and of the names to mask."""
    parts = []
    for number, source in enumerate(settings.pack.sources):
        with telling_source(number):
            parts.append(sources_identity(source.as_data()))
    found = {"corpus": hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}
    if settings.encoder and settings.pack.tokenizer is None:
        found["tokenizer"] = encoder_identity(settings.encoder, TOKENIZER_FILES, "pretrain")
    return found | names_identity(settings.pack)


def run(task: Task) -> dict[str, Any]:
    """Packs the texts into `task.out`.

    Raises:
        InputError: a source is not as the settings say, or the texts are too few for the tokenizer or for a row.
        ClusterError: the store cannot be written.
    """
    settings: PackStageSettings = task.settings
    pack = settings.pack
    with telling_storage_errors(str(task.out)):
        task.work.mkdir(parents=True, exist_ok=True)
        if pack.tokenizer is None:
            copy_corpus_tokenizer(task)
    corpus = find_corpus(pack.sources, task.work / "fetched")
    cuts = []
    target = unit_bytes([source for _, source in corpus])
    for number, source in corpus:
        with telling_source(number):
            cuts.append(cut(source, target, pack.sources[number].quotes))
    units = [
        (number, Unit(source, *bounds)) for (number, source), ends in zip(corpus, cuts, strict=True) for bounds in ends
    ]
    plain_units = [unit for _, unit in units]
    partitions = partitions_for(source for _, source in corpus)
    splitting = SplittingSettings(
        deduplicate=pack.deduplicate, validation_share=pack.validation_share, test_share=0.0, seed=pack.seed
    )
    data = tuple(source.as_data() for source in pack.sources)
    cleaning = with_names(pack.only(CleaningSettings))
    passes = tuple(CleanPass(each, cleaning, splitting, partitions, str(task.work)) for each in data)
    cleaned = run_parts("clean", units, CorpusClean(passes), task.work / "clean", task.progress)
    given = frozenset(code for result in cleaned for code in result["given"])
    gathering = GatherPass(data[0].model_copy(update={"labels": ()}), splitting, given, str(task.work), salt=_SALT)
    pieces = pieces_of(plain_units, cleaned, partitions)
    gathered = run_parts("gather", pieces, gathering, task.work / "gather", task.progress)
    counts = {split: [result["rows"].get(split, 0) for result in gathered] for split in PACKED_SPLITS}
    rows_in = sum(result["rows"] for result in cleaned)
    steps = step_counts(cleaned + gathered)
    for split, parts in counts.items():
        if not sum(parts):
            raise InputError(
                f"no document is left for {split} of {rows_in:,} read; give more texts, or change "
                "pack.validation_share or what pack rejects."
            )
    with telling_storage_errors(str(task.out)):
        if pack.tokenizer is not None:
            train_corpus_tokenizer(task, counts["train"])
        end, unknown = end_and_unknown(task)

    text_bytes = sum(result["text_bytes"] for result in gathered)
    documents = file_plan(counts, 1, text_bytes)
    firsts = _first_rows(units, cleaned, len(pack.sources))
    tokens = TokenPass(firsts, end, unknown, str(task.work), str(task.out))
    tokenised = run_parts("tokens", documents, tokens, task.work / "tokens", task.progress)
    by_source = [
        [sum(column) for column in zip(*(r["tokens"] for r in _of(split, documents, tokenised)), strict=True)]
        for split in PACKED_SPLITS
    ]
    copies = None
    if pack.sources[0].weight is not None:
        weights = [float(source.weight or 0) for source in pack.sources]
        copies = Copies(shares_to_times(by_source[0], weights), pack.seed)
        number = max(range(len(weights)), key=lambda each: copies.times[each])
        if copies.times[number] > _MOST_TIMES:
            raise InputError(
                f"pack.sources.{number}.weight: its texts would stand {copies.times[number]:,.0f} times in an epoch, "
                f"more than {_MOST_TIMES}: lower it, or give more texts of this source."
            )
    plan, chunk_rows, left_out = plan_files(task, documents, tokenised, copies)
    packing = PackPass(pack.length, chunk_rows, pack.seed, str(task.work), str(task.out))
    written = run_parts("pack", plan, packing, task.work / "pack", task.progress)

    splits = {}
    for split in PACKED_SPLITS:
        parts_of = [(file, r) for file, r in zip(plan, written, strict=True) if file.name.startswith(f"{split}/")]
        splits[split] = SplitIndex(
            rows=sum(r["rows"] for _, r in parts_of),
            chunk_rows=chunk_rows,
            files=tuple(SplitFile(name=file.name, chunks=r["chunks"]) for file, r in parts_of),
            tokens=sum(r["tokens"] for _, r in parts_of),
            documents=sum(r["documents"] for _, r in parts_of),
            bytes=sum(r["bytes"] for r in _of(split, documents, tokenised)),
        )
    index = Index(
        labels=(),
        max_length=pack.length,
        splits=splits,
        text=cleaning.only(TextSettings),
    )
    with telling_storage_errors(str(task.out)):
        rejected = write_rejected(task.work, task.out / "rejected", plain_units, cleaned, gathered)
        write_whole(task.out / INDEX, index.model_dump_json(indent=2))
    documents_out = sum(r["documents"] for r in tokenised)
    if rows_in != documents_out + rejected:
        raise AssertionError(f"documents were lost: {rows_in} in, {documents_out} out and {rejected} rejected")
    if copies is None and sum(split.tokens for split in splits.values()) != sum(map(sum, by_source)):
        raise AssertionError("tokens were lost on the way into rows")

    lengths: Counter[int] = Counter()
    for result in tokenised:
        lengths.update({int(length): count for length, count in result["lengths"].items()})
    rows = sum(split.rows for split in splits.values())
    packed_tokens = sum(split.tokens for split in splits.values())
    long = sum(r["long"] for r in written)
    shorter = max(sum(r["documents"] for r in written) - long, 1)
    metrics = {
        "rows_in": rows_in,
        "documents": documents_out,
        "rejected": rejected,
        **{f"rejected_{step}": count["dropped"] for step, count in steps.items() if count["dropped"]},
        **masked_counts(cleaned),
        "tokens": sum(map(sum, by_source)),
        "train_tokens": splits["train"].tokens,
        "train_rows": splits["train"].rows,
        "validation_rows": splits["validation"].rows,
        "padding_share": round(1 - packed_tokens / (rows * pack.length), 6),
        "left_out_by_weight": left_out,
        "unknown_share": round(sum(r["unknown"] for r in tokenised) / max(sum(map(sum, by_source)), 1), 6),
        "documents_longer_than_a_row": long,
        "shorter_documents_split": round(sum(r["split"] for r in written) / shorter, 5),
        "chunk_rows": chunk_rows,
    }
    mixture = _mixture(pack.sources, by_source[0], copies)
    task.progress.table(
        "",
        [
            ("documents", f"{documents_out:,}", f"{rejected:,} rejected"),
            ("tokens", f"{metrics['tokens']:,}", f"{metrics['padding_share']:.2%} padding, none lost"),
            (f"rows of {pack.length} tokens", f"{rows:,}", f"{metrics['shorter_documents_split']:.2%} split for room"),
        ],
    )
    with telling_storage_errors(str(task.out)):
        write_report(task.out / "report.html", task.recipe, metrics, steps, mixture, lengths, pack.length)
    return metrics


def _of(split: str, parts: list[OutputFile], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [result for part, result in zip(parts, results, strict=True) if part.split == split]


def _first_rows(units: list[tuple[int, Unit]], cleaned: list[dict[str, Any]], sources: int) -> tuple[int, ...]:
    """The first row of each source, rows being counted over all of them."""
    rows = [0] * sources
    for (number, _), result in zip(units, cleaned, strict=True):
        rows[number] += result["rows"]
    return tuple(sum(rows[:number]) for number in range(sources))


def _mixture(
    sources: tuple[CorpusSource, ...], tokens: list[int], copies: Copies | None
) -> list[tuple[str, int, float, float]]:
    """Of each source: its name, its tokens, how many times they stand in an epoch, and their share of it."""
    times = copies.times if copies else (1.0,) * len(sources)
    total = sum(count * each for count, each in zip(tokens, times, strict=True))
    return [
        (source.shown, count, each, count * each / max(total, 1))
        for source, count, each in zip(sources, tokens, times, strict=True)
    ]
