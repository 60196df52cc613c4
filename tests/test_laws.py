"""The laws of SMoA, each against a formula that is written here a second time.

what the paper claims                                    the test that checks it
-------------------------------------------------------  ---------------------------------------------------------------------
rows and columns are cut into K aligned blocks           test_every_row_and_column_is_in_exactly_one_block
the blocks follow the spectrum of W0                     test_order_sorts_by_the_positions_of_the_definition
the update is scale (B_k A_k) * M_k on the blocks        test_update_is_the_dense_formula_and_zero_outside_the_blocks
and 0 elsewhere; y = x (W0 + delta_W)^T + bias           test_forward_is_the_dense_formula
training starts at the pretrained model                  test_fresh_adapter_changes_no_bit_of_the_output
only the factors are trained                             test_only_the_factors_receive_a_gradient
r (m + n) / K parameters, K times fewer than LoRA        test_trained_parameters_are_lora_s_over_the_number_of_blocks
rank <= sum_k min(m_k, n_k, r_k rank M_k)                test_rank_never_exceeds_the_bound
which generic factors reach                              test_generic_factors_reach_the_rank_bound
LoRA's rank stops at r                                   test_lora_s_rank_never_exceeds_r
at equal parameters, a rank no lower than LoRA's         test_at_equal_parameters_rank_is_never_below_lora_s
at equal r, K times fewer parameters and no lower rank   test_at_equal_rank_budget_parameters_fall_and_rank_does_not
(where the two claims end)                               test_a_zero_anchor_costs_rank, test_the_gain_stops_at_a_block_s_side,
                                                         test_lopsided_branch_ranks_can_fall_below_lora
the update can reach the whole pretrained spectrum       test_coverage_of_the_spectrum_adds_up_to_the_rank
LoRA reaches r directions of it                          test_lora_meets_any_set_of_directions_in_rank_r_at_most
it can be merged, at no cost at inference                test_merged_forward_equals_unmerged_forward
"""

import doctest

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import (
    FLOATS,
    HALVES,
    KINDS,
    LinearWithItsOwnForward,
    Net,
    adapted,
    assert_close,
    batches,
    between,
    bits,
    fill,
    generator,
    generic,
    layers,
    linear,
    low_rank,
    normal,
    options,
    repeated_singular_values,
    seeds,
    shapes,
    shapes_of_two_or_more,
    snapshot,
    to_numpy,
    weights,
    with_spectrum,
    zero_rows_and_columns,
)
from torch import nn

import smoa

# ---------------------------------------------------------------------------------------------------------------------
# The oracle, in NumPy and float64: nothing here is taken from smoa.py but the factors and the two orders.


def aligned_blocks(layer):
    """K triples (k, rows, columns), as np.ix_ wants them."""
    K, (m, n) = layer.num_blocks, (len(layer.row_order), len(layer.col_order))
    pieces = (np.array_split(order.numpy(), K) for order in (layer.row_order, layer.col_order))
    assert (m, n) == tuple(layer.original_weight().shape)
    return [(k, rows, cols) for k, (rows, cols) in enumerate(zip(*pieces))]


def dense_update(layer, W0, absolute=False):
    """delta_W (m, n); with `absolute` the same sums over absolute values, the yardstick of rounding errors."""
    take = np.abs if absolute else np.asarray
    delta, W0 = np.zeros(W0.shape), take(to_numpy(W0))
    for k, rows, cols in aligned_blocks(layer):
        update = (
            layer.alpha
            / sum(layer.branch_ranks)
            * (take(to_numpy(layer.B[k])) @ take(to_numpy(layer.A[k])))
        )
        delta[np.ix_(rows, cols)] = update * W0[np.ix_(rows, cols)] if layer.modulate else update
    return delta


def rank_of(matrix, rtol=1e-10):
    """Numerical rank in float64. Rounding leaves singular values near 1e-15 of the largest; those of generic draws of this size fall
    below 1e-10 with a probability of about 1e-9 (the least singular value of a Gaussian matrix has a bounded density at 0)."""
    return int(torch.linalg.matrix_rank(matrix.detach().double(), rtol=rtol))


def anchor_ranks(layer, W0):
    return [rank_of(W0[rows][:, cols]) for _, rows, cols in aligned_blocks(layer)]


def bound(layer, W0):
    """sum_k min(m_k, n_k, r_k rank M_k); without the anchor, rank M_k is replaced by 1."""
    ranks = anchor_ranks(layer, W0) if layer.modulate else [1] * layer.num_blocks
    return sum(
        min(len(rows), len(cols), layer.branch_ranks[k] * ranks[k])
        for k, rows, cols in aligned_blocks(layer)
    )


def generic_layer(m, n, rank, K, modulate=True, W0=None, seed=0, **options):
    W0 = generic(m, n, seed) if W0 is None else W0
    options = dict(modulate=modulate, order="natural") | options
    return fill(smoa.SMoALinear(linear(W0), rank=rank, num_blocks=K, **options), seed + 7)


def trained_parameters(layer):
    return sum(p.numel() for p in layer.parameters() if p.requires_grad)


rank_friendly = [generic, low_rank, zero_rows_and_columns, repeated_singular_values]
modulated_doubles = dict(dtypes=[torch.float64], modulate=True)

# ---------------------------------------------------------------------------------------------------------------------
# 1 to 3: partition, parameters, support


