"""No personal datum of the made set is in any log or sample, and none reaches a model that is to be spared of them."""

import io
import json
import logging
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Encoding
from upath import UPath

from models.explaining import Explainer
from models.redaction import RedactionSettings
from models.torch_engine import TorchEngine, load_torch_engine
from serve.logs import JsonFormatter, logger
from serve.model import ServedModel
from serve.sampling import Sampler, SampleSettings
from serve.settings import ServeSettings
from tests.personal_texts import Made, made
from tests.serve.endpoint import post, raw, running
from tests.serve.test_explaining import FOUND
from tests.small_classifiers import make_classifier

SET = made(29, seed=7)
"""Of phones, each form once; of other kinds, several times."""
SETTINGS = ServeSettings(log_requests="all", max_body_bytes=20_000)
GROUPS = [SET[start : start + 29] for start in range(0, len(SET), 29)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classifier(tmp_path_factory.mktemp("one"))


@pytest.fixture
def logged() -> Iterator[Callable[[], str]]:
    """All that any logger writes, as plain text and as JSON."""
    root, stream = logging.getLogger(), io.StringIO()
    plain, lines = logging.StreamHandler(stream), logging.StreamHandler(stream)
    plain.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s %(stack_info)s"))
    lines.setFormatter(JsonFormatter())
    level = root.level, logging.getLogger("shoal").level
    root.setLevel(logging.DEBUG)
    for handler in (plain, lines):
        root.addHandler(handler)
    yield lambda: stream.getvalue()
    for handler in (plain, lines):
        root.removeHandler(handler)
    root.setLevel(level[0])


class SpyingTokenizer:
    """Keeps what it is to read; fails, with all of it in the message, where it is told to."""

    def __init__(self, engine: TorchEngine) -> None:
        self._inner = engine.tokenizer
        self.read: list[str] = []
        self.fails = False

    def encode_batch(self, texts: list[str]) -> list[Encoding]:
        self.read += texts
        if self.fails:
            try:
                raise KeyError(texts[0])
            except KeyError as error:
                raise RuntimeError(f"cannot read {texts}") from error
        found: list[Encoding] = self._inner.encode_batch(texts)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class FailingExplainer:
    """Explains the first, fails at the second, and so on."""

    def __init__(self) -> None:
        self.count = 0

    def explain(self, text: str, **_: Any) -> Any:
        self.count += 1
        if self.count % 2 == 0:
            raise LookupError(f"nothing to say of {text!r}")
        return FOUND


def spied(engine: TorchEngine) -> SpyingTokenizer:
    spy = engine.tokenizer = SpyingTokenizer(engine)  # type: ignore[assignment]
    return spy  # type: ignore[return-value]


def ask_everything(url: str, group: list[Made]) -> list[int]:
    """Sends the texts by every way there is, whole and damaged; the statuses."""
    texts, each = [one.text for one in group], [{"text": one.text} for one in group[:4]]
    data = group[0].datum.encode("ascii", "ignore").replace(b" ", b"") or b"x"
    bodies: list[tuple[str, bytes]] = [
        ("/v1/classify", json.dumps({"texts": texts}).encode()),
        ("/v1/classify", json.dumps({"texts": texts}, ensure_ascii=False).encode()),
        ("/predict", json.dumps({"inputs": texts}).encode()),
        ("/predict", json.dumps({"inputs": texts, "truncate": False}).encode()),
        ("/", json.dumps({"inputs": texts}).encode()),
        *(("/v1/explain", json.dumps(one).encode()) for one in each),
        ("/v1/classify", json.dumps({"texts": texts}).encode()[:-3]),
        ("/v1/classify", json.dumps({"texts": [{one: 1} for one in texts]}).encode()),
        ("/v1/classify", json.dumps(dict.fromkeys(texts, 1)).encode()),
        ("/v1/classify", json.dumps(texts).encode()),
        ("/v1/classify", json.dumps({"texts": texts * 20}).encode()),
        ("/predict", json.dumps({"inputs": {"x": texts}}).encode()),
        ("/v1/explain", json.dumps({"text": texts}).encode()),
        ("/v1/explain", json.dumps({"text": "late", "label": texts[0]}).encode()),
        ("/nothing/" + data.decode("latin-1"), b"{}"),
        ("/v1/classify?q=" + data.decode("latin-1"), b"{}"),
    ]
    statuses = [raw(url, post(body, path=path))[0] for path, body in bodies]
    statuses.append(raw(url, post(b"{}", "X-Note: " + data.decode("latin-1"), "X-Request-Timeout-Ms: x"))[0])
    return statuses


def squeezed(text: str) -> str:
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text))).lower()


