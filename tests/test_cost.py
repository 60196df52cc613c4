"""What the layer costs, where that is exact: multiplications and kept numbers.

Times are in bench_smoa.py, which asserts nothing.
"""

import io
import zipfile

import pytest
import torch
import torch.nn.functional as F
from strategies import HALVES, kept_for_backward
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import smoa

m, n, T, K, r = 96, 64, 40, 4, 8
FLOAT32, INT64 = 4, 8  # bytes


def flops(function, *args):
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


class KernelCounter(TorchDispatchMode):
    """Counts the operations that compute something; a view of a tensor is none."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **kwargs or {})


def kernels_of_a_step(base, K):
    adapted = smoa.SMoALinear(base, 2 * K, K)
    x = torch.randn(T, n, dtype=base.weight.dtype, requires_grad=True)
    with KernelCounter() as counter:
        adapted(x).backward(torch.ones(T, m, dtype=x.dtype))
    return counter.count


def stored_bytes(module):
    """The bytes of all tensors that a module holds, in whatever attribute, each storage once."""
    file = io.BytesIO()
    torch.save(module, file)
    entries = zipfile.ZipFile(file).infolist()
    return sum(entry.file_size for entry in entries if "/data/" in entry.filename)


def layer(**options):
    return smoa.SMoALinear(nn.Linear(n, m), r, K, **options)


def test_forward_multiplies_the_input_once_as_the_base_does():
    adapted = layer()
    x = torch.randn(T, n)
    build = 2 * m * n * r  # B A, which no token pays for
    assert flops(adapted.base, x) == 2 * T * m * n
    assert flops(adapted, x) == 2 * T * m * n + build


def test_merged_forward_is_the_base_forward():
    adapted = layer()
    x = torch.randn(T, n)
    adapted.merge()
    assert flops(adapted, x) == flops(adapted.base, x)


def test_lean_backward_forms_one_kth_of_the_weight_gradient(way):
    adapted = layer()
    x = torch.randn(T, n, requires_grad=True)
    loss = adapted(x).sum()
    input_gradient = 2 * T * m * n
    weight_gradient = 2 * T * m * n // (K if way == "lean" else 1)
    # What is left are products with the factors, which no token pays for.
    small = flops(loss.backward) - input_gradient - weight_gradient
    assert 0 < small <= 2 * (2 * m * n * r)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_blocks_take_no_more_kernels_where_they_are_small_and_of_one_shape(dtype):
    base = nn.Linear(n, m, dtype=dtype)
    few, many = (kernels_of_a_step(base, K) for K in (2, 32))
    assert many == few


def test_layer_keeps_factors_and_orders_and_nothing_of_the_size_of_the_weight():
    adapted = layer()
    adapted(torch.randn(T, n)).sum().backward()
    factors = FLOAT32 * smoa.count_parameters(m, n, r, K)
    orders = INT64 * (m + n)
    assert stored_bytes(adapted) - stored_bytes(adapted.base) == factors + orders


def test_merged_layer_keeps_only_the_blocks_that_it_replaced():
    adapted = layer()
    before = stored_bytes(adapted)
    adapted.merge()
    assert stored_bytes(adapted) - before == FLOAT32 * m * n // K
    adapted.unmerge()
    assert stored_bytes(adapted) == before


class LoRA(nn.Module):
    """x W0^T + x A^T B^T beside a frozen base, as its paper has it."""

    def __init__(self, base, rank, dropout):
        super().__init__()
        m, n = base.weight.shape
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, n))
        self.B = nn.Parameter(torch.zeros(m, rank))
        self.dropout = dropout

    def forward(self, x):
        z = F.dropout(x, self.dropout)
        z = F.linear(z, self.A.to(x.dtype))
        return self.base(x) + F.linear(z, self.B.to(x.dtype))


def kept_over(module, dtype):
    """Bytes for the backward of a half-precision module, or of a float32 one under autocast."""
    x = torch.randn(64, module.base.in_features, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        y, kept = kept_for_backward(module, x)
    assert y.dtype in HALVES
    return kept


@pytest.mark.parametrize("K", [2, 4, 8])
@pytest.mark.parametrize("m, n", [(768, 192), (192, 768)])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_half_precision_keeps_for_the_backward_what_lora_does_and_a_tenth_of_the_weights(
    K, m, n, dtype, dropout
):
    base = nn.Linear(n, m, dtype=dtype)
    lora = LoRA(base, rank=8, dropout=dropout)
    adapted = smoa.SMoALinear(base, 8 * K, K, dropout=dropout)
    weights = m * n * 2  # bytes in half precision
    assert kept_over(adapted, dtype) <= kept_over(lora, dtype) + 0.1 * weights
