"""The page for people in a real browser, and over plain HTTP."""

import functools
import json
import re
import shutil
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect, sync_playwright
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from upath import UPath

from models.engine import Engine
from models.explaining import Attribution, Explainer, Explanation, UnexplainableError
from models.torch_engine import load_torch_engine
from serve.guard import Guard
from serve.keys import create_key
from serve.known_keys import KnownKeys
from serve.metrics import merged
from serve.settings import AbstainSettings, ServeSettings
from serve.webpage import FOLDER
from tests.serve.endpoint import running
from tests.small_classifiers import CORPUS, SENTIMENT, TOPICS, make_classifier, reference_by

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path (Debian: apt-get install chromium)")

SETTINGS = ServeSettings(max_body_bytes=4096)
CARD = {"metrics": {"accuracy": 0.9125, "f1": 0.8}, "lineage": {"finetune": {"fingerprint": "3fb1c2a9", "inputs": {}}}}
TEXT = "The flight was late again"
SCRIPT = "<script>document.title = 'x'</script><img src=x onerror=alert(1)> late"
STEP_MS = 3000
"""Between two readings of the metrics."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classifier(tmp_path_factory.mktemp("single"), (SENTIMENT, TOPICS))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return load_torch_engine(folder, precision="fp32", threads=1)


@pytest.fixture(scope="module")
def url(folder: Path, engine: Engine) -> Iterator[str]:
    reference = reference_by(engine, CORPUS * 10)
    with running(engine, SETTINGS, card=CARD, reference=reference, explainer=lambda: Explainer(folder)) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """A page, and all that a browser complained about in it."""

    def __init__(self, context: BrowserContext) -> None:
        self.page = context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self._note(message.type, message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))

    def _note(self, kind: str, text: str) -> None:
        # A status that is no success is told there too; what the page makes of it is looked at by itself.
        if kind in ("error", "warning") and "Failed to load resource" not in text:
            self.complaints.append(text)


@pytest.fixture
def opened(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page in a context of its own; fails where the browser refused or missed anything."""
    contexts, pages = [], []

    def opened(url: str, **options: Any) -> Page:
        context = browser.new_context(**options)
        context.set_default_timeout(10_000)
        contexts.append(context)
        pages.append(Opened(context))
        pages[-1].page.goto(url)
        return pages[-1].page

    yield opened
    complaints = [each for page in pages for each in page.complaints]
    for context in contexts:
        context.close()
    assert not complaints


def classify(page: Page, text: str = TEXT) -> None:
    page.get_by_label("Text", exact=True).fill(text)
    page.get_by_role("button", name="Classify").click()
    page.locator(".answer").first.wait_for()


def alert(page: Page) -> Any:
    return page.get_by_role("alert").filter(has_text=re.compile("."))


def test_the_page_and_its_files_are_the_installed_ones(url: str) -> None:
    for method in ("GET", "HEAD"):
        page = httpx.request(method, f"{url}/")
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert int(page.headers["content-length"]) == (FOLDER / "index.html").stat().st_size
        assert page.content == ((FOLDER / "index.html").read_bytes() if method == "GET" else b"")
        # A new version is seen at once, and the same one is not sent again.
        assert page.headers["cache-control"] == "no-cache"
        again = httpx.request(method, f"{url}/", headers={"If-None-Match": page.headers["etag"]})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", page.headers["etag"])
    assert httpx.get(f"{url}/", headers={"If-None-Match": '"other"'}).status_code == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    data = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert data["serve"] == ["page/*"]
    for file in FOLDER.iterdir():
        assert file.is_file()
        text = file.read_text()
        # Nothing from elsewhere, and no text taken for HTML.
        assert not re.search(r"//(?!www\.w3\.org/2000/svg)\w|innerHTML|insertAdjacentHTML|document\.write", text), file
        if file.suffix == ".html":
            for address in re.findall(r'(?:src|href)="([^"]+)"', text):
                assert httpx.get(f"{url}/{address}").status_code == 200
            assert not re.search(r"<script(?![^>]* src=)| style=|<style| on\w+=", text)


