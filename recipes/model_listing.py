"""Showing what is registered: a line for each version, or all there is to know about one."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from cluster.registry import Registry
from cluster.versions import Ancestor, Version
from recipes.listing import headline
from recipes.printing import plain_table


def versions_table(registry: Registry, names: Sequence[str]) -> Table:
    """The versions of these models, ascending, each with the aliases that point at it."""
    rows = []
    for name in names:
        aliases = registry.aliases(name)
        for version in registry.versions(name):
            pointing = ", ".join(aliases.of(version.number))
            made = version.created[:16].replace("T", " ")
            rows.append((str(version), pointing, made, headline(version.metrics), version.note))
    return plain_table(rows, ("version", "aliases", "registered", "metrics", "note"))


def print_version(version: Version, registry: Registry, console: Console) -> None:
    """Prints a version: what it is, its metrics, files and origin, and the changes of the model's aliases."""
    aliases, store = registry.aliases(version.name), registry.store
    facts = {
        "aliases": ", ".join(aliases.of(version.number)) or "none",
        "recipe": version.recipe,
        "registered": version.created,
        "note": version.note,
        "metrics": headline(version.metrics),
        "classifier": str(store.root / version.torch),
        "export": str(store.root / version.onnx) if version.onnx else version.refused or "none",
    }
    console.print(Text(str(version), "bold"))
    for name, value in facts.items():
        if value:
            console.print(Text(f"  {name:12}{value}"), soft_wrap=True)
    console.print("[bold]files (SHA-256)[/bold]")
    for path, sha in version.sha256.items():
        console.print(Text(f"  {sha}  {path}"), soft_wrap=True)
    console.print("[bold]made from[/bold]")
    for stage, fingerprint in version.artifacts.items():
        there = "" if store.find(stage, fingerprint) else "  (no longer in the store)"
        tree = Tree(Text(f"{stage} {fingerprint}{there}"))
        _grow(tree, version.lineage.get(stage), version.lineage)
        console.print(tree)
    if aliases.history:
        console.print("[bold]changes of aliases[/bold]")
        shown = [
            (each.time, each.alias, str(each.before or "-"), str(each.to or "-"), each.reason)
            for each in aliases.history
        ]
        console.print(plain_table(shown, ("time", "alias", "from", "to", "reason")))


def _grow(tree: Tree, ancestor: Ancestor | None, lineage: Mapping[str, Ancestor]) -> None:
    for name, identity in ancestor.inputs.items() if ancestor else ():
        branch = tree.add(Text(f"{name} {identity}"))
        known = lineage.get(name)
        _grow(branch, known if known and known.fingerprint == identity else None, lineage)
