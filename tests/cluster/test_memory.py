"""Training workers have the allocator that Ray brings along, and run without it where it cannot be had."""

from pathlib import Path

import pytest
import ray

from cluster import memory
from cluster.memory import training_environment


@ray.remote
def libraries() -> str:
    import torch

    torch.ones(1_000_000).sum()
    return Path("/proc/self/maps").read_text()


@pytest.mark.usefixtures("ray_session")
def test_a_worker_s_memory_comes_from_jemalloc() -> None:
    given = training_environment()
    if "LD_PRELOAD" not in given:
        pytest.skip("this build of Ray brings no jemalloc, or something else is preloaded")
    assert "libjemalloc" in ray.get(libraries.options(runtime_env={"env_vars": given}).remote())
    # On a node where there is no such file the worker runs all the same.
    elsewhere = given | {"LD_PRELOAD": "/nowhere/libjemalloc.so"}
    assert "libjemalloc" not in ray.get(libraries.options(runtime_env={"env_vars": elsewhere}).remote())


def test_what_is_preloaded_already_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LD_PRELOAD", "libtcmalloc.so")
    assert not {"LD_PRELOAD", "MALLOC_CONF"} & set(training_environment())
    monkeypatch.delenv("LD_PRELOAD")
    monkeypatch.setattr(memory, "_JEMALLOC", tmp_path / "none.so")
    assert not {"LD_PRELOAD", "MALLOC_CONF"} & set(training_environment())