def test_looking_at_the_page_is_no_request_to_classify(engine: Engine) -> None:
    with running(engine, SETTINGS) as url:
        httpx.get(f"{url}/")
        httpx.head(f"{url}/page/page.js")
        assert "shoal_requests_total{" not in httpx.get(f"{url}/metrics").text
        assert httpx.get(f"{url}/page/nothing.js").status_code == 404
        assert httpx.put(f"{url}/").headers["allow"] == "GET, HEAD, POST"
        document = httpx.get(f"{url}/openapi.json").json()
        assert list(document["paths"]["/"]) == ["post"]
        assert not [path for path in document["paths"] if path.startswith("/page")]


@in_browser
def test_a_text_is_classified_and_bars_show(url: str, engine: Engine, opened: Callable[..., Page]) -> None:
    page = opened(url)
    expect(page).to_have_title("small · Shoal")
    classify(page)
    expected = engine.classify([TEXT])[0].labels
    for section, (name, said) in zip(page.locator(".answer").all(), expected.items(), strict=True):
        expect(section.get_by_role("heading")).to_have_text(name)
        given = said.label if isinstance(said.label, list) else [said.label]
        rows = section.get_by_role("listitem").all()
        ordered = sorted(said.probabilities, key=lambda each: -said.probabilities[each])
        for row, label in zip(rows, ordered, strict=True):
            probability = said.probabilities[label]
            expect(row.locator("bdi")).to_have_text(label)
            expect(row.locator(".number")).to_have_text(f"{100 * probability:.1f}%")
            assert (row.locator(".badge").count() == 1) == (label in given)
            bar = row.locator(".bar").evaluate("bar => bar.firstChild.offsetWidth / bar.offsetWidth")
            assert bar == pytest.approx(probability, abs=0.02)
    status = page.get_by_role("status")
    assert status.get_attribute("aria-live") == "polite"
    expect(status).to_contain_text(f"sentiment: {expected['sentiment'].label}, ")
    card = page.get_by_role("region", name="Model").or_(page.locator("section", has_text="Fingerprint")).last
    for text in ("small", "f00d", "32 tokens", "any number of", "0.9125", "3fb1c2a9", "positive", "price"):
        expect(card).to_contain_text(text)


@in_browser
def test_what_looks_like_html_is_text(url: str, opened: Callable[..., Page]) -> None:
    page = opened(url)
    classify(page, SCRIPT)
    page.get_by_role("button", name="Why negative?").click()
    expect(page.locator(".words")).to_have_text(SCRIPT)
    expect(page).to_have_title("small · Shoal")
    assert page.locator("main img, main script").count() == 0


@in_browser
def test_the_browser_refuses_whatever_is_not_the_pages_own(url: str, browser: Browser) -> None:
    page = browser.new_page()
    page.goto(url)
    tried = """async () => {
        const refused = []
        for (const attempt of [
            () => { document.body.innerHTML = "<b>x</b>" },
            () => fetch("http://127.0.0.1:9/"),
        ]) { try { await attempt() } catch (error) { refused.push(error.name) } }
        document.body.setAttribute("style", "color: red")
        return [refused, getComputedStyle(document.body).color !== "rgb(255, 0, 0)"]
    }"""
    assert page.evaluate(tried) == [["TypeError", "TypeError"], True]
    page.close()


@in_browser
def test_the_keyboard_is_enough(url: str, opened: Callable[..., Page]) -> None:
    page = opened(url)
    page.get_by_role("button", name="Classify").wait_for()
    keyboard = page.keyboard
    keyboard.press("Tab")
    expect(page.get_by_role("link", name="HTTP API")).to_be_focused()
    keyboard.press("Tab")
    expect(page.get_by_label("Text", exact=True)).to_be_focused()
    keyboard.press("Tab")
    keyboard.press("Enter")
    expect(alert(page)).to_have_text("Type a text first.")
    expect(page.get_by_label("Text", exact=True)).to_be_focused()
    keyboard.type("late again")
    keyboard.press("Enter")
    keyboard.press("Control+Enter")
    page.locator(".answer").first.wait_for()
    expect(alert(page)).to_have_count(0)
    keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    keyboard.press("Tab")
    assert re.fullmatch(r"Why \w+\?", page.evaluate("document.activeElement.textContent"))
    keyboard.press("Space")
    expect(page.locator(".why").first).to_be_visible()
    expect(page.get_by_role("status")).to_contain_text("Why ")


