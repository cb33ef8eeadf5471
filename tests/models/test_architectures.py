"""Encoders from scratch: sizes by name, numbers by hand, and what an architecture does not know is told."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModel, AutoModelForMaskedLM

from models.architectures import SHIFTED, SIZES, ScratchEncoder, scratch_config
from models.packed import accept_packed
from models.settings import InputError
from tests.models.test_language import tokenizer


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "gpt2", "t5", "roberta", "distilbert", "llama"])
def test_an_architecture_takes_the_named_size(architecture: str) -> None:
    config = scratch_config(ScratchEncoder(architecture=architecture, size="tiny"), tokenizer(), 64)
    width, layers, heads = SIZES["tiny"]
    shape = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.vocab_size)
    assert shape == (width, layers, heads, len(tokenizer()))
    assert config.pad_token_id == 0
    assert AutoModel.from_config(config).num_parameters() < 2e6


@pytest.mark.parametrize(
    ("size", "millions"), [("tiny", 0.4), ("mini", 3.2), ("small", 12.6), ("medium", 25.2), ("base", 85.1)]
)
def test_the_table_tells_the_parameters(size: Any, millions: float) -> None:
    config = scratch_config(ScratchEncoder(size=size), tokenizer(), 64)
    model = AutoModel.from_config(config, add_pooling_layer=False)
    own = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embeddings"))
    assert own / 1e6 == pytest.approx(millions, abs=0.06)


def test_numbers_by_hand_come_before_those_of_the_size() -> None:
    encoder = ScratchEncoder(size="mini", layers=3, config={"intermediate_size": 100})
    config = scratch_config(encoder, tokenizer(), 64)
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (256, 3, 100)


@pytest.mark.parametrize("architecture", sorted(SHIFTED - {"xmod"}))  # It wants to know a text's language.
def test_positions_that_are_shifted_are_enough(architecture: str) -> None:
    config = scratch_config(ScratchEncoder(architecture=architecture, size="tiny"), tokenizer(), 64)
    model = AutoModelForMaskedLM.from_config(config)
    accept_packed(model, 64, torch.device("cpu"), "fp32")
    ids = torch.full((1, 64), 7)
    assert bool(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.isfinite().all())


def test_heads_divide_the_width() -> None:
    with pytest.raises(ValidationError, match="must divide hidden_size, which is 256, and 3 does not"):
        ScratchEncoder(heads=3)


def test_what_is_unknown_is_told() -> None:
    with pytest.raises(ValidationError, match="'bart3' is no architecture of transformers"):
        ScratchEncoder(architecture="bart3")
    with pytest.raises(InputError, match=r"encoder\.config: bert has no setting 'window'\."):
        scratch_config(ScratchEncoder(config={"window": 3}), tokenizer(), 64)
    with pytest.raises(InputError, match=r"encoder\.config: funnel cannot be made so: .* set `block_sizes`"):
        scratch_config(ScratchEncoder(architecture="funnel"), tokenizer(), 64)
    with pytest.raises(InputError, match=r"encoder\.config: modernbert cannot be made so"):
        scratch_config(ScratchEncoder(architecture="modernbert", config={"layer_types": "all"}), tokenizer(), 64)
