"""prepare, end to end: what comes out, that nothing is lost, and that it is the same whatever happens meanwhile."""

import hashlib
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from transformers import AutoTokenizer
from upath import UPath

from models.settings import InputError
from pipelines import prepare
from pipelines.prepare import PrepareSettings, PrepareStageSettings
from pipelines.prepared import Prepared
from pipelines.preparing import chunking
from pipelines.preparing.data import DataSettings
from pipelines.progress import Progress
from pipelines.stage import Task
from tests.making import make_encoder

pytestmark = pytest.mark.usefixtures("ray_session")

WORDS = [f"word{number}" for number in range(60)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_encoder(tmp_path_factory.mktemp("encoder")))


def settings(encoder: str, data: dict[str, Any], **more: Any) -> PrepareStageSettings:
    values = {"max_length": 16, "chunk_rows": 16} | more
    chosen = None if "tokenizer" in values else encoder
    return PrepareStageSettings(
        data=DataSettings(**({"labels": "label"} | data)), prepare=PrepareSettings(**values), encoder=chosen
    )


def run(wanted: PrepareStageSettings, out: Path) -> tuple[dict[str, Any], Prepared]:
    task = Task(settings=wanted, inputs={}, out=UPath(out), progress=Progress(Console(quiet=True)), recipe="test")
    return prepare.run(task), Prepared(UPath(out))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def salad(seed: int, count: int, length: int = 8) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [
        {
            "text": " ".join(draw.choices(WORDS, k=draw.randint(2, length))),
            "label": draw.choice(["good", "bad"]),
            "n": n,
        }
        for n in range(count)
    ]


