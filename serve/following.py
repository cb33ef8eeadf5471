"""Following an alias: when it points at another version, that one is served in place of the former.

What is asked is a number in a small file, every few seconds; all else happens only when it has changed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.store import STORAGE_ERRORS, ClusterError, sentence_of
from models.settings import InputError
from serve.model import ServedModel

_TROUBLE = (InputError, ClusterError, *STORAGE_ERRORS)


@dataclass
class Follower:
    """Serves what an alias points at; `look` is called again and again.

    A version that cannot be served leaves the former one in its place, and is not tried again until the alias has
    pointed at another one. What is only out of reach is looked for at the next look.
    """

    number: int
    """The version that is served."""
    model: ServedModel
    """What is served of it."""
    pointed: Callable[[], int]
    """The version that the alias points at now; raises ClusterError where that cannot be told."""
    found: Callable[[int], ServedModel]
    """What a version serves; raises InputError where that cannot work, ClusterError where it cannot be told."""
    serve: Callable[[ServedModel], object]
    """Puts a model in the place of the one that is served; raises InputError or ClusterError if it does not start."""
    tell: Callable[[str], None]
    _refused: int | None = field(default=None, init=False)
    _told: str = field(default="", init=False)
    _down: bool = field(default=False, init=False)
    """Whether the former version must be served again, after a new one that did not start."""

    def look(self) -> None:
        """Sees whether the alias has moved, and follows it."""
        try:
            self._follow(self.pointed())
        except (ClusterError, *STORAGE_ERRORS) as error:
            serving = "" if self._down else f"; {self._name(self.number)} keeps serving"
            self._tell_once(f"{sentence_of(error)}{serving}.")
        if self._down:
            self._restore()

    def _follow(self, wanted: int) -> None:
        former = self._name(self.number)
        if wanted in (self.number, self._refused):
            self._refused = None if wanted == self.number else wanted
            self._told = self._told if self._down else ""
            return
        try:
            model = self.found(wanted)
        except InputError as error:
            self._refused = wanted
            self.tell(f"{self._name(wanted)} cannot be served: {sentence_of(error)}; {former} keeps serving.")
            return
        self.tell(f"{self._name(wanted)} takes the place of {former} ...")
        try:
            self.serve(model)
        except _TROUBLE as error:
            self._refused, self._down = wanted, True
            self.tell(f"{self._name(wanted)} does not start: {sentence_of(error)}; {former} is served again.")
            return
        self._served(wanted, model)

    def take(self, wanted: int) -> None:
        """Serves a version now, before the alias points at it.

        Raises:
            InputError, ClusterError: it cannot be served; the former one is.
        """
        if wanted != self.number:
            model = self.found(wanted)
            self.serve(model)
            self._served(wanted, model)

    def _served(self, number: int, model: ServedModel) -> None:
        self.number, self.model, self._refused, self._down = number, model, None, False
        self.tell(f"{self._name(number)} is served.")

    def _restore(self) -> None:
        """Serves the former version again, of whose replicas some may have gone for the new one's."""
        try:
            self.serve(self.model)
            self._down = False
        except _TROUBLE as error:
            self._tell_once(f"{self._name(self.number)} does not start: {sentence_of(error)}; it is tried again.")

    def _name(self, number: int) -> str:
        return f"{self.model.name}:{number}"

    def _tell_once(self, sentence: str) -> None:
        if sentence != self._told:
            self._told = sentence
            self.tell(sentence)
