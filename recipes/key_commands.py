"""The commands `shoal keys ...`: the endpoint's API keys."""

from typing import Annotated

import typer

from recipes.arguments import StoreOption
from recipes.printing import console_on

keys = typer.Typer(name="keys", help="API keys of the endpoint: make, list and revoke them.", no_args_is_help=True)


@keys.command("create", epilog="Example: shoal keys create support-team --scope classify --expires 90d")
def create_key(
    name: Annotated[str, typer.Argument(help="Whose it is or what for; shown by `shoal keys list`.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="What it allows: classify (the default), explain, metrics, or admin, which allows all; may be given "
            "several times."
        ),
    ] = None,
    expires: Annotated[str | None, typer.Option(metavar="SPAN", help="After which it expires: 12h, 90d, 2w.")] = None,
    rate: Annotated[float | None, typer.Option(help="Requests a second of its own, in place of serve.rate.")] = None,
    store: StoreOption = "shoal-store",
) -> None:
    """Make an API key and print it, this once."""
    from recipes.keys import create

    create(name, scope or ["classify"], expires, rate, store)


@keys.command("list", epilog="Example: shoal keys list --store s3://bucket/shoal")
def list_keys(store: StoreOption = "shoal-store") -> None:
    """List the API keys in a store: whose they are, what they allow, how long they are valid."""
    from recipes.keys import keys_table

    console_on().print(keys_table(store))


@keys.command("revoke", epilog="Example: shoal keys revoke 1f0c2a9d")
def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Its id, as `shoal keys list` shows it.")],
    store: StoreOption = "shoal-store",
) -> None:
    """Revoke an API key for ever; running endpoints refuse it within seconds."""
    from recipes.keys import revoke

    revoke(key_id, store)
