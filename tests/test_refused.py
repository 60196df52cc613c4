"""What cannot be adapted: thing -> what the error says. The model is then as it was."""

import math

import pytest
import torch
from nets import Net, bits, input_for, near, refused
from strategies import fill
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrizations, prune

import smoa


class Scaled(nn.Linear):
    """As muP's readout has it."""

    def forward(self, x):
        return super().forward(x / 4)


class Params4bit(nn.Parameter):
    """As bitsandbytes has it: 4 or 8 bits that say they are a Parameter."""


def linear(weight=None, kind=nn.Parameter):
    layer = nn.Linear(8, 5)
    layer.weight = kind(torch.ones(5, 8) if weight is None else weight, requires_grad=False)
    return layer


def forward_put_on_it():
    layer = linear()
    layer.forward = lambda x: x
    return layer


def ones_and(value):
    W = torch.ones(5, 8)
    W[3, 4] = value
    return W


ANOTHER = "SMoA adapts torch.nn.Linear"
COMPUTED = "(weight: none of its own)"
REFUSED = {
    "Conv2d": (lambda: nn.Conv2d(8, 5, 1), ANOTHER),
    "Embedding": (lambda: nn.Embedding(5, 8), ANOTHER),
    "container": (lambda: nn.Sequential(linear()), "layers inside it: 0"),
    "attention": (lambda: nn.MultiheadAttention(8, 2), "layers inside it: out_proj"),
    "own forward": (lambda: Scaled(8, 5), ANOTHER),
    "quantized": (lambda: quantize_dynamic(nn.Sequential(linear()), {nn.Linear})[0], ANOTHER),
    "forward put on it": (forward_put_on_it, "with its own forward"),
    "pruned": (lambda: prune.l1_unstructured(linear(), "weight", 0.5), COMPUTED),
    "parametrized": (lambda: parametrizations.weight_norm(linear()), COMPUTED),
    "4 bits": (lambda: linear(kind=Params4bit), "Params4bit"),
    "sparse": (lambda: linear(torch.eye(5, 8).to_sparse()), "torch.sparse_coo"),
    "float8": (lambda: linear(torch.ones(5, 8).to(torch.float8_e4m3fn)), "torch.float8_e4m3fn"),
    "integers": (lambda: linear(torch.ones(5, 8).to(torch.int8)), "torch.int8"),
    "meta": (lambda: linear().to("meta"), "meta"),
    "one dimension": (lambda: linear(torch.ones(8)), "a dense matrix"),
}
NO_ANCHOR = {
    "NaN": (lambda: linear(ones_and(math.nan)), "the weight holds NaN or infinity"),
    "infinity": (lambda: linear(ones_and(-math.inf)), "the weight holds NaN or infinity"),
    "zero": (lambda: linear(torch.zeros(5, 8)), "the weight is zero"),
}


def lived_in():
    """A Net in the middle of its training: gradients everywhere, and a bias that is frozen."""
    model = Net()
    model(input_for(model)).sum().backward()
    model.head.bias.requires_grad_(False)
    return model


@pytest.mark.parametrize("num_blocks", [1, 2])  # with one there is no order to compute
@pytest.mark.parametrize("case", REFUSED | NO_ANCHOR)
@pytest.mark.filterwarnings("ignore")  # torch's, that some of this is old
def test_not_a_plain_linear_layer(case, num_blocks):
    make, why = (REFUSED | NO_ANCHOR)[case]
    model = lived_in()
    model.extra = make()
    words = [why]
    if case in REFUSED:
        path = f"{type(model.extra).__module__}.{type(model.extra).__qualname__} (weight: "
        words += [path, "cannot be adapted. SMoA", "Conv1D", "undo that first", "leave it out"]
    with refused(*words, model=model):
        smoa.SMoALinear(model.extra, rank=2, num_blocks=num_blocks)
    with refused("extra: ", *words, model=model):
        smoa.inject(model, ["first", "extra"], rank=2, num_blocks=num_blocks)


def test_a_zero_weight_can_be_added_to():
    layer = fill(smoa.SMoALinear(linear(torch.zeros(5, 8)), rank=2, modulate=False))
    assert layer.weight.any()


def test_a_tied_head_is_refused_not_its_neighbour():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 8), "body": nn.Linear(8, 8), "head": linear()})
    model["head"].weight = model["embed"].weight
    for modulate in (True, False):
        with refused("head: ", "embed and head share one weight", "untie", model=model):
            smoa.inject(model, ["body", "head"], rank=2, modulate=modulate)
    assert smoa.inject(model, ["body"], rank=2) == ["body"]
    smoa.merge(model)
    assert model["head"].weight is model["embed"].weight


def test_a_merge_writes_into_nobody_s_memory():
    whole = torch.randn(24, 8)
    for W in (whole[8:16], torch.randn(1, 8).expand(8, 8), torch.randn(8, 8).mT):
        base = nn.Linear(8, 8)
        base.weight = nn.Parameter(W)
        layer, before = fill(smoa.SMoALinear(base, rank=2, order="natural")).eval(), bits(whole)
        x = torch.randn(3, 8)
        y = layer(x)
        layer.merge()
        assert near(layer(x), y) and bits(whole) == before
        layer.unmerge()
        assert torch.equal(layer(x), y) and bits(whole) == before
        assert base.weight.data_ptr() == W.data_ptr()


BAD_OPTIONS = [
    ({"rnk": 8}, "rnk"),
    ({"rank": 0}, "got rank=0"),
    ({"rank": 2.5}, "got rank=2.5"),
    ({"rank": "8"}, "got rank='8'"),
    ({"num_blocks": 0}, "num_blocks=0"),
    ({"num_blocks": 9}, "num_blocks=9"),
    ({"alpha": 0}, "alpha=0"),
    ({"alpha": math.inf}, "alpha=inf"),
    ({"alpha": math.nan}, "alpha=nan"),
    ({"dropout": -0.1}, "dropout=-0.1"),
    ({"dropout": 1.0}, "dropout=1.0"),
    ({"order": "random"}, "got 'random'"),
    ({"order": (range(10),)}, "two permutations"),
    ({"order": ([0] * 10, range(8))}, "two permutations"),
    ({"order": (range(10), range(7))}, "two permutations"),
]


@pytest.mark.parametrize("options, message", BAD_OPTIONS, ids=str)
def test_an_option_out_of_range_is_refused(options, message):
    model = lived_in()
    with refused("first: ", message, model=model):
        smoa.inject(model, ["first"], **options)


@pytest.mark.parametrize("count", [smoa.count_parameters, smoa.rank_bound])
def test_a_count_checks_its_options(count):
    for options in ({"rank": 0, "num_blocks": 2}, {"rank": 4, "num_blocks": 9}):
        with pytest.raises(ValueError, match="1 to 8 blocks"):
            count(10, 8, **options)
