"""Safe at the door: each bad input is one typed error that says what came and what would be right, and the model is as it was."""

import copy
import math

import pytest
import torch
from strategies import Net, adapted, bits, fill, linear, normal, snapshot
from torch import nn

import smoa


def refuse(error, words, call, model):
    before = snapshot(model)
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert all(word in str(caught.value) for word in words), caught.value
    assert snapshot(model) == before


# ---------------------------------------------------------------------------------------------------------------------
# Options: {case: (options of the layer, what came, what would be right)}. The layer is (5, 8).

BAD_OPTIONS = {
    "rank 0": (dict(rank=0), "0", "rank must be a whole number of at least 1"),
    "rank below 0": (dict(rank=-3), "-3", "rank must be a whole number of at least 1"),
    "a fraction for a rank": (dict(rank=2.5), "2.5", "rank must be a whole number of at least 1"),
    "a text for a rank": (dict(rank="8"), "'8'", "rank must be a whole number of at least 1"),
    "no blocks": (dict(num_blocks=0), "0", "num_blocks must be a whole number of at least 1"),
    "blocks below 0": (
        dict(num_blocks=-1),
        "-1",
        "num_blocks must be a whole number of at least 1",
    ),
    "more blocks than rows": (dict(num_blocks=6), "num_blocks=6", "at most 5"),
    "too few branch ranks": (
        dict(rank=4, num_blocks=2, branch_ranks=[4]),
        "[4]",
        "2 whole numbers",
    ),
    "too many branch ranks": (
        dict(rank=4, num_blocks=2, branch_ranks=[2, 1, 1]),
        "[2, 1, 1]",
        "2 whole numbers",
    ),
    "branch ranks of another sum": (
        dict(rank=4, num_blocks=2, branch_ranks=[2, 1]),
        "[2, 1]",
        "sum to rank=4",
    ),
    "a branch rank below 0": (
        dict(rank=4, num_blocks=2, branch_ranks=[5, -1]),
        "[5, -1]",
        "at least 0",
    ),
    "a fraction for a branch rank": (
        dict(rank=4, num_blocks=2, branch_ranks=[2.0, 2.0]),
        "[2.0, 2.0]",
        "whole numbers",
    ),
    "alpha 0": (dict(alpha=0), "0", "alpha must be positive"),
    "negative alpha": (dict(alpha=-8), "-8", "alpha must be positive"),
    "infinite alpha": (dict(alpha=math.inf), "inf", "finite"),
    "alpha nan": (dict(alpha=math.nan), "nan", "finite"),
    "negative dropout": (dict(dropout=-0.1), "-0.1", "dropout must be in [0, 1)"),
    "dropout 1": (dict(dropout=1.0), "1.0", "dropout must be in [0, 1)"),
    "dropout nan": (dict(dropout=math.nan), "nan", "dropout must be in [0, 1)"),
    "an unknown order": (dict(order="random"), "random", '"spectral", "natural"'),
    "a number for an order": (dict(order=3), "3", "permutation"),
    "one order for two": (
        dict(order=([0, 1, 2, 3, 4],)),
        "[0, 1, 2, 3, 4]",
        "a pair of permutations",
    ),
    "an order that repeats": (
        dict(order=([0, 1, 2, 3, 3], range(8))),
        "[0, 1, 2, 3, 3]",
        "permutation of 0..4",
    ),
    "an order that is too short": (
        dict(order=(range(5), range(7))),
        "[0, 1, 2, 3, 4, 5, 6]",
        "0..7",
    ),
    "a row order past the end": (
        dict(order=([1, 2, 3, 4, 5], range(8))),
        "[1, 2, 3, 4, 5]",
        "permutation of 0..4",
    ),
    "an order in two dimensions": (
        dict(order=(torch.arange(5)[None], range(8))),
        "[[0, 1, 2, 3, 4]]",
        "permutation of 0..4",
    ),
    "an order of floats": (
        dict(order=(torch.arange(5.0), range(8))),
        "[0., 1., 2., 3., 4.]",
        "permutation of 0..4",
    ),
}


