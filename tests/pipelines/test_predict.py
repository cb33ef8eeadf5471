"""predict answers every row of a file, in its place, whole or not at all, whatever dies in between."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from upath import UPath

from models.engine import load_engine
from models.settings import InputError
from pipelines import predict
from pipelines.predict import predict_file
from pipelines.progress import Progress
from tests.pipelines.tiny import MOOD, TOPIC, make_classifier, sentence

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of two label columns."""
    return make_classifier(tmp_path_factory.mktemp("classifier") / "model", (TOPIC, MOOD), steps=20)


def texts(count: int) -> list[str]:
    draw = random.Random(3)
    return [sentence(draw)[0] for _ in range(count)]


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def answer(source: Path, out: Path, model: Path, **more: object) -> predict.Predicted:
    more = {"text": "text", "precision": "fp32", "progress": Progress(), **more}
    return predict_file(str(source), str(out), UPath(model), **more)  # type: ignore[arg-type]


def test_every_row_keeps_its_place_and_columns_and_gets_the_engine_s_answer(model: Path, tmp_path: Path) -> None:
    asked = ["", *texts(50), 'the unknown, "quoted"\nword', "   ", "cat " * 30]
    source = write_csv(tmp_path / "in.csv", ("id", "text", "topic"), ((f"{i:03}", t, "x") for i, t in enumerate(asked)))
    done = answer(source, tmp_path / "out.parquet", model, temperature={"topic": 2.0}, every_class=True)
    assert (done.rows, done.missing, done.truncated) == (54, 2, 1)
    found = pq.read_table(tmp_path / "out.parquet")
    assert found["id"].to_pylist() == [f"{i:03}" for i in range(54)]
    assert found["text"].to_pylist() == asked
    engine = load_engine(model, precision="fp32", temperature={"topic": 2.0})
    for row, text in zip(found.to_pylist(), asked, strict=True):
        if not text.strip():
            assert (
                row["predicted:topic"] is row["probability:topic"] is row["predicted:mood"] is row["truncated"] is None
            )
            continue
        (expected,) = engine.classify([text])
        topic, mood = expected.labels["topic"], expected.labels["mood"]
        assert (row["predicted:topic"], row["predicted:mood"]) == (topic.label, mood.label)
        assert row["truncated"] == expected.truncated
        assert row["probability:topic"] == pytest.approx(max(topic.probabilities.values()), abs=1e-4)
        for name, value in mood.probabilities.items():
            assert row[f"probability:mood:{name}"] == pytest.approx(value, abs=1e-4)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in.csv", "out.parquet"]


def test_all_formats_give_the_same_answers(model: Path, tmp_path: Path) -> None:
    asked = texts(20)
    write_csv(tmp_path / "a.csv", ["text"], ([text] for text in asked))
    (tmp_path / "a.tsv").write_text("text\n" + "\n".join(asked) + "\n")
    (tmp_path / "a.txt").write_text("\n".join(asked))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in asked))
    pq.write_table(pa.table({"text": asked}), tmp_path / "a.parquet")
    answers = []
    for form in ("csv", "tsv", "txt", "jsonl", "parquet"):
        answer(tmp_path / f"a.{form}", tmp_path / f"out-{form}.csv", model)
        answers.append((tmp_path / f"out-{form}.csv").read_text())
    assert len(answers[0].splitlines()) == 21
    assert set(answers) == {answers[0]}
    # The same as a folder of Parquet files.
    answer(tmp_path / "a.csv", tmp_path / "folder", model)
    table = pq.read_table(tmp_path / "folder")
    assert table["predicted:topic"].to_pylist() == [
        row["predicted:topic"] for row in csv.DictReader(answers[0].splitlines())
    ]


def test_values_of_several_types_and_late_keys_survive(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "PART_ROWS", 2)
    objects = [
        {"text": "cat", "n": 1},
        {"n": 2, "tags": ["a"]},
        {"text": "dog", "n": "x"},
        {"text": 5, "more": {"k": 1}},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, objects)) + "\n\n")
    done = answer(tmp_path / "a.jsonl", tmp_path / "out.parquet", model)
    assert (done.rows, done.missing) == (4, 1)
    found = pq.read_table(tmp_path / "out.parquet")
    assert found["n"].to_pylist() == ["1", "2", "x", None]
    assert found["text"].to_pylist() == ["cat", None, "dog", "5"]
    assert found["tags"].to_pylist() == [None, ["a"], None, None]


