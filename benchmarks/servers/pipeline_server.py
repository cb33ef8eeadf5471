"""A transformers pipeline behind FastAPI, as tutorials have it; run by uvicorn with a worker for each core."""

import os

import torch
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import pipeline

torch.set_num_threads(1)
classifier = pipeline("text-classification", model=os.environ["MODEL"], device=-1)
app = FastAPI()


class ClassifyRequest(BaseModel):
    """Texts to classify."""

    texts: list[str]


@app.post("/classify")
def classify(request: ClassifyRequest) -> list[dict[str, str | float]]:
    """The label and score of each text."""
    found: list[dict[str, str | float]] = classifier(request.texts, truncation=True, max_length=128)
    return found
