"""From a registered version to what is served: everything that a replica needs stands in the version and the store."""

import json

from cluster.store import Artifact, Store
from cluster.versions import Version
from models.settings import InputError
from serve.model import ServedModel, check_files


def served_model(version: Version, store: Store) -> ServedModel:
    """What a registered version serves, without the recipe that made it.

    Raises:
        InputError: an artifact that it points at is not in the store, or its calibration is not the registered one.
    """
    parts = {stage: _artifact(version, stage, store) for stage in version.artifacts}
    return ServedModel(
        name=version.name,
        version=version.artifacts["finetune"],
        torch=store.root / version.torch,
        onnx=store.root / version.onnx if version.onnx else None,
        refused=version.refused,
        temperature=_temperature(version, store),
        card={
            "registered": {"model": version.name, "number": version.number, "created": version.created},
            "metrics": parts["evaluate"].record.metrics,
            "lineage": {name: ancestor.model_dump() for name, ancestor in version.lineage.items()},
            "versions": parts["finetune"].record.versions,
        },
        sha256=version.below(version.torch),
        onnx_sha256=version.below(version.onnx) if version.onnx else {},
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


def _temperature(version: Version, store: Store) -> dict[str, float]:
    path = store.root / version.calibration
    check_files(path.parent, {path.name: version.sha256.get(version.calibration, "")})
    found: dict[str, float] = json.loads(path.fs.cat_file(path.path))
    return found
