"""Texts laid end to end are answered as each alone, by every architecture that takes it; others are told apart."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from models import attention
from models.first_token import skip_unread_tokens
from models.unpadded import Unpadded, accept_unpadded, agrees, has_kernel

SIZE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "num_labels": 3,
}
KINDS: dict[str, dict[str, Any]] = {
    "bert": {},
    "electra": {},
    "roberta": {"pad_token_id": 1},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "albert": {},
    # Layers that see 4 tokens each way, and layers that see all; the mean of all tokens is read.
    "modernbert": {"local_attention": 8, "num_hidden_layers": 4, "classifier_pooling": "mean"},
    "gpt2": {},
    # Two heads of keys and values for four of queries.
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 6},
}
APART: dict[str, dict[str, Any]] = {
    "deberta-v2": {"relative_attention": True, "position_buckets": 8, "pos_att_type": "p2c|c2p"},
    "roformer": {},
    "mpnet": {"pad_token_id": 1},
    "bloom": {"n_layer": 2, "n_head": 2},
    "convbert": {},
    "bart": {},
}
LONGEST = 32
TEXTS = st.lists(st.lists(st.integers(0, 59), min_size=1, max_size=LONGEST), min_size=1, max_size=9)


def build(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZE, **KINDS.get(kind, {}), **APART.get(kind, {})})
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():  # Fresh weights are small: what one text sees of another would hardly show.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    skip_unread_tokens(model)
    return model


def alone(model: PreTrainedModel, texts: list[list[int]]) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(input_ids=torch.tensor([text])).logits for text in texts])


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[PreTrainedModel, PreTrainedModel, Unpadded]]:
    """Of each kind a model that is left alone, and one that takes texts end to end."""
    found = {}
    for kind in KINDS:
        unpadded = accept_unpadded(model := build(kind), LONGEST)
        assert unpadded is not None, kind
        found[kind] = build(kind), model, unpadded
    return found


@given(texts=TEXTS)
@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("kind", KINDS)
def test_each_text_is_answered_as_if_it_were_alone(
    models: dict[str, tuple[PreTrainedModel, PreTrainedModel, Unpadded]], kind: str, texts: list[list[int]]
) -> None:
    plain, _, unpadded = models[kind]
    with torch.inference_mode():
        together = unpadded(texts)
    difference = together.softmax(-1) - alone(plain, texts).softmax(-1)
    assert float(difference.abs().max()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_see_each_token_once_and_nothing_else(
    models: dict[str, tuple[PreTrainedModel, PreTrainedModel, Unpadded]], kind: str
) -> None:
    _, model, unpadded = models[kind]
    rows: list[int] = []
    hooks = [
        module.register_forward_hook(lambda _module, given, _output: rows.append(given[0].shape[:-1].numel()))
        for module in model.base_model.modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    ]
    with torch.inference_mode():
        unpadded([[7] * 30, [8, 9, 10], [11]])
    for hook in hooks:
        hook.remove()
    # The last layer of some is computed for first tokens alone, and so is what comes after it.
    assert set(rows) <= {34, 3}
    assert rows.count(34) > rows.count(3)


@pytest.mark.parametrize("kind", APART)
def test_models_that_cannot_stay_as_they_were(kind: str) -> None:
    model, texts = build(kind), [[9, 5, 2], [7] * 7 + [2]]
    before = alone(model, texts)
    implementation = model.config._attn_implementation
    assert accept_unpadded(model, LONGEST) is None
    assert model.config._attn_implementation == implementation
    assert torch.equal(alone(model, texts), before)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "modernbert"])
def test_the_model_itself_does_what_it_did(
    models: dict[str, tuple[PreTrainedModel, PreTrainedModel, Unpadded]], kind: str
) -> None:
    plain, model, _ = models[kind]
    ids = torch.tensor([[7, 8, 9, 10], [11, 12, 0, 0]])
    given = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    torch.testing.assert_close(model(**given).logits, plain(**given).logits, rtol=1e-5, atol=1e-6)


def by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What torch documents of `varlen_attn`, which takes no tensors on a CPU."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max())) == (max_q, max_k)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    left, right = (torch.inf if side == -1 else side for side in window_size)
    times = query.shape[1] // key.shape[1]
    found = []
    for text in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[text] : cu_seq_q[text + 1]]
        k, v = (each[cu_seq_k[text] : cu_seq_k[text + 1]].repeat_interleave(times, dim=1) for each in (key, value))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
        if len(q) == len(k):
            distance = torch.arange(len(q))[:, None] - torch.arange(len(k))
            scores.masked_fill_((distance > left) | (-distance > right), -torch.inf)
        found.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(found)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_kernels_of_gpus_are_asked_for_is_the_same(
    models: dict[str, tuple[PreTrainedModel, PreTrainedModel, Unpadded]], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, unpadded = models[kind]
    texts = [[7] * 30, [8, 9, 10, 5], [11], list(range(5, 37))]
    with torch.inference_mode():
        expected = unpadded(texts)
        monkeypatch.setattr(attention, "varlen_attn", by_definition)
        monkeypatch.setattr(attention, "_by_length", attention._by_flash)
        torch.testing.assert_close(unpadded(texts), expected, rtol=1e-4, atol=2e-5)


def test_where_the_kernels_of_gpus_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, wide, narrow = torch.device("cuda"), build("bert"), build("distilbert")
    narrow.config.hidden_size = narrow.config.num_attention_heads * 12  # 12 is no multiple of 8
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert has_kernel(wide, gpu, "bf16")
    assert not has_kernel(wide, gpu, "fp32")
    assert not has_kernel(narrow, gpu, "bf16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not has_kernel(wide, gpu, "fp16")
    assert has_kernel(narrow, torch.device("cpu"), "fp32")


def test_kernels_that_do_not_do_what_they_should_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    unpadded = accept_unpadded(build("bert"), LONGEST)
    assert unpadded
    assert agrees(unpadded, LONGEST, "fp32")
    assert agrees(unpadded, LONGEST, "bf16")
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_by_length", lambda query, *_: query)
        assert not agrees(unpadded, LONGEST, "bf16")
    monkeypatch.setattr(attention, "_by_length", attention._by_flash)  # On a CPU there is none: it raises.
    assert not agrees(unpadded, LONGEST, "bf16")


def test_texts_of_pairs_keep_their_types(
    models: dict[str, tuple[PreTrainedModel, PreTrainedModel, Unpadded]],
) -> None:
    plain, _, unpadded = models["bert"]
    ids, types = [[7, 8, 9], [5, 6], [9, 8, 7, 6]], [[0, 0, 1], [0, 1], [0, 1, 1, 1]]
    with torch.inference_mode():
        for count in (3, 1):
            found = unpadded(ids[:count], types[:count])
            expected = [
                plain(input_ids=torch.tensor([own]), token_type_ids=torch.tensor([kinds])).logits
                for own, kinds in zip(ids[:count], types[:count], strict=True)
            ]
            torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found, unpadded(ids[:1], [[0, 0, 0]]), atol=1e-3)
