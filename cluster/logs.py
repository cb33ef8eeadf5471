"""Where the noise of a command goes: one log file, so that a terminal shows only what a user asked for.

Ray, its C++ core and other libraries write to the process's output by many roads (loggers, warnings, bare
file descriptors). While a command captures, descriptors 1 and 2 are the log file, and the command itself writes to
copies of the terminal's.
"""

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

_KEPT = 30


@dataclass(frozen=True)
class Terminal:
    """The streams a command writes to while it captures: results to `out`, progress and trouble to `err`."""

    out: TextIO
    err: TextIO


@dataclass
class CommandLog:
    """The log file of one command. It is made at the first need and removed if nothing was written to it."""

    _path: Path | None = field(default=None, init=False)

    @property
    def path(self) -> Path:
        """The file, named by time and process, in the folder that `SHOAL_LOGS` names or the user's state folder."""
        if self._path is None:
            name = f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}-{os.getpid()}.log"
            self._path = _folder() / name
        return self._path

    @contextlib.contextmanager
    def capturing(self) -> Iterator[Terminal]:
        """Sends all that is written to descriptors 1 and 2 to the log while the block runs."""
        sys.stdout.flush()
        sys.stderr.flush()
        kept = os.dup(1), os.dup(2)
        terminal = Terminal(*(os.fdopen(os.dup(copy), "w", buffering=1, encoding="utf-8") for copy in kept))
        with self.path.open("ab", buffering=0) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        try:
            yield terminal
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream in (terminal.out, terminal.err):
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
            for descriptor, copy in enumerate(kept, start=1):
                os.dup2(copy, descriptor)
                os.close(copy)
            with contextlib.suppress(FileNotFoundError):  # The folder may be cleared meanwhile.
                if self.path.stat().st_size == 0:
                    self.path.unlink()

    def write_traceback(self, error: BaseException) -> Path:
        """Appends the error with its traceback; returns the file."""
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as log:
            traceback.print_exception(error, file=log)
        return self.path


def _folder() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    chosen = Path(os.environ.get("SHOAL_LOGS") or f"{state}/shoal/logs").expanduser()
    try:
        chosen.mkdir(parents=True, exist_ok=True)
        for old in sorted(chosen.glob("*.log"))[: -_KEPT or None]:
            old.unlink(missing_ok=True)
    except (OSError, RuntimeError):
        return Path(tempfile.mkdtemp(prefix="shoal-logs-"))
    return chosen


def causes(error: BaseException) -> Iterator[BaseException]:
    """The errors inside `error`, outermost first: what Ray's tasks and training workers, or `raise ... from`, wrap.

    Ray gives a failed task's error a class of its own that pretends to be the cause's and prints a whole
    traceback; only what has no cause in that sense is given here.
    """
    pending, seen = [error], set()
    while pending:
        current = pending.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        task_cause = getattr(current, "cause", None)
        if not isinstance(task_cause, BaseException):
            yield current
        inner = [
            task_cause,
            *getattr(current, "worker_failures", {}).values(),
            getattr(current, "controller_failure", None),
            current.__cause__,
            current.__context__,
        ]
        pending += [each for each in inner if isinstance(each, BaseException)]


def last_line(error: BaseException) -> str:
    """The last line of what an error says, which is the error itself where Ray put a worker's traceback before it."""
    return next(iter(reversed(str(error).strip().splitlines())), type(error).__name__)
