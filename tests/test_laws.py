"""The laws of SMoA, each against a formula that is written here a second time.

what the paper claims                   the test that checks it
--------------------------------------  ------------------------------------------------------------
rows and columns are cut into           test_every_row_and_column_is_in_exactly_one_block
  K aligned blocks
the blocks follow the spectrum of W0    test_order_sorts_by_the_positions_of_the_definition
the update is scale (B_k A_k) * M_k     test_update_is_the_dense_formula_and_zero_outside_the_blocks
  on the blocks and 0 elsewhere
y = x (W0 + delta_W)^T + bias           test_forward_is_the_dense_formula
training starts at the base             test_fresh_adapter_changes_no_bit_of_the_output
only the factors are trained            test_only_the_factors_receive_a_gradient
r (m + n) / K parameters,               test_trained_parameters_are_lora_s_over_the_number_of_blocks
  K times fewer than LoRA
rank at most                            test_rank_never_exceeds_the_bound
  sum_k min(m_k, n_k, r_k rank M_k)
which generic factors reach             test_generic_factors_reach_the_rank_bound
LoRA's rank stops at r                  test_lora_s_rank_never_exceeds_r
at equal parameters,                    test_at_equal_parameters_rank_is_never_below_lora_s
  a rank no lower than LoRA's
at equal r, K times fewer parameters    test_at_equal_rank_budget_parameters_fall_and_rank_does_not
  and no lower rank
(where the two claims end)              test_a_zero_anchor_costs_rank
                                        test_the_gain_stops_at_a_block_s_side
                                        test_lopsided_branch_ranks_can_fall_below_lora
the update can reach the whole          test_coverage_of_the_spectrum_adds_up_to_the_rank
  pretrained spectrum
LoRA reaches r directions of it         test_lora_meets_any_set_of_directions_in_rank_r_at_most
it can be merged, at no cost            test_merged_forward_equals_unmerged_forward
  at inference
"""

import doctest
import re
import types
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from strategies import (
    FLOATS,
    HALVES,
    KINDS,
    LinearWithItsOwnForward,
    Net,
    X,
    adapted,
    assert_close,
    batches,
    between,
    bits,
    factors,
    fill,
    generic,
    input_of,
    kept_for_backward,
    layers,
    linear,
    low_rank,
    names_of_factors,
    normal,
    options,
    permutation,
    repeated_singular_values,
    same_orders,
    seeds,
    shapes,
    shapes_and_blocks,
    shapes_of_two_or_more,
    snapshot,
    to_numpy,
    trained_names,
    weights,
    with_spectrum,
    zero_rows_and_columns,
)
from torch import nn

import smoa

# --------------------------------------------------------------------------------------------------
# The oracle, in NumPy and float64: nothing is taken from smoa.py but the factors and the two orders


def aligned_blocks(layer):
    """K triples (k, rows, columns), as np.ix_ wants them."""
    m, n = layer.original_weight().shape
    assert layer.row_order.shape == (m,)
    assert layer.col_order.shape == (n,)
    rows = np.array_split(layer.row_order.numpy(), layer.num_blocks)
    cols = np.array_split(layer.col_order.numpy(), layer.num_blocks)
    return list(zip(range(layer.num_blocks), rows, cols))


def dense_update(layer, W0, absolute=False):
    """delta_W (m, n); with `absolute` over absolute values, the yardstick of rounding errors."""
    take = np.abs if absolute else np.asarray
    W0 = take(to_numpy(W0))
    delta = np.zeros(W0.shape)
    for k, rows, cols in aligned_blocks(layer):
        A_k = take(to_numpy(layer.A[k]))
        B_k = take(to_numpy(layer.B[k]))
        update = layer.alpha / sum(layer.branch_ranks) * (B_k @ A_k)
        if layer.modulate:
            update = update * W0[np.ix_(rows, cols)]
        delta[np.ix_(rows, cols)] = update
    return delta


def rank_of(matrix, rtol=1e-10):
    """Numerical rank in float64.

    Rounding leaves singular values near 1e-15 of the largest. Those of generic draws of this size
    fall below 1e-10 with a probability of about 1e-9: the least singular value of a Gaussian matrix
    has a bounded density at 0.
    """
    return int(torch.linalg.matrix_rank(matrix.detach().double(), rtol=rtol))


def anchors(layer, W0):
    """M_1 .. M_K, by the oracle."""
    return [W0[rows][:, cols] for _, rows, cols in aligned_blocks(layer)]


def sides(layer):
    """min(m_k, n_k) of each block: the rank at which it is full."""
    return [min(len(rows), len(cols)) for _, rows, cols in aligned_blocks(layer)]


def bound(layer, W0):
    """sum_k min(m_k, n_k, r_k rank M_k); without the anchor, rank M_k is replaced by 1."""
    total = 0
    for side, r_k, M_k in zip(sides(layer), layer.branch_ranks, anchors(layer, W0)):
        total += min(side, r_k * (rank_of(M_k) if layer.modulate else 1))
    return total


def even_pieces(total, num_blocks):
    """The sizes of K pieces, as even as can be, the first ones larger."""
    return [len(piece) for piece in np.array_split(range(total), num_blocks)]


def ours(m, n, rank, K, W0=None, seed=0, order="natural", **options):
    """A layer with generic factors, over a generic weight unless one is given."""
    W0 = generic(m, n, seed) if W0 is None else W0
    layer = smoa.SMoALinear(linear(W0), rank=rank, num_blocks=K, order=order, **options)
    return fill(layer, seed + 7)


def lora(m, n, rank):
    return ours(m, n, rank, K=1, modulate=False)


def rank_of_update(layer):
    return rank_of(layer.delta_weight())


def trained_parameters(layer):
    return sum(p.numel() for p in layer.parameters() if p.requires_grad)


DOUBLE = [torch.float64]

# --------------------------------------------------------------------------------------------------
# 1 to 3: partition, parameters, support


@given(layers())
def test_every_row_and_column_is_in_exactly_one_block(drawn):
    layer, W0 = drawn
    for pieces, size in zip((layer.rows, layer.cols), W0.shape):
        assert sorted(torch.cat(pieces).tolist()) == list(range(size))
        assert [len(piece) for piece in pieces] == even_pieces(size, layer.num_blocks)