class Told:
    """An explainer that says what it is given, or refuses."""

    def __init__(self, refusal: Exception | None = None, relative_error: float = 0.1) -> None:
        self.refusal = refusal
        self.relative_error = relative_error

    def explain(self, text: str, pair: str | None = None, **asked: Any) -> Explanation:
        if self.refusal:
            raise self.refusal
        words = [(w.start(), w.end()) for w in re.finditer(r"\S+", text)]
        given = zip(words, (2.0, -1.0, 0.01), strict=False)
        return Explanation(
            text=text,
            pair=pair,
            column=asked["column"],
            label=asked["label"],
            probability=0.75,
            words=tuple(Attribution(text[start:end], "text", start, end, value) for (start, end), value in given),
            total=1.01,
            difference=1.122,
            error=0.112,
            relative_error=self.relative_error,
            steps=256,
            truncated=False,
            tokens=5,
        )


@in_browser
def test_words_are_marked_where_the_explanation_says(engine: Engine, opened: Callable[..., Page]) -> None:
    """Places are code points: an emoji is one, and two UTF-16 units. Colour is not all that tells for from against."""
    told = Told()
    with running(engine, SETTINGS, explainer=lambda: told) as url:  # type: ignore[arg-type,return-value]
        page = opened(url)
        text = "\U0001f6eb\U0001f6eb שלום late"
        classify(page, text)
        page.get_by_role("button", name="Why neutral?").click()
        why = page.get_by_role("group", name="Why neutral")
        expect(why.locator(".words")).to_have_text(text)
        expect(why.locator(".words mark.for")).to_have_text("\U0001f6eb\U0001f6eb")
        expect(why.locator(".words mark.against")).to_have_text("שלום")
        styles = [
            why.locator(f".words mark.{kind}").evaluate("mark => getComputedStyle(mark).textDecorationStyle")
            for kind in ("for", "against")
        ]
        assert styles == ["solid", "wavy"]
        expect(why).to_contain_text("The sum is off by 10.0%. That is much: do not rely on this explanation.")
        expect(page.get_by_label("Text", exact=True)).to_have_attribute("dir", "auto")
        why.get_by_text("The words in numbers").click()
        expect(why.get_by_role("row", name="שלום")).to_contain_text("\u22121.00")
        told.relative_error = 0.01
        page.get_by_role("button", name="Why positive?").click()
        why = page.get_by_role("group", name="Why positive")
        expect(why).to_contain_text("The sum is off by 1.0%.")
        expect(why).not_to_contain_text("do not rely")
        told.refusal = UnexplainableError("a model of this kind reads each text twice and cannot be explained.")
        page.get_by_role("button", name="Why positive?").click()
        expect(alert(page)).to_have_text("a model of this kind reads each text twice and cannot be explained.")
        expect(page.get_by_role("button", name="Why")).to_have_count(0)
        classify(page)
        expect(page.get_by_role("button", name="Why")).to_have_count(0)


@in_browser
def test_pairs_and_no_answer(tmp_path: Path, opened: Callable[..., Page]) -> None:
    engine = load_torch_engine(make_classifier(tmp_path, pair=True), precision="fp32", threads=1)
    settings = ServeSettings(abstain=AbstainSettings(below=0.999, label="nothing sure"))
    with running(engine, settings, thresholds={"sentiment": 0.999}) as url:
        page = opened(url)
        page.get_by_label("First text").fill("good crew")
        page.get_by_role("button", name="Classify").click()
        expect(alert(page)).to_have_text("Type a text first.")
        page.get_by_label("Second text").fill("late " * 60)
        page.get_by_role("button", name="Classify").click()
        expect(page.locator(".said")).to_have_text("no answer (nothing sure)")
        expect(page.locator(".badge")).to_have_count(0)
        expect(page.locator(".note")).to_contain_text("its end was not seen")
        expect(page.get_by_role("listitem").filter(has=page.locator(".bar"))).to_have_count(3)
        expect(page.get_by_role("button", name="Why")).to_have_count(0)  # There is no /v1/explain.


