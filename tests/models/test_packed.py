"""Models read packed rows as if each document stood alone, or say that they cannot."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from models import dropout, packed
from models.packed import accept_packed, positions_of, together
from models.settings import InputError

SIZE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (AutoModelForMaskedLM, {}),
    "roberta": (AutoModelForMaskedLM, {"pad_token_id": 1}),
    "distilbert": (AutoModelForMaskedLM, {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}),
    # Layers that see 4 tokens each way, and layers that see all.
    "modernbert": (AutoModelForMaskedLM, {"local_attention": 8, "num_hidden_layers": 4}),
    "gpt2": (AutoModelForCausalLM, {}),
    "llama": (AutoModelForCausalLM, {}),
    # These would mix documents of a row, and compute them one by one.
    "deberta-v2": (
        AutoModelForMaskedLM,
        {"relative_attention": True, "position_buckets": 8, "pos_att_type": "p2c|c2p"},
    ),
    "roformer": (AutoModelForMaskedLM, {}),
    "mpnet": (AutoModelForMaskedLM, {"pad_token_id": 1}),
    "bloom": (AutoModelForCausalLM, {"n_layer": 2, "n_head": 2}),
    "t5": (AutoModelForSeq2SeqLM, {"d_kv": 16, "d_ff": 64, "decoder_start_token_id": 0}),
}
DOCUMENTS = [torch.arange(5, 5 + length) for length in (12, 3, 1, 9)]


def build(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    auto, own = KINDS[kind]
    model: PreTrainedModel = auto.from_config(AutoConfig.for_model(kind, **{**SIZE, **own})).eval()
    with torch.no_grad():  # Fresh weights are small: what one document sees of another would hardly show.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def row(documents: list[Tensor], padding: int = 0) -> tuple[Tensor, Tensor]:
    ids = torch.cat([*documents, torch.zeros(padding, dtype=torch.long)])
    numbers = [torch.full_like(document, number + 1) for number, document in enumerate(documents)]
    return ids[None], torch.cat([*numbers, torch.zeros(padding, dtype=torch.long)])[None]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_documents_in_one_row_do_not_see_each_other(kind: str, stream: bool) -> None:
    model = build(kind)
    decodes = model.config.is_encoder_decoder
    alone = [
        model(input_ids=ids[None], **({"decoder_input_ids": ids[None]} if decodes else {})).logits[0]
        for ids in DOCUMENTS
    ]
    if stream:
        dropout.use_stream(model)
    accept_packed(model, 30, torch.device("cpu"), "fp32")
    ids, numbers = row(DOCUMENTS, padding=4)
    more = {"decoder_input_ids": ids, "decoder_attention_mask": numbers} if decodes else {}
    logits = model(input_ids=ids, attention_mask=numbers, **more).logits
    assert bool(logits.isfinite().all())
    torch.testing.assert_close(logits[0, : ids.shape[1] - 4], torch.cat(alone), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "modernbert", "gpt2", "deberta-v2"])
def test_only_the_wanted_tokens_reach_the_head(kind: str) -> None:
    model = build(kind)
    accept_packed(model, 30, torch.device("cpu"), "fp32")
    ids, numbers = row(DOCUMENTS)
    wanted = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    everything = model(input_ids=ids, attention_mask=numbers).logits
    some = model(input_ids=ids, attention_mask=numbers, wanted=wanted).logits
    assert some.shape[:2] == (1, int(wanted.sum()))
    torch.testing.assert_close(some[0], everything[wanted], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("kind", "own"), [("convbert", {}), ("fnet", {})])
def test_models_that_would_mix_documents_are_refused(kind: str, own: dict[str, Any]) -> None:
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(kind, **{**SIZE, **own}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    with pytest.raises(InputError, match=rf"^pretrain\.encoder: .*{kind} models.*; take another architecture\.$"):
        accept_packed(model, 30, torch.device("cpu"), "fp32")


def test_models_whose_tokens_see_what_they_should_predict_are_refused() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert-generation", **SIZE))
    with pytest.raises(InputError, match=r"^pretrain\.objective: bert-generation models do not learn clm as they come"):
        accept_packed(model, 30, torch.device("cpu"), "fp32", causal=True)
    accept_packed(build("gpt2"), 30, torch.device("cpu"), "fp32", causal=True)


def test_models_that_cannot_be_computed_in_a_precision_are_refused() -> None:
    size = {**SIZE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("deberta", **size))
    with pytest.raises(InputError, match=r"^pretrain\.precision: deberta models cannot be computed in bf16 .* to fp32"):
        accept_packed(model, 30, torch.device("cpu"), "bf16")


def test_positions_up_to_the_length_of_a_row_are_needed() -> None:
    with pytest.raises(InputError, match=r"^pack\.length is 41, but the encoder .* has only 40 positions: lower it"):
        accept_packed(build("bert"), 41, torch.device("cpu"), "fp32")
    with pytest.raises(InputError, match="has only 38 positions"):
        accept_packed(build("roberta"), 39, torch.device("cpu"), "fp32")


def test_rows_laid_end_to_end_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for flash attention, whose kernels want one row; documents are told by their positions there and in GPT."""
    model, flat = build("gpt2"), build("gpt2")
    accept_packed(model, 30, torch.device("cpu"), "fp32")
    monkeypatch.setattr(packed, "_has_flash", lambda *_: True)
    monkeypatch.setattr(type(flat), "set_attn_implementation", lambda *_: None)
    accept_packed(flat, 30, torch.device("cpu"), "fp32")
    ids, numbers = (torch.cat(parts) for parts in zip(row(DOCUMENTS), row(DOCUMENTS[::-1]), strict=True))
    wanted = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    expected = model(input_ids=ids, attention_mask=numbers, wanted=wanted).logits
    torch.testing.assert_close(flat(input_ids=ids, attention_mask=numbers, wanted=wanted).logits, expected)


def test_positions_begin_anew_and_padding_sees_what_it_may() -> None:
    numbers = torch.tensor([[1, 1, 2, 3, 3, 3, 0, 0]])
    assert positions_of(numbers).tolist() == [[0, 1, 0, 0, 1, 2, 0, 0]]
    mask = together(numbers, numbers)[0, 0]
    assert mask[:6, 6:].sum() == 0, "no document sees padding"
    assert bool(mask.any(1).all()), "a token that sees nothing would make the softmax undefined"