@given(layers())
def test_every_row_and_column_is_in_exactly_one_block(drawn):
    layer, W0 = drawn
    for pieces, size in zip((layer.rows, layer.cols), W0.shape):
        assert sorted(torch.cat(pieces).tolist()) == list(range(size))
        assert [len(piece) for piece in pieces] == [
            len(piece) for piece in np.array_split(range(size), layer.num_blocks)
        ]


@given(layers())
def test_trained_parameters_are_the_factors_of_the_blocks(drawn):
    layer, W0 = drawn
    expected = sum(
        layer.branch_ranks[k] * (len(rows) + len(cols)) for k, rows, cols in aligned_blocks(layer)
    )
    assert trained_parameters(layer) == expected


@given(layers(branch_ranks=None, rank=5))
def test_count_parameters_is_what_autograd_trains(drawn):
    layer, W0 = drawn
    assert layer.branch_ranks == [
        len(piece) for piece in np.array_split(range(5), layer.num_blocks)
    ]  # even, the first ones get the rest
    assert smoa.count_parameters(*W0.shape, 5, layer.num_blocks) == trained_parameters(layer)


@given(shapes, between(1, 4), st.data())
def test_trained_parameters_are_lora_s_over_the_number_of_blocks(shape, rho, data):
    K = data.draw(between(1, min(shape)))
    lora = generic_layer(*shape, rho * K, 1, modulate=False)
    assert (
        trained_parameters(generic_layer(*shape, rho * K, K)) * K
        == trained_parameters(lora)
        == rho * K * sum(shape)
    )


@given(layers(kinds=KINDS))
def test_update_is_the_dense_formula_and_zero_outside_the_blocks(drawn):
    layer, W0 = drawn
    delta, inside = layer.delta_weight(), np.zeros(W0.shape, dtype=bool)
    for _, rows, cols in aligned_blocks(layer):
        inside[np.ix_(rows, cols)] = True
    assert (to_numpy(delta)[~inside] == 0).all()
    # One rounding a product, one a sum, of at most r_k of each; three for the scale and the anchor.
    assert_close(
        delta,
        dense_update(layer, W0),
        dense_update(layer, W0, absolute=True),
        delta.dtype,
        2 * max(layer.branch_ranks) + 3,
    )


def assert_forward_is_dense(y, layer, W0, x, roundings):
    bias = 0 if layer.bias is None else to_numpy(layer.bias)
    exact = to_numpy(x) @ (to_numpy(W0) + dense_update(layer, W0)).T + bias
    magnitude = np.abs(to_numpy(x)) @ (
        np.abs(to_numpy(W0)) + dense_update(layer, W0, absolute=True)
    ).T + np.abs(bias)
    assert y.dtype == x.dtype
    assert_close(y, exact, magnitude, x.dtype, roundings)


def roundings_of(layer):
    return (
        layer.in_features + 2 * layer.rank + 6
    )  # products and sums over n and r_k; the scale, the anchor, two sums, the bias


@given(layers(), batches, seeds)
def test_forward_is_the_dense_formula(drawn, batch, seed):
    layer, W0 = drawn
    x = normal(*batch, layer.in_features, seed=seed, dtype=W0.dtype)
    assert_forward_is_dense(layer(x), layer, W0, x, roundings_of(layer))


@given(layers(dtypes=[torch.bfloat16]), batches, seeds)
def test_forward_over_a_bfloat16_base_is_the_dense_formula(drawn, batch, seed):
    layer, W0 = drawn
    x = normal(*batch, layer.in_features, seed=seed, dtype=W0.dtype)
    assert {p.dtype for p in [*layer.A, *layer.B]} == {torch.float32}
    assert_forward_is_dense(
        layer(x), layer, W0, x, 6
    )  # sums run in float32; a handful of results is rounded to bfloat16


@given(layers(), seeds)
def test_weight_is_what_forward_multiplies_by(drawn, seed):
    layer, W0 = drawn
    x = normal(4, layer.in_features, seed=seed, dtype=W0.dtype)
    assert_forward_is_dense(
        nn.functional.linear(x, layer.weight, layer.bias), layer, W0, x, roundings_of(layer)
    )


# ---------------------------------------------------------------------------------------------------------------------
# 4 and 5: rank, and the comparison with LoRA


@given(layers(kinds=KINDS, dtypes=[torch.float64]))
def test_rank_never_exceeds_the_bound(drawn):
    layer, W0 = drawn
    assert rank_of(layer.delta_weight()) <= bound(layer, W0)


@given(layers(kinds=rank_friendly, **modulated_doubles))
def test_generic_factors_reach_the_rank_bound(drawn):
    layer, W0 = drawn
    anchors = [W0[rows][:, cols] for _, rows, cols in aligned_blocks(layer)]
    assume(
        all(not M_k.any() or (M_k != 0).all() for M_k in anchors)
    )  # a few zeros in an anchor are not generic
    assert rank_of(layer.delta_weight()) == bound(layer, W0)


@given(shapes_of_two_or_more, between(1, 4), between(1, 6), between(1, 6), seeds)
def test_generic_factors_over_a_generic_weight_of_any_rank_reach_the_rank_bound(
    shape, K, r_k, rank, seed
):
    K, rank = min(K, *shape), min(rank, *shape)
    layer = generic_layer(*shape, r_k * K, K, W0=low_rank(*shape, seed, rank), seed=seed)
    sides = [min(len(rows), len(cols)) for _, rows, cols in aligned_blocks(layer)]
    assert rank_of(layer.delta_weight()) == sum(min(side, r_k * min(side, rank)) for side in sides)