@given(layers())
def test_trained_parameters_are_the_factors_of_the_blocks(drawn):
    layer, _ = drawn
    expected = 0
    for k, rows, cols in aligned_blocks(layer):
        expected += layer.branch_ranks[k] * (len(rows) + len(cols))
    assert trained_parameters(layer) == expected


@given(layers(branch_ranks=None, rank=5))
def test_count_parameters_is_what_autograd_trains(drawn):
    layer, W0 = drawn
    assert layer.branch_ranks == even_pieces(5, layer.num_blocks)
    assert smoa.count_parameters(*W0.shape, 5, layer.num_blocks) == trained_parameters(layer)


@given(shapes_and_blocks(), between(1, 4))
def test_trained_parameters_are_lora_s_over_the_number_of_blocks(drawn, rho):
    (m, n), K = drawn
    assert trained_parameters(lora(m, n, rho * K)) == rho * K * (m + n)
    assert trained_parameters(ours(m, n, rho * K, K)) * K == rho * K * (m + n)


@given(layers(kinds=KINDS))
def test_update_is_the_dense_formula_and_zero_outside_the_blocks(drawn):
    layer, W0 = drawn
    delta = layer.delta_weight()
    outside = np.ones(W0.shape, dtype=bool)
    for _, rows, cols in aligned_blocks(layer):
        outside[np.ix_(rows, cols)] = False
    assert (to_numpy(delta)[outside] == 0).all()
    magnitude = dense_update(layer, W0, absolute=True)
    # One rounding a product, one a sum, of at most r_k of each; three for the scale and the anchor.
    roundings = 2 * max(layer.branch_ranks) + 3
    assert_close(delta, dense_update(layer, W0), magnitude, delta.dtype, roundings)


@pytest.mark.parametrize("merged", [False, True])
@given(drawn=layers(dtypes=DOUBLE))
def test_anchor_and_delta_are_the_blocks_of_the_dense_formula(merged, drawn):
    layer, W0 = drawn
    expected = torch.from_numpy(dense_update(layer, W0))
    if merged:
        layer.merge()
    for k, rows, cols in aligned_blocks(layer):
        assert bits(layer.anchor(k)) == bits(W0[rows][:, cols])
        assert_same(layer.delta(k), expected[rows][:, cols])


def assert_forward_is_dense(y, layer, W0, x, roundings):
    x_, W0_ = to_numpy(x), to_numpy(W0)
    bias = 0 if layer.bias is None else to_numpy(layer.bias)
    exact = x_ @ (W0_ + dense_update(layer, W0)).T + bias
    absolute_weight = np.abs(W0_) + dense_update(layer, W0, absolute=True)
    magnitude = np.abs(x_) @ absolute_weight.T + np.abs(bias)
    assert y.dtype == x.dtype
    assert_close(y, exact, magnitude, x.dtype, roundings)


def roundings_of(layer):
    """Products and sums over n and r_k; the scale, the anchor, two sums, the bias."""
    return layer.in_features + 2 * layer.rank + 6


@given(layers(), batches, seeds)
def test_forward_is_the_dense_formula(drawn, batch, seed):
    layer, W0 = drawn
    x = input_of(layer, *batch, seed=seed)
    assert_forward_is_dense(layer(x), layer, W0, x, roundings_of(layer))


@given(layers(dtypes=[torch.bfloat16]), batches, seeds)
def test_forward_over_a_bfloat16_base_is_the_dense_formula(drawn, batch, seed):
    layer, W0 = drawn
    x = input_of(layer, *batch, seed=seed)
    assert {p.dtype for p in factors(layer)[0]} == {torch.float32}
    # Sums run in float32; a handful of results is rounded to bfloat16.
    assert_forward_is_dense(layer(x), layer, W0, x, roundings=6)


@given(layers(), seeds)
def test_weight_is_what_forward_multiplies_by(drawn, seed):
    layer, W0 = drawn
    x = input_of(layer, 4, seed=seed)
    y = nn.functional.linear(x, layer.weight, layer.bias)
    assert_forward_is_dense(y, layer, W0, x, roundings_of(layer))


# --------------------------------------------------------------------------------------------------
# 4 and 5: rank, and the comparison with LoRA


@given(layers(kinds=KINDS, dtypes=DOUBLE))
def test_rank_never_exceeds_the_bound(drawn):
    layer, W0 = drawn
    assert rank_of_update(layer) <= bound(layer, W0)


RANK_FRIENDLY = [generic, low_rank, zero_rows_and_columns, repeated_singular_values]


@given(layers(kinds=RANK_FRIENDLY, dtypes=DOUBLE, modulate=True))
def test_generic_factors_reach_the_rank_bound(drawn):
    layer, W0 = drawn
    for M_k in anchors(layer, W0):
        assume(not M_k.any() or (M_k != 0).all())  # a few zeros in an anchor are not generic
    assert rank_of_update(layer) == bound(layer, W0)


@given(shapes_of_two_or_more, between(1, 4), between(1, 6), between(1, 6), seeds)
def test_generic_factors_over_a_generic_weight_of_any_rank_reach_the_rank_bound(
    shape, K, r_k, rank, seed
):
    K = min(K, *shape)
    rank = min(rank, *shape)
    layer = ours(*shape, r_k * K, K, W0=low_rank(*shape, seed, rank), seed=seed)
    expected = sum(min(side, r_k * min(side, rank)) for side in sides(layer))
    assert rank_of_update(layer) == expected


@given(shapes_and_blocks(), between(1, 20), st.booleans())
def test_rank_bound_is_the_rank_of_a_generic_update(drawn, r, modulate):
    (m, n), K = drawn
    layer = ours(m, n, r, K, modulate=modulate)
    assert smoa.rank_bound(m, n, r, K, modulate=modulate) == rank_of_update(layer)


@given(layers(dtypes=DOUBLE, num_blocks=1, modulate=False))
def test_lora_s_rank_never_exceeds_r(drawn):
    layer, W0 = drawn
    assert rank_of_update(layer) == min(layer.rank, *W0.shape)


