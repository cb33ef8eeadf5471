"""The other models of an endpoint (`serve.models`): what answers at each path, and following their aliases."""

from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.registry import Registry
from cluster.store import STORAGE_ERRORS, ClusterError, sentence_of
from cluster.versions import Reference
from models.settings import InputError
from serve.model import ServedModel
from serve.registered import served_model
from serve.settings import ServeSettings


@dataclass
class Others:
    """What `serve.models` names; `look` is called again and again."""

    registry: Registry
    settings: ServeSettings
    _served: dict[str, ServedModel] = field(default_factory=dict, init=False)
    _told: str = field(default="", init=False)

    def served(self) -> dict[str, ServedModel]:
        """By name in the path, what answers there now.

        Raises:
            InputError: one cannot be served.
            ClusterError: there is no such model, alias or version.
        """
        self._served = {name: self._model(name, reference) for name, reference in self.settings.models.items()}
        return self._served

    def look(self, turn: Callable[[dict[str, ServedModel]], object], tell: Callable[[str], None]) -> None:
        """Sees whether an alias has moved, and lets `turn` make the new versions answer; a trouble is told once."""
        before = self._served
        try:
            if (found := self.served()) != before:
                turn(found)
                for name, model in found.items():
                    if model != before.get(name):
                        tell(f"{model.identity} answers at /models/{name} now.")
            self._told = ""
        except (InputError, ClusterError, *STORAGE_ERRORS) as error:
            self._served = before
            sentence = f"{sentence_of(error)}. What answers at /models stays as it is."
            if sentence != self._told:
                self._told = sentence
                tell(sentence)

    def _model(self, name: str, text: str) -> ServedModel:
        try:
            version = self.registry.resolve(Reference.parse(text))
        except ClusterError as error:
            raise ClusterError(f"serve.models.{name}: {error}") from error
        before = self._served.get(name)
        if before is not None and before.identity == str(version):
            return before
        model = served_model(version, self.registry.store, self.settings)
        model.check(self.settings)
        return model
