"""API keys in the store: made once, listed, revoked, and never to be had back from what is kept."""

import json
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from upath import UPath

import shoal
from cluster import claim
from cluster.logs import CommandLog
from cluster.store import ClusterError
from models.settings import InputError
from recipes import running
from serve.keys import KEYS, create_key, parse_lifetime, read_keys, revoke_key


@pytest.fixture
def store(tmp_path: Path) -> UPath:
    return UPath(tmp_path) / "store"


def test_a_key_is_kept_without_its_secret(store: UPath) -> None:
    key, shown = create_key(store, "team", ["metrics", "classify"], lifetime=timedelta(days=90), rate=5)
    _, its_id, secret = shown.split("_", 2)
    assert (its_id, len(secret)) == (key.id, 32)
    document = (store / KEYS).read_text()
    assert secret not in document
    assert key.sha256 in document
    assert read_keys(store) == [key]
    assert (key.scopes, key.rate) == (("classify", "metrics"), 5)
    assert key.expires is not None
    assert key.expires - key.created == timedelta(days=90)
    other, another = create_key(store, "team")
    assert another != shown
    assert [each.id for each in read_keys(store)] == [key.id, other.id]


def test_a_revoked_key_stays_revoked(store: UPath) -> None:
    first, second = create_key(store, "a")[0], create_key(store, "b")[0]
    revoked = revoke_key(store, first.id)
    assert revoke_key(store, first.id) == revoked
    now = datetime.now(UTC)
    assert [key.state(now) for key in read_keys(store)] == ["revoked", "valid"]
    assert read_keys(store)[1] == second
    with pytest.raises(InputError, match=r"has no key with the id 'nobody'; `shoal keys list` lists them"):
        revoke_key(store, "nobody")


def test_a_key_expires_at_its_moment(store: UPath) -> None:
    key, _ = create_key(store, "a", lifetime=timedelta(minutes=1))
    assert key.expires is not None
    assert key.state(key.expires - timedelta(microseconds=1)) == "valid"
    assert key.state(key.expires) == "expired"


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_writers_at_once_do_not_lose_each_others_keys(
    kind: str, request: pytest.FixtureRequest, store: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store if kind == "local" else UPath(request.getfixturevalue("bucket")) / "store"
    hurried = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: time.sleep(seconds / 100))
    monkeypatch.setattr(claim, "time", hurried)
    made: list[str] = []
    threads = [threading.Thread(target=lambda: made.append(create_key(store, "a")[0].id)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 6
    assert {key.id for key in read_keys(store)} == set(made)
    assert revoke_key(store, made[0]) in read_keys(store)


def test_a_damaged_document_is_told_and_left_alone(tmp_path: Path) -> None:
    store = UPath(tmp_path)
    assert read_keys(store) == []
    for damaged in ('{"format": 1, "keys": [{"id": 3}]}', "{", '{"format": 2}'):
        (tmp_path / KEYS).write_text(damaged)
        with pytest.raises(ClusterError, match=r"keys\.json is damaged: "):
            create_key(store, "a")
        assert (tmp_path / KEYS).read_text() == damaged


def test_a_store_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"cannot read .*there is no folder"):
        read_keys(UPath(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("text", "span"),
    [("30m", timedelta(minutes=30)), ("12h", timedelta(hours=12)), ("90d", timedelta(90)), ("2w", timedelta(14))],
)
def test_lifetimes(text: str, span: timedelta) -> None:
    assert parse_lifetime(text) == span


@pytest.mark.parametrize("text", ["", "90", "d", "0d", "-1d", "1y", "1.5d", "999999999w", "9" * 99 + "d", "٣d", "1d2h"])
def test_what_is_no_lifetime(text: str) -> None:
    with pytest.raises(InputError, match="is no lifetime of a key"):
        parse_lifetime(text)


def test_the_command_shows_a_key_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("SHOAL_LOGS", str(tmp_path / "logs"))
    monkeypatch.setattr(running, "LOG", CommandLog())
    store = ["--store", str(tmp_path / "store")]

    def command(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        return shoal.main(["keys", *arguments, *store]), *capfd.readouterr()

    status, out, err = command("list")
    assert (status, out) == (2, "")
    assert "there is no store at" in err
    status, shown, told = command(
        "create", "the [bold] team", "--scope", "metrics", "--expires", "90d", "--rate", "2.5"
    )
    assert status == 0
    prefix, its_id, secret = shown.strip().split("_", 2)
    assert prefix == "shoal"
    assert f"The key {its_id} for the [bold] team allows metrics and expires at " in told
    assert secret not in told
    listed = command("list")[1]
    for part in (its_id, "the [bold] team", "metrics", "2.5/s", "valid"):
        assert part in listed
    assert secret not in listed
    assert f"The key {its_id} of the [bold] team is revoked" in command("revoke", its_id)[1]
    assert "revoked" in command("list")[1]
    for wrong, sentence in {
        ("create", "x", "--scope", "everything"): "'everything' is no scope of a key; there are classify, explain,",
        ("create", "x", "--rate", "0"): "a key's rate is 0, but must be",
        ("create", "x", "--rate", "nan"): "a key's rate is nan, but must be",
        ("create", "x", "--expires", "soon"): "'soon' is no lifetime of a key",
        ("create", " "): "a key's NAME must be",
        ("revoke", shown.strip()): "has no key with the id 'shoal_",
    }.items():
        status, out, err = command(*wrong)
        assert (status, out) == (2, "")
        assert sentence in err
        assert secret not in err
    assert len(json.loads((tmp_path / "store" / KEYS).read_text())["keys"]) == 1
