"""Carrying out a rollout: step by step, each behind its gates, back to the former version where one is shut.

It runs in the process that serves (`shoal serve --model`), which calls `look` every moment. Its orders and its course
are in the store (`cluster.rollouts`), so it goes on where it was, at the same step, when that process starts again.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.registry import STABLE, Registry
from cluster.rollouts import Check, Order, Rollouts, State, Status, Step
from cluster.store import STORAGE_ERRORS, ClusterError
from models.settings import InputError
from serve.gates import Plan, Replayed, compare_evaluations, compare_replays, judge
from serve.traffic import Candidate, Tally

CANDIDATE = "candidate"
"""The alias of what is being rolled out."""

_TROUBLE = (InputError, ClusterError, *STORAGE_ERRORS)


class Endpoint(Protocol):
    """What a rollout does to an endpoint."""

    def prepare(self, number: int) -> None:
        """Gets a version ready to be asked; raises InputError or ClusterError if that cannot be."""

    def turn(self, candidate: Candidate | None) -> None:
        """Lets a candidate have its part of the requests, from now on."""

    def tally(self) -> Tally:
        """What came of the requests since."""

    def replay(self, number: int, plan: Plan) -> Sequence[Replayed]:
        """What a version answers to labelled texts."""

    def replace(self, number: int) -> None:
        """Makes a version the one that answers; raises InputError or ClusterError if it cannot, and changes nothing."""

    def clear(self) -> None:
        """Takes away what `prepare` has got ready."""


@dataclass
class Rolling:
    """The rollouts of the model that an endpoint follows."""

    registry: Registry
    name: str
    endpoint: Endpoint
    tell: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    _order: Order | None = field(default=None, init=False)
    """That is being carried out in this process."""
    _plan: Plan = field(default_factory=lambda: Plan(), init=False)
    _since: float = field(default=0.0, init=False)
    _replay: "Future[Any] | None" = field(default=None, init=False)
    _told: str = field(default="", init=False)

    def look(self) -> None:
        """Does what is next."""
        try:
            self._look()
        except _TROUBLE as error:
            sentence = f"the rollout of {self.name} waits: {' '.join(str(error).split())}"
            if sentence != self._told:
                self._told = sentence
                self.tell(sentence)

    def _look(self) -> None:
        rollouts = Rollouts(self.registry, self.name)
        order = rollouts.order()
        if order is None:
            return
        state = rollouts.state()
        if state is None or state.id != order.id:
            self._begin(rollouts, order)
        elif state.ended:
            if order.command == "rollback" and state.status == "promoted":
                self._back(rollouts, order, state)
        elif self._order is None or self._order.id != order.id:
            self._resume(rollouts, order, state)
        else:
            self._go_on(rollouts, order, state)

    def _begin(self, rollouts: Rollouts, order: Order) -> None:
        before = self.registry.number(self.name, STABLE)
        state = State(id=order.id, before=before, number=order.number, status="running")
        if order.command:
            self._end(rollouts, state, "aborted", order.reason or "before it had begun")
            return
        if before == order.number:
            self._end(rollouts, state, "aborted", f"{self.name}:{before} is {STABLE} already")
            return
        try:
            plan = Plan.model_validate(order.plan)
        except ValueError as error:
            self._end(rollouts, state, "aborted", f"its plan is wrong: {' '.join(str(error).split())}")
            return
        state = state.model_copy(update={"steps": tuple(Step(name=name) for name in plan.steps())})
        self.registry.set_alias(self.name, CANDIDATE, order.number, "rolled out")
        self.tell(f"{self.name}:{order.number} is rolled out beside {self.name}:{before} ...")
        self._resume(rollouts, order, state)

    def _resume(self, rollouts: Rollouts, order: Order, state: State) -> None:
        """Begins, or begins again, the step that it is at."""
        self._plan = Plan.model_validate(order.plan)
        rollouts.tell(state)
        try:
            self.endpoint.prepare(order.number)
        except (InputError, ClusterError) as error:
            self._end(rollouts, state, "rolled back", f"it does not start: {' '.join(str(error).split())}")
            return
        self._order = order
        self._enter(rollouts, state)

    def _go_on(self, rollouts: Rollouts, order: Order, state: State) -> None:
        stable = self.registry.number(self.name, STABLE)
        if stable not in (state.before, state.number):
            self._end(rollouts, state, "aborted", f"{STABLE} was moved to {self.name}:{stable} meanwhile")
        elif order.command in ("abort", "rollback"):
            self._end(rollouts, state, "aborted", order.reason or "as told")
        elif order.command == "promote" or stable == state.number:
            self._promote(rollouts, state, order.reason or "as told")
        elif state.status == "running":
            self._step(rollouts, state)
        else:
            rollouts.tell(state)

    def _enter(self, rollouts: Rollouts, state: State) -> None:
        """Lets the step that is next begin; after the last one the candidate takes over."""
        position = _position(state)
        if position is None:
            if self._plan.promote:
                self._promote(rollouts, state, "all gates passed")
            else:
                rollouts.tell(state.model_copy(update={"status": "passed"}))
                self.tell(
                    f"{self.name}:{state.number} has passed all gates; `shoal rollout promote {self.name}` is next."
                )
            return
        step = state.steps[position]
        identity = f"{self.name}:{state.number}"
        if step.name == "shadow":
            self.endpoint.turn(Candidate(id=identity, shadow=True))
        elif step.name.endswith("%"):
            self.endpoint.turn(Candidate(id=identity, share=float(step.name[:-1]) / 100))
        self._since = self.clock()
        self._told = ""
        rollouts.tell(_with(state, position, Step(name=step.name, status="running")))

    def _step(self, rollouts: Rollouts, state: State) -> None:
        position = _position(state)
        assert position is not None, "a running rollout has a step"
        step = state.steps[position]
        seconds = self.clock() - self._since
        if step.name == "evaluation":
            verdict, checks, requests, note = *self._evaluation(state), 0, ""
            note = "" if checks else "they were not evaluated on the same rows"
        elif step.name == "replay":
            verdict, checks, requests, note = self._replayed(state)
        else:
            tally = self.endpoint.tally()
            verdict, checks = judge(self._plan, step.name, tally, seconds)
            requests, note = tally.candidate.requests, ""
        status = {"wait": "running", "pass": "passed", "fail": "failed"}[verdict]
        told = Step(
            name=step.name, status=status, seconds=round(seconds, 1), requests=requests, checks=tuple(checks), note=note
        )
        state = _with(state, position, told)
        if verdict == "fail":
            failed = "; ".join(
                f"{check.name} is {check.value:.4g}, and {check.bound:.4g} is demanded"
                for check in checks
                if not check.passed and check.value is not None
            )
            self._end(rollouts, state, "rolled back", f"at {step.name}: {failed or note}")
        elif verdict == "pass":
            self._enter(rollouts, state)
        else:
            rollouts.tell(state)

    def _evaluation(self, state: State) -> tuple[Any, list[Check]]:
        before, after = (self.registry.version(self.name, number) for number in (state.before, state.number))
        same = [version.lineage["prepare"].fingerprint for version in (before, after) if "prepare" in version.lineage]
        if len(same) < 2 or same[0] != same[1]:
            return "pass", []
        checks = compare_evaluations(self._plan, before.metrics, after.metrics)
        return ("pass" if all(check.passed for check in checks) else "fail"), checks

    def _replayed(self, state: State) -> tuple[Any, list[Check], int, str]:
        """The replay goes on in a thread, for this process has other things to look at."""
        if self._replay is None:
            thread = ThreadPoolExecutor(1, "replay")
            numbers = (state.before, state.number)
            self._replay = thread.submit(lambda: [self.endpoint.replay(number, self._plan) for number in numbers])
            thread.shutdown(wait=False)
        if not self._replay.done():
            return "wait", [], 0, ""
        replay, self._replay = self._replay, None
        try:
            before, after = replay.result()
        except (InputError, ClusterError) as error:
            return "fail", [], 0, " ".join(str(error).split())
        checks = compare_replays(self._plan, before, after)
        rows = max((each.rows for each in after), default=0)
        return ("pass" if all(check.passed for check in checks) else "fail"), checks, rows, ""

    def _promote(self, rollouts: Rollouts, state: State, reason: str) -> None:
        try:
            self.endpoint.replace(state.number)
        except (InputError, ClusterError) as error:
            self._end(rollouts, state, "rolled back", f"it cannot take over: {' '.join(str(error).split())}")
            return
        self.registry.set_alias(self.name, STABLE, state.number, f"rolled out: {reason}")
        self._end(rollouts, state, "promoted", reason)

    def _back(self, rollouts: Rollouts, order: Order, state: State) -> None:
        """Undoes a rollout that had come to its end."""
        reason = order.reason or "as told"
        self.endpoint.replace(state.before)
        self.registry.set_alias(self.name, STABLE, state.before, f"rolled back: {reason}")
        self._end(rollouts, state, "rolled back", reason)

    def _end(self, rollouts: Rollouts, state: State, status: Status, reason: str) -> None:
        self.endpoint.turn(None)
        self.endpoint.clear()
        if self.registry.aliases(self.name).aliases.get(CANDIDATE) == state.number:
            self.registry.remove_alias(self.name, CANDIDATE, f"{status}: {reason}")
        rollouts.tell(state.model_copy(update={"status": status, "reason": reason}))
        self._order = self._replay = None
        what = "has taken over" if status == "promoted" else f"was {status}"
        self.tell(f"{self.name}:{state.number} {what}: {reason}.")


def _position(state: State) -> int | None:
    """Of the step that is next; None after the last."""
    return next((place for place, step in enumerate(state.steps) if step.status not in ("passed", "failed")), None)


def _with(state: State, position: int, step: Step) -> State:
    steps = (*state.steps[:position], step, *state.steps[position + 1 :])
    return state.model_copy(update={"steps": steps})
