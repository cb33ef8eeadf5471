"""What processes that train on CPUs take their memory from: the jemalloc that Ray brings along, with huge pages.

A training step makes and drops hundreds of tensors of ever other sizes. glibc gives much of that memory back to the
system, which has to clear it before the next step may have it again: of a small model's step that can take an eighth.
jemalloc (Evans 2006) keeps it for a while, which PyTorch's tuning guide advises too. Not for ever, as that guide has
it: what is never given back is hardly ever joined to larger pieces either, and now and then a process that goes on for
minutes then takes ever more.
"""

import os
from pathlib import Path

import ray

_JEMALLOC = Path(ray.__file__).parent / "core" / "libjemalloc.so"
_KEPT = "thp:always,metadata_thp:auto,dirty_decay_ms:10000,muzzy_decay_ms:10000,oversize_threshold:0"
_KERNELS = 16_384


def training_environment() -> dict[str, str]:
    """Environment variables for a worker that trains on a CPU; they must be there when its process starts.

    On a node where Ray is installed in another folder the loader leaves a line in the worker's log and uses glibc's
    memory. Who preloads a library already is left alone.
    """
    # oneDNN compiles a kernel for each shape, and forgets all but 1,024: a transformer has thirty for each length.
    kernels = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(_KERNELS)}
    if "LD_PRELOAD" in os.environ or not _JEMALLOC.exists():
        return kernels
    return {**kernels, "LD_PRELOAD": str(_JEMALLOC), "MALLOC_CONF": _KEPT}