@given(shapes, between(1, 20), st.booleans(), st.data())
def test_rank_bound_is_the_rank_of_a_generic_update(shape, r, modulate, data):
    K = data.draw(between(1, min(shape)))
    assert smoa.rank_bound(*shape, r, K, modulate=modulate) == rank_of(
        generic_layer(*shape, r, K, modulate).delta_weight()
    )


@given(layers(dtypes=[torch.float64], num_blocks=1, modulate=False))
def test_lora_s_rank_never_exceeds_r(drawn):
    layer, W0 = drawn
    assert rank_of(layer.delta_weight()) == min(layer.rank, *W0.shape)


@given(shapes, between(1, 12), between(1, 12), seeds, st.data())
def test_at_equal_parameters_rank_is_never_below_lora_s(shape, rho, rank_of_W0, seed, data):
    K = data.draw(between(1, min(shape)))
    ours = generic_layer(*shape, K * rho, K, W0=low_rank(*shape, seed, min(rank_of_W0, *shape)))
    lora = generic_layer(*shape, rho, 1, modulate=False)
    assert trained_parameters(ours) == trained_parameters(lora)
    reached, sides = (
        rank_of(ours.delta_weight()),
        [min(len(rows), len(cols)) for _, rows, cols in aligned_blocks(ours)],
    )
    assert (
        reached
        >= sum(min(side, rho) for side in sides)
        >= min(rho, *shape)
        == rank_of(lora.delta_weight())
    )
    assert rho > min(sides) or reached >= K * rho  # K times LoRA's while rho fits in every block
    assert sum(sides) == min(shape)


@given(shapes, between(1, 12), st.data())
def test_at_equal_parameters_full_rank_anchors_give_full_rank(shape, rho, data):
    K = data.draw(between(1, min(shape)))
    lora, ours = (
        smoa.rank_bound(*shape, rho, 1, modulate=False),
        rank_of(generic_layer(*shape, K * rho, K).delta_weight()),
    )
    assert ours == min(shape) and (ours > lora) == (rho < min(shape))


@given(shapes, between(1, 12), between(1, 12), seeds, st.data())
def test_at_equal_rank_budget_parameters_fall_and_rank_does_not(shape, r_k, rank_of_W0, seed, data):
    K = data.draw(between(1, min(shape)))
    ours = generic_layer(*shape, K * r_k, K, W0=low_rank(*shape, seed, min(rank_of_W0, *shape)))
    lora = generic_layer(*shape, K * r_k, 1, modulate=False)
    assert K * trained_parameters(ours) == trained_parameters(lora)
    assert rank_of(ours.delta_weight()) >= min(K * r_k, *shape) == rank_of(lora.delta_weight())


def test_a_zero_anchor_costs_rank():
    """Both claims need every anchor to be non-zero. Over this W0 only the first of two anchors is."""
    W0 = generic(6, 6, 0)
    W0[3:, 3:] = 0
    ours, lora = generic_layer(6, 6, 8, 2, W0=W0), generic_layer(6, 6, 4, 1, modulate=False)
    assert trained_parameters(ours) == trained_parameters(lora)
    assert rank_of(ours.delta_weight()) == 3 < 4 == rank_of(lora.delta_weight())


def test_the_gain_stops_at_a_block_s_side():
    """K times LoRA's rank needs rho <= every block's sides. Over rank-1 anchors of 3 x 3, rho = 4 gives 6, not 8: still above LoRA's 4."""
    ours = generic_layer(6, 6, 8, 2, W0=low_rank(6, 6, 0, rank=1))
    assert rank_of(ours.delta_weight()) == 6 < 2 * 4


def test_lopsided_branch_ranks_can_fall_below_lora():
    """At equal r, `branch_ranks` above a block's side waste rank: the whole budget of 6 in one block of 3 x 3 reaches 3."""
    ours, lora = (
        generic_layer(6, 6, 6, 2, branch_ranks=[6, 0]),
        generic_layer(6, 6, 6, 1, modulate=False),
    )
    assert rank_of(ours.delta_weight()) == 3 < 6 == rank_of(lora.delta_weight())


# ---------------------------------------------------------------------------------------------------------------------
# 6: coverage of the pretrained spectrum


def coverage(delta, directions):
    """c_i = ||P u_i||^2 with P the projector on the column space of delta and u_i the columns of `directions`."""
    U = torch.linalg.svd(delta.detach())[0][:, : rank_of(delta)]
    return (U.mT @ directions).square().sum(0)


@given(
    layers(
        shapes=shapes_of_two_or_more,
        kinds=[generic, low_rank, repeated_singular_values],
        dtypes=[torch.float64],
    )
)
def test_coverage_of_the_spectrum_adds_up_to_the_rank(drawn):
    layer, W0 = drawn
    U, _, Vh = torch.linalg.svd(W0)  # complete bases
    for c in (coverage(layer.delta_weight(), U), coverage(layer.delta_weight().mT, Vh.mT)):
        assert (c >= 0).all() and (c <= 1 + 1e-12).all()
        assert (
            abs(c.sum().item() - bound(layer, W0)) < 1e-9
        )  # float64: sums of at most 144 squares of unit vectors' entries


