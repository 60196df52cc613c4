"""Reach, the energy that the best member of a family holds, against what is known exactly."""

import doctest
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "notebooks"))
import reach as reach_module
from reach import FAMILIES, best_fit, ceiling, family, noise_like, reach, reach_by_start

SHAPES = [(12, 12), (20, 9), (9, 20)]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rescaled(W0, pieces, seed=1):
    """diag(d) W0 diag(e) inside each block, zero outside: d and e differ from block to block."""
    T = torch.zeros_like(W0)
    d, e = draw(W0.shape[0], seed=seed), draw(W0.shape[1], seed=seed + 1)
    for rows, cols in pieces:
        T[rows[:, None], cols] = d[rows, None] * W0[rows[:, None], cols] * e[cols]
    return T


def test_examples_in_the_docstrings_hold():
    assert doctest.testmod(reach_module).failed == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3])
def test_lora_reaches_its_leading_singular_values(shape, rank):
    T, W0 = draw(*shape), draw(*shape, seed=1)
    energy = torch.linalg.svdvals(T).square()
    expected = (energy[:rank].sum() / energy.sum()).item()
    assert reach(T, W0, rank=rank, modulate=False) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_an_anchor_of_ones_makes_the_alternating_fit_meet_the_svd(shape, num_blocks):
    T, ones = draw(*shape), torch.ones(shape)
    options = dict(rank=2 * num_blocks, num_blocks=num_blocks, order="natural")
    exact = reach(T, ones, modulate=False, **options)
    fits = reach_by_start(T, ones, sweeps=2000, tolerance=1e-12, **options)
    assert fits == pytest.approx([exact] * 3, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rescaling_is_within_hira_and_a_rank_one_change_within_lora(shape):
    W0 = draw(*shape)
    rescaling = draw(shape[0], 1, seed=1) * W0 * draw(shape[1], seed=2)
    rank_one = draw(shape[0], 1, seed=3) * draw(shape[1], seed=4)
    assert reach(rescaling, W0, rank=1) > 1 - 1e-5
    assert reach(rank_one, W0, rank=1, modulate=False) > 1 - 1e-12
    assert reach(rescaling, W0, rank=1, modulate=False) < 0.9
    assert reach(rank_one, W0, rank=1) < 0.9


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", ["spectral", "natural"])
def test_a_rescaling_of_its_own_blocks_is_within_smoa(shape, order):
    W0 = draw(*shape)
    T = rescaled(W0, reach_module.blocks(W0, 3, order))
    assert reach(T, W0, rank=3, num_blocks=3, order=order) > 1 - 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_reach_grows_with_the_rank_up_to_the_ceiling(name):
    T, W0 = draw(20, 16), draw(20, 16, seed=1)
    options = [family(name, rho) for rho in (1, 2, 4)]
    where = {key: options[0].get(key, "natural") for key in ("num_blocks", "order")}
    shares = [reach(T, W0, **option) for option in options]
    assert 0 < shares[0] < shares[1] < shares[2] < ceiling(T, W0, **where) + 1e-9


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rank_that_fills_the_blocks_reaches_the_ceiling(name):
    T, W0 = draw(12, 12), draw(12, 12, seed=1)
    options = family(name, 12)
    where = {key: options.get(key, "natural") for key in ("num_blocks", "order")}
    assert reach(T, W0, **options) == pytest.approx(ceiling(T, W0, **where), rel=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_reach_ignores_the_size_of_target_and_weight(name):
    T, W0 = draw(20, 16), draw(20, 16, seed=1)
    options = family(name, 1)
    assert reach(1e-3 * T, 1e3 * W0, **options) == pytest.approx(reach(T, W0, **options), rel=1e-6)


@pytest.mark.parametrize("name", ["HiRA", "SMoA"])
def test_no_member_drawn_at_random_is_closer_than_the_best_one(name):
    T, W0 = draw(12, 10), draw(12, 10, seed=1)
    options = family(name, 1, num_blocks=2)
    best = reach(T, W0, **options)
    for seed in range(50):
        D = rescaled(W0, reach_module.blocks(W0, options["num_blocks"], "spectral"), seed=seed)
        cosine = (T * D).sum() / (T.norm() * D.norm())
        assert cosine.square() <= best + 1e-9


@pytest.mark.parametrize("name", FAMILIES)
def test_the_best_fit_holds_what_reach_says_and_leaves_a_right_angle(name):
    T, W0 = draw(12, 10), draw(12, 10, seed=1)
    options = family(name, 1, num_blocks=2) | dict(sweeps=2000, tolerance=0.0)
    fit = best_fit(T, W0, **options)
    lost = (T - fit).square().sum() / T.square().sum()
    assert reach(T, W0, **options) == pytest.approx(1 - lost.item(), rel=1e-6)
    assert abs((fit * (T - fit)).sum()) < 1e-6 * T.square().sum()


def test_blocks_without_a_branch_hold_nothing():
    T, W0 = draw(12, 12), draw(12, 12, seed=1)
    T[:4, :4] = 0  # all of the only block that has a branch
    assert reach(T, W0, rank=1, num_blocks=3, order="natural") == 0


def test_a_zero_anchor_reaches_nothing_and_stays_finite():
    T, W0 = draw(12, 10), torch.zeros(12, 10)
    assert reach(T, W0, rank=2) == 0


def test_noise_has_the_norm_of_the_weight_it_stands_for():
    W0 = draw(12, 10)
    assert noise_like(W0).norm().item() == pytest.approx(W0.norm().item(), rel=1e-6)
    assert sorted(reach_module.shuffled(W0).flatten()) == sorted(W0.flatten())
