"""What a finished training run leaves beside its model, whatever was learnt."""

import json
from typing import Any

from upath import UPath

from models.feed import Feed
from models.settings import Precision
from pipelines.ledgers import write_ledger
from pipelines.training.interruptions import GROUPS
from pipelines.training.workers import Outcome


def write_history(out: UPath, outcome: Outcome, feed: Feed) -> dict[str, Any]:
    """Writes `history.json`, the groups of workers, what was skipped and the ledger; gives the first of them."""
    state = outcome.state
    history = {"losses": state.losses, "validations": state.validations, "validated_at": state.validated_at}
    (out / "history.json").write_text(json.dumps(history), encoding="utf-8")
    (out / GROUPS).write_text(json.dumps(outcome.groups, indent=1), encoding="utf-8")
    (out / "skipped.json").write_text(json.dumps(state.skipped, indent=1), encoding="utf-8")
    write_ledger(out, state.ledger.entries, feed.steps)
    return history


def how_it_ran(outcome: Outcome, *, exact: bool) -> dict[str, Any]:
    """Metrics of a run that do not depend on what was learnt; `exact` is the setting of that name."""
    return {
        "precision": outcome.state.precision,
        "exact_sums": exact,
        "workers": outcome.workers,
        "interruptions": len(outcome.groups) - 1,
    }


def told_precision(wanted: Precision, used: Precision | None) -> str:
    """What was computed in, and why, where it is not what was wanted."""
    return f"{used}" if used == wanted else f"{used}: the hardware of a worker has no fast {wanted}"