@in_browser
def test_a_guarded_endpoint_asks_for_a_key_and_keeps_it_in_the_tab(
    engine: Engine, tmp_path: Path, opened: Callable[..., Page]
) -> None:
    store = UPath(tmp_path)
    shown = create_key(store, "reader", ["classify"])[1]
    settings = ServeSettings(keys=True)
    with running(engine, settings, Guard(settings, KnownKeys(store))) as url:
        page = opened(url)
        field = page.get_by_label("Key or token")
        expect(field).to_have_attribute("type", "password")
        expect(field).to_be_focused()
        expect(page.get_by_text("It is an API key.")).to_be_visible()
        for wrong, sentence in (("", "first"), ("ключ", "ASCII"), ("shoal_wrong", "This is no valid API key.")):
            field.fill(wrong)
            field.press("Enter")
            expect(alert(page)).to_contain_text(sentence)
            expect(field).to_be_focused()
        field.fill(shown)
        field.press("Enter")
        expect(page.get_by_label("Text", exact=True)).to_be_focused()
        expect(field).to_be_hidden()
        classify(page)
        expect(page.locator("#live-problem")).to_contain_text("it needs the scope metrics.")
        assert page.evaluate("[Object.values(sessionStorage), localStorage.length, document.cookie]") == [
            [shown],
            0,
            "",
        ]
        page.reload()
        classify(page)
        page.get_by_role("button", name="Forget the key").click()
        expect(field).to_be_visible()
        expect(page.get_by_label("Text", exact=True)).to_be_hidden()
        assert page.evaluate("sessionStorage.length") == 0


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_one_way_and_axe_finds_nothing(url: str, scheme: str, opened: Callable[..., Page]) -> None:
    page = opened(url, viewport={"width": 360, "height": 740}, color_scheme=scheme, reduced_motion="reduce")
    classify(page, "the flight was late " + "again" * 30)
    page.get_by_role("button", name="Why negative?").click()
    page.locator(".why summary").click()
    page.locator("#tiles dd").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    found = Axe().run(page)
    assert not found.response["violations"], found.generate_report()
    assert {"color-contrast", "label", "button-name", "html-has-lang"} <= {e["id"] for e in found.response["passes"]}


@in_browser
def test_the_endpoints_own_sentence_is_shown(url: str, opened: Callable[..., Page]) -> None:
    page = opened(url)
    page.get_by_label("Text", exact=True).fill("late " * 1000)
    page.get_by_role("button", name="Classify").click()
    expect(alert(page)).to_have_text("The request's body is larger than 4,096 bytes; send fewer texts at a time.")
    refusals: list[tuple[int, dict[str, str], str, str]] = [
        (
            429,
            {"Retry-After": "7"},
            "Too many requests wait; try again in 7 s.",
            "Too many requests wait; try again in 7 s.",
        ),
        (503, {"Retry-After": "1"}, "No replica answers.", "No replica answers. Try again in 1 s."),
    ]
    for status, headers, detail, sentence in refusals:
        body = json.dumps({"title": "x", "status": status, "detail": detail})

        shown = {"status": status, "headers": headers, "content_type": "application/problem+json", "body": body}
        page.route("**/v1/classify", functools.partial(lambda route, shown: route.fulfill(**shown), shown=shown))
        page.get_by_label("Text", exact=True).fill(TEXT)
        page.get_by_role("button", name="Classify").click()
        expect(alert(page)).to_have_text(sentence)
        page.unroute("**/v1/classify")
    page.route("**/v1/classify", lambda route: route.fulfill(status=502, body="<h1>Bad</h1>", content_type="text/html"))
    page.get_by_role("button", name="Classify").click()
    expect(alert(page)).to_have_text("The endpoint answered 502 Bad Gateway.")
    page.unroute("**/v1/classify")
    page.route("**/*", lambda route: route.abort())
    page.get_by_role("button", name="Classify").click()
    expect(alert(page)).to_contain_text("The endpoint cannot be reached")
    page.unroute("**/*")
    classify(page)
    expect(alert(page)).to_have_count(0)


