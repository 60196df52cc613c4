"""Each bad input is one typed error: what came, what would be right, and the model as it was."""

import copy
import math
from functools import partial

import pytest
import torch
from strategies import Net, adapted, bits, fill, linear, normal, refused
from torch import nn
from torch.nn.utils import prune

import smoa

# --------------------------------------------------------------------------------------------------
# Options: {case: (options of a (5, 8) layer, what came, what would be right)}

WHOLE = "must be a whole number of at least 1"
TO_FOUR = "permutation of 0..4"
RANK_4 = {"rank": 4, "num_blocks": 2}

# fmt: off
BAD_OPTIONS = {
    "rank 0": ({"rank": 0}, "0", f"rank {WHOLE}"),
    "rank below 0": ({"rank": -3}, "-3", f"rank {WHOLE}"),
    "a fraction for a rank": ({"rank": 2.5}, "2.5", f"rank {WHOLE}"),
    "a text for a rank": ({"rank": "8"}, "'8'", f"rank {WHOLE}"),
    "no blocks": ({"num_blocks": 0}, "0", f"num_blocks {WHOLE}"),
    "blocks below 0": ({"num_blocks": -1}, "-1", f"num_blocks {WHOLE}"),
    "more blocks than rows": ({"num_blocks": 6}, "num_blocks=6", "at most 5"),

    "too few branch ranks": (RANK_4 | {"branch_ranks": [4]}, "[4]", "2 whole numbers"),
    "too many branch ranks": (
        RANK_4 | {"branch_ranks": [2, 1, 1]}, "[2, 1, 1]", "2 whole numbers"
    ),
    "branch ranks of another sum": (RANK_4 | {"branch_ranks": [2, 1]}, "[2, 1]", "sum to rank=4"),
    "a branch rank below 0": (RANK_4 | {"branch_ranks": [5, -1]}, "[5, -1]", "at least 0"),
    "a fraction for a branch rank": (
        RANK_4 | {"branch_ranks": [2.0, 2.0]}, "[2.0, 2.0]", "whole numbers"
    ),

    "alpha 0": ({"alpha": 0}, "0", "alpha must be positive"),
    "negative alpha": ({"alpha": -8}, "-8", "alpha must be positive"),
    "infinite alpha": ({"alpha": math.inf}, "inf", "finite"),
    "alpha nan": ({"alpha": math.nan}, "nan", "finite"),
    "negative dropout": ({"dropout": -0.1}, "-0.1", "dropout must be in [0, 1)"),
    "dropout 1": ({"dropout": 1.0}, "1.0", "dropout must be in [0, 1)"),
    "dropout nan": ({"dropout": math.nan}, "nan", "dropout must be in [0, 1)"),

    "an unknown order": ({"order": "random"}, "random", '"spectral", "natural"'),
    "a number for an order": ({"order": 3}, "3", "permutation"),
    "one order for two": ({"order": ([0, 1, 2, 3, 4],)}, "[0, 1, 2, 3, 4]", "a pair of perm"),
    "an order that repeats": ({"order": ([0, 1, 2, 3, 3], range(8))}, "[0, 1, 2, 3, 3]", TO_FOUR),
    "an order that is too short": (
        {"order": (range(5), range(7))}, "[0, 1, 2, 3, 4, 5, 6]", "0..7"
    ),
    "an order past the end": ({"order": ([1, 2, 3, 4, 5], range(8))}, "[1, 2, 3, 4, 5]", TO_FOUR),
    "an order in two dimensions": (
        {"order": (torch.arange(5)[None], range(8))}, "[[0, 1, 2, 3, 4]]", TO_FOUR
    ),
    "an order of fractions": (
        {"order": (torch.arange(5) + 0.5, range(8))}, "[0.5000, 1.5000", TO_FOUR
    ),
    "an order for each side by name": (
        {"order": ("natural", "spectral")}, "('natural', 'spectral')", "a pair of permutations"
    ),
}
# fmt: on


