"""An encoder that keeps some of its layers is a plain smaller model: what is left computes as it did."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from models.classifier import save
from models.encoders import build_classifier
from models.labels import LabelColumn
from models.pruning import keep_layers
from models.settings import InputError
from models.spec import ClassifierSpec
from tests.small_classifiers import SENTIMENT, train_tokenizer

SIZES: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64},
    "distilbert": {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64},
    "mpnet": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64},
    "modernbert": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4},
    "albert": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64},
    "t5": {"d_model": 32, "num_layers": 4, "num_decoder_layers": 4, "num_heads": 4, "d_kv": 8, "d_ff": 64},
}
STACKS = {
    "bert": ("bert.encoder", "layer"),
    "distilbert": ("distilbert.transformer", "layer"),
    "mpnet": ("mpnet.encoder", "layer"),
    "gpt2": ("transformer", "h"),
}


def whole(architecture: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, vocab_size=50, num_labels=3, pad_token_id=0, **SIZES[architecture])
    config.use_cache = False
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    return model.eval()


def outputs(model: PreTrainedModel) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(input_ids=torch.arange(5, 29).view(3, 8)).logits
    return logits


@pytest.mark.parametrize("wanted", [2, (0, 3), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("architecture", STACKS)
def test_the_kept_layers_compute_as_the_whole_without_the_others(
    architecture: str, wanted: int | tuple[int, ...]
) -> None:
    model = whole(architecture)
    smaller = keep_layers(model, wanted)
    kept = range(wanted) if isinstance(wanted, int) else wanted
    expected = copy.deepcopy(model)
    owner, stack = STACKS[architecture]
    layers = getattr(expected.get_submodule(owner), stack)
    setattr(expected.get_submodule(owner), stack, nn.ModuleList([layers[layer] for layer in kept]))
    if architecture in ("bert", "mpnet", "gpt2"):
        expected.config.num_hidden_layers = len(kept)
    torch.testing.assert_close(outputs(smaller), outputs(expected))
    assert not torch.allclose(outputs(smaller), outputs(model), atol=1e-4)
    assert smaller.config.num_hidden_layers == len(kept)


@pytest.mark.parametrize("architecture", [*STACKS, "modernbert"])
def test_a_saved_one_loads_as_any_classifier(architecture: str, tmp_path: Path) -> None:
    smaller = keep_layers(whole(architecture), (0, 2, 3))
    smaller.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.num_hidden_layers == 3
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in smaller.named_parameters()]
    assert torch.equal(outputs(loaded), outputs(smaller))


def test_what_a_config_says_of_each_layer_goes_along() -> None:
    model = whole("modernbert")
    types = model.config.layer_types
    assert len(set(types)) == 2
    assert keep_layers(model, (0, 1, 3)).config.layer_types == [types[0], types[1], types[3]]
    assert model.config.num_hidden_layers == 4, "the whole one stays as it is"


def test_a_classifier_is_built_with_them_the_same_each_time(tmp_path: Path) -> None:
    whole("bert").base_model.save_pretrained(tmp_path / "encoder")
    labels: tuple[LabelColumn, ...] = (SENTIMENT,)
    one, other = (
        build_classifier(labels, seed=3, pretrained=tmp_path / "encoder", layers=(1, 3), dropout=0.3) for _ in range(2)
    )
    for name, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert one.training
    assert one.config.hidden_dropout_prob == 0.3
    assert "forward" in vars(one.base_model.encoder.layer[-1]), "the last layer works for the first token alone"
    save(one, train_tokenizer(), ClassifierSpec(labels=labels, max_length=32), tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert len(loaded.bert.encoder.layer) == 2
    assert loaded.config.id2label == {0: "negative", 1: "neutral", 2: "positive"}


@pytest.mark.parametrize(
    ("architecture", "wanted", "told"),
    [
        ("bert", 5, "keeps 5, but the encoder has 4 layers."),
        ("bert", (0, 4), "names layer 4, but the encoder has 4 layers, 0 to 3."),
        ("albert", 2, "albert models are not one stack of layers; leave it out."),
        ("t5", 2, "t5 models are not one stack of layers; leave it out."),
    ],
)
def test_what_cannot_be_kept_is_told(architecture: str, wanted: int | tuple[int, ...], told: str) -> None:
    with pytest.raises(InputError) as error:
        keep_layers(whole(architecture), wanted)
    assert str(error.value) == f"finetune.keep_layers: {told}"
