"""The API keys of a store at the command line: the key itself on the output, all that is said of it beside it."""

import sys
from collections.abc import Sequence
from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.store import Store
from recipes.listing import existing_store
from recipes.printing import plain_table, say
from serve.keys import ApiKey, parse_lifetime, read_keys
from serve.keys import create_key as make
from serve.keys import revoke_key as withdraw


def create(name: str, scopes: Sequence[str], expires: str | None, rate: float | None, store: str) -> None:
    """Makes a key and prints it alone on the output, so that a script can take it.

    Raises:
        ClusterError: the store cannot be read or written.
        InputError: one of the arguments cannot be.
    """
    lifetime = parse_lifetime(expires) if expires is not None else None
    key, shown = make(Store.open(store).root, name, scopes, lifetime=lifetime, rate=rate, tell=_aside)
    _aside(
        f"The key {key.id} for {key.name} allows {', '.join(key.scopes)} and {_until(key)}. It is shown this once; "
        "the store keeps only a digest."
    )
    sys.stdout.write(f"{shown}\n")


def revoke(key_id: str, store: str) -> None:
    """Revokes a key and says so.

    Raises:
        ClusterError: the store cannot be read or written.
        InputError: there is no such key, or no such store.
    """
    key = withdraw(existing_store(store).root, key_id, tell=_aside)
    say(f"The key {key.id} of {key.name} is revoked; running endpoints refuse it within seconds.")


def keys_table(store: str) -> Table:
    """A store's keys, in the order in which they were made.

    Raises:
        ClusterError: they cannot be read.
        InputError: there is no such store.
    """
    now = datetime.now(UTC)
    rows = [
        (
            key.id,
            key.name,
            ", ".join(key.scopes),
            f"{key.rate:g}/s" if key.rate is not None else "",
            _date(key.created),
            _date(key.expires) if key.expires else "never",
            key.state(now),
        )
        for key in read_keys(existing_store(store).root)
    ]
    return plain_table(rows, ("id", "name", "scopes", "rate", "made", "expires", "")) if rows else Table(box=None)


def _until(key: ApiKey) -> str:
    return f"expires at {_date(key.expires)}" if key.expires else "does not expire"


def _date(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _aside(sentence: str) -> None:
    Console(stderr=True).print(Text(sentence), soft_wrap=True)
