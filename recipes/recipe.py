"""The recipe: what a user asks for, from raw text to the endpoint, in one validated document."""

from pathlib import PurePosixPath

from pydantic import Field, model_validator

from models.settings import InputError, Settings, execution
from pipelines.evaluate import EvaluateSettings
from pipelines.finetune import FinetuneSettings, ScratchEncoder
from pipelines.metrics import metric_problem
from pipelines.prepare import PrepareSettings
from pipelines.preparing.data import DataSettings, split_name
from pipelines.preparing.formats import EXTENSIONS
from pipelines.preparing.sources import references
from serve.settings import ServeSettings


class Recipe(Settings):
    """A recipe. Every value has a default but the data, its labels and the encoder."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="Names the model; lower case, digits, - and _.")
    store: str = execution("shoal-store", description="Where artifacts live: a folder, or s3://BUCKET/PREFIX.")
    data: DataSettings
    prepare: PrepareSettings = PrepareSettings()
    finetune: FinetuneSettings
    evaluate: EvaluateSettings = EvaluateSettings()
    serve: ServeSettings = ServeSettings()

    @model_validator(mode="after")
    def _parts_agree(self) -> "Recipe":
        if not self.data.labels:
            raise ValueError("data.labels: name at least one column to predict")
        if isinstance(self.finetune.encoder, ScratchEncoder) and self.prepare.tokenizer is None:
            raise ValueError("prepare.tokenizer: an encoder from scratch needs one, for example {vocabulary: 8000}")
        if isinstance(self.finetune.encoder, str) and self.prepare.tokenizer is not None:
            raise ValueError("prepare.tokenizer: a pretrained encoder brings its own; leave this out")
        given = self._may_have_validation()
        if self.prepare.validation_share == 0 and not given:
            raise ValueError(
                "prepare.validation_share: must be above 0, as the best epoch is chosen on rows not trained on"
            )
        if self.finetune.workers.max > self.finetune.lanes:
            raise ValueError(
                f"finetune.workers: {self.finetune.workers.max} workers need as many lanes, but finetune.lanes is "
                f"{self.finetune.lanes}"
            )
        if missing := set(self.evaluate.slices) - set(self.data.columns):
            raise ValueError(f"evaluate.slices: {', '.join(sorted(missing))} is not kept by data.columns")
        columns = {label.column: label.multi for label in self.data.labels}
        named = [("finetune.metric", self.finetune.metric), *(("evaluate.gate", name) for name in self.evaluate.gate)]
        for setting, name in named:
            if problem := metric_problem(name, columns):
                raise ValueError(f"{setting}: {problem}")
        return self

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
