"""How the endpoint answers and scales."""

from typing import Literal

from pydantic import Field, model_validator

from models.settings import Precision
from serve.security_settings import ExposureSettings


class ServeSettings(ExposureSettings):
    """The endpoint's address, who may ask it, its limits and scaling."""

    min_replicas: int = Field(1, ge=1, description="Replicas kept when idle.")
    max_replicas: int = Field(4, ge=1, description="Replicas under load.")
    target_requests: float = Field(8, gt=0, description="Requests in progress per replica that autoscaling aims at.")
    upscale_delay_s: float = Field(5.0, ge=0, description="Seconds of load before replicas are added.")
    downscale_delay_s: float = Field(60.0, ge=0, description="Seconds of calm before replicas are removed.")
    drain_s: float = Field(20.0, ge=0, description="Seconds a replica has to finish its requests when it is removed.")
    engine: Literal["auto", "torch", "onnx"] = Field(
        "auto", description="What computes; auto takes torch on a GPU, else the export where there is one."
    )
    cpus: float = Field(1, gt=0, description="CPUs of a replica, and threads of its engine.")
    gpus: float = Field(0, ge=0, description="GPUs of a replica.")
    precision: Precision = Field(
        "bf16", description="What torch computes in; where a GPU has no bf16, fp16, and fp32 where a CPU has none."
    )
    batch_tokens: int = Field(4096, ge=16, description="Tokens, padding included, of one batch at most.")
    max_texts: int = Field(256, ge=1, description="Texts of one request at most.")
    max_body_bytes: int = Field(2_000_000, ge=1024, description="Bytes of a request's body at most.")
    body_timeout_s: float = Field(10.0, gt=0, description="Seconds a client has to send its body.")
    max_queued: int = Field(512, ge=1, description="Requests in progress at a replica at most; beyond them, 429.")

    @model_validator(mode="after")
    def _parts_agree(self) -> "ServeSettings":
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas is {self.min_replicas}, more than max_replicas, {self.max_replicas}")
        if self.engine == "onnx" and self.gpus > 0:
            raise ValueError("engine is onnx, which computes on CPUs; set gpus to 0, or engine to torch")
        return self
