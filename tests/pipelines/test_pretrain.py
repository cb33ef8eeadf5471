"""pretrain: language models learn on the exact loop, whatever the objective, and fine-tuning goes on from them."""

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as subwords
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
)
from upath import UPath

from models.architectures import ScratchEncoder
from models.language import prediction_loss
from models.packing import pack
from models.settings import InputError
from pipelines import pretrain
from pipelines.audit import compare
from pipelines.ledgers import read_ledger
from pipelines.prepared import INDEX, Index, Prepared, SplitFile, SplitIndex
from pipelines.pretrain import PretrainSettings
from pipelines.progress import Progress
from pipelines.stage import Task
from pipelines.training import pretraining
from pipelines.training.lanes import feed_over
from pipelines.training.pretraining import Pretraining
from pipelines.training.spikes import Spikes
from pipelines.training.worker import WorkerJob, train_lanes
from pipelines.training.workers import Outcome
from tests.pipelines.test_layouts import train_here, train_on
from tests.pipelines.test_training import KilledError, LoneChannel, Watched
from tests.pipelines.tiny import artifact

LENGTH, WORDS = 24, [f"w{number}" for number in range(40)]
SENTINELS = [f"<extra_id_{number}>" for number in range(10)]
TINY: dict[str, Any] = {"hidden_size": 32, "layers": 2, "heads": 2, "dropout": 0.1}
DEFAULTS: dict[str, Any] = {
    "lanes": 4,
    "microbatch": 4,
    "epochs": 2,
    "validations": 2,
    "learning_rate": 3e-3,
    "trackers": (),
    "encoder": ScratchEncoder(**TINY),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *SENTINELS]
    backend = Tokenizer(subwords.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=SENTINELS, **names)


