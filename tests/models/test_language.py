"""What language models are to predict: the right shares, the same draws from the same seed, nothing special hidden."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from models.language import DroppedSpans, Ids, MaskedTokens, NextTokens, prediction_loss, uniform
from models.settings import InputError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SENTINELS = [f"<extra_id_{number}>" for number in range(20)]
CLS, SEP, MASK = 2, 3, 4


def tokenizer(sentinels: bool = True, mask: bool = True) -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *(f"w{number}" for number in range(500)), *(SENTINELS if sentinels else [])]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names |= {"mask_token": "[MASK]"} if mask else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=SENTINELS if sentinels else [], **names
    )


def rows(count: int, length: int, seed: int = 0, padding: int = 0) -> tuple[Ids, Ids]:
    """Rows of documents of 2 to 30 tokens, each between [CLS] and [SEP]."""
    draw = np.random.default_rng(seed)
    ids, documents = np.zeros((count, length), np.int64), np.zeros((count, length), np.int64)
    for row in range(count):
        place, number = 0, 0
        while place < length - padding:
            size, number = min(int(draw.integers(4, 33)), length - padding - place), number + 1
            document = draw.integers(5, 505, size)
            document[0] = CLS
            if size > 1:
                document[-1] = SEP
            ids[row, place : place + size], documents[row, place : place + size] = document, number
            place += size
    return ids, documents


def test_a_share_of_the_tokens_is_masked_as_bert_masks() -> None:
    ids, documents = rows(200, 128, padding=8)
    lesson = MaskedTokens(tokenizer(), 0.15).lesson(ids, documents, seed=1)
    hidden, wanted = lesson.inputs["input_ids"].numpy(), lesson.inputs["wanted"].numpy()
    plain = (ids > MASK) & (documents > 0)
    assert not wanted[~plain].any()
    assert (hidden[~wanted] == ids[~wanted]).all()
    assert lesson.targets.tolist() == ids[wanted].tolist()
    assert wanted.sum() / plain.sum() == pytest.approx(0.15, abs=0.01)
    masked, same = (hidden == MASK)[wanted].mean(), (hidden == ids)[wanted].mean()
    assert masked == pytest.approx(0.8, abs=0.03)
    assert same == pytest.approx(0.1, abs=0.02)
    others = hidden[wanted & (hidden != MASK) & (hidden != ids)]
    assert others.min() > MASK
    assert len(np.unique(others)) > 100


def test_masks_come_from_the_seed_alone() -> None:
    objective, (ids, documents) = MaskedTokens(tokenizer(), 0.15), rows(4, 64)
    first, again, other = (objective.lesson(ids, documents, seed).inputs["input_ids"] for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # A change of the stream would change every run that goes on from a checkpoint.
    assert uniform(7, 3).tolist() == pytest.approx([0.97779, 0.04386, 0.00821], abs=1e-5)


def test_one_token_at_least_is_masked() -> None:
    ids, documents = np.array([[CLS, 50, SEP]]), np.ones((1, 3), np.int64)
    assert all(MaskedTokens(tokenizer(), 0.01).lesson(ids, documents, seed).count == 1 for seed in range(20))


def test_the_next_token_is_of_the_same_document() -> None:
    ids, documents = np.array([[2, 10, 11, 3, 2, 12, 0]]), np.array([[1, 1, 1, 1, 2, 2, 0]])
    lesson = NextTokens(tokenizer()).lesson(ids, documents, seed=0)
    assert lesson.inputs["wanted"].tolist() == [[True, True, True, False, True, False, False]]
    assert lesson.targets.tolist() == [10, 11, 3, 12]


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(4, 90), st.sampled_from([0.05, 0.15, 0.5]))
def test_dropped_spans_and_what_is_kept_make_up_the_document(seed: int, count: int, length: int, rate: float) -> None:
    known = tokenizer()
    ids, documents = rows(count, length, seed)
    first_sentinel = known.convert_tokens_to_ids("<extra_id_0>")
    lesson = DroppedSpans(known, rate).lesson(ids, documents, seed)
    inputs = {name: value.numpy() for name, value in lesson.inputs.items()}
    targets = lesson.targets.numpy()
    for row in range(count):
        for number in range(1, documents[row].max() + 1):
            source = inputs["input_ids"][row][inputs["attention_mask"][row] == number].tolist()
            there = inputs["decoder_attention_mask"][row] == number
            told = targets[row][there].tolist()
            assert inputs["decoder_input_ids"][row][there].tolist() == [0, *told][: len(told)]
            spans: dict[int, list[int]] = {}
            assert not told or told[-1] == SEP
            for token in told[:-1]:
                if token >= first_sentinel:
                    current = spans.setdefault(token, [])
                else:
                    current.append(token)
            original = [token for part in source for token in spans.get(part, [part])]
            assert original == ids[row][documents[row] == number].tolist()
            assert list(spans) == [first_sentinel + position for position in range(len(spans))]
            plain = int(((ids[row] > MASK) & (documents[row] == number)).sum())
            dropped = sum(map(len, spans.values()))
            assert dropped == (min(max(round(plain * rate), 1), plain - 1) if plain > 1 else 0)


def test_unknown_and_special_tokens_in_a_text_break_nothing() -> None:
    draw = np.random.default_rng(0)
    ids = draw.integers(5, 505, (4, 400))
    ids[draw.random(ids.shape) < 0.1] = SEP
    ids[draw.random(ids.shape) < 0.1] = 1
    documents = np.ones(ids.shape, np.int64)
    known = tokenizer()
    lesson = DroppedSpans(known, 0.15).lesson(ids, documents, seed=3)
    kept = lesson.inputs["input_ids"].numpy()
    for row in range(4):
        assert (kept[row] == SEP).sum() == (ids[row] == SEP).sum(), "what is special is not dropped"
    masked = MaskedTokens(known, 0.15).lesson(ids, documents, seed=3)
    assert 1 in masked.targets, "an unknown token stands for text"
    assert SEP not in masked.targets


def test_what_a_tokenizer_lacks_is_told() -> None:
    with pytest.raises(InputError, match=r"pretrain\.objective: mlm needs a mask token"):
        MaskedTokens(tokenizer(mask=False), 0.15)
    with pytest.raises(InputError, match=r"pretrain\.objective: span needs the tokens <extra_id_0>"):
        DroppedSpans(tokenizer(sentinels=False), 0.15)


def test_the_loss_is_summed_over_what_is_to_be_predicted() -> None:
    logits = torch.zeros(1, 3, 10)
    loss = prediction_loss(logits, {"targets": torch.tensor([[4, -100, 9]])})
    assert float(loss) == pytest.approx(2 * np.log(10), rel=1e-6)
