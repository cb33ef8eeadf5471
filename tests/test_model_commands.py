"""`shoal models` and `shoal serve --model` as their user sees them, on artifacts that no stage had to be run for."""

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from cluster.logs import Terminal
from cluster.registry import Registry
from cluster.store import ClusterError, Store
from recipes import running, serving
from recipes.loading import load_recipe
from recipes.planning import plan
from serve.model import ServedModel
from serve.settings import ServeSettings
from tests.conftest import Command
from tests.finished_stages import put_artifacts
from tests.test_cli import make_recipe


@dataclass(frozen=True)
class Made:
    """A recipe whose stages are done."""

    recipe: Path

    @property
    def place(self) -> Path:
        return self.recipe.parent / "store"

    @property
    def store(self) -> Store:
        return Store.open(str(self.place))


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("salads")
    recipe = make_recipe(folder)
    for overrides in ((), ("finetune.epochs=2",)):
        loaded = load_recipe(recipe, overrides)
        put_artifacts(Store.open(loaded.store), {name: stage.fingerprint for name, stage in plan(loaded).items()})
    return recipe


@pytest.fixture
def made(once: Path, tmp_path: Path) -> Made:
    """The same with nothing registered yet."""
    shutil.rmtree(once.parent / "store" / "registry", ignore_errors=True)
    return Made(once)


