"""audit: proves from a run's ledger that each epoch consumed each row exactly once, in the order that the feed says.

The ledger holds a digest of the rows that each lane of each step was given, as they came from the file, on the way
that led to the final weights. The audit computes the feed's plan anew over the same prepared rows, without a model or
Ray, and compares. Cost: the rows' identities and lengths are read once an epoch.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cluster.store import Artifact, Store
from models.feed import Feed
from models.ledger import digest
from models.settings import InputError
from pipelines.ledgers import LEDGER, read_ledger
from pipelines.prepared import Prepared
from pipelines.training.lanes import feed_over

_NAMED = 5
_SOURCES = {"finetune": "prepare", "pretrain": "pack"}
"""The stages that train, and those that make their rows."""


@dataclass
class Epoch:
    """What an audit found of one epoch."""

    number: int
    """From 1."""
    steps: int
    consumed: int
    """Rows."""
    missing: int
    """Rows that no step consumed."""
    repeated: int
    """Rows that were consumed more than once."""
    skipped: int
    """Rows of microbatches that were left out, as the recipe wants it."""
    astray: list[tuple[int, int]] = field(default_factory=list)
    """(step, lane) that consumed other rows, or in another order, than the feed says."""


@dataclass
class Audit:
    """What an audit found."""

    epochs: list[Epoch]
    cut_short: int
    """Steps that the ledger does not have."""

    @property
    def sentence(self) -> str:
        """`exact`, or what is not."""
        wrong = [_told(epoch) for epoch in self.epochs if epoch.missing or epoch.repeated or epoch.astray]
        if self.cut_short:
            wrong.append(f"the ledger ends {self.cut_short:,} steps before the run did")
        if wrong:
            return f"not exact: {'; '.join(wrong)}"
        skipped = sum(epoch.skipped for epoch in self.epochs)
        return f"exact, but for {skipped:,} rows that were skipped" if skipped else "exact"

    @property
    def exact(self) -> bool:
        """Whether all that was consumed or skipped is as planned."""
        return self.sentence.startswith("exact")


def audit(artifact: Artifact, store: Store) -> Audit:
    """Audits a finished training run.

    Raises:
        InputError: it is no such run, or the rows that it was trained on are not in the store any more.
    """
    record = artifact.record
    if record.stage not in _SOURCES or not (artifact.path / LEDGER).exists():
        raise InputError(f"{artifact.path} is no training run with a ledger; `shoal status` lists what there is.")
    stage = _SOURCES[record.stage]
    source = store.find(stage, record.inputs[stage])
    if source is None:
        raise InputError(
            f"the rows that {record.fingerprint} was trained on are not in the store: there is no "
            f"{stage}/{record.inputs[stage]}."
        )
    prepared = Prepared(source.path)
    settings = record.settings
    feed = feed_over(prepared.index.splits["train"], settings["lanes"], settings["microbatch"], settings["seed"])
    return compare(feed, prepared, read_ledger(artifact.path), record.metrics["steps_taken"])


def compare(feed: Feed, prepared: Prepared, ledger: NDArray[np.int64], steps: int) -> Audit:
    """Compares a ledger, [steps, lanes], with the feed's plan for so many steps over the prepared training set."""
    if ledger.shape[1] != feed.lanes:
        raise InputError(f"the ledger has {ledger.shape[1]} lanes, but the run had {feed.lanes}: it is of another run.")
    epochs = [
        _epoch(number, feed, prepared, ledger[start : start + feed.steps], min(steps - start, feed.steps))
        for number, start in enumerate(range(0, len(ledger), feed.steps))
    ]
    return Audit(epochs, steps - len(ledger))


def _epoch(number: int, feed: Feed, prepared: Prepared, ledger: NDArray[np.int64], steps: int) -> Epoch:
    """Of an epoch that the run left after so many steps."""
    seen = np.zeros(feed.rows, dtype=np.uint8)
    skipped = np.zeros(feed.rows, dtype=bool)
    # All rows of a whole epoch, whatever the feed plans; of one that the run left, those that were planned until then.
    due = np.full(feed.rows, steps == feed.steps)
    astray, elsewhere = [], Counter[int]()
    for step, lane, planned, places in _plan(number, feed, prepared, steps):
        due[places] = True
        if step >= len(ledger):
            continue
        if ledger[step, lane] == digest(planned):
            seen[places] += 1
        elif ledger[step, lane] == -digest(planned):
            skipped[places] = True
        else:
            astray.append((step, lane))
            elsewhere[int(ledger[step, lane])] += 1
    if astray:  # Which rows were consumed there, if they are any of the epoch's.
        for _, _, planned, places in _plan(number, feed, prepared, feed.steps):
            if planned and (times := elsewhere[digest(planned)]):
                seen[places] += times
    return Epoch(
        number=number + 1,
        steps=len(ledger),
        consumed=int((seen > 0).sum()),
        missing=int((due & (seen == 0) & ~skipped).sum()),
        repeated=int(((seen > 1) | ((seen > 0) & skipped)).sum()),
        skipped=int(skipped.sum()),
        astray=astray,
    )


def _plan(
    epoch: int, feed: Feed, prepared: Prepared, steps: int
) -> Iterator[tuple[int, int, list[int], NDArray[np.int64]]]:
    """For each step and lane: the identities of the rows, and their places in the training set."""
    stored = feed.chunk_rows // prepared.index.splits["train"].chunk_rows
    chunks = prepared.index.splits["train"].chunks
    for lane in range(feed.lanes):
        open_chunk = None
        for step in range(steps):
            place = feed.place(epoch, step, lane)
            if place is None:
                yield step, lane, [], np.empty(0, dtype=np.int64)
                continue
            if place.chunk != open_chunk:
                open_chunk = place.chunk
                numbers = range(place.chunk * stored, min((place.chunk + 1) * stored, chunks))
                tables = [prepared.read_chunk("train", number, ["row", "length"]) for number in numbers]
                rows, lengths = (
                    np.concatenate([table[name].to_numpy() for table in tables]) for name in ("row", "length")
                )
                order = feed.chunk_order(epoch, place.chunk, lengths)
            chosen = order[place.start : place.stop]
            yield step, lane, rows[chosen].tolist(), place.chunk * feed.chunk_rows + chosen


def _told(epoch: Epoch) -> str:
    named = ", ".join(f"step {step} lane {lane}" for step, lane in epoch.astray[:_NAMED])
    more = f" and {len(epoch.astray) - _NAMED:,} more" if len(epoch.astray) > _NAMED else ""
    parts = [
        f"{epoch.missing:,} rows not consumed" if epoch.missing else "",
        f"{epoch.repeated:,} rows consumed more than once" if epoch.repeated else "",
        f"other rows than planned at {named}{more}" if epoch.astray else "",
    ]
    return f"epoch {epoch.number}: {', '.join(part for part in parts if part)}"