@given(shapes, between(1, 12), seeds)
def test_one_branch_of_rank_one_a_block_covers_every_direction(shape, K, seed):
    K = min(K, *shape)
    layer = generic_layer(*shape, K, K, seed=seed)
    U, _, Vh = torch.linalg.svd(layer.original_weight(), full_matrices=False)
    narrow, directions = (
        (layer.delta_weight(), U) if shape[0] <= shape[1] else (layer.delta_weight().mT, Vh.mT)
    )
    assert (coverage(narrow, directions) > 1 - 1e-9).all()


@given(
    layers(
        shapes=shapes_of_two_or_more,
        dtypes=[torch.float64],
        kinds=[generic],
        num_blocks=1,
        modulate=False,
    ),
    st.data(),
)
def test_lora_meets_any_set_of_directions_in_rank_r_at_most(drawn, data):
    layer, W0 = drawn
    U, _, Vh = torch.linalg.svd(W0, full_matrices=False)
    S = data.draw(st.lists(between(0, min(W0.shape) - 1), min_size=1, unique=True))
    assert rank_of(U[:, S].mT @ layer.delta_weight() @ Vh[S].mT) == min(layer.rank, len(S))


# ---------------------------------------------------------------------------------------------------------------------
# 7: one square holds the family


def exactly_the_same(actual, expected):
    torch.testing.assert_close(
        actual, expected, rtol=1e-12, atol=1e-12
    )  # float64, entries of order 1


@given(layers(dtypes=[torch.float64], num_blocks=1, order="spectral"), seeds)
def test_one_block_without_the_anchor_is_lora_and_with_it_hira(drawn, seed):
    layer, W0 = drawn
    down, up = (
        linear(layer.A[0].data, bias=False),
        linear(layer.B[0].data, bias=False),
    )  # LoRA as two nn.Linear
    x = normal(3, layer.in_features, seed=seed)
    update = (up.weight @ down.weight) * W0 if layer.modulate else None
    detour = nn.functional.linear(x, update) if layer.modulate else up(down(x))
    exactly_the_same(layer(x), layer.base(x) + layer.alpha / layer.rank * detour)


@given(layers(dtypes=[torch.float64], modulate=False, order="natural"))
def test_blocks_without_the_anchor_are_melora(drawn):
    layer, _ = drawn
    exactly_the_same(
        layer.delta_weight(),
        layer.alpha
        / layer.rank
        * torch.block_diag(*(B_k @ A_k for A_k, B_k in zip(layer.A, layer.B))),
    )


@given(
    shapes, between(1, 4), st.booleans(), st.sampled_from(["spectral", "natural"]), seeds, st.data()
)
def test_blocks_are_the_one_block_method_masked_to_them(shape, rho, modulate, order, seed, data):
    K = data.draw(between(1, min(shape)))
    split = generic_layer(
        *shape, K * rho, K, modulate, seed=seed, order=order
    )  # SMoA or MELoRA, K rho
    whole = generic_layer(*shape, rho, 1, modulate, seed=seed)  # HiRA or LoRA, rho
    mask = torch.zeros(shape, dtype=torch.float64)
    for A_k, B_k, rows, cols in zip(split.A, split.B, split.rows, split.cols):
        whole.A[0].data[:, cols], whole.B[0].data[rows] = A_k.data, B_k.data
        mask[rows[:, None], cols] = 1
    assert trained_parameters(split) == trained_parameters(whole)
    exactly_the_same(split.delta_weight(), mask * whole.delta_weight())


@given(layers(dtypes=[torch.float64], modulate=True))
def test_a_branch_of_rank_one_rescales_rows_and_columns_of_its_anchor(drawn):
    layer, W0 = drawn
    for k, rows, cols in aligned_blocks(layer):
        if layer.branch_ranks[k] == 1:
            rescaled = torch.diag(layer.B[k][:, 0]) @ W0[rows][:, cols] @ torch.diag(layer.A[k][0])
            exactly_the_same(
                layer.delta_weight()[rows][:, cols], layer.alpha / layer.rank * rescaled
            )


# ---------------------------------------------------------------------------------------------------------------------
# 8: the order


def positions(W):
    """Of the rows, by the definition: the mean direction, weighted by energy, in a plain SVD. Of the columns: positions(W.T)."""
    U, s, _ = np.linalg.svd(W, full_matrices=False)
    energy = (s * U) ** 2
    return energy @ np.arange(len(s)) / np.maximum(energy.sum(1), np.finfo(float).tiny)


def separated(W, gap=1e-5):
    """Whether rounding can change no comparison: positions ten times the 6th decimal apart, and no two singular values as good as equal."""
    s = np.linalg.svd(W)[1]
    s = s[s > 1e-6 * s[0]]
    return (
        all((np.diff(np.sort(p)) > gap).all() for p in (positions(W), positions(W.T)))
        and (-np.diff(s) > 1e-6 * s[:-1]).all()
    )


separated_weights = weights(shapes_of_two_or_more, [generic, low_rank], [torch.float64]).filter(
    lambda W: separated(W.numpy())
)


@given(separated_weights)
def test_order_sorts_by_the_positions_of_the_definition(W):
    for order, p in zip(smoa.spectral_order(W), (positions(W.numpy()), positions(W.numpy().T))):
        assert order.tolist() == p.argsort().tolist()