def make_packed(folder: Path, documents: int = 500, chunk_rows: int = 16) -> Path:
    """A packed corpus of documents in which each word is followed by the next one."""
    draw = random.Random(3)
    splits, first_row = {}, 0
    for split, count in {"train": documents, "validation": documents // 10}.items():
        texts = []
        for _ in range(count):
            start, length = draw.randrange(40), draw.randint(3, 20)
            texts.append([2, *(5 + (start + step) % 40 for step in range(length)), 3])
        packed = list(pack([len(text) for text in texts], LENGTH))
        ids = [[token for p in row for token in texts[p.document][p.start : p.stop]] for row in packed]
        starts = [np.cumsum([0, *map(len, row[:-1])]).tolist() for row in packed]
        columns = {
            "row": pa.array(range(first_row, first_row + len(packed))),
            "input_ids": pa.array(ids, pa.list_(pa.int32())),
            "length": pa.array([len(row) for row in ids], pa.int32()),
            "starts": pa.array(starts, pa.list_(pa.int32())),
        }
        file = folder / split / "part-00000.parquet"
        file.parent.mkdir(parents=True)
        pq.write_table(pa.table(columns), file, row_group_size=chunk_rows)
        first_row += len(packed)
        splits[split] = SplitIndex(
            rows=len(packed),
            chunk_rows=chunk_rows,
            files=(SplitFile(name=f"{split}/part-00000.parquet", chunks=-(-len(packed) // chunk_rows)),),
            tokens=sum(map(len, texts)),
            bytes=3 * sum(map(len, texts)),
        )
    index = Index(labels=(), max_length=LENGTH, splits=splits)
    (folder / INDEX).write_text(index.model_dump_json(), encoding="utf-8")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_packed(tmp_path_factory.mktemp("corpus") / "packed")


Run = Callable[..., tuple[dict[str, Any], Path]]


@pytest.fixture
def run(tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the stage with its one worker in this process; gives its metrics and its folder."""
    torch.set_num_threads(1)

    def run_stage(
        checkpoints: Watched | None = None, name: str = "out", told: list[str] | None = None, **settings: Any
    ) -> tuple[dict[str, Any], Path]:
        class Channel(LoneChannel):
            def tell(self, sentence: str) -> None:
                if told is not None:
                    told.append(sentence)

        def train_in_process(job: WorkerJob, progress: Progress) -> Outcome:
            own = checkpoints or Watched(tmp_path / f"{name}-checkpoints")
            channel: Any = Channel(job.settings)  # type: ignore[arg-type]
            return Outcome(train_lanes(job, own, channel, 0, 1, torch.device("cpu")), 1, [{}])

        monkeypatch.setattr(pretrain, "train", train_in_process)
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        chosen = PretrainSettings(**(DEFAULTS | settings))
        return pretrain.run(Task(chosen, {"pack": artifact(packed, "pack")}, UPath(out), Progress(), "toy")), out

    return run_stage


def history_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "history.json").read_text())
    return found


OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("mlm", {}),
    "modernbert": ("mlm", {}),
    "deberta-v2": ("mlm", {}),
    "gpt2": ("clm", {}),
    "t5": ("span", {"epochs": 3}),
}


@pytest.mark.parametrize("architecture", OBJECTIVES)
def test_each_objective_is_learnt_and_its_encoder_becomes_a_classifier(
    architecture: str, run: Run, packed: Path
) -> None:
    objective, more = OBJECTIVES[architecture]
    encoder = ScratchEncoder(architecture=architecture, **TINY)
    settings = {"objective": objective, "encoder": encoder, "epochs": 6, "validations": 3, "rate": 0.25} | more
    metrics, out = run(**settings)
    history = history_of(out)
    first, *_, last = history["losses"]
    assert first == pytest.approx(math.log(len(make_tokenizer())), rel=0.3)
    assert last < first - 0.3
    assert metrics["validation.loss"] == min(each["loss"] for each in history["validations"])
    assert metrics["validation.perplexity"] == pytest.approx(math.exp(metrics["validation.loss"]))
    # Its texts have 3 bytes a token, special ones counted; T5's sentinels are easier to tell than words.
    assert 0 < metrics["validation.bits_per_byte"] < 1.5 * metrics["validation.loss"] / math.log(2) / 3
    assert 0 < metrics["flops_utilization"] < 1
    assert metrics["documents_apart"] == (architecture == "deberta-v2")
    prepared = Prepared(UPath(packed))
    feed = feed_over(prepared.index.splits["train"], 4, 4, 0)
    assert compare(feed, prepared, read_ledger(UPath(out)), metrics["steps_taken"]).sentence == "exact"
    assert "pretraining" in (out / "report.html").read_text()
    saved = AutoModel.from_pretrained(out / "model")
    assert getattr(saved.config, "use_cache", True)
    classifier, loading = AutoModelForSequenceClassification.from_pretrained(
        out / "model", num_labels=2, output_loading_info=True
    )
    fresh = {name.split(".")[0] for name in loading["missing_keys"]}
    assert fresh <= {"classifier", "score", "classification_head", "head", "bert", "pooler"}, loading["missing_keys"]
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert classifier(**tokenizer("w1 w2 w3", return_tensors="pt", return_token_type_ids=False)).logits.shape == (1, 2)


def test_an_encoder_goes_on_learning_with_a_new_head(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    before = BertModel(BertConfig(vocab_size=len(make_tokenizer()), **size, max_position_embeddings=LENGTH))
    before.save_pretrained(tmp_path / "encoder")
    _, out = run(encoder=str(tmp_path / "encoder"), steps=3, learning_rate=1e-5, dropout=0.0)
    after = AutoModelForMaskedLM.from_pretrained(out / "model")
    # A key's bias adds the same to all scores of a row: softmax leaves it no gradient but rounding.
    unmoved = ("token_type_embeddings.weight", "attention.self.key.bias")
    for name, weight in before.named_parameters():
        if not name.startswith("pooler"):
            moved = (after.bert.get_parameter(name) - weight).detach().abs().max()
            assert float(moved) < 1e-3, name
            assert moved > 0 or name.endswith(unmoved), name
    again = AutoModelForSequenceClassification.from_pretrained(out / "model")
    assert torch.equal(again.bert.pooler.dense.weight, before.pooler.dense.weight), "a classifier may want it"
    assert again.config.hidden_dropout_prob == 0.1, "pretrain.dropout is of the pretraining alone"


def test_a_killed_run_goes_on_from_its_checkpoint_and_ends_in_the_same_bits(run: Run, tmp_path: Path) -> None:
    settings = {"checkpoint_seconds": 1e-6, "validations": 3}
    _, calm = run(name="calm", **settings)
    with pytest.raises(KilledError):
        run(Watched(tmp_path / "disturbed", kill_after=7), name="disturbed", **settings)
    _, disturbed = run(Watched(tmp_path / "disturbed"), name="disturbed", **settings)
    calm_history, disturbed_history = history_of(calm), history_of(disturbed)
    assert disturbed_history["losses"] == calm_history["losses"]
    assert disturbed_history["validations"] == calm_history["validations"]
    weights = [load_file(out / "model" / "model.safetensors") for out in (calm, disturbed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_any_number_of_workers_ends_in_the_same_bits(tmp_path: Path, packed: Path) -> None:
    jobs = {workers: _job(tmp_path / f"{workers}", packed) for workers in (1, 2, 3)}
    train_here(jobs[1], 0, 1, None)
    train_on(2, jobs[2], leave_after=5)
    train_on(3, jobs[3])
    train_on(3, jobs[2])
    ends = {workers: torch.load(f"{job.out}/end", weights_only=False) for workers, job in jobs.items()}
    weights = {workers: load_file(f"{job.out}/model/model.safetensors") for workers, job in jobs.items()}
    for workers in (2, 3):
        assert ends[workers]["losses"] == ends[1]["losses"]
        assert all(torch.equal(weights[1][name], weights[workers][name]) for name in weights[1])


def test_shards_learn_what_replicas_do(tmp_path: Path, packed: Path) -> None:
    calm, sharded = (
        _job(tmp_path / "calm", packed, exact=False),
        _job(tmp_path / "fsdp", packed, exact=False, fsdp=True),
    )
    train_here(calm, 0, 1, None)
    train_on(3, sharded)
    ends = [torch.load(f"{job.out}/end", weights_only=False) for job in (calm, sharded)]
    torch.testing.assert_close(ends[0]["losses"], ends[1]["losses"], atol=2e-3, rtol=0)


def _job(out: Path, packed: Path, **settings: Any) -> WorkerJob:
    out.mkdir()
    chosen = PretrainSettings(**(DEFAULTS | {"steps": 12, "precision": "fp32"} | settings))
    feed = feed_over(Prepared(UPath(packed)).index.splits["train"], chosen.lanes, chosen.microbatch, chosen.seed)
    return WorkerJob(
        Pretraining(chosen, UPath(packed)), UPath(out), UPath(out / "work"), feed, 12, 5, None, "toy", "none"
    )


def test_steps_end_a_run_within_an_epoch_and_patience_ends_it_early(run: Run, packed: Path) -> None:
    metrics, out = run(steps=7, validations=3, validation_rows=5)
    assert metrics["steps"] == 7
    assert history_of(out)["validated_at"] == [3, 6, 7]
    prepared = Prepared(UPath(packed))
    feed = feed_over(prepared.index.splits["train"], 4, 4, 0)
    assert compare(feed, prepared, read_ledger(UPath(out)), 7).sentence == "exact"
    metrics, _ = run(name="patient", epochs=20, validations=40, patience=2, learning_rate=1e-12, warmup=0.0)
    assert metrics["stopped_early"]


def test_too_few_texts_for_a_step_are_told(run: Run) -> None:
    with pytest.raises(InputError, match=r"^the texts fill only \d+ rows of 24 tokens, and a step takes 8,000: lower"):
        run(microbatch=2000)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"objective": "clm", "encoder": {"architecture": "modernbert"}},
            "modernbert models do not learn clm; take mlm",
        ),
        ({"encoder": {"architecture": "gpt2"}}, "objective: gpt2 models do not learn mlm; take clm"),
        ({"encoder": {"architecture": "convbert"}}, "would let documents see each other, or padding; take another"),
        (
            {"encoder": {"architecture": "roformer"}, "fsdp": True, "exact": False},
            "^pretrain.fsdp: roformer models would mix the documents of a row",
        ),
        ({"encoder": {"config": {"max_position_embeddings": 8}}}, "^pack.length is 24, .* has only 8 positions"),
        ({"encoder": {"config": {"num_attention_heads": 3}}}, "^pretrain.encoder: bert cannot be made so: .*3"),
    ],
)
def test_what_an_encoder_cannot_do_is_told(settings: dict[str, Any], told: str, run: Run) -> None:
    with pytest.raises((InputError, ValidationError), match=told):
        run(**settings)


def test_numbers_that_do_not_go_together_are_told_before_anything_is_packed() -> None:
    with pytest.raises(InputError, match=r"^pretrain\.encoder: bert cannot be made so"):
        pretrain.externals(PretrainSettings(encoder=ScratchEncoder(config={"num_attention_heads": 3})))
    assert pretrain.externals(PretrainSettings(encoder=ScratchEncoder(architecture="modernbert"))) == {}


def test_a_loss_spike_is_told_with_its_step_and_rows(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0

    def disturbed(logits: torch.Tensor, labels: Any) -> torch.Tensor:
        nonlocal taken
        taken += 1
        return prediction_loss(logits, labels) * (5.0 if taken // DEFAULTS["lanes"] == 25 else 1.0)

    monkeypatch.setattr(pretraining, "prediction_loss", disturbed)
    told: list[str] = []
    run(told=told, validations=1)
    spike = told[0]
    assert re.match(r"loss spike at epoch 1, step \d+: \d+\.\d+, where \d\.\d+ is usual \(rows (\d+, )+\d+\)$", spike)


def test_spikes_are_far_above_what_is_usual() -> None:
    spikes = Spikes()
    assert [spikes.above(4.0 + 0.1 * (step % 5)) for step in range(100)] == [None] * 100
    assert spikes.above(4.9) is None, "within what noise may do: 8 deviations, and a tenth"
    assert spikes.above(9.0) == pytest.approx(4.2)
    assert spikes.above(4.2) is None
