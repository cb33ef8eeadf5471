"""Carrying out a rollout: step by step, each behind its gates, back to the former version where one is shut.

It runs in the process that serves (`shoal serve --model`), which calls `look` every moment. Its orders and its course
are in the store (`cluster.rollouts`), so it goes on where it was, at the same step, when that process starts again.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.registry import STABLE, Registry
from cluster.rollouts import Check, Order, Rollouts, State, Status, Step
from cluster.store import ClusterError, sentence_of
from cluster.versions import UnreachableError
from models.settings import InputError
from serve.gates import Plan, Replayed, compare_evaluations, compare_replays, judge
from serve.traffic import Candidate, Tally

CANDIDATE = "candidate"
"""The alias of what is being rolled out."""

_REST_S = 30.0
"""After an alias could not be moved."""


class Endpoint(Protocol):
    """What a rollout does to an endpoint."""

    def prepare(self, number: int) -> str:
        """Gets a version ready to be asked, and names it; raises InputError or ClusterError if that cannot be."""

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
    _identity: str = field(default="", init=False)
    """Of the candidate, once it is ready."""
    _work: "Future[Any] | None" = field(default=None, init=False)
    """What takes long, in a thread: this process has other things to look at."""
    _ending: tuple[State, Status, str] | None = field(default=None, init=False)
    """A verdict that could not be carried out wholly yet."""
    _rests_until: float = field(default=0.0, init=False)
    _told: str = field(default="", init=False)

    def look(self) -> None:
        """Does what is next. Whatever goes wrong, the endpoint goes on."""
        if self.clock() < self._rests_until:
            return
        try:
            self._look()
            self._told = ""
        except Exception as error:
            sentence = f"the rollout of {self.name} waits: {sentence_of(error)}."
            if sentence != self._told:
                self._told = sentence
                self.tell(sentence)

    def _look(self) -> None:
        rollouts = Rollouts(self.registry, self.name)
        if self._ending is not None:
            self._finish(rollouts)
        order = rollouts.order()
        if order is None:
            return
        state = rollouts.state()
        if state is None or state.id != order.id:
            self._begin(rollouts, order)
        elif state.ended:
            if order.command == "rollback" and state.status == "promoted" and state.answered != order.asked:
                self._back(rollouts, order, state)
        else:
            self._go_on(rollouts, order, state)

    def _begin(self, rollouts: Rollouts, order: Order) -> None:
        before = self.registry.number(self.name, STABLE)
        state = State(id=order.id, before=before, number=order.number, status="running")
        if order.command:
            self._end(rollouts, _answering(state, order), "aborted", order.reason or "before it had begun")
            return
        if before == order.number:
            self._end(rollouts, state, "aborted", f"{self.name}:{before} is {STABLE} already")
            return
        try:
            plan = Plan.model_validate(order.plan)
        except ValueError as error:
            self._end(rollouts, state, "aborted", f"its plan is wrong: {sentence_of(error)}")
            return
        state = state.model_copy(update={"steps": tuple(Step(name=name) for name in plan.steps())})
        self.registry.set_alias(self.name, CANDIDATE, order.number, "rolled out")
        rollouts.tell(state)
        self.tell(f"{self.name}:{order.number} is rolled out beside {self.name}:{before} ...")

    def _go_on(self, rollouts: Rollouts, order: Order, state: State) -> None:
        stable = self.registry.number(self.name, STABLE)
        if stable not in (state.before, state.number):
            self._end(rollouts, state, "aborted", f"{STABLE} was moved to {self.name}:{stable} meanwhile")
        elif order.command in ("abort", "rollback"):
            self._end(rollouts, _answering(state, order), "aborted", order.reason or "as told")
        elif order.command == "promote" or stable == state.number:
            self._promote(rollouts, _answering(state, order), order.reason or "as told")
        elif self._order is None or self._order.id != order.id:
            self._prepare(rollouts, order, state)
        elif state.status == "running":
            self._step(rollouts, state)
        else:
            rollouts.tell(state)

    def _prepare(self, rollouts: Rollouts, order: Order, state: State) -> None:
        """Gets the candidate ready; then begins, or begins again, the step that it is at."""
        try:
            self._plan = Plan.model_validate(order.plan)
        except ValueError as error:
            self._end(rollouts, state, "aborted", f"its plan is wrong: {sentence_of(error)}")
            return
        if self._work is None:
            self._work = _in_thread(lambda: self.endpoint.prepare(order.number))
        if not self._work.done():
            position = _position(state)
            if position is not None:
                step = state.steps[position].model_copy(update={"note": "the version is being loaded"})
                state = _with(state, position, step)
            rollouts.tell(state)
            return
        work, self._work = self._work, None
        self._identity, refused = _tried(work.result)
        if refused:
            self._end(rollouts, state, "rolled back", f"it does not start: {refused}")
            return
        self._order = order
        self._enter(rollouts, state)

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
        if step.name == "shadow":
            self.endpoint.turn(Candidate(id=self._identity, shadow=True))
        elif step.name.endswith("%"):
            self.endpoint.turn(Candidate(id=self._identity, share=float(step.name[:-1]) / 100))
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
        if self._work is None:
            numbers = (state.before, state.number)
            self._work = _in_thread(lambda: [self.endpoint.replay(number, self._plan) for number in numbers])
        if not self._work.done():
            return "wait", [], 0, ""
        work, self._work = self._work, None
        found, refused = _tried(work.result)
        if refused:
            return "fail", [], 0, refused
        before, after = found
        checks = compare_replays(self._plan, before, after)
        rows = max((each.rows for each in after), default=0)
        return ("pass" if all(check.passed for check in checks) else "fail"), checks, rows, ""

    def _promote(self, rollouts: Rollouts, state: State, reason: str) -> None:
        _, refused = _tried(lambda: self.endpoint.replace(state.number))
        if refused:
            self._end(rollouts, state, "rolled back", f"it cannot take over: {refused}")
            return
        self._point(state.number, state.before, f"rolled out: {reason}")
        self._end(rollouts, state, "promoted", reason)

    def _back(self, rollouts: Rollouts, order: Order, state: State) -> None:
        """Undoes a rollout that had come to its end."""
        reason = order.reason or "as told"
        stable = self.registry.number(self.name, STABLE)
        if stable != state.number:
            self._end(
                rollouts, _answering(state, order), "promoted", f"not undone: {STABLE} is {self.name}:{stable} now"
            )
            return
        _, refused = _tried(lambda: self.endpoint.replace(state.before))
        if refused:
            self._end(rollouts, _answering(state, order), "promoted", f"it cannot be undone: {refused}")
            return
        self._point(state.before, state.number, f"rolled back: {reason}")
        self._end(rollouts, _answering(state, order), "rolled back", reason)

    def _point(self, number: int, before: int, reason: str) -> None:
        """Moves the alias to what answers already; where it cannot be moved, what it points at answers again."""
        try:
            self.registry.set_alias(self.name, STABLE, number, reason)
        except Exception:
            self._rests_until = self.clock() + _REST_S
            self.endpoint.replace(before)
            raise

    def _end(self, rollouts: Rollouts, state: State, status: Status, reason: str) -> None:
        self._ending = state, status, reason
        self._finish(rollouts)

    def _finish(self, rollouts: Rollouts) -> None:
        """Carries out a verdict; what fails on the way is tried again, for the verdict is kept."""
        assert self._ending is not None
        state, status, reason = self._ending
        self.endpoint.turn(None)
        rollouts.tell(state.model_copy(update={"status": status, "reason": reason}))
        self.endpoint.clear()
        if self.registry.aliases(self.name).aliases.get(CANDIDATE) == state.number:
            self.registry.remove_alias(self.name, CANDIDATE, f"{status}: {reason}")
        self._ending = self._order = self._work = None
        what = "has taken over" if status == "promoted" else f"was {status}"
        self.tell(f"{self.name}:{state.number} {what}: {reason}.")


def _in_thread(work: Callable[[], Any]) -> "Future[Any]":
    """Begins it in a thread that does not keep the process from ending."""
    future: Future[Any] = Future()

    def carry_out() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=carry_out, name="rollout", daemon=True).start()
    return future


def _answering(state: State, order: Order) -> State:
    return state.model_copy(update={"answered": order.asked})


def _tried(work: Callable[[], Any]) -> tuple[Any, str]:
    """What it gives, or the sentence of why it cannot be; a store that is away says nothing of that, and is raised."""
    try:
        return work(), ""
    except UnreachableError:
        raise
    except (InputError, ClusterError) as error:
        return None, sentence_of(error)


def _position(state: State) -> int | None:
    """Of the step that is next; None after the last."""
    return next((place for place, step in enumerate(state.steps) if step.status not in ("passed", "failed")), None)


def _with(state: State, position: int, step: Step) -> State:
    steps = (*state.steps[:position], step, *state.steps[position + 1 :])
    return state.model_copy(update={"steps": steps})
