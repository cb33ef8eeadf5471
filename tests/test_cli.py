"""The `shoal` command as its user sees it: what it prints, what it leaves, how it ends."""

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from upath import UPath

from cluster.store import RECORD, Store
from tests.conftest import Command, Outcome, RefusingWrites
from tests.making import WORDS, make_encoder


@dataclass(frozen=True)
class Finished:
    """A recipe that was run, how that went, and the fingerprints it left by stage."""

    recipe: Path
    outcome: Outcome
    prints: dict[str, str]

    @property
    def store(self) -> Path:
        return self.recipe.parent / "store"


def make_recipe(folder: Path, rows: int = 160, **finetune: object) -> Path:
    """A recipe that takes seconds: word salads, positive where even words prevail, and a tiny encoder."""
    random = Random(5)
    with (folder / "salads.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "mood"])
        for _ in range(rows):
            picks = random.choices(range(len(WORDS)), k=random.randint(3, 20))
            even = sum(pick % 2 == 0 for pick in picks) * 2 > len(picks)
            writer.writerow([" ".join(WORDS[pick] for pick in picks), "good" if even else "bad"])
    path = folder / "salads.yaml"
    recipe = {
        "name": "salads",
        "store": str(folder / "store"),
        "data": {"source": str(folder / "salads.csv"), "labels": "mood"},
        "prepare": {"max_length": 32},
        "finetune": {"encoder": str(make_encoder(folder / "encoder")), "epochs": 1, "microbatch": 4, **finetune},
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Finished:
    """A recipe that was run once, by a process of its own without a terminal, and how that went."""
    folder = tmp_path_factory.mktemp("salads")
    recipe = make_recipe(folder)
    environment = os.environ | {"SHOAL_LOGS": str(folder / "logs")}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-m", "shoal", "run", str(recipe)], capture_output=True, text=True, env=environment
    )
    made = Store.open(str(folder / "store")).artifacts()
    prints = {each.record.stage: each.record.fingerprint for each in made}
    return Finished(recipe, Outcome(done.returncode, done.stdout, done.stderr), prints)


def test_run_makes_every_artifact_quietly(finished: Finished) -> None:
    outcome = finished.outcome
    assert outcome.status == 0, outcome.err
    assert set(finished.prints) == {"prepare", "finetune", "evaluate", "export"}
    for stage, fingerprint in finished.prints.items():
        assert f"{stage}/{fingerprint}" in outcome.out
        assert f"{stage} done in" in outcome.err
    assert outcome.out.count("made") == 4
    for noise in ("INFO", "WARNING", "ray::", "Warning", "\x1b", "\r", "it/s"):
        assert noise not in outcome.out + outcome.err


def test_a_second_run_reuses_everything(finished: Finished, command: Command) -> None:
    started = time.monotonic()
    outcome = command("run", finished.recipe)
    assert (outcome.status, outcome.out.count("reused"), outcome.err) == (0, 4, "")
    assert time.monotonic() - started < 30


def test_audit_proves_the_run_exact(finished: Finished, command: Command) -> None:
    store = ("--store", finished.recipe.parent / "store")
    outcome = command("audit", finished.prints["finetune"], *store)
    assert (outcome.status, outcome.out.splitlines()[-1]) == (0, "exact"), outcome.err
    other = command("audit", finished.prints["prepare"], *store)
    assert other.status == 2
    assert "is no training run with a ledger" in other.err


def test_check_tells_what_would_run(finished: Finished, command: Command) -> None:
    recipe = finished.recipe
    assert command("check", recipe).out.count("reused") == 4
    changed = command("check", recipe, "finetune.learning_rate=5e-5").out
    assert (changed.count("reused"), changed.count("to run")) == (1, 3)
    # How many workers there are does not change what comes out.
    assert command("check", recipe, "finetune.workers=2").out.count("reused") == 4


def test_a_stage_completes_what_it_builds_on(finished: Finished, command: Command) -> None:
    recipe = finished.recipe
    outcome = command("prepare", recipe, "prepare.max_length=16")
    assert outcome.status == 0, outcome.err
    assert "made" in outcome.out
    assert "finetune" not in outcome.out
    assert command("run", recipe, "--until", "prepare", "prepare.max_length=16").out.count("reused") == 1


def test_status_lists_the_store(finished: Finished, command: Command) -> None:
    outcome = command("status", "--store", finished.store)
    for stage, fingerprint in finished.prints.items():
        line = next(line for line in outcome.out.splitlines() if fingerprint in line)
        assert line.startswith(f"{stage}/{fingerprint}")
        assert "salads" in line
    assert "accuracy" in outcome.out
    assert "rows_in 160" in outcome.out


def test_show_tells_the_lineage(finished: Finished, command: Command) -> None:
    prints, store = finished.prints, finished.store
    shown = command("show", prints["evaluate"][:8], "--store", store).out
    for part in ("settings", "metrics", "versions", "made from", f"prepare {prints['prepare']}", "torch: ", "accuracy"):
        assert part in shown
    assert command("show", f"evaluate/{prints['evaluate'][:4]}", "--store", store).out == shown
    assert command("show", store / "evaluate" / prints["evaluate"]).out == shown
    as_json = json.loads(command("show", prints["finetune"], "--store", store, "--json").out)
    assert as_json["inputs"]["prepare"] == prints["prepare"]


def test_predict_classifies_a_file(finished: Finished, command: Command, tmp_path: Path) -> None:
    recipe = finished.recipe
    outcome = command("predict", recipe, recipe.parent / "salads.csv", "--out", tmp_path / "answers.parquet")
    assert outcome.status == 0, outcome.err
    assert "160 rows to" in outcome.out
    assert set(pq.read_table(tmp_path / "answers.parquet")["predicted:mood"].to_pylist()) <= {"good", "bad"}


def test_predict_reads_a_file_as_its_options_say_and_trains_nothing_anew(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "in.tsv").write_bytes(b'text\n----\n"word2 \xff\n')
    out, options = tmp_path / "answers.csv", ("--undecodable", "replace", "--no-quotes", "--skip-rows", "1")
    outcome = command("predict", finished.recipe, tmp_path / "in.tsv", "--out", out, *options)
    assert outcome.status == 0, outcome.err
    assert "0 without a text" in outcome.out
    assert "UTF-8" not in outcome.out
    (row,) = csv.DictReader(out.open(encoding="utf-8"))
    assert row["text"] == '"word2 \ufffd'
    assert row["predicted:mood"] in ("good", "bad")
    assert all(stage not in outcome.err for stage in ("prepare", "finetune", "evaluate", "export"))


def test_serve_answers_over_http_and_ends(finished: Finished, tmp_path: Path) -> None:
    recipe = finished.recipe
    arguments = ["serve", recipe, "serve.port=18471", "--ask", "word2 word4", "--ask", "word3 [bold]"]
    outcome = subprocess.run(
        [sys.executable, "-m", "shoal", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"SHOAL_LOGS": str(tmp_path)},
    )
    assert outcome.returncode == 0, outcome.stderr
    for part in ("rows in", "160", "accuracy", "TF-IDF", "word2 word4", "word3 [bold]", "good 0.", "report.html"):
        assert part in outcome.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml is no file"),
        (["check", "{recipe}", "finetune.epoch=3"], "finetune.epoch is no setting; did you mean finetune.epochs?"),
        (["check", "{recipe}", "finetune.encoder=/nowhere"], "/nowhere"),
        (["check", "{recipe}", "data.source=/nowhere.csv"], "/nowhere.csv does not exist"),
        (["check", "{recipe}", "store=/dev/null/x"], "a part of the path is a file, not a folder"),
        (
            ["run", "{recipe}", "--until", "deploy"],
            "the recipe has no stage deploy; it has prepare, finetune, evaluate, export.",
        ),
        (["prepare", "{recipe}", "data.text=txt"], "has no column 'txt'; did you mean 'text'?"),
        (["status", "--store", "nowhere"], "there is no store at nowhere"),
        (["show", "ffff", "--store", "{store}"], "has no artifact ffff"),
        (["show", "/tmp"], "/tmp holds no finished artifact"),
        (["init", "nowhere.csv"], "nowhere.csv does not exist"),
        (["predict", "{recipe}", "nowhere.csv", "--out", "x.parquet"], "nowhere.csv does not exist"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(
    finished: Finished, command: Command, arguments: list[str], told: str
) -> None:
    recipe = finished.recipe
    outcome = command(*(each.format(recipe=recipe, store=finished.store) for each in arguments))
    assert outcome.status == 2
    *before, sentence = outcome.err.splitlines()
    assert sentence.startswith("shoal: ")
    assert told in sentence
    assert before in ([], ["prepare"])  # The stage that was begun, where it comes to that.
    assert outcome.out == ""


def test_a_wrong_option_is_told(command: Command) -> None:
    outcome = command("run")
    assert outcome.status == 2
    assert "Missing argument" in outcome.err


def test_something_unexpected_leaves_its_traceback_in_a_log(
    command: Command, finished: Finished, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by [bold]nothing")

    monkeypatch.setattr("recipes.planning.plan", broken)
    outcome = command("check", finished.recipe)
    assert (outcome.status, outcome.err.count("\n")) == (1, 1)
    (log,) = (tmp_path / "logs").glob("*.log")
    assert f"(ZeroDivisionError: by [bold]nothing); the traceback and Ray's messages are in {log}" in outcome.err
    assert "Traceback" in log.read_text()


def test_init_writes_a_recipe_once(finished: Finished, command: Command, tmp_path: Path) -> None:
    data, out = finished.recipe.parent / "salads.csv", tmp_path / "drafted.yaml"
    first = command("init", data, "--out", out)
    assert first.status == 0, first.err
    assert "labels: mood, 2 classes" in first.out
    assert f"Next: shoal run {out}" in first.out
    small = ("export=null", f"store={tmp_path / 'store'}", f"finetune.encoder={finished.recipe.parent / 'encoder'}")
    run = command("run", out, *small)
    assert (run.status, run.out.count("made")) == (0, 3), run.err
    second = command("init", data, "--out", out)
    assert (second.status, "--force overwrites it" in second.err) == (2, True)
    assert command("init", data, "--out", out, "--force").status == 0


def test_help_has_examples(command: Command) -> None:
    for name in (
        "init",
        "check",
        "run",
        "prepare",
        "finetune",
        "evaluate",
        "export",
        "status",
        "show",
        "audit",
        "predict",
        "serve",
        "keys create",
        "keys list",
        "keys revoke",
    ):
        outcome = command(*name.split(), "--help")
        assert outcome.status == 0
        assert f"shoal {name}" in outcome.out.partition("Example")[2]


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that trains for a while, run once undisturbed."""
    folder = tmp_path_factory.mktemp("longer")
    recipe = make_recipe(folder, epochs=120, checkpoint_seconds=0.5)
    assert begin(recipe, folder / "store").wait(timeout=300) == 0
    return recipe


def begin(recipe: Path, store: Path | UPath, logs: Path | None = None) -> "subprocess.Popen[str]":
    """`shoal run`; with a folder for its logs, its output is kept too."""
    command = [sys.executable, "-m", "shoal", "run", str(recipe), f"store={store}"]
    environment = os.environ | {"SHOAL_LOGS": str((logs or Path(str(store)).parent) / "logs"), "COLUMNS": "400"}
    environment.pop("RAY_ADDRESS", None)
    out = subprocess.PIPE if logs else subprocess.DEVNULL
    return subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True, env=environment)


def checkpoints_of(folder: Path) -> set[str]:
    return {file.parent.name for file in folder.glob("store/finetune/*/work/checkpoints/*/checkpoint.json")}


def assert_same_artifacts(store: Path, other: Path) -> None:
    ours, theirs = ({each.record.stage: each for each in Store.open(str(path)).artifacts()} for path in (store, other))
    prints = [{name: each.record.fingerprint for name, each in found.items()} for found in (ours, theirs)]
    assert prints[0] == prints[1]
    assert set(ours) == {"prepare", "finetune", "evaluate", "export"}
    for stage, pattern in (("prepare", "*.parquet"), ("finetune", "*.safetensors"), ("evaluate", "*.json")):
        files, others = (
            {
                # How fast an evaluation was is no part of its result.
                str(file.relative_to(found[stage].path)): re.sub(rb'"texts_per_second": [\d.]+', b"", file.read_bytes())
                for file in found[stage].path.rglob(pattern)
                if file.name != RECORD  # It tells how long the stage took.
            }
            for found in (ours, theirs)
        )
        assert files
        assert files == others


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_and_goes_on(longer: Path, tmp_path: Path, sent: signal.Signals) -> None:
    process = begin(longer, tmp_path / "store")
    while not checkpoints_of(tmp_path):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(sent)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + sent
    assert err.endswith("shoal: interrupted; run the same command again to go on.\n")
    assert "Traceback" not in err
    assert begin(longer, tmp_path / "store").wait(timeout=300) == 0
    assert_same_artifacts(tmp_path / "store", longer.parent / "store")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_run_killed_at_twenty_moments_ends_alike(longer: Path, tmp_path: Path) -> None:
    """Each time the command and all of its Ray processes are killed at once."""
    draw = Random(7)
    for turn in range(20):
        process = begin(longer, tmp_path / "store")
        if turn % 2:
            known = checkpoints_of(tmp_path)
            while checkpoints_of(tmp_path) <= known:
                assert process.poll() is None, "it must not have ended yet"
                time.sleep(0.05)
        time.sleep(draw.uniform(0, 3 if turn % 2 else 20))
        assert process.poll() is None, "it must not have ended yet"
        for one in (*psutil.Process(process.pid).children(recursive=True), process):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.communicate()
    assert begin(longer, tmp_path / "store").wait(timeout=600) == 0
    assert_same_artifacts(tmp_path / "store", longer.parent / "store")
    (run,) = (each for each in Store.open(str(tmp_path / "store")).artifacts() if each.record.stage == "finetune")
    audit = [sys.executable, "-m", "shoal", "audit", run.record.fingerprint, "--store", str(tmp_path / "store")]
    assert subprocess.run(audit, capture_output=True, text=True, check=True).stdout.splitlines()[-1] == "exact"
    assert run.record.metrics["interruptions"] >= 5


@pytest.mark.slow
def test_a_store_that_takes_nothing_for_a_while_changes_nothing(
    longer: Path, bucket: str, s3_server: RefusingWrites, tmp_path: Path
) -> None:
    store = UPath(bucket) / "store"
    process = begin(longer, store, tmp_path)
    until = time.monotonic() + 120
    while not (found := list(store.glob("finetune/*/work/checkpoints/*/checkpoint.json"))):
        assert time.monotonic() < until
        store.fs.invalidate_cache()
        time.sleep(0.2)
    s3_server.refuses = True
    time.sleep(30)
    s3_server.refuses = False
    assert s3_server.refused > 0
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert re.search(
        "(could not be written to s3://shoal|interrupted at step [0-9,]+: ).*reduce your request rate", err
    ), err
    (theirs,) = (longer.parent / "store" / "finetune").iterdir()
    store.fs.invalidate_cache()
    ours = found[0].parents[3]
    for name in ("model/model.safetensors", "history.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