@given(
    shapes_of_two_or_more,
    st.lists(st.sampled_from([4.0, 2.0, 1.0, 0.0]), min_size=12, max_size=12),
    seeds,
)
def test_equal_singular_values_share_their_mean_index(shape, values, seed):
    s = sorted(values)[::-1][: min(shape)]  # known here, and so are U and V: no SVD is asked
    index = np.array([np.mean([j for j, other in enumerate(s) if other == value]) for value in s])
    U, V, W = with_spectrum(*shape, s, seed)
    assume(s[0] > 0)
    for order, vectors in zip(smoa.spectral_order(W), (U.numpy(), V.numpy())):
        energy = (s * vectors) ** 2
        p = energy @ index / energy.sum(1)
        assert (np.diff(p[order.numpy()]) > -2e-6).all()  # positions are compared to 6 decimals


@given(between(3, 9), between(3, 6), between(-12, -3), seeds)
def test_a_nearly_vanishing_column_is_placed_by_its_direction_not_by_rounding(m, n, exponent, seed):
    W = generic(m, n, seed)
    W[:, 1] *= 10.0**exponent
    with mpmath.workdps(60):  # another library's SVD, in 60 digits
        exact = mpmath.matrix(W.tolist())
        U, s, Vh = mpmath.svd_r(exact)
        energies = [
            [(s[j] * vectors[i, j]) ** 2 for j in range(len(s))]
            for vectors, size in ((U, m), (Vh.T, n))
            for i in range(size)
        ]
        p = np.array([float(sum(j * e for j, e in enumerate(row)) / sum(row)) for row in energies])
    for order, own in zip(smoa.spectral_order(W), (p[:m], p[m:])):
        assert (np.diff(own[order.numpy()]) > -2e-6).all()


def test_order_does_not_depend_on_the_default_dtype():
    W = generic(700, 600, 0)
    expected = smoa.spectral_order(W)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert all(map(torch.equal, smoa.spectral_order(W), expected))
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_zero_row_is_at_position_0_and_ties_go_by_index():
    W = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert all(order.tolist() == [0, 1, 2] for order in smoa.spectral_order(W))


@given(separated_weights, seeds)
def test_order_follows_a_permutation_of_rows_and_columns(W, seed):
    P, Q = (torch.randperm(size, generator=generator(seed)) for size in W.shape)
    rows, cols = smoa.spectral_order(W[P][:, Q])
    assert bits(P[rows]) + bits(Q[cols]) == sum(map(bits, smoa.spectral_order(W)), ())


@given(separated_weights, st.sampled_from([-1.0, 0.3, 1e-300, 1e300]), seeds)
def test_order_is_blind_to_scale_and_to_signs(W, scale, seed):
    flip_rows, flip_cols = (
        normal(size, seed=seed).sign() for size in W.shape
    )  # the singular vectors change their signs with these
    for same in (scale * W, flip_rows[:, None] * W * flip_cols):
        assert all(
            torch.equal(a, b) for a, b in zip(smoa.spectral_order(same), smoa.spectral_order(W))
        )


@given(separated_weights)
def test_order_of_the_transpose_swaps_rows_and_columns(W):
    rows, cols = smoa.spectral_order(W.mT)
    assert [rows.tolist(), cols.tolist()] == [order.tolist() for order in smoa.spectral_order(W)][
        ::-1
    ]


@given(weights(kinds=KINDS, dtypes=[*FLOATS, *HALVES]))
def test_order_is_a_permutation_and_the_same_every_time(W):
    once, again, in_another_layout, in_float64 = map(
        smoa.spectral_order, (W, W.clone(), W.mT.contiguous().mT, W.double())
    )
    assert [sorted(order.tolist()) for order in once] == [list(range(size)) for size in W.shape]
    assert all(torch.equal(a, b) for a, b in zip(once, again))
    if separated(W.double().numpy()):
        assert all(
            torch.equal(a, b) and torch.equal(a, c)
            for a, b, c in zip(once, in_another_layout, in_float64)
        )


@pytest.mark.parametrize("kind", ["zero", "rank one", "orthogonal", "constant"])
@given(st.sampled_from([(1, 7), (7, 1), (5, 5), (64, 40), (40, 64)]), seeds)
def test_ties_keep_their_natural_order(kind, shape, seed):
    m, n = shape
    W = {
        "zero": torch.zeros(shape),
        "rank one": low_rank(m, n, seed, rank=1),
        "orthogonal": with_spectrum(m, n, [3] * min(shape), seed)[2],
        "constant": torch.full(shape, 0.1),
    }[kind]
    short = (
        min(smoa.spectral_order(W), key=len) if kind == "orthogonal" and m != n else None
    )  # its longer side has rows of any energy
    for order in smoa.spectral_order(W) if short is None else [short]:
        assert order.tolist() == list(range(len(order)))


@given(shapes_of_two_or_more, seeds)
def test_equal_rows_stay_in_natural_order(shape, seed):
    W = generic(*shape, seed)
    twice = torch.cat([W, W])
    rows = smoa.spectral_order(twice)[0].tolist()
    assert all(
        rows.index(i) + 1 == rows.index(i + shape[0]) for i in range(shape[0])
    ) or not separated(W.numpy())


