"""Fixtures that all tests share: one Ray cluster, and small models and data made on the spot."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import ray

from cluster.connect import connected

# A slow machine is no failure.
hypothesis.settings.register_profile("shoal", deadline=None)
hypothesis.settings.load_profile("shoal")
# Runs of seconds, with several checkpoints a second: Ray Train takes one at each health check.
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray cluster for the whole test session."""
    with connected("local", cpus=4, object_store_bytes=400_000_000):
        yield
    assert not ray.is_initialized()