def rows_of(prepared: Prepared, split: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = prepared.read_split(split).to_pylist()
    return found


def rejected_of(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(out / "rejected").to_pylist()
    return found


def content_digest(out: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        if path.is_file() and "work" not in path.relative_to(out).parts and path.name != "report.html":
            digest.update(str(path.relative_to(out)).encode() + path.read_bytes())
    return digest.hexdigest()


def test_rows_come_out_clean_tokenised_and_in_chunks(tmp_path: Path, encoder: str) -> None:
    rows = [*salad(1, 600, 30), {"text": " word1 \t word2 &amp;  word3", "label": "good", "n": 600}]
    metrics, prepared = run(settings(encoder, {"source": write_jsonl(tmp_path / "a.jsonl", rows)}), tmp_path / "out")
    index = prepared.index
    assert index.labels[0].classes == ("bad", "good")
    assert metrics["rows_in"] == 601 == metrics["rows_out"] + metrics["rejected"]
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_folder.path)
    seen = []
    for split, info in index.splits.items():
        found = rows_of(prepared, split)
        seen += found
        assert len(found) == info.rows
        sizes = [len(prepared.read_chunk(split, chunk)) for chunk in range(info.chunks)]
        assert set(sizes[:-1]) <= {16}
        assert sum(sizes) == info.rows
        texts = [row["text"] for row in found]
        assert [row["input_ids"] for row in found] == tokenizer(texts, truncation=True, max_length=16)["input_ids"]
        assert info.tokens == sum(row["length"] for row in found)
        assert info.truncated == sum(row["truncated"] for row in found)
    by_row = {row["row"]: row for row in seen}
    for number, row in by_row.items():
        if number < 600:
            assert row["text"] == rows[number]["text"]
            assert index.labels[0].classes[row["label:label"]] == rows[number]["label"]
    assert by_row[600]["text"] == "word1 word2 & word3"
    order = [row["row"] for row in rows_of(prepared, "train")]
    assert order != sorted(order)
    assert abs(sum(order[: len(order) // 2]) / (len(order) // 2) - 300) < 50  # the first half is from everywhere
    report = (tmp_path / "out" / "report.html").read_text()
    assert "<svg" in report
    assert not re.search(r'\b(src|href)="[^#]', report)  # everything is in it


def test_the_order_is_of_the_seed_not_of_the_partitions(
    tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {"source": write_jsonl(tmp_path / "a.jsonl", salad(2, 500))}
    _, one = run(settings(encoder, source), tmp_path / "one")
    monkeypatch.setattr(chunking, "_PARTITION_BYTES", 4000)
    monkeypatch.setattr("pipelines.preparing.units._SMALLEST", 5000)
    monkeypatch.setattr("pipelines.preparing.tokenise_pass._SMALLEST_FILE", 3000)
    _, many = run(settings(encoder, source), tmp_path / "many")
    assert len(many.index.splits["train"].files) > 3
    for split in ("train", "validation", "test"):
        assert rows_of(many, split) == rows_of(one, split)
    _, other = run(settings(encoder, source, seed=1), tmp_path / "other")
    for split in ("train", "validation", "test"):
        ours, theirs = rows_of(one, split), rows_of(other, split)
        assert ours != theirs
        assert sorted(row["row"] for row in ours) == sorted(row["row"] for row in theirs)


def test_no_content_crosses_given_splits_and_the_test_keeps_its_rows(tmp_path: Path, encoder: str) -> None:
    train, test = salad(3, 300), salad(4, 100)
    train[5]["text"], train[6]["text"] = test[0]["text"], f"  {test[1]['text']}\n"
    source = {
        "train": write_jsonl(tmp_path / "train.jsonl", train),
        "test": write_jsonl(tmp_path / "test.jsonl", test),
    }
    metrics, prepared = run(settings(encoder, {"source": source}, validation_share=0.2), tmp_path / "out")
    texts = {split: {row["text"] for row in rows_of(prepared, split)} for split in prepared.index.splits}
    assert texts["test"] == {row["text"] for row in test}
    assert not texts["test"] & texts["train"]
    assert not texts["validation"] & (texts["train"] | texts["test"])
    assert 0.1 < metrics["validation_rows"] / 300 < 0.3
    lost = [row for row in rejected_of(tmp_path / "out") if row["step"] == "duplicates"]
    reasons = {(Path(row["file"]).name, row["row"]): row["reason"].split(",")[0] for row in lost}
    assert reasons[("train.jsonl", 6)] == f"equal to row 1 of {source['test']}"
    assert reasons[("train.jsonl", 7)] == f"equal to row 2 of {source['test']}"


def test_a_split_column_and_rows_without_a_known_one(tmp_path: Path, encoder: str) -> None:
    rows = salad(5, 200)
    for number, row in enumerate(rows):
        row["part"] = ["train", "dev", "test", "train"][number % 4]
    rows[0]["part"] = "other"
    data = {"source": write_jsonl(tmp_path / "a.jsonl", rows), "split": "part", "columns": ["part"]}
    _, prepared = run(settings(encoder, data), tmp_path / "out")
    kinds = {split: {row["column:part"] for row in rows_of(prepared, split)} for split in prepared.index.splits}
    assert kinds == {"train": {"train"}, "validation": {"dev"}, "test": {"test"}}
    assert [row["reason"] for row in rejected_of(tmp_path / "out") if row["step"] == "split"] == [
        "part is 'other', which is no split"
    ]


def test_every_rejected_row_is_kept_with_its_place_and_reason(tmp_path: Path, encoder: str) -> None:
    good = [f"word{number} word{number % 7},{'good' if number % 2 else 'bad'}" for number in range(60)]
    strange = [
        "  ,good",
        "word1,",
        "word2,awful",
        "a,b,c",
        "word3 \xff,good",
        f"{'x' * 200},good",
        good[0],
        "zzz skip,bad",
    ]
    lines = ["text,label", *good, *strange]
    path = tmp_path / "a.csv"
    path.write_bytes("\n".join(lines).encode("latin-1"))
    label = {"column": "label", "classes": ["good", "bad"]}
    data = {"source": str(path), "labels": label, "where": {"text": "^(?!.*skip)"}}
    metrics, _ = run(settings(encoder, data, max_characters=100), tmp_path / "out")
    found = sorted((row["row"], row["step"], row["reason"]) for row in rejected_of(tmp_path / "out"))
    assert found == [
        (62, "length", "the text is empty"),
        (63, "labels", "no label in label"),
        (64, "labels", "label has the unknown class 'awful'"),
        (65, "decode", "3 fields where the header has 2"),
        (66, "decode", "not UTF-8"),
        (67, "length", "200 characters, more than 100"),
        (68, "duplicates", f"equal to row 2 of {path}"),
        (69, "where", "text does not match data.where"),
    ]
    assert {row["file"] for row in rejected_of(tmp_path / "out")} == {str(path)}
    assert metrics["rejected"] == 8
    assert metrics["rows_in"] == 68


def test_contradicting_duplicates_take_the_label_of_most(tmp_path: Path, encoder: str) -> None:
    rows = [*salad(6, 200), *({"text": "word1 again", "label": label} for label in ("bad", "good", "good"))]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    metrics, prepared = run(settings(encoder, {"source": source}), tmp_path / "out")
    kept = [row for split in prepared.index.splits for row in rows_of(prepared, split) if row["text"] == "word1 again"]
    assert [(row["row"], row["label:label"]) for row in kept] == [(201, 1)]
    assert metrics["conflicting_duplicates"] >= 1
    reasons = [row["reason"] for row in rejected_of(tmp_path / "out") if row["text"] == "word1 again"]
    assert sorted(reasons) == [f"equal to row 202 of {source}", f"equal to row 202 of {source}, which has other labels"]


def test_several_label_columns_some_with_many_classes(tmp_path: Path, encoder: str) -> None:
    rows = salad(7, 200)
    for number, row in enumerate(rows):
        row["topics"] = [None, [], ["b", "a"], ["c"]][number % 4]
        row["label"] = row["label"] if number % 3 else None
    labels = [{"column": "label", "names": {"good": "fine"}}, {"column": "topics", "multi": True}]
    data = {"source": write_jsonl(tmp_path / "a.jsonl", rows), "labels": labels, "columns": ["topics"]}
    metrics, prepared = run(settings(encoder, data, deduplicate="none"), tmp_path / "out")
    sentiment, topics = prepared.index.labels
    assert sentiment.classes == ("bad", "fine")
    assert topics.classes == ("a", "b", "c")
    assert topics.multi
    assert metrics["rejected_labels"] == sum(number % 12 == 0 for number in range(200))
    for split in prepared.index.splits:
        for row in rows_of(prepared, split):
            number = row["row"]
            assert row["label:topics"] == [None, [], [0, 1], [2]][number % 4]
            assert row["column:topics"] == [None, "[]", '["b", "a"]', '["c"]'][number % 4]
            assert row["label:label"] == (-1 if number % 3 == 0 else 1 if rows[number]["label"] == "good" else 0)


def test_pairs_and_a_tokenizer_of_their_own(tmp_path: Path, encoder: str) -> None:
    rows = [row | {"second": "我们喜欢 word" + str(row["n"])} for row in salad(8, 150)]
    data = {"source": write_jsonl(tmp_path / "a.jsonl", rows), "text_pair": "second"}
    _, prepared = run(settings(encoder, data, tokenizer={"vocabulary": 300}), tmp_path / "out")
    assert prepared.index.pair
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_folder.path)
    found = rows_of(prepared, "train")
    expected = tokenizer([r["text"] for r in found], [r["text_pair"] for r in found], truncation=True, max_length=16)
    assert [row["input_ids"] for row in found] == expected["input_ids"]
    assert [row["token_type_ids"] for row in found] == expected["token_type_ids"]
    assert "我" in tokenizer.get_vocab()


MISTAKES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any], str]] = {
    "a single class": ([{"text": f"w {n}", "label": "x"} for n in range(9)], {}, {}, "has the single class 'x'"),
    "nothing left": (salad(9, 20), {"where": {"text": "never"}}, {}, r"no usable row is left of 20 .* 20 at where"),
    "an empty split": (salad(9, 20), {}, {"test_share": 0.001}, "the test split came out empty from 20 usable rows"),
    "lists for one label": ([{"text": f"w {n}", "label": ["x"]} for n in range(9)], {}, {}, "set multi: true"),
    "too long for the encoder": (salad(9, 20), {}, {"max_length": 65}, "takes at most 64 tokens"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_reach_the_user_as_one_sentence(tmp_path: Path, encoder: str, mistake: str) -> None:
    rows, data, values, sentence = MISTAKES[mistake]
    data = {"source": write_jsonl(tmp_path / "a.jsonl", rows)} | data
    with pytest.raises(InputError, match=sentence) as raised:
        run(settings(encoder, data, **values), tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out" / "prepared.json").exists()


def test_classes_are_counted_over_all_units(tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.preparing.units._SMALLEST", 100_000)
    rows = [{"text": f"word1 number {number}", "label": f"id-{number}"} for number in range(10_001)]
    data = {"source": write_jsonl(tmp_path / "a.jsonl", rows)}
    with pytest.raises(InputError, match="the label column 'label' has more than 10,000 different values"):
        run(settings(encoder, data), tmp_path / "out")
    _, prepared = run(settings(encoder, {"source": write_jsonl(tmp_path / "b.jsonl", rows[1:])}), tmp_path / "fits")
    assert len(prepared.index.labels[0].classes) == 10_000


def test_externals_follow_the_data_and_the_tokenizer(tmp_path: Path, encoder: str) -> None:
    wanted = settings(encoder, {"source": write_jsonl(tmp_path / "a.jsonl", salad(1, 5))})
    before = prepare.externals(wanted)
    assert before == prepare.externals(wanted)
    write_jsonl(tmp_path / "a.jsonl", salad(1, 6))
    after = prepare.externals(wanted)
    assert after["data"] != before["data"]
    assert after["tokenizer"] == before["tokenizer"]
    assert "tokenizer" not in prepare.externals(settings(encoder, {"source": wanted.data.source}, tokenizer={}))


RUN_IN_A_PROCESS = """
import pickle, sys
from rich.console import Console
from upath import UPath
from cluster.connect import connected
from pipelines import prepare
from pipelines.progress import Progress
from pipelines.stage import Task
settings, out = pickle.load(open(sys.argv[1], "rb"))
with connected("local", cpus=2, object_store_bytes=100_000_000):
    prepare.run(Task(settings=settings, inputs={}, out=UPath(out), progress=Progress(Console(quiet=True))))
"""


@pytest.mark.parametrize(("phase", "parts"), [("clean", 2), ("tokenise", 1)])
def test_killed_and_run_again_it_is_the_same(
    tmp_path: Path, encoder: str, phase: str, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {"source": write_jsonl(tmp_path / "a.jsonl", salad(10, 60_000, 20)), "columns": ["n"]}
    wanted = settings(encoder, source, chunk_rows=512)
    undisturbed, _ = run(wanted, tmp_path / "whole")
    out = tmp_path / "killed"
    (tmp_path / "job.pkl").write_bytes(pickle.dumps((wanted, str(out))))
    root = Path(__file__).parents[2]
    with (tmp_path / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", RUN_IN_A_PROCESS, str(tmp_path / "job.pkl")],
            env=os.environ | {"PYTHONPATH": str(root)},
            stderr=stderr,
            start_new_session=True,
        )
    deadline = time.monotonic() + 240
    while len(list((out / "work" / phase).glob("0*.json"))) < parts:
        assert process.poll() is None, f"it ended by itself: {(tmp_path / 'stderr').read_text()[-2000:]}"
        assert time.monotonic() < deadline, f"{phase} did not begin in time"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "prepared.json").exists(), "it ended before it was killed"
    kept = {path: path.stat().st_mtime_ns for path in (out / "work").glob("*/0*.json")}
    assert kept
    resumed, _ = run(wanted, out)
    assert content_digest(out) == content_digest(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "finished parts were done again"
    timeless = {key for key in undisturbed if not key.startswith(("seconds", "megabytes_per"))}
    assert {key: resumed[key] for key in timeless} == {key: undisturbed[key] for key in timeless}


def test_many_units_and_files_lose_nothing(tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.preparing.units._SMALLEST", 2000)
    rows = salad(11, 400, 40)
    (tmp_path / "many").mkdir()
    for number in range(0, 400, 100):
        pq.write_table(pa.Table.from_pylist(rows[number : number + 100]), tmp_path / "many" / f"{number:03d}.parquet")
    data = {"source": str(tmp_path / "many" / "*.parquet"), "columns": ["n"]}
    _, prepared = run(settings(encoder, data, deduplicate="none"), tmp_path / "out")
    found = [row for split in prepared.index.splits for row in rows_of(prepared, split)]
    assert sorted(row["row"] for row in found) == list(range(400))
    assert all(row["column:n"] == str(row["row"]) for row in found)
