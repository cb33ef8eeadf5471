"""From artifacts to a version, and from a version to what a replica loads: nothing but the files registered."""

import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from upath import UPath

from cluster.registry import Registry
from cluster.store import Record, Store, upload_tree
from cluster.versions import Version
from models.settings import InputError
from models.torch_engine import load_torch_engine
from recipes.registering import register
from recipes.serving import following
from serve.model import ServedModel
from serve.registered import ensemble, served_model
from serve.settings import AbstainSettings, ServeSettings
from tests.finished_stages import PRINTS, put_artifacts
from tests.small_classifiers import CORPUS

TORCH = ServeSettings(engine="torch", precision="fp32", batch_tokens=64)
ONNX = ServeSettings(engine="onnx")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the artifacts of a classifier, registered once; to be copied before it is changed."""
    folder = tmp_path_factory.mktemp("made") / "store"
    store = Store.open(str(folder))
    register(Registry(store), "small", put_artifacts(store), recipe="small", note="the first")
    return folder


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Store:
    return Store.open(str(shutil.copytree(made, tmp_path / "store")))


def version_of(store: Store, number: int = 1) -> Version:
    return Registry(store).version("small", number)


def test_a_version_says_what_it_is_made_of(made: Path) -> None:
    version = version_of(Store(UPath(made)))
    assert version.artifacts == {stage: PRINTS[stage] for stage in ("finetune", "evaluate", "export")}
    assert (version.torch, version.onnx) == (f"finetune/{PRINTS['finetune']}/model", None)
    assert version.refused == "onnx int8: it loses 0.2 macro-F1"
    assert version.metrics == {"accuracy": 0.875, "macro_f1": 0.8125, "engine": "torch bf16", "agreement": 0.99}
    assert {"model.safetensors", "config.json", "classifier.json", "tokenizer.json"} <= set(
        version.below(version.torch)
    )
    evaluated = {"calibration.json", "abstention.json", "reference.json"}
    assert set(version.below(version.evaluated)) == evaluated
    assert version.lineage["prepare"].inputs == {"data": "d" * 32}
    assert set(version.lineage) == set(PRINTS)


def test_what_is_served_is_built_from_the_version_alone(store: Store) -> None:
    model = served_model(version_of(store), store, TORCH)
    assert (model.name, model.version, model.temperature) == ("small", PRINTS["finetune"], {"sentiment": 2.0})
    assert model.card["registered"]["number"] == 1
    assert model.card["metrics"]["baseline.accuracy"] == 0.5
    assert model.card["lineage"]["evaluate"]["inputs"]["finetune"] == PRINTS["finetune"]
    assert model.reference is not None
    assert model.reference["split"] == "validation"
    assert model.thresholds == {}
    json.dumps(model.card)
    model.verify(TORCH)
    expected = load_torch_engine(Path(model.torch.path), precision="fp32", temperature={"sentiment": 2.0})
    assert model.load(TORCH).classify(CORPUS) == expected.classify(CORPUS)


def test_thresholds_are_those_of_the_evaluation(store: Store) -> None:
    def thresholds(**wanted: float) -> dict[str, float]:
        settings = TORCH.model_copy(update={"abstain": AbstainSettings(**wanted)})
        return served_model(version_of(store), store, settings).thresholds

    assert thresholds(below=0.7) == {"sentiment": 0.7}
    assert thresholds(accuracy=0.85) == {"sentiment": 0.5}
    with pytest.raises(InputError, match=r"serve.abstain.accuracy is 0.95, but .* no more than 0.9000 of the answers"):
        thresholds(accuracy=0.95)


def test_versions_answer_together(store: Store) -> None:
    registry = Registry(store)
    other = PRINTS | {"finetune": "a" * 16, "evaluate": "b" * 16, "export": "c" * 16}
    artifacts = put_artifacts(store, other)
    shutil.copytree(store.root / version_of(store).torch, artifacts["finetune"].path / "model", dirs_exist_ok=True)
    (artifacts["evaluate"].path / "calibration.json").write_text('{"sentiment": 0.5}')
    register(registry, "small", artifacts)
    settings = TORCH.model_copy(update={"ensemble": ("small:1", "small:2")})
    model = ensemble(served_model(version_of(store), store, settings), registry, settings)
    assert (model.version, model.card["ensemble"]) == (f"{PRINTS['finetune']}+{'a' * 16}", ["small:2"])
    again = ServedModel.from_json(json.loads(json.dumps(model.as_json())))
    assert again == model
    alone = [served_model(version_of(store, number), store, TORCH).load(TORCH) for number in (1, 2)]
    said = [
        [list(answer.labels["sentiment"].probabilities.values()) for answer in each.classify(CORPUS)] for each in alone
    ]
    for answer, expected in zip(again.load(settings).classify(CORPUS), np.mean(said, axis=0), strict=True):
        assert list(answer.labels["sentiment"].probabilities.values()) == pytest.approx(expected, abs=1e-5)


def test_versions_that_answer_together_have_one_engine(store: Store) -> None:
    """One of the two has an export: each engine shares CPUs among texts in its own way."""
    registry = Registry(store)
    other = PRINTS | {"finetune": "a" * 16, "evaluate": "b" * 16, "export": "c" * 16}
    artifacts = put_artifacts(store, other, onnx=True)
    shutil.copytree(store.root / version_of(store).torch, artifacts["finetune"].path / "model", dirs_exist_ok=True)
    register(registry, "small", artifacts)
    settings = ServeSettings(precision="fp32", ensemble=("small:2", "small:1"))
    exported = served_model(version_of(store, 2), store, settings)
    assert exported.onnx is not None
    model = ensemble(exported, registry, settings)
    model.check(settings.model_copy(update={"compile": True}))
    assert model.load(settings).name == "torch"


def test_what_is_served_may_lie_on_s3(store: Store, bucket: str) -> None:
    upload_tree(Path(store.root.path), UPath(bucket) / "store")
    remote = Store.open(f"{bucket}/store")
    model = served_model(version_of(remote), remote, TORCH)
    model.verify(TORCH)
    assert len(model.load(TORCH).classify(CORPUS)) == len(CORPUS)
    (model.torch / "model.safetensors").write_bytes(b"another")
    for use in (model.verify, model.load):
        with pytest.raises(InputError, match=r"^s3://shoal/store/finetune/f+/model/model.safetensors is damaged or ch"):
            use(TORCH)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "classifier.json"])
def test_a_file_that_is_another_one_is_told_before_any_is_parsed(store: Store, name: str) -> None:
    model = served_model(version_of(store), store, TORCH)
    file = Path(model.torch.path) / name
    kept = file.read_bytes()
    with mock.patch("models.torch_engine.load_torch_engine") as parse:
        file.write_bytes(kept + b" ")
        for use in (model.verify, model.load):
            with pytest.raises(InputError, match=rf"/model/{name} is damaged or changed: its SHA-256 is not the one"):
                use(TORCH)
        file.unlink()
        for use in (model.verify, model.load):
            with pytest.raises(InputError, match=rf"/model/{name} is missing; restore it, or register and serve"):
                use(TORCH)
    parse.assert_not_called()


def test_files_beside_those_registered_are_not_seen(store: Store) -> None:
    model = served_model(version_of(store), store, TORCH)
    beside = Path(model.torch.path)
    (beside / "pytorch_model.bin").write_bytes(b"a pickle")
    (beside / "adapter_config.json").write_text("{")
    (beside / "added_tokens.json").write_text("{")
    assert len(model.load(TORCH).classify(CORPUS)) == len(CORPUS)


def test_a_classifier_with_code_of_its_own_is_refused(store: Store) -> None:
    model = served_model(version_of(store), store, TORCH)
    folder = Path(model.torch.path)
    ran = folder / "ran"
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own", "auto_map": {}}
    for name in ("AutoConfig", "AutoModelForSequenceClassification"):
        config["auto_map"][name] = "own.Own"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"import pathlib; pathlib.Path({str(ran)!r}).touch()")
    with pytest.raises(InputError, match="contains custom code"), mock.patch("builtins.input", return_value="y"):
        load_torch_engine(folder)
    assert not ran.exists()


def test_of_an_export_the_notes_are_checked_here_and_the_rest_by_the_engine(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path))
    version, _ = register(Registry(store), "small", put_artifacts(store, onnx=True))
    model = served_model(version, store, TORCH)
    assert set(model.onnx_sha256) == {"onnx.json", "model.onnx"}
    model.verify(ONNX)
    folder = store.root / str(version.onnx)
    with mock.patch("models.onnx_engine.load_onnx_engine") as load, mock.patch("serve.model.warm_up"):
        (folder / "model.onnx").write_text("another")
        model.load(ONNX)
        load.assert_called_once_with(Path(folder.path), lanes=1, temperature={"sentiment": 2.0})
        with pytest.raises(InputError, match=r"onnx/model\.onnx is damaged or changed"):
            model.verify(ONNX)
        (folder / "onnx.json").write_text("another")
        with pytest.raises(InputError, match=r"onnx/onnx\.json is damaged or changed"):
            model.load(ONNX)
        load.assert_called_once()


def test_registering_again_changes_nothing_unless_a_file_has(store: Store) -> None:
    registry = Registry(store)
    artifacts = {each.record.stage: each for each in store.artifacts()}
    first, new = register(registry, "small", artifacts)
    assert (first.number, first.note, new) == (1, "the first", False)
    (Path(artifacts["finetune"].path.path) / "model" / "README.md").write_text("hello")
    assert register(registry, "small", artifacts)[0].number == 2
    del artifacts["export"]
    third, _ = register(registry, "small", artifacts)
    assert (third.number, third.onnx, third.refused, "export" in third.artifacts) == (3, None, "", False)


@pytest.mark.parametrize("stage", ["finetune", "evaluate", "export"])
def test_an_artifact_that_was_removed_is_told(store: Store, stage: str) -> None:
    shutil.rmtree(store.folder(stage, PRINTS[stage]).path)
    told = f"small:1 needs the artifact {stage}/{PRINTS[stage]}, which is no longer in .*; run the recipe small again"
    with pytest.raises(InputError, match=told):
        served_model(version_of(store), store, TORCH)


def test_what_it_was_made_from_may_be_gone(store: Store) -> None:
    shutil.rmtree(store.folder("prepare", PRINTS["prepare"]).path)
    assert served_model(version_of(store), store, TORCH).card["lineage"]["prepare"]["inputs"] == {"data": "d" * 32}


def test_another_calibration_is_told(store: Store) -> None:
    (store.root / version_of(store).evaluated / "calibration.json").write_text('{"sentiment": 0.1}')
    with pytest.raises(InputError, match=r"calibration\.json is damaged or changed"):
        served_model(version_of(store), store, TORCH)


def test_an_endpoint_follows_the_alias_in_the_store(store: Store) -> None:
    registry = Registry(store)
    registry.set_alias("small", "stable", 1)
    other = PRINTS | {"finetune": "a" * 16, "evaluate": "b" * 16, "export": "c" * 16}
    second, _ = register(registry, "small", put_artifacts(store, other))
    served: list[str] = []
    told: list[str] = []

    def serve(model: ServedModel) -> None:
        served.append(model.version)

    follower = following(registry, "stable", version_of(store), TORCH, serve, told.append)
    follower.look()
    registry.set_alias("small", "stable", second.number)
    follower.look()
    assert served == ["a" * 16]
    # Back to the first, whose weights are no longer what they were.
    (store.root / version_of(store).torch / "model.safetensors").write_bytes(b"")
    registry.set_alias("small", "stable", 1)
    follower.look()
    assert "small:1 cannot be served: " in told[-1]
    assert "model.safetensors is damaged or changed" in told[-1]
    assert told[-1].endswith("small:2 keeps serving.")
    registry.remove_alias("small", "stable")
    follower.look()
    assert "small has no alias stable" in told[-1]
    assert served == ["a" * 16]


def test_a_damaged_record_is_told(store: Store) -> None:
    (store.folder("evaluate", PRINTS["evaluate"]) / "artifact.json").write_text("{")
    with pytest.raises(InputError, match=r"the record of .*/evaluate/e+ is damaged"):
        served_model(version_of(store), store, TORCH)


def test_roles_are_found_among_the_ancestors(store: Store) -> None:
    without = Record("finetune", "w" * 16, {}, {"prepare": PRINTS["prepare"]}, {}, {}, "small")
    store.folder("finetune", "w" * 16).mkdir()
    store.commit(without)
    inputs = {"finetune": PRINTS["finetune"], "without_pretraining": "w" * 16}
    (folder := store.folder("evaluate", "v" * 16)).mkdir()
    for name in ("calibration.json", "abstention.json", "reference.json"):
        (folder / name).write_text("{}")
    compared = store.commit(Record("evaluate", "v" * 16, {}, inputs, {}, {}, "small"))
    tuned = store.find("finetune", PRINTS["finetune"])
    assert tuned is not None
    version, _ = register(Registry(store), "small", {"finetune": tuned, "evaluate": compared})
    assert version.lineage["without_pretraining"].fingerprint == "w" * 16
