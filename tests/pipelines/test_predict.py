"""predict answers every row of a file, in its place, whole or not at all, whatever dies in between."""

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from datetime import date
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from upath import UPath

from cluster.store import ClusterError
from models.settings import InputError
from models.torch_engine import load_torch_engine
from pipelines import predict
from pipelines.predict import predict_file
from pipelines.predicting.joining import Joined
from pipelines.predicting.reading import read_tables
from pipelines.predicting.whole_output import whole_output
from pipelines.preparing.data import DataSettings
from pipelines.preparing.decoding import decode
from pipelines.preparing.formats import look
from pipelines.preparing.units import Unit
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


def answer(file: Path | str, out: Path | str, model: Path, **more: object) -> predict.Predicted:
    data = {name: more.pop(name) for name in DataSettings.model_fields if name in more}
    more = {
        "data": DataSettings.model_validate({"source": "recipe.csv", **data}),
        "precision": "fp32",
        "progress": Progress(),
        **more,
    }
    return predict_file(str(file), str(out), UPath(model), **more)  # type: ignore[arg-type]


def test_every_row_keeps_its_place_and_columns_and_gets_the_engine_s_answer(model: Path, tmp_path: Path) -> None:
    asked = ["", *texts(50), 'the unknown, "quoted"\nword', "   ", "cat " * 30]
    source = write_csv(tmp_path / "in.csv", ("id", "text", "topic"), ((f"{i:03}", t, "x") for i, t in enumerate(asked)))
    done = answer(source, tmp_path / "out.parquet", model, temperature={"topic": 2.0}, every_class=True)
    assert (done.rows, done.missing, done.truncated) == (54, 2, 1)
    found = pq.read_table(tmp_path / "out.parquet")
    assert found["id"].to_pylist() == [f"{i:03}" for i in range(54)]
    assert found["text"].to_pylist() == asked
    engine = load_torch_engine(model, precision="fp32", temperature={"topic": 2.0})
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
        ("a.csv", b'text\n"never closed\n', {}, "a.csv, line 2: a quote opens in this row and is never closed"),
        ("a.jsonl", b'{"text": "cat"}\n{"text": \n', {}, "a.jsonl, line 2: no JSON"),
        ("a.jsonl", b'{"text": "cat"}\n["dog"]\n', {}, "a.jsonl, line 2: a JSON object is needed"),
        ("a.csv", b"text,truncated\ncat,1\n", {}, "has a column 'truncated' already"),
        ("a.csv", b"text\n", {}, "has no rows"),
        ("a.csv", b"text\ncat\n", {"text_pair": "text"}, "takes single texts"),
        ("a.csv", b"text,n,n\ncat,1,2\n", {}, "a.csv names the column 'n' twice"),
        ("a.jsonl", b'{"body": "cat"}\n', {}, "a.jsonl has no column 'text'; there are body"),
        ("a.parquet", b"PAR1, says who?", {}, "a.parquet is not a Parquet file"),
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


def test_a_file_to_classify_is_not_replaced(model: Path, tmp_path: Path) -> None:
    source = write_csv(tmp_path / "in.csv", ["text"], [["cat"]])
    (tmp_path / "link.csv").symlink_to(source)
    for file, out in ((source, source), (tmp_path / "link.csv", source), (source, tmp_path / "link.csv")):
        with pytest.raises(InputError, match=r"\.csv is a file to classify; choose another name"):
            answer(file, out, model)
    with pytest.raises(InputError, match=r"in\.csv is a file to classify"):
        answer(tmp_path / "*.csv", source, model)
    assert source.read_text().split() == ["text", "cat"]
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_not_of_an_earlier_try_is_not_cleared_away(model: Path, tmp_path: Path) -> None:
    source, out = write_csv(tmp_path / "in.csv", ["text"], [["cat"]]), tmp_path / "out.csv"
    partial = tmp_path / "out.csv.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"out\.csv\.partial is not of an earlier try"):
        answer(source, out, model)
    (partial / "thesis.txt").unlink()
    (partial / ".plan.sha256.0123").write_text("what a kill left")
    assert answer(source, out, model).rows == 1
    partial.write_text("mine")
    with pytest.raises(InputError, match=r"out\.csv\.partial is not of an earlier try"):
        answer(source, out, model)
    assert partial.read_text() == "mine"


