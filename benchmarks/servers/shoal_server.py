"""Shoal's endpoint: python shoal_server.py PORT ENGINE."""

import os
import signal
import sys

from upath import UPath

from cluster.connect import connected
from serve.app import serve_model, stop
from serve.model import ServedModel
from serve.settings import ServeSettings

if __name__ == "__main__":
    port, engine = sys.argv[1:]
    settings = ServeSettings(port=int(port), engine=engine, min_replicas=2, max_replicas=2)
    model = ServedModel("minilm", "bench", UPath(os.environ["MODEL"]), UPath(os.environ["ONNX"]))
    with connected("local", cpus=4):
        serve_model(settings, model)
        try:
            signal.sigwait({signal.SIGTERM, signal.SIGINT})
        finally:
            stop()
