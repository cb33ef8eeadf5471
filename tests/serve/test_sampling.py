"""Samples: what is kept of requests, where, how much of it, and what happens when the store is away."""

import json
import random
import threading
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError
from upath import UPath

from models.engine import Answer, Prediction
from models.redaction import RedactionSettings
from models.settings import InputError
from models.spec import ClassifierSpec
from models.text import TextSettings
from models.torch_engine import load_torch_engine
from pipelines.preparing.data import DataSettings
from pipelines.preparing.sources import find_sources
from serve import sampling
from serve.names import with_names
from serve.sampling import Sampler, SampleSettings, make_sampler
from serve.settings import ServeSettings
from tests.serve.endpoint import post, raw, running
from tests.serve.test_rates import Clock
from tests.small_classifiers import SENTIMENT, TOPICS, make_classifier

SPEC = ClassifierSpec(labels=(SENTIMENT, TOPICS), max_length=32)
ALL = SampleSettings(share=1, per_minute=10**9)
SAID = Answer(
    {
        "sentiment": Prediction("negative", {"negative": 0.90000049, "neutral": 0.1, "positive": 0.0}),
        "topics": Prediction(["bag", "delay"], {"bag": 0.9, "delay": 0.8, "food": 0.1, "price": 0.1}),
    },
    truncated=False,
    tokens=5,
)


def sampler(store: UPath | Path, settings: SampleSettings = ALL, replica: str = "r1", **more: object) -> Sampler:
    return Sampler(settings, UPath(store), SPEC, ("small", "f00d", replica), **more)  # type: ignore[arg-type]


def offer(to: Sampler, texts: Sequence[str], request_id: str = "id") -> None:
    to.offer(request_id, texts, None, [SAID] * len(texts))


def counts(of: Sampler) -> tuple[int, int]:
    written, dropped = ({each.name: each.value for each in family.samples} for family in of.collect())
    return int(written["shoal_samples_total"]), int(dropped["shoal_samples_dropped_total"])


def files(store: UPath | Path) -> list[UPath]:
    return sorted(UPath(store).rglob("*.jsonl"), key=str)


def rows(store: UPath | Path) -> list[dict[str, object]]:
    return [json.loads(line) for file in files(store) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_row_holds_text_answer_and_where_it_comes_from(tmp_path: Path) -> None:
    one = sampler(tmp_path, redact=RedactionSettings(names=("Zuse",)))
    offer(one, ["I am Zuse,  write to\nanna&#64;example.com", "sp\u00e4t"], "mine")
    one.flush()
    (file,) = files(tmp_path)
    model, date, name = file.relative_to(UPath(tmp_path)).parts[1:]
    assert file.relative_to(UPath(tmp_path)).parts[0] == "samples"
    assert (model, len(date), name.split("-")[0], name[-8:]) == ("small", 10, "r1", "-1.jsonl")
    first, second = rows(tmp_path)
    assert first["text"] == "I am [NAME], write to [EMAIL]"
    assert second["text"] == "sp\u00e4t"
    assert first["predicted_sentiment"] == "negative"
    assert first["predicted_topics"] == ["bag", "delay"]
    assert first["probabilities_sentiment"] == {"negative": 0.9, "neutral": 0.1, "positive": 0.0}
    assert (first["model"], first["version"], first["request_id"]) == ("small", "f00d", "mine")
    assert str(first["time"]).startswith(date[:2])
    answered = {f"{what}_{name}" for what in ("predicted", "probabilities") for name in ("sentiment", "topics")}
    assert set(first) == {"text", "model", "version", "time", "request_id"} | answered


def test_partners_are_masked_too(tmp_path: Path) -> None:
    one = Sampler(ALL, UPath(tmp_path), SPEC.model_copy(update={"pair": True}), ("small", "f00d", "r1"))
    one.offer("id", ["late"], ["a@example.com"], [SAID])
    one.flush()
    (row,) = rows(tmp_path)
    assert (row["text"], row["pair"]) == ("late", "[EMAIL]")


def test_texts_are_masked_as_the_classifiers_are(tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"text": TextSettings(redact=RedactionSettings(names=("Zuse",)), repair=False)})
    one = Sampler(ALL, UPath(tmp_path), spec, ("small", "f00d", "r1"))
    offer(one, ["Zuse: a&#64;example.com"])
    one.flush()
    assert rows(tmp_path)[0]["text"] == "[NAME]: [EMAIL]"


