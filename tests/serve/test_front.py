"""A replica's front, with other replicas that hang or fail; and that versions which go give back their memory."""

import asyncio
import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from upath import UPath

from serve import front
from serve.forwarding import Asked, Reply, reply_of
from serve.front import Ask, Front
from serve.loaded import Loaded, free_dropped
from serve.model import ServedModel
from serve.settings import ServeSettings
from serve.traffic import Candidate, Table
from tests.small_classifiers import CORPUS, make_classifier

SETTINGS = ServeSettings(precision="fp32", batch_tokens=64)
BODY = json.dumps({"texts": CORPUS}).encode()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return ServedModel("small", "f00d", UPath(make_classifier(tmp_path_factory.mktemp("model"))))


@pytest.fixture
def hurried() -> Iterator[None]:
    with mock.patch.multiple(front, _CANDIDATE_S=0.05, _SHADOW_S=0.05, _OTHER_S=0.05):
        yield


def asked(path: str = "/v1/classify", body: bytes = BODY, method: str = "POST") -> Asked:
    return Asked(method, path, b"", ((b"content-type", b"application/json"),), body)


async def hang(identity: str, _: Asked) -> Reply:
    await asyncio.sleep(60)
    raise AssertionError


async def fail(identity: str, _: Asked) -> Reply:
    raise RuntimeError("the replica has died")


async def refuse(identity: str, _: Asked) -> Reply:
    return Reply(429, (), b"{}")


def made(model: ServedModel, ask: Ask, candidate: Candidate | None = None) -> Front:
    table = Table(revision=1, model=model.as_json(), candidate=candidate, others={"other": "other:1"})
    return Front(table, Loaded(model, SETTINGS, "r1"), lambda table: Loaded(table.served, SETTINGS, "r1"), ask)


@pytest.mark.parametrize(("ask", "errors"), [(hang, 1), (fail, 1), (refuse, 0)])
def test_where_a_candidate_hangs_fails_or_refuses_the_stable_version_answers(
    model: ServedModel, hurried: None, ask: Ask, errors: int
) -> None:
    one = made(model, ask, Candidate(id="small:2", share=1.0))
    reply = asyncio.run(reply_of(one, asked()))
    assert (reply.status, json.loads(reply.body)["version"]) == (200, "f00d")
    tally = one.report().tally
    assert (tally.candidate.errors, tally.candidate.requests, tally.stable.requests) == (errors, errors, 0)


def test_a_clients_mistake_is_no_fault_of_the_candidate(model: ServedModel) -> None:
    async def unprocessable(identity: str, _: Asked) -> Reply:
        return Reply(422, (), b"{}")

    one = made(model, unprocessable, Candidate(id="small:2", share=1.0))
    assert asyncio.run(reply_of(one, asked(body=b'{"texts": []}'))).status == 422
    assert one.report().tally.candidate.requests == 0


@pytest.mark.parametrize("ask", [hang, fail])
def test_a_shadow_that_does_not_answer_is_an_error_and_holds_nobody(
    model: ServedModel, hurried: None, ask: Ask
) -> None:
    one = made(model, ask, Candidate(id="small:2", shadow=True))

    async def go() -> Reply:
        reply = await reply_of(one, asked())
        await asyncio.gather(*one._shadows)
        return reply

    assert asyncio.run(go()).status == 200
    tally = one.report().tally
    assert (tally.candidate.errors, tally.stable.requests, tally.compared) == (1, 1, 0)


@pytest.mark.parametrize("ask", [hang, fail])
def test_another_model_that_does_not_answer_is_told(model: ServedModel, hurried: None, ask: Ask) -> None:
    reply = asyncio.run(reply_of(made(model, ask), asked("/models/other/v1/classify")))
    assert (reply.status, dict(reply.headers)[b"retry-after"]) == (503, b"1")


def test_what_is_alike_for_all_models_loads_none(model: ServedModel) -> None:
    one = made(model, fail)
    for path, status in (("/models/other/healthz", 200), ("/models/other/", 200), ("/models/none/healthz", 404)):
        assert asyncio.run(reply_of(one, asked(path, b"", "GET"))).status == status
    assert asyncio.run(reply_of(one, asked("/models/other/healthz"))).status == 404


def test_another_version_takes_over_and_the_former_gives_back_its_memory(model: ServedModel) -> None:
    one = made(model, fail)
    assert asyncio.run(reply_of(one, asked())).status == 200
    former = weakref.ref(one.loaded.gateway.state.batcher)
    gc.collect()
    gc.freeze()  # As Ray does after a replica's constructor.
    other = ServedModel("small", "cafe", model.torch)
    one.look(Table(revision=2, model=other.as_json()))
    assert json.loads(asyncio.run(reply_of(one, asked())).body)["version"] == "cafe"
    free_dropped()
    assert former() is None
    gc.unfreeze()


def test_a_version_that_cannot_be_loaded_is_told_and_the_former_stays(model: ServedModel, tmp_path: Path) -> None:
    one = made(model, fail)
    one.look(Table(revision=2, model=ServedModel("small", "cafe", UPath(tmp_path)).as_json()))
    report = one.report()
    assert (report.revision, report.refused) == (1, 2)
    assert "classifier.json" in report.trouble
    assert json.loads(asyncio.run(reply_of(one, asked())).body)["version"] == "f00d"
