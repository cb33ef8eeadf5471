"""bf16 is used where the hardware has it, and what is used is the same on all workers."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from models import precision
from models.precision import agreed, supported
from models.torch_engine import load_torch_engine
from tests.groups import run_group
from tests.small_classifiers import make_classifier

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [({"avx512_bf16": True, "avx2": True}, True), ({"avx512_bf16": False, "avx512_f": True}, False), ({}, False)],
)
def test_a_processor_is_asked_for_its_instructions(
    capabilities: dict[str, bool], fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert supported(CPU, "bf16") is fast
    assert agreed("bf16", CPU) == ("bf16" if fast else "fp32")
    assert agreed("fp32", CPU) == "fp32"
    assert load_torch_engine(make_classifier(tmp_path)).precision == ("bf16" if fast else "fp32")


def _agree(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    precision.supported = lambda device, wanted: wanted == "fp32" or rank == 0
    (Path(folder) / f"{rank}.txt").write_text(agreed("bf16", CPU))
    dist.destroy_process_group()  # Else a thread of Gloo may outlive the interpreter, which aborts the process.


def test_one_worker_without_bf16_takes_all_to_float32(tmp_path: Path) -> None:
    run_group(_agree, (str(tmp_path),), 2)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["fp32", "fp32"]
