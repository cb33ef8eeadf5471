"""Following an alias: what is served when it moves, and what is not when the new version is no good."""

import pytest
from upath import UPath

from cluster.store import ClusterError
from models.settings import InputError
from serve.following import Follower
from serve.model import ServedModel


class Endpoint:
    """An alias, the versions it could point at, and what serves them."""

    def __init__(self) -> None:
        self.pointed: int | Exception = 1
        self.unfit: dict[int, Exception] = {}
        """Versions that are found out before anything is touched."""
        self.dead: dict[int, Exception] = {}
        """Versions whose replicas do not start."""
        self.serves: int | None = 1
        self.starts: list[int] = []
        self.told: list[str] = []
        self.follower = Follower(
            number=1,
            model=self.model(1),
            pointed=self.alias,
            found=self.found,
            serve=self.serve,
            tell=self.told.append,
        )

    @staticmethod
    def model(number: int) -> ServedModel:
        return ServedModel("airline", str(number), UPath("/nowhere"))

    def alias(self) -> int:
        if isinstance(self.pointed, Exception):
            raise self.pointed
        return self.pointed

    def found(self, number: int) -> ServedModel:
        if number in self.unfit:
            raise self.unfit[number]
        return self.model(number)

    def serve(self, model: ServedModel) -> None:
        number = int(model.version)
        self.starts.append(number)
        self.serves = None
        if number in self.dead:
            raise self.dead[number]
        self.serves = number

    def look(self, times: int = 1) -> list[str]:
        """What is told at so many looks."""
        self.told.clear()
        for _ in range(times):
            self.follower.look()
        return list(self.told)


def test_nothing_happens_while_the_alias_stays() -> None:
    endpoint = Endpoint()
    assert endpoint.look(3) == []
    assert endpoint.starts == []


def test_it_goes_where_the_alias_goes_and_back() -> None:
    endpoint = Endpoint()
    endpoint.pointed = 4
    assert endpoint.look(3) == ["airline:4 takes the place of airline:1 ...", "airline:4 is served."]
    endpoint.pointed = 1
    assert endpoint.look(3) == ["airline:1 takes the place of airline:4 ...", "airline:1 is served."]
    assert (endpoint.starts, endpoint.serves) == ([4, 1], 1)


def test_a_version_known_to_be_no_good_touches_nothing_and_is_told_once() -> None:
    endpoint = Endpoint()
    endpoint.pointed, endpoint.unfit = 2, {2: InputError("model.safetensors is missing.")}
    assert endpoint.look(3) == ["airline:2 cannot be served: model.safetensors is missing; airline:1 keeps serving."]
    assert (endpoint.starts, endpoint.serves) == ([], 1)
    endpoint.pointed = 1
    assert endpoint.look() == []
    endpoint.pointed, endpoint.unfit = 2, {}
    assert endpoint.look()[-1] == "airline:2 is served.", "the alias was moved again, so it is tried again"


def test_a_version_that_does_not_start_leaves_the_former_one() -> None:
    endpoint = Endpoint()
    endpoint.pointed, endpoint.dead = 2, {2: ClusterError("the endpoint does not start: no memory.")}
    assert endpoint.look(4) == [
        "airline:2 takes the place of airline:1 ...",
        "airline:2 does not start: the endpoint does not start: no memory; airline:1 is served again.",
    ]
    assert (endpoint.starts, endpoint.serves, endpoint.follower.number) == ([2, 1], 1, 1)
    endpoint.pointed = 3
    assert endpoint.look()[-1] == "airline:3 is served."


def test_the_former_one_is_tried_until_it_starts() -> None:
    endpoint = Endpoint()
    endpoint.pointed, endpoint.dead = 2, {number: ClusterError("no memory.") for number in (1, 2)}
    assert endpoint.look(3)[-1] == "airline:1 does not start: no memory; it is tried again."
    assert (len(endpoint.told), endpoint.starts) == (3, [2, 1, 1, 1])
    endpoint.pointed = ClusterError("the store is away.")
    endpoint.dead = {}
    endpoint.look()
    assert endpoint.serves == 1


@pytest.mark.parametrize("trouble", [ClusterError("the store is away."), ConnectionError("the store is away")])
def test_a_store_out_of_reach_is_told_once_and_looked_at_again(trouble: Exception) -> None:
    endpoint = Endpoint()
    endpoint.pointed = trouble
    sentence = "the store is away; airline:1 keeps serving."
    assert endpoint.look(3) == [sentence]
    endpoint.pointed, endpoint.unfit = 2, {2: trouble}
    assert endpoint.look(3) == [], "it is away still"
    endpoint.unfit = {}
    assert endpoint.look()[-1] == "airline:2 is served."
    endpoint.look()
    endpoint.pointed = trouble
    assert endpoint.look() == [sentence.replace("1", "2")]
