"""Turning an endpoint from one table of who answers what to another, with all its replicas."""

import contextlib
import time
from typing import Any

from ray import serve as ray_serve
from ray.serve._private.common import ReplicaState

from cluster.store import ClusterError
from serve.traffic import Table, read_table, reports, write_table

APPLICATION = "shoal"

_FRESH_S = 3.0
"""A replica tells its report every half second; after this it is gone, or loading."""
_TIMEOUT_S = 900.0


def next_table(**changes: Any) -> Table:
    """Writes the table that follows the present one, with these changes, and gives it."""
    before = read_table() or Table()
    table = before.model_copy(update={**changes, "revision": before.revision + 1})
    write_table(table)
    return table


def turn(**changes: Any) -> Table:
    """Turns all replicas to the next table, and gives it; where one cannot follow, all go back to the former.

    Raises:
        ClusterError: a replica cannot do what is asked, or they take too long.
    """
    before = read_table() or Table()
    table = next_table(**changes)
    try:
        await_replicas(table)
    except ClusterError:
        if back := put_back(before, table):
            with contextlib.suppress(ClusterError):
                await_replicas(back)
        raise
    return table


def put_back(before: Table, table: Table) -> Table | None:
    """Writes what stood before a table again, and gives it; does nothing where somebody wrote a later one."""
    if _latest() != table.revision:
        return None
    back = before.model_copy(update={"revision": table.revision + 1})
    write_table(back)
    return back


def await_replicas(table: Table) -> None:
    """Returns when all replicas follow the table.

    Raises:
        ClusterError: one cannot do what the table asks, they take too long, or another process wrote a later table.
    """
    until = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < until:
        told = reports(_FRESH_S).values()
        for each in told:
            if each.refused == table.revision:
                raise ClusterError(each.trouble)
        following = sum(each.revision == table.revision for each in told)
        if following >= running_replicas(APPLICATION) and all(each.revision >= table.revision for each in told):
            return
        if _latest() > table.revision:
            raise ClusterError("another process has turned the endpoint to something else meanwhile.")
        time.sleep(0.2)
    raise ClusterError(f"after {_TIMEOUT_S:g} s not all replicas answer by what was asked for; their logs say why.")


def _latest() -> int:
    table = read_table()
    return table.revision if table else 0


def running_replicas(name: str) -> int:
    """How many replicas of an application take requests."""
    application = ray_serve.status().applications.get(name)
    deployments = application.deployments.values() if application else ()
    return sum(each.replica_states.get(ReplicaState.RUNNING, 0) for each in deployments)
