"""Rollouts in the store: what is asked for, and how far the endpoint that follows the model has come with it.

    <store>/registry/<name>/rollout.json         the order: written by whoever asks (`shoal rollout`)
    <store>/registry/<name>/rollout-state.json   its course: written by the process that serves (`shoal serve --model`)

Each file has one kind of writer, so neither waits for the other, and either may end and start again.
"""

import uuid
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field
from upath import UPath

from cluster.registry import Registry, now, read_document, text_of
from cluster.store import telling_storage_errors, write_whole
from cluster.versions import Document, RegistryError

Command = Literal["", "promote", "abort", "rollback"]

Status = Literal["running", "passed", "promoted", "rolled back", "aborted"]


class Order(Document):
    """What is asked for."""

    id: str
    number: int
    """The version that is to take over."""
    plan: dict[str, Any] = Field(default_factory=dict)
    """By what gates, as `serve.gates.Plan` has it."""
    time: str
    command: Command = ""
    """What is asked for since."""
    reason: str = ""
    asked: str = ""
    """Names the command: another one has another name."""


class Check(Document):
    """One gate: what was measured beside what is demanded."""

    name: str
    value: float | None
    """None before there is anything to measure."""
    bound: float
    passed: bool


class Step(Document):
    """One step of a rollout."""

    name: str
    status: Literal["waiting", "running", "passed", "failed"] = "waiting"
    seconds: float = 0.0
    requests: int = 0
    """That came of the candidate meanwhile; of a replay its rows."""
    checks: tuple[Check, ...] = ()
    note: str = ""


class State(Document):
    """How far a rollout has come."""

    id: str
    """The order's."""
    before: int
    """The version that answered."""
    number: int
    status: Status
    """`passed`: all gates are, and the word to promote is waited for."""
    steps: tuple[Step, ...] = ()
    reason: str = ""
    answered: str = ""
    """The command (`Order.asked`) that was carried out, or found impossible, last."""
    time: str = Field(default_factory=lambda: now())
    """When it was written last."""

    @property
    def ended(self) -> bool:
        """Whether nothing more comes of it by itself."""
        return self.status not in ("running", "passed")


@dataclass(frozen=True)
class Rollouts:
    """The rollouts of one model."""

    registry: Registry
    name: str

    def order(self) -> Order | None:
        """The latest order.

        Raises:
            RegistryError: it is damaged, or cannot be read.
        """
        return read_document(self._order, Order)

    def state(self) -> State | None:
        """How far the endpoint has come, with the latest order or one before.

        Raises:
            RegistryError: it is damaged, or cannot be read.
        """
        return read_document(self._state, State)

    def ask(self, number: int, plan: dict[str, Any]) -> Order:
        """Asks for a rollout of a version; who asks for the one that is under way gets that.

        Raises:
            RegistryError: there is no such version, it answers already, or another rollout is under way.
            ClusterError: nothing can be written to the store.
        """
        self.registry.version(self.name, number)
        with self.registry.held(self.name):
            order, state = self.order(), self.state()
            if order and state and state.id == order.id and not state.ended:
                if (order.number, order.plan, order.command) == (number, plan, ""):
                    return order
                raise RegistryError(
                    f"{self.name}:{state.number} is being rolled out; `shoal rollout abort {self.name}` ends that."
                )
            order = Order(id=uuid.uuid4().hex[:12], number=number, plan=plan, time=now())
            write_whole(self._order, text_of(order))
        return order

    def command(self, command: Command, reason: str) -> Order:
        """Tells the endpoint what to do with the latest rollout.

        Raises:
            RegistryError: there is none, or it has come to an end where that cannot be done any more.
            ClusterError: nothing can be written to the store.
        """
        with self.registry.held(self.name):
            order, state = self.order(), self.state()
            if order is None:
                raise RegistryError(
                    f"there is no rollout of {self.name}; `shoal rollout {self.name} NUMBER` begins one."
                )
            its = state if state is not None and state.id == order.id else None
            if its is not None and its.ended and not (command == "rollback" and its.status == "promoted"):
                raise RegistryError(f"the rollout of {self.name}:{order.number} has ended: it was {its.status}.")
            order = order.model_copy(update={"command": command, "reason": reason, "asked": uuid.uuid4().hex[:12]})
            write_whole(self._order, text_of(order))
        return order

    def tell(self, state: State) -> None:
        """Writes how far it has come."""
        with telling_storage_errors(str(self._state)):
            write_whole(self._state, text_of(state.model_copy(update={"time": now()})))

    @property
    def _order(self) -> UPath:
        return self.registry.folder(self.name) / "rollout.json"

    @property
    def _state(self) -> UPath:
        return self.registry.folder(self.name) / "rollout-state.json"