@given(shapes_and_blocks(), between(1, 12), between(1, 12), seeds)
def test_at_equal_parameters_rank_is_never_below_lora_s(drawn, rho, rank_of_W0, seed):
    (m, n), K = drawn
    W0 = low_rank(m, n, seed, rank=min(rank_of_W0, m, n))
    layer, rival = ours(m, n, K * rho, K, W0=W0), lora(m, n, rho)
    assert trained_parameters(layer) == trained_parameters(rival)
    assert rank_of_update(rival) == min(rho, m, n)
    assert rank_of_update(layer) >= sum(min(side, rho) for side in sides(layer)) >= min(rho, m, n)
    if rho <= min(sides(layer)):
        assert rank_of_update(layer) >= K * rho
    assert sum(sides(layer)) == min(m, n)


@given(shapes_and_blocks(), between(1, 12))
def test_at_equal_parameters_full_rank_anchors_give_full_rank(drawn, rho):
    (m, n), K = drawn
    reached = rank_of_update(ours(m, n, K * rho, K))
    lora_s = smoa.rank_bound(m, n, rho, 1, modulate=False)
    assert reached == min(m, n)
    assert (reached > lora_s) == (rho < min(m, n))


@given(shapes_and_blocks(), between(1, 12), between(1, 12), seeds)
def test_at_equal_rank_budget_parameters_fall_and_rank_does_not(drawn, r_k, rank_of_W0, seed):
    (m, n), K = drawn
    W0 = low_rank(m, n, seed, rank=min(rank_of_W0, m, n))
    layer, rival = ours(m, n, K * r_k, K, W0=W0), lora(m, n, K * r_k)
    assert K * trained_parameters(layer) == trained_parameters(rival)
    assert rank_of_update(rival) == min(K * r_k, m, n)
    assert rank_of_update(layer) >= min(K * r_k, m, n)


def test_a_zero_anchor_costs_rank():
    """Both claims need every anchor to be non-zero. Over this W0 only the first of two is."""
    W0 = generic(6, 6, 0)
    W0[3:, 3:] = 0
    layer, rival = ours(6, 6, 8, 2, W0=W0), lora(6, 6, 4)
    assert trained_parameters(layer) == trained_parameters(rival)
    assert rank_of_update(layer) == 3
    assert rank_of_update(rival) == 4


def test_the_gain_stops_at_a_block_s_side():
    """K times LoRA's rank needs rho <= every block's sides.

    Over rank-1 anchors of 3 x 3, rho = 4 gives 6, not 8: still above LoRA's 4.
    """
    W0 = low_rank(6, 6, 0, rank=1)
    assert rank_of_update(ours(6, 6, 8, 2, W0=W0)) == 6


def test_lopsided_branch_ranks_can_fall_below_lora():
    """At equal r, `branch_ranks` above a block's side waste rank.

    The whole budget of 6 in one block of 3 x 3 reaches 3.
    """
    assert rank_of_update(ours(6, 6, 6, 2, branch_ranks=[6, 0])) == 3
    assert rank_of_update(lora(6, 6, 6)) == 6


# --------------------------------------------------------------------------------------------------
# 6: coverage of the pretrained spectrum


def coverage(delta, directions):
    """c_i = ||P u_i||^2, P the projector on the column space of delta, u_i the i-th direction."""
    U, _, _ = torch.linalg.svd(delta.detach())
    basis = U[:, : rank_of(delta)]
    return (basis.mT @ directions).square().sum(0)


FULL_OF_DIRECTIONS = [generic, low_rank, repeated_singular_values]


@given(layers(shapes=shapes_of_two_or_more, kinds=FULL_OF_DIRECTIONS, dtypes=DOUBLE))
def test_coverage_of_the_spectrum_adds_up_to_the_rank(drawn):
    layer, W0 = drawn
    delta = layer.delta_weight()
    U, _, Vh = torch.linalg.svd(W0)  # complete bases
    for c in (coverage(delta, U), coverage(delta.mT, Vh.mT)):
        assert (c >= 0).all()
        assert (c <= 1 + 1e-12).all()
        # float64: sums of at most 144 squares of unit vectors' entries
        assert abs(c.sum().item() - bound(layer, W0)) < 1e-9


@given(shapes, between(1, 12), seeds)
def test_one_branch_of_rank_one_a_block_covers_every_direction(shape, K, seed):
    K = min(K, *shape)
    layer = ours(*shape, K, K, seed=seed)
    delta = layer.delta_weight()
    U, _, Vh = torch.linalg.svd(layer.original_weight(), full_matrices=False)
    m, n = shape
    c = coverage(delta, U) if m <= n else coverage(delta.mT, Vh.mT)
    assert (c > 1 - 1e-9).all()


LORA = {"num_blocks": 1, "modulate": False}


@given(
    layers(shapes=shapes_of_two_or_more, dtypes=DOUBLE, kinds=[generic], **LORA),
    st.lists(between(0, 11), min_size=1),
)
def test_lora_meets_any_set_of_directions_in_rank_r_at_most(drawn, directions):
    layer, W0 = drawn
    S = sorted({i % min(W0.shape) for i in directions})
    U, _, Vh = torch.linalg.svd(W0, full_matrices=False)
    met = U[:, S].mT @ layer.delta_weight() @ Vh[S].mT
    assert rank_of(met) == min(layer.rank, len(S))


# --------------------------------------------------------------------------------------------------
# 7: one square holds the family


