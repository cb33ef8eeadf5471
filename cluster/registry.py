"""The registry: named models, their numbered versions, and the aliases that point at them.

    <store>/registry/<name>/versions/<number>.json   a version: written once, never changed
    <store>/registry/<name>/aliases.json             what each alias points at, and every change there was

A version points at finished artifacts of the store and holds the SHA-256 of every file that is loaded from them. Who
writes holds a claim on the model (`cluster.claim`), so two processes get different numbers and no change is lost. Who
reads needs none: files appear whole.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

from upath import UPath

from cluster.claim import claimed
from cluster.store import STORAGE_ERRORS, Store, is_local, sentence_of, telling_storage_errors, write_new, write_whole
from cluster.versions import (
    Aliases,
    Change,
    Content,
    Document,
    Reference,
    RegistryError,
    UnreachableError,
    Version,
    check_alias,
    check_name,
    is_name,
)

REGISTRY = "registry"
STABLE = "stable"
"""The alias that is served where no other is named."""

_VERSION_FILE = re.compile(r"([1-9][0-9]*)\.json")

Found = TypeVar("Found", bound=Document)


@dataclass(frozen=True)
class Registry:
    """The models that are registered in a store."""

    store: Store
    tell: Callable[[str], None] = print
    """Told when another process that writes is waited for."""

    def names(self) -> list[str]:
        """Of all models, in alphabetical order."""
        found = sorted(name for name in _listed(self.store.root / REGISTRY) if is_name(name))
        return [name for name in found if self.numbers(name)]

    def numbers(self, name: str) -> list[int]:
        """Of a model's versions, ascending; none where there is no such model."""
        check_name(name)
        found = [_VERSION_FILE.fullmatch(file) for file in _listed(self.folder(name) / "versions")]
        return sorted(int(each[1]) for each in found if each)

    def versions(self, name: str) -> list[Version]:
        """A model's versions, ascending.

        Raises:
            RegistryError: there is no such model, or a file is damaged.
        """
        return [self.version(name, number) for number in self._known(name)]

    def version(self, name: str, number: int) -> Version:
        """One version.

        Raises:
            RegistryError: there is no such model or version, or its file is damaged.
        """
        check_name(name)
        path = self._version_file(name, number)
        found = read_document(path, Version)
        if found is None:
            known = ", ".join(map(str, self._known(name)))
            raise RegistryError(f"{name} has no version {number} in {self.store.root}; it has {known}.")
        if (found.name, found.number) != (name, number):
            raise RegistryError(f"{path} is damaged: it says that it is {found}; restore it from a copy.")
        return found

    def aliases(self, name: str) -> Aliases:
        """A model's aliases; none where there is no such model.

        Raises:
            RegistryError: their file is damaged.
        """
        check_name(name)
        return read_document(self._aliases_file(name), Aliases) or Aliases()

    def number(self, name: str, alias: str) -> int:
        """The version that an alias points at; reads one small file.

        Raises:
            RegistryError: there is no such model or alias, or their file is damaged.
        """
        check_alias(alias)
        pointed = self.aliases(name).aliases
        if alias not in pointed:
            known = ", ".join(map(str, self._known(name)))
            others = f"its aliases are {', '.join(sorted(pointed))}" if pointed else "it has no aliases"
            raise RegistryError(
                f"{name} has no alias {alias} in {self.store.root}; {others}, its versions {known}; "
                f"`shoal models alias {name} {alias} NUMBER` makes it."
            )
        return pointed[alias]

    def resolve(self, reference: Reference) -> Version:
        """The version that is meant; of a name alone, the stable one.

        Raises:
            RegistryError: there is no such model, alias or version, or a file is damaged.
        """
        number = reference.number or self.number(reference.name, reference.alias or STABLE)
        return self.version(reference.name, number)

    def register(self, name: str, content: Content, note: str = "") -> tuple[Version, bool]:
        """Makes `content` the model's next version; whether it is a new one.

        What is registered already (the same artifacts with the same files) stays the version that it is.

        Raises:
            RegistryError: the name cannot be one, or a file of the registry is damaged.
            ClusterError: nothing can be written to the store.
        """
        check_name(name)
        with self.held(name):
            while True:
                versions = [self.version(name, number) for number in self.numbers(name)]
                for known in versions:
                    if (known.artifacts, known.sha256) == (content.artifacts, content.sha256):
                        return known, False
                number = versions[-1].number + 1 if versions else 1
                version = Version(**dict(content), name=name, number=number, note=note, created=now())
                if write_new(self._version_file(name, number), text_of(version)):
                    return version, True

    def set_alias(
        self, name: str, alias: str, number: int, reason: str = "", *, only_new: bool = False
    ) -> Change | None:
        """Points an alias at a version; with `only_new`, only where there is no such alias. None: nothing changed.

        Raises:
            RegistryError: the alias cannot be one, there is no such model or version, or a file is damaged.
            ClusterError: nothing can be written to the store.
        """
        check_alias(alias)
        self.version(name, number)
        with self.held(name):
            found = self.aliases(name)
            before = found.aliases.get(alias)
            if before == number or (only_new and before is not None):
                return None
            return self._change(name, found, alias, number, reason)

    def remove_alias(self, name: str, alias: str, reason: str = "") -> Change:
        """Removes an alias; the version that it pointed at stays.

        Raises:
            RegistryError: there is no such model or alias, or a file is damaged.
            ClusterError: nothing can be written to the store.
        """
        self._known(name)
        with self.held(name):
            self.number(name, alias)
            return self._change(name, self.aliases(name), alias, None, reason)

    def _change(self, name: str, found: Aliases, alias: str, to: int | None, reason: str) -> Change:
        change = Change(time=now(), alias=alias, before=found.aliases.get(alias), to=to, reason=reason)
        pointed = {**found.aliases, alias: to}
        kept = {each: number for each, number in sorted(pointed.items()) if number is not None}
        write_whole(self._aliases_file(name), text_of(Aliases(aliases=kept, history=[*found.history, change])))
        return change

    @contextlib.contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Keeps others from writing about the model while the block runs."""
        folder = self.folder(name)
        with telling_storage_errors(str(folder)), claimed(folder, self.tell):
            if is_local(folder):
                (folder / "versions").mkdir(parents=True, exist_ok=True)
            yield

    def _known(self, name: str) -> list[int]:
        """The numbers of a model that there is."""
        if numbers := self.numbers(name):
            return numbers
        known = f"it has {', '.join(self.names())}" if self.names() else "none is registered there"
        raise RegistryError(
            f"{self.store.root} has no model {name}; {known}; `shoal models register RECIPE` registers one."
        )

    def folder(self, name: str) -> UPath:
        """Where all about a model is."""
        return self.store.root / REGISTRY / name

    def _version_file(self, name: str, number: int) -> UPath:
        return self.folder(name) / "versions" / f"{number}.json"

    def _aliases_file(self, name: str) -> UPath:
        return self.folder(name) / "aliases.json"


def _listed(folder: UPath) -> list[str]:
    """The names in a folder as they are now; none where there is no folder."""
    try:
        folder.fs.invalidate_cache()
        return [entry.name for entry in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except STORAGE_ERRORS as error:
        raise _unreadable(folder, error) from error


def read_document(path: UPath, kind: type[Found]) -> Found | None:
    """A file of the registry, or None where there is none.

    Raises:
        RegistryError: it is damaged, or cannot be read.
    """
    try:
        text = path.fs.cat_file(path.path)  # Not by the path: it may remember how large the file was.
    except (FileNotFoundError, NotADirectoryError):
        return None
    except STORAGE_ERRORS as error:
        raise _unreadable(path, error) from error
    try:
        return kind.model_validate(json.loads(text))
    except ValueError as error:
        what = {Aliases: "a model's aliases", Version: "a version"}.get(kind, f"a rollout's {kind.__name__.lower()}")
        raise RegistryError(f"{path} is damaged: it is no record of {what}; restore it from a copy.") from error


def _unreadable(path: UPath, error: BaseException) -> UnreachableError:
    return UnreachableError(f"{path} cannot be read: {sentence_of(error)}.")


def text_of(document: Document) -> str:
    """The document as its file holds it."""
    return json.dumps(document.model_dump(by_alias=True), indent=2, ensure_ascii=False)


def now() -> str:
    """The time, as the registry's files have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
