"""pack: every token of every document in full rows, whatever the sources, their weights, or what dies on the way."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as subwords
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from upath import UPath

from models.settings import InputError
from pipelines import pack
from pipelines.pack import PackSettings, PackStageSettings
from pipelines.parts import run_parts
from pipelines.prepared import Prepared
from pipelines.preparing.pack_pass import Copies, packed_files, shares_to_times
from pipelines.progress import Progress
from pipelines.stage import Task
from tests.making import make_encoder

pytestmark = pytest.mark.usefixtures("ray_session")

WORDS = [f"word{number}" for number in range(60)]
LENGTH = 16


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_encoder(tmp_path_factory.mktemp("encoder")))


def write_texts(path: Path, count: int, seed: int, longest: int = 40) -> list[str]:
    draw = random.Random(seed)
    texts = [f"word{seed} " + " ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(count)]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return texts


def settings(encoder: str | None, sources: Any, **more: Any) -> PackStageSettings:
    given = {"length": LENGTH, "chunk_rows": 8, "validation_share": 0.1} | more
    return PackStageSettings(pack=PackSettings(sources=sources, **given), encoder=encoder)


def run(chosen: PackStageSettings, out: Path) -> tuple[dict[str, Any], Prepared]:
    task = Task(chosen, {}, UPath(out), Progress(), "toy")
    return pack.run(task), Prepared(UPath(out))


def documents_of(packed: Prepared, split: str) -> Counter[tuple[int, tuple[int, ...]]]:
    """How many tokens of each source row stand in each row's pieces, put together again."""
    found: dict[int, Counter[int]] = {}
    for row in packed.read_split(split).to_pylist():
        bounds = [*row["starts"], len(row["input_ids"])]
        for document, start, stop in zip(row["documents"], bounds, bounds[1:], strict=False):
            assert stop > start
            found.setdefault(document, Counter()).update(row["input_ids"][start:stop])
    return Counter({(document, tuple(sorted(ids.items()))): 1 for document, ids in found.items()})


def test_rows_are_full_and_hold_every_token_once(tmp_path: Path, encoder: str) -> None:
    texts = write_texts(tmp_path / "a.txt", 400, 1)
    metrics, packed = run(settings(encoder, str(tmp_path / "a.txt")), tmp_path / "out")
    index, tokenizer = packed.index, AutoTokenizer.from_pretrained(packed.tokenizer_folder.path)
    expected = {number: Counter(ids) for number, ids in enumerate(tokenizer(texts)["input_ids"])}
    seen: dict[int, Counter[int]] = {}
    numbers = []
    for split, info in index.splits.items():
        table = packed.read_split(split)
        assert len(table) == info.rows
        lengths = table["length"].to_pylist()
        assert lengths[:-1] == [LENGTH] * (info.rows - 1)
        assert sum(lengths) == info.tokens
        sizes = [len(packed.read_chunk(split, chunk)) for chunk in range(info.chunks)]
        assert set(sizes[:-1]) <= {8}
        assert sum(sizes) == info.rows
        numbers += table["row"].to_pylist()
        for document, ids in documents_of(packed, split):
            seen.setdefault(document, Counter()).update(dict(ids))
        assert info.bytes == sum(len(texts[document]) for document, _ in documents_of(packed, split))
    assert seen == expected
    assert numbers == list(range(len(numbers)))
    assert metrics["documents"] == 400
    assert metrics["padding_share"] < 2 * LENGTH / metrics["tokens"]
    assert metrics["documents_longer_than_a_row"] == sum(sum(ids.values()) > LENGTH for ids in expected.values())
    assert "the packed corpus" in (tmp_path / "out" / "report.html").read_text()


