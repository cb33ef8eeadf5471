"""What a rollout does to the live endpoint, over Ray; how it goes on is in `serve.rolling`."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from cluster.registry import Registry
from cluster.store import ClusterError
from models.labels import LabelColumn
from recipes.replaying import Text, read_labelled, replayed
from serve.app import start_versions, stop_versions
from serve.forwarding import Asked, Reply
from serve.gates import Plan, Replayed
from serve.model import ServedModel
from serve.registered import answering_model
from serve.settings import ServeSettings
from serve.traffic import Candidate, Report, Tally, read_table, reports, summed
from serve.turning import turn
from serve.versions import publish_version, version_handle

_HEADERS = ((b"content-type", b"application/json"),)
_AT_ONCE = 16
"""Texts of a request of a replay."""
_PATIENCE_S = 300.0
"""For a version to be loaded and to answer."""


@dataclass
class LiveEndpoint:
    """The endpoint of this process's cluster. `taken` makes a version the one that answers, or raises why not."""

    registry: Registry
    name: str
    settings: ServeSettings
    taken: Callable[[int], None]
    _models: dict[int, ServedModel] = field(default_factory=dict, init=False)
    _told: dict[str, Report] = field(default_factory=dict, init=False)

    def prepare(self, number: int) -> str:
        """Starts replicas for other versions, if there are none, loads the version into one, and names it."""
        model = self._model(number)
        model.check(self.settings)
        model.verify(self.settings)
        start_versions(self.settings, self.registry.store.root)
        self._asked(number, "GET", "/healthz", b"")
        return model.identity

    def turn(self, candidate: Candidate | None) -> None:
        """Lets a candidate have its part of the requests."""
        table = read_table()
        if table is not None and table.candidate != candidate:
            turn(candidate=candidate)
            self._told.clear()

    def tally(self) -> Tally:
        """What came of the requests since."""
        table = read_table()
        # Those of a replica that has gone since count too.
        self._told |= reports()
        return Tally() if table is None else summed(self._told.values(), table.revision)

    def replay(self, number: int, plan: Plan) -> Sequence[Replayed]:
        """What a version answers to labelled texts."""
        assert plan.replay is not None
        about = json.loads(self._asked(number, "GET", "/v1/model", b"").body)
        rows = read_labelled(plan.replay, plan.replay_rows, pair=about["pair"])

        def answer(texts: list[Text]) -> list[dict[str, Any]]:
            reply = self._asked(number, "POST", "/v1/classify", json.dumps({"texts": texts}).encode())
            results: list[dict[str, Any]] = json.loads(reply.body)["results"]
            return results

        columns = [LabelColumn.model_validate(each) for each in about["labels"]]
        return replayed(rows, columns, answer, min(_AT_ONCE, self.settings.max_texts), pair=about["pair"])

    def replace(self, number: int) -> None:
        """Makes a version the one that answers."""
        self.taken(number)

    def clear(self) -> None:
        """Takes the replicas for other versions away, unless other models need them."""
        self._models.clear()
        if not self.settings.models:
            stop_versions()

    def _model(self, number: int) -> ServedModel:
        if number not in self._models:
            version = self.registry.version(self.name, number)
            self._models[number] = answering_model(version, self.registry, self.settings)
            publish_version(self._models[number])
        return self._models[number]

    def _asked(self, number: int, method: str, path: str, body: bytes) -> Reply:
        """A version's answer, its own request; where it is busy, later."""
        identity = self._model(number).identity
        until = time.monotonic() + _PATIENCE_S
        while True:
            try:
                handle = version_handle(identity, own_loop=True)
                left = max(1.0, until - time.monotonic())
                reply: Reply = handle.remote(Asked(method, path, b"", _HEADERS, body)).result(timeout_s=left)
            except (RayError, RayServeException, TimeoutError) as error:
                raise ClusterError(f"{identity} does not answer: {_last_line(error)}.") from error
            if reply.status == 200:
                return reply
            if reply.status != 429 or time.monotonic() > until:
                raise ClusterError(f"{identity} refuses ({reply.status}): {reply.body.decode('utf-8', 'replace')}")
            time.sleep(0.2)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rpartition("Error: ")[2].rstrip(".")
