"""A plain Ray Serve deployment with @serve.batch, as Ray's documentation has it."""

import os

import torch
from ray import serve
from starlette.requests import Request
from transformers import AutoModelForSequenceClassification, AutoTokenizer


@serve.deployment(num_replicas=2, max_ongoing_requests=64, ray_actor_options={"num_cpus": 1})
class Classifier:
    """A classifier; requests are {"texts": [...]}."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.tokenizer = AutoTokenizer.from_pretrained(os.environ["MODEL"])
        self.model = AutoModelForSequenceClassification.from_pretrained(os.environ["MODEL"]).eval()

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.005)
    async def classify(self, requests: list[list[str]]) -> list[list[list[float]]]:
        """The probabilities of each request's texts."""
        texts = [text for request in requests for text in request]
        encoded = self.tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        with torch.inference_mode():
            rows = self.model(**encoded).logits.softmax(-1).tolist()
        answers = []
        for request in requests:
            answers.append(rows[: len(request)])
            rows = rows[len(request) :]
        return answers

    async def __call__(self, request: Request) -> list[list[float]]:
        """Answers one request."""
        texts = (await request.json())["texts"]
        found: list[list[float]] = await self.classify(texts)
        return found


app = Classifier.bind()

if __name__ == "__main__":
    import sys

    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"port": int(sys.argv[1])})
    serve.run(app, blocking=True)
