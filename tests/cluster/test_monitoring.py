"""Alerts and dashboard ask for metrics that there are, say what they mean, and reach somebody."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from models.engine import Engine
from models.torch_engine import load_torch_engine
from serve.drift import DriftSettings
from serve.settings import ServeSettings
from tests.serve.endpoint import running
from tests.small_classifiers import CORPUS, SENTIMENT, TOPICS, make_classifier, reference_by

FOLDER = Path("cluster/monitoring")
RULES = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]
RECORDED = {rule["record"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule}
QUERIES = {
    f"{panel['title']}: {target['legendFormat']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
}
SETTINGS = ServeSettings(max_texts=64, drift=DriftSettings(window_texts=40, min_texts=30))
LIKE_THEM, OTHERS = CORPUS * 14, ["zzz qqq"] * 44


def tool(*names: str) -> str:
    """The path of a program of Prometheus'."""
    for name in names:
        if found := shutil.which(name):
            return found
    pytest.skip(f"{names[0]} is not installed (Debian: apt-get install prometheus prometheus-alertmanager)")


def check(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def concrete(query: str, interval: str) -> str:
    """A panel's query with its variables filled in."""
    return query.replace("$__rate_interval", interval).replace("$model", ".+")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return load_torch_engine(make_classifier(tmp_path_factory.mktemp("served"), (SENTIMENT, TOPICS)), precision="fp32")


@pytest.fixture(scope="module")
def page(engine: Engine) -> str:
    """A metrics page after some texts."""
    with running(engine, SETTINGS, reference=reference_by(engine, LIKE_THEM)) as url:
        httpx.post(f"{url}/v1/classify", json={"texts": LIKE_THEM})
        return httpx.get(f"{url}/metrics").text


def test_the_rules_do_what_they_say() -> None:
    promtool = tool("promtool")
    check(promtool, "check", "config", FOLDER / "prometheus.yaml")
    check(promtool, "test", "rules", FOLDER / "alerts_test.yaml")


def test_every_alert_is_tested_and_alertmanager_takes_its_configuration() -> None:
    tests = yaml.safe_load((FOLDER / "alerts_test.yaml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    for quiet in (False, True):
        assert {case["alertname"] for case in cases if ("exp_alerts" in case) != quiet} == {a["alert"] for a in ALERTS}
    check(tool("amtool"), "check-config", FOLDER / "alertmanager.yaml")


def test_every_query_of_the_dashboard_is_one(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{n}", "expr": concrete(query, "1m")} for n, query in enumerate(QUERIES.values())]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    check(tool("promtool"), "check", "rules", tmp_path / "rules.yaml")


def test_every_metric_that_is_asked_for_is_on_the_page(page: str) -> None:
    told = {line.split("{")[0].split(" ")[0] for line in page.splitlines() if not line.startswith("#")}
    variables = "".join(str(each["query"]) for each in DASHBOARD["templating"]["list"])
    for text in ((FOLDER / "alerts.yaml").read_text(), "".join(QUERIES.values()), variables):
        assert (asked := set(re.findall(r"\bshoal_\w+", text)))
        assert asked - told == set()
    assert set(re.findall(r"\bshoal:\w+:\w+", (FOLDER / "alerts.yaml").read_text())) == RECORDED
    assert "shoal:" not in "".join(QUERIES.values()), "a dashboard must work without the rules"


def test_every_metric_is_documented(page: str) -> None:
    documented = Path("docs/http-api.md").read_text() + Path("docs/monitoring.md").read_text()
    for name in re.findall(r"^# TYPE (\w+)", page, re.M):
        assert f"`{name}" in documented, name


def test_alerts_say_how_bad_what_and_where_to_read_on() -> None:
    headings = re.findall(r"^#+ (\w+)$", Path("docs/monitoring.md").read_text(), re.M)
    for alert in ALERTS:
        assert alert["labels"]["severity"] in {"critical", "warning"}
        notes = alert["annotations"]
        assert notes["runbook_url"] == f"docs/monitoring.md#{alert['alert'].lower()}"
        assert alert["alert"] in headings
        assert notes["summary"].endswith(".")
        assert "$value" in notes["description"] or alert["alert"] == "ShoalDown"


def test_the_dashboard_is_what_grafana_takes() -> None:
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    source = {"type": "prometheus", "uid": "${datasource}"}
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["type"] == "timeseries"
        assert all(each["datasource"] == source for each in (panel, *panel["targets"], variables["model"]))
        assert panel["description"].endswith(".")
        letters = [target["refId"] for target in panel["targets"]]
        assert len(letters) == len(set(letters)) > 0
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(numbers) == len(set(numbers))
    assert 8 <= len(DASHBOARD["uid"]) <= 40


# From here on: the real Prometheus and Alertmanager.


class Inbox(BaseHTTPRequestHandler):
    """Whoever the alerts are sent to."""

    received: list[dict[str, Any]]

    def do_POST(self) -> None:  # As the library names it.
        self.received += json.loads(self.rfile.read(int(self.headers["Content-Length"])))["alerts"]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@contextlib.contextmanager
def inbox() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The URL of a receiver, and what it has received."""
    received: list[dict[str, Any]] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), type("OwnInbox", (Inbox,), {"received": received})) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", received
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def program(folder: Path, *command: str) -> Iterator[None]:
    """A program that runs while the block does, with its log in the folder."""
    with (folder / f"{Path(command[0]).name}.log").open("wb") as log:
        process = subprocess.Popen(["nice", *command], stdout=log, stderr=log)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


def until(what: Callable[[], Any], seconds: float = 90) -> Any:
    """What it gives, as soon as that is something."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.TransportError):
            if found := what():
                return found
        assert time.monotonic() < deadline, what
        time.sleep(0.3)


def write_configurations(folder: Path, endpoint: str, alertmanager: str, inbox: str) -> None:
    """Those of the repository, with other addresses, and seconds in place of minutes."""
    rules = re.sub(r"\[(5|30)m\]", "[10s]", (FOLDER / "alerts.yaml").read_text())
    (folder / "alerts.yaml").write_text(re.sub(r"for: \d+m", "for: 2s", rules))
    scraping = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    scraping["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    scraping["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [alertmanager]
    scraping["scrape_configs"][0]["static_configs"][0]["targets"] = [endpoint]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(scraping))
    telling = yaml.safe_load((FOLDER / "alertmanager.yaml").read_text())
    telling["route"] |= {"group_wait": "0s", "group_interval": "1s"}
    for receiver in telling["receivers"]:
        receiver["webhook_configs"][0]["url"] = inbox + receiver["name"]
    (folder / "alertmanager.yaml").write_text(yaml.safe_dump(telling))


@pytest.mark.slow
def test_drift_reaches_somebody(engine: Engine, tmp_path: Path) -> None:
    prometheus, alertmanager = tool("prometheus"), tool("prometheus-alertmanager", "alertmanager")
    asked_at, told_at = address(), address()
    with contextlib.ExitStack() as stack:
        endpoint = stack.enter_context(contextlib.ExitStack())
        url = endpoint.enter_context(running(engine, SETTINGS, reference=reference_by(engine, LIKE_THEM)))
        sent_to, received = stack.enter_context(inbox())
        write_configurations(tmp_path, url.removeprefix("http://"), told_at, sent_to)
        options = [f"--storage.path={tmp_path / 'told'}", "--cluster.listen-address="]
        config = f"--config.file={tmp_path / 'alertmanager.yaml'}"
        stack.enter_context(program(tmp_path, alertmanager, config, f"--web.listen-address={told_at}", *options))
        options = [f"--storage.tsdb.path={tmp_path / 'asked'}", f"--web.listen-address={asked_at}"]
        stack.enter_context(program(tmp_path, prometheus, f"--config.file={tmp_path / 'prometheus.yaml'}", *options))

        def alerts() -> dict[str, dict[str, Any]]:
            return {a["labels"]["alertname"]: a for a in httpx.get(f"http://{told_at}/api/v2/alerts").json()}

        def values(query: str) -> list[float]:
            answer = httpx.get(f"http://{asked_at}/api/v1/query", params={"query": query}).json()
            return [float(series["value"][1]) for series in answer["data"]["result"]]

        def send(texts: list[str]) -> None:
            assert httpx.post(f"{url}/v1/classify", json={"texts": texts}).status_code == 200

        def drift_after(texts: list[str]) -> list[float]:
            send(texts)
            return values("shoal:drift_psi:mean")

        assert max(until(lambda: drift_after(LIKE_THEM))) < 0.25
        assert alerts() == {}
        for _ in range(3):
            send(OTHERS)
        until(lambda: send(OTHERS) or {"ShoalDrift", "ShoalUnknownTokens"} <= set(alerts()))  # type: ignore[func-returns-value]
        told = alerts()["ShoalDrift"]
        assert re.search(r"is \d+\.\d\d for small \(f00d\)", told["annotations"]["description"])
        assert told["receivers"] == [{"name": "tickets"}]
        until(lambda: any(alert["labels"]["alertname"] == "ShoalDrift" for alert in received))
        for name, query in QUERIES.items():
            assert values(concrete(query, "10s")), name
        endpoint.close()
        until(lambda: alerts().get("ShoalDown", {}).get("receivers") == [{"name": "pager"}])
