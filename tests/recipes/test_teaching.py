"""A teacher named as a registered version is found before anything runs, and is what was registered."""

from pathlib import Path

import pytest

from cluster.registry import Registry
from cluster.store import Store
from models.settings import InputError
from recipes.loading import load_recipe
from recipes.planning import plan
from recipes.registering import register
from tests.finished_stages import PRINTS, put_artifacts
from tests.making import make_encoder

RECIPE = """name: toy
store: {folder}/store
data: {{source: {folder}/a.csv, labels: sentiment}}
finetune: {{encoder: {folder}/encoder}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Beside a store with one registered version."""
    make_encoder(tmp_path / "encoder")
    (tmp_path / "a.csv").write_text("text,sentiment\nword1,positive\nword2,negative\n")
    store = Store.open(str(tmp_path / "store"))
    registry = Registry(store)
    register(registry, "big", put_artifacts(store))
    registry.set_alias("big", "stable", 1)
    path = tmp_path / "toy.yaml"
    path.write_text(RECIPE.format(folder=tmp_path))
    return path


def test_a_version_is_its_classifier(recipe: Path) -> None:
    folder = recipe.parent / "store" / "finetune" / PRINTS["finetune"] / "model"
    planned = [plan(load_recipe(recipe, [f"finetune.teacher={name}"])) for name in ("big:1", "big@stable", folder)]
    for each in planned:
        assert each["finetune"].lineage["teacher"] == PRINTS["finetune"]
        assert each["finetune"].settings.teacher == str(folder)  # type: ignore[attr-defined]
    assert len({each["finetune"].fingerprint for each in planned}) == 1
    alone = plan(load_recipe(recipe))
    assert alone["finetune"].fingerprint != planned[0]["finetune"].fingerprint
    assert alone["prepare"].fingerprint == planned[0]["prepare"].fingerprint


@pytest.mark.parametrize(
    ("teacher", "told"),
    [
        ("big:2", r"big has no version 2 in .*; it has 1\."),
        ("small@stable", r"has no model small"),
        ("big@Stable", r"'Stable' cannot be an alias"),
        ("big", r"big does not exist"),
    ],
)
def test_a_version_that_is_not_there_is_told(teacher: str, told: str, recipe: Path) -> None:
    with pytest.raises(InputError, match=rf"^finetune\.teacher: .*{told}"):
        plan(load_recipe(recipe, [f"finetune.teacher={teacher}"]))


def test_a_version_whose_files_are_others_does_not_teach(recipe: Path) -> None:
    file = recipe.parent / "store" / "finetune" / PRINTS["finetune"] / "model" / "config.json"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(InputError, match=r"^finetune\.teacher: big:1 cannot teach: of .*, config\.json is damaged or"):
        plan(load_recipe(recipe, ["finetune.teacher=big:1"]))
