"""prepare with redaction: no personal data in what it writes, all of it counted, and the classifier told of it."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from upath import UPath

from models.redaction import RedactionSettings
from models.settings import InputError
from models.text import TextSettings, cleaned
from pipelines import prepare
from pipelines.prepare import PrepareSettings, PrepareStageSettings
from pipelines.prepared import Prepared
from pipelines.preparing.data import DataSettings
from pipelines.preparing.names import with_names
from pipelines.progress import Progress
from pipelines.stage import Task
from tests.making import make_encoder

SECRETS = ["bob@example.com", "212-555-0123", "4111 1111 1111 1111", "Sandra"]


def run(folder: Path, data: dict[str, Any], redact: dict[str, Any]) -> tuple[dict[str, Any], Prepared]:
    wanted = PrepareStageSettings(
        data=DataSettings(labels={"column": "label", "classes": ["good", "bad"]}, **data),
        prepare=PrepareSettings(max_length=16, max_characters=200, redact=redact),
        encoder=str(make_encoder(folder / "encoder")),
    )
    out = UPath(folder / "out")
    task = Task(settings=wanted, inputs={}, out=out, progress=Progress(Console(quiet=True)), recipe="test")
    return prepare.run(task), Prepared(out)


@pytest.mark.usefixtures("ray_session")
def test_no_personal_data_is_written_anywhere(tmp_path: Path) -> None:
    rows = [{"text": f"word{n} word{n % 7}", "pair": "none", "label": "good" if n % 2 else "bad"} for n in range(60)]
    rows += [
        {"text": "call  212-555-0123 or\n bob@example.com", "pair": "Sandra paid", "label": "good"},
        {"text": "call 206-555-0199 or ann@example.org", "pair": "Sandra paid", "label": "good"},  # a duplicate, masked
        {"text": "bob@example.com", "pair": "4111 1111\n1111 1111", "label": "good"},
        {"text": "bob@example.com: no label", "pair": "", "label": ""},
        {"text": "in the wrong column", "pair": "", "label": "bob@example.com"},
        {"text": "x" * 2000 + " 4111 1111 1111 1111", "pair": "", "label": "good"},
        {"text": "212-555-0123 skip", "pair": "", "label": "good"},
        # Half a number would be left where the text is cut.
        {"text": "skip " + "x" * 1982 + " bob@example.com", "pair": "", "label": "good"},
    ]
    lines = [json.dumps(row) for row in rows] + ['{"text": "bob@example.com", broken']
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(lines) + "\n")
    names = tmp_path / "names.txt"
    names.write_text("Sandra\n\nJoão\n", encoding="utf-8")
    data = {"source": str(source), "text_pair": "pair", "where": {"text": "^(?!.*skip)"}}
    metrics, prepared = run(tmp_path, data, {"names": str(names)})

    tables = [prepared.read_split(split) for split in prepared.index.splits]
    rejected = pq.read_table(tmp_path / "out" / "rejected").to_pylist()
    written = str([table.to_pylist() for table in tables]) + str(rejected)
    assert not [secret for secret in SECRETS if secret in written]
    assert "bob@" not in written
    texts = {(row["text"], row["text_pair"]) for table in tables for row in table.to_pylist()}
    assert {("call [PHONE] or [EMAIL]", "[NAME] paid"), ("[EMAIL]", "[CARD]"), ("word1 word1", "none")} <= texts
    by_step = {(row["step"], row["text"][-22:]) for row in rejected}
    assert by_step >= {
        ("duplicates", "call [PHONE] or [EMAIL]"[-22:]),
        ("labels", "[EMAIL]: no label"),
        ("where", "[PHONE] skip"),
    }
    assert ("decode", '{"text": "[EMAIL]", broken'[-22:]) in by_step
    assert metrics["rows_in"] == len(lines) == metrics["rows_out"] + metrics["rejected"]
    # What is rejected before the step is masked, not counted.
    assert metrics["changed_redact"] == 8
    assert {name: count for name, count in metrics.items() if name.startswith("masked_")} == {
        "masked_email": 4,
        "masked_card": 2,
        "masked_phone": 2,
        "masked_name": 2,
    }
    assert "personal data" in (tmp_path / "out" / "report.html").read_text()
    # The names go with it: a text to classify is treated alike where there is no such file.
    names.unlink()
    assert prepared.index.text.redact == RedactionSettings(names=("Sandra", "João"))
    assert cleaned(["Sandra: bob@example.com"], prepared.index.text) == ["[NAME]: [EMAIL]"]


def test_artifacts_without_it_are_still_found_and_with_it_follow_the_names(tmp_path: Path) -> None:
    assert "redact" not in PrepareSettings().identity()
    assert PrepareSettings(redact={}).identity()["redact"]["kinds"][0] == "email"
    (tmp_path / "a.csv").write_text("text,label\nx,y\n")
    (tmp_path / "names.txt").write_text("Anna\n")

    def externals(**redact: Any) -> dict[str, str]:
        data = DataSettings(source=str(tmp_path / "a.csv"))
        settings = PrepareSettings(tokenizer={}, redact=redact or None)
        return prepare.externals(PrepareStageSettings(data=data, prepare=settings))

    assert set(externals()) == {"data"} == set(externals(names=["Anna"]))
    before = externals(names=str(tmp_path / "names.txt"))
    (tmp_path / "names.txt").write_text("Bob\n")
    assert externals(names=str(tmp_path / "names.txt"))["names"] != before["names"]


MISTAKES = {
    "not there": (None, r"redact.names: \S*names.txt does not exist"),
    "empty": (b"\n - \n", "the file of names, holds none; write one in each line"),
    "not UTF-8": (b"Jo\xe3o\n", r"the file of names, is not UTF-8 text \(byte 2\)"),
    "no names": (b"Anna\n" + b"x" * 101, "names.txt: line 2 is longer than a name; write one in each line"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_the_file_of_names_are_told(tmp_path: Path, mistake: str) -> None:
    content, sentence = MISTAKES[mistake]
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=sentence) as raised:
        with_names(TextSettings(redact=RedactionSettings(names=str(path))))
    assert "\n" not in str(raised.value)
