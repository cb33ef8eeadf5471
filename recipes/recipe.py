"""The recipe: what a user asks for, from raw text to the endpoint, in one validated document."""

from pathlib import PurePosixPath

from pydantic import Field, model_validator

from models.architectures import ScratchEncoder
from models.settings import InputError, Settings, execution
from pipelines.evaluate import EvaluateSettings
from pipelines.export import ExportSettings
from pipelines.finetune import FinetuneSettings
from pipelines.metrics import metric_problem
from pipelines.pack import PackSettings
from pipelines.prepare import PrepareSettings
from pipelines.preparing.data import DataSettings, split_name
from pipelines.preparing.formats import EXTENSIONS
from pipelines.preparing.sources import references
from pipelines.pretrain import PretrainSettings
from pipelines.pretrained import PRETRAINED
from pipelines.sweep import SweepSettings, space_problem
from serve.settings import ServeSettings


class Recipe(Settings):
    """A recipe. Every value has a default but the data, its labels and the encoder."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="Names the model; lower case, digits, - and _.")
    store: str = execution("shoal-store", description="Where artifacts live: a folder, or s3://BUCKET/PREFIX.")
    data: DataSettings
    pack: PackSettings | None = None
    pretrain: PretrainSettings | None = None
    prepare: PrepareSettings = PrepareSettings()
    sweep: SweepSettings | None = None
    finetune: FinetuneSettings
    evaluate: EvaluateSettings = EvaluateSettings()
    export: ExportSettings | None = Field(
        ExportSettings(), description="As ONNX, for replicas without a GPU; null leaves it out."
    )
    serve: ServeSettings = ServeSettings()

    @model_validator(mode="after")
    def _parts_agree(self) -> "Recipe":
        if not self.data.labels:
            raise ValueError("data.labels: name at least one column to predict")
        self._encoders_and_tokenizers_agree()
        given = self._may_have_validation()
        if self.prepare.validation_share == 0 and not given:
            raise ValueError(
                "prepare.validation_share: must be above 0, as the best epoch is chosen on rows not trained on"
            )
        for section, training in (("pretrain", self.pretrain), ("finetune", self.finetune)):
            if training and training.workers.max > training.lanes:
                raise ValueError(
                    f"{section}.workers: {training.workers.max} workers need as many lanes, but {section}.lanes is "
                    f"{training.lanes}"
                )
        if self.export is None and self.serve.engine == "onnx":
            raise ValueError("serve.engine: is onnx, but export is null, so that nothing is exported")
        if self.sweep and (problem := space_problem(self.sweep, self.finetune)):
            raise ValueError(problem)
        if missing := set(self.evaluate.slices) - set(self.data.columns):
            raise ValueError(f"evaluate.slices: {', '.join(sorted(missing))} is not kept by data.columns")
        columns = {label.column: label.multi for label in self.data.labels}
        named = [("finetune.metric", self.finetune.metric), *(("evaluate.gate", name) for name in self.evaluate.gate)]
        for setting, name in named:
            if problem := metric_problem(name, columns):
                raise ValueError(f"{setting}: {problem}")
        return self

    def _encoders_and_tokenizers_agree(self) -> None:
        encoder = self.finetune.encoder
        own = encoder == PRETRAINED
        if own and self.pretrain is None:
            raise ValueError("finetune.encoder: the recipe has no pretrain section to take the encoder from")
        if self.evaluate.without_pretraining and not own:
            raise ValueError("evaluate.without_pretraining: there is no pretraining; set finetune.encoder to pretrain")
        if isinstance(encoder, ScratchEncoder) and self.prepare.tokenizer is None:
            raise ValueError("prepare.tokenizer: an encoder from scratch needs one, for example {vocabulary: 8000}")
        if isinstance(encoder, str) and self.prepare.tokenizer is not None:
            whose = "the pretraining" if own else "a pretrained encoder"
            raise ValueError(f"prepare.tokenizer: {whose} brings its own; leave this out")
        if (self.pack is None) != (self.pretrain is None):
            given, missing = ("pack", "pretrain") if self.pack else ("pretrain", "pack")
            what = "the texts to learn from" if self.pretrain else "what is learnt from them"
            raise ValueError(f"{missing}: {given} needs this section too, which says {what}")
        if self.pack is None or self.pretrain is None:
            return
        if not own:
            raise ValueError(
                "finetune.encoder: the recipe pretrains an encoder, but this is another; set it to pretrain, or leave "
                "out pack and pretrain"
            )
        if isinstance(self.pretrain.encoder, str):
            if self.pack.tokenizer is not None:
                raise ValueError("pack.tokenizer: an encoder that goes on learning brings its own; leave this out")
            return
        if self.pack.tokenizer is None:
            raise ValueError("pack.tokenizer: an encoder from scratch needs one, for example {vocabulary: 8000}")
        if self.prepare.max_length > self.pack.length:
            raise ValueError(
                f"prepare.max_length: is {self.prepare.max_length}, but the encoder is pretrained on rows of "
                f"{self.pack.length} tokens (pack.length) and knows no longer ones"
            )

    def _may_have_validation(self) -> bool:
        """Whether the data may come with a validation split; what has none is told when it has been looked at."""
        try:
            given = references(self.data)
        except InputError as error:
            raise ValueError(str(error)) from error
        return self.data.split is not None or any(
            # A folder or a hub dataset may bring its own, whatever its name.
            split_name(split or "") == "validation" or PurePosixPath(source).suffix.lower() not in EXTENSIONS
            for split, source in given
        )
