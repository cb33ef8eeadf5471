"""The store: artifacts are whole or absent, on a local disk and on S3, and trouble with it is told in one sentence."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from upath import UPath

from cluster.store import ClusterError, Record, Store, local_copy, read_artifact, remove_tree, upload_tree
from tests.conftest import mounted


def record(fingerprint: str = "0123456789abcdef", stage: str = "prepare") -> Record:
    return Record(stage, fingerprint, {"a": 1}, {"data": "d"}, {"ray": "1"}, {"rows_in": 3}, "täst", 1.5)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store of each kind."""
    root = str(tmp_path / "new" / "store") if request.param == "local" else request.getfixturevalue("bucket") + "/a/b"
    return Store.open(root)


def test_what_is_committed_is_found(store: Store) -> None:
    given = record()
    folder = store.folder(given.stage, given.fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "data" / "part.bin").write_bytes(b"12345")
    assert store.find(given.stage, given.fingerprint) is None
    artifact = store.commit(given)
    assert artifact.record.bytes == 5
    found = Store.open(str(store.root)).find(given.stage, given.fingerprint)
    assert found is not None
    assert found.record == artifact.record
    assert found.record.recipe == "täst"
    assert (found.path / "data" / "part.bin").read_bytes() == b"12345"


def test_all_artifacts_are_listed_and_nothing_else(store: Store) -> None:
    for name in ("aa", "bb"):
        (store.folder("prepare", name) / "x").parent.mkdir(parents=True, exist_ok=True)
        (store.folder("prepare", name) / "x").write_text("x")
        store.commit(record(name))
    (store.folder("prepare", "unfinished")).mkdir(parents=True, exist_ok=True)
    (store.folder("prepare", "unfinished") / "x").write_text("x")
    (store.root / "notes.txt").write_text("not ours")
    (store.root / "logs").mkdir(exist_ok=True)
    assert [each.record.fingerprint for each in store.artifacts()] == ["aa", "bb"]


def test_trees_go_up_and_come_down(store: Store, tmp_path: Path) -> None:
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "tree" / "a").write_text("1")
    (tmp_path / "tree" / "deep" / "b").write_bytes(os.urandom(200_000))
    target = store.folder("finetune", "x") / "model"
    upload_tree(tmp_path / "tree", target)
    with local_copy(target) as folder:
        assert (folder / "a").read_text() == "1"
        assert (folder / "deep" / "b").read_bytes() == (tmp_path / "tree" / "deep" / "b").read_bytes()
    remove_tree(target)
    assert not (target / "a").exists()
    remove_tree(target)  # That it is gone is no error.


_COMMITS = """
import sys, time
from cluster.store import Record, Store
store = Store.open(sys.argv[1])
for number in range(10_000):
    name = f"{sys.argv[2]}-{number:05d}"
    folder = store.folder("prepare", name)
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(3):
        (folder / f"part-{part}").write_text("x" * 50_000)
        print(number, part, flush=True)
    store.commit(Record("prepare", name, {}, {}, {}, {"parts": 3}))
"""


def test_a_killed_writer_leaves_no_half_artifact(store: Store) -> None:
    for lines in (1, 4, 5):
        # Each writer has names of its own, for no stage writes into a finished artifact.
        command = [sys.executable, "-c", _COMMITS, str(store.root), str(lines)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        for _ in range(lines):
            process.stdout.readline()
        process.kill()
        process.wait()
        UPath(store.root).fs.invalidate_cache()
        for artifact in store.artifacts():
            assert sum((artifact.path / f"part-{part}").stat().st_size for part in range(3)) == 150_000


def test_a_record_is_replaced_whole(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path))
    store.folder("prepare", "x").mkdir(parents=True)
    store.commit(Record("prepare", "x", {}, {}, {}, {"text": "y" * 200_000}))
    writer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from cluster.store import *\n"
            "store = Store.open(sys.argv[1])\n"
            "while True: store.commit(Record('prepare', 'x', {}, {}, {}, {'text': 'y' * 200_000}))",
            str(tmp_path),
        ]
    )
    try:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            found = read_artifact(store.folder("prepare", "x"))
            assert found is not None
            assert len(found.record.metrics["text"]) == 200_000
    finally:
        writer.kill()
        writer.wait()


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ClusterError, match=r"a part of the path is a file, not a folder; choose another with `store="):
        Store.open(str(tmp_path / "file" / "store"))


def test_a_bucket_that_is_not_there_is_told(bucket: str) -> None:
    with pytest.raises(ClusterError, match="cannot write to the store s3://other/x") as raised:
        Store.open("s3://other/x")
    assert "\n" not in str(raised.value)


def test_an_unreachable_s3_is_told(monkeypatch: pytest.MonkeyPatch, bucket: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    UPath(bucket).fs.clear_instance_cache()
    with pytest.raises(ClusterError, match="cannot write to the store s3://shoal/x"):
        Store.open("s3://shoal/x")


def test_an_unknown_kind_of_store_is_told() -> None:
    with pytest.raises(ClusterError, match="nope://x"):
        Store.open("nope://x")


def test_a_full_disk_is_told_and_leaves_no_artifact(small_disk: Path, tmp_path: Path) -> None:
    store = Store.open(str(small_disk))
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "big").write_bytes(bytes(200_000))
    target = store.folder("finetune", "x")
    with pytest.raises(ClusterError, match="no space is left there; free some and run the same command again"):
        upload_tree(tmp_path / "tree", target)
    with pytest.raises(ClusterError, match="no space is left there"):
        store.commit(record("x", "finetune"))
    assert store.find("finetune", "x") is None


def test_a_read_only_store_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    if not mounted(folder, "ro"):
        pytest.skip("needs to mount a filesystem")
    try:
        with pytest.raises(ClusterError, match="the filesystem is read-only; choose another with `store=PATH`"):
            Store.open(str(folder / "store"))
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_store_without_permission_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ClusterError, match="permission is denied; choose another with `store=PATH`"):
        Store.open(str(tmp_path / "store"))


def test_what_a_killed_try_left_is_no_part_of_the_artifact(store: Store) -> None:
    given = record()
    folder = store.folder(given.stage, given.fingerprint)
    for name, content in {"data/part": b"12345", "data/.part.1f3a": b"123", "work/clean/0": b"1234"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    artifact = store.commit(given)
    assert artifact.record.bytes == 5
    assert not (folder / "data" / ".part.1f3a").exists()
    assert (folder / "work" / "clean" / "0").exists()