def test_a_recipe_reads_samples_once_they_are_labelled(tmp_path: Path) -> None:
    one = sampler(tmp_path)
    offer(one, ["late", "good"])
    one.flush()
    labels = ({"column": "sentiment"},)
    data = DataSettings(source=f"{tmp_path}/samples/small/*/*.jsonl", text="text", labels=labels)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no column 'sentiment'"):
        find_sources(data, UPath(tmp_path / "fetched"))
    (file,) = files(tmp_path)
    file.write_text("".join(json.dumps(row | {"sentiment": "negative"}) + "\n" for row in rows(tmp_path)))
    (source,) = find_sources(data, UPath(tmp_path / "fetched"))
    assert {"text", "sentiment"} <= set(source.columns)


def test_requests_are_chosen_by_chance(tmp_path: Path) -> None:
    one = sampler(tmp_path, SampleSettings(share=0.1, per_minute=10**9), draw=random.Random(1).random)
    for number in range(2000):
        offer(one, ["late"] * (1 + number % 2), str(number))
    one.flush()
    kept = [int(str(row["request_id"])) for row in rows(tmp_path)]
    assert 150 < len(set(kept)) < 250
    assert len(kept) == sum(1 + number % 2 for number in set(kept))
    assert counts(one) == (len(kept), 0)
    assert abs(sum(set(kept)) / len(set(kept)) - 1000) < 170


def test_a_minute_has_a_bound(tmp_path: Path) -> None:
    clock = Clock()
    clock.now = 100.0
    one = sampler(tmp_path, SampleSettings(share=1, per_minute=2), clock=clock)
    for _ in range(3):
        offer(one, ["late", "good"])
    clock.now += 60
    offer(one, ["late"])
    one.flush()
    assert counts(one) == (5, 2)


def test_a_store_that_is_away_fails_and_slows_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = tmp_path / "store"
    store.write_text("a file where a folder should be")
    engine = load_torch_engine(make_classifier(tmp_path / "model"), precision="fp32")
    one = sampler(store)
    with running(engine, ServeSettings(), sampler=one) as url:
        for _ in range(3):
            assert raw(url, post(b'{"texts": ["late", "good"]}'))[0] == 200
            one.flush()
        assert counts(one) == (0, 0)
        assert caplog.text.count("it is tried again") == 1
        store.unlink()
        one.flush()
        assert b"shoal_samples_total" in raw(url, b"GET /metrics HTTP/1.1\r\nHost: shoal\r\n\r\n")[2]
    assert counts(one) == (6, 0) == (len(rows(store)), 0)
    assert len(files(store)) == 2  # the first try was of two rows