def test_register_list_show_and_move(made: Made, command: Command) -> None:
    first = command("models", "register", made.recipe, "--note", "the first", "--alias", "candidate")
    assert (first.status, first.err) == (0, ""), first.err
    assert first.out.splitlines() == ["salads:1 is registered.", "salads@candidate is salads:1 now."]
    again = command("models", "register", made.recipe, "--alias", "candidate").out
    assert again.startswith("salads:1 was registered before, on 20")
    assert "salads@candidate is salads:1 already." in again
    assert "salads:2 is registered." in command("models", "register", made.recipe, "finetune.epochs=2").out
    assert "mood-2:1 is registered." in command("models", "register", made.recipe, "--name", "mood-2").out

    store = ("--store", made.place)
    moved = command("models", "alias", "salads", "stable", "1", "--reason", "it works", *store)
    assert moved.out == "salads@stable is salads:1 now.\n"
    assert command("models", "alias", "salads", "stable", "2", *store).out.endswith("now, after salads:1.\n")
    header, *lines = command("models", "list", *store).out.splitlines()
    assert header.split() == ["version", "aliases", "registered", "metrics", "note"]
    assert [line.split()[0] for line in lines] == ["mood-2:1", "salads:1", "salads:2"]
    assert "candidate" in lines[1]
    assert "accuracy 0.8750" in lines[1]
    assert "the first" in lines[1]
    assert command("models", "list", "salads", *store).out.count("salads:") == 2

    shown = command("models", "show", "salads@candidate", *store).out
    prints = Registry(made.store).version("salads", 1).artifacts
    for part in ("salads:1", "candidate", "the first", "it loses 0.2", *prints.values(), "prepare", "it works"):
        assert part in shown
    assert json.loads(command("models", "show", "salads:2", *store, "--json").out)["number"] == 2
    removed = command("models", "remove-alias", "salads", "candidate", *store)
    assert removed.out == "salads@candidate is removed; it was salads:1.\n"
    assert "candidate" not in command("models", "list", *store).out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["models", "list", "--store", "nowhere"], "there is no store at nowhere"),
        (["models", "list", "Nobody"], "'Nobody' cannot name a model"),
        (["models", "show", "nobody"], "has no model nobody; it has salads"),
        (["models", "show", "salads:9"], "salads has no version 9"),
        (["models", "show", "salads"], "salads has no alias stable"),
        (["models", "alias", "salads", "7", "1"], "'7' cannot be an alias"),
        (["models", "alias", "salads", "next", "4"], "salads has no version 4"),
        (["models", "remove-alias", "salads", "next"], "salads has no alias next"),
        (["models", "register", "{recipe}", "--name", "a b"], "'a b' cannot name a model"),
        (["models", "register", "{recipe}", "--alias", "3"], "'3' cannot be an alias"),
        (["serve", "--model", "nobody"], "has no model nobody"),
        (["serve", "--model", "salads"], "salads has no alias stable"),
        (["serve", "--model", "salads:1"], "--model follows an alias, so give salads or salads@ALIAS; `shoal models"),
        (
            ["serve", "--model", "salads@on", "finetune.epochs=2"],
            "'finetune.epochs=2': of a registered model only serve",
        ),
        (["serve", "--model", "salads@on", "serve.prt=1"], "serve.prt is no setting; did you mean serve.port?"),
        (["serve", "--model", "salads@on", "serve.port=x"], 'serve.port must be a whole number, not "x".'),
        (["serve", "--model", "salads@on", "serve.min_replicas=9"], "serve: min_replicas is 9, more than max_replicas"),
        (["serve", "--model", "salads@on", "serve=3"], "serve must be"),
        (["serve", "{recipe}", "--model", "salads"], "give either a recipe"),
        (["serve"], "say what to serve: a recipe, or a registered model with --model NAME."),
        (["serve", "serve.port=1"], "say what to serve"),
        (["serve", "{recipe}"], "--store belongs to --model"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(made: Made, command: Command, arguments: list[str], told: str) -> None:
    command("models", "register", made.recipe, "--alias", "on")
    given = [each.format(recipe=made.recipe) for each in arguments]
    with_store = [] if "--store" in given or "register" in given or given[1:] in ([], ["serve.port=1"]) else ["--store"]
    outcome = command(*given, *with_store, *([made.place] if with_store else []))
    assert outcome.status == 2, outcome
    assert outcome.out == ""
    (sentence,) = outcome.err.splitlines()
    assert sentence.startswith("shoal: ")
    assert told in sentence


def test_an_empty_registry_says_so(made: Made, command: Command) -> None:
    outcome = command("models", "list", "--store", made.place)
    assert outcome.out == f"No model is registered in {made.place}; `shoal models register RECIPE` registers one.\n"


@dataclass
class Endpoint:
    """Stands for Ray Serve: what was deployed, with what, and what happens while it stays."""

    served: list[tuple[str, ServeSettings]] = field(default_factory=list)
    stopped: int = 0
    meanwhile: Callable[[], None] = lambda: None
    stays: bool = True
    """Whether it went on after the first look."""
    standing: str = "ours"
    """To the endpoint, once this process has served."""
    own: bool = False
    """Whether it made its cluster."""
    dead: str = ""
    """The fingerprint of a classifier that does not start."""

    def serve_model(
        self, settings: ServeSettings, model: ServedModel, store: UPath, others: dict[str, ServedModel]
    ) -> str:
        model.check(settings)
        self.served.append((model.version, settings))
        if model.version == self.dead:
            raise ClusterError("the endpoint does not start: no memory.")
        return f"http://127.0.0.1:{settings.port}"

    def turn(self, model: dict[str, Any]) -> None:
        self.served.append((model["version"], self.served[0][1]))

    def stop(self) -> None:
        self.stopped += 1

    def stay(self, look: Callable[[], bool], seconds: float = 0) -> None:
        self.meanwhile()
        self.stays = look()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Endpoint:
    """In place of Ray."""

    @contextlib.contextmanager
    def working(store: str, *, watched: bool = False) -> Iterator[Terminal]:
        yield Terminal(sys.stdout, sys.stderr)

    found = Endpoint()
    monkeypatch.setattr(serving, "working", working)
    monkeypatch.setattr(serving, "stop", found.stop)
    monkeypatch.setattr(serving, "stay", found.stay)
    monkeypatch.setattr(serving, "serve_model", found.serve_model)
    monkeypatch.setattr(serving, "turn", found.turn)
    monkeypatch.setattr(serving, "standing", lambda: found.standing if found.served else "gone")
    monkeypatch.setattr(serving, "is_own", lambda: found.own)
    return found


def test_serving_a_recipe_registers_it_and_makes_the_first_one_stable(
    made: Made, command: Command, endpoint: Endpoint
) -> None:
    first = command("serve", made.recipe, "serve.port=8123")
    assert (first.status, endpoint.stopped) == (0, 1), first.err
    assert "salads:1 is registered. It is salads@stable now, for there was none." in first.out
    assert "salads answers at http://127.0.0.1:8123/v1/classify" in first.out
    second = command("serve", made.recipe, "finetune.epochs=2")
    assert "salads:2 is registered. salads@stable remains salads:1; `shoal models alias salads stable 2` moves it." in (
        second.out
    )
    assert "salads:1 was registered before" in command("serve", made.recipe).out
    registry = Registry(made.store)
    assert registry.aliases("salads").aliases == {"stable": 1}
    tuned = [version.artifacts["finetune"] for version in registry.versions("salads")]
    assert [version for version, _ in endpoint.served] == [*tuned, tuned[0]]


def test_what_does_not_start_does_not_become_stable(made: Made, command: Command, endpoint: Endpoint) -> None:
    endpoint.dead = plan(load_recipe(made.recipe))["finetune"].fingerprint
    outcome = command("serve", made.recipe)
    assert (outcome.status, "the endpoint does not start: no memory." in outcome.err) == (2, True)
    assert Registry(made.store).aliases("salads").aliases == {}


def test_serving_a_model_follows_its_alias(made: Made, command: Command, endpoint: Endpoint) -> None:
    for overrides in ((), ("finetune.epochs=2",)):
        command("models", "register", made.recipe, *overrides)
    registry = Registry(made.store)
    registry.set_alias("salads", "stable", 1)
    endpoint.meanwhile = lambda: registry.set_alias("salads", "stable", 2) and None
    outcome = command("serve", "--model", "salads", "--store", made.place, "serve.port=8123", "serve.engine=torch")
    assert (outcome.status, endpoint.stopped) == (0, 1), outcome.err
    assert outcome.out.splitlines() == [
        "salads:1 answers at http://127.0.0.1:8123/v1/classify (try it at http://127.0.0.1:8123) and "
        "salads@stable is followed. Ctrl-C stops it.",
        "salads:2 takes the place of salads:1 ...",
        "salads:2 is served.",
    ]
    tuned = [version.artifacts["finetune"] for version in registry.versions("salads")]
    assert endpoint.served == [(each, ServeSettings(port=8123, engine="torch")) for each in tuned]


@pytest.mark.parametrize(
    ("standing", "own", "stays", "told"),
    [
        ("another's", False, False, "Another process serves on this cluster now; the endpoint is left to it."),
        ("another's", True, True, "Another process serves on this cluster now, which ends with this process: Ctrl-C"),
        ("gone", False, False, "Another process has taken the endpoint down."),
        ("claimed", False, True, ""),
    ],
)
def test_what_another_process_serves_is_left_alone(
    standing: str, own: bool, stays: bool, told: str, made: Made, command: Command, endpoint: Endpoint
) -> None:
    command("models", "register", made.recipe, "--alias", "stable")
    registry = Registry(made.store)
    command("models", "register", made.recipe, "finetune.epochs=2")

    def another() -> None:
        registry.set_alias("salads", "stable", 2)
        endpoint.standing, endpoint.own = standing, own

    endpoint.meanwhile = another
    outcome = command("serve", "--model", "salads", "--store", made.place)
    assert (outcome.status, endpoint.stays) == (0, stays), outcome.err
    assert told in outcome.out
    assert len(endpoint.served) == 1, "whose alias it follows no longer"


def test_who_only_asks_takes_nobody_s_place(
    made: Made, command: Command, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("models", "register", made.recipe, "--alias", "stable")
    monkeypatch.setattr(serving, "standing", lambda: "another's")
    for arguments in (["--model", "salads", "--store", made.place], [made.recipe]):
        outcome = command("serve", *arguments, "--ask", "late")
        assert (outcome.status, endpoint.served) == (2, [])
        assert (
            "this cluster serves already, and --ask would take that endpoint's place; ask it over HTTP." in outcome.err
        )


def test_help_has_examples(command: Command) -> None:
    for name in ("register", "list", "show", "alias", "remove-alias"):
        outcome = command("models", name, "--help")
        assert outcome.status == 0
        assert f"shoal models {name}" in outcome.out.partition("Example")[2]


def test_help_waits_for_nothing_heavy(command: Command) -> None:
    heavy = "{'torch', 'ray', 'transformers', 'onnxruntime', 'pyarrow', 'recipes.recipe'}"
    script = f"import shoal, sys; shoal.main(['models', '--help']); sys.exit(len({heavy} & set(sys.modules)))"
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", script) == 0


def test_staying_looks_again_and_again_until_it_is_told_to_end() -> None:
    looks: list[int] = []

    def look() -> bool:
        looks.append(1)
        if len(looks) == 3:  # In the midst of work.
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("it goes on after a signal")
        return True

    before = signal.getsignal(signal.SIGTERM)
    running.stay(look, seconds=0.001)
    assert len(looks) == 3
    assert signal.getsignal(signal.SIGTERM) is before
    running.stay(lambda: bool(looks.pop()) and bool(looks), seconds=0.001)
    assert not looks, "and until it is told so"
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    running.stay()
    timer.join()
