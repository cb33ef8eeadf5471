"""From a recipe to its plan: the stages, in order, each with its fingerprint."""

from typing import cast

from pipelines import evaluate, finetune, prepare
from pipelines.prepare import PrepareStageSettings
from pipelines.stage import PlannedStage, Stage
from recipes.recipe import Recipe


def plan(recipe: Recipe) -> dict[str, PlannedStage]:
    """The recipe's stages by name, in the order they run.

    Raises:
        InputError: something the recipe refers to (data, encoder) is not there.
    """
    encoder = recipe.finetune.encoder
    settings = PrepareStageSettings(
        data=recipe.data,
        prepare=recipe.prepare,
        encoder=encoder if isinstance(encoder, str) and recipe.prepare.tokenizer is None else None,
    )
    prepared = PlannedStage(cast(Stage, prepare), settings, (), prepare.externals(settings))
    tuned = PlannedStage(cast(Stage, finetune), recipe.finetune, (prepared,), finetune.externals(recipe.finetune))
    evaluated = PlannedStage(
        cast(Stage, evaluate), recipe.evaluate, (prepared, tuned), evaluate.externals(recipe.evaluate)
    )
    return {planned.name: planned for planned in (prepared, tuned, evaluated)}