def test_what_finds_no_room_is_counted(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.write_text("away")
    one = sampler(store)
    with patch.object(sampling, "_MOST_ROWS", 3), patch.object(sampling, "_MOST_CHARACTERS", 20):
        offer(one, ["late", "late"])
        offer(one, ["late", "late"])
        offer(one, ["l" * 13])
        assert counts(one) == (0, 3)
        one.close()
    assert counts(one) == (0, 5)
    offer(one, ["late"])
    assert counts(one) == (0, 6)


def test_replicas_write_files_of_their_own(tmp_path: Path) -> None:
    both = [sampler(tmp_path, replica=name) for name in ("r1", "r2")]
    for _ in range(2):
        for one in both:
            offer(one, ["late"])
            one.flush()
    assert len(files(tmp_path)) == len({file.name for file in files(tmp_path)}) == 4
    assert len(rows(tmp_path)) == 4


def test_samples_go_to_an_object_store(bucket: str) -> None:
    one = sampler(UPath(f"{bucket}/x"))
    offer(one, ["write to a@example.com"])
    one.flush()
    assert [row["text"] for row in rows(UPath(f"{bucket}/x"))] == ["write to [EMAIL]"]


def test_the_thread_writes_full_files_at_once_and_the_rest_at_the_end(tmp_path: Path) -> None:
    written = threading.Event()

    def write(path: UPath, text: str) -> None:
        path.write_text(text)
        written.set()

    with patch.object(sampling, "FILE_ROWS", 4), patch.object(sampling, "write_whole", write):
        one = sampler(tmp_path)
        one.start()
        offer(one, ["late"] * 5)
        assert written.wait(10)
        offer(one, ["good"] * 2)
        one.close()
    assert not one._thread or not one._thread.is_alive()
    assert counts(one) == (7, 0) == (len(rows(tmp_path)), 0)


def test_the_end_does_not_wait_for_ever(tmp_path: Path) -> None:
    let = threading.Event()

    def write(path: UPath, text: str) -> None:
        let.wait(10)

    with patch.object(sampling, "_CLOSE_S", 0.05), patch.object(sampling, "write_whole", write):
        one = sampler(tmp_path)
        one.start()
        offer(one, ["late"] * 3)
        one.close()
        assert counts(one) == (0, 3)
        let.set()
        assert one._thread
        one._thread.join(10)
    assert counts(one) == (0, 3)


@hypothesis_settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.sampled_from(["offer", "flush", "away", "back", "spoilt"]), st.integers(1, 7)), max_size=40),
    st.booleans(),
)
def test_every_row_is_written_or_dropped(steps: list[tuple[str, int]], ends_away: bool) -> None:
    files: dict[str, str] = {}
    away, offered = False, 0

    def write(path: UPath, text: str) -> None:
        if away:
            raise OSError("away")
        files[path.path] = text

    with (
        patch.object(sampling, "write_whole", write),
        patch.object(sampling, "_MOST_ROWS", 20),
        patch.object(sampling, "FILE_ROWS", 3),
    ):
        one = sampler(UPath("memory://store"), SampleSettings(share=1, per_minute=6))
        for step, count in steps:
            match step:
                case "offer":
                    offer(one, ["late"] * count)
                    offered += count
                case "spoilt":  # its answers are not as many as its texts
                    one.offer("id", ["late"] * count, None, [])
                    offered += count
                case "flush":
                    one.flush()
                case _:
                    away = step == "away"
            assert sum(counts(one)) + one._rows == offered
            assert 0 <= one._rows <= 20
        away = ends_away
        one.close()
    written, dropped = counts(one)
    assert written + dropped == offered
    assert sum(text.count("\n") for text in files.values()) == written
    assert one._characters == 0


def test_samples_need_a_store_and_masking(tmp_path: Path) -> None:
    own = ("small", "f00d", "r1")
    assert make_sampler(None, None, SPEC, own) is None
    with pytest.raises(InputError, match="given none"):
        make_sampler(ALL, None, SPEC, own)
    made = make_sampler(ALL, UPath(tmp_path), SPEC, own)
    assert made
    made.close()
    for wrong in ({"redact": None}, {"redact": {"kinds": [], "names": ["Zuse"]}}, {"share": 0}):
        with pytest.raises(ValidationError):
            ServeSettings.model_validate({"sample": wrong})
    assert ServeSettings().sample is None
    assert SampleSettings().redact == RedactionSettings()


def test_names_are_read_from_files(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    given_as = {"redact": {"names": str(file)}, "sample": {"redact": {"names": str(file)}}}
    with pytest.raises(InputError, match=r"^serve\.redact\.names: .*names\.txt does not exist"):
        with_names(ServeSettings.model_validate(given_as))
    with pytest.raises(InputError, match=r"^serve\.sample\.redact\.names: "):
        with_names(ServeSettings.model_validate(given_as | {"redact": None}))
    file.write_text("Zuse\n\nAda Lovelace\n")
    read = with_names(ServeSettings.model_validate(given_as))
    assert read.redact is not None
    assert read.sample is not None
    assert read.redact.names == read.sample.redact.names == ("Zuse", "Ada Lovelace")
    assert with_names(ServeSettings()) == ServeSettings()
