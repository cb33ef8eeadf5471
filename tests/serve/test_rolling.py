"""The course of a rollout, with an endpoint that stands for Ray: tests/serve/test_rollout_app.py has the real one."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest

from cluster.registry import Registry
from cluster.rollouts import Rollouts, State
from cluster.store import ClusterError, Store
from cluster.versions import Ancestor, Content, RegistryError
from serve.gates import Plan, Replayed
from serve.rolling import Rolling
from serve.traffic import Candidate, Counts, Tally

PLAN = Plan(min_requests=10, min_s=5, shares=(0.1, 0.5))


def answers(requests: int, errors: int = 0) -> Counts:
    found = Counts()
    for number in range(requests):
        found.add(0.01, failed=number < errors)
    return found


GOOD = Tally(stable=answers(50), candidate=answers(50), compared=50, agreed=50)


@dataclass
class Endpoint:
    found: Tally = field(default_factory=Tally)
    prepared: list[int] = field(default_factory=list)
    turned: list[Candidate | None] = field(default_factory=list)
    served: int = 1
    cleared: int = 0
    dead: tuple[int, ...] = ()
    macro_f1: dict[int, float] = field(default_factory=lambda: {1: 0.8, 2: 0.8})

    def prepare(self, number: int) -> str:
        if number in self.dead:
            raise ClusterError("no memory.")
        self.prepared.append(number)
        return f"small:{number}"

    def turn(self, candidate: Candidate | None) -> None:
        self.turned.append(candidate)

    def tally(self) -> Tally:
        return self.found

    def replay(self, number: int, plan: Plan) -> Sequence[Replayed]:
        return [Replayed(column="a", rows=7, macro_f1=self.macro_f1[number])]

    def replace(self, number: int) -> None:
        if number in self.dead:
            raise ClusterError("no memory.")
        self.served = number

    def clear(self) -> None:
        self.cleared += 1


def content(number: int, macro_f1: float = 0.8) -> Content:
    return Content(
        artifacts={"finetune": f"{number}" * 16},
        torch="m",
        evaluated="e",
        sha256={"m/x": f"{number}" * 64},
        metrics={"macro_f1": macro_f1},
        lineage={"prepare": Ancestor(fingerprint="p" * 16, inputs={})},
    )


class Course:
    """A registry with two versions of a model, an endpoint that follows it, and a clock."""

    def __init__(self, folder: Path, macro_f1: float = 0.8) -> None:
        self.registry = Registry(Store.open(str(folder)))
        for number, score in ((1, 0.8), (2, macro_f1)):
            self.registry.register("small", content(number, score))
        self.registry.set_alias("small", "stable", 1)
        self.rollouts = Rollouts(self.registry, "small")
        self.endpoint = Endpoint()
        self.told: list[str] = []
        self.now = 0.0
        self.start()

    def start(self) -> None:
        """The process that serves, anew."""
        self.rolling = Rolling(self.registry, "small", self.endpoint, self.told.append, lambda: self.now)

    def state(self) -> State:
        found = self.rollouts.state()
        assert found is not None
        return found

    def looks(self, until: Callable[[], bool], most: int = 60) -> None:
        for _ in range(most):
            self.rolling.look()
            if self.rolling._work is not None:
                wait([self.rolling._work])
            self.now += 1
            if until():
                return
        raise AssertionError(self.state())

    def ended(self) -> bool:
        return self.state().ended


@pytest.fixture
def course(tmp_path: Path) -> Course:
    return Course(tmp_path)


def ask(course: Course, plan: Plan = PLAN) -> None:
    course.rollouts.ask(2, plan.model_dump(mode="json"))


def test_a_good_version_takes_over_step_by_step(course: Course) -> None:
    course.endpoint.found = GOOD
    ask(course, PLAN.model_copy(update={"replay": "labelled.jsonl"}))
    course.looks(course.ended)
    identity = "small:2"
    assert course.endpoint.turned == [
        Candidate(id=identity, shadow=True),
        Candidate(id=identity, share=0.1),
        Candidate(id=identity, share=0.5),
        None,
    ]
    state = course.state()
    assert (state.status, state.before, state.number) == ("promoted", 1, 2)
    assert [(step.name, step.status) for step in state.steps] == [
        (name, "passed") for name in ("evaluation", "replay", "shadow", "10%", "50%")
    ]
    assert (course.endpoint.served, course.endpoint.cleared) == (2, 1)
    assert course.registry.aliases("small").aliases == {"stable": 2}
    assert course.registry.aliases("small").history[-2].reason == "rolled out: all gates passed"
    assert all(step.seconds >= 5 for step in state.steps[2:])


def test_a_version_that_fails_at_a_gate_is_rolled_back_with_the_reason(course: Course) -> None:
    course.endpoint.found = Tally(stable=answers(50), candidate=answers(50), compared=50, agreed=20)
    ask(course)
    course.looks(course.ended)
    assert course.state().status == "rolled back"
    assert course.state().reason == "at shadow: agreement is 0.4, and 0.9 is demanded"
    assert course.told[-1] == "small:2 was rolled back: at shadow: agreement is 0.4, and 0.9 is demanded."
    assert (course.endpoint.served, course.endpoint.turned[-1], course.endpoint.cleared) == (1, None, 1)
    assert course.registry.aliases("small").aliases == {"stable": 1}


def test_a_worse_evaluation_or_replay_ends_it_before_anybody_is_answered(tmp_path: Path) -> None:
    course = Course(tmp_path, macro_f1=0.7)
    ask(course)
    course.looks(course.ended)
    assert course.state().reason == "at evaluation: macro_f1 is 0.7, and 0.79 is demanded"
    assert course.endpoint.turned == [None]
    course = Course(tmp_path / "replay")
    course.endpoint.macro_f1[2] = 0.5
    ask(course, PLAN.model_copy(update={"replay": "labelled.jsonl"}))
    course.looks(course.ended)
    assert course.state().reason == "at replay: a.macro_f1 is 0.5, and 0.79 is demanded"
    assert course.endpoint.turned == [None]


def test_without_requests_it_waits(course: Course) -> None:
    ask(course)
    with pytest.raises(AssertionError):
        course.looks(course.ended, 40)
    assert course.state().steps[1].status == "running"
    assert course.state().steps[1].seconds > 30


def test_it_goes_on_at_the_same_step_when_the_process_starts_again(course: Course) -> None:
    course.endpoint.found = GOOD
    ask(course)
    course.looks(lambda: course.state().steps[2].status == "running")
    course.start()
    course.endpoint.turned.clear()
    course.looks(course.ended)
    assert course.endpoint.turned == [Candidate(id="small:2", share=0.1), Candidate(id="small:2", share=0.5), None]
    assert course.endpoint.prepared == [2, 2]
    assert course.state().status == "promoted"


def test_it_can_be_aborted_promoted_and_undone(course: Course) -> None:
    ask(course)
    course.looks(lambda: course.state().steps[1].status == "running")
    order = course.rollouts.order()
    assert order is not None
    assert course.rollouts.ask(2, order.plan) == order
    with pytest.raises(RegistryError, match="small:2 is being rolled out; `shoal rollout abort small` ends that"):
        course.rollouts.ask(2, {**order.plan, "promote": False})
    course.rollouts.command("abort", "the wrong one")
    course.looks(course.ended)
    assert (course.state().status, course.state().reason, course.endpoint.served) == ("aborted", "the wrong one", 1)
    with pytest.raises(RegistryError, match="has ended: it was aborted"):
        course.rollouts.command("promote", "")
    ask(course)
    course.looks(lambda: course.state().steps[1].status == "running")
    course.rollouts.command("promote", "the sale begins")
    course.looks(course.ended)
    assert (course.state().status, course.endpoint.served) == ("promoted", 2)
    course.rollouts.command("rollback", "complaints")
    course.looks(lambda: course.state().status == "rolled back")
    assert (course.endpoint.served, course.registry.aliases("small").aliases) == (1, {"stable": 1})
    assert course.registry.aliases("small").history[-1].reason == "rolled back: complaints"


def test_the_word_to_promote_can_be_waited_for(course: Course) -> None:
    course.endpoint.found = GOOD
    ask(course, PLAN.model_copy(update={"promote": False}))
    course.looks(lambda: course.state().status == "passed")
    assert course.endpoint.served == 1
    course.rollouts.command("promote", "")
    course.looks(course.ended)
    assert (course.state().status, course.endpoint.served) == ("promoted", 2)


def test_a_version_that_does_not_start_changes_nothing(course: Course) -> None:
    course.endpoint.dead = (2,)
    ask(course)
    course.looks(course.ended)
    assert (course.state().status, course.state().reason) == ("rolled back", "it does not start: no memory")
    assert course.registry.aliases("small").aliases == {"stable": 1}


def test_a_version_that_cannot_take_over_changes_nothing(course: Course) -> None:
    course.endpoint.found = GOOD
    ask(course)
    course.looks(lambda: course.state().steps[3].status == "running")
    course.endpoint.dead = (2,)
    course.looks(course.ended)
    assert (course.state().status, course.state().reason) == ("rolled back", "it cannot take over: no memory")
    assert course.registry.aliases("small").aliases == {"stable": 1}


def test_an_alias_that_is_moved_meanwhile_ends_it(course: Course) -> None:
    ask(course)
    course.looks(lambda: course.state().steps[1].status == "running")
    course.registry.register("small", content(3))
    course.registry.set_alias("small", "stable", 3)
    course.looks(course.ended)
    assert (course.state().status, course.state().reason) == ("aborted", "stable was moved to small:3 meanwhile")


def test_the_stable_version_is_not_rolled_out(course: Course) -> None:
    course.rollouts.ask(1, {})
    course.looks(course.ended)
    assert (course.state().status, course.state().reason) == ("aborted", "small:1 is stable already")


def test_a_verdict_outlasts_a_store_that_is_away(course: Course) -> None:
    course.endpoint.found = Tally(stable=answers(50), candidate=answers(50), compared=50, agreed=20)
    ask(course)
    course.looks(lambda: course.state().steps[1].status == "running")
    with mock.patch("cluster.rollouts.write_whole", side_effect=OSError("away")):
        for _ in range(8):
            course.rolling.look()
            course.now += 1
    assert course.told[-1].startswith("the rollout of small waits: ")
    course.looks(course.ended)
    assert course.state().reason == "at shadow: agreement is 0.4, and 0.9 is demanded"
    assert course.endpoint.turned[-1] is None


def test_an_alias_that_cannot_be_moved_leaves_the_former_version_answering(course: Course) -> None:
    course.endpoint.found = GOOD
    ask(course)
    course.looks(lambda: course.state().steps[3].status == "running")
    with mock.patch.object(Registry, "set_alias", side_effect=ClusterError("read only.")):
        for _ in range(20):
            course.rolling.look()
            course.now += 1
    assert course.endpoint.served == 1
    course.now += 30
    course.looks(course.ended)
    assert (course.state().status, course.endpoint.served) == ("promoted", 2)


def test_what_cannot_be_undone_is_said_once(course: Course) -> None:
    course.endpoint.found = GOOD
    ask(course)
    course.looks(course.ended)
    course.endpoint.dead = (1,)
    order = course.rollouts.command("rollback", "")
    course.looks(lambda: course.state().answered == order.asked)
    assert (course.state().status, course.state().reason) == ("promoted", "it cannot be undone: no memory")
    course.endpoint.dead = ()
    for _ in range(3):
        course.rolling.look()
    assert course.endpoint.served == 2, "an order that was answered is not carried out later"
    course.rollouts.command("rollback", "again")
    course.looks(lambda: course.state().status == "rolled back")


def test_an_abort_does_not_wait_for_the_candidate_to_start(course: Course) -> None:
    begun, let = threading.Event(), threading.Event()

    def prepare(number: int) -> str:
        begun.set()
        let.wait(10)
        return ""

    with mock.patch.object(course.endpoint, "prepare", prepare):
        ask(course)
        course.rolling.look()
        course.rolling.look()
        assert begun.wait(10)
        course.rollouts.command("abort", "too slow")
        course.rolling.look()
        let.set()
    assert (course.state().status, course.state().reason) == ("aborted", "too slow")