@pytest.mark.parametrize("key", ["truncated", "predicted:topic"])
def test_a_late_key_that_the_predictions_add_is_told(model: Path, tmp_path: Path, key: str) -> None:
    objects: list[dict[str, object]] = [{"text": "cat"}] * 1000 + [{"text": "dog", key: True}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, objects)))
    with pytest.raises(InputError, match=f"in.jsonl has a column '{key}' already, which the predictions add"):
        answer(tmp_path / "in.jsonl", tmp_path / "out.parquet", model)


def test_a_damaged_or_odd_file_among_others_is_named(model: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out.parquet"
    folder.mkdir()
    with pytest.raises(InputError, match=r"/in is a folder without data files; known forms are csv"):
        answer(folder, out, model)
    pq.write_table(pa.table({"text": ["cat"] * 10}), folder / "a.parquet")
    pq.write_table(pa.table({"body": ["cat"] * 10}), folder / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet has no column 'text'; there are body"):
        answer(folder, out, model)
    pq.write_table(pa.table({"text": [["cat"]]}), folder / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet: text holds list<.*>, not text; name a column of strings"):
        answer(folder, out, model)
    pq.write_table(pa.table({"text": texts(5000)}), folder / "b.parquet", row_group_size=2500, compression="none")
    content = bytearray((folder / "b.parquet").read_bytes())
    second = pq.read_metadata(folder / "b.parquet").row_group(1).column(0)
    begin = second.dictionary_page_offset or second.data_page_offset
    content[begin : begin + second.total_compressed_size] = b"\xff" * second.total_compressed_size
    (folder / "b.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"b\.parquet is damaged after row 2,"):
        answer(folder, out, model)
    assert not out.exists()
    pq.write_table(pa.table({"text": ["cat", "dog"]}), folder / "b.parquet")
    assert answer(folder, out, model).rows == 12


def test_bytes_that_are_no_text_are_replaced(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfcat\n\xff\xfe dog\r\nowl")
    answer(tmp_path / "a.txt", tmp_path / "out.parquet", model)
    assert pq.read_table(tmp_path / "out.parquet")["text"].to_pylist() == ["cat", "\ufffd\ufffd dog", "owl"]


def write_undecodable(path: Path) -> None:
    """Three rows: the text of the second is not UTF-8, nor is the note of the third."""
    rows = [("1", b"cat", b"a"), ("2", b"\xff dog", b"b"), ("3", b"owl", b"\xff")]
    match path.suffix:
        case ".csv":
            path.write_bytes(b"id,text,note\n" + b"".join(b"%s,%s,%s\n" % (i.encode(), t, n) for i, t, n in rows))
        case ".jsonl":
            line = b'{"id": "%s", "text": "%s", "note": "%s"}\n'
            path.write_bytes(b"".join(line % (i.encode(), t, n) for i, t, n in rows))
        case _:
            ids, *columns = zip(*rows, strict=True)
            raw = [pa.array(column, pa.binary()) for column in columns]
            strings = [pa.Array.from_buffers(pa.string(), 3, column.buffers()) for column in raw]
            pq.write_table(pa.table({"id": ids, "text": strings[0], "note": strings[1]}), path)


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_a_text_that_is_not_utf8_keeps_its_place_without_an_answer_and_is_told(
    model: Path, tmp_path: Path, form: str
) -> None:
    source, out = tmp_path / f"a.{form}", tmp_path / "out.parquet"
    write_undecodable(source)
    done = answer(source, out, model)
    assert (done.rows, done.missing, done.unreadable) == (3, 0, 1)
    assert "1 not UTF-8 and so without an answer" in done.sentence
    found = pq.read_table(out)
    assert found.select(["id", "text", "note"]).to_pydict() == {
        "id": ["1", "2", "3"],
        "text": ["cat", "\ufffd dog", "owl"],
        "note": ["a", "b", "\ufffd"],
    }
    assert [value is None for value in found["predicted:topic"].to_pylist()] == [False, True, False]
    done = answer(source, out, model, source=f"recipe.{form}", undecodable="replace")
    assert (done.unreadable, "UTF-8" in done.sentence) == (0, False)
    assert pq.read_table(out)["predicted:topic"].null_count == 0


def read_back(out: Path) -> list[str]:
    return [str(text) for text in pq.read_table(out)["text"].to_pylist()]


def test_the_recipe_s_reading_rules_hold_for_files_of_its_format(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    (tmp_path / "a.tsv").write_text('id\ttext\n----\t----\n1\t"cat\n2\tdog" good\n')
    rules = {"source": "recipe.tsv", "skip_rows": 1, "quotes": False}
    done = answer(tmp_path / "a.tsv", out, model, **rules)
    assert (done.rows, done.skipped) == (2, 1)
    assert read_back(out) == ['"cat', 'dog" good']
    assert done.sentence.endswith("1 lines skipped (--skip-rows 0 reads them).")
    # The recipe's data are tsv: what holds for them says nothing of a csv file.
    (tmp_path / "a.csv").write_text('id,text\n1,"cat, ""good"""\n2,dog\n')
    done = answer(tmp_path / "a.csv", out, model, **rules)
    assert (done.rows, done.skipped, read_back(out)) == (2, 0, ['cat, "good"', "dog"])


def test_what_the_command_says_of_reading_counts_for_every_format(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    for form in ("jsonl", "parquet"):
        write_undecodable(tmp_path / f"a.{form}")
        done = answer(tmp_path / f"a.{form}", out, model)
        assert "1 not UTF-8 and so without an answer (--undecodable replace answers them)" in done.sentence
        done = answer(tmp_path / f"a.{form}", out, model, rules={"undecodable": "replace"})
        assert (done.unreadable, pq.read_table(out)["predicted:topic"].null_count) == (0, 0)
    (tmp_path / "half.jsonl").write_text('{"text": "cat"}\n{"text": "dog \\ud83d"}\n')
    assert answer(tmp_path / "half.jsonl", out, model).unreadable == 1
    assert answer(tmp_path / "half.jsonl", out, model, rules={"undecodable": "replace"}).unreadable == 0
    assert pq.read_table(out)["predicted:topic"].null_count == 0
    (tmp_path / "half.data").write_bytes((tmp_path / "half.jsonl").read_bytes())
    with pytest.raises(InputError, match="for predict, --format"):
        answer(tmp_path / "half.data", out, model)
    assert answer(tmp_path / "half.data", out, model, rules={"format": "jsonl"}).rows == 2
    (tmp_path / "a.tsv").write_text('id\ttext\n----\t----\n1\t"cat\n')
    with pytest.raises(InputError, match="if quotes are plain characters there, add --no-quotes"):
        answer(tmp_path / "a.tsv", out, model)
    done = answer(tmp_path / "a.tsv", out, model, rules={"skip_rows": 1, "quotes": False})
    assert (done.skipped, read_back(out)) == (1, ['"cat'])
    # Above what the recipe says of its own format.
    rules = {"source": "recipe.tsv", "skip_rows": 1, "quotes": False}
    assert answer(tmp_path / "a.tsv", out, model, **rules, rules={"skip_rows": 0}).rows == 2


def test_a_hub_dataset_is_read_as_the_command_says(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_undecodable(tmp_path / "a.parquet")
    monkeypatch.setattr("pipelines.preparing.hub.fetch", lambda *_: [(None, UPath(tmp_path / "a.parquet"))])
    out = tmp_path / "out.parquet"
    assert answer("hub://owner/name@1", out, model).unreadable == 1
    assert answer("hub://owner/name@1", out, model, rules={"undecodable": "replace"}).unreadable == 0


def test_the_recipe_s_format_counts_where_a_name_tells_none(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    (tmp_path / "export.dat").write_text("id\ttext\n1\tcat\n")
    with pytest.raises(InputError, match="its name does not tell the format"):
        answer(tmp_path / "export.dat", out, model)
    answer(tmp_path / "export.dat", out, model, source="other.dat", format="tsv")
    assert read_back(out) == ["cat"]
    pq.write_table(pa.table({"text": ["dog"]}), tmp_path / "a.parquet")
    answer(tmp_path / "a.parquet", out, model, source="other.dat", format="tsv")
    assert read_back(out) == ["dog"]
    (tmp_path / "lines.log").write_text("owl\n")
    answer(tmp_path / "lines.log", out, model, source="other.dat", format="text", text="body")
    assert read_back(out) == ["owl"]


def test_the_recipe_s_format_counts_for_names_like_its_own_files(model: Path, tmp_path: Path) -> None:
    (tmp_path / "new.txt").write_text("id\ttext\n1\tcat dog\n2\tred blue\n")
    answer(tmp_path / "new.txt", tmp_path / "out.csv", model, source="train.txt", format="tsv")
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert [(row["id"], row["text"]) for row in rows] == [("1", "cat dog"), ("2", "red blue")]


@pytest.mark.parametrize("source", ["{folder}", "{folder}/*", "{folder}/tr*.t?t"])
def test_the_recipe_s_format_counts_for_names_like_those_in_its_folder(
    model: Path, tmp_path: Path, source: str
) -> None:
    folder = tmp_path / "exports.v2"
    folder.mkdir()
    (folder / "train.txt").write_text("id\ttext\n1\tcat\n")
    (tmp_path / "new.txt").write_text("id\ttext\n1\tcat dog\n")
    answer(tmp_path / "new.txt", tmp_path / "out.parquet", model, source=source.format(folder=folder), format="tsv")
    assert read_back(tmp_path / "out.parquet") == ["cat dog"]


@pytest.mark.parametrize("kind", [pa.dictionary(pa.int32(), pa.binary()), pa.binary_view(), pa.binary(7)], ids=str)
def test_bytes_of_any_kind_are_read_as_text(model: Path, tmp_path: Path, kind: pa.DataType) -> None:
    asked = [b"cat dog", b"red cat", b"r\xffd dog"]
    column = pa.array(asked).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(asked, kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "in.parquet")
    assert answer(tmp_path / "in.parquet", tmp_path / "out.parquet", model).unreadable == 1
    assert read_back(tmp_path / "out.parquet") == ["cat dog", "red cat", "r\ufffdd dog"]


def test_what_parquet_cannot_hold_is_written_as_json_or_told(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "cat dog", "meta": {}}\n{"text": "red", "meta": {}}\n')
    answer(tmp_path / "in.jsonl", tmp_path / "out.parquet", model)
    assert pq.read_table(tmp_path / "out.parquet")["meta"].to_pylist() == ["{}", "{}"]
    (tmp_path / "parts").mkdir()
    for name, value in (("a", pa.array([2**60 + 1])), ("b", pa.array([0.5]))):
        pq.write_table(pa.table({"text": ["cat"], "id": value}), tmp_path / "parts" / f"{name}.parquet")
    with pytest.raises(
        InputError, match=r"the column id is int64 in one place and double in another, and does not fit"
    ):
        answer(tmp_path / "parts", tmp_path / "joined.parquet", model)


def test_objects_that_arrow_cannot_bring_together_are_written_as_json(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for name in ("a", "b"):
        kind = pa.struct([pa.field(name, pa.int64(), nullable=False)])
        table = pa.table({"text": ["cat", "dog"], "meta": pa.array([{name: 1}, {name: 2}], kind)})
        pq.write_table(table, folder / f"{name}.parquet")
    answer(folder, tmp_path / "out.parquet", model)
    found = pq.read_table(tmp_path / "out.parquet")["meta"].to_pylist()
    assert found == ['{"a": 1}', '{"a": 2}', '{"b": 1}', '{"b": 2}']


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(),
        pa.large_binary(),
        pa.binary(2),
        pa.binary_view(),
        pa.dictionary(pa.int32(), pa.binary()),
        pa.list_(pa.binary()),
        pa.map_(pa.binary(), pa.binary()),
    ],
    ids=str,
)
def test_bytes_of_any_kind_are_written_to_csv(model: Path, tmp_path: Path, kind: pa.DataType) -> None:
    values, fields = [b"ab", b"a\xff"], ["ab", "a\ufffd"]
    if pa.types.is_list(kind):
        column, fields = pa.array([values], kind), ['["ab", "a\ufffd"]']
    elif pa.types.is_map(kind):
        column, fields = pa.array([[tuple(values)]], kind), ['{"ab": "a\ufffd"}']
    elif pa.types.is_dictionary(kind):
        column = pa.array(values).dictionary_encode()
    else:
        column = pa.array(values, kind)
    pq.write_table(pa.table({"text": ["cat"] * len(column), "raw": column}), tmp_path / "in.parquet")
    answer(tmp_path / "in.parquet", tmp_path / "out.csv", model)
    assert [row["raw"] for row in csv.DictReader((tmp_path / "out.csv").open(encoding="utf-8"))] == fields


def test_a_uuid_is_written_to_csv_as_itself(model: Path, tmp_path: Path) -> None:
    number = uuid.UUID("c3543e2a-fb04-46a2-93e7-18d87f4860a4")
    column = pa.array([number.bytes], pa.uuid())
    pq.write_table(pa.table({"text": ["cat"], "id": column}), tmp_path / "in.parquet")
    answer(tmp_path / "in.parquet", tmp_path / "out.csv", model)
    assert (tmp_path / "out.csv").read_text().splitlines()[1].startswith(f"cat,{number},")


def test_values_of_several_types_are_spelled_as_prepare_spells_them(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    kinds = (pa.array([date(2020, 1, 1)]), pa.array(["soon"]), pa.array([True]), pa.array([2.0]))
    for number, column in enumerate(kinds):
        pq.write_table(pa.table({"text": ["cat"], "when": column}), folder / f"{number}.parquet")
    answer(folder, tmp_path / "out.parquet", model)
    assert pq.read_table(tmp_path / "out.parquet")["when"].to_pylist() == ["2020-01-01", "soon", "true", "2"]


def test_a_json_text_is_spelled_as_prepare_spells_it_and_has_an_answer_only_if_it_is_a_text(
    model: Path, tmp_path: Path
) -> None:
    lines = ['"cat"', "3.0", "true", "NaN", "null", '["cat"]', '{"a": "dog \\ud83d"}', '"dog"']
    (tmp_path / "in.jsonl").write_text("".join(f'{{"text": {each}, "n": {each}}}\n' for each in lines))
    done = answer(tmp_path / "in.jsonl", tmp_path / "out.parquet", model)
    found = pq.read_table(tmp_path / "out.parquet")
    told = ["cat", "3", "true", None, None, '["cat"]', '{"a": "dog \ufffd"}', "dog"]
    assert (found["text"].to_pylist(), found["n"].to_pylist()) == (told, told)
    answered = [value is not None for value in found["predicted:topic"].to_pylist()]
    assert answered == [True, True, True, False, False, False, False, True]
    assert (done.missing, done.unreadable) == (4, 0)
    settings = DataSettings(source=str(tmp_path / "in.jsonl"))
    (source,) = look(UPath(tmp_path / "in.jsonl"), settings, None)
    prepared = decode(Unit(source, 0, source.size), settings).sieve.table["text"].to_pylist()
    assert prepared == [*told[:5], "dog"]


def test_prepare_and_predict_read_the_same_rows(tmp_path: Path) -> None:
    path = tmp_path / "odd.csv"
    path.write_bytes(b'\xef\xbb\xbftext,n\r\n"a ""b"" c",1\r\n"d\ne"f,2\n g "h",3\n\n"",4\n,5')
    for quotes in (True, False):
        settings = DataSettings(source=str(path), skip_rows=1 - quotes, quotes=quotes)
        (source,) = look(UPath(path), settings, None)
        content = path.read_bytes()
        prepared = decode(Unit(source, source.header_bytes, len(content)), settings).sieve.table["text"].to_pylist()
        if quotes:
            assert prepared == ['a "b" c', "d\nef", ' g "h"', "", ""]
            read = [text for table in read_tables(source, settings, 2) for text in table["text"].to_pylist()]
            assert read == prepared
        else:  # Without quotes a row is broken there: prepare rejects it, predict stops at its line.
            with pytest.raises(InputError, match="line 3: 1 fields where the header names 2"):
                list(read_tables(source, settings, 2))


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
from pipelines.preparing.data import DataSettings
from pipelines.progress import Progress
predict.PART_ROWS, predict._SMALL_BYTES = 50, 2**30
source, out, model = sys.argv[1:]
data = DataSettings(source="recipe.csv")
predict.predict_file(source, out, UPath(model), data=data, precision="fp32", progress=Progress())
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
    join = predict.join

    def watching(folder: UPath, parts: dict[str, int], *rest: object) -> Joined:
        seen.append({name: (Path(folder.path) / name).stat().st_mtime_ns for name in parts})
        return join(folder, parts, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(predict, "join", watching)
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


_KILLED_WHILE_JOINING = """
import os, signal, sys
from upath import UPath
from pipelines import predict
from pipelines.predicting import whole_output
from pipelines.preparing.data import DataSettings
from pipelines.progress import Progress

upload = whole_output.upload_tree


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def half_sent(source, target):
    (source / "part-00000.parquet").rename(source / "part-00007.parquet")
    upload(source, target)
    killed()


whole_output.upload_tree = half_sent
source, out, model = sys.argv[1:]
if "://" not in out:
    whole_output._Csv.close = whole_output._Folder.close = killed
data = DataSettings(source="recipe.csv")
predict.predict_file(source, out, UPath(model), data=data, precision="fp32", progress=Progress())
"""


def kill_while_joining(source: Path, out: Path | str, model: Path) -> None:
    command = [sys.executable, "-c", _KILLED_WHILE_JOINING, str(source), str(out), str(model)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("name", ["out.csv", "out"])
def test_what_a_run_killed_while_joining_left_is_gone_after_the_next(model: Path, tmp_path: Path, name: str) -> None:
    source = write_csv(tmp_path / "in.csv", ["text"], ([text] for text in texts(20)))
    kill_while_joining(source, tmp_path / name, model)
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left > {"in.csv", f"{name}.partial"}
    assert name not in left
    assert answer(source, tmp_path / name, model).rows == 20
    assert {entry.name for entry in tmp_path.iterdir()} == {"in.csv", name}


def test_a_remote_folder_is_there_only_once_it_is_whole(bucket: str, model: Path, tmp_path: Path) -> None:
    source = write_csv(tmp_path / "in.csv", ["text"], ([text] for text in texts(20)))
    out = UPath(f"{bucket}/answers/out")
    kill_while_joining(source, str(out), model)
    out.fs.invalidate_cache()
    assert [entry.name for entry in out.iterdir()] == ["part-00007.parquet"]
    assert answer(source, str(out), model).rows == 20
    assert sorted(entry.name for entry in out.parent.rglob("*") if entry.is_file()) == [
        "_SUCCESS",
        "part-00000.parquet",
    ]
    with out.fs.open(f"{out.path}/part-00000.parquet") as stream:
        assert pq.read_table(stream)["text"].to_pylist() == texts(20)
    with pytest.raises(InputError, match="exists already"):
        answer(source, str(out), model)
    # What is no output of ours is not overwritten.
    (out.parent / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(InputError, match="exists already"):
        answer(source, str(out.parent / "mine"), model)
    assert (out.parent / "mine" / "notes.txt").read_text() == "keep"
    # A single object is replaced whole, as a local file is.
    for count in (20, 3):
        write_csv(source, ["text"], ([text] for text in texts(count)))
        assert answer(source, f"{out}.csv", model).rows == count
    assert len(UPath(f"{out}.csv").read_text().splitlines()) == 4


def test_no_bucket_is_made_for_a_mistyped_one(bucket: str, model: Path, tmp_path: Path) -> None:
    source = write_csv(tmp_path / "in.csv", ["text"], [["cat"]])
    with pytest.raises(ClusterError, match="cannot write to s3://shaol/out"):
        answer(source, "s3://shaol/out.csv", model)
    assert not UPath("s3://shaol").exists()


def test_a_full_temporary_folder_is_not_told_as_the_bucket_s_fault(
    bucket: str, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    table = pa.table({"text": texts(5_000)})
    folder = re.escape(str(small_disk))
    with (
        pytest.raises(ClusterError, match=f"cannot write to {folder}/shoal-[0-9a-f]+: no space is left there"),
        whole_output(UPath(f"{bucket}/out.csv"), "csv", table.schema) as writer,
    ):
        writer.write(table)
    assert not UPath(f"{bucket}/out.csv").exists()
    assert not list(small_disk.iterdir())


_ON_S3 = """
import json, sys
import boto3
from dataclasses import asdict
from pathlib import Path
from upath import UPath
from cluster.connect import connected
from models.settings import InputError
from pipelines.predict import predict_file
from pipelines.preparing.data import DataSettings
from pipelines.progress import Progress

source, out, model, mended = sys.argv[1:]


def attempt(given):
    data = DataSettings(source="recipe.csv")
    done = predict_file(given, out, UPath(model), data=data, precision="fp32", progress=Progress())
    print(json.dumps(asdict(done)))


with connected("local", cpus=2, object_store_bytes=200_000_000):
    try:
        attempt(source)
    except InputError as error:
        print(json.dumps(str(error)))
    # Not by a UPath, whose filesystem would remember it.
    listed = boto3.client("s3").list_objects_v2(Bucket="shoal", Prefix="answers/out.parquet.partial/")
    print(json.dumps([entry["Key"].rpartition("/")[2] for entry in listed["Contents"]]))
    attempt(mended)
"""


def test_what_a_broken_off_try_left_on_s3_stays_out_of_the_output(
    bucket: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    padding = "x" * 250  # Above a MiB the answers are given by Ray's processes, not by this one.
    rows = [(f"{number}", padding, text) for number, text in enumerate(texts(9000))]
    broken = write_csv(tmp_path / "broken.csv", ("id", "padding", "text"), [*rows, ("stray",)])
    mended = write_csv(tmp_path / "mended.csv", ("id", "padding", "text"), rows[:3999:-1])
    assert mended.stat().st_size > 2**20
    out = f"{bucket}/answers/out.parquet"
    done = subprocess.run(
        [sys.executable, "-c", _ON_S3, str(broken), out, str(model), str(mended)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    mistake, left, predicted = map(json.loads, done.stdout.splitlines())
    assert "line 9002: 1 fields" in mistake
    assert "part-000000-00000003.parquet" in left, "the first try was broken off too early for this test to tell"
    assert predicted["rows"] == 5000
    UPath(bucket).fs.invalidate_cache()
    assert [entry.name for entry in UPath(f"{bucket}/answers").rglob("*") if entry.is_file()] == ["out.parquet"]
    with UPath(out).open("rb") as stream:
        found = pq.read_table(stream)
    assert found["id"].to_pylist() == [row[0] for row in rows[:3999:-1]]
    monkeypatch.setattr(predict, "_SMALL_BYTES", 2**30)
    answer(mended, tmp_path / "here.parquet", model)
    assert found["predicted:topic"] == pq.read_table(tmp_path / "here.parquet")["predicted:topic"]


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda part: part.unlink(), "was answered but is not there"),
        (lambda part: pq.write_table(pq.read_table(part).slice(1), part), "has 9 rows where 10 were read"),
        (lambda part: part.write_bytes(b"PAR1"), "is damaged"),
        (lambda part: part.write_bytes(b"PAR1" + bytes(4000) + (3000).to_bytes(4, "little") + b"PAR1"), "is damaged"),
    ],
)
def test_a_part_that_is_lost_or_short_is_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path], None], told: str
) -> None:
    monkeypatch.setattr(predict, "PART_ROWS", 10)
    source = write_csv(tmp_path / "in.csv", ["text"], ([text] for text in texts(30)))
    join = predict.join

    def harmed(folder: UPath, *rest: object) -> Joined:
        harm(Path(folder.path) / "part-000000-00000001.parquet")
        return join(folder, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(predict, "join", harmed)
    with pytest.raises(ClusterError, match=rf"part-000000-00000001\.parquet {told}"):
        answer(source, tmp_path / "out.csv", model)
    assert not (tmp_path / "out.csv").exists()


def test_answers_that_never_come_are_told(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "PART_ROWS", 10)
    source = write_csv(tmp_path / "in.csv", ["text"], ([text] for text in texts(30)))
    answers = predict._answer_here
    monkeypatch.setattr(predict, "_answer_here", lambda *given: islice(answers(*given), 1, None))
    with pytest.raises(ClusterError, match="30 rows in 3 parts were read from 1 of 1 files, but 20 in 2 were answered"):
        answer(source, tmp_path / "out.csv", model)
