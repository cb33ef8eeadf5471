"""pretrain: a language model learns from packed texts (Ray Train), exactly, on however many workers.

From scratch, or as an existing encoder that goes on learning on one's own domain (Gururangan et al. 2020, "Don't Stop
Pretraining", arXiv 2004.10964). Its model loads with `AutoModel.from_pretrained`, and `finetune.encoder: pretrain`
goes on from it.
"""

from typing import Any, Self

import torch
from pydantic import Field, model_validator
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, PreTrainedTokenizerFast

from models.architectures import ScratchEncoder, scratch_config
from models.language import ObjectiveName
from models.pretraining import check_objective, fresh_model, objective_problem
from models.settings import InputError
from pipelines.prepared import Prepared
from pipelines.pretrained import encoder_folder, encoder_identity
from pipelines.stage import Task
from pipelines.training.history import how_it_ran, told_precision, write_history
from pipelines.training.lanes import feed_over
from pipelines.training.pretraining import Pretraining
from pipelines.training.report import write_pretraining_report
from pipelines.training.settings import TrainingSettings
from pipelines.training.worker import WorkerJob
from pipelines.training.workers import Outcome, train

NAME = "pretrain"
FORMAT = 1

_PLACEHOLDER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "word": 3}, unk_token="word")),
    pad_token="[PAD]",
    cls_token="[CLS]",
    sep_token="[SEP]",
)
"""Stands for the tokenizer that is not made yet."""


class PretrainSettings(TrainingSettings):
    """How the language model learns."""

    encoder: str | ScratchEncoder = Field(
        description="A folder, `package://NAME/PATH` or hub id of an encoder that goes on learning, or the shape of a "
        "fresh one."
    )
    objective: ObjectiveName = Field(
        "mlm", description="What is predicted: masked tokens (BERT), next tokens (GPT: clm), or dropped spans (T5)."
    )
    rate: float = Field(0.15, gt=0, lt=1, description="Share of the tokens that are masked or dropped.")
    epochs: int = Field(1, ge=1, description="Passes over the rows, where `steps` does not say how long.")
    steps: int | None = Field(None, ge=1, description="Optimizer steps.")
    validations: int = Field(10, ge=1, description="How often the validation loss is measured, evenly over the run.")
    validation_rows: int = Field(
        2048, ge=1, description="Rows that each of them measures, of those that are not trained on."
    )
    patience: int | None = Field(None, ge=1, description="Validations without a lower loss before stopping.")
    microbatch: int = Field(16, ge=1, description="Rows in one lane of a step.")
    learning_rate: float = Field(5e-4, gt=0, description="The peak learning rate.")

    @model_validator(mode="after")
    def _learns_the_objective(self) -> Self:
        known = self.encoder.architecture if isinstance(self.encoder, ScratchEncoder) else None
        if known and (problem := objective_problem(self.objective, known)):
            raise ValueError(f"objective: {problem}")
        return self


def externals(settings: PretrainSettings) -> dict[str, str]:
    """The identity of the weights that go on learning; none where they are fresh.

    Raises:
        InputError: there is no encoder where the settings say, or it cannot learn the objective.
    """
    if isinstance(settings.encoder, ScratchEncoder):
        with torch.device("meta"):  # Weights nowhere: the numbers are only to be found to go together.
            fresh_model(settings.objective, scratch_config(settings.encoder, _PLACEHOLDER, 64, NAME))
        return {}
    with encoder_folder(settings.encoder, NAME) as folder:
        try:
            check_objective(settings.objective, AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"pretrain.encoder: {settings.encoder} has no config that can be read.") from error
    return {"encoder": encoder_identity(settings.encoder, section="pretrain")}


def run(task: Task) -> dict[str, Any]:
    """Trains into `task.out`: `model/`, `history.json`, `ledger.parquet`, `tensorboard/`, `report.html`.

    Raises:
        InputError: the texts are too few for a step, the encoder cannot learn the objective, or training diverged.
        ClusterError: workers were lost more often than `max_failures`, or nothing more can be written.
    """
    settings: PretrainSettings = task.settings
    packed = Prepared(task.inputs["pack"].path)
    split = packed.index.splits["train"]
    if split.rows < (batch := settings.lanes * settings.microbatch):
        raise InputError(
            f"the texts fill only {split.rows:,} rows of {packed.index.max_length} tokens, and a step takes {batch:,}: "
            "lower pretrain.lanes, pretrain.microbatch or pack.length, or give more texts."
        )
    feed = feed_over(split, settings.lanes, settings.microbatch, settings.seed)
    steps = settings.steps or settings.epochs * feed.steps
    job = WorkerJob(
        lesson=Pretraining(settings, packed.folder),
        out=task.out,
        work=task.work,
        feed=feed,
        steps=steps,
        validate_every=-(-steps // settings.validations),
        patience=settings.patience,
        recipe=task.recipe,
        fingerprint=task.out.name,
        unit="tokens",
        tell_spikes=True,
    )
    outcome = train(job, task.progress)
    state = outcome.state
    history = write_history(task.out, outcome, feed)
    best = state.validations[state.best_validation]
    utilization = _utilization(outcome)
    metrics = {
        "objective": settings.objective,
        "steps": len(state.losses),
        "steps_taken": state.taken,
        "epochs": round(state.taken / feed.steps, 3),
        "tokens_trained": state.tokens,
        "stopped_early": state.stopped_early,
        "perplexity": round(best["perplexity"], 2),
        "final_loss": state.losses[-1],
        "tokens_per_second": round(state.tokens_per_second, 1),
        **({"flops_utilization": round(utilization, 4)} if utilization else {}),
        "documents_apart": "apart" in state.cost,
        "padding_share": round(state.padding_share, 6),
        **how_it_ran(outcome, exact=settings.exact),
        "skipped_rows": sum(len(each["rows"]) for each in state.skipped),
        **{f"validation.{name}": value for name, value in best.items()},
    }
    write_pretraining_report(task.out, task.recipe, history, metrics, outcome.groups)
    task.progress.table(
        "",
        [
            ("tokens trained on", f"{state.tokens:,}"),
            ("training tokens/s", f"{state.tokens_per_second:,.0f}"),
            *([("model FLOPs utilization", f"{utilization:.0%}")] if utilization else []),
            ("computed in", told_precision(settings.precision, state.precision)),
            *([("documents", "one by one: these models would mix those of a row")] if "apart" in state.cost else []),
            ("validation loss", f"{best['loss']:.4f}"),
            ("perplexity", f"{best['perplexity']:,.1f}"),
            ("bits per byte", f"{best['bits_per_byte']:.4f}"),
        ],
    )
    return metrics


def _utilization(outcome: Outcome) -> float | None:
    """Share of the devices' arithmetic that the model's products took; None where the devices' is not known."""
    cost = outcome.state.cost
    if "peak_flops" not in cost or not outcome.state.worker_seconds:
        return None
    return outcome.state.tokens * cost["flops_per_token"] / (cost["peak_flops"] * outcome.state.worker_seconds)