@given(shapes_of_two_or_more, seeds)
def test_zero_rows_and_columns_stand_at_position_zero(shape, seed):
    W = zero_rows_and_columns(*shape, seed)
    for order, lines in zip(smoa.spectral_order(W), (W, W.mT)):
        zeros = (lines == 0).all(1).nonzero().flatten().tolist()
        assume(
            (np.delete(positions(lines.numpy()), zeros) > 1e-5).all()
        )  # no other row stands there, as all do at rank one
        assert order[: len(zeros)].tolist() == zeros


# ---------------------------------------------------------------------------------------------------------------------
# 9: identity at the start, gradients


@given(
    layers(dtypes=[*FLOATS, *HALVES], trained=False), batches, st.sampled_from([0.0, 0.5]), seeds
)
def test_fresh_adapter_changes_no_bit_of_the_output(drawn, batch, dropout, seed):
    layer, W0 = drawn
    layer.dropout = dropout
    x = normal(*batch, layer.in_features, seed=seed, dtype=W0.dtype)
    assert torch.equal(layer(x), layer.base(x)) and torch.equal(layer.eval()(x), layer.base(x))
    assert not layer.delta_weight().any() and bits(layer.base.weight) == bits(W0)


def test_fresh_factors_are_kaiming_uniform_and_zero():
    layer = smoa.SMoALinear(linear(generic(64, 256, 0)), rank=64, num_blocks=2)
    for A_k, B_k in zip(layer.A, layer.B):
        limit = 1 / 128**0.5  # Kaiming-uniform with a = sqrt(5) over n_k = 128 inputs, as nn.Linear
        assert (
            0.99 * limit < A_k.abs().max() <= limit
            and abs(A_k.std() / limit - 3**-0.5) < 0.01
            and not B_k.any()
        )


@given(layers())
def test_factors_have_the_shapes_and_dtypes_of_the_definition(drawn):
    layer, W0 = drawn
    for k, rows, cols in aligned_blocks(layer):
        assert layer.A[k].shape == (layer.branch_ranks[k], len(cols)) and layer.B[k].shape == (
            len(rows),
            layer.branch_ranks[k],
        )
    assert {p.dtype for p in layer.parameters()} == {W0.dtype}


@given(layers(dtypes=[*FLOATS, torch.bfloat16]), seeds)
def test_only_the_factors_receive_a_gradient(drawn, seed):
    layer, W0 = drawn
    layer(normal(3, layer.in_features, seed=seed, dtype=W0.dtype)).square().sum().backward()
    received = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert received == {
        f"{factor}.{k}" for factor in "AB" for k, r_k in enumerate(layer.branch_ranks) if r_k
    }
    assert bits(layer.base.weight) == bits(W0)


@given(layers(dtypes=[torch.float64]), batches, seeds)
def test_gradients_are_the_dense_formula(drawn, batch, seed):
    layer, W0 = drawn
    if layer.bias is not None:
        layer.bias.requires_grad_()  # a bias may be trained beside the adapter
    x, g = (
        normal(*batch, size, seed=seed + i).requires_grad_(i == 0)
        for i, size in enumerate((layer.in_features, layer.out_features))
    )
    layer(x).backward(g)
    exact_dx = to_numpy(g) @ (to_numpy(W0) + dense_update(layer, W0))
    np.testing.assert_allclose(
        x.grad.numpy(), exact_dx, rtol=1e-9, atol=1e-9
    )  # float64; entries up to about 1e3
    if layer.bias is not None:
        np.testing.assert_allclose(
            layer.bias.grad.numpy(),
            to_numpy(g).reshape(-1, layer.out_features).sum(0),
            rtol=1e-9,
            atol=1e-9,
        )
    G = to_numpy(g).reshape(-1, layer.out_features).T @ to_numpy(x).reshape(
        -1, layer.in_features
    )  # of the loss with respect to W
    for k, rows, cols in aligned_blocks(layer):
        if layer.branch_ranks[k]:
            G_k = (
                layer.alpha
                / layer.rank
                * G[np.ix_(rows, cols)]
                * (to_numpy(W0)[np.ix_(rows, cols)] if layer.modulate else 1)
            )
            np.testing.assert_allclose(
                layer.A[k].grad.numpy(), to_numpy(layer.B[k]).T @ G_k, rtol=1e-9, atol=1e-9
            )
            np.testing.assert_allclose(
                layer.B[k].grad.numpy(), G_k @ to_numpy(layer.A[k]).T, rtol=1e-9, atol=1e-9
            )


PATHS = [
    (nn.Linear, True, 0),
    (nn.Linear, True, 0.5),
    (LinearWithItsOwnForward, True, 0),
    (nn.Linear, False, 0.5),
]


@pytest.mark.parametrize("base_class, modulate, dropout", PATHS)
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
@pytest.mark.parametrize(
    "sides", [between(2, 4), st.sampled_from([7, 8])], ids=["small", "larger"]
)  # two ways to a gradient
@settings(max_examples=2)
@given(st.data())
def test_gradients_pass_gradcheck_and_gradgradcheck(
    base_class, modulate, dropout, batch, sides, data
):
    m, n, seed = data.draw(sides), data.draw(sides), data.draw(seeds)
    drawn = data.draw(options(m, n, num_blocks=2, modulate=modulate, dropout=dropout))
    layer = fill(smoa.SMoALinear(linear(generic(m, n, seed), base_class=base_class), **drawn), seed)
    inputs = {
        name: p.detach().requires_grad_()
        for name, p in layer.named_parameters()
        if p.numel() and name != "base.weight"
    }

    def forward(x, *values):
        torch.manual_seed(seed)  # the same dropout every time
        return torch.func.functional_call(layer, dict(zip(inputs, values)), x)

    x = normal(*batch, layer.in_features, seed=seed).requires_grad_()
    assert torch.autograd.gradcheck(forward, (x, *inputs.values()))
    assert torch.autograd.gradgradcheck(forward, (x, *inputs.values()))


