"""When a rollout may go on: what is demanded at each step, and what the counts of both versions say to it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from cluster.rollouts import Check
from models.settings import Settings
from serve.traffic import Tally

Verdict = Literal["wait", "pass", "fail"]

_Z = 4.0
"""Standard errors beyond its bound at which a gate is shut before its step has all its requests. Many, since it is
looked at again and again."""
_SURE_ERRORS, _SURE_COMPARED = 3, 50
"""Errors and compared labels without which nothing is judged early."""
_COMPARABLE = 20
"""Answers of each version that there must be to compare their times."""


class Plan(Settings):
    """The steps of a rollout and their gates."""

    replay: str | None = Field(
        None,
        description="Labelled texts that both versions answer first: a file, a folder or a glob, of any form that "
        "`data.source` may have, with a column `text` (for pairs also `pair`) and one for each label column.",
    )
    replay_rows: int = Field(1000, ge=1, description="Of these, how many: the first.")
    macro_f1_loss: float = Field(
        0.01, ge=0, le=1, description="Macro-F1 that the candidate may lose, in the replay and in the evaluation."
    )
    calibration_loss: float = Field(
        0.02, ge=0, le=1, description="Calibration error that the candidate may have beyond the other's in the replay."
    )
    shadow: bool = Field(True, description="Whether the candidate is first asked what the other has answered.")
    agreement: float = Field(
        0.9, ge=0, le=1, description="The share of labels in which the candidate must agree, as a shadow."
    )
    shares: tuple[float, ...] = Field(
        (0.01, 0.1, 0.5), description="The shares of the requests that the candidate answers, step by step."
    )
    min_requests: int = Field(200, ge=1, description="Of the candidate, in each step, before it is judged.")
    min_s: float = Field(60.0, ge=0, description="Seconds that each step takes at least.")
    errors: float = Field(0.01, ge=0, le=1, description="The share of requests that the candidate may fail to answer.")
    latency_ratio: float = Field(
        1.5, ge=1, description="How much longer (95th percentile) the candidate may take than the other version,"
    )
    latency_slack_ms: float = Field(25.0, ge=0, description="beyond these milliseconds, for the way to its replicas.")
    promote: bool = Field(True, description="Whether it takes over by itself after the last step.")

    @field_validator("shares")
    @classmethod
    def _grow(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if list(shares) != sorted(set(shares)) or not all(0 < share <= 1 for share in shares):
            raise ValueError("shares must grow, each more than 0 and at most 1, as in [0.01, 0.1, 0.5]")
        return shares

    def steps(self) -> list[str]:
        """What the steps are called, in order."""
        return [
            "evaluation",
            *(["replay"] if self.replay else []),
            *(["shadow"] if self.shadow else []),
            *(name_of(share) for share in self.shares),
        ]


def name_of(share: float) -> str:
    """What the step is called in which the candidate answers this share."""
    return f"{100 * share:g}%"


def judge(plan: Plan, step: str, tally: Tally, seconds: float) -> tuple[Verdict, list[Check]]:
    """Whether a step with requests is passed, failed, or goes on; and its gates as they stand."""
    stable, candidate = tally.stable, tally.candidate
    done = candidate.requests >= plan.min_requests and seconds >= plan.min_s
    checks, sure = [], []
    share = candidate.errors / candidate.requests if candidate.requests else None
    checks.append(Check(name="errors", value=share, bound=plan.errors, passed=share is None or share <= plan.errors))
    sure.append(candidate.errors >= _SURE_ERRORS and interval(candidate.errors, candidate.requests)[0] > plan.errors)
    if step == "shadow":
        agreed = tally.agreed / tally.compared if tally.compared else None
        passed = agreed is None or agreed >= plan.agreement
        checks.append(Check(name="agreement", value=agreed, bound=plan.agreement, passed=passed))
        sure.append(tally.compared >= _SURE_COMPARED and interval(tally.agreed, tally.compared)[1] < plan.agreement)
        done = done and tally.compared > 0
    if min(stable.answered, candidate.answered) >= _COMPARABLE:
        bound = plan.latency_ratio * stable.quantile_ms(0.95) + plan.latency_slack_ms
        value = candidate.quantile_ms(0.95)
        checks.append(Check(name="p95 in ms", value=value, bound=bound, passed=value <= bound))
    if any(sure) or (done and not all(check.passed for check in checks)):
        return "fail", checks
    return "pass" if done else "wait", checks


def compare_evaluations(plan: Plan, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Check]:
    """The gates on macro-F1 of two versions that were evaluated on the same rows."""
    return [
        Check(
            name=name,
            value=float(value),
            bound=(bound := float(before[name]) - plan.macro_f1_loss),
            passed=value >= bound,
        )
        for name, value in after.items()
        if name.rpartition(".")[2] == "macro_f1" and name in before
    ]


def compare_replays(plan: Plan, before: "Sequence[Replayed]", after: "Sequence[Replayed]") -> list[Check]:
    """The gates on what both versions answered to labelled texts."""
    checks = []
    for old, new in zip(before, after, strict=True):
        bound = old.macro_f1 - plan.macro_f1_loss
        passed = new.macro_f1 >= bound
        checks.append(Check(name=f"{new.column}.macro_f1", value=new.macro_f1, bound=bound, passed=passed))
        if old.calibration_error is not None and new.calibration_error is not None:
            bound = old.calibration_error + plan.calibration_loss
            passed = new.calibration_error <= bound
            name = f"{new.column}.calibration_error"
            checks.append(Check(name=name, value=new.calibration_error, bound=bound, passed=passed))
    return checks


class Replayed(Settings):
    """How well one version answered labelled texts, in one label column."""

    column: str
    rows: int
    macro_f1: float
    calibration_error: float | None = None
    """Of single-label columns."""


def interval(count: int, of: int) -> tuple[float, float]:
    """Where a share is, that was seen `count` times, by four standard errors (Wilson 1927); 0 to 1 at first."""
    if of == 0:
        return 0.0, 1.0
    share, z2 = count / of, _Z**2
    middle = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = _Z / (1 + z2 / of) * math.sqrt(share * (1 - share) / of + z2 / (4 * of**2))
    return max(0.0, middle - half), min(1.0, middle + half)
