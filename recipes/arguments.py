"""Arguments and options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[Path, typer.Argument(help="The recipe, e.g. recipes/airline.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings with dots, e.g. finetune.learning_rate=5e-5."),
]
StoreOption = Annotated[str, typer.Option("--store", help="A folder, or s3://BUCKET/PREFIX.")]