@in_browser
def test_an_endpoint_that_was_away_is_found_again(url: str, opened: Callable[..., Page], browser: Browser) -> None:
    page = opened(url)
    page.route("**/v1/model", lambda route: route.abort())
    page.reload()
    expect(alert(page)).to_contain_text("The endpoint cannot be reached")
    page.unroute("**/v1/model")
    page.get_by_role("button", name="Try again").click()
    classify(page)
    expect(page.get_by_role("button", name="Try again")).to_be_hidden()


@in_browser
def test_live_figures_come_from_the_metrics_of_all_replicas(engine: Engine, browser: Browser, opened: Any) -> None:
    """Two replicas, of which one answers six requests for each that it refuses."""
    reference = reference_by(engine, CORPUS * 10)
    with running(engine, SETTINGS, replica="b", reference=reference) as other:
        other_page = functools.partial(httpx.get, f"{other}/metrics")

        async def others() -> list[str]:
            return [other_page().text]

        with running(engine, SETTINGS, replica="a", reference=reference, other_metrics=others) as url:
            httpx.post(f"{other}/v1/classify", json={"texts": CORPUS})
            page = opened("about:blank")
            page.clock.install()
            page.goto(url)
            tiles = page.locator("#tiles")
            expect(tiles).to_contain_text("Replicas")
            values = dict.fromkeys(tiles.locator("dt").all_inner_texts())
            assert len(values) == 6
            page.clock.run_for(STEP_MS)
            for _ in range(6):
                httpx.post(f"{other}/v1/classify", json={"texts": CORPUS * 20})
            httpx.post(f"{other}/v1/classify", json={})
            # When the page reads is its own affair; once it has read all, one of seven was refused.
            until = time.monotonic() + 20
            while True:
                for _ in range(6):
                    httpx.post(f"{other}/v1/classify", json={"texts": CORPUS})
                httpx.post(f"{other}/v1/classify", json={})
                page.clock.run_for(STEP_MS)
                names, said = tiles.locator("dt").all_inner_texts(), tiles.locator("dd").all_inner_texts()
                shown = dict(zip(names, said, strict=True))
                rate, refused = (float(shown[f"{each} a second"]) for each in ("Requests", "Refused or failed"))
                if rate > 0.2 and refused == pytest.approx(rate / 7, rel=0.1):
                    break
                assert time.monotonic() < until, shown
            assert shown["Replicas"] == "2"
            assert re.fullmatch(r"[\d.]+ m?s", shown["Latency, median"])
            drift = page.locator("#drift tbody tr")
            expect(drift).to_have_count(5)
            expect(drift.filter(has_text="labels of sentiment")).to_contain_text("none")
            expect(page.locator("#drift-hint")).to_have_text(
                re.compile(r"The last \d+ texts against those of the evaluation\.")
            )


def evaluated(page: Page, expression: str, *given: Any) -> Any:
    """The value of an expression in which `m` is the module of the metrics and `given` what was given."""
    return page.evaluate(
        f"async given => {{ const m = await import('./page/metrics.js'); return {expression} }}", given
    )


@in_browser
def test_the_metrics_page_is_read_as_prometheus_own_parser_reads_it(url: str, opened: Callable[..., Page]) -> None:
    registry = CollectorRegistry()
    gauge = Gauge("odd", 'Help with \\ and "quotes"\nand a line.', ("label", "other"), registry=registry)
    odd = ["", "plain", 'a "quoted", {b="c"} d', "back\\slash\\n", "two\nlines", "\\", '"', "}", "😀 שלום", "a,b=", " "]
    for number, each in enumerate(odd):
        gauge.labels(each, odd[-number]).set([1.5, float("inf"), -float("inf"), 1e-9, 1e21][number % 5])
    Gauge("bare", "None.", registry=registry).set(3)
    text = merged([generate_latest(registry).decode(), httpx.get(f"{url}/metrics").text])
    read = "m.parse(given[0]).map(({ name, labels, value }) => [name, Object.fromEntries(labels), String(value)])"
    found = evaluated(opened(url), read, text + 'odd{\nodd{a=}\n1 2\nodd{a="b"} x\n# odd 1\n')
    expected = [(s.name, s.labels, s.value) for family in text_string_to_metric_families(text) for s in family.samples]
    assert [(name, labels, float(value)) for name, labels, value in found] == expected
    assert len(found) > 50


