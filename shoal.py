"""The front door: the `shoal` command. Parses, calls, and tells mistakes in one sentence."""

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from cluster.logs import causes
from cluster.store import ClusterError
from models.settings import InputError
from recipes import running
from recipes.arguments import Overrides, RecipeArgument, StoreOption
from recipes.key_commands import keys
from recipes.model_commands import models
from recipes.printing import console_on, plain_table, say
from recipes.rollout_commands import rollout
from recipes.running import complete_until, completed, planned, progress_on, working

app = typer.Typer(
    name="shoal",
    help="From text to an autoscaled classification endpoint on an elastic Ray cluster.\n\n"
    "A recipe (a YAML file) says what is wanted. Its stages (pack, pretrain, prepare, sweep, finetune, evaluate, "
    "export) leave artifacts in a store; a stage whose artifact is there is not run again, and an interrupted one goes "
    "on where it stopped.",
    epilog="Begin with [bold]shoal init FILE[/bold] on your own data, or [bold]shoal run recipes/airline.yaml[/bold].",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(models)
app.add_typer(rollout)
app.add_typer(keys)


@app.command(epilog="Example: shoal init tickets.csv")
def init(
    file: Annotated[str, typer.Argument(help="A csv, tsv, jsonl or Parquet file, or package://...")],
    out: Annotated[Path | None, typer.Option(help="The recipe to write; by default, NAME.yaml.")] = None,
    text: Annotated[str | None, typer.Option(help="The column with the text, where the guess is wrong.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="A column to predict; may be given several times.")] = None,
    encoder: Annotated[str | None, typer.Option(help="A pretrained encoder: folder, package:// or hub id.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the recipe.")] = False,
) -> None:
    """Look at a data file, say what is in it, and write a recipe that runs."""
    from recipes.drafting import draft

    found = draft(file, text=text, labels=label or (), encoder=encoder)
    path = out or Path(f"{found.name}.yaml")
    if path.exists() and not force:
        raise InputError(f"{path} is there already; --force overwrites it, --out PATH writes another.")
    try:
        path.write_text(found.recipe, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another with --out PATH.") from error
    for line in [*found.findings, f"Wrote {path}. Next: shoal run {path}"]:
        say(line)


@app.command(epilog="Example: shoal check recipes/airline.yaml finetune.epochs=3")
def check(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Validate a recipe and print its plan: each stage, its fingerprint, reused or to run."""
    _, store, stages = planned(recipe, overrides)
    rows = [
        (name, stage.fingerprint, "reused" if store.find(stage.name, stage.fingerprint) else "to run")
        for name, stage in stages.items()
    ]
    say(f"{recipe} is valid.")
    console_on().print(plain_table(rows))


@app.command(epilog="Example: shoal run recipes/airline.yaml --until finetune finetune.learning_rate=5e-5")
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="The last stage to run.")] = None,
) -> None:
    """Run a recipe's stages; those whose artifact is in the store are reused."""
    complete_until(recipe, overrides, until)


@app.command(epilog="Example: shoal prepare recipes/airline.yaml prepare.max_length=64")
def prepare(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Clean, split, tokenise and shuffle the recipe's data."""
    complete_until(recipe, overrides, "prepare")


@app.command(epilog="Example: shoal pack recipes/inews.yaml pack.length=256")
def pack(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Turn the recipe's label-free texts into rows of tokens without padding, to pretrain on."""
    complete_until(recipe, overrides, "pack")


@app.command(epilog="Example: shoal pretrain recipes/inews.yaml pretrain.workers=2 pretrain.epochs=3")
def pretrain(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Pretrain the recipe's encoder on those, from scratch or from where another has come."""
    complete_until(recipe, overrides, "pretrain")


@app.command(epilog="Example: shoal sweep recipes/airline.yaml sweep='{trials: 16}'")
def sweep(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Search settings of the fine-tuning; by default, its learning rate and warm-up."""
    complete_until(recipe, overrides, "sweep")


@app.command(epilog="Example: shoal finetune recipes/airline.yaml finetune.workers=2 finetune.epochs=3")
def finetune(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Train the recipe's classifier, and whatever it builds on."""
    complete_until(recipe, overrides, "finetune")


@app.command(epilog="Example: shoal evaluate recipes/airline.yaml evaluate.gate.accuracy=0.85")
def evaluate(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Measure the recipe's classifier and hold it against the gate, after whatever it builds on."""
    complete_until(recipe, overrides, "evaluate")


@app.command(epilog="Example: shoal export recipes/airline.yaml export.min_agreement=0.99")
def export(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Write the recipe's classifier as ONNX for CPUs and compare it with torch, after whatever it builds on."""
    complete_until(recipe, overrides, "export")


@app.command(epilog="Example: shoal status --store s3://bucket/shoal")
def status(store: StoreOption = "shoal-store") -> None:
    """List the artifacts in a store, their sizes and metrics."""
    from recipes.listing import existing_store, status_table

    console_on().print(status_table(existing_store(store)))


@app.command(epilog="Examples: shoal show 1f0c    shoal show finetune/1f0c    shoal show s3://bucket/shoal/prepare/...")
def show(
    artifact: Annotated[str, typer.Argument(help="A path, or the beginning of a fingerprint.")],
    store: StoreOption = "shoal-store",
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Show an artifact's lineage: data, settings, versions, metrics and what it was made from."""
    from recipes.listing import find_artifact, print_artifact

    its_store, found = find_artifact(artifact, store)
    if as_json:
        sys.stdout.write(json.dumps(asdict(found.record), indent=2, ensure_ascii=False) + "\n")
    else:
        print_artifact(found, its_store, console_on())


@app.command(epilog="Examples: shoal audit 1f0c    shoal audit s3://bucket/shoal/finetune/...")
def audit(
    run: Annotated[str, typer.Argument(help="A training run: a path, or the beginning of its fingerprint.")],
    store: StoreOption = "shoal-store",
) -> None:
    """Prove from a run's ledger that each epoch consumed each row exactly once, or say what is not so."""
    from pipelines.audit import audit as audit_run
    from recipes.listing import find_artifact, print_audit

    its_store, found = find_artifact(run, store)
    result = audit_run(found, its_store)
    print_audit(found, result, console_on())
    if not result.exact:
        raise typer.Exit(1)


@app.command(epilog="Example: shoal predict recipes/airline.yaml tweets.csv --out answers.parquet")
def predict(
    recipe: RecipeArgument,
    file: Annotated[str, typer.Argument(help="What to classify: a file, folder, glob, URL or package://...")],
    out: Annotated[str, typer.Option(help="Where to: NAME.parquet, NAME.csv, or a folder for Parquet files.")],
    overrides: Overrides = None,
    text: Annotated[str | None, typer.Option(help="The column with the text; by default, the recipe's.")] = None,
    text_pair: Annotated[str | None, typer.Option(help="The column with the second text, likewise.")] = None,
    every_class: Annotated[bool, typer.Option("--every-class", help="Write each class's probability.")] = False,
    file_format: Annotated[
        Literal["csv", "tsv", "jsonl", "parquet", "text", "datasets", "pickle"] | None,
        typer.Option("--format", help="How FILE is written, where its name does not tell."),
    ] = None,
    undecodable: Annotated[
        Literal["reject", "replace"] | None,
        typer.Option(help="No answer for texts that are not UTF-8, or one with the wrong bytes replaced."),
    ] = None,
    quotes: Annotated[
        bool | None, typer.Option("--quotes/--no-quotes", help='Whether fields of csv and tsv may be quoted with ".')
    ] = None,
    skip_rows: Annotated[int | None, typer.Option(min=0, help="Lines to skip after csv and tsv headers.")] = None,
) -> None:
    """Classify the rows of files of any size with the recipe's classifier.

    How FILE is read, the options say; else the recipe, for files of its own format.
    """
    from pipelines.predict import predict_file
    from recipes.endpoint import calibration

    loaded, store, stages = planned(recipe, overrides)
    columns = {name: given for name, given in (("text", text), ("text_pair", text_pair)) if given}
    told = {"format": file_format, "undecodable": undecodable, "quotes": quotes, "skip_rows": skip_rows}
    with working(loaded.store) as terminal:
        progress = progress_on(terminal.err)
        artifacts = completed(stages, store, progress, loaded.name)
        done = predict_file(
            file,
            out,
            artifacts["finetune"].path / "model",
            calibration(artifacts["evaluate"]),
            data=loaded.data.model_copy(update=columns),
            rules={name: given for name, given in told.items() if given is not None},
            progress=progress,
            every_class=every_class,
        )
    say(done.sentence)


@app.command(
    epilog='Examples: shoal serve recipes/airline.yaml --ask "my flight was late again"    '
    "shoal serve --model airline@stable --store s3://bucket/shoal serve.min_replicas=2"
)
def serve(
    recipe: Annotated[str | None, typer.Argument(help="The recipe; none with --model.")] = None,
    overrides: Overrides = None,
    ask: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Ask the endpoint this, print, end.")] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME[@ALIAS]", help="Serve what an alias points at, and follow it; by default, stable."),
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="Where --model is registered: a folder, or s3://BUCKET/PREFIX.")
    ] = None,
) -> None:
    """Complete a recipe's stages, deploy its classifier and stay until Ctrl-C.

    It is registered as a version of the model, the first as its stable one. With --model, no stage is run: the version
    that an alias points at is deployed, and another one in its place when the alias is moved.
    """
    given = [*([recipe] if recipe else []), *(overrides or [])]
    if model is None and (not given or "=" in given[0]):
        raise InputError("say what to serve: a recipe, or a registered model with --model NAME.")
    if model is None and store is not None:
        raise InputError(f"--store belongs to --model; for a recipe, write store={store}.")
    if model is not None and given and "=" not in given[0]:
        raise InputError(f"give either a recipe ({given[0]}) or --model {model}.")
    from recipes.serving import serve_recipe, serve_registered

    if model is None:
        serve_recipe(Path(given[0]), given[1:], ask or [])
    else:
        serve_registered(model, store or "shoal-store", given, ask or [])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the result is its exit status.

    0; 2 for a user's mistake or trouble with the place; 130 or 143 if interrupted or told to end; else 1.
    """
    try:
        app(arguments, prog_name="shoal")
    except SystemExit as ended:
        if ended.code == 130:
            return _interrupted()
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        return _failed(error)
    return 0


def _interrupted() -> int:
    _tell("interrupted; run the same command again to go on.")
    return 128 + (running.ended_by or [signal.SIGINT])[0]


def _failed(error: Exception) -> int:
    inner = list(causes(error))
    told = next((each for each in inner if isinstance(each, InputError | ClusterError)), None)
    if told is not None:
        _tell(str(told))
        return 2
    log = running.LOG.write_traceback(error)
    reason = next(iter(str(inner[-1]).splitlines()), "")
    _tell(f"failed unexpectedly ({type(inner[-1]).__name__}: {reason}); the traceback and Ray's messages are in {log}")
    return 1


def _tell(sentence: str) -> None:
    Console(stderr=True).print(Text.assemble(("shoal: ", "red"), sentence), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
