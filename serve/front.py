"""The front of a replica: it hands each request to whoever is to answer, as the table says (`serve.traffic`).

Nearly always that is the gateway of the version that this replica holds. When the table names another version, the
front loads it beside the former, hands new requests to it from one moment to the next, and lets the former finish what
it has: no request fails, waits for loading, or is answered by half of a model. During a rollout a share of the requests
goes to the candidate's replicas (`serve.versions`), or a copy of them, to be compared.
"""

import asyncio
import json
import random
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from serve.access import MODELS, PAGE
from serve.forwarding import SHADOW_HEADER, Asked, Reply, asked_of, body_of, replaying
from serve.loaded import Loaded, free_dropped
from serve.logs import logger
from serve.problems import ProblemError
from serve.requests import known_record, record_of
from serve.scaling import REQUESTS
from serve.shedding import SHARED_PATHS
from serve.traffic import LOOK_S, Board, Report, Reports, Table, read_table

Ask = Callable[[str, Asked], Awaitable[Reply]]
"""Asks the replicas that hold other versions: `NAME:NUMBER` and the request."""

_OF_OTHERS = SHARED_PATHS | {"/v1/explain", "/v1/model", "/info"}
_ALIKE = frozenset({"/health", "/healthz", "/openapi.json"})
"""What is the same of every model, so that nobody has to load one for it; so are the files of the page."""
_CANDIDATE_S, _SHADOW_S, _OTHER_S = 5.0, 60.0, 120.0
"""Seconds that a candidate has to answer a client, a candidate to answer for comparison, and another model."""
_SHADOWS = 16
"""Copies for the candidate that are under way at most; beyond them requests are not compared."""

_log = logger("front")


