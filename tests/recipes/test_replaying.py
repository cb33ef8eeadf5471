"""Labelled texts to replay: what is read, and what is told of what cannot be."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from models.labels import LabelColumn
from models.settings import InputError
from recipes.replaying import Text, read_labelled, replayed

MOOD = LabelColumn(name="mood", classes=("bad", "good"))


def write_rows(path: Path, *rows: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [row["text"] for row in rows]


def test_files_of_samples_are_read_in_turn_as_far_as_is_asked_for(tmp_path: Path) -> None:
    write_rows(tmp_path / "2026-11-02" / "a.jsonl", {"text": "three", "mood": "bad"}, {"text": "four"})
    write_rows(tmp_path / "2026-11-01" / "b.jsonl", {"text": "one", "mood": "good"}, {"text": "two", "mood": None})
    assert texts(read_labelled(f"{tmp_path}/*/*.jsonl", 9)) == ["one", "two", "three", "four"]
    assert texts(read_labelled(f"{tmp_path}/*/*.jsonl", 3)) == ["one", "two", "three"]
    assert texts(read_labelled(f"{tmp_path}/2026-11-02", 1)) == ["three"]


def test_rows_of_other_forms(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,mood\n"so, so",\nfine,good\n', encoding="utf-8")
    table = Dataset.from_dict(
        {"text": ["one", "who knows"], "mood": [1, -1]},
        Features(text=Value("string"), mood=ClassLabel(names=["good", "bad"])),
    )
    table.to_parquet(tmp_path / "b.parquet")
    rows = read_labelled(str(tmp_path), 9)
    assert texts(rows) == ["so, so", "fine", "one", "who knows"]
    assert [row["mood"] for row in rows[2:]] == ["bad", None], "which the file has as numbers"

    def always_good(asked: list[Text]) -> list[dict[str, Any]]:
        return [{"labels": {"mood": {"probabilities": {"bad": 0.2, "good": 0.8}}}} for _ in asked]

    (found,) = replayed(rows, [MOOD], always_good, 2)
    assert (found.rows, found.macro_f1) == (2, pytest.approx(1 / 3)), "an empty field is no label"


def test_pairs_are_asked_as_pairs(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", {"text": "a", "pair": "b", "mood": "good"})
    asked: list[Text] = []

    def answer(some: list[Text]) -> list[dict[str, Any]]:
        asked.extend(some)
        return [{"labels": {"mood": {"probabilities": {"bad": 0.2, "good": 0.8}}}} for _ in some]

    replayed(read_labelled(str(path), 9, pair=True), [MOOD], answer, 2, pair=True)
    assert asked == [["a", "b"]]
    write_rows(path, {"text": "a", "mood": "good"})
    with pytest.raises(InputError, match=r"replay: .* has no column pair"):
        read_labelled(str(path), 9, pair=True)


def test_labels_are_spelled_as_training_data_are(tmp_path: Path) -> None:
    late = LabelColumn(name="late", classes=("true", "false"))
    path = write_rows(tmp_path / "late.jsonl", {"text": "a", "late": True}, {"text": "b", "late": False})

    def always_late(asked: list[Text]) -> list[dict[str, Any]]:
        return [{"labels": {"late": {"probabilities": {"true": 0.8, "false": 0.2}}}} for _ in asked]

    (found,) = replayed(read_labelled(str(path), 9), [late], always_late, 2)
    assert (found.rows, found.macro_f1) == (2, pytest.approx(1 / 3))


def test_bytes_that_are_no_text_are_told_beside_labels_that_are_numbers(tmp_path: Path) -> None:
    features = Features(text=Value("binary"), mood=ClassLabel(names=["good", "bad"]))
    Dataset.from_dict({"text": [b"fine", b"\xff"], "mood": [0, 1]}, features).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"replay: row 2 of .*a.parquet has no text in its column text"):
        read_labelled(str(tmp_path / "a.parquet"), 9)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": " "}\n', "row 2 of .*a.jsonl has no text in its column text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ["b"]}\n', "row 2 of .*a.jsonl has no text in its column text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "row 2 of .*a.jsonl has no text in its column text"),
        ("a.jsonl", b'{"words": "a"}\n', "a.jsonl has no column text"),
        ("a.jsonl", b'{"text": "a"}\n' * 1000 + b'{"words": "b"}\n', "row 1001 of .*a.jsonl has no text"),
        ("a.jsonl", b'{"text": "a"}\n"Jane Doe"\n', "a.jsonl, line 2, cannot be read as jsonl"),
        ("a.csv", b"Jane Doe,bad\n", "a.csv has no column text"),
        ("a.csv", b"text\n", "has no rows"),
        ("a.jsonl", b"", "is empty"),
        ("a.parquet", b"PAR", "is not a Parquet file, or is damaged"),
        ("a.bin", b"x", "its name does not tell the format"),
    ],
)
def test_what_cannot_be_replayed_is_told(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"^replay: .*{told}") as caught:
        read_labelled(str(tmp_path / name), 2000)
    assert "Jane" not in str(caught.value), "it is kept in the store"
    with pytest.raises(InputError, match=r"^replay: .*nothing"):
        read_labelled(str(tmp_path / "nothing.jsonl"), 9)
