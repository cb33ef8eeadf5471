"""News and orders between a run's workers, its controller and the command that shows them.

Imports nothing heavy: its actor starts in no time.
"""

import time
from typing import Any


class Bulletin:
    """Holds the latest news of a run, and the history of its groups of workers.

    A group is a dict: `began` (seconds since 1970), `workers`, `nodes` (each one's host by its id), `first_step`;
    `last_step` and `last_seen`; once it has ended, `cause`, and whether that was an order (`ordered`); and `caught_up`,
    when it passed the last step of the group before.
    """

    def __init__(self, groups: list[dict[str, Any]] | None = None) -> None:
        """`groups`: of earlier commands that worked on the same run."""
        self._news: dict[str, Any] = {}
        self._groups = groups or []
        self._order: str | None = None

    def began(self, first_step: int, workers: int, nodes: dict[str, str], alive: list[str]) -> list[dict[str, Any]]:
        """A new group goes on after `first_step` steps; gives all groups, itself included.

        `alive` are the nodes of the cluster: only now is it sure whether the group before has lost one.
        """
        now = time.time()
        if self._groups and "lost" in (before := self._groups[-1]).get("cause", ""):
            lost = sorted({host for node, host in before.get("nodes", {}).items() if node not in alive})
            if lost:
                before["cause"] = f"a node was lost: {', '.join(lost)}"
        group = {"began": now, "workers": workers, "nodes": nodes, "first_step": first_step}
        self._groups.append(group | {"last_step": first_step, "last_seen": now})
        self._order = None
        self._news |= {"workers": workers, "waiting": None}
        return self._groups

    def ended(self, cause: str | None = None) -> None:
        """The group has ended; without a cause, by the order that it was given."""
        if self._groups and "cause" not in (group := self._groups[-1]):
            group |= {"cause": cause or self._order or "unknown", "ordered": cause is None}
            self.tell(f"interrupted at step {group['last_step']:,}: {group['cause']}")

    def post(self, values: dict[str, Any]) -> None:
        """Adds to the news."""
        self._news.update(values)
        if "steps" not in values or not self._groups:
            return
        group, now = self._groups[-1], time.time()
        group |= {"last_step": values["steps"], "last_seen": now}
        furthest = self._groups[-2]["last_step"] if len(self._groups) > 1 else 0
        if values["steps"] > furthest:
            group.setdefault("caught_up", now)
        self._news["furthest"] = max(self._news.get("furthest", 0), values["steps"])

    def tell(self, sentence: str) -> None:
        """Something that the user must know."""
        self._news.setdefault("told", []).append(sentence)

    def order_to_leave(self, reason: str, least_seconds: float = 0.0) -> None:
        """Has the workers take a checkpoint and leave; the first reason counts.

        Not if they have trained for less than `least_seconds`, or have no more than that left to do.
        """
        if not self._groups:
            return
        group = self._groups[-1]
        trained, taken = time.time() - group["began"], group["last_step"] - group["first_step"]
        left = (self._news.get("total", 0) - group["last_step"]) * trained / taken if taken else float("inf")
        if min(trained, left) >= least_seconds:
            self._order = self._order or reason

    def order(self) -> str | None:
        """Why the workers should leave; None where they should not."""
        return self._order

    def read(self) -> dict[str, Any]:
        """All news so far."""
        return self._news | {"groups": self._groups}