def test_a_document_of_two_sources_is_kept_once_and_each_is_read_in_its_own_way(tmp_path: Path, encoder: str) -> None:
    write_texts(tmp_path / "a.txt", 60, 1)
    texts = write_texts(tmp_path / "b.txt", 60, 2)
    rows = "\n".join(["id,body", *(f"{number},{text}" for number, text in enumerate(texts[:30]))])
    (tmp_path / "c.csv").write_text(rows + "\n30,word3 odd\n", encoding="utf-8")
    sources = [
        {"source": [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]},
        {"source": str(tmp_path / "c.csv"), "text": "body", "where": {"id": r"^\d+$"}},
    ]
    metrics, packed = run(settings(encoder, sources), tmp_path / "out")
    assert metrics["rows_in"] == 151
    assert metrics["rejected_duplicates"] == 30
    assert metrics["documents"] == 121
    rejected = pq.read_table(tmp_path / "out" / "rejected").to_pylist()
    assert {row["file"] for row in rejected} == {str(tmp_path / "c.csv")}
    documents = {document for split in packed.index.splits for document, _ in documents_of(packed, split)}
    assert 150 in documents, "rows are counted over all sources"


def test_weights_are_shares_of_an_epoch_as_long_as_all_sources(tmp_path: Path, encoder: str) -> None:
    write_texts(tmp_path / "a.txt", 400, 1)
    write_texts(tmp_path / "b.txt", 100, 2)
    sources = [{"source": str(tmp_path / f"{name}.txt"), "weight": weight} for name, weight in (("a", 1), ("b", 3))]
    metrics, packed = run(settings(encoder, sources), tmp_path / "out")
    table = packed.read_split("train").to_pylist()
    tokens: Counter[str] = Counter()
    for row in table:
        bounds = [*row["starts"], len(row["input_ids"])]
        for document, start, stop in zip(row["documents"], bounds, bounds[1:], strict=False):
            tokens["a" if document < 400 else "b"] += stop - start
    assert tokens["b"] / tokens.total() == pytest.approx(0.75, abs=0.05)
    assert tokens.total() == pytest.approx(metrics["tokens"] * 0.9, rel=0.1)
    assert [row["length"] for row in table[:-1]] == [LENGTH] * (len(table) - 1)
    assert len({row["row"] for row in table}) == len(table)
    assert 0 < metrics["left_out_by_weight"] < 400


