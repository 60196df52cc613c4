"""What a card does in its own way: `pytest -m gpu`, a minute. Skipped where there is none."""

import copy

import pytest
import torch
from nets import adapted, bits, both_sizes, normal
from strategies import HALVES

import smoa

CUDA, MPS = torch.cuda.is_available(), torch.backends.mps.is_available()
DEVICE = "cuda" if CUDA else "mps"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not (CUDA or MPS), reason="there is no card")]
cuda_only = pytest.mark.skipif(not CUDA, reason="there is no cuda")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, *HALVES])


def step(model, x, autocast=None):
    """Output and gradients in one vector, on the CPU."""
    model.zero_grad()
    with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
        y = model(x.to(next(model.parameters()).device))
    (y.float() * normal(*y.shape, seed=5).to(y.device)).sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    return torch.cat([part.detach().cpu().double().flatten() for part in (y, *grads)])


@both_sizes
@dtypes
def test_a_card_computes_what_the_cpu_does(dtype, size):
    model, x = adapted(size), normal(20, size, seed=3)
    exact = step(model, x)
    there = copy.deepcopy(model).to(DEVICE)
    error = [step(there.to(dtype), x.to(dtype)) - exact]
    if dtype != torch.float32 and CUDA:
        error.append(step(copy.deepcopy(model).to(DEVICE), x, autocast=dtype) - exact)
    allowed = 30 * torch.finfo(dtype).eps * exact.norm()  # TF32 is off by default
    assert all(each.norm() < allowed for each in error)


@both_sizes
@dtypes
def test_a_merged_model_moves_between_devices(dtype, size):
    model = adapted(size, dtype=dtype).eval()
    before = bits(model.first.base.weight)
    smoa.merge(model.to(DEVICE))
    model.to("cpu").to(DEVICE)
    assert model.first.row_order.device.type == DEVICE
    smoa.unmerge(model)
    assert bits(model.first.base.weight.cpu()) == before


@cuda_only
@both_sizes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_graph_replays_the_step(dtype, size):
    layer, x = adapted(size, dtype=dtype).first.to(DEVICE), normal(20, size, seed=3, dtype=dtype)
    x = x.to(DEVICE)
    captured = torch.cuda.make_graphed_callables(copy.deepcopy(layer), (x,))
    for scale in (1.0, 1.5):  # the second time with other factors
        for p in [*captured.parameters(), *layer.parameters()]:
            p.data.mul_(scale)
        found, exact = step(captured, x), step(layer, x)
        assert (found - exact).norm() < 10 * torch.finfo(dtype).eps * exact.norm()
