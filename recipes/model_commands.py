"""The commands `shoal models ...`: versions of models and their aliases. They parse, call, and say what was done."""

import json
import sys
from typing import Annotated

import typer

from cluster.registry import STABLE, Registry
from cluster.versions import Reference, check_alias, check_name
from recipes.arguments import Overrides, RecipeArgument, StoreOption
from recipes.printing import console_on, say
from recipes.running import completed_parts

models = typer.Typer(
    name="models",
    help="Register versions of models, and point aliases at them.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

NameArgument = Annotated[str, typer.Argument(help="A registered model, e.g. airline.")]
AliasArgument = Annotated[str, typer.Argument(help=f"An alias, e.g. {STABLE}.")]
ReasonOption = Annotated[str, typer.Option(help="Why; it is kept in the aliases' history.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]


@models.command(epilog='Example: shoal models register recipes/airline.yaml --alias candidate --note "more tweets"')
def register(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="What to call the model; by default, the recipe's name.")] = None,
    note: Annotated[str, typer.Option(help="A few words about this version.")] = "",
    alias: Annotated[str | None, typer.Option(help="An alias to point at it, e.g. candidate.")] = None,
) -> None:
    """Complete a recipe's stages and register what they made as the model's next version."""
    from recipes.registering import PARTS, registered_sentence
    from recipes.registering import register as register_artifacts

    if name is not None:
        check_name(name)
    if alias is not None:
        check_alias(alias)
    loaded, store, artifacts = completed_parts(recipe, overrides, PARTS)
    registry = Registry(store, say)
    version, new = register_artifacts(registry, name or loaded.name, artifacts, recipe=loaded.name, note=note)
    say(registered_sentence(version, new=new))
    if alias is not None:
        _point(registry, version.name, alias, version.number, note or "registered")


@models.command("list", epilog="Examples: shoal models list    shoal models list airline --store s3://bucket/shoal")
def list_versions(
    name: Annotated[str | None, typer.Argument(help="A registered model; by default, all.")] = None,
    store: StoreOption = "shoal-store",
) -> None:
    """List the versions of models, their aliases and metrics."""
    from recipes.listing import existing_store
    from recipes.model_listing import versions_table

    registry = Registry(existing_store(store))
    names = registry.names() if name is None else [name]
    if not names:
        say(f"No model is registered in {store}; `shoal models register RECIPE` registers one.")
        return
    console_on().print(versions_table(registry, names))


@models.command(epilog="Examples: shoal models show airline    shoal models show airline@candidate --json")
def show(
    model: Annotated[str, typer.Argument(metavar="NAME[@ALIAS|:NUMBER]", help="A version; of a name alone, stable.")],
    store: StoreOption = "shoal-store",
    as_json: AsJson = False,
) -> None:
    """Show a version: its metrics, lineage and files, and how the model's aliases changed."""
    from recipes.listing import existing_store
    from recipes.model_listing import print_version

    registry = Registry(existing_store(store))
    version = registry.resolve(Reference.parse(model))
    if as_json:
        sys.stdout.write(json.dumps(version.model_dump(), indent=2, ensure_ascii=False) + "\n")
    else:
        print_version(version, registry, console_on())


@models.command(epilog='Example: shoal models alias airline stable 4 --reason "a week as candidate without complaints"')
def alias(
    name: NameArgument,
    alias: AliasArgument,
    number: Annotated[int, typer.Argument(min=1, help="The version to point it at.")],
    reason: ReasonOption = "",
    store: StoreOption = "shoal-store",
) -> None:
    """Point an alias at a version; endpoints that follow it serve that one a few seconds later."""
    from recipes.listing import existing_store

    _point(Registry(existing_store(store), say), name, alias, number, reason)


@models.command(epilog="Example: shoal models remove-alias airline candidate")
def remove_alias(
    name: NameArgument,
    alias: AliasArgument,
    reason: ReasonOption = "",
    store: StoreOption = "shoal-store",
) -> None:
    """Remove an alias; the version stays, and so do endpoints that serve it."""
    from recipes.listing import existing_store

    change = Registry(existing_store(store), say).remove_alias(name, alias, reason)
    say(f"{name}@{alias} is removed; it was {name}:{change.before}.")


def _point(registry: Registry, name: str, alias: str, number: int, reason: str) -> None:
    change = registry.set_alias(name, alias, number, reason)
    if change is None:
        say(f"{name}@{alias} is {name}:{number} already.")
    else:
        was = f", after {name}:{change.before}" if change.before else ""
        say(f"{name}@{alias} is {name}:{number} now{was}.")
