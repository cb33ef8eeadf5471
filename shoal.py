"""The front door: the `shoal` command. Parses, calls, and tells mistakes in one sentence."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.store import ClusterError, Store
from models.settings import InputError

app = typer.Typer(
    name="shoal",
    help="From text to an autoscaled classification endpoint on an elastic Ray cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[Path, typer.Argument(help="The recipe's file, for example recipes/airline.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings with dots, for example finetune.learning_rate=5e-5.")
]


@app.command()
def check(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Validate a recipe and print its plan: each stage, its fingerprint, reused or to run."""
    from pipelines.progress import Progress
    from recipes.loading import load_recipe
    from recipes.planning import plan

    loaded = load_recipe(recipe, overrides or ())
    store = Store.open(loaded.store)
    rows = [
        (name, planned.fingerprint, "reused" if store.find(name, planned.fingerprint) else "to run")
        for name, planned in plan(loaded).items()
    ]
    Progress(Console()).table(f"{recipe} is valid.", rows, ("stage", "fingerprint", ""))


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(help="The last stage to run.")] = None,
) -> None:
    """Run a recipe's stages; those whose artifact is in the store are reused."""
    from cluster.connect import connected
    from pipelines.progress import Progress
    from pipelines.stage import complete
    from recipes.loading import load_recipe
    from recipes.planning import plan

    loaded = load_recipe(recipe, overrides or ())
    store = Store.open(loaded.store)
    planned = plan(loaded)
    last = until or list(planned)[-1]
    if last not in planned:
        raise InputError(f"--until {last}: there is no such stage; there are {', '.join(planned)}.")
    progress = Progress()
    if all(store.find(s.name, s.fingerprint) for s in planned.values()):
        return
    with connected():
        complete(planned[last], store, progress, loaded.name)


def main() -> None:
    """Runs the command; a user's mistake ends in one sentence and status 2."""
    try:
        app()
    except (InputError, ClusterError) as error:
        Console(stderr=True).print(f"[red]shoal:[/red] {error}", soft_wrap=True, highlight=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
