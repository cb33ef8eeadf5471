"""The serving code's log: the logger tree "shoal", a JSON object in each line, and no personal data in any of them.

Whoever serves logs by `logger(NAME)`. What goes through such a logger is masked before any handler sees it: the message
and the messages of exceptions, whichever library made them. A traceback keeps its places in the code, which hold no
data.
"""

import functools
import json
import logging
import re
import sys
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from models.redaction import REACH, RedactionSettings

TREE = "shoal"
_FOREIGN = ("asyncio", "concurrent.futures", "uvicorn.error", "ray.serve")
"""Others' loggers that tell of exceptions nobody caught: in a replica they are masked too."""

_LONGEST = 500
"""Characters of an exception's message that are told."""
_READ = 4 * REACH
_WORD = re.compile(r"[0-9A-Za-z_]{2,}|[^\x00-\x7f]")


def logger(name: str) -> logging.Logger:
    """The logger `shoal.NAME`, whose records are masked."""
    found = logging.getLogger(f"{TREE}.{name}")
    _mask(found)
    return found


class MaskingFilter(logging.Filter):
    """Masks personal data of all kinds in records, in place, so that no handler behind it sees any.

    A record's attribute `said`, which may be given by `extra`, is what a client sent: no word of it is told of an
    exception's message.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Masks the record; lets every one pass."""
        record.msg, record.args = _masked(record.getMessage()), None
        said = record.__dict__.pop("said", "")
        if record.exc_info and record.exc_info[1] is not None:
            record.exc_text = "\n".join(_told(record.exc_info[1], said))
        elif record.exc_text:
            record.exc_text = _masked(record.exc_text)
        record.exc_info = None
        record.stack_info = None
        return True


class JsonFormatter(logging.Formatter):
    """A record as one JSON object: time, level, logger, and the record's `fields`, or its message and exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end; made once, though a file that may be full asks twice."""
        made: str | None = getattr(record, "line", None)
        if made is not None:
            return made
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
        }
        fields: dict[str, Any] | None = getattr(record, "fields", None)
        if fields is not None:
            line.update(fields)
        else:
            line["message"] = record.getMessage()
        if request_id := getattr(record, "request_id", None):
            line["request_id"] = request_id
        if record.exc_text:
            line["exception"] = record.exc_text
        record.line = made = json.dumps(line)
        return made


def log_into_replica_file() -> None:
    """Leads the tree's lines into the log file of the Ray Serve replica that this process is, each as it is.

    Ray would write them by its own format around ours, or, since they are not its own loggers', drop them.
    """
    tree = logging.getLogger(TREE)
    tree.setLevel(logging.INFO)
    tree.propagate = False
    handler = _replica_file() or logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(JsonFormatter())
    tree.handlers = [handler]
    for name in _FOREIGN:
        _mask(logging.getLogger(name))


def _replica_file() -> logging.Handler | None:
    """What Ray writes the replica's log file by; it turns to a new file where one is full."""
    for handler in logging.getLogger("ray.serve").handlers:
        target = getattr(handler, "target", handler)
        if isinstance(target, logging.FileHandler):
            return target
    return None


def _mask(found: logging.Logger) -> None:
    if not any(isinstance(each, MaskingFilter) for each in found.filters):
        found.addFilter(MaskingFilter())


def _told(error: BaseException, said: str) -> Iterator[str]:
    """The lines of the traceback, the first cause first, without anything of what was said."""
    chain: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in chain:
        chain.append(each)
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
    for each in reversed(chain):
        yield "Traceback (most recent call last):"
        yield from "".join(traceback.format_tb(each.__traceback__)).splitlines()
        yield f"{type(each).__module__}.{type(each).__qualname__}: {_message(each, said)}"


def _message(error: BaseException, said: str) -> str:
    try:
        whole = str(error)
    except Exception:
        return "(a message that cannot be read)"
    masked = _masked(whole[:_READ])
    if len(whole) > _READ:  # What is cut in two there might not be known any more for what it is.
        masked = masked[:-REACH]
    told = _WORD.sub(lambda word: "_" if word[0] in said else word[0], masked)
    return told if len(told) <= _LONGEST else f"{told[:_LONGEST]}..."


def _masked(text: str) -> str:
    return _redactor_of_all().redactor.redact(text).text


@functools.cache
def _redactor_of_all() -> RedactionSettings:
    return RedactionSettings()