def assert_same(actual, expected):
    """float64, entries of order 1."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@given(layers(dtypes=DOUBLE, num_blocks=1, order="spectral", modulate=False), seeds)
def test_one_block_without_the_anchor_is_lora(drawn, seed):
    layer, _ = drawn
    x = input_of(layer, 3, seed=seed)
    down = linear(layer.A[0].data, bias=False)
    up = linear(layer.B[0].data, bias=False)
    assert_same(layer(x), layer.base(x) + layer.alpha / layer.rank * up(down(x)))


@given(layers(dtypes=DOUBLE, num_blocks=1, order="spectral", modulate=True), seeds)
def test_one_block_with_the_anchor_is_hira(drawn, seed):
    layer, W0 = drawn
    x = input_of(layer, 3, seed=seed)
    update = (layer.B[0] @ layer.A[0]) * W0
    assert_same(layer(x), layer.base(x) + layer.alpha / layer.rank * x @ update.mT)


@given(layers(dtypes=DOUBLE, modulate=False, order="natural"))
def test_blocks_without_the_anchor_are_melora(drawn):
    layer, _ = drawn
    products = [B_k @ A_k for A_k, B_k in zip(layer.A, layer.B)]
    melora = layer.alpha / layer.rank * torch.block_diag(*products)
    assert_same(layer.delta_weight(), melora)


FAMILY = {"modulate": st.booleans(), "order": st.sampled_from(["spectral", "natural"])}


@given(shapes_and_blocks(), between(1, 4), st.fixed_dictionaries(FAMILY), seeds)
def test_blocks_are_the_one_block_method_masked_to_them(drawn, rho, switches, seed):
    (m, n), K = drawn
    split = ours(m, n, K * rho, K, seed=seed, **switches)  # SMoA or MELoRA of rank K rho
    whole = ours(m, n, rho, 1, seed=seed, **switches)  # HiRA or LoRA of rank rho
    mask = torch.zeros(m, n, dtype=torch.float64)
    for k, rows, cols in aligned_blocks(split):
        whole.A[0].data[:, cols] = split.A[k].data
        whole.B[0].data[rows] = split.B[k].data
        mask[np.ix_(rows, cols)] = 1
    assert trained_parameters(split) == trained_parameters(whole)
    assert_same(split.delta_weight(), mask * whole.delta_weight())


@given(layers(dtypes=DOUBLE, modulate=True))
def test_a_branch_of_rank_one_rescales_rows_and_columns_of_its_anchor(drawn):
    layer, W0 = drawn
    delta = layer.delta_weight()
    ones = [block for block in aligned_blocks(layer) if layer.branch_ranks[block[0]] == 1]
    assume(ones)
    for k, rows, cols in ones:
        of_rows, of_cols = torch.diag(layer.B[k][:, 0]), torch.diag(layer.A[k][0])
        rescaled = of_rows @ W0[rows][:, cols] @ of_cols
        assert_same(delta[rows][:, cols], layer.alpha / layer.rank * rescaled)


# --------------------------------------------------------------------------------------------------
# 8: the order


def positions(W):
    """Of the rows, by the definition: the mean direction, weighted by energy, in a plain SVD.

    Of the columns: positions(W.T).
    """
    U, s, _ = np.linalg.svd(W, full_matrices=False)
    energy = (s * U) ** 2
    return energy @ np.arange(len(s)) / np.maximum(energy.sum(1), np.finfo(float).tiny)


def separated(W, gap=1e-5):
    """Whether rounding can change no comparison.

    Positions are ten times the 6th decimal apart, and no two singular values as good as equal.
    """
    _, s, _ = np.linalg.svd(W)
    s = s[s > 1e-6 * s[0]]
    gaps = [np.diff(np.sort(positions(W))), np.diff(np.sort(positions(W.T)))]
    return all((g > gap).all() for g in gaps) and (-np.diff(s) > 1e-6 * s[:-1]).all()


separated_weights = weights(shapes_of_two_or_more, [generic, low_rank], DOUBLE).filter(
    lambda W: separated(W.numpy())
)


@given(separated_weights)
def test_order_sorts_by_the_positions_of_the_definition(W):
    rows, cols = smoa.spectral_order(W)
    assert rows.tolist() == positions(W.numpy()).argsort().tolist()
    assert cols.tolist() == positions(W.numpy().T).argsort().tolist()


def assert_sorted(p, order):
    """Positions are compared to 6 decimals: up to two of the last may be out of order."""
    assert (np.diff(p[order.numpy()]) > -2e-6).all()


def mean_index(s):
    """The index of each singular value; equal ones share the mean of theirs."""
    s = np.array(s)
    return np.array([np.flatnonzero(s == value).mean() for value in s])


repeated_values = st.lists(st.sampled_from([4.0, 2.0, 1.0, 0.0]), min_size=12, max_size=12)


@given(shapes_of_two_or_more, repeated_values, seeds)
def test_equal_singular_values_share_their_mean_index(shape, values, seed):
    s = sorted(values, reverse=True)[: min(shape)]
    assume(s[0] > 0)
    U, V, W = with_spectrum(*shape, s, seed)  # known here: no SVD is asked
    for order, vectors in zip(smoa.spectral_order(W), (U.numpy(), V.numpy())):
        energy = (s * vectors) ** 2
        assert_sorted(energy @ mean_index(s) / energy.sum(1), order)


def exact_positions(vectors, s):
    """Of the rows of singular vectors, from mpmath's numbers."""
    p = []
    for i in range(vectors.rows):
        energy = [(s[j] * vectors[i, j]) ** 2 for j in range(len(s))]
        mean = sum(j * e for j, e in enumerate(energy)) / sum(energy)
        p.append(float(mean))
    return np.array(p)


@given(between(3, 9), between(3, 6), between(-12, -3), seeds)
def test_a_nearly_vanishing_column_is_placed_by_its_direction_not_by_rounding(m, n, exponent, seed):
    W = generic(m, n, seed)
    W[:, 1] *= 10.0**exponent
    with mpmath.workdps(60):  # another library's SVD, in 60 digits
        U, s, Vh = mpmath.svd_r(mpmath.matrix(W.tolist()))
        of_rows, of_cols = exact_positions(U, s), exact_positions(Vh.T, s)
    rows, cols = smoa.spectral_order(W)
    assert_sorted(of_rows, rows)
    assert_sorted(of_cols, cols)


def test_order_does_not_depend_on_the_default_dtype():
    W = generic(700, 600, 0)
    expected = smoa.spectral_order(W)
    torch.set_default_dtype(torch.bfloat16)
    try:
        order = smoa.spectral_order(W)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_orders(order, expected)


def test_a_zero_row_is_at_position_0_and_ties_go_by_index():
    W = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    rows, cols = smoa.spectral_order(W)
    assert rows.tolist() == [0, 1, 2]
    assert cols.tolist() == [0, 1, 2]


@given(separated_weights, seeds)
def test_order_follows_a_permutation_of_rows_and_columns(W, seed):
    m, n = W.shape
    P, Q = permutation(m, seed), permutation(n, seed)
    rows, cols = smoa.spectral_order(W[P][:, Q])
    assert same_orders((P[rows], Q[cols]), smoa.spectral_order(W))


