"""A claim on a folder of the store: one process at a time works there, whichever host it is on.

Two runs of one stage would write the same files and, in training, the same checkpoints. The claim is a file that is
made only where there is none (object stores know that too) and written anew every few seconds while its owner lives.
"""

import _thread
import contextlib
import ctypes
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from upath import UPath

from cluster.store import STORAGE_ERRORS, ClusterError, is_local, telling_storage_errors

_BEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0
_SETTLE_SECONDS = 0.5
_FIRST_LOOK_SECONDS = 0.02


def _place() -> str:
    """What a process number belongs to: this boot of this kernel, and in it the namespace of processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"  # Not Linux.


@dataclass
class _Owner:
    """Who holds a claim; `beats` grows while it lives."""

    host: str = field(default_factory=socket.gethostname)
    place: str = field(default_factory=_place)
    pid: int = field(default_factory=os.getpid)
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    beats: int = 0

    def gone(self) -> bool:
        """Whether it is known to have ended: only a process of this place can be looked for."""
        if self.place != _place():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False


@contextlib.contextmanager
def claimed(folder: UPath, tell: Callable[[str], None], *, silent_seconds: float = SILENT_SECONDS) -> Iterator[None]:
    """Holds `folder` while the block runs; first waits, and tells so once, while another process holds it.

    The claim stands beside the folder, which its holder may remove. One is taken over when its process is gone from
    this host, or when for `silent_seconds`, by this process's own clock, it was not written anew: hosts need not agree
    about the time. Whose claim was taken over, for it was suspended or could not reach the store, is interrupted.

    Raises:
        ClusterError: nothing can be written there, or the claim was lost meanwhile.
    """
    path, own = folder.with_name(f"{folder.name}.claim"), _Owner()
    with telling_storage_errors(str(folder)):
        if is_local(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        _wait_for(path, own, tell, silent_seconds)
    ended, lost = threading.Event(), threading.Event()
    beating = threading.Thread(target=_beat, args=(path, own, ended, lost), daemon=True, name="claim")
    beating.start()
    try:
        yield
    except KeyboardInterrupt:
        if lost.is_set():
            raise ClusterError(
                f"another process took {folder} over, for this one was silent for too long; run the same command again."
            ) from None
        raise
    finally:
        ended.set()
        beating.join()
        with contextlib.suppress(*STORAGE_ERRORS):
            if (left := _read(path)) and left.token == own.token:
                path.fs.rm_file(path.path)


def is_claimed(folder: UPath, *, silent_seconds: float = SILENT_SECONDS) -> bool:
    """Whether a process that lives holds the folder; that of another host is watched for so long at most."""
    path = folder.with_name(f"{folder.name}.claim")
    owner = _read(path)
    if owner is None or owner.gone():
        return False
    if owner.place == _place():
        return True
    until = time.monotonic() + silent_seconds
    while time.monotonic() < until:
        time.sleep(min(1.0, silent_seconds / 10))
        if (found := _read(path)) != owner:
            return found is not None
    return False


def _wait_for(path: UPath, own: _Owner, tell: Callable[[str], None], silent_seconds: float) -> None:
    seen: _Owner | None = None
    since, told, settle = time.monotonic(), False, False
    pause = _FIRST_LOOK_SECONDS  # Some hold a claim for a moment only, others for hours.
    while True:
        made, surely = _made(path, own)
        if made and surely and not settle:
            return
        if made:
            time.sleep(_SETTLE_SECONDS)  # Others may have done the same at the same time; the last one stays.
        owner = _read(path)
        if owner == own:
            return
        if owner != seen:
            seen, since = owner, time.monotonic()
        if (owner and owner.gone()) or time.monotonic() - since > silent_seconds:
            settle = True
            _remove(path, owner)
            continue
        if owner and not told:
            told = True
            work = path.with_suffix("")
            tell(f"process {owner.pid} on {owner.host} is at work on {work}; this one waits until it has ended")
        time.sleep(pause)
        pause = min(1.0, silent_seconds / 10, 2 * pause)


def _made(path: UPath, own: _Owner) -> tuple[bool, bool]:
    """Makes the claim where there is none; whether it did, and whether nobody else can have done so too."""
    content = json.dumps(asdict(own)).encode()
    if is_local(path):  # fsspec would look first and then write, and two could do that at once.
        try:
            with Path(path.path).open("xb") as file:
                file.write(content)
        except FileExistsError:
            return False, True
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)  # It was made, but there was no room for what it says.
            raise
        return True, True
    try:
        path.fs.pipe_file(path.path, content, mode="create")
    except OSError:  # Object stores differ in what they raise where the object is there.
        path.fs.invalidate_cache()
        if path.exists():
            return False, True
        path.fs.pipe_file(path.path, content)  # For a store without conditional writes, and to tell what is wrong.
        return True, False
    return True, True


def _remove(path: UPath, stale: _Owner | None) -> None:
    """Removes a stale claim, and no other: one that was made meanwhile is put back."""
    if not is_local(path):
        if _read(path) == stale:
            with contextlib.suppress(FileNotFoundError):
                path.fs.rm_file(path.path)
        return
    there = Path(path.path)
    aside = there.with_name(f"{there.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        there.rename(aside)
        if _read(UPath(aside)) != stale:
            with contextlib.suppress(FileExistsError):
                there.hardlink_to(aside)
        aside.unlink()


def _read(path: UPath) -> _Owner | None:
    """The owner, or None where the claim is gone or was not written whole."""
    try:
        return _Owner(**json.loads(path.fs.cat_file(path.path)))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _beat(path: UPath, own: _Owner, ended: threading.Event, lost: threading.Event) -> None:
    while not ended.wait(_BEAT_SECONDS):
        # A store that cannot be reached for a while is told by whoever has work to write there.
        with contextlib.suppress(*STORAGE_ERRORS):
            found = _read(path)
            if found and found.token != own.token:
                lost.set()
                _interrupt()
                return
            own.beats += 1
            path.fs.pipe_file(path.path, json.dumps(asdict(own)).encode())


def _interrupt() -> None:
    """Raises KeyboardInterrupt in the main thread, also where Ctrl-C is ignored, as it is in a script's background."""
    for each in (signal.SIGINT, signal.SIGTERM):
        if callable(signal.getsignal(each)):
            _thread.interrupt_main(each)
            return
    main = ctypes.c_ulong(threading.main_thread().ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(KeyboardInterrupt))
