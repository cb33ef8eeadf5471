"""A real recipe, from its data to its gate and its answers, with its store on S3."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.store import Store


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_reuters_with_its_store_on_s3(bucket: str, tmp_path: Path) -> None:
    environment = os.environ | {"SHOAL_LOGS": str(tmp_path / "logs")}
    environment.pop("RAY_ADDRESS", None)

    def shoal(*arguments: str) -> str:
        command = [sys.executable, "-m", "shoal", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path.cwd())
        assert done.returncode == 0, done.stderr
        return done.stdout

    recipe = ("recipes/reuters.yaml", f"store={bucket}/reuters")
    assert shoal("run", *recipe).count("made") == 4
    assert shoal("run", *recipe).count("reused") == 4
    artifacts = {each.record.stage: each for each in Store.open(f"{bucket}/reuters").artifacts()}
    prepared = artifacts["prepare"].record.metrics
    assert prepared["rows_in"] == 5485 + 2189 == prepared["rows_out"] + prepared["rejected"]
    assert artifacts["evaluate"].record.metrics["accuracy"] >= 0.95
    assert f"prepare/{artifacts['prepare'].record.fingerprint}" in shoal("status", "--store", f"{bucket}/reuters")

    texts = tmp_path / "texts.csv"
    texts.write_text("Text\nshr earnings net profit dividend cts vs loss\noil crude barrels opec prices\n")
    shoal("predict", recipe[0], str(texts), *recipe[1:], "--out", str(tmp_path / "answers.parquet"))
    assert pq.read_table(tmp_path / "answers.parquet")["predicted:Category"].to_pylist() == ["earn", "crude"]
    assert "earn" in shoal("serve", *recipe, "serve.port=18472", "--ask", "earnings net profit dividend cts vs loss")
    shown = json.loads(
        shoal("show", artifacts["evaluate"].record.fingerprint, "--store", f"{bucket}/reuters", "--json")
    )
    assert shown["inputs"]["finetune"] == artifacts["finetune"].record.fingerprint


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pretraining_and_a_sweep_on_s3(bucket: str, tmp_path: Path) -> None:
    environment = os.environ | {"SHOAL_LOGS": str(tmp_path / "logs")}
    environment.pop("RAY_ADDRESS", None)
    store = f"{bucket}/inews"
    recipe = ["recipes/inews.yaml", f"store={store}", "pack.length=64", "pack.tokenizer.vocabulary=2000"]
    recipe += ["pretrain.encoder.size=tiny", "pretrain.steps=8", "pretrain.validations=2", "pretrain.workers=1"]
    recipe += ["prepare.max_length=32", "finetune.epochs=1", "finetune.workers=1", "evaluate.gate={}"]
    recipe += ["sweep={trials: 2, rungs: 2, stop: none}"]

    def run() -> str:
        command = [sys.executable, "-m", "shoal", "run", *recipe]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path.cwd())
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run().count("made") == 8
    assert run().count("reused") == 8
    artifacts = {each.record.stage: each for each in Store.open(store).artifacts()}
    assert artifacts["pack"].record.metrics["documents"] > 0
    assert artifacts["pretrain"].record.metrics["steps"] == 8
    assert artifacts["sweep"].record.metrics["finished"] == 2
    assert "without_pretraining" in artifacts["evaluate"].record.inputs
    left = [str(path) for path in Store.open(store).folder("sweep", "x").parent.glob("*/work/**")]
    assert not left
