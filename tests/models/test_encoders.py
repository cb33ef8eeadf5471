"""Encoders become classifiers whatever their configs call things, and damaged ones are told by their file."""

import shutil
from pathlib import Path

import pytest
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from models.classifier import load
from models.encoders import build_classifier, set_dropout, set_padding
from models.settings import InputError
from tests.pipelines.tiny import tokenizer
from tests.small_classifiers import SENTIMENT, make_classifier

SHAPES = {
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    "distilbert": ("dropout", "attention_dropout", "seq_classif_dropout"),
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "modernbert": ("attention_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout"),
    "xlm-roberta": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    "t5": ("dropout_rate", "classifier_dropout"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_classifier(tmp_path / "classifier")


@pytest.mark.parametrize("architecture", SHAPES)
def test_dropout_reaches_all_names(architecture: str) -> None:
    config = AutoConfig.for_model(architecture)
    set_dropout(config, 0.25)
    assert [getattr(config, name) for name in SHAPES[architecture]] == [0.25] * len(SHAPES[architecture])


def test_dropout_reaches_the_text_part_of_a_model_of_more() -> None:
    config = AutoConfig.for_model("gemma3")
    set_dropout(config, 0.25)
    assert config.text_config.attention_dropout == 0.25


def test_a_whole_number_for_a_probability_is_replaced_but_no_switch() -> None:
    whole, switch = AutoConfig.for_model("bert", hidden_dropout_prob=0), AutoConfig.for_model("esm", token_dropout=True)
    set_dropout(whole, 0.25)
    set_dropout(switch, 0.25)
    assert (whole.hidden_dropout_prob, switch.hidden_dropout_prob, switch.token_dropout) == (0.25, 0.25, True)


def test_an_encoder_without_dropout_is_told_only_if_it_was_asked_for() -> None:
    set_dropout(PreTrainedConfig(), None)
    with pytest.raises(InputError, match=r"finetune\.dropout: the encoder .* has no dropout to set; leave it out"):
        set_dropout(PreTrainedConfig(), 0.1)


@pytest.mark.parametrize(
    ("own", "configured", "expected"),
    [(tokenizer(), None, 0), (tokenizer(decoder=True), None, 3), (tokenizer(decoder=True), 2, 2)],
    ids=["the tokenizer's", "the end of a text", "the model's"],
)
def test_model_and_tokenizer_share_a_padding_id(
    own: PreTrainedTokenizerFast, configured: int | None, expected: int
) -> None:
    shape = {"vocab_size": len(own), "n_embd": 8, "n_layer": 1, "n_head": 1, "pad_token_id": configured}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("gpt2", **shape))
    assert set_padding(model, own) == own.pad_token_id == model.config.pad_token_id == expected
    assert model(**own(["cat", "the very good cat"], padding=True, return_tensors="pt")).logits.shape == (2, 2)


@pytest.mark.parametrize("kept", [0, 5, 2000])
def test_damaged_weights_are_told_by_their_file(kept: int, folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(InputError, match=rf"^{weights} is damaged \([a-z ,]+\): copy or make it again\.$"):
        load(folder)
    with pytest.raises(InputError, match=rf"^finetune\.encoder: {weights} is damaged"):
        build_classifier((SENTIMENT,), seed=0, pretrained=folder)


def test_of_several_files_the_damaged_one_is_told(folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    files[1].write_bytes(b"broken")
    with pytest.raises(InputError, match=files[1].name):
        load(folder)


def test_other_damage_to_a_classifier_is_told(folder: Path, tmp_path: Path) -> None:
    for number, (name, text, sentence) in enumerate(
        (
            ("classifier.json", "{", r"classifier\.json is damaged: copy or make it again\.$"),
            ("tokenizer.json", "{}", "holds no tokenizer that can be loaded"),
            ("config.json", "{", r"holds no classifier that can be loaded: .*config\.json"),
            ("config.json", '{"model_type": "bert", "hidden_size": "wide"}', r"that can be loaded: .*'hidden_size'"),
        )
    ):
        damaged = Path(shutil.copytree(folder, tmp_path / str(number)))
        (damaged / name).write_text(text)
        with pytest.raises(InputError, match=sentence):
            load(damaged)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"can be loaded: .*no file named model\.safetensors"):
        load(folder)