def test_input_gradient_of_a_layer_of_millions_of_weights_is_the_dense_formula():
    base = nn.Linear(2048, 2500, bias=False)
    layer = fill(smoa.SMoALinear(base, rank=2, num_blocks=2, order="natural"))
    x, g = (
        normal(3, size, seed=size, dtype=torch.float32).requires_grad_(size == 2048)
        for size in (2048, 2500)
    )
    layer(x).backward(g)
    exact, magnitude = (
        to_numpy(f(g)) @ to_numpy(f(layer.weight)) for f in (torch.clone, torch.abs)
    )
    assert_close(
        x.grad, exact, magnitude, x.dtype, 8
    )  # rounding errors of 2500 summands mostly cancel


@given(layers(dtypes=[torch.float64]))
def test_delta_weight_is_differentiable(drawn):
    layer, W0 = drawn
    g = normal(*W0.shape, seed=1)
    layer.delta_weight().backward(g)
    for k, rows, cols in aligned_blocks(layer):
        if layer.branch_ranks[k]:
            G_k = layer.alpha / layer.rank * (g * W0 if layer.modulate else g)[rows][:, cols]
            exactly_the_same(layer.A[k].grad, layer.B[k].data.mT @ G_k)
            exactly_the_same(layer.B[k].grad, G_k @ layer.A[k].data.mT)


# ---------------------------------------------------------------------------------------------------------------------
# 10: merge, unmerge, disable, unload


@given(layers(), batches, seeds)
def test_merged_forward_equals_unmerged_forward(drawn, batch, seed):
    layer, W0 = drawn
    x = normal(*batch, layer.in_features, seed=seed, dtype=W0.dtype)
    layer.merge()
    assert_forward_is_dense(layer(x), layer, W0, x, roundings_of(layer))
    assert_forward_is_dense(
        nn.functional.linear(x, layer.weight, layer.bias), layer, W0, x, roundings_of(layer)
    )


@given(layers(dtypes=[torch.bfloat16]), seeds)
def test_merged_forward_equals_unmerged_forward_over_bfloat16(drawn, seed):
    layer, W0 = drawn
    x = normal(3, layer.in_features, seed=seed, dtype=W0.dtype)
    layer.merge()
    assert_forward_is_dense(
        layer(x), layer, W0, x, 3
    )  # rounded once in the weight, once in the result, once more by a forward of its own


@given(layers(kinds=KINDS, dtypes=[*FLOATS, *HALVES]), between(1, 3), seeds)
def test_unmerge_restores_base_exactly(drawn, cycles, seed):
    layer, W0 = drawn
    for cycle in range(cycles):
        fill(layer, seed + cycle).merge()
        assert layer.merged and bits(layer.original_weight()) == bits(W0)
        layer.unmerge()
        assert not layer.merged and bits(layer.base.weight) == bits(W0)


@given(layers(kinds=[generic], dtypes=[*FLOATS, *HALVES], trained=False))
def test_unmerge_restores_base_that_the_update_has_wiped_out(drawn):
    layer, W0 = drawn
    for p in [*layer.A, *layer.B]:
        p.data.fill_(
            1e4
        )  # W0 + delta_W overflows in float16 and rounds W0 away in the others: nothing to subtract from
    layer.merge()
    assert bits(layer.base.weight) != bits(W0) or not any(layer.branch_ranks)
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
    layer, W0 = drawn
    before = bits(layer.delta_weight())
    layer.merge()
    assert bits(layer.delta_weight()) == before


@given(layers(), seeds)
def test_merged_layer_in_training_mode_raises_at_backward(drawn, seed):
    layer, W0 = drawn
    x = normal(3, layer.in_features, seed=seed, dtype=W0.dtype)
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
    layer, W0 = drawn
    layer.eval().merge()
    x = normal(3, layer.in_features, seed=seed, dtype=W0.dtype).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(
        x.grad,
        layer.base.weight.sum(0).expand_as(x),
        rtol=1e-4,
        atol=1e-4 * float(layer.base.weight.abs().max()),
    )
    assert all(p.grad is None for p in layer.parameters())


def test_merge_is_never_a_side_effect_of_train_or_eval():
    model = adapted()
    for mode in (model.eval, model.train, model.eval):
        before = bits(model.first.base.weight)
        mode()
        assert bits(model.first.base.weight) == before and not model.first.merged


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_disabled_model_is_the_base_and_comes_back_as_it_was(merged, training):
    model, plain, x = (
        adapted(dropout=0.5).train(training),
        Net(),
        normal(4, 6, seed=3, dtype=torch.float32),
    )
    if merged:
        smoa.merge(model)
    before, y = snapshot(model), model.eval()(x)
    model.train(training)
    with pytest.raises(KeyError), smoa.disabled(model) as inside, smoa.disabled(model):
        assert (
            inside is model
            and torch.equal(model(x), plain(x))
            and torch.equal(model.first.weight, plain.first.weight)
        )
        raise KeyError("an error inside must not leave the model disabled")
    assert snapshot(model) == before and torch.equal(model.eval()(x), y)