@in_browser
def test_rates_and_quantiles(url: str, opened: Callable[..., Page]) -> None:
    def scrape(**replicas: tuple[int, int, tuple[int, ...]]) -> str:
        lines = []
        for name, (answered, refused, buckets) in replicas.items():
            own = f'model="m",version="v",replica="{name}"'
            lines += [f"shoal_build_info{{{own}}} 1", f'shoal_requests_total{{{own},status="200"}} {answered}']
            lines += [f'shoal_requests_total{{{own},status="429"}} {refused}'] if refused else []
            bounds = ("0.1", "0.2", "+Inf")
            lines += [
                f'shoal_request_seconds_bucket{{{own},le="{b}"}} {n}' for b, n in zip(bounds, buckets, strict=True)
            ]
        others = 'shoal_requests_total{model="other",version="v",replica="a",status="200"}'
        return "\n".join([*lines, f"{others} {time.perf_counter()}"])

    page = opened(url)
    readings = [
        scrape(a=(10, 0, (10, 10, 10)), gone=(7, 0, (7, 7, 7))),
        scrape(a=(20, 4, (15, 20, 20)), new=(1000, 0, (1000, 1000, 1000))),  # What was before counts for nothing.
        scrape(a=(3, 1, (0, 3, 3)), new=(1002, 0, (1000, 1000, 1002))),  # `a` began anew.
    ]
    joined = "m.together([1, 2].map(i => m.between(read(i - 1), read(i))))"
    joined = f"(read => {joined})(i => m.reading(given[i], 3 * i, 'm'))"
    found = evaluated(
        page, f"(all => [all.seconds, all.requests, all.unanswered, [...all.buckets]])({joined})", *readings
    )
    # 10 answered and 4 refused of `a`, then 3 and 1 again, and 2 of `new`.
    assert found[:3] == [6, 20, 5]
    assert found[3] == [[0.1, 5], [0.2, 13], [None, 15]] or found[3][:2] == [[0.1, 5], [0.2, 13]]
    quantiles = f"(all => [0.2, 0.5, 0.99].map(q => m.quantile(all.buckets, q)))({joined})"
    assert evaluated(page, quantiles, *readings) == [
        {"seconds": pytest.approx(0.06), "beyond": False},
        {"seconds": pytest.approx(0.1 + 0.1 * 2.5 / 8), "beyond": False},
        {"seconds": 0.2, "beyond": True},
    ]
    assert evaluated(page, "m.quantile(new Map([[0.1, 0], [Infinity, 0]]), 0.5)") is None
    texts = {"a": 300, "b": 100}
    psi = {"a": 0.1, "b": 0.5}
    lines = [f'shoal_drift_texts{{replica="{r}"}} {n}' for r, n in texts.items()]
    for kind in ("psi", "psi_noise"):
        lines += [f'shoal_drift_{kind}{{replica="{r}",signal="length",column=""}} {v}' for r, v in psi.items()]
    mean = float(np.average(list(psi.values()), weights=list(texts.values())))
    found = evaluated(page, "m.state(m.reading(given[0], 0, 'm'))", "\n".join(lines))
    assert found["texts"] == 400
    assert found["drift"] == [
        {"signal": "length", "column": "", "psi": pytest.approx(mean), "noise": pytest.approx(mean)}
    ]


@in_browser
def test_it_works_under_any_path(url: str, opened: Callable[..., Page]) -> None:
    page = opened("about:blank")
    with httpx.Client(base_url=url) as client:

        def pass_on(route: Route) -> None:
            asked = route.request
            assert asked.url.startswith("http://shoal.test/some/prefix/")
            path = asked.url.removeprefix("http://shoal.test/some/prefix")
            answer = client.request(asked.method, path, content=asked.post_data_buffer)
            route.fulfill(status=answer.status_code, headers=dict(answer.headers), body=answer.content)

        page.route("http://shoal.test/**", pass_on)
        page.goto("http://shoal.test/some/prefix/")
        classify(page)
        expect(page.locator("#tiles")).to_contain_text("Replicas")
        page.unroute_all()
