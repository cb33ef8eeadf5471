"""Whose the endpoint is, where processes of a cluster serve one after another: the last one's.

A process claims the endpoint before it turns it to its own model, and owns it once its replicas answer. Until then its
predecessor leaves it alone, and has it back if that fails. All stands in the cluster's own key-value store.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal
from uuid import uuid4

from pydantic import BaseModel

from serve.exchange import Exchange

Standing = Literal["ours", "claimed", "another's", "gone"]
"""Of this process: it owns the endpoint, another is about to, another does, or nobody."""

_CLAIM_S = 1800.0
"""Seconds after which a claim counts no more: whoever made it has gone without a word."""

_OURSELVES = uuid4().hex
"""This process."""


class _Page(BaseModel):
    owner: str = ""
    claimed_by: str = ""
    claimed_at: float = 0.0


def _exchange() -> Exchange:
    return Exchange("shoal-endpoint", "owner")


def _read() -> _Page | None:
    text = _exchange().get()
    return None if text is None else _Page.model_validate_json(text)


def _write(page: _Page) -> None:
    _exchange().put(page.model_dump_json())


def standing() -> Standing:
    """How this process stands to the endpoint now."""
    page = _read()
    if page is None:
        return "gone"
    if page.claimed_by not in ("", _OURSELVES) and time.time() - page.claimed_at < _CLAIM_S:
        return "claimed"
    return "ours" if page.owner == _OURSELVES else "another's"


@contextmanager
def claiming() -> Iterator[None]:
    """The endpoint is this process's after the block; where that fails, whose it was before."""
    before = _read() or _Page()
    _write(_Page(owner=before.owner, claimed_by=_OURSELVES, claimed_at=time.time()))
    try:
        yield
    except BaseException:
        if before.owner:
            _write(before)
        else:
            _exchange().remove()
        raise
    _write(_Page(owner=_OURSELVES))


def give_up() -> None:
    """The endpoint is nobody's."""
    _exchange().remove()