@given(separated_weights, st.sampled_from([-1.0, 0.3, 1e-300, 1e300]))
def test_order_is_blind_to_scale(W, scale):
    assert same_orders(smoa.spectral_order(scale * W), smoa.spectral_order(W))


@given(separated_weights, seeds)
def test_order_is_blind_to_the_signs_of_rows_and_columns(W, seed):
    m, n = W.shape
    of_rows = normal(m, 1, seed=seed).sign()
    of_cols = normal(n, seed=seed).sign()
    flipped = of_rows * W * of_cols  # the singular vectors change their signs with these
    assert same_orders(smoa.spectral_order(flipped), smoa.spectral_order(W))


@given(separated_weights)
def test_order_of_the_transpose_swaps_rows_and_columns(W):
    rows, cols = smoa.spectral_order(W.mT)
    assert same_orders((cols, rows), smoa.spectral_order(W))


@given(weights(kinds=KINDS, dtypes=[*FLOATS, *HALVES]))
def test_order_is_a_permutation_and_the_same_every_time(W):
    rows, cols = smoa.spectral_order(W)
    assert sorted(rows.tolist()) == list(range(W.shape[0]))
    assert sorted(cols.tolist()) == list(range(W.shape[1]))
    assert same_orders(smoa.spectral_order(W.clone()), (rows, cols))


@given(separated_weights, st.sampled_from([*FLOATS, *HALVES]))
def test_order_does_not_depend_on_layout_or_dtype(W, dtype):
    W = W.to(dtype)
    assume(separated(W.double().numpy()))
    expected = smoa.spectral_order(W)
    assert same_orders(smoa.spectral_order(W.mT.contiguous().mT), expected)
    assert same_orders(smoa.spectral_order(W.double()), expected)


# From a shape and a seed, weights with no order of their own.
FULL_OF_TIES = {
    "zero": lambda m, n, seed: torch.zeros(m, n),
    "rank one": lambda m, n, seed: low_rank(m, n, seed, rank=1),
    "constant": lambda m, n, seed: torch.full((m, n), 0.1),
}
shapes_with_ties = st.sampled_from([(1, 7), (7, 1), (5, 5), (64, 40), (40, 64)])


@pytest.mark.parametrize("make", FULL_OF_TIES.values(), ids=FULL_OF_TIES)
@given(shapes_with_ties, seeds)
def test_ties_keep_their_natural_order(make, shape, seed):
    W = make(*shape, seed)
    for order in smoa.spectral_order(W):
        assert order.tolist() == list(range(len(order)))


@given(shapes_with_ties, seeds)
def test_lines_of_an_orthogonal_weight_keep_their_natural_order(shape, seed):
    m, n = shape
    _, _, W = with_spectrum(m, n, [3] * min(m, n), seed)
    rows, cols = smoa.spectral_order(W)
    if m <= n:  # the longer side has lines of any energy
        assert rows.tolist() == list(range(m))
    if n <= m:
        assert cols.tolist() == list(range(n))


@given(separated_weights)
def test_equal_rows_stay_in_natural_order(W):
    rows, _ = smoa.spectral_order(torch.cat([W, W]))
    place = rows.argsort()
    first, twin = place.chunk(2)
    assert torch.equal(twin, first + 1)


@given(shapes_of_two_or_more, seeds)
def test_zero_rows_and_columns_stand_at_position_zero(shape, seed):
    W = zero_rows_and_columns(*shape, seed)
    for order, lines in zip(smoa.spectral_order(W), (W, W.mT)):
        zeros = (lines == 0).all(1).nonzero().flatten().tolist()
        others = np.delete(positions(lines.numpy()), zeros)
        assume((others > 1e-5).all())  # no other line stands there, as all do at rank one
        assert order[: len(zeros)].tolist() == zeros


# --------------------------------------------------------------------------------------------------
# 9: identity at the start, gradients

fresh_layers = layers(dtypes=[*FLOATS, *HALVES], trained=False)


@given(fresh_layers, batches, st.sampled_from([0.0, 0.5]), seeds)
def test_fresh_adapter_changes_no_bit_of_the_output(drawn, batch, dropout, seed):
    layer, W0 = drawn
    layer.dropout = dropout
    x = input_of(layer, *batch, seed=seed)
    assert torch.equal(layer(x), layer.base(x))
    assert torch.equal(layer.eval()(x), layer.base(x))
    assert not layer.delta_weight().any()
    assert bits(layer.base.weight) == bits(W0)


@given(layers())
def test_factors_are_parameters_but_for_branches_of_rank_zero(drawn):
    layer, _ = drawn
    parameters = dict(layer.named_parameters())
    assert names_of_factors(layer) == {name for name in parameters if "base" not in name}
    for k, r_k in enumerate(layer.branch_ranks):
        if r_k > 0:
            assert layer.A[k] is parameters[f"A_{k}"]
            assert layer.B[k] is parameters[f"B_{k}"]


@pytest.mark.parametrize("norm_type", [1, 2, float("inf")])
def test_gradients_can_be_clipped_by_any_norm_where_branches_have_no_rank(norm_type):
    model = adapted(rank=1, num_blocks=3).requires_grad_(True)
    model(X).sum().backward()
    assert nn.utils.clip_grad_norm_(model.parameters(), 1.0, norm_type=norm_type) > 0


def test_fresh_factors_are_kaiming_uniform_and_zero():
    torch.manual_seed(0)
    layer = smoa.SMoALinear(linear(generic(64, 256, 0)), rank=64, num_blocks=2)
    limit = 1 / 128**0.5  # Kaiming-uniform with a = sqrt(5) over n_k = 128 inputs, as nn.Linear
    for A_k in layer.A:
        assert 0.99 * limit < A_k.abs().max() <= limit
        assert abs(A_k.std() / limit - 3**-0.5) < 0.01
    for B_k in layer.B:
        assert not B_k.any()


@given(layers())
def test_factors_have_the_shapes_and_dtypes_of_the_definition(drawn):
    layer, W0 = drawn
    assert len(layer.A) == len(layer.B) == layer.num_blocks
    for k, rows, cols in aligned_blocks(layer):
        assert layer.A[k].shape == (layer.branch_ranks[k], len(cols))
        assert layer.B[k].shape == (len(rows), layer.branch_ranks[k])
        assert layer.A[k].dtype == layer.B[k].dtype == W0.dtype


