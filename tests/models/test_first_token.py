"""Leaving out what no head reads changes neither outputs nor gradients."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from models import dropout
from models.first_token import skip_unread_tokens


def classifier(architecture: str, **more: object) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 50,
        "pad_token_id": 0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    config = AutoConfig.for_model(architecture, num_labels=3, **sizes, **more)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    return model


def outputs(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(1, 25).view(3, 8)
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] + [0] * 7])
    logits: torch.Tensor = model(input_ids=ids * mask, attention_mask=mask).logits
    return logits


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("architecture", ["bert", "camembert", "electra", "roberta", "xlm-roberta"])
def test_outputs_and_gradients_are_those_of_the_whole_layer(architecture: str, training: bool) -> None:
    whole = classifier(architecture).train(training)
    short = copy.deepcopy(whole)
    skip_unread_tokens(short)
    seen: list[tuple[int, ...]] = []
    last = short.base_model.encoder.layer[-1]
    last.output.dense.register_forward_hook(lambda module, given, output: seen.append(tuple(output.shape)))
    for model in (whole, short):
        outputs(model).square().sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(outputs(short), outputs(whole), rtol=1e-4, atol=1e-6)
    for one, other in zip(short.parameters(), whole.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)
    assert seen[0] == (3, 1, 32)


def test_it_drops_in_training() -> None:
    model = classifier("bert").train()
    skip_unread_tokens(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    dropout.use_stream(model)
    drawn = []
    for seed in (1, 2, 1):
        dropout.seed(seed)
        drawn.append(outputs(model))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.allclose(drawn[0], drawn[1])


@pytest.mark.parametrize("more", [{"is_decoder": True}, {"attn_implementation": "eager"}])
def test_others_stay_as_they_are(more: dict[str, object]) -> None:
    model = classifier("bert", **more)
    before = outputs(model.eval())
    skip_unread_tokens(model)
    assert "forward" not in vars(model.base_model.encoder.layer[-1])
    assert torch.equal(outputs(model), before)