@pytest.mark.parametrize(
    ("name", "content", "more", "sentence_"),
    [
        ("a.csv", b"texts\ncat\n", {}, "has no column 'text'; did you mean 'texts'"),
        ("a.csv", b"text,n\ncat,1\ndog,2,3\n", {}, "a.csv, line 3: 3 fields where the header names 2"),
        ("a.csv", b'text\n"never closed\n', {}, "a.csv, line 2: unexpected end of data"),
        ("a.jsonl", b'{"text": "cat"}\n{"text": \n', {}, "a.jsonl, line 2: no JSON"),
        ("a.jsonl", b'{"text": "cat"}\n["dog"]\n', {}, "a.jsonl, line 2: a JSON object is needed"),
        ("a.csv", b"text,truncated\ncat,1\n", {}, "has a column 'truncated' already"),
        ("a.csv", b"text\n", {}, "has no rows"),
        ("a.csv", b"text\ncat\n", {"text_pair": "text"}, "takes single texts"),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_no_output(
    model: Path, tmp_path: Path, name: str, content: bytes, more: dict[str, str], sentence_: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as failure:
        answer(tmp_path / name, tmp_path / "out.csv", model, **more)
    assert sentence_ in str(failure.value)
    assert not (tmp_path / "out.csv").exists()


def test_what_is_not_there_or_in_the_way_is_told(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        answer(tmp_path / "absent.csv", tmp_path / "out.csv", model)
    (tmp_path / "a.txt").write_text("cat\n")
    with pytest.raises(InputError, match="holds no classifier"):
        answer(tmp_path / "a.txt", tmp_path / "out.csv", tmp_path)
    (tmp_path / "kept").mkdir()
    with pytest.raises(InputError, match="exists already"):
        answer(tmp_path / "a.txt", tmp_path / "kept", model)
    (tmp_path / "kept.csv").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        answer(tmp_path / "a.txt", tmp_path / "kept.csv", model)


def test_bytes_that_are_no_text_are_replaced(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfcat\n\xff\xfe dog\r\nowl")
    answer(tmp_path / "a.txt", tmp_path / "out.parquet", model)
    assert pq.read_table(tmp_path / "out.parquet")["text"].to_pylist() == ["cat", "\ufffd\ufffd dog", "owl"]


def test_a_cluster_answers_as_this_process_does(
    ray_session: None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        asked = texts(5000)[number * 2500 : (number + 1) * 2500]
        write_csv(tmp_path / f"in-{number}.csv", ("id", "text"), ((number * 2500 + i, t) for i, t in enumerate(asked)))
    answer(tmp_path / "in-*.csv", tmp_path / "here.parquet", model)
    monkeypatch.setattr(predict, "_SMALL_BYTES", 0)
    answer(tmp_path / "in-*.csv", tmp_path / "there.parquet", model)
    here, there = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("here", "there"))
    assert there["id"].to_pylist() == [str(i) for i in range(5000)]
    assert here.select(["predicted:topic", "predicted:mood"]) == there.select(["predicted:topic", "predicted:mood"])


_KILLED = """
import sys
from upath import UPath
from pipelines import predict
from pipelines.progress import Progress
predict.PART_ROWS, predict._SMALL_BYTES = 50, 2**30
source, out, model = sys.argv[1:]
predict.predict_file(source, out, UPath(model), text="text", precision="fp32", progress=Progress())
"""


def test_a_killed_run_goes_on_from_its_parts(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_csv(tmp_path / "in.csv", ("id", "text"), ((i, t) for i, t in enumerate(texts(5_000))))
    out, partial = tmp_path / "out.parquet", tmp_path / "out.parquet.partial"
    command = [sys.executable, "-c", _KILLED, str(source), str(out), str(model)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while len(list(partial.glob("part-*"))) < 8 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {part.name: part.stat().st_mtime_ns for part in partial.glob("part-*")}
    assert 8 <= len(kept) < 100, "the kill came too late or too early for this test to tell anything"
    assert not out.exists()
    monkeypatch.setattr(predict, "PART_ROWS", 50)
    seen: list[dict[str, int]] = []
    join = predict._join

    def watching(parts: list[UPath], *rest: object) -> tuple[int, int, int]:
        seen.append({part.name: Path(part.path).stat().st_mtime_ns for part in parts})
        return join(parts, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(predict, "_join", watching)
    assert answer(source, out, model).rows == 5_000
    assert kept.items() <= seen[0].items(), "finished parts were made again"
    assert len(seen[0]) == 100
    answer(source, tmp_path / "undisturbed.parquet", model)
    assert pq.read_table(out) == pq.read_table(tmp_path / "undisturbed.parquet")
    assert not partial.exists()


def test_parts_of_another_source_are_not_taken_for_this_one_s(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,n\ncat,1\ndog,2,\n")
    with pytest.raises(InputError):
        answer(tmp_path / "a.csv", tmp_path / "out.csv", model)
    stale = pa.table({"text": ["stale"]})
    pq.write_table(stale, tmp_path / "out.csv.partial" / "part-000000-00000000.parquet")
    (tmp_path / "a.csv").write_text("text,n\ncat,1\ndog,2\n")
    answer(tmp_path / "a.csv", tmp_path / "out.csv", model)
    assert pa.csv.read_csv(tmp_path / "out.csv")["text"].to_pylist() == ["cat", "dog"]
