"""From a recipe to its plan: the stages, in order, each with its fingerprint."""

from typing import cast

from models.architectures import ScratchEncoder
from pipelines import evaluate, export, finetune, pack, prepare, pretrain, sweep
from pipelines.pack import PackStageSettings
from pipelines.prepare import PrepareStageSettings
from pipelines.pretrained import PRETRAINED
from pipelines.stage import PlannedStage, Stage
from pipelines.sweep import SweepStageSettings
from recipes.recipe import Recipe
from recipes.teaching import with_teacher_found


def plan(recipe: Recipe) -> dict[str, PlannedStage]:
    """The recipe's stages by what they are to it, in the order they run.

    Raises:
        InputError: something the recipe refers to (data, encoder, teacher) is not there.
    """
    recipe = with_teacher_found(recipe)
    before = _pretraining(recipe)
    own = recipe.finetune.encoder == PRETRAINED
    # What the fine-tuned encoder was, where the recipe pretrains it.
    first = recipe.pretrain.encoder if own and recipe.pretrain else recipe.finetune.encoder
    settings = PrepareStageSettings(
        data=recipe.data,
        prepare=recipe.prepare,
        encoder=first if isinstance(first, str) and recipe.prepare.tokenizer is None else None,
    )
    trained_tokenizer = (before["pack"],) if own and isinstance(first, ScratchEncoder) else ()
    prepared = PlannedStage(cast(Stage, prepare), settings, trained_tokenizer, prepare.externals(settings))
    given = (prepared, before[PRETRAINED]) if own else (prepared,)
    found = _sweep(recipe, given)
    tuned = PlannedStage(
        cast(Stage, finetune), recipe.finetune, (*given, *found.values()), finetune.externals(recipe.finetune)
    )
    compared, without = [prepared, tuned], {}
    if recipe.evaluate.without_pretraining:
        same = recipe.finetune.model_copy(update={"encoder": first})
        role = evaluate.WITHOUT_PRETRAINING
        without = {
            role: PlannedStage(cast(Stage, finetune), same, (prepared, *found.values()), finetune.externals(same), role)
        }
        compared += without.values()
    evaluated = PlannedStage(
        cast(Stage, evaluate), recipe.evaluate, tuple(compared), evaluate.externals(recipe.evaluate)
    )
    planned = before | {prepared.name: prepared} | found | {tuned.name: tuned} | without | {evaluated.name: evaluated}
    if recipe.export is None:
        return planned
    inputs = (prepared, tuned, evaluated)
    exported = PlannedStage(cast(Stage, export), recipe.export, inputs, export.externals(recipe.export))
    return planned | {exported.name: exported}


def _sweep(recipe: Recipe, inputs: tuple[PlannedStage, ...]) -> dict[str, PlannedStage]:
    """The stage that searches the fine-tuning's settings."""
    if recipe.sweep is None:
        return {}
    settings = SweepStageSettings(sweep=recipe.sweep, finetune=recipe.finetune)
    planned = PlannedStage(cast(Stage, sweep), settings, inputs, sweep.externals(settings))
    return {planned.name: planned}


def _pretraining(recipe: Recipe) -> dict[str, PlannedStage]:
    """The stages that make the recipe's own encoder."""
    if recipe.pack is None or recipe.pretrain is None:
        return {}
    encoder = recipe.pretrain.encoder
    settings = PackStageSettings(
        pack=recipe.pack,
        encoder=encoder if isinstance(encoder, str) else None,
        sentinels=recipe.pretrain.objective == "span",
    )
    packed = PlannedStage(cast(Stage, pack), settings, (), pack.externals(settings))
    pretrained = PlannedStage(cast(Stage, pretrain), recipe.pretrain, (packed,), pretrain.externals(recipe.pretrain))
    return {packed.name: packed, pretrained.name: pretrained}
