"""Fixed-point sums: the same bits in any order and over any number of workers, and no silent overflow."""

import itertools
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models import fixedpoint, hostsum
from models.fixedpoint import FixedPointSum, FloatSum, GradientOverflowError
from tests.groups import run_group

LANES = 6
ROWS, WIDTH, WORDS = 5, 8, 50


def make_model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"words": nn.Embedding(WORDS, WIDTH, sparse=True), "head": nn.Linear(WIDTH, 3)})


def sums_of(model: nn.ModuleDict) -> FixedPointSum:
    return FixedPointSum(list(model.parameters()), sparse=[model["words"].weight])


def words_of(lane: int) -> torch.Tensor:
    return torch.randint(0, WORDS, (ROWS,), generator=torch.Generator().manual_seed(lane))


def run_lane(model: nn.ModuleDict, lane: int, scale: float = 1.0) -> None:
    """One lane's backward pass: values of very different size, so that float sums depend on the order."""
    loss = (model["head"](model["words"](words_of(lane))) ** 3).sum() * scale * 10.0 ** (lane - 3)
    loss.backward()


def gradients(model: nn.ModuleDict) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(LANES)))
def test_any_order_gives_the_same_bits(order: list[int]) -> None:
    results = []
    for lanes in (range(LANES), order):
        model = make_model()
        sums = sums_of(model)
        for lane in lanes:
            run_lane(model, lane)
        sums.reduce()
        results.append(gradients(model))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_float_sums_do_depend_on_the_order() -> None:
    """Else the test above would show nothing."""
    results = []
    for order in itertools.islice(itertools.permutations(range(LANES)), 0, 720, 60):
        model = make_model()
        sums = FloatSum(list(model.parameters()))
        for lane in order:
            run_lane(model, lane)
        sums.reduce()
        results.append(gradients(model))
    assert not all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_the_sum_is_the_gradient() -> None:
    model, plain = make_model(), make_model()
    sums = sums_of(model)
    for lane in range(LANES):
        run_lane(model, lane)
        run_lane(plain, lane)
    sums.reduce()
    expected = [p.grad.to_dense() for p in plain.parameters() if p.grad is not None]
    for found, wanted in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-9)


def test_release_leaves_nothing_of_the_step_before() -> None:
    model = make_model()
    sums = sums_of(model)
    for _ in range(2):
        run_lane(model, 1)
        sums.reduce()
        found = gradients(model)
        sums.release()
    run_lane(model, 2)
    sums.reduce()
    sums.release()
    run_lane(model, 1)
    sums.reduce()
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(model), strict=True))


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_gradients_are_clipped_together(share: float) -> None:
    """By torch's own norm, whether it is above the limit or below."""
    model, plain = make_model(), make_model()
    sums = sums_of(model)
    run_lane(model, 3)
    sums.reduce()
    for parameter, gradient in zip(plain.parameters(), gradients(model), strict=True):
        parameter.grad = gradient
    before = gradients(plain)
    most = share * float(nn.utils.get_total_norm(before))
    sums.clip(most)
    nn.utils.clip_grad_norm_(plain.parameters(), most)
    for found, wanted, given_ in zip(gradients(model), gradients(plain), before, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-9)
        assert torch.equal(found, given_) == (share > 1)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e12])
def test_what_does_not_fit_is_told_and_forgotten(scale: float) -> None:
    model = make_model()
    sums = sums_of(model)
    run_lane(model, 5, scale)
    with pytest.raises(GradientOverflowError):
        sums.reduce()
    run_lane(model, 1)
    sums.reduce()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model))


def three_steps(model: nn.ModuleDict, sums: FixedPointSum, scale: float, lanes: range) -> list[torch.Tensor]:
    """The gradients of three steps: of those between them and the others, one kind needs 64 bits."""
    found = []
    for each in (scale, 1e-6 / scale, scale):
        for lane in lanes:
            run_lane(model, lane, each)
        sums.reduce()
        found += gradients(model)
        sums.release()
    return found


def _worker(rank: int, workers: int, port: int, scale: float, shared: bool, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    fixedpoint._BUCKET_ELEMENTS = 20
    if not shared:
        hostsum._FOLDER = Path("/nowhere")
    model = make_model()
    found = three_steps(model, sums_of(model), scale, range(rank, LANES, workers))
    torch.save(found, Path(folder) / f"{workers}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "network"])
@pytest.mark.parametrize("scale", [1e-6, 1.0])
def test_any_number_of_workers_gives_the_same_bits(scale: float, shared: bool, tmp_path: Path) -> None:
    """Small sums travel as 32-bit integers, large ones as 64-bit; the result is exact both ways."""
    model = make_model()
    alone = three_steps(model, sums_of(model), scale, range(LANES))
    for workers in (2, 3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        run_group(_worker, (workers, port, scale, shared, str(tmp_path)), workers)
        for rank in range(workers):
            found = torch.load(tmp_path / f"{workers}-{rank}.pt")
            assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))