def test_one_layer_of_two_may_be_merged_while_the_model_is_disabled():
    model = adapted()
    model.second.merge()
    before = snapshot(model)
    with smoa.disabled(model):
        assert not model.first.merged and not model.second.merged
    assert snapshot(model) == before


@pytest.mark.parametrize("merged_before", [False, True])
@pytest.mark.parametrize("merge", [False, True])
def test_unload_gives_plain_layers_with_or_without_the_update(merge, merged_before):
    model, plain, x = adapted(), Net(), normal(4, 6, seed=3, dtype=torch.float32)
    expected, bases = (model if merge else plain)(x).detach(), [model.first.base, model.second.base]
    if merged_before:
        smoa.merge(model)
    assert smoa.unload(model, merge=merge) is model and not list(smoa.adapters(model))
    assert [model.first, model.second] == bases and not any(
        p.requires_grad for p in model.parameters()
    )
    if merge:
        torch.testing.assert_close(model(x), expected)
    else:
        assert [bits(p) for p in model.parameters()] == [bits(p) for p in plain.parameters()]


def test_unload_of_a_lone_layer_gives_its_base():
    base = linear(generic(4, 3, 0))
    assert smoa.unload(smoa.SMoALinear(base, rank=2)) is base


def test_inject_wraps_what_is_named_freezes_the_rest_and_keeps_the_model_s_order():
    model, seen = Net(), []
    names = smoa.inject(
        model, ["second", "first"], rank=4, progress=lambda *args: seen.append(args)
    )
    assert (
        names == ["first", "second"] == [name for name, _ in smoa.adapters(model)]
        and type(model.head) is nn.Linear
    )
    assert seen == [(1, 2, "first"), (2, 2, "second")]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"{layer}.{factor}.{k}" for layer in names for factor in "AB" for k in (0, 1)
    }
    assert smoa.inject(model, "he.*", rank=2) == [
        "head"
    ]  # a second adapter joins the first, which stays trainable
    assert {name for name, p in model.named_parameters() if p.requires_grad} >= trained | {
        "head.A.0"
    }


def test_inject_keeps_what_was_frozen_in_an_adapter_frozen():
    model = adapted(["first"])
    model.first.A[0].requires_grad_(False)
    smoa.inject(model, ["second"], rank=2)
    assert not model.first.A[0].requires_grad and model.first.B[0].requires_grad


def test_targets_match_whole_parts_of_dotted_names():
    block = nn.ModuleDict({"fc": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)})
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "my_fc": nn.Linear(4, 4), "block": block})
    assert smoa.inject(model, ["fc"], rank=2) == ["fc", "block.fc"]
    assert smoa.inject(model, "block.fc2|my_f", rank=2) == ["block.fc2"]


def test_new_layer_has_the_mode_of_its_base():
    assert not smoa.SMoALinear(linear(generic(3, 4, 0)).eval(), rank=2).training
    assert smoa.SMoALinear(linear(generic(3, 4, 0)), rank=2).training


def test_one_block_computes_no_order(monkeypatch):
    monkeypatch.setattr(smoa, "spectral_order", None)
    layer = smoa.SMoALinear(linear(generic(5, 4, 0)), rank=2, num_blocks=1)
    assert layer.row_order.tolist() == [0, 1, 2, 3, 4] and layer.col_order.tolist() == [0, 1, 2, 3]


@given(weights(shapes=shapes_of_two_or_more))
def test_more_blocks_take_the_spectral_order_by_default(W):
    layer = smoa.SMoALinear(linear(W), rank=2, num_blocks=2)
    assert [layer.row_order.tolist(), layer.col_order.tolist()] == [
        order.tolist() for order in smoa.spectral_order(W)
    ]


@given(layers(base_classes=[LinearWithItsOwnForward], kinds=[generic], modulate=True), seeds)
def test_a_base_with_a_forward_of_its_own_is_asked_for_its_output(drawn, seed):
    layer, W0 = drawn
    asked = []
    layer.base.register_forward_hook(lambda *args: asked.append(1))
    layer(normal(2, layer.in_features, seed=seed, dtype=W0.dtype))
    assert asked == [1]


def test_doctests_of_smoa_pass():
    failed, attempted = doctest.testmod(smoa)
    assert attempted > 0 and failed == 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("m, n, K, r", [(9, 14, 4, 8), (14, 9, 3, 2), (11, 11, 1, 3)])
def test_the_lean_backward_has_the_gradients_of_the_plain_formula(m, n, K, r, bias, monkeypatch):
    torch.manual_seed(0)
    layer = smoa.SMoALinear(nn.Linear(n, m, bias=bias).double(), r, K, alpha=3)
    for B_k in layer.B:
        nn.init.normal_(B_k)
    x, g = (
        torch.randn(2, 5, n, dtype=torch.float64, requires_grad=True),
        torch.randn(2, 5, m, dtype=torch.float64),
    )
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    grads = {}
    for limit in (0, 10**6):
        monkeypatch.setattr(smoa, "_PLAIN_UP_TO", limit)
        y = layer(x)
        assert ("FoldedLinear" in str([y.grad_fn, y.grad_fn.next_functions])) == (limit == 0)
        grads[limit] = torch.autograd.grad(y, wanted, g)
    for lean, plain in zip(*grads.values()):
        assert torch.allclose(lean, plain, rtol=1e-12, atol=1e-12)