@given(layers(dtypes=[*FLOATS, torch.bfloat16]), seeds)
def test_only_the_factors_receive_a_gradient(drawn, seed):
    layer, W0 = drawn
    layer(input_of(layer, 3, seed=seed)).square().sum().backward()
    received = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert received == names_of_factors(layer)
    assert bits(layer.base.weight) == bits(W0)


def dense_gradients(layer, W0, G):
    """k and the gradients of A_k and B_k, from that of W0 + delta_W, (m, n)."""
    for k, rows, cols in aligned_blocks(layer):
        if layer.branch_ranks[k]:
            G_k = layer.alpha / layer.rank * G[np.ix_(rows, cols)]
            if layer.modulate:
                G_k = G_k * to_numpy(W0)[np.ix_(rows, cols)]
            yield k, to_numpy(layer.B[k]).T @ G_k, G_k @ to_numpy(layer.A[k]).T


def assert_same_double(actual, expected):
    """float64; entries up to about 1e3."""
    np.testing.assert_allclose(to_numpy(actual), expected, rtol=1e-9, atol=1e-9)


@given(layers(dtypes=DOUBLE), batches, seeds)
def test_gradients_are_the_dense_formula(drawn, batch, seed):
    layer, W0 = drawn
    if layer.bias is not None:
        layer.bias.requires_grad_()  # a bias may be trained beside the adapter
    x = input_of(layer, *batch, seed=seed).requires_grad_()
    g = normal(*batch, layer.out_features, seed=seed + 1)
    layer(x).backward(g)
    g_ = to_numpy(g).reshape(-1, layer.out_features)  # (T, m)
    x_ = to_numpy(x).reshape(-1, layer.in_features)  # (T, n)
    W = to_numpy(W0) + dense_update(layer, W0)
    assert_same_double(x.grad, to_numpy(g) @ W)
    if layer.bias is not None:
        assert_same_double(layer.bias.grad, g_.sum(0))
    for k, of_A_k, of_B_k in dense_gradients(layer, W0, g_.T @ x_):
        assert_same_double(layer.A[k].grad, of_A_k)
        assert_same_double(layer.B[k].grad, of_B_k)


PATHS = [
    (nn.Linear, True, 0),
    (nn.Linear, True, 0.5),
    (LinearWithItsOwnForward, True, 0),
    (nn.Linear, False, 0.5),
]


