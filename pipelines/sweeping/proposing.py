"""What values a sweep tries next: given ones first, then what Optuna or chance proposes, none twice."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from pipelines.sweeping.board import Entry
from pipelines.sweeping.space import Distribution

SearchName = Literal["tpe", "random"]
_TRIES = 64
_TIE = 1e-6


def propose(
    search: SearchName,
    space: Mapping[str, Distribution],
    start: Sequence[Mapping[str, Any]],
    entries: Sequence[Entry],
    wanted: int,
    seed: int,
) -> dict[str, Any] | None:
    """Values that no trial has; None where there seem to be no more.

    What is proposed follows from the trials there are alone, so a sweep that goes on proposes what it would have.
    """
    known = [dict(entry.values) for entry in entries]
    for point in start:
        if point not in known:
            return {path: point[path] for path in space}
    distributions = {path: each.optuna for path, each in space.items()}
    (own_seed,) = np.random.SeedSequence([seed, len(entries)]).generate_state(1)
    sampler = _sampler(search, wanted, int(own_seed))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.add_trials([_told(entry, distributions) for entry in entries])
    for _ in range(_TRIES):
        values = dict(study.ask(distributions).params)
        if values not in known:
            return values
    return None


def _sampler(search: SearchName, wanted: int, seed: int) -> BaseSampler:
    match search:
        case "random":
            return RandomSampler(seed=seed)
        case "tpe":  # Bergstra et al. 2011.
            return TPESampler(seed=seed, n_startup_trials=max(wanted // 4, 4), multivariate=True, constant_liar=True)


def _told(entry: Entry, distributions: Mapping[str, BaseDistribution]) -> FrozenTrial:
    """A trial as Optuna has it, which compares those that are not whole by their rungs before their scores."""
    state = TrialState.PRUNED
    if entry.whole:
        state = TrialState.COMPLETE
    elif not entry.rungs:
        state = TrialState.RUNNING
    # The loss breaks ties here too.
    scores = {at: worth[0] + _TIE * worth[1] for at in range(entry.rung + 1) if (worth := entry.worth(at)) is not None}
    return create_trial(
        state=state,
        value=scores[entry.rung] if entry.whole else None,
        params=dict(entry.values),
        distributions=dict(distributions),
        intermediate_values={0: 0.0} if entry.failed else scores,
    )
