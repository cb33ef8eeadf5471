"""How the endpoint answers and scales."""

from typing import Literal

from pydantic import Field, model_validator

from models.redaction import RedactionSettings
from models.settings import Precision, Settings
from serve.drift import DriftSettings
from serve.sampling import SampleSettings
from serve.security_settings import ExposureSettings


class AbstainSettings(Settings):
    """Where the endpoint gives no answer: below a threshold on the calibrated probability of the likeliest class."""

    below: float | None = Field(None, gt=0, lt=1, description="The threshold.")
    accuracy: float | None = Field(
        None, gt=0, le=1, description="In its place: how often answers are to be right, as measured in validation."
    )
    label: str | None = Field(None, min_length=1, description="What is answered in place of a class; null by default.")

    @model_validator(mode="after")
    def _one_of_them(self) -> "AbstainSettings":
        if (self.below is None) == (self.accuracy is None):
            raise ValueError("needs one of below and accuracy, for example {accuracy: 0.95}")
        return self


class ServeSettings(ExposureSettings):
    """The endpoint's address, who may ask it, its limits and scaling."""

    min_replicas: int = Field(
        1, ge=0, description="Replicas kept when idle. With 0 the endpoint comes to rest, and a request wakes it."
    )
    max_replicas: int = Field(4, ge=1, description="Replicas under load.")
    target_wait_s: float = Field(
        0.5, gt=0, description="Seconds in which autoscaling wants what waits to be computed, as far as can be told."
    )
    target_busy: float = Field(
        0.7, gt=0, le=1, description="The share of its time that autoscaling lets a replica compute."
    )
    upscale_delay_s: float = Field(5.0, ge=0, description="Seconds of load before replicas are added.")
    downscale_delay_s: float = Field(60.0, ge=0, description="Seconds of calm before replicas are removed.")
    rest_after_s: float = Field(
        300.0, ge=0, description="Seconds without a request before the last replica is removed, if min_replicas is 0."
    )
    drain_s: float = Field(20.0, ge=0, description="Seconds a replica has to finish its requests when it is removed.")
    engine: Literal["auto", "torch", "onnx"] = Field(
        "auto", description="What computes; auto takes torch on a GPU, else the export where there is one."
    )
    cpus: float = Field(
        1,
        gt=0,
        description="CPUs of a replica, rounded to its engine's threads: in ONNX each computes a text of its own, with "
        "one set of weights for all; in torch they share in each batch.",
    )
    gpus: float = Field(0, ge=0, description="GPUs of a replica.")
    precision: Precision = Field(
        "bf16", description="What torch computes in; where a GPU has no bf16, fp16, and fp32 where a CPU has none."
    )
    compile: bool = Field(
        False,
        description="Compile the encoder's layers (torch.compile) before a replica is ready; needs g++. On a CPU "
        "single texts took 8% longer and batches as long as without; on GPUs it has not been measured.",
    )
    batch_tokens: int = Field(
        4096, ge=16, description="Tokens of one batch at most, padding included where there is any."
    )
    max_texts: int = Field(256, ge=1, description="Texts of one request at most.")
    max_body_bytes: int = Field(2_000_000, ge=1024, description="Bytes of a request's body at most.")
    body_timeout_s: float = Field(10.0, gt=0, description="Seconds a client has to send its body.")
    max_queued: int = Field(512, ge=1, description="Requests in progress at a replica at most; beyond them, 429.")
    max_wait_s: float = Field(
        2.0, gt=0, description="Seconds that a request may have to wait for others, as far as can be told; beyond, 429."
    )
    long_texts: Literal["truncate", "mean", "max"] = Field(
        "truncate",
        description="Of texts longer than the model reads: the beginning only, or windows over all of them, of whose "
        "outputs the mean or the largest counts.",
    )
    abstain: AbstainSettings | None = Field(
        None, description="Where no class is answered; single-label columns only. By default the likeliest always is."
    )
    max_windows: int = Field(16, ge=2, description="Windows of one text at most.")
    explain: bool = Field(True, description="Whether there is /v1/explain: which words of a text speak for a label.")
    explain_queue: int = Field(
        4, ge=0, description="Explanations that wait at a replica at most, while one is computed; beyond them, 429."
    )
    ensemble: tuple[str, ...] = Field(
        (),
        description="Registered versions (NAME@ALIAS or NAME:NUMBER) that answer together with the one served: the "
        "mean of their probabilities counts. They have the same labels and tokenizer; there is no /v1/explain then.",
    )
    models: dict[str, str] = Field(
        {},
        description="Other registered models (NAME, NAME@ALIAS or NAME:NUMBER) by the name they get in "
        "/models/NAME/...; aliases are followed.",
    )
    models_per_replica: int = Field(
        4, ge=1, description="Versions that one of the replicas for other models holds; the least recently used goes."
    )
    drift: DriftSettings = Field(DriftSettings(), description="How texts are compared with the evaluation's.")
    log_requests: Literal["none", "errors", "all"] = Field(
        "errors",
        description="Which requests have a line in the log: none; those that failed (500 and above), were refused for "
        "want of room or by a rate (429), or of the right to ask (401, 403); or all, health checks among them.",
    )
    redact: RedactionSettings | None = Field(
        None,
        description="Masks personal data in texts to classify and to explain, besides what the classifier was trained "
        "with; {} masks all kinds.",
    )
    sample: SampleSettings | None = Field(
        None, description="Keeps some requests with their answers, masked, in the store; by default none."
    )

    @model_validator(mode="after")
    def _parts_agree(self) -> "ServeSettings":
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas is {self.min_replicas}, more than max_replicas, {self.max_replicas}")
        if self.engine == "onnx" and self.compile:
            raise ValueError("engine is onnx, which is not compiled; set compile to false, or engine to torch")
        if self.engine == "onnx" and self.gpus > 0:
            raise ValueError("engine is onnx, which computes on CPUs; set gpus to 0, or engine to torch")
        return self