@pytest.mark.parametrize("base_class, modulate, dropout", PATHS)
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
@settings(max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), m=between(2, 5), n=between(2, 5), seed=seeds)
def test_gradients_pass_gradcheck_and_gradgradcheck(
    way, base_class, modulate, dropout, batch, data, m, n, seed
):
    drawn = data.draw(options(m, n, num_blocks=2, modulate=modulate, dropout=dropout))
    base = linear(generic(m, n, seed), base_class=base_class)
    layer = fill(smoa.SMoALinear(base, **drawn), seed)
    leaves = {}
    for name, p in layer.named_parameters():
        if p.numel() and name != "base.weight":
            leaves[name] = p.detach().requires_grad_()

    def forward(x, *values):
        torch.manual_seed(seed)  # the same dropout every time
        return torch.func.functional_call(layer, dict(zip(leaves, values)), x)

    x = input_of(layer, *batch, seed=seed).requires_grad_()
    assert torch.autograd.gradcheck(forward, (x, *leaves.values()))
    assert torch.autograd.gradgradcheck(forward, (x, *leaves.values()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "m, n, K, r",
    [(9, 14, 4, 8), (14, 9, 3, 2), (11, 11, 1, 3), (12, 8, 4, 4), (2048, 1024, 4, 4)],
)  # blocks of several shapes; of one, computed together; of one, too large for that
def test_the_lean_backward_has_the_gradients_of_the_plain_formula(m, n, K, r, bias, monkeypatch):
    layer = ours(m, n, r, K, order="spectral", alpha=3)
    layer.base.bias = nn.Parameter(normal(m, seed=1), requires_grad=False) if bias else None
    x = input_of(layer, 2, 5, seed=2).requires_grad_()
    g = normal(2, 5, m, seed=3)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    kept, grads = [], []
    for threshold in (0, 10**7):
        monkeypatch.setattr(smoa, "LEAN_ABOVE", threshold)
        y, size = kept_for_backward(layer, x)
        kept.append(size)
        grads.append(torch.autograd.grad(y, wanted, g))
    assert kept[0] < kept[1]  # the two ways are two
    for lean, plain in zip(*grads):
        assert torch.allclose(lean, plain, rtol=1e-12, atol=1e-12 * m)


@given(layers(dtypes=DOUBLE), batches, seeds)
def test_the_plain_formula_has_the_outputs_and_gradients_of_forward(drawn, batch, seed):
    layer, _ = drawn
    x = input_of(layer, *batch, seed=seed).requires_grad_()
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    y, plain = layer(x), layer.plain_forward(x)
    g = normal(*y.shape, seed=seed + 1)
    assert_same_double(y, to_numpy(plain))
    grads = torch.autograd.grad(y, wanted, g)
    for grad, expected in zip(grads, torch.autograd.grad(plain, wanted, g)):
        assert_same_double(grad, to_numpy(expected))


def test_input_gradient_of_a_layer_of_millions_of_weights_is_the_dense_formula():
    base = nn.Linear(2048, 2500, bias=False)
    layer = fill(smoa.SMoALinear(base, rank=2, num_blocks=2, order="natural"))
    x = normal(3, 2048, seed=1, dtype=torch.float32).requires_grad_()
    g = normal(3, 2500, seed=2, dtype=torch.float32)
    layer(x).backward(g)
    exact = to_numpy(g) @ to_numpy(layer.weight)
    magnitude = to_numpy(g.abs()) @ to_numpy(layer.weight.abs())
    # Rounding errors of 2500 summands mostly cancel.
    assert_close(x.grad, exact, magnitude, x.dtype, roundings=8)


@given(layers(dtypes=DOUBLE))
def test_delta_weight_is_differentiable(drawn):
    layer, W0 = drawn
    g = normal(*W0.shape, seed=1)
    layer.delta_weight().backward(g)
    for k, of_A_k, of_B_k in dense_gradients(layer, W0, to_numpy(g)):
        assert_same(layer.A[k].grad, torch.from_numpy(of_A_k))
        assert_same(layer.B[k].grad, torch.from_numpy(of_B_k))


# --------------------------------------------------------------------------------------------------
# 10: merge, unmerge, disable, unload


@given(layers(), batches, seeds)
def test_merged_forward_equals_unmerged_forward(drawn, batch, seed):
    layer, W0 = drawn
    x = input_of(layer, *batch, seed=seed)
    layer.merge()
    by_hand = nn.functional.linear(x, layer.weight, layer.bias)
    for y in (layer(x), by_hand):
        assert_forward_is_dense(y, layer, W0, x, roundings_of(layer))


@given(layers(dtypes=[torch.bfloat16]), seeds)
def test_merged_forward_equals_unmerged_forward_over_bfloat16(drawn, seed):
    layer, W0 = drawn
    x = input_of(layer, 3, seed=seed)
    layer.merge()
    # Rounded once in the weight, once in the result, once more by a forward of its own.
    assert_forward_is_dense(layer(x), layer, W0, x, roundings=3)


@given(layers(kinds=KINDS, dtypes=[*FLOATS, *HALVES]), between(1, 3), seeds)
def test_unmerge_restores_base_exactly(drawn, cycles, seed):
    layer, W0 = drawn
    for cycle in range(cycles):
        fill(layer, seed + cycle).merge()
        assert layer.merged
        assert bits(layer.original_weight()) == bits(W0)
        layer.unmerge()
        assert not layer.merged
        assert bits(layer.base.weight) == bits(W0)


@given(layers(kinds=[generic], dtypes=[*FLOATS, *HALVES], trained=False))
def test_unmerge_restores_base_that_the_update_has_wiped_out(drawn):
    layer, W0 = drawn
    for p in factors(layer)[0]:
        # W0 + delta_W overflows in float16 and rounds W0 away in the others: nothing to subtract
        # from.
        p.data.fill_(1e4)
    layer.merge()
    assert bits(layer.base.weight) != bits(W0)
    layer.unmerge()
    assert bits(layer.base.weight) == bits(W0)


@given(layers(dtypes=[*FLOATS, *HALVES]))
def test_merging_twice_is_merging_once(drawn):
    layer, W0 = drawn
    layer.merge()
    merged = bits(layer.base.weight)
    layer.merge()
    assert bits(layer.base.weight) == merged
    layer.unmerge()
    layer.unmerge()
    assert bits(layer.base.weight) == bits(W0)


@given(layers())
def test_anchor_of_a_merged_layer_is_the_pretrained_weight(drawn):
    layer, _ = drawn
    before = bits(layer.delta_weight())
    layer.merge()
    assert bits(layer.delta_weight()) == before


@given(layers(), seeds)
def test_merged_layer_in_training_mode_raises_at_backward(drawn, seed):
    layer, _ = drawn
    x = input_of(layer, 3, seed=seed)
    layer.merge()
    y = layer(x)  # a look at the output is harmless
    with pytest.raises(RuntimeError, match="merged.*unmerge"):
        y.sum().backward()
    assert all(p.grad is None for p in layer.parameters())
    layer.unmerge()
    layer(x).sum().backward()
    assert any(p.grad is not None for p in layer.parameters())


@given(layers(), seeds)
def test_merged_layer_in_eval_mode_passes_gradients_to_its_input(drawn, seed):
    layer, _ = drawn
    layer.eval().merge()
    W = layer.base.weight
    x = input_of(layer, 3, seed=seed).requires_grad_()
    layer(x).sum().backward()
    atol = 1e-4 * float(W.abs().max())
    torch.testing.assert_close(x.grad, W.sum(0).expand_as(x), rtol=1e-4, atol=atol)
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("merged", [False, True])
def test_merge_is_never_a_side_effect_of_train_or_eval(merged):
    model = adapted()
    if merged:
        smoa.merge(model)
    before = bits(model.first.base.weight)
    for mode in (model.eval, model.train, model.eval):
        mode()
        assert bits(model.first.base.weight) == before
        assert model.first.merged == merged


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_disabled_model_is_the_base(merged, training):
    model, plain = adapted(dropout=0.5).train(training), Net()
    if merged:
        smoa.merge(model)
    with smoa.disabled(model) as inside, smoa.disabled(model):
        assert inside is model
        assert torch.equal(model(X), plain(X))
        assert torch.equal(model.first.weight, plain.first.weight)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_disabled_model_comes_back_as_it_was_after_an_error_inside(merged, training):
    model = adapted(dropout=0.5).eval()
    if merged:
        smoa.merge(model)
    y = model(X)
    before = snapshot(model.train(training))
    with pytest.raises(KeyError), smoa.disabled(model), smoa.disabled(model):
        raise KeyError("an error inside must not leave the model disabled")
    assert snapshot(model) == before
    assert torch.equal(model.eval()(X), y)


def test_one_layer_of_two_may_be_merged_while_the_model_is_disabled():
    model = adapted()
    model.second.merge()
    before = snapshot(model)
    with smoa.disabled(model):
        assert not model.first.merged
        assert not model.second.merged
    assert snapshot(model) == before


@pytest.mark.parametrize("merged_before", [False, True])
@pytest.mark.parametrize("merge", [False, True])
def test_unload_gives_plain_layers_with_or_without_the_update(merge, merged_before):
    model, plain = adapted(), Net()
    expected = model(X)
    bases = [model.first.base, model.second.base]
    if merged_before:
        smoa.merge(model)
    assert smoa.unload(model, merge=merge) is model
    assert not list(smoa.adapters(model))
    assert [model.first, model.second] == bases
    assert not trained_names(model)
    if merge:
        torch.testing.assert_close(model(X), expected)
    else:
        assert [bits(p) for p in model.parameters()] == [bits(p) for p in plain.parameters()]


def test_unload_of_a_lone_layer_gives_its_base():
    base = linear(generic(4, 3, 0))
    assert smoa.unload(smoa.SMoALinear(base, rank=2)) is base


# --------------------------------------------------------------------------------------------------
# 11: inject


def test_inject_wraps_what_is_named_in_the_model_s_order_and_freezes_the_rest():
    model = Net()
    names = smoa.inject(model, ["second", "first"], rank=4)
    assert names == ["first", "second"] == [name for name, _ in smoa.adapters(model)]
    assert type(model.head) is nn.Linear
    of_first = {"first.A_0", "first.A_1", "first.B_0", "first.B_1"}
    of_second = {"second.A_0", "second.A_1", "second.B_0", "second.B_1"}
    assert trained_names(model) == of_first | of_second


def test_a_second_adapter_joins_the_first_which_stays_trainable():
    model = adapted()
    assert smoa.inject(model, "he.*", rank=2) == ["head"]
    assert [name for name, _ in smoa.adapters(model)] == ["first", "second", "head"]
    assert trained_names(model) == names_of_factors(model)


def test_inject_keeps_what_was_frozen_in_an_adapter_frozen():
    model = adapted(["first"])
    model.first.A[0].requires_grad_(False)
    smoa.inject(model, ["second"], rank=2)
    assert not model.first.A[0].requires_grad
    assert model.first.B[0].requires_grad


def test_inject_drops_the_gradients_of_what_it_freezes():
    model = Net()
    model(X).sum().backward()
    smoa.inject(model, ["first"], rank=4)
    assert all(p.grad is None for p in model.parameters())


def test_targets_may_come_from_any_iterable():
    model = Net()
    assert smoa.inject(model, (name for name in ("second", "first")), rank=4) == ["first", "second"]


class WithEps(nn.Linear):
    eps = 1e-6  # as normalising linear layers have


def test_a_linear_layer_with_an_eps_is_a_linear_layer():
    assert smoa.SMoALinear(WithEps(4, 4), rank=2).in_features == 4


def test_targets_match_whole_parts_of_dotted_names():
    block = nn.ModuleDict({"fc": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)})
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "my_fc": nn.Linear(4, 4), "block": block})
    assert smoa.inject(model, ["fc"], rank=2) == ["fc", "block.fc"]
    assert smoa.inject(model, "block.fc2|my_f", rank=2) == ["block.fc2"]


