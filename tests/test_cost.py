"""What the layer costs, where that is exact: multiplications and kept numbers. Times are in bench_smoa.py, which asserts nothing."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import smoa

m, n, T, K, r = 96, 64, 40, 4, 8


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def layer(**options):
    return smoa.SMoALinear(nn.Linear(n, m), r, K, **options)


def test_forward_multiplies_the_input_once_as_the_base_does():
    adapted, x = layer(), torch.randn(T, n)
    build = 2 * m * n * r  # B A, which no token pays for
    assert (
        flops(lambda: adapted(x)) == flops(lambda: adapted.base(x)) + build == 2 * T * m * n + build
    )


def test_merged_forward_is_the_base_forward():
    adapted, x = layer(), torch.randn(T, n)
    adapted.merge()
    assert flops(lambda: adapted(x)) == flops(lambda: adapted.base(x))


@pytest.mark.parametrize("lean", [True, False])
def test_lean_backward_forms_one_kth_of_the_weight_gradient(lean, monkeypatch):
    monkeypatch.setattr(smoa, "_PLAIN_UP_TO", 0 if lean else 10**9)
    adapted, x = layer(), torch.randn(T, n, requires_grad=True)
    y = adapted(x)
    input_gradient = 2 * T * m * n
    weight_gradient = 2 * T * m * n // (K if lean else 1)
    small = (
        flops(lambda: y.sum().backward()) - input_gradient - weight_gradient
    )  # products with the factors, which no token pays for
    assert 0 < small <= 2 * (2 * m * n * r)


def test_layer_keeps_factors_and_orders_and_nothing_of_the_size_of_the_weight():
    adapted = layer()
    adapted(torch.randn(T, n)).sum().backward()
    kept = sum(t.numel() for t in [*adapted.parameters(), *adapted.buffers()]) - sum(
        p.numel() for p in adapted.base.parameters()
    )
    assert kept == smoa.count_parameters(m, n, r, K) + m + n


def test_merged_layer_keeps_only_the_blocks_that_it_replaced():
    adapted = layer()
    adapted.merge()
    assert sum(M_k.numel() for M_k in adapted._replaced) == m * n // K
    adapted.unmerge()
    assert adapted._replaced is None