@pytest.mark.parametrize("bad, came, right", BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_option_is_refused(bad, came, right):
    model = Net()
    refuse(ValueError, [came, right], lambda: smoa.SMoALinear(model.second, **bad), model)
    refuse(
        ValueError, ["second", came, right], lambda: smoa.inject(model, ["second"], **bad), model
    )


@pytest.mark.parametrize("bad, came, right", [BAD_OPTIONS["more blocks than rows"]])
def test_a_bad_last_layer_undoes_the_good_ones_before_it(bad, came, right):
    model = Net()  # first (8, 6) has room for 6 blocks, second (5, 8) has not
    model.first.bias.requires_grad_(False)
    refuse(
        ValueError,
        ["second", came, right],
        lambda: smoa.inject(model, ["first", "second"], **bad),
        model,
    )


def test_an_unknown_option_is_refused():
    model = Net()
    refuse(
        TypeError,
        ["unexpected keyword", "rnk"],
        lambda: smoa.inject(model, ["first", "second"], rnk=8),
        model,
    )


@pytest.mark.parametrize("count", [smoa.count_parameters, smoa.rank_bound])
@pytest.mark.parametrize(
    "sizes, came, right",
    [
        ((0, 8, 4, 1), "0", "out_features must be a whole number of at least 1"),
        ((5, -8, 4, 1), "-8", "in_features must be a whole number of at least 1"),
        ((5, 8, 0, 1), "0", "rank must be a whole number of at least 1"),
        ((5, 8, 4, 0), "0", "num_blocks must be a whole number of at least 1"),
        ((5, 8, 4, 6), "num_blocks=6", "at most 5"),
        ((5, 8, 4.0, 2), "4.0", "rank must be a whole number of at least 1"),
    ],
)
def test_sizes_that_no_layer_has_are_not_counted(count, sizes, came, right):
    with pytest.raises(ValueError) as caught:
        count(*sizes)
    assert came in str(caught.value) and right in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def with_entry(value):
    W = torch.ones(5, 8)
    W[3, 4] = value
    return W


BAD_WEIGHTS = {
    "integers": (torch.ones(5, 8, dtype=torch.int8), TypeError, "torch.int8", "2-D floating"),
    "booleans": (torch.ones(5, 8, dtype=torch.bool), TypeError, "torch.bool", "2-D floating"),
    "complex": (
        torch.ones(5, 8, dtype=torch.complex64),
        TypeError,
        "torch.complex64",
        "2-D floating",
    ),
    "one dimension": (torch.ones(8), TypeError, "(8,)", "2-D floating"),
    "three dimensions": (torch.ones(5, 8, 1), TypeError, "(5, 8, 1)", "2-D floating"),
    "nan": (with_entry(math.nan), ValueError, "NaN or infinity", "finite"),
    "infinity": (with_entry(-math.inf), ValueError, "NaN or infinity", "finite"),
    "meta": (
        torch.ones(5, 8, device="meta"),
        ValueError,
        "meta device",
        "load or initialise the model first",
    ),
}


@pytest.mark.parametrize("num_blocks", [1, 2])  # one block needs no order, and the same weight
@pytest.mark.parametrize("W, error, came, right", BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_bad_weight_is_refused(W, error, came, right, num_blocks):
    model = Net()
    model.second.weight = nn.Parameter(W, requires_grad=False)
    refuse(
        error, [came, right], lambda: smoa.SMoALinear(model.second, num_blocks=num_blocks), model
    )
    refuse(
        error,
        ["second", came, right],
        lambda: smoa.inject(model, ["first", "second"], num_blocks=num_blocks),
        model,
    )
    refuse(error, [came, right], lambda: smoa.spectral_order(W), model)


@pytest.mark.parametrize("W", [[[1.0, 2.0]], None, "weight"], ids=repr)
def test_no_tensor_has_no_order(W):
    with pytest.raises(TypeError, match=f"2-D floating tensor, got {type(W).__name__}"):
        smoa.spectral_order(W)


def test_a_parametrized_weight_is_refused():
    model = Net()
    nn.utils.parametrizations.weight_norm(model.second)
    refuse(
        TypeError,
        ["second", "parametrization", "remove"],
        lambda: smoa.inject(model, ["second"]),
        model,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Modules and targets

NO_LINEAR_LAYERS = {
    "ReLU": nn.ReLU(),
    "Sequential": nn.Sequential(nn.Linear(4, 4)),
    "Embedding": nn.Embedding(5, 8),
    "LayerNorm": nn.LayerNorm(8),
    "LayerNorm of two dimensions": nn.LayerNorm((5, 8)),
    "LayerNorm of two dimensions without bias": nn.LayerNorm((5, 8), bias=False),
    "RMSNorm of two dimensions": nn.RMSNorm((5, 8)),
    "Conv1d": nn.Conv1d(5, 8, 1),
    "Conv2d": nn.Conv2d(5, 8, 3),
    "Bilinear": nn.Bilinear(5, 8, 4),
    "GRU": nn.GRU(5, 8),
    "a weight of (in, out) that is no Conv1D": nn.ParameterDict(
        {"weight": torch.ones(5, 8), "bias": torch.ones(8)}
    ),
}


@pytest.mark.parametrize("module", NO_LINEAR_LAYERS.values(), ids=NO_LINEAR_LAYERS)
def test_a_module_that_is_no_linear_layer_is_refused(module):
    model = Net()
    model.extra = copy.deepcopy(module)
    refuse(
        TypeError,
        ["extra", "linear layer"],
        lambda: smoa.inject(model, ["first", "extra"], rank=2),
        model,
    )
    refuse(TypeError, ["linear layer"], lambda: smoa.SMoALinear(model.extra, rank=2), model)


@pytest.mark.parametrize(
    "thing", [None, torch.ones(5, 8), "second"], ids=["None", "a tensor", "a name"]
)
def test_a_thing_that_is_no_module_is_refused(thing):
    with pytest.raises(TypeError, match=f"{type(thing).__name__} is no linear layer"):
        smoa.SMoALinear(thing)


@pytest.mark.parametrize(
    "targets, came",
    [
        (["q_proj"], "q_proj"),
        (["first", "irst"], "irst"),
        (["f.rst"], "f.rst"),
        ("fir", "fir"),
        ("second.*weight", "second.*weight"),
        ("", "''"),
    ],
)
def test_a_target_that_matches_nothing_is_refused(targets, came):
    model = Net()
    refuse(
        ValueError,
        [came, "matches no module", "first, head, second"],
        lambda: smoa.inject(model, targets),
        model,
    )


def test_the_names_that_could_be_meant_are_those_of_adapted_layers_too():
    model = adapted(["first"])
    with pytest.raises(ValueError, match="named first, head, second") as caught:
        smoa.inject(model, "firs")
    assert "lone string is a regular expression" in str(caught.value)


def test_no_targets_are_refused():
    model = Net()
    refuse(ValueError, ["no targets", "name at least one"], lambda: smoa.inject(model, []), model)


def test_adapting_twice_is_refused():
    model = adapted(["first"])
    refuse(
        ValueError,
        ["first", "adapted already", "unload"],
        lambda: smoa.inject(model, ["second", "first"]),
        model,
    )
    refuse(
        ValueError,
        ["first.base", "matches no module", "first, head, second"],
        lambda: smoa.inject(model, ["second", "first.base"]),
        model,
    )
    refuse(ValueError, ["adapted already", "unload"], lambda: smoa.SMoALinear(model.first), model)


def test_a_progress_function_that_raises_leaves_the_model_as_it_was():
    model = Net()

    def interrupt(done, total, name):
        raise KeyboardInterrupt(name)

    refuse(
        KeyboardInterrupt,
        ["first"],
        lambda: smoa.inject(model, ["first", "second"], progress=interrupt),
        model,
    )


def test_dropout_where_a_parent_reads_the_weight_past_forward_is_refused():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    words = ["out_proj", "MultiheadAttention", "dropout=0"]
    refuse(
        ValueError,
        words,
        lambda: smoa.inject(model, ["linear1", "out_proj"], rank=2, dropout=0.1),
        model,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Shared weights


def tied(dtype=torch.float32):
    model = nn.ModuleDict(
        {"embed": nn.Embedding(5, 8), "body": nn.Linear(8, 8), "head": nn.Linear(8, 5, bias=False)}
    ).to(dtype)
    model["head"].weight = model["embed"].weight
    return model


def test_a_merge_into_tied_embeddings_is_refused_and_no_layer_merged():
    model = tied()
    smoa.inject(model, ["body", "head"], rank=2)
    fill(model)
    words = ["head", "embed.weight", "untie"]
    refuse(ValueError, words, lambda: smoa.merge(model), model)
    refuse(ValueError, words, lambda: smoa.unload(model, merge=True), model)


def test_a_merge_into_a_weight_of_two_adapted_layers_is_refused():
    model = nn.ModuleDict({"up": nn.Linear(6, 6), "down": nn.Linear(6, 6)})
    model["down"].weight = model["up"].weight
    smoa.inject(model, ["up", "down"], rank=2)
    refuse(
        ValueError,
        ["up.base.weight", "down.base.weight", "untie"],
        lambda: smoa.merge(model),
        model,
    )


def test_tied_embeddings_can_be_adapted_without_a_merge():
    model, x = tied(), normal(3, 8, seed=1, dtype=torch.float32)
    before = bits(model["embed"].weight)
    smoa.inject(model, ["head"], rank=2)
    fill(model)
    delta = model["head"].delta_weight()
    torch.testing.assert_close(model["head"](x), x @ (model["embed"].weight + delta).T)
    assert bits(model["embed"].weight) == before and delta.any()
    smoa.unload(model)
    assert model["head"].weight is model["embed"].weight


def test_an_untied_neighbour_of_tied_embeddings_can_be_merged():
    model = tied()
    smoa.inject(model, ["body"], rank=2)
    smoa.merge(fill(model))
    assert model["body"].merged


def test_a_base_is_kept_and_never_copied():
    base = linear(normal(5, 8, seed=1))
    weight, bias = base.weight, base.bias
    layer = smoa.SMoALinear(base, rank=2)
    layer.merge()
    layer.unmerge()
    assert (
        layer.base is base
        and base.weight is weight
        and layer.bias is bias
        and not weight.requires_grad
        and not bias.requires_grad
    )


@pytest.mark.parametrize("limit", [0, 2**20], ids=["lean", "plain"])
@pytest.mark.parametrize("layer_options", [{}, {"modulate": False}, {"dropout": 0.1}], ids=repr)
def test_an_input_of_another_dtype_is_refused_as_the_base_refuses_it(
    monkeypatch, limit, layer_options
):
    monkeypatch.setattr(smoa, "_PLAIN_UP_TO", limit)
    layer = fill(smoa.SMoALinear(nn.Linear(8, 5, bias=False), rank=2, **layer_options))
    for dtype in (torch.float64, torch.bfloat16):
        for module in (layer.base, layer):
            with pytest.raises(RuntimeError, match="dtype"):
                module(torch.ones(3, 8, dtype=dtype))
