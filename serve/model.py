"""What is served: one version of a classifier, and which engine computes it.

Its files are held against the digests that it was registered with before anything in them is parsed. What is parsed is
safetensors, ONNX and JSON (and a tokenizer's plain text): nothing that can run code.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from upath import UPath

from cluster.digests import difference
from cluster.store import local_copy
from models.engine import Engine
from models.ensemble import EnsembleEngine
from models.settings import InputError, first_line
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
    """What `/v1/model` tells besides (`metrics`, `lineage`, `registered`); plain JSON types."""
    reference: dict[str, Any] | None = None
    """What texts and answers looked like in its evaluation (`models.drift.Reference`); plain JSON types."""
    members: tuple["ServedModel", ...] = ()
    """Others that answer with it, as one: an ensemble."""
    sha256: dict[str, str] = field(default_factory=dict)
    """The digest of each file in `torch`, by its path there; others are not looked at. Empty: nothing is checked."""
    onnx_sha256: dict[str, str] = field(default_factory=dict)
    """The same of `onnx`."""

    @property
    def identity(self) -> str:
        """`NAME:NUMBER` of a registered version, `NAME:FINGERPRINT` of another; of an ensemble, all of them with +."""
        own = f"{self.name}:{self.card.get('registered', {}).get('number', self.version)}"
        return "+".join([own, *(each.identity for each in self.members)])

    def as_json(self) -> dict[str, Any]:
        """All of it in JSON types, as `from_json` takes it."""
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        onnx = str(self.onnx) if self.onnx is not None else None
        members = [each.as_json() for each in self.members]
        return {**plain, "torch": str(self.torch), "onnx": onnx, "members": members}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "ServedModel":
        """What `as_json` gave."""
        onnx = UPath(plain["onnx"]) if plain["onnx"] is not None else None
        members = tuple(map(cls.from_json, plain["members"]))
        return cls(**{**plain, "torch": UPath(plain["torch"]), "onnx": onnx, "members": members})

    def check(self, settings: ServeSettings) -> None:
        """Refuses what could not be served.

        Raises:
            InputError: there is no classifier, or no export though one is asked for.
        """
        settings = self._settled(settings)
        for each in self.members:
            each.check(settings)
        if not (self.torch / SPEC).exists():
            raise InputError(f"{self.torch} holds no classifier: there is no {SPEC} in it.")
        if settings.compile and self._wanted(settings) == "onnx":
            raise InputError(
                f"serve.compile is true, but {self.name} has an ONNX export, which serve.engine=auto takes and "
                "does not compile; set serve.engine=torch, or serve.compile=false."
            )
        if settings.engine == "onnx" and self.onnx is None:
            why = f" ({self.refused})" if self.refused else ""
            raise InputError(f"serve.engine is onnx, but {self.name} has no export{why}; set serve.engine=auto.")

    def verify(self, settings: ServeSettings) -> None:
        """Reads the files that a replica would load, in the store, and holds them against their digests.

        Raises:
            InputError: one is missing or not the one that was registered.
            OSError, BotoCoreError: the store cannot be read.
        """
        settings = self._settled(settings)
        for each in self.members:
            each.verify(settings)
        folder = self._folder(settings)
        folder.fs.invalidate_cache()
        check_files(folder, self.onnx_sha256 if folder == self.onnx else self.sha256)

    def load(self, settings: ServeSettings) -> Engine:
        """The engine that the settings ask for, warmed up; torch is imported only where it computes.

        Raises:
            InputError: a file is missing, damaged or not the registered one, or the model gives no finite numbers.
        """
        settings = self._settled(settings)
        engine = self._engine(settings)
        if self.members:
            engine = EnsembleEngine([engine, *(each._engine(settings) for each in self.members)])
        engine.also_mask(settings.redact)
        try:
            warm_up(engine, settings.batch_tokens)
        except InputError:
            raise
        except Exception as error:
            if not settings.compile:
                raise
            raise InputError(
                f"serve.compile is true, but the model cannot be compiled here ({first_line(error)}); set it to false."
            ) from error
        return engine

    def load_explainer(self, settings: ServeSettings) -> "Explainer":
        """What explains its answers: the classifier in torch, whatever engine answers. It imports torch.

        Raises:
            InputError: a file is missing, damaged or not the registered one.
        """
        from models.explaining import Explainer

        with local_copy(self.torch) as folder:
            check_files(UPath(folder), self.sha256, self.torch)
            with _only(folder, self.sha256) as seen:
                threads = max(1, round(settings.cpus))
                return Explainer(seen, self.temperature, threads=threads, redact=settings.redact)

    def _settled(self, settings: ServeSettings) -> ServeSettings:
        """The settings with one engine for all that answer as one: they share CPUs, and each engine in its own way."""
        if not self.members:
            return settings
        wanted = {each._wanted(settings) for each in (self, *self.members)}
        return settings.model_copy(update={"engine": "torch" if "torch" in wanted else "onnx"})

    def _wanted(self, settings: ServeSettings) -> str:
        if settings.engine == "auto":
            return "torch" if settings.gpus > 0 or self.onnx is None else "onnx"
        return settings.engine

    def _folder(self, settings: ServeSettings) -> UPath:
        return self.torch if self._wanted(settings) == "torch" or self.onnx is None else self.onnx

    def _engine(self, settings: ServeSettings) -> Engine:
        with local_copy(self._folder(settings)) as folder:
            return self._load(folder, settings, max(1, round(settings.cpus)))

    def _load(self, folder: Path, settings: ServeSettings, threads: int) -> Engine:
        if self._wanted(settings) == "onnx":
            from models.onnx_engine import NOTES, load_onnx_engine

            # The notes hold the digests of the other files, and the engine checks those.
            notes = {NOTES: self.onnx_sha256[NOTES]} if NOTES in self.onnx_sha256 else {}
            check_files(UPath(folder), notes, self.onnx)
            return load_onnx_engine(folder, lanes=threads, temperature=self.temperature)
        from models.torch_engine import load_torch_engine

        check_files(UPath(folder), self.sha256, self.torch)
        with _only(folder, self.sha256) as seen:
            return load_torch_engine(
                seen,
                precision=settings.precision,
                threads=threads,
                temperature=self.temperature,
                compile=settings.compile,
            )


def check_files(folder: UPath, sha256: Mapping[str, str], known_as: UPath | None = None) -> None:
    """Holds files in `folder`, which the user knows as another one where it is a copy, against their digests.

    Raises:
        InputError: one is missing or not the one that was registered.
    """
    if problem := difference(folder, sha256):
        raise InputError(f"{known_as or folder}/{problem}; restore it, or register and serve another version.")


@contextlib.contextmanager
def _only(folder: Path, names: Mapping[str, str]) -> Iterator[Path]:
    """The folder as if it held nothing but the files named, so that none beside them is read; itself where none is."""
    if not names:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="shoal-") as seen:
        for name in names:
            link = Path(seen) / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((folder / name).absolute())
        yield Path(seen)


def warm_up(engine: Engine, batch_tokens: int) -> None:
    """Computes the smallest, the largest and mixed batches, so that the first requests are as fast as the later ones.

    What is compiled has code of its own for a batch of one text, and for texts of one token where there are such.

    Raises:
        InputError: the model gives no finite numbers.
    """
    # What mends texts loads its tables at the first that needs it, which takes a sixth of a second.
    engine.encode(["caf\u00c3\u00a9 &amp;"], ["word"] if engine.spec.pair else None)
    longest = engine.spec.max_length
    for words in ([1], [longest] * max(1, batch_tokens // longest), [1, 2, longest // 2 + 1], [0], [0, 0], [2, 2]):
        texts = ["word " * count for count in words]
        encoded = engine.encode(texts, texts if engine.spec.pair else None)
        if not np.isfinite(engine.forward(encoded)).all():
            raise InputError("the model gives no finite numbers, so its training diverged; finetune it anew.")
