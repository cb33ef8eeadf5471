"""Groups of processes that compute together, as training workers do."""

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


def run_group(work: Callable[..., None], arguments: tuple[Any, ...], workers: int) -> None:
    """Runs `work(rank, *arguments)` in that many new processes, to their ends.

    They are forked off a process that has imported what they need, and done nothing else: the import takes seconds.
    """
    multiprocessing.set_forkserver_preload(["pipelines.finetune"])
    mp.start_processes(work, arguments, nprocs=workers, start_method="forkserver")