def test_new_layer_has_the_mode_of_its_base():
    base = linear(generic(3, 4, 0))
    assert smoa.SMoALinear(base.train(), rank=2).training
    assert not smoa.SMoALinear(base.eval(), rank=2).training


def test_one_block_computes_no_order(monkeypatch):
    monkeypatch.setattr(smoa, "spectral_order", None)
    layer = smoa.SMoALinear(linear(generic(5, 4, 0)), rank=2, num_blocks=1)
    assert layer.row_order.tolist() == [0, 1, 2, 3, 4]
    assert layer.col_order.tolist() == [0, 1, 2, 3]


@given(weights(shapes=shapes_of_two_or_more))
def test_more_blocks_take_the_spectral_order_by_default(W):
    layer = smoa.SMoALinear(linear(W), rank=2, num_blocks=2)
    assert same_orders((layer.row_order, layer.col_order), smoa.spectral_order(W))


@given(layers(base_classes=[LinearWithItsOwnForward], kinds=[generic], modulate=True), seeds)
def test_a_base_with_a_forward_of_its_own_is_asked_for_its_output(drawn, seed):
    layer, _ = drawn
    asked = []
    layer.base.register_forward_hook(lambda *args: asked.append(1))
    layer(input_of(layer, 2, seed=seed))
    assert asked == [1]


def test_doctests_of_smoa_pass():
    failed, attempted = doctest.testmod(smoa)
    assert attempted > 0
    assert failed == 0


# ------------------------------------------------------------------------------------------------
# The last section of smoa.py makes it faster and leaner, and changes no number


def without_its_last_section():
    """smoa.py as a module of its own, cut before the section and without the call into it."""
    source = Path(smoa.__file__).read_text(encoding="utf-8")
    source, cut, _ = source.partition("# Same numbers, less time and memory")
    source, calls = re.subn(
        r"        if _is_bare\(.*:\n            return _lean_forward.*\n", "", source
    )
    assert cut and calls == 1 and "lean" not in re.sub(r"#.*", "", source)
    module = types.ModuleType("plain_smoa")
    exec(compile(source, "plain_smoa.py", "exec"), module.__dict__)
    return module


plain_smoa = without_its_last_section()


def forward_and_backward(module, W0, x, autocast, drawn_options):
    torch.manual_seed(0)
    layer = module.SMoALinear(linear(W0), **drawn_options)
    for j, p in enumerate([*layer.A, *layer.B]):
        p.data.copy_(normal(*p.shape, seed=j))
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.backward(normal(*y.shape, seed=1, dtype=y.dtype))
    factors = [p for p in [*layer.A, *layer.B] if p.requires_grad]
    return y.detach().double(), flat([x.grad]), flat([p.grad for p in factors])


def flat(tensors):
    return torch.cat([tensor.flatten().double() for tensor in tensors])


@pytest.mark.parametrize("limit", [0, 2**20], ids=["lean", "plain"])
@pytest.mark.parametrize("dense", [[], ["cpu"]], ids=["blocks", "dense"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@given(st.data())
def test_without_its_last_section_the_file_computes_the_same(limit, dense, autocast, data):
    dtypes = [torch.float32] if autocast else [torch.float32, torch.float64, *HALVES]
    W0 = data.draw(weights(dtypes=dtypes))
    drawn_options = data.draw(options(*W0.shape))
    x = normal(5, W0.shape[1], seed=data.draw(seeds), dtype=W0.dtype)
    before = smoa.LEAN_ABOVE, smoa.DENSE_BFLOAT16
    smoa.LEAN_ABOVE, smoa.DENSE_BFLOAT16 = limit, dense
    lean = forward_and_backward(smoa, W0, x, autocast, drawn_options)
    smoa.LEAN_ABOVE, smoa.DENSE_BFLOAT16 = before
    plain = forward_and_backward(plain_smoa, W0, x, autocast, drawn_options)
    eps = torch.finfo(torch.bfloat16 if autocast else W0.dtype).eps
    for actual, expected in zip(lean, plain):
        # Three or four roundings of each product, of which cancellation leaves a part.
        assert (actual - expected).norm() <= 50 * eps * expected.norm() + 50 * eps
