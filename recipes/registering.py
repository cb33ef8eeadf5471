"""From a recipe's artifacts to a registered version: what it points at, its lineage, and the digests of its files."""

import json
from collections.abc import Mapping

from upath import UPath

from cluster.digests import digest, digests
from cluster.registry import Registry
from cluster.store import STORAGE_ERRORS, Artifact, ClusterError, Store, sentence_of
from cluster.versions import Ancestor, Content, Version
from models.onnx_engine import NOTES
from pipelines.export import ONNX
from serve.registered import EVALUATED

PARTS = ("finetune", "evaluate", "export")
"""The stages whose artifacts a version is made of, as far as the recipe has them."""

_TELLING = {"evaluate": ("accuracy", "subset_accuracy", "macro_f1"), "export": ("engine", "agreement")}


def register(
    registry: Registry, name: str, artifacts: Mapping[str, Artifact], *, recipe: str = "", note: str = ""
) -> tuple[Version, bool]:
    """Registers what the artifacts hold as the model's next version; whether it is a new one.

    Reads every file of the classifier once. The same artifacts with the same files are the version that they were.

    Raises:
        ClusterError: the store cannot be read or written, or a file of the registry is damaged.
    """
    return registry.register(name, content_of(registry.store, artifacts, recipe), note)


def registered_sentence(version: Version, *, new: bool) -> str:
    """What registering came to."""
    if new:
        return f"{version} is registered."
    return f"{version} was registered before, on {version.created[:16].replace('T', ' ')}; nothing has changed."


def content_of(store: Store, artifacts: Mapping[str, Artifact], recipe: str = "") -> Content:
    """What a version of these artifacts (finetune, evaluate, export where there is one) points at.

    Raises:
        ClusterError: the store cannot be read.
    """
    parts = {name: artifacts[name] for name in PARTS if name in artifacts}
    model, evaluated = parts["finetune"].path / "model", parts["evaluate"].path
    try:
        onnx, refused = _export(parts.get("export"))
        folders = [model, *([onnx] if onnx else [])]
        sha256 = {_inside(store, each / name): sha for each in folders for name, sha in digests(each).items()}
        sha256 |= {_inside(store, evaluated / name): digest(evaluated / name) for name in EVALUATED}
    except STORAGE_ERRORS as error:
        raise ClusterError(f"an artifact cannot be read: {sentence_of(error)}.") from error
    return Content(
        artifacts={name: artifact.record.fingerprint for name, artifact in parts.items()},
        torch=_inside(store, model),
        onnx=_inside(store, onnx) if onnx else None,
        refused=refused,
        evaluated=_inside(store, evaluated),
        sha256=sha256,
        metrics=_telling(parts),
        lineage=_lineage(store, parts),
        recipe=recipe,
    )


def _export(exported: Artifact | None) -> tuple[UPath | None, str]:
    """Where the export stands, or why there is none."""
    if exported is None:
        return None, ""
    folder = exported.path / ONNX
    if (folder / NOTES).exists():
        return folder, ""
    refused = json.loads((exported.path / "export.json").read_text(encoding="utf-8"))["refused"]
    return None, "; ".join(f"{name}: {why}" for name, why in refused.items())


def _inside(store: Store, path: UPath) -> str:
    return path.relative_to(store.root).as_posix()


def _telling(parts: Mapping[str, Artifact]) -> dict[str, float | str]:
    """The metrics that tell versions apart; those of a label column follow its name and a dot."""
    return {
        name: value
        for stage, wanted in _TELLING.items()
        if stage in parts
        for name, value in parts[stage].record.metrics.items()
        if name.rpartition(".")[2] in wanted and name.partition(".")[0] not in ("baseline", "without_pretraining")
    }


def _lineage(store: Store, parts: Mapping[str, Artifact]) -> dict[str, Ancestor]:
    """The artifacts and all that they were made from, as far as the store has it."""
    found: dict[str, Ancestor] = {}
    pending = list(parts.items())
    while pending:
        name, artifact = pending.pop(0)
        if name in found:
            continue
        found[name] = Ancestor(fingerprint=artifact.record.fingerprint, inputs=artifact.record.inputs)
        parents = {each: store.find_input(each, identity) for each, identity in artifact.record.inputs.items()}
        pending += [(each, parent) for each, parent in parents.items() if parent]
    return found
