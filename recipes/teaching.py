"""A recipe's teacher by its registered name: the folder of the classifier that the version points at."""

from pathlib import Path

from cluster.digests import difference
from cluster.registry import Registry
from cluster.store import Store
from cluster.versions import Reference, RegistryError
from models.settings import InputError
from recipes.recipe import Recipe
from recipes.running import durable


def with_teacher_found(recipe: Recipe) -> Recipe:
    """The recipe with the folder of its teacher, where it names one as `NAME:NUMBER` or `NAME@ALIAS`.

    So an alias is looked up once, before anything runs: what it is pointed at later teaches nobody.

    Raises:
        InputError: the store has no such version, or its files are not those that were registered.
    """
    teacher = recipe.finetune.teacher
    if teacher is None or not _names_version(teacher):
        return recipe
    store = Store.open(durable(recipe.store))
    try:
        version = Registry(store).resolve(Reference.parse(teacher))
    except RegistryError as error:
        raise InputError(f"finetune.teacher: {error}") from error
    folder = store.root / version.torch
    if told := difference(folder, version.below(version.torch)):
        raise InputError(f"finetune.teacher: {version} cannot teach: of {folder}, {told}.")
    return recipe.model_copy(update={"finetune": recipe.finetune.model_copy(update={"teacher": str(folder)})})


def _names_version(reference: str) -> bool:
    """No path, no URL, and nothing here of that name."""
    return "/" not in reference and ("@" in reference or ":" in reference) and not Path(reference).exists()
