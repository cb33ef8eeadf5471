"""LitServe with its own batching, as its documentation has it; runs in a venv of its own."""

import os
import sys

import litserve
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


class Classifier(litserve.LitAPI):
    """A classifier; requests are {"texts": [...]}."""

    def setup(self, device: str) -> None:
        torch.set_num_threads(1)
        self.tokenizer = AutoTokenizer.from_pretrained(os.environ["MODEL"])
        self.model = AutoModelForSequenceClassification.from_pretrained(os.environ["MODEL"]).eval()

    def decode_request(self, request: dict) -> list[str]:
        return request["texts"]

    def batch(self, inputs: list[list[str]]) -> list[list[str]]:
        return inputs

    def predict(self, batch: list[list[str]]) -> list[list[list[float]]]:
        texts = [text for request in batch for text in request]
        encoded = self.tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        with torch.inference_mode():
            rows = self.model(**encoded).logits.softmax(-1).tolist()
        answers = []
        for request in batch:
            answers.append(rows[: len(request)])
            rows = rows[len(request) :]
        return answers

    def unbatch(self, output: list[list[list[float]]]) -> list[list[list[float]]]:
        return output

    def encode_response(self, output: list[list[float]]) -> dict:
        return {"probabilities": output}


if __name__ == "__main__":
    api = Classifier(max_batch_size=16, batch_timeout=0.005, api_path="/classify")
    litserve.LitServer(api, accelerator="cpu", workers_per_device=2).run(
        port=int(sys.argv[1]), generate_client_file=False
    )
