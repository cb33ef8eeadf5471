"""What a registered version is, what aliases are, and how users name them: plain data, as it is in the store."""

import re
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from cluster.store import ClusterError

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


class RegistryError(ClusterError):
    """What is asked of the registry is not there, or one of its files is damaged: one sentence."""


class UnreachableError(RegistryError):
    """A file of the registry cannot be read at the moment: it says nothing of what is in it."""


class Document(BaseModel):
    """A file of the registry, or a part of one."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Ancestor(Document):
    """An artifact that a version comes from."""

    fingerprint: str
    inputs: dict[str, str]


class Content(Document):
    """What a version points at. Paths are relative to the store."""

    artifacts: dict[str, str]
    """The fingerprints of what it is made of, by stage: finetune, evaluate and, where there is one, export."""
    torch: str
    """The folder of the classifier in torch."""
    onnx: str | None = None
    """The folder of its export; None where there is none that holds."""
    refused: str = ""
    """Why there is no export."""
    evaluated: str
    """The folder of its evaluation: temperatures, abstention, what texts and answers looked like."""
    sha256: dict[str, str]
    """Of every file that is loaded, by path."""
    metrics: dict[str, float | str]
    """The few that tell versions apart."""
    lineage: dict[str, Ancestor]
    """All that it comes from, by stage or role, as far as the store had it."""
    recipe: str = ""

    def below(self, folder: str) -> dict[str, str]:
        """The digests of the files in one of the folders, by path relative to it."""
        return {path[len(folder) + 1 :]: sha for path, sha in self.sha256.items() if path.startswith(f"{folder}/")}


class Version(Content):
    """One version of a model."""

    name: str
    number: int = Field(ge=1)
    note: str = ""
    created: str

    def __str__(self) -> str:
        """As users name it."""
        return f"{self.name}:{self.number}"


class Change(Document):
    """One change of an alias."""

    time: str
    alias: str
    before: int | None = Field(alias="from")
    """The version it pointed at; None where there was no such alias."""
    to: int | None
    """The version it points at since; None where it was removed."""
    reason: str = ""


class Aliases(Document):
    """A model's aliases: the version of each, and all changes, oldest first."""

    aliases: dict[str, int] = {}
    history: list[Change] = []

    def of(self, number: int) -> list[str]:
        """The aliases that point at a version."""
        return sorted(alias for alias, pointed in self.aliases.items() if pointed == number)


@dataclass(frozen=True)
class Reference:
    """A version as a user names it: `NAME`, `NAME@ALIAS` or `NAME:NUMBER`."""

    name: str
    alias: str | None = None
    number: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """Reads a reference.

        Raises:
            RegistryError: it has another form.
        """
        name, sign, rest = text.partition("@" if "@" in text else ":")
        check_name(name)
        if sign == "@":
            check_alias(rest)
            return cls(name, alias=rest)
        if sign == ":":
            if not re.fullmatch("[1-9][0-9]*", rest, re.ASCII):
                raise RegistryError(f"{text!r} names no version: after the colon stands a number, as in {name}:3.")
            return cls(name, number=int(rest))
        return cls(name)


def is_name(text: str) -> bool:
    """Whether a model or an alias may be called so; a recipe's `name` has the same form."""
    return _NAME.fullmatch(text) is not None


def check_name(name: str) -> None:
    """Raises RegistryError if a model cannot be called so."""
    if not is_name(name):
        raise RegistryError(f"{name!r} cannot name a model: lower case, digits, - and _, beginning with no sign.")


def check_alias(alias: str) -> None:
    """Raises RegistryError if an alias cannot be called so."""
    if not is_name(alias) or alias.isdigit():
        raise RegistryError(
            f"{alias!r} cannot be an alias: lower case, digits, - and _, beginning with no sign; not a number."
        )
