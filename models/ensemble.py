"""Several classifiers that answer as one: the mean of their calibrated probabilities."""

from collections.abc import Sequence

import numpy as np
from scipy.special import logit

from models.engine import Encoded, Engine, FloatArray
from models.labels import spans
from models.settings import InputError

_SMALLEST = np.finfo(np.float32).tiny


class EnsembleEngine(Engine):
    """An engine of engines. The softmax (or sigmoid) of its outputs is the mean of the members' probabilities.

    The members read the same tokens: they have the same tokenizer, labels and longest text, as versions have that
    differ in their seed, their settings or the rows they learnt from.

    Raises:
        InputError: they differ; names what in.
    """

    def __init__(self, members: Sequence[Engine]) -> None:
        first, *others = members
        for number, other in enumerate(others, 1):
            if differing := first.difference(other):
                raise InputError(f"serve.ensemble: member {number} has another {differing} than what is served.")
        super().__init__(
            first.spec, first.tokenizer, pad_id=first.pad_id, uses_type_ids=first.uses_type_ids, temperature={}
        )
        self._members = members
        self.name, self.precision, self.device = first.name, first.precision, first.device
        padding = [each.max_padding for each in members if each.max_padding is not None]
        self.max_padding = min(padding) if padding else None
        turns = [each.turn_tokens for each in members if each.turn_tokens is not None]
        self.turn_tokens = min(turns) if turns else None
        self.lanes = min(each.lanes for each in members)

    def forward(self, batch: Sequence[Encoded]) -> FloatArray:
        """One batch as it is: float32 [texts, total_classes]."""
        said = [each.probabilities(each.forward(batch)) for each in self._members]
        outputs = []
        for column, _ in spans(self.spec.labels):
            mean = np.mean([each[column.name] for each in said], axis=0, dtype=np.float64)
            mean = np.clip(mean, _SMALLEST, 1 - 1e-12 if column.multi else 1)
            outputs.append(logit(mean) if column.multi else np.log(mean))
        return np.concatenate(outputs, axis=1).astype(np.float32)
