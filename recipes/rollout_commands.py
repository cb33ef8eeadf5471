"""The commands `shoal rollout ...`: another version takes over step by step, or does not.

They write orders to the store and read how far the endpoint has come; the process that serves carries them out.
"""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text
from typer.core import TyperGroup

from cluster.registry import Registry
from cluster.rollouts import Command, Rollouts, State, Step
from cluster.versions import Reference, RegistryError
from recipes.arguments import StoreOption
from recipes.printing import console_on, plain_table, say

_TAKEN_UP_S = 30.0
"""In which a running endpoint takes up an order."""


class _Group(TyperGroup):
    """`shoal rollout NAME VERSION` is `shoal rollout start NAME VERSION`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["start", *args]
        return super().parse_args(ctx, args)


rollout = typer.Typer(
    name="rollout",
    cls=_Group,
    help="Let another version of a model take over, step by step: as a shadow, with growing shares, then alone.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

NameArgument = Annotated[str, typer.Argument(help="A registered model, e.g. airline.")]
ReasonOption = Annotated[str, typer.Option(help="Why; it is kept in the aliases' history.")]


@rollout.command(
    epilog="Examples: shoal rollout airline 4    shoal rollout airline 4 agreement=0.95 shares=[0.05,0.5] "
    "replay=labelled.jsonl"
)
def start(
    name: NameArgument,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="Its number, or an alias.")],
    gates: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Steps and gates, e.g. agreement=0.95.")
    ] = None,
    store: StoreOption = "shoal-store",
    wait: Annotated[bool, typer.Option(help="Watch until it has ended.")] = True,
) -> None:
    """Roll out a version; `shoal rollout NAME VERSION` for short. An endpoint must follow the model's alias stable.

    It ends with 0 if the version has taken over, with 1 if not.
    """
    from recipes.loading import load_plan

    rollouts = _rollouts(name, store)
    number = rollouts.registry.resolve(Reference.parse(f"{name}{':' if version.isdigit() else '@'}{version}")).number
    plan = load_plan(gates or ())
    if plan.replay is not None and "://" not in plan.replay:  # Another process reads it, elsewhere.
        plan = plan.model_copy(update={"replay": str(Path(plan.replay).expanduser().absolute())})
    order = rollouts.ask(number, plan.model_dump(mode="json"))
    say(f"{name}:{number} is to be rolled out; `shoal rollout status {name}` tells how far it is.")
    if wait and not _watched(rollouts, order.id):
        raise typer.Exit(1)


@rollout.command(epilog="Examples: shoal rollout status airline    shoal rollout status airline --json")
def status(
    name: NameArgument,
    store: StoreOption = "shoal-store",
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show how far the latest rollout has come, and its gates."""
    rollouts = _rollouts(name, store)
    order, state = rollouts.order(), rollouts.state()
    if order is None:
        raise RegistryError(f"there is no rollout of {name}; `shoal rollout {name} NUMBER` begins one.")
    its = state if state is not None and state.id == order.id else None
    if as_json:
        plain: dict[str, Any] = {"order": order.model_dump(), "state": its.model_dump() if its else None}
        sys.stdout.write(json.dumps(plain, indent=2, ensure_ascii=False) + "\n")
    elif its is None:
        say(_unheard(name))
    else:
        console_on().print(_shown(name, its))


@rollout.command(epilog='Example: shoal rollout promote airline --reason "as good, and the sale begins"')
def promote(name: NameArgument, reason: ReasonOption = "", store: StoreOption = "shoal-store") -> None:
    """Let the version take over now, whatever gates are left."""
    _command(name, store, "promote", reason)


@rollout.command(epilog="Example: shoal rollout abort airline")
def abort(name: NameArgument, reason: ReasonOption = "", store: StoreOption = "shoal-store") -> None:
    """End the rollout; the former version goes on answering, alone."""
    _command(name, store, "abort", reason)


@rollout.command(epilog='Example: shoal rollout rollback airline --reason "complaints about refunds"')
def rollback(name: NameArgument, reason: ReasonOption = "", store: StoreOption = "shoal-store") -> None:
    """End the rollout, or undo it if it has taken over: the former version answers again."""
    _command(name, store, "rollback", reason)


def _command(name: str, store: str, command: Command, reason: str) -> None:
    rollouts = _rollouts(name, store)
    order = rollouts.command(command, reason)
    until = time.monotonic() + _TAKEN_UP_S
    while (state := rollouts.state()) is None or state.id != order.id or state.answered != order.asked:
        if time.monotonic() > until:
            say(_unheard(name))
            raise typer.Exit(1)
        time.sleep(0.5)
    console_on().print(_shown(name, state))
    wanted = ("promoted",) if command == "promote" else ("rolled back", "aborted")
    if state.status not in wanted:
        raise typer.Exit(1)


def _watched(rollouts: Rollouts, identity: str) -> bool:
    """Shows the rollout until it has ended; whether the version has taken over."""
    console, until = console_on(), time.monotonic() + _TAKEN_UP_S
    name, told = rollouts.name, ""
    try:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while True:
                state = rollouts.state()
                if state is None or state.id != identity:
                    if told != "unheard" and time.monotonic() > until:
                        told = "unheard"
                        say(_unheard(name))
                elif state.ended:
                    break
                elif console.is_terminal:
                    live.update(_shown(name, state), refresh=True)
                elif (step := _at(state)) != told:
                    told = step
                    say(f"{name}:{state.number}: {step}")
                time.sleep(1)
    except KeyboardInterrupt:
        say(f"It goes on; `shoal rollout status {name}` tells how far it is, `shoal rollout abort {name}` ends it.")
        raise
    console.print(_shown(name, state))
    return state.status == "promoted"


def _at(state: State) -> str:
    return next((step.name for step in state.steps if step.status in ("running", "waiting")), state.status)


def _shown(name: str, state: State) -> Group:
    rows = [
        (step.name, step.status, *_measured(step), "; ".join(_gate_texts(step)) or step.note) for step in state.steps
    ]
    about = f"{name}:{state.before} -> {name}:{state.number}: {state.status}" + (
        f" ({state.reason})" if state.reason else ""
    )
    return Group(Text(about), plain_table(rows, ("step", "", "seconds", "requests", "gates")))


def _measured(step: Step) -> tuple[str, str]:
    if step.status == "waiting":
        return "", ""
    return f"{step.seconds:.0f}", str(step.requests)


def _gate_texts(step: Step) -> list[str]:
    return [
        f"{check.name} {'-' if check.value is None else f'{check.value:.4g}'} (bound {check.bound:.4g}"
        f"{'' if check.passed else ', not passed'})"
        for check in step.checks
    ]


def _unheard(name: str) -> str:
    return (
        f"no endpoint has taken it up yet; one does that follows {name}@stable: `shoal serve --model {name}`. "
        "The order waits for it."
    )


def _rollouts(name: str, store: str) -> Rollouts:
    from recipes.listing import existing_store

    return Rollouts(Registry(existing_store(store), say), name)