def left(text: str) -> list[str]:
    """The data of the set that the text, line by line, still holds, in whatever dress."""
    lines = {squeezed(line) for line in text.splitlines()}
    return [one.datum for one in SET if one.datum in text or any(squeezed(one.datum) in line for line in lines)]


def test_the_set_would_be_seen() -> None:
    whole = "\n".join(one.text for one in SET)
    assert left(whole) == [one.datum for one in SET]
    assert left(json.dumps(SET[0].text))
    assert {one.kind for one in SET} == {"email", "iban", "cn_id", "card", "ip", "us_ssn", "phone"}


def test_no_log_and_no_sample_holds_any(
    folder: Path, tmp_path: Path, logged: Callable[[], str], capfd: pytest.CaptureFixture[str]
) -> None:
    engine = load_torch_engine(folder, precision="fp32")
    spy = spied(engine)
    sampler = Sampler(SampleSettings(share=1, per_minute=10**6), UPath(tmp_path), engine.spec, ("small", "f00d", "r1"))
    statuses: set[int] = set()
    with running(engine, SETTINGS, sampler=sampler, explainer=FailingExplainer) as url:  # type: ignore[arg-type]
        for group in GROUPS:
            for fails in (False, True):
                spy.fails = fails
                statuses.update(ask_everything(url, group))
                for one in group[:3]:
                    logger("anything").warning("cannot read %s", one.text)
    sampler.flush()
    spy.fails = False
    assert {200, 400, 404, 413, 422, 500} <= statuses
    assert len(left("\n".join(spy.read))) == len(SET)  # the model, whose business it is, has seen all
    written = logged()
    assert written.count("shoal.requests") > 2 * 7 * 15
    assert written.count("RuntimeError: cannot read") > 7
    assert left(written) == []
    assert left(json.dumps([json.loads(line) for line in written.splitlines() if line.startswith("{")], indent=0,
                           ensure_ascii=False)) == []  # fmt: skip
    out, err = capfd.readouterr()
    assert left(out + err) == []
    samples = "".join(file.read_text(encoding="utf-8") for file in tmp_path.rglob("*.jsonl"))
    assert samples.count("\n") == 5 * len(SET)
    assert left(samples) == []
    assert all(f"[{kind}]" in samples for kind in ("EMAIL", "PHONE", "IBAN", "CARD", "IP", "US_SSN", "CN_ID"))


def test_masking_comes_before_the_model(folder: Path) -> None:
    settings = ServeSettings(redact=RedactionSettings(), engine="torch", explain=True, precision="fp32")
    served = ServedModel("small", "f00d", UPath(folder))
    engine = served.load(settings)
    assert isinstance(engine, TorchEngine)
    spy = spied(engine)
    explainers: list[Explainer] = []

    def load() -> Explainer:
        explainers.append(served.load_explainer(settings))
        return explainers[-1]

    with running(engine, settings, explainer=load) as url:
        for group in GROUPS:
            texts = [one.text for one in group]
            for path, body in (
                ("/v1/classify", {"texts": texts}),
                ("/predict", {"inputs": texts}),
                ("/", {"inputs": texts}),
            ):
                assert raw(url, post(json.dumps(body).encode(), path=path))[0] == 200
            one = group[0]
            answer = raw(url, post(json.dumps({"text": one.text}).encode(), path="/v1/explain"))[2]
            told = json.loads(answer)
            assert left(told["text"]) == []
            assert f"[{one.kind.upper()}]" in told["text"]
            assert all(told["text"][word["start"] : word["end"]] == word["text"] for word in told["words"])
    assert len(spy.read) == 3 * len(SET)
    assert left("\n".join(spy.read)) == []
    masked = {text for one in SET for text in [one.expected]}
    assert len(masked & set(spy.read)) > len(masked) * 0.9  # white space aside, they are what they should become
    (explainer,) = explainers
    explainer._engine.also_mask(None)
    assert left(explainer._engine.tokenised([SET[0].text])[0][0])  # so it was the setting that masked
