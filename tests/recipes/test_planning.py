"""What a recipe's stages build on, seen from their fingerprints."""

from pathlib import Path

import pytest

from pipelines.stage import PlannedStage
from recipes.loading import load_recipe
from recipes.planning import plan
from tests.making import make_encoder

RECIPE = """name: toy
data: {{source: {folder}/a.csv, labels: label}}
pack: {{sources: {folder}/texts.txt, length: 32}}
pretrain: {{encoder: {folder}/encoder}}
prepare: {{max_length: 32}}
finetune: {{encoder: pretrain}}
"""
SCRATCH = ["pack.tokenizer={vocabulary: 500}", "pretrain.encoder={size: tiny}"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    make_encoder(tmp_path / "encoder")
    (tmp_path / "a.csv").write_text("text,label\nword1,a\nword2,b\n")
    (tmp_path / "texts.txt").write_text("word1 word2\n")
    path = tmp_path / "toy.yaml"
    path.write_text(RECIPE.format(folder=tmp_path))
    return path


def planned(recipe: Path, *overrides: str) -> dict[str, PlannedStage]:
    return plan(load_recipe(recipe, overrides))


def changed(recipe: Path, before: list[str], after: list[str]) -> set[str]:
    """The stages that some overrides have made anew."""
    first, second = planned(recipe, *before), planned(recipe, *before, *after)
    return {name for name in second if name not in first or first[name].fingerprint != second[name].fingerprint}


def test_stages_come_in_the_order_they_run(recipe: Path) -> None:
    assert list(planned(recipe)) == ["pack", "pretrain", "prepare", "finetune", "evaluate", "export"]
    assert list(planned(recipe, "pack=null", "pretrain=null", f"finetune.encoder={recipe.parent}/encoder")) == [
        "prepare",
        "finetune",
        "evaluate",
        "export",
    ]


def test_what_changes_the_pretraining_changes_what_builds_on_it(recipe: Path) -> None:
    assert changed(recipe, [], ["pretrain.rate=0.3"]) == {"pretrain", "finetune", "evaluate", "export"}
    assert changed(recipe, [], ["pretrain.workers=2"]) == set()
    # Its own tokenizer serves an encoder that goes on learning; the labelled data is prepared once.
    assert changed(recipe, [], ["pack.length=16"]) == {"pack", "pretrain", "finetune", "evaluate", "export"}
    # A trained one comes from the packed texts.
    assert "prepare" in changed(recipe, SCRATCH, ["pack.seed=1"])


def test_other_texts_are_another_corpus(recipe: Path) -> None:
    before = planned(recipe)
    (recipe.parent / "texts.txt").write_text("word3 word4\n")
    assert planned(recipe)["pack"].fingerprint != before["pack"].fingerprint


@pytest.mark.parametrize("scratch", [False, True])
def test_the_comparison_is_the_same_fine_tuning_of_the_encoder_as_it_was(recipe: Path, scratch: bool) -> None:
    own = SCRATCH if scratch else []
    stages = planned(recipe, *own, "evaluate.without_pretraining=true")
    prepared, tuned, without = stages["evaluate"].inputs
    assert list(stages)[-3:] == ["without_pretraining", "evaluate", "export"]
    assert (prepared, tuned) == (stages["prepare"], stages["finetune"])
    assert without.name == "finetune"
    assert without.inputs == (stages["prepare"],)
    assert without.fingerprint != tuned.fingerprint
    assert set(stages["evaluate"].lineage) == {"prepare", "finetune", "without_pretraining"}
    if not scratch:  # It is the artifact of the recipe that has no pretraining.
        plain = planned(recipe, "pack=null", "pretrain=null", f"finetune.encoder={recipe.parent}/encoder")
        assert without.fingerprint == plain["finetune"].fingerprint
