"""Serving: a recipe's classifier, or whatever version of a registered model an alias points at."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from cluster.connect import is_own
from cluster.registry import STABLE, Registry
from cluster.store import ClusterError
from cluster.versions import Reference, Version
from models.settings import InputError
from recipes.endpoint import answer_rows, ask, key_to_ask_with
from recipes.listing import existing_store, reports, summary_rows
from recipes.loading import load_serve_settings
from recipes.printing import console_on, plain_table
from recipes.registering import register, registered_sentence
from recipes.rolling_out import LiveEndpoint
from recipes.running import completed, durable, planned, progress_on, stay, working
from serve.app import serve_model, stop, turn_others
from serve.following import Follower
from serve.model import ServedModel
from serve.others import Others
from serve.ownership import Standing, standing
from serve.registered import answering_model
from serve.rolling import Rolling
from serve.settings import ServeSettings
from serve.turning import turn

_LOOK_S = 1.0
"""How often aliases and orders are looked at: a few small files."""


def serve_recipe(recipe: Path, overrides: Sequence[str] | None, asked: Sequence[str]) -> None:
    """Completes a recipe's stages, registers what they made, and serves it until Ctrl-C; or asks it, and ends.

    The first version of a model that answers becomes its stable one.
    """
    loaded, store, stages = planned(recipe, overrides)
    key = key_to_ask_with(loaded.serve) if asked else None
    with working(loaded.store, watched=not asked) as terminal:
        _check_nobody_serves(asked)
        tell = _telling(console_on(terminal.out))
        artifacts = completed(stages, store, progress_on(terminal.err), loaded.name)
        registry = Registry(store, tell)
        version, new = register(registry, loaded.name, artifacts, recipe=loaded.name)
        others = Others(registry, loaded.serve)
        model = answering_model(version, registry, loaded.serve)
        url = serve_model(loaded.serve, model, store=store.root, others=others.served())
        try:
            tell(f"{registered_sentence(version, new=new)} {_made_stable(registry, version.name, version.number)}")
            if asked:
                answers = ask(url, asked, key=key, tls=loaded.serve.tls)
                console = console_on(terminal.out)
                console.print(plain_table(summary_rows(artifacts), ("", loaded.name, "TF-IDF baseline"), numbers=True))
                console.print(plain_table(answer_rows(asked, answers), (f"asked at {url}", "answer", "probabilities")))
                for path in reports(artifacts):
                    tell(path)
            else:
                tell(f"{loaded.name} answers at {url}/v1/classify (try it at {url}). Ctrl-C stops it.")
                if registry.number(version.name, STABLE) == version.number:
                    _follow(registry, STABLE, version, loaded.serve, others, tell)
                else:
                    _stay(lambda: others.look(turn_others, tell), tell)
        finally:
            stop()


def serve_registered(reference: str, store_url: str, overrides: Sequence[str], asked: Sequence[str]) -> None:
    """Serves the version that an alias points at, and follows the alias until Ctrl-C; or asks it, and ends.

    Raises:
        InputError: an override is wrong, or an artifact is no longer in the store.
        ClusterError: there is no such model or alias, or the endpoint does not start.
    """
    wanted = Reference.parse(reference)
    name, alias = wanted.name, wanted.alias or STABLE
    if wanted.number is not None:
        raise InputError(
            f"--model follows an alias, so give {name} or {name}@ALIAS; `shoal models alias {name} ALIAS "
            f"{wanted.number}` points one at version {wanted.number}."
        )
    settings = load_serve_settings(overrides)
    registry = Registry(existing_store(durable(store_url)))
    version = registry.version(name, registry.number(name, alias))
    model = answering_model(version, registry, settings)
    key = key_to_ask_with(settings) if asked else None
    others = Others(registry, settings)
    with working(store_url, watched=not asked) as terminal:
        _check_nobody_serves(asked)
        url = serve_model(settings, model, store=registry.store.root, others=others.served())
        try:
            if asked:
                header = (f"{version} asked at {url}", "answer", "probabilities")
                console_on(terminal.out).print(
                    plain_table(answer_rows(asked, ask(url, asked, key=key, tls=settings.tls)), header)
                )
                return
            tell = _telling(console_on(terminal.out))
            tell(
                f"{version} answers at {url}/v1/classify (try it at {url}) and {name}@{alias} is followed. "
                "Ctrl-C stops it."
            )
            _follow(registry, alias, version, settings, others, tell)
        finally:
            stop()


def _follow(
    registry: Registry,
    alias: str,
    version: Version,
    settings: ServeSettings,
    others: Others,
    tell: Callable[[str], None],
) -> None:
    """Until Ctrl-C, keeps the endpoint at what the aliases point at, and carries out rollouts of the stable one."""
    follower = following(registry, alias, version, settings, lambda model: turn(model=model.as_json()), tell)
    rolling = Rolling(registry, version.name, LiveEndpoint(registry, version.name, settings, follower.take), tell)

    def look() -> None:
        if alias == STABLE:
            rolling.look()
        follower.look()
        others.look(turn_others, tell)

    _stay(look, tell)


def _stay(look: Callable[[], None], tell: Callable[[str], None]) -> None:
    """Until Ctrl-C, or until another process serves on this cluster, which the endpoint is left to."""
    told = False

    def go_on() -> bool:
        nonlocal told
        match _standing():
            case "ours":
                look()
            case "gone":
                tell("Another process has taken the endpoint down.")
                return False
            case "another's" if not is_own():
                tell("Another process serves on this cluster now; the endpoint is left to it.")
                return False
            case "another's" if not told:
                told = True
                tell("Another process serves on this cluster now, which ends with this process: Ctrl-C stops both.")
        return True

    stay(go_on, _LOOK_S)


def _standing() -> Standing | None:
    try:
        return standing()
    except Exception:  # The head may be away for a while.
        return None


def _check_nobody_serves(asked: Sequence[str]) -> None:
    """Makes sure that what is served to be asked, and taken down then, takes nobody's place.

    Raises:
        ClusterError: somebody serves on this cluster.
    """
    if asked and standing() != "gone":
        raise ClusterError("this cluster serves already, and --ask would take that endpoint's place; ask it over HTTP.")


def following(
    registry: Registry,
    alias: str,
    version: Version,
    settings: ServeSettings,
    serve: Callable[[ServedModel], object],
    tell: Callable[[str], None],
) -> Follower:
    """What keeps an endpoint that serves this version at whatever the alias points at."""
    name = version.name

    def found(number: int) -> ServedModel:
        model = answering_model(registry.version(name, number), registry, settings)
        model.check(settings)
        model.verify(settings)
        return model

    return Follower(
        number=version.number,
        model=answering_model(version, registry, settings),
        pointed=lambda: registry.number(name, alias),
        found=found,
        serve=serve,
        tell=tell,
    )


def _made_stable(registry: Registry, name: str, number: int) -> str:
    """Makes the version the stable one where there is none yet; says which is."""
    change = registry.set_alias(name, STABLE, number, "the first version that was served", only_new=True)
    if change is not None:
        return f"It is {name}@{STABLE} now, for there was none."
    stable = registry.number(name, STABLE)
    if stable == number:
        return f"It is {name}@{STABLE}."
    return f"{name}@{STABLE} remains {name}:{stable}; `shoal models alias {name} {STABLE} {number}` moves it."


def _telling(console: Console) -> Callable[[str], None]:
    def tell(sentence: str) -> None:
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    return tell
