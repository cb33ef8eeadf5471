"""Claims on folders of the store: one process at a time, and none that is dead keeps others waiting."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from cluster import claim
from cluster.claim import claimed, is_claimed
from cluster.store import ClusterError

_HOLDS = """
import sys, time
from upath import UPath
from cluster.claim import claimed
with claimed(UPath(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(60)
"""


_ELSEWHERE = '{"host": "elsewhere", "place": "another boot", "pid": 1, "token": "x", "beats": 3}'


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> UPath:
    """A folder to claim in a store of each kind."""
    return UPath(str(tmp_path) if request.param == "local" else request.getfixturevalue("bucket")) / "a" / "work"


def test_one_at_a_time(folder: UPath) -> None:
    inside: list[int] = []
    most: list[int] = []
    told: list[str] = []

    def work(number: int) -> None:
        with claimed(folder, told.append):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.2)
            inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]
    assert told
    assert all("is at work on" in sentence for sentence in told)
    assert not folder.with_name("work.claim").exists()


def test_a_killed_process_keeps_nobody_waiting(folder: UPath) -> None:
    holder = subprocess.Popen([sys.executable, "-c", _HOLDS, str(folder)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    told: list[str] = []
    entered = threading.Event()

    def enter() -> None:
        with claimed(folder, told.append):
            entered.set()

    thread = threading.Thread(target=enter)
    thread.start()
    assert not entered.wait(2)
    assert told
    assert f"process {holder.pid} " in told[0]
    holder.kill()
    holder.wait()
    assert entered.wait(10)
    thread.join()


def test_who_lives_holds_its_claim(folder: UPath) -> None:
    assert not is_claimed(folder)
    with claimed(folder, lambda _: None):
        assert is_claimed(folder)
    assert not is_claimed(folder)
    path = folder.with_name("work.claim")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_ELSEWHERE)
    assert not is_claimed(folder, silent_seconds=0.2), "its beats stand still"
    beats = threading.Timer(0.2, path.write_text, (_ELSEWHERE.replace("3", "4"),))
    beats.start()
    assert is_claimed(folder, silent_seconds=2.0)
    beats.join()


def test_another_host_that_falls_silent_is_not_waited_for(folder: UPath) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.with_name("work.claim").write_text(_ELSEWHERE)
    started = time.monotonic()
    with claimed(folder, lambda _: None, silent_seconds=1):
        assert time.monotonic() - started >= 1


@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN], ids=["foreground", "background"])
def test_who_lost_its_claim_is_told_and_leaves_the_new_one_alone(
    folder: UPath, ctrl_c: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "_BEAT_SECONDS", 0.2)

    def lose_it() -> None:
        with claimed(folder, print):
            folder.with_name("work.claim").write_text(_ELSEWHERE)
            for _ in range(100):  # An interrupt comes between two of Python's steps.
                time.sleep(0.1)

    before = signal.signal(signal.SIGINT, ctrl_c)
    try:
        with pytest.raises(ClusterError, match=r"another process took .*work over"):
            lose_it()
    finally:
        signal.signal(signal.SIGINT, before)
    assert folder.with_name("work.claim").read_text() == _ELSEWHERE


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = UPath(tmp_path / "file" / "x")
    with pytest.raises(ClusterError, match=r"cannot write to .*file/x: "), claimed(folder, print):
        pass
