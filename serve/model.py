"""What is served: one version of a classifier, and which engine computes it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from upath import UPath

from cluster.store import local_copy
from models.engine import Engine
from models.settings import InputError
from models.spec import SPEC
from serve.settings import ServeSettings

if TYPE_CHECKING:
    from models.explaining import Explainer


@dataclass(frozen=True)
class ServedModel:
    """One version of a classifier."""

    name: str
    """As clients and metrics see it."""
    version: str
    """The fingerprint of the artifact that it comes from."""
    torch: UPath
    """Its folder, local or in any store that the replicas' nodes can read."""
    onnx: UPath | None = None
    """Its export; None where there is none that holds."""
    refused: str = ""
    """Why there is no export."""
    temperature: dict[str, float] = field(default_factory=dict)
    """By label column, what its logits are divided by."""
    thresholds: dict[str, float] = field(default_factory=dict)
    """By label column, the calibrated probability below which no class is answered."""
    card: dict[str, Any] = field(default_factory=dict)
    """What `/v1/model` tells besides (`metrics`, `lineage`); plain JSON types."""
    reference: dict[str, Any] | None = None
    """What texts and answers looked like in its evaluation (`models.drift.Reference`); plain JSON types."""

    def check(self, settings: ServeSettings) -> None:
        """Refuses what could not be served.

        Raises:
            InputError: there is no classifier, or no export though one is asked for.
        """
        if not (self.torch / SPEC).exists():
            raise InputError(f"{self.torch} holds no classifier: there is no {SPEC} in it.")
        if settings.engine == "onnx" and self.onnx is None:
            why = f" ({self.refused})" if self.refused else ""
            raise InputError(f"serve.engine is onnx, but {self.name} has no export{why}; set serve.engine=auto.")

    def load(self, settings: ServeSettings) -> Engine:
        """The engine that the settings ask for, warmed up; torch is imported only where it computes.

        Raises:
            InputError: a file is missing or damaged, or the model gives no finite numbers.
        """
        threads = max(1, round(settings.cpus))
        wanted = settings.engine
        if wanted == "auto":
            wanted = "torch" if settings.gpus > 0 or self.onnx is None else "onnx"
        with local_copy(self.torch if wanted == "torch" or self.onnx is None else self.onnx) as folder:
            engine = self._load(wanted, folder, settings, threads)
        warm_up(engine, settings.batch_tokens)
        return engine

    def load_explainer(self, settings: ServeSettings) -> "Explainer":
        """What explains its answers: the classifier in torch, whatever engine answers. It imports torch.

        Raises:
            InputError: a file is missing or damaged.
        """
        from models.explaining import Explainer

        with local_copy(self.torch) as folder:
            return Explainer(folder, self.temperature, threads=max(1, round(settings.cpus)))

    def _load(self, wanted: str, folder: Path, settings: ServeSettings, threads: int) -> Engine:
        if wanted == "onnx":
            from models.onnx_engine import load_onnx_engine

            return load_onnx_engine(folder, threads=threads, temperature=self.temperature)
        from models.torch_engine import load_torch_engine

        return load_torch_engine(folder, precision=settings.precision, threads=threads, temperature=self.temperature)


def warm_up(engine: Engine, batch_tokens: int) -> None:
    """Computes the smallest and the largest batch, so that the first requests are as fast as the later ones.

    Raises:
        InputError: the model gives no finite numbers.
    """
    longest = "word " * engine.spec.max_length
    for text, count in (("word", 1), (longest, max(1, batch_tokens // engine.spec.max_length))):
        encoded = engine.encode([text] * count, [text] * count if engine.spec.pair else None)
        if not np.isfinite(engine.forward(encoded)).all():
            raise InputError("the model gives no finite numbers, so its training diverged; finetune it anew.")
