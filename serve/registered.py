"""From a registered version to what is served: everything that a replica needs stands in the version and the store."""

import json
from dataclasses import replace
from typing import Any

from cluster.registry import Registry
from cluster.store import Artifact, Store
from cluster.versions import Reference, Version
from models.abstaining import Abstaining, threshold_for
from models.settings import InputError
from serve.model import ServedModel, check_files
from serve.settings import ServeSettings

CALIBRATION, ABSTENTION, REFERENCE = EVALUATED = ("calibration.json", "abstention.json", "reference.json")
"""What of an evaluation is served with its classifier."""


def served_model(version: Version, store: Store, settings: ServeSettings) -> ServedModel:
    """What a registered version serves, without the recipe that made it.

    Raises:
        InputError: an artifact that it points at is not in the store, a file of its evaluation is not the registered
            one, or no threshold makes answers right as often as `serve.abstain` asks for.
    """
    parts = {stage: _artifact(version, stage, store) for stage in version.artifacts}
    evaluated = _evaluated(version, store)
    return ServedModel(
        name=version.name,
        version=version.artifacts["finetune"],
        torch=store.root / version.torch,
        onnx=store.root / version.onnx if version.onnx else None,
        refused=version.refused,
        temperature=evaluated[CALIBRATION],
        thresholds=_thresholds(settings, evaluated[ABSTENTION]),
        reference=evaluated[REFERENCE],
        card={
            "registered": {"model": version.name, "number": version.number, "created": version.created},
            "metrics": parts["evaluate"].record.metrics,
            "lineage": {name: ancestor.model_dump() for name, ancestor in version.lineage.items()},
            "versions": parts["finetune"].record.versions,
        },
        sha256=version.below(version.torch),
        onnx_sha256=version.below(version.onnx) if version.onnx else {},
    )


def answering_model(version: Version, registry: Registry, settings: ServeSettings) -> ServedModel:
    """What answers where a version is served: it alone, or together with those of `serve.ensemble`.

    Raises:
        InputError: it, or one of them, cannot be served.
        ClusterError: there is no such model, alias or version.
    """
    return ensemble(served_model(version, registry.store, settings), registry, settings)


def ensemble(model: ServedModel, registry: Registry, settings: ServeSettings) -> ServedModel:
    """The model together with those of `serve.ensemble`, if it names any.

    Raises:
        InputError: one of them cannot be served.
        ClusterError: there is no such model, alias or version.
    """
    versions = [registry.resolve(Reference.parse(text)) for text in settings.ensemble]
    members = [served_model(version, registry.store, settings) for version in versions]
    members = [each for each in members if each.identity != model.identity]
    if not members:
        return model
    names = [each.identity for each in members]
    return replace(
        model,
        version="+".join([model.version, *(each.version for each in members)]),
        card={**model.card, "ensemble": names},
        members=tuple(members),
    )


def _artifact(version: Version, stage: str, store: Store) -> Artifact:
    fingerprint = version.artifacts[stage]
    try:
        found = store.find(stage, fingerprint)
    except (ValueError, TypeError) as error:
        raise InputError(f"the record of {store.folder(stage, fingerprint)} is damaged; make it again.") from error
    if found is None:
        made = f"run the recipe {version.recipe} again, which makes it anew" if version.recipe else "make it again"
        raise InputError(
            f"{version} needs the artifact {stage}/{fingerprint}, which is no longer in {store.root}; {made}."
        )
    return found


def _evaluated(version: Version, store: Store) -> dict[str, Any]:
    """The files of the evaluation, by name."""
    folder = store.root / version.evaluated
    check_files(folder, {name: version.sha256.get(f"{version.evaluated}/{name}", "") for name in EVALUATED})
    return {name: json.loads(folder.fs.cat_file((folder / name).path)) for name in EVALUATED}


def _thresholds(settings: ServeSettings, curves: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """By single-label column, the probability below which no class is answered."""
    wanted = settings.abstain
    if wanted is None:
        return {}
    if wanted.below is not None:
        return dict.fromkeys(curves, wanted.below)
    assert wanted.accuracy is not None
    found = {}
    for name, each in curves.items():
        curve = [Abstaining(**point) for point in each]
        threshold = threshold_for(wanted.accuracy, curve)
        if threshold is None:
            best = max((point.accuracy for point in curve), default=0.0)
            raise InputError(
                f"serve.abstain.accuracy is {wanted.accuracy:g}, but whatever is left unanswered, no more than "
                f"{best:.4f} of the answers for {name} were right in validation; set it lower."
            )
        found[name] = threshold
    return found