class Front:
    """ASGI application of one replica.

    Args:
        table: what is to be followed first.
        loaded: the version that it names.
        load: loads the version that a later table names.
        ask: asks the replicas that hold other versions.
    """

    def __init__(self, table: Table, loaded: Loaded, load: Callable[[Table], Loaded], ask: Ask) -> None:
        self.board = Board(table)
        self.loaded = loaded
        self._load = load
        self._ask = ask
        self._refusal: Report | None = None
        self._handed_on = 0
        self._shadows: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        path = scope.get("path", "")
        table = self.board.table
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif path.startswith(MODELS):
            await self._other(table, scope, receive, send)
        elif table.candidate is None or scope.get("method") != "POST" or path not in SHARED_PATHS:
            await self.loaded.gateway(scope, receive, send)
        else:
            await self._shared(table, scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        """From the replica's first moment to its last, which Ray tells in ASGI's way."""
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await asyncio.to_thread(self.loaded.close)
        await send({"type": "lifespan.shutdown.complete"})

    async def _other(self, table: Table, scope: Scope, receive: Receive, send: Send) -> None:
        """A request to another model, by its name in the path."""
        name, slash, rest = scope["path"].removeprefix(MODELS).partition("/")
        path = f"/{rest}" if slash else "/v1/model"
        identity = table.others.get(name)
        read = scope["method"] in ("GET", "HEAD")
        if identity and read and (path in _ALIKE or path == "/" or path.startswith(PAGE)):
            await self.loaded.gateway({**scope, "path": path, "raw_path": path.encode()}, receive, send)
            return
        body = await body_of(receive)
        if body is None:
            return
        if identity is None or path not in _OF_OTHERS:
            sentence = f"There is nothing at {scope['path'][:80]}; serve.models names the other models of an endpoint."
            reply = _problem(ProblemError(404, sentence), scope)
        else:
            try:
                self._handed_on += not read
                reply = await asyncio.wait_for(self._ask(identity, asked_of(scope, body, path)), _OTHER_S)
                _note(scope, identity)
            except Exception:  # whatever became of the other process, the client can only try again
                _log.warning("%s does not answer", identity, exc_info=True)
                reply = _problem(ProblemError(503, f"{name} does not answer; try again.", {"Retry-After": "1"}), scope)
        await reply.send(send)

    async def _shared(self, table: Table, scope: Scope, receive: Receive, send: Send) -> None:
        """A request during a rollout."""
        candidate, started = table.candidate, time.perf_counter()
        assert candidate is not None
        body = await body_of(receive)
        if body is None:
            return
        asked = asked_of(scope, body)
        on_trial = random.random() < candidate.share
        if on_trial:
            self._handed_on += 1
            reply = await self._candidate(candidate.id, asked, _CANDIDATE_S)
            if reply is not None and reply.status == 200:
                self.board.answered(table.revision, "candidate", started)
                _note(scope, candidate.id)
                await reply.send(send)
                return
            started = time.perf_counter()
        answer = await self._stable(scope, body, receive, send)
        if on_trial:
            # What neither can answer is the client's mistake, and too few replicas are no fault of the candidate.
            if answer.status == 200 and not (reply is not None and reply.status == 429):
                self.board.answered(table.revision, "candidate", started, failed=True)
            return
        self.board.answered(table.revision, "stable", started, failed=answer.status >= 500)
        if candidate.shadow and answer.status == 200 and len(self._shadows) < _SHADOWS:
            copy = replace(asked, headers=(*asked.headers, (SHADOW_HEADER, b"1")))
            task = asyncio.create_task(self._compare(table, candidate.id, copy, answer.body))
            self._shadows.add(task)
            task.add_done_callback(self._shadows.discard)

    async def _stable(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> Reply:
        """Lets the version of this replica answer the client; gives what it answered."""
        status, parts = 500, list[bytes]()

        async def copied(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                parts.append(message.get("body", b""))
            await send(message)

        await self.loaded.gateway(scope, replaying(body, receive), copied)
        return Reply(status, (), b"".join(parts))

    async def _candidate(self, identity: str, asked: Asked, seconds: float) -> Reply | None:
        try:
            return await asyncio.wait_for(self._ask(identity, asked), seconds)
        except Exception:  # a rollout's gates count it, and the client gets the other version's answer
            _log.warning("the candidate %s does not answer", identity, exc_info=True)
            return None

    async def _compare(self, table: Table, identity: str, asked: Asked, answer: bytes) -> None:
        """Asks the candidate what was answered already, and counts what both say."""
        started = time.perf_counter()
        reply = await self._candidate(identity, asked, _SHADOW_S)
        failed = reply is None or reply.status != 200
        if reply is not None and reply.status == 429:
            return
        self.board.answered(table.revision, "candidate", started, failed=failed)
        if reply is not None and reply.status == 200:
            ours, theirs = labels_of(answer), labels_of(reply.body)
            self.board.compared(table.revision, sum(map(_same, ours, theirs)), len(ours))

    def load(self) -> dict[str, float]:
        """What there was to do since the last call, for autoscaling: what others answer is a request here too."""
        handed_on, self._handed_on = self._handed_on, 0
        load = self.loaded.load()
        return {**load, REQUESTS: load[REQUESTS] + handed_on}

    def follow(self, reports: Reports) -> None:
        """Looks at the table again and again, in a thread that ends with the process, and tells what it has done."""
        threading.Thread(target=self._follow, args=(reports,), name="traffic", daemon=True).start()

    def _follow(self, reports: Reports) -> None:
        while True:
            try:
                self.look(read_table())
                reports.put(self.report())
            except Exception:  # the head may be away for a while; the next round tries again
                _log.warning("cannot look at the table of who answers what", exc_info=True)
            time.sleep(LOOK_S)

    def look(self, table: Table | None) -> None:
        """Turns to a table if it is a new one; one that cannot be followed is told and not tried again."""
        refused = self._refusal.refused if self._refusal else -1
        if table is None or table.revision in (self.board.table.revision, refused):
            return
        if table.model != self.board.table.model:
            try:
                former, self.loaded = self.loaded, self._load(table)
                former.close()
                del former
                free_dropped()
            except Exception as error:
                _log.exception("%s cannot be loaded", table.served.name)
                self._refusal = Report(
                    revision=self.board.table.revision, trouble=" ".join(str(error).split()), refused=table.revision
                )
                return
        self._refusal = None
        self.board.turn_to(table)

    def report(self) -> Report:
        """What there is to tell."""
        report = self.board.report()
        if self._refusal:
            report.trouble, report.refused = self._refusal.trouble, self._refusal.refused
        return report


def labels_of(body: bytes) -> list[Any]:
    """The labels of an answer in any of the endpoint's shapes: of each text and label column, in order."""
    answer = json.loads(body)
    if isinstance(answer, dict):
        return [said["label"] for result in answer["results"] for said in result["labels"].values()]
    lists = answer if answer and isinstance(answer[0], list) else [answer]
    return [scores[0]["label"] for scores in lists if scores]


def _note(scope: Scope, identity: str) -> None:
    """For the request's line in the log: another process has answered."""
    if record := known_record(scope):
        record.model, record.version = identity.rsplit(":", 1)


def _same(one: Any, other: Any) -> bool:
    return sorted(one) == sorted(other) if isinstance(one, list) and isinstance(other, list) else bool(one == other)


def _problem(error: ProblemError, scope: Scope) -> Reply:
    response = error.response(record_of(scope).id)
    return Reply(response.status_code, tuple(response.raw_headers), bytes(response.body))
