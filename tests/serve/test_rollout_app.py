"""Changing what answers, on Ray Serve behind HAProxy, while requests come."""

import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from upath import UPath

from cluster.store import ClusterError
from serve import app
from serve.model import ServedModel
from serve.settings import ServeSettings
from serve.traffic import Candidate, Tally, read_table, reports, summed
from serve.turning import turn
from serve.versions import publish_version
from tests.serve.test_app import free_port
from tests.small_classifiers import CORPUS, make_classifier


@pytest.fixture(scope="module")
def settings() -> ServeSettings:
    return ServeSettings(
        port=free_port(), min_replicas=1, max_replicas=1, cpus=0.5, precision="fp32", drain_s=1, models_per_replica=2
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, ServedModel]:
    """Versions of a model: the second answers as the first does, the third other than it, the fourth is broken."""
    folder = make_classifier(tmp_path_factory.mktemp("served"))
    found = {}
    for number in (1, 2, 3, 4):
        temperature = {"sentiment": -1.0 if number == 3 else 1.0}
        card = {"registered": {"model": "small", "number": number}}
        found[number] = ServedModel("small", f"f00{number}", UPath(folder), temperature=temperature, card=card)
    (broken := tmp_path_factory.mktemp("broken") / "model").mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes() if file.suffix != ".safetensors" else b"no weights")
    found[4] = ServedModel("small", "f004", UPath(broken), card={"registered": {"model": "small", "number": 4}})
    return found


@pytest.fixture(scope="module")
def url(ray_session: None, models: dict[int, ServedModel], settings: ServeSettings) -> Iterator[str]:
    url = app.serve_model(settings, models[1], others={"second": models[2], "third": models[3]})
    publish_version(models[4])
    yield url
    app.stop()


class Asking:
    """A client that asks again and again until told to stop, and keeps what came."""

    def __init__(self, url: str) -> None:
        self.statuses: list[int] = []
        self.versions: list[str] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask, args=(url,))

    def _ask(self, url: str) -> None:
        with httpx.Client() as client:
            while not self._ended.is_set():
                response = client.post(f"{url}/v1/classify", json={"texts": CORPUS})
                self.statuses.append(response.status_code)
                self.versions.append(response.json().get("version", ""))

    def __enter__(self) -> "Asking":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def tally() -> Tally:
    table = read_table()
    assert table is not None
    return summed(reports().values(), table.revision)


def test_another_version_takes_over_between_two_requests(url: str, models: dict[int, ServedModel]) -> None:
    with Asking(url) as asking:
        turn(model=models[2].as_json())
        until(lambda: asking.versions[-1] == "f002")
        turn(model=models[1].as_json())
        until(lambda: asking.versions[-1] == "f001")
    assert set(asking.statuses) == {200}
    assert set(asking.versions) == {"f001", "f002"}


def test_what_cannot_be_loaded_leaves_the_former(url: str, models: dict[int, ServedModel]) -> None:
    with Asking(url) as asking, pytest.raises(ClusterError, match=r"model\.safetensors"):
        turn(model=models[4].as_json())
    assert (set(asking.statuses), set(asking.versions)) == ({200}, {"f001"})


def test_other_models_answer_at_their_paths(url: str) -> None:
    for name, version in (("second", "f002"), ("third", "f003"), ("second", "f002")):
        assert httpx.get(f"{url}/models/{name}/v1/model", timeout=60).json()["version"] == version
        answer = httpx.post(f"{url}/models/{name}/v1/classify", json={"texts": CORPUS}).json()
        assert (answer["version"], len(answer["results"])) == (version, len(CORPUS))
        assert httpx.post(f"{url}/models/{name}/predict", json={"inputs": "late"}).json()[0]["label"]
    assert httpx.post(f"{url}/models/second/v1/classify", json={"texts": []}).status_code == 422
    missing = httpx.post(f"{url}/models/fourth/v1/classify", json={"texts": CORPUS})
    assert missing.status_code == 404
    assert "serve.models names the other models" in missing.json()["detail"]
    assert httpx.get(f"{url}/models/second/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{url}/models/second/metrics").status_code == 404


def test_a_shadow_is_compared_and_answers_nobody(url: str) -> None:
    for identity, agreed in (("small:2", True), ("small:3", False)):
        turn(candidate=Candidate(id=identity, shadow=True))
        with Asking(url) as asking:
            until(lambda: tally().compared >= 30)
        found = tally()
        assert (found.agreed == found.compared) is agreed
        assert found.candidate.errors == 0
        assert (set(asking.statuses), set(asking.versions)) == ({200}, {"f001"})
    turn(candidate=None)


def test_a_candidate_answers_its_share(url: str) -> None:
    turn(candidate=Candidate(id="small:2", share=0.5))
    with Asking(url) as asking:
        until(lambda: min(tally().stable.requests, tally().candidate.requests) >= 20)
    found = tally()
    assert (set(asking.statuses), set(asking.versions)) == ({200}, {"f001", "f002"})
    assert 0 < found.candidate.quantile_ms(0.5) < 10_000
    turn(candidate=None)
    until(lambda: httpx.post(f"{url}/v1/classify", json={"texts": CORPUS}).json()["version"] == "f001")


def test_where_a_candidate_fails_the_stable_version_answers(url: str) -> None:
    turn(candidate=Candidate(id="small:4", share=1.0))
    with Asking(url) as asking:
        until(lambda: tally().candidate.errors >= 3)
    assert (set(asking.statuses), set(asking.versions)) == ({200}, {"f001"})
    assert httpx.post(f"{url}/v1/classify", json={"texts": []}).status_code == 422
    turn(candidate=None)