@pytest.mark.parametrize("bad, came, right", BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_option_is_refused(bad, came, right):
    model = Net()
    with refused(ValueError, came, right, model=model):
        smoa.SMoALinear(model.second, **bad)
    with refused(ValueError, "second", came, right, model=model):
        smoa.inject(model, ["second"], **bad)


def test_a_bad_last_layer_undoes_the_good_ones_before_it():
    model = Net()  # first (8, 6) has room for 6 blocks, second (5, 8) has not
    model.first.bias.requires_grad_(False)
    with refused(ValueError, "second", "num_blocks=6", "at most 5", model=model):
        smoa.inject(model, ["first", "second"], num_blocks=6)


def test_an_unknown_option_is_refused():
    model = Net()
    with refused(TypeError, "unexpected keyword", "rnk", model=model):
        smoa.inject(model, ["first", "second"], rnk=8)


BAD_SIZES = [
    ((0, 8, 4, 1), "0", f"out_features {WHOLE}"),
    ((5, -8, 4, 1), "-8", f"in_features {WHOLE}"),
    ((5, 8, 0, 1), "0", f"rank {WHOLE}"),
    ((5, 8, 4, 0), "0", f"num_blocks {WHOLE}"),
    ((5, 8, 4, 6), "num_blocks=6", "at most 5"),
    ((5, 8, 4.0, 2), "4.0", f"rank {WHOLE}"),
]


@pytest.mark.parametrize("count", [smoa.count_parameters, smoa.rank_bound])
@pytest.mark.parametrize("sizes, came, right", BAD_SIZES)
def test_sizes_that_no_layer_has_are_not_counted(count, sizes, came, right):
    with pytest.raises(ValueError) as caught:
        count(*sizes)
    assert came in str(caught.value)
    assert right in str(caught.value)


# --------------------------------------------------------------------------------------------------
# Weights: {case: (the weight of a layer, error, what came, what would be right)}


def ones_of(dtype):
    return torch.ones(5, 8, dtype=dtype)


def with_entry(value):
    W = torch.ones(5, 8)
    W[3, 4] = value
    return W


# fmt: off
BAD_WEIGHTS = {
    "integers": (ones_of(torch.int8), TypeError, "torch.int8", "2-D"),
    "booleans": (ones_of(torch.bool), TypeError, "torch.bool", "2-D"),
    "complex": (ones_of(torch.complex64), TypeError, "torch.complex64", "2-D"),
    "float8, e4m3": (ones_of(torch.float8_e4m3fn), TypeError, "torch.float8_e4m3fn", "bfloat16"),
    "float8, e5m2": (ones_of(torch.float8_e5m2), TypeError, "torch.float8_e5m2", "bfloat16"),
    "empty": (torch.ones(0, 8), TypeError, "(0, 8)", "not empty"),
    "sparse": (torch.ones(5, 8).to_sparse(), TypeError, "sparse_coo", "dense"),
    "one dimension": (torch.ones(8), TypeError, "(8,)", "2-D"),
    "three dimensions": (torch.ones(5, 8, 1), TypeError, "(5, 8, 1)", "2-D"),
    "nan": (with_entry(math.nan), ValueError, "NaN or infinity", "finite"),
    "infinity": (with_entry(-math.inf), ValueError, "NaN or infinity", "finite"),
    "meta": (torch.ones(5, 8, device="meta"), ValueError, "meta device", "load or initialise"),
}
# fmt: on


@pytest.mark.parametrize("num_blocks", [1, 2])  # one block needs no order, and the same weight
@pytest.mark.parametrize("W, error, came, right", BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_bad_weight_is_refused(W, error, came, right, num_blocks):
    model = Net()
    model.second.weight = nn.Parameter(W, requires_grad=False)
    with refused(error, came, right, model=model):
        smoa.SMoALinear(model.second, num_blocks=num_blocks)
    with refused(error, "second", came, right, model=model):
        smoa.inject(model, ["first", "second"], num_blocks=num_blocks)
    with refused(error, came, right, model=model):
        smoa.spectral_order(W)


@pytest.mark.parametrize("W", [[[1.0, 2.0]], None, "weight"], ids=repr)
def test_no_tensor_has_no_order(W):
    with pytest.raises(TypeError, match=f"2-D.* tensor, got {type(W).__name__}"):
        smoa.spectral_order(W)


def test_a_parametrized_weight_is_refused():
    model = Net()
    nn.utils.parametrizations.weight_norm(model.second)
    with refused(TypeError, "second", "parametrization", "remove", model=model):
        smoa.inject(model, ["second"])


# --------------------------------------------------------------------------------------------------
# Modules and targets

WEIGHT_OF_IN_OUT = nn.ParameterDict({"weight": torch.ones(5, 8), "bias": torch.ones(8)})
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
    "a weight of (in, out) that is no Conv1D": WEIGHT_OF_IN_OUT,
}


@pytest.mark.parametrize("module", NO_LINEAR_LAYERS.values(), ids=NO_LINEAR_LAYERS)
def test_a_module_that_is_no_linear_layer_is_refused(module):
    model = Net()
    model.extra = copy.deepcopy(module)
    with refused(TypeError, "extra", "linear layer", model=model):
        smoa.inject(model, ["first", "extra"], rank=2)
    with refused(TypeError, "linear layer", model=model):
        smoa.SMoALinear(model.extra, rank=2)


class AnotherAdapter(nn.Module):
    """As the layers of PEFT, which hold the linear layer that they adapt."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias


def test_another_adapter_s_layer_is_refused_by_what_it_holds():
    model = Net()
    model.second = AnotherAdapter(model.second)
    with refused(TypeError, "second", "AnotherAdapter", "base_layer", model=model):
        smoa.inject(model, ["first", "second"])


def test_the_layer_inside_another_adapter_is_refused():
    model = Net()
    model.second = AnotherAdapter(model.second)
    with refused(ValueError, "second", "AnotherAdapter", "take that adapter out", model=model):
        smoa.inject(model, ["base_layer"])


def test_a_layer_that_is_compiled_by_itself_is_refused():
    model = Net()
    model.second = torch.compile(model.second, backend="eager")
    with refused(ValueError, "second", "compiled", "torch.compile", model=model):
        smoa.inject(model, ["first", "second"])


class Switched(Net):
    """Calls its layers by a list of its own."""

    def __init__(self):
        super().__init__()
        self.steps = [self.first, self.second, self.head]


def test_a_layer_that_the_model_also_holds_in_a_plain_list_is_refused():
    model = Switched()
    with refused(ValueError, "second", "Switched.steps", "nn.ModuleList", model=model):
        smoa.inject(model, ["second"])


def test_a_state_that_is_a_file_s_content_is_refused():
    model = adapted()
    with refused(TypeError, "flat dict of tensors", "smoa.load", model=model):
        smoa.load_state_dict(model, {"config": {}, "state": smoa.state_dict(model)})


NO_MODULES = {"None": None, "a tensor": torch.ones(5, 8), "a name": "second"}


@pytest.mark.parametrize("thing", NO_MODULES.values(), ids=NO_MODULES)
def test_a_thing_that_is_no_module_is_refused(thing):
    with pytest.raises(TypeError, match=f"{type(thing).__name__} is no linear layer"):
        smoa.SMoALinear(thing)


NO_TARGETS = [
    (["q_proj"], "q_proj"),
    (["first", "irst"], "irst"),
    (["f.rst"], "f.rst"),
    ("fir", "fir"),
    ("second.*weight", "second.*weight"),
    ("", "''"),
]


@pytest.mark.parametrize("targets, came", NO_TARGETS)
def test_a_target_that_matches_nothing_is_refused(targets, came):
    model = Net()
    with refused(ValueError, came, "matches no module", "first, head, second", model=model):
        smoa.inject(model, targets)


def test_the_names_that_could_be_meant_are_those_of_adapted_layers_too():
    model = adapted(["first"])
    words = ["named first, head, second", "lone string is a regular expression"]
    with refused(ValueError, *words, model=model):
        smoa.inject(model, "firs")


def test_no_targets_are_refused():
    model = Net()
    with refused(ValueError, "no targets", "name at least one", model=model):
        smoa.inject(model, [])


def test_adapting_twice_is_refused():
    model = adapted(["first"])
    with refused(ValueError, "first", "adapted already", "unload", model=model):
        smoa.inject(model, ["second", "first"])
    with refused(ValueError, "first.base", "matches no module", "first, head, second", model=model):
        smoa.inject(model, ["second", "first.base"])
    with refused(ValueError, "adapted already", "unload", model=model):
        smoa.SMoALinear(model.first)


def test_dropout_where_a_parent_reads_the_weight_past_forward_is_refused():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    with refused(ValueError, "out_proj", "MultiheadAttention", "dropout=0", model=model):
        smoa.inject(model, ["linear1", "out_proj"], rank=2, dropout=0.1)


# --------------------------------------------------------------------------------------------------
# Shared weights


def tied():
    embed = nn.Embedding(5, 8)
    model = nn.ModuleDict({"embed": embed, "body": nn.Linear(8, 8), "head": nn.Linear(8, 5)})
    model["head"].bias = None
    model["head"].weight = embed.weight
    return model


def test_a_merge_into_tied_embeddings_is_refused_and_no_layer_merged():
    model = tied()
    smoa.inject(model, ["body", "head"], rank=2)
    fill(model)
    with refused(ValueError, "head", "embed.weight", "untie", model=model):
        smoa.merge(model)
    with refused(ValueError, "head", "embed.weight", "untie", model=model):
        smoa.unload(model, merge=True)


def test_a_merge_into_a_weight_of_two_adapted_layers_is_refused():
    model = nn.ModuleDict({"up": nn.Linear(6, 6), "down": nn.Linear(6, 6)})
    model["down"].weight = model["up"].weight
    smoa.inject(model, ["up", "down"], rank=2)
    with refused(ValueError, "up.base.weight", "down.base.weight", "untie", model=model):
        smoa.merge(model)


def test_tied_embeddings_can_be_adapted_without_a_merge():
    model = tied()
    x = normal(3, 8, seed=1, dtype=torch.float32)
    before = bits(model["embed"].weight)
    smoa.inject(model, ["head"], rank=2)
    delta = fill(model)["head"].delta_weight()
    assert delta.any()
    torch.testing.assert_close(model["head"](x), x @ (model["embed"].weight + delta).T)
    assert bits(model["embed"].weight) == before
    smoa.unload(model)
    assert model["head"].weight is model["embed"].weight


def test_an_untied_neighbour_of_tied_embeddings_can_be_merged():
    model = tied()
    smoa.inject(model, ["body"], rank=2)
    smoa.merge(fill(model))
    assert model["body"].merged


def test_a_pattern_that_is_no_regular_expression_is_refused():
    model = Net()
    with refused(ValueError, "'*head'", "no regular expression", "a list holds names", model=model):
        smoa.inject(model, "*head")


@pytest.mark.parametrize("target", ["0", "1"])
def test_a_model_with_lazy_layers_is_refused(target):
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="lazy layers, of no shape yet: run it once first"):
        smoa.inject(model, [target], rank=2)
    assert all(p.requires_grad for p in model.parameters())
    assert not list(smoa.adapters(model))


def test_a_merge_into_a_part_of_another_weight_is_refused():
    model = nn.ModuleDict({"fused": nn.Linear(8, 24), "key": nn.Linear(8, 8)})
    model["key"].weight = nn.Parameter(model["fused"].weight.data[8:16])
    model.register_buffer("copy_of_fused", model["fused"].weight.data)
    smoa.inject(model, ["key"], rank=2)
    words = ("key.base.weight", "fused.weight", "copy_of_fused", "share their memory")
    with refused(ValueError, *words, model=model):
        smoa.merge(model)


def test_a_merge_into_an_expanded_weight_is_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = nn.Parameter(torch.randn(1, 8).expand(8, 8))
    smoa.inject(model, ["0"], rank=2)
    with refused(ValueError, "0:", "share their memory", model=model):
        smoa.merge(model)


def test_a_sparse_neighbour_does_not_stop_a_merge():
    model = nn.Sequential(nn.Linear(8, 8))
    model.register_buffer("graph", torch.eye(8).to_sparse())
    smoa.inject(model, ["0"], rank=2)
    smoa.merge(model)
    assert model[0].merged


def test_a_merge_without_the_factors_values_is_refused():
    model = adapted()
    model.second.A_0 = nn.Parameter(model.second.A_0.detach().to("meta"))
    with pytest.raises(ValueError, match="second: .* on the meta device"):
        smoa.merge(model)
    assert not any(layer.merged for _, layer in smoa.adapters(model))


class Quantized(nn.Module):
    """What quantization puts in a linear layer's place: integers, or a method for its weight."""

    def __init__(self, linear, as_method):
        super().__init__()
        self.step = linear.weight.detach().abs().max() / 127
        self.integers = (linear.weight.detach() / self.step).round().to(torch.int8)
        self.bias = linear.bias
        self.weight = (lambda: self.step * self.integers) if as_method else self.integers

    def forward(self, x):
        return nn.functional.linear(x, self.step * self.integers, self.bias)


@pytest.mark.parametrize("as_method", [True, False])
def test_a_base_that_was_quantized_is_no_anchor_but_a_merged_one_computes(as_method, tmp_path):
    model = adapted()
    layer, x = model.second, normal(3, model.second.in_features, seed=0, dtype=torch.float32)
    plain = layer.base
    layer.base = Quantized(plain, as_method)
    for use in (layer, lambda _: smoa.save(model, tmp_path / "a.pt"), lambda _: smoa.merge(model)):
        with pytest.raises((TypeError, ValueError), match="Quantized"):
            use(x)
    layer.base = plain
    layer.merge()
    expected = layer(x)
    layer.base = Quantized(plain, as_method)
    model.to("cpu")
    assert (layer(x) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("verb", [smoa.merge, partial(smoa.unload, merge=True)])
def test_a_merge_that_breaks_off_is_undone(verb, monkeypatch):
    model = adapted()
    before = [bits(p) for p in model.parameters()]
    monkeypatch.setattr(model.second, "delta", lambda k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        verb(model)
    assert [bits(p) for p in model.parameters()] == before
    assert [layer.merged for _, layer in smoa.adapters(model)] == [False, False]


def test_a_merge_of_what_is_disabled_is_refused():
    model = adapted()
    with smoa.disabled(model):
        with refused(ValueError, "first", "disabled", model=model):
            smoa.merge(model)


def disable(model):
    with smoa.disabled(model):
        pass


@pytest.mark.parametrize("verb", [smoa.unmerge, smoa.unload, disable])
def test_what_a_merge_set_aside_is_not_given_back_to_a_weight_computed_since(verb):
    model = adapted()
    x = normal(3, 6, seed=1, dtype=torch.float32)
    smoa.merge(model)
    y = model(x)
    prune.identity(model.second.base, "weight")
    with pytest.raises(ValueError, match="second: the weight of this Linear is computed"):
        verb(model)
    assert model.first.merged and model.second.merged
    assert torch.equal(model(x), y)
    prune.remove(model.second.base, "weight")
    smoa.unload(model)
    assert bits(model.second.weight) == bits(Net().second.weight)


def test_a_lone_layer_does_not_merge_into_a_weight_computed_since():
    layer = smoa.SMoALinear(nn.Linear(6, 4), rank=2)
    prune.identity(layer.base, "weight")
    with pytest.raises(ValueError, match="computed"):
        layer.merge()
    assert not layer.merged


class TiesByName(nn.Module):
    """As the models of Hugging Face: what saves or resizes them calls `tie_weights`."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5, bias=False)
        self.tie_weights()

    def tie_weights(self):
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("wrap", [lambda model: model, nn.Sequential], ids=["whole", "inside"])
def test_a_weight_that_the_model_ties_again_by_name_is_refused(wrap):
    model = wrap(TiesByName())
    with refused(ValueError, "head.weight", "embed.weight", "tie", model=model):
        smoa.inject(model, ["body", "head"], rank=2)


def test_a_weight_that_is_not_tied_can_be_adapted_where_others_are():
    model = TiesByName()
    assert smoa.inject(model, ["body"], rank=2) == ["body"]
    model.tie_weights()
    smoa.merge(fill(model))
    assert model.body.merged


def pruned(base):
    prune.l1_unstructured(base, "weight", 0.5)


@pytest.mark.parametrize("compute", [pruned, nn.utils.parametrizations.weight_norm])
def test_a_merge_into_a_weight_that_has_come_to_be_computed_is_refused(compute):
    model = adapted()
    compute(model.second.base)
    with refused(ValueError, "second", "computed", "remove", model=model):
        smoa.merge(model)
    with refused(ValueError, "second", "computed", "remove", model=model):
        smoa.unload(model, merge=True)


def test_a_base_is_kept_and_never_copied():
    base = linear(normal(5, 8, seed=1))
    weight, bias = base.weight, base.bias
    layer = smoa.SMoALinear(base, rank=2)
    layer.merge()
    layer.unmerge()
    assert layer.base is base
    assert base.weight is weight and layer.bias is bias
    assert not weight.requires_grad and not bias.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layer_options", [{}, {"modulate": False}, {"dropout": 0.1}], ids=repr)
def test_an_input_of_another_dtype_is_refused_as_the_base_refuses_it(way, layer_options, dtype):
    layer = smoa.SMoALinear(nn.Linear(8, 5, bias=False), rank=2, **layer_options)
    x = torch.ones(3, 8, dtype=dtype)
    with pytest.raises(RuntimeError, match="dtype"):
        layer.base(x)
    with pytest.raises(RuntimeError, match="dtype"):
        fill(layer)(x)


def test_a_target_that_is_no_name_is_refused():
    model = Net()
    with refused(TypeError, "[0]", "names of modules", model=model):
        smoa.inject(model, [0], rank=4)