@given(
    st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(0, 200), min_size=1, max_size=3)), min_size=1),
    st.integers(1, 9),
    st.integers(1, 4),
)
def test_files_share_out_the_stream_to_the_token(
    parts: list[tuple[int, list[int]]], length: int, chunk_rows: int
) -> None:
    plan = [(number, documents, tokens) for number, (documents, tokens) in enumerate(parts)]
    files = packed_files("train", plan, length, chunk_rows, 5)
    taken: Counter[tuple[int, int]] = Counter()
    row = 5
    for file in files:
        assert file.first_row == row
        tokens = sum(part.stop - part.start for part in file.stream)
        assert tokens % (length * chunk_rows) == 0 or file is files[-1]
        row += -(-tokens // length)
        for part in file.stream:
            assert part.start == taken[part.part, part.turn], "each goes on where the file before ended"
            taken[part.part, part.turn] = part.stop
    wanted = {(number, turn): count for number, _, tokens in plan for turn, count in enumerate(tokens) if count}
    assert dict(taken) == wanted


def test_copies_are_as_many_as_the_share_wants() -> None:
    import numpy as np

    copies = Copies(shares_to_times([900, 100], [0.5, 0.5]), seed=0)
    assert copies.times == pytest.approx((500 / 900, 5.0))
    rows = np.arange(20_000)
    assert copies.of(rows, np.zeros(20_000, np.int16)).mean() == pytest.approx(500 / 900, abs=0.01)
    assert set(copies.of(rows, np.ones(20_000, np.int16))) == {5}
    assert copies.rounds == 5


def test_lines_are_counted_for_each_source_of_a_file(tmp_path: Path, encoder: str) -> None:
    rows = [f"{number},word1 word{number},word2 word{number % 20}" for number in range(40)]
    (tmp_path / "a.csv").write_text("\n".join(["id,title,body", *rows]), encoding="utf-8")
    sources = [{"source": str(tmp_path / "a.csv"), "text": text} for text in ("title", "body")]
    run(settings(encoder, sources), tmp_path / "out")
    rejected = pq.read_table(tmp_path / "out" / "rejected").to_pylist()
    # The line is the header's successor's number, of bodies that had been there twenty rows before.
    assert sorted(row["row"] for row in rejected) == list(range(22, 42))


def test_a_rerun_goes_on_where_it_was_and_ends_in_the_same_rows(
    tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path / "a.txt", 200, 1)
    chosen = settings(encoder, {"source": str(tmp_path / "a.txt"), "weight": 1.0})
    _, whole = run(chosen, tmp_path / "whole")

    def interrupted(name: str, *arguments: Any) -> Any:
        if name == "pack":
            raise KeyboardInterrupt
        return run_parts(name, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pack, "run_parts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(chosen, tmp_path / "broken")
    assert not (tmp_path / "broken" / "prepared.json").exists()
    _, again = run(chosen, tmp_path / "broken")
    assert again.read_split("train").equals(whole.read_split("train"))


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_a_tokenizer_is_trained_on_chinese_too(tmp_path: Path, kind: str) -> None:
    draw = random.Random(0)
    signs = [chr(0x4E00 + number) for number in range(400)]
    texts = ["".join(draw.choices(signs, k=draw.randint(9, 40))) for _ in range(300)]
    (tmp_path / "a.txt").write_text("\n".join(texts), encoding="utf-8")
    chosen = settings(None, str(tmp_path / "a.txt"), tokenizer={"kind": kind, "vocabulary": 405})
    _, packed = run(chosen.model_copy(update={"sentinels": True}), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(packed.tokenizer_folder.path)
    text = texts[0]
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
    assert tokenizer.convert_tokens_to_ids("<extra_id_99>") == len(tokenizer) - 1
    assert "<extra_id_0>" in tokenizer.all_special_tokens


def test_a_tokenizer_that_marks_no_ends_gets_its_end_token_after_each_document(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2Model

    vocabulary = {name: number for number, name in enumerate(["[UNK]", "<end>", *WORDS])}
    backend = Tokenizer(subwords.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "gpt"
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="<end>").save_pretrained(folder)
    GPT2Model(GPT2Config(vocab_size=62, n_embd=8, n_layer=1, n_head=1, n_positions=32)).save_pretrained(folder)
    write_texts(tmp_path / "a.txt", 50, 1)
    _, packed = run(settings(str(folder), str(tmp_path / "a.txt")), tmp_path / "out")
    ids = [token for row in packed.read_split("train").to_pylist() for token in row["input_ids"]]
    assert ids.count(1) == packed.index.splits["train"].documents


MISTAKES: list[tuple[Any, dict[str, Any], str]] = [
    ({"source": "no.txt"}, {}, r"no\.txt"),
    ({"source": "a.txt", "text": "body"}, {}, r"a\.txt has no column 'body'"),
    ({"source": {"trian": "a.txt"}}, {}, r"^pack\.sources\.0\.source: 'trian' is no split"),
    ({"source": "a.txt", "where": {"text": "never"}}, {}, "no document is left for train of 60 read"),
    ({"source": "a.txt"}, {"length": 65}, r"^pack\.length is 65, but the encoder .* takes at most 64 tokens\.$"),
    ({"source": "b.data.csv", "text": "no"}, {}, r"b\.data\.csv has no column 'no'"),
    (
        [{"source": "a.txt", "weight": 1}, {"source": "short.txt", "weight": 1000}],
        {},
        r"^pack\.sources\.1\.weight: its texts would stand [\d,]+ times in an epoch, more than 100: lower it",
    ),
    (
        {"source": "a.txt"},
        {"tokenizer": {"vocabulary": 5000}},
        r"^pack\.tokenizer\.vocabulary is 5,000, but the texts give only \d+ tokens: lower it, or give more texts\.$",
    ),
]


@pytest.mark.parametrize(("source", "more", "told"), MISTAKES)
def test_mistakes_are_told(
    source: Any, more: dict[str, Any], told: str, tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "a.txt", 60, 1)
    (tmp_path / "short.txt").write_text("word7\nword7 word8\nword9\n")
    (tmp_path / "b.data.csv").write_text("text\nword1\n")
    with pytest.raises(InputError, match=told):
        run(settings(None if "tokenizer" in more else encoder, source, **more), tmp_path / "out")


def test_weights_are_given_to_all_sources_or_to_none() -> None:
    with pytest.raises(ValueError, match=r"sources\.1\.weight is missing"):
        PackSettings(sources=[{"source": "a.txt", "weight": 1}, {"source": "b.txt"}])
    with pytest.raises(ValueError, match="name at least one"):
        PackSettings(sources=[])
