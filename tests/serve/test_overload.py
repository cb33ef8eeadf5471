"""More than an endpoint can carry: HAProxy and the replicas refuse it between them, and every refusal is counted."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from upath import UPath

from serve import app
from serve.model import ServedModel
from serve.settings import ServeSettings
from serve.shedding import FULL
from tests.serve.test_app import free_port
from tests.small_classifiers import make_classifier

TEXTS = ["the flight was late again and they would not help " * 3] * 256


@pytest.fixture
def url(ray_session: None, tmp_path: Path) -> Iterator[str]:
    settings = ServeSettings(
        port=free_port(), max_replicas=1, cpus=0.5, precision="fp32", max_wait_s=1, drain_s=1, log_requests="none"
    )
    url = app.serve_model(settings, ServedModel("small", "f00d", UPath(make_classifier(tmp_path / "served"))))
    yield url
    app.stop()


def counted(url: str) -> dict[str, float]:
    """By status, the requests to classify that the endpoint has counted."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == "shoal_requests_total"]
    return {sample.labels["status"]: sample.value for sample in samples}


def test_overload_is_refused_and_counted_and_health_stays_green(url: str) -> None:
    statuses: Counter[int] = Counter()
    health: list[int] = []
    done = False

    async def ask(client: httpx.AsyncClient) -> None:
        while not done:
            answer = await client.post("/v1/classify", json={"texts": TEXTS})
            statuses[answer.status_code] += 1
            assert FULL not in answer.headers
            if answer.status_code == 429:
                assert answer.json()["detail"].startswith("Too many requests wait")
                assert int(answer.headers["retry-after"]) >= 1

    async def run() -> None:
        nonlocal done
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client, asyncio.TaskGroup() as group:
            for _ in range(100):
                group.create_task(ask(client))
            until = time.monotonic() + 6
            while time.monotonic() < until:
                health.append((await client.get("/healthz")).status_code)
                await asyncio.sleep(0.2)
            done = True

    warm = httpx.post(f"{url}/v1/classify", json={"texts": TEXTS}, timeout=60)
    assert warm.status_code == 200
    asyncio.run(run())
    assert set(statuses) == {200, 429}
    assert statuses[429] > statuses[200]
    assert set(health) == {200}
    time.sleep(1)  # the moment for which HAProxy refuses
    started = time.monotonic()
    assert httpx.post(f"{url}/v1/classify", json={"texts": ["late"]}).status_code == 200
    assert time.monotonic() - started < 5
    assert counted(url) == {"200": statuses[200] + 2, "429": statuses[429]}
