"""The registry: numbers are given once, aliases forget nothing, and what is wrong is told in one sentence."""

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upath import UPath

from cluster.digests import difference, digests
from cluster.registry import Registry
from cluster.store import Store, write_new
from cluster.versions import Ancestor, Content, Reference, RegistryError


def content(key: str = "a", weights: str = "0" * 64) -> Content:
    """What a version could point at; `key` stands for its fingerprints."""
    return Content(
        artifacts={"finetune": key, "evaluate": key},
        torch=f"finetune/{key}/model",
        evaluated=f"evaluate/{key}",
        sha256={f"finetune/{key}/model/model.safetensors": weights, f"evaluate/{key}/calibration.json": "1" * 64},
        metrics={"accuracy": 0.9, "engine": "onnx int8"},
        lineage={"finetune": Ancestor(fingerprint=key, inputs={"data": "d"})},
        recipe="täst",
    )


@pytest.fixture(params=["local", "s3"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    """A registry in a store of each kind."""
    root = str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("bucket") + "/store"
    return Registry(Store.open(root))


def test_versions_are_numbered_and_found_again(registry: Registry) -> None:
    first, new = registry.register("airline", content("a"), "the first")
    assert (first.number, new, str(first)) == (1, True, "airline:1")
    assert registry.register("airline", content("b"))[0].number == 2
    assert registry.register("airline", content("a"), "again") == (first, False)
    assert registry.register("other", content("a"))[0].number == 1
    # The same artifacts, made anew with other bytes, are another version.
    assert registry.register("airline", content("a", weights="2" * 64))[0].number == 3
    again = Registry(Store.open(str(registry.store.root)))
    assert again.names() == ["airline", "other"]
    assert [each.number for each in again.versions("airline")] == [1, 2, 3]
    assert again.version("airline", 1) == first
    assert (first.note, first.recipe, first.metrics["engine"]) == ("the first", "täst", "onnx int8")
    assert list(again.store.artifacts()) == [], "the registry is no artifact"


def test_aliases_are_moved_and_removed_and_the_history_says_why(registry: Registry) -> None:
    for key in "abc":
        registry.register("airline", content(key))
    registry.set_alias("airline", "stable", 1, "first")
    assert registry.set_alias("airline", "stable", 2, "not new", only_new=True) is None
    registry.set_alias("airline", "candidate", 3)
    registry.set_alias("airline", "stable", 3, "a quiet week")
    assert registry.set_alias("airline", "stable", 3, "already") is None
    assert registry.aliases("airline").of(3) == ["candidate", "stable"]
    registry.remove_alias("airline", "candidate", "promoted")
    assert registry.resolve(Reference.parse("airline")).number == 3
    assert registry.resolve(Reference.parse("airline:1")).number == 1
    found = json.loads((registry.store.root / "registry/airline/aliases.json").read_text())
    assert found["aliases"] == {"stable": 3}
    assert [(each["alias"], each["from"], each["to"], each["reason"]) for each in found["history"]] == [
        ("stable", None, 1, "first"),
        ("candidate", None, 3, ""),
        ("stable", 1, 3, "a quiet week"),
        ("candidate", 3, None, "promoted"),
    ]
    assert all(each["time"].endswith("+00:00") for each in found["history"])


STEPS = st.one_of(
    st.tuples(st.just("register"), st.sampled_from("abcdef")),
    st.tuples(st.sampled_from(["alias", "only new"]), st.sampled_from(["stable", "next"]), st.integers(1, 6)),
    st.tuples(st.just("remove"), st.sampled_from(["stable", "next"])),
)


@given(steps=st.lists(st.tuples(st.integers(0, 1), STEPS), max_size=15))
@settings(max_examples=40)
def test_whoever_does_what_numbers_grow_and_the_history_leads_to_the_aliases(
    steps: list[tuple[int, tuple[str, str, int] | tuple[str, str]]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        writers = [Registry(Store(UPath(folder))) for _ in range(2)]
        registered: list[str] = []
        pointed: dict[str, int] = {}
        changes = 0
        for writer, step in steps:
            registry, (kind, what, *rest) = writers[writer], step
            before = dict(pointed)
            if kind == "register":
                number = registry.register("m", content(what))[0].number
                if what not in registered:
                    registered.append(what)
                assert number == registered.index(what) + 1
            elif kind == "remove":
                if what in pointed:
                    registry.remove_alias("m", what)
                    del pointed[what]
                else:
                    with pytest.raises(RegistryError):
                        registry.remove_alias("m", what)
            elif rest[0] > len(registered):
                with pytest.raises(RegistryError):
                    registry.set_alias("m", what, rest[0], only_new=kind == "only new")
            else:
                if kind == "alias" or what not in pointed:
                    pointed[what] = rest[0]
                registry.set_alias("m", what, rest[0], only_new=kind == "only new")
            changes += before != pointed
            assert registry.numbers("m") == list(range(1, len(registered) + 1))
            found, replayed = registry.aliases("m"), {}
            for change in found.history:
                assert replayed.get(change.alias) == change.before
                replayed[change.alias] = change.to
            assert {alias: number for alias, number in replayed.items() if number} == found.aliases == pointed
            assert len(found.history) == changes


_WRITES = """
import sys
from cluster.registry import Registry
from cluster.store import Store
from tests.cluster.test_registry import content
registry = Registry(Store.open(sys.argv[1]), lambda _: None)
print("ready", flush=True)
sys.stdin.readline()
for key in ("same", *(f"{sys.argv[2]}{turn}" for turn in range(3))):
    version, _ = registry.register("airline", content(key))
    registry.set_alias("airline", sys.argv[2], version.number, key)
    print(key, version.number, flush=True)
"""


def test_two_processes_at_once_get_different_numbers_and_lose_nothing(registry: Registry) -> None:
    command = [sys.executable, "-c", _WRITES, str(registry.store.root)]
    processes = [
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for name in "xy"
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    told = [dict(line.split() for line in process.communicate()[0].splitlines()) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert told[0]["same"] == told[1]["same"] == "1"
    numbers = sorted(int(number) for each in told for key, number in each.items() if key != "same")
    assert numbers == list(range(2, 8))
    assert registry.numbers("airline") == list(range(1, 8))
    history = registry.aliases("airline").history
    assert sorted(each.reason for each in history) == sorted(key for each in told for key in each)


def test_threads_that_make_one_file_make_it_once(registry: Registry) -> None:
    path = registry.store.root / "once.json"
    made: list[bool] = []
    threads = [threading.Thread(target=lambda n=n: made.append(write_new(path, f"{n}" * 1000))) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False] * 5 + [True]
    assert len(set(path.read_text())) == 1
    assert not [each for each in registry.store.root.iterdir() if each.name.startswith(".once")]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("nothing", "has no model nothing; it has airline; `shoal models register RECIPE` registers one."),
        ("airline:7", "airline has no version 7 in .*; it has 1, 2."),
        ("airline", "airline has no alias stable in .*; its aliases are candidate, its versions 1, 2; `shoal models"),
        ("Airline", "'Airline' cannot name a model: lower case, digits"),
        ("../x", "cannot name a model"),
        ("airline@3", "'3' cannot be an alias: .* not a number"),
        ("airline@Übung", "'Übung' cannot be an alias"),
        ("airline:x", "'airline:x' names no version: after the colon stands a number, as in airline:3."),
        ("airline:0", "names no version"),
        ("airline:1@stable", "'airline:1' cannot name a model"),
    ],
)
def test_what_is_not_there_is_told(asked: str, told: str, tmp_path: Path) -> None:
    registry = Registry(Store.open(str(tmp_path)))
    registry.register("airline", content("a"))
    registry.register("airline", content("b"))
    registry.set_alias("airline", "candidate", 2)
    with pytest.raises(RegistryError, match=told):
        registry.resolve(Reference.parse(asked))


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"name": "airline"}', "\x00"])
def test_a_damaged_file_is_named(damage: str, tmp_path: Path) -> None:
    registry = Registry(Store.open(str(tmp_path)))
    registry.register("airline", content("a"))
    registry.set_alias("airline", "stable", 1)
    for name, what in (("versions/1.json", "a version"), ("aliases.json", "a model's aliases")):
        path = tmp_path / "registry" / "airline" / name
        kept = path.read_text()
        path.write_text(damage)
        with pytest.raises(RegistryError, match=rf"{name} is damaged: it is no record of {what}; restore it"):
            registry.resolve(Reference.parse("airline"))
        path.write_text(kept)
    path = tmp_path / "registry" / "airline" / "versions" / "2.json"
    path.write_text((path.parent / "1.json").read_text())
    with pytest.raises(RegistryError, match=r"2\.json is damaged: it says that it is airline:1"):
        registry.version("airline", 2)


def test_digests_tell_the_file_that_is_another_one(tmp_path: Path) -> None:
    folder = UPath(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "deep" / "b").write_bytes(bytes(3_000_000))
    (tmp_path / ".hidden").write_bytes(b"x")
    taken = digests(folder)
    assert list(taken) == ["a", "deep/b"]
    assert taken["a"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "new").write_bytes(b"x")
    assert difference(folder, taken) == ""
    (tmp_path / "deep" / "b").write_bytes(bytes(2_999_999) + b"\x01")
    assert "deep/b is damaged or changed" in difference(folder, taken)
    (tmp_path / "a").unlink()
    assert difference(folder, taken) == "a is missing"
