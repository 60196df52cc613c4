"""What the tests draw, by name, and the few helpers that several of them share."""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import smoa

# --------------------------------------------------------------------------------------------------
# Shapes (m, n). All are small: a law that holds for every small shape has no size left to hide in.
# Sizes are drawn by `sampled_from`, which is even, and not by `integers`, which prefers the least:
# half of all draws would be of one block.


def between(low, high):
    return st.sampled_from(range(low, high + 1))


square = between(2, 12).map(lambda size: (size, size))
odd = st.sampled_from([3, 5, 7, 11]).map(lambda size: (size, size))
wide = st.tuples(between(2, 6), between(7, 12))
tall = st.tuples(between(7, 12), between(2, 6))
single_row = st.tuples(st.just(1), between(1, 12))
single_column = st.tuples(between(1, 12), st.just(1))
shapes_of_two_or_more = st.one_of(square, odd, wide, tall)
shapes = st.one_of(shapes_of_two_or_more, single_row, single_column)

seeds = st.integers(0, 2**31 - 1)
batches = st.sampled_from([(), (5,), (2, 3), (0,)])  # what stands before the features of x


@st.composite
def shapes_and_blocks(draw, shapes=shapes):
    """A shape (m, n), and a number of blocks K that fits into it."""
    shape = draw(shapes)
    return shape, draw(between(1, min(shape)))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*size, seed, dtype=torch.float64):
    return torch.randn(*size, generator=generator(seed), dtype=torch.float64).to(dtype)


def permutation(size, seed):
    return torch.randperm(size, generator=generator(seed))


# --------------------------------------------------------------------------------------------------
# Weights


def generic(m, n, seed):
    return normal(m, n, seed=seed)


def low_rank(m, n, seed, rank=None):
    rank = 1 + seed % min(m, n) if rank is None else rank
    return normal(m, rank, seed=seed) @ normal(rank, n, seed=seed + 1)


def zero_rows_and_columns(m, n, seed):
    W = generic(m, n, seed)
    W[seed % 2 :: 2] = 0
    W[:, 1::3] = 0
    return W


def zero(m, n, seed):
    return torch.zeros(m, n, dtype=torch.float64)


def with_spectrum(m, n, s, seed):
    """U, V with orthonormal columns and U diag(s) V^T, (m, n), for q = min(m, n) values s."""
    U, _ = torch.linalg.qr(normal(m, len(s), seed=seed))
    V, _ = torch.linalg.qr(normal(n, len(s), seed=seed + 1))
    return U, V, U * torch.as_tensor(s, dtype=torch.float64) @ V.mT


def repeated_singular_values(m, n, seed):
    s = [3 - j // 2 % 3 for j in range(min(m, n))]  # 3 3 2 2 1 1 3 3 ...
    _, _, W = with_spectrum(m, n, s, seed)
    return W


KINDS = [generic, low_rank, zero_rows_and_columns, zero, repeated_singular_values]
FLOATS = [torch.float32, torch.float64]
HALVES = [torch.bfloat16, torch.float16]


@st.composite
def weights(draw, shapes=shapes, kinds=KINDS, dtypes=FLOATS):
    make = draw(st.sampled_from(kinds))
    m, n = draw(shapes)
    W = make(m, n, draw(seeds))
    return W.to(draw(st.sampled_from(dtypes)))


# --------------------------------------------------------------------------------------------------
# Layers


class LinearWithItsOwnForward(nn.Linear):
    """As logging or quantising layers have: SMoA must go through `forward`."""

    def forward(self, x):
        return super().forward(x) + 0


@st.composite
def orders(draw, m, n):
    """Each kind of order that the layer takes."""
    given = permutation(m, draw(seeds)), permutation(n, draw(seeds))
    return draw(st.sampled_from(["spectral", "natural", given]))


@st.composite
def options(draw, m, n, **fixed):
    """Keyword arguments of SMoALinear: r below, at and past K, branch ranks given or not."""
    K = fixed.get("num_blocks") or draw(between(1, min(m, n)))
    drawn = {
        "num_blocks": K,
        "modulate": draw(st.booleans()),
        "alpha": draw(st.sampled_from([None, 0.25, 16])),
    }
    if draw(st.booleans()):
        branch_ranks = draw(st.lists(between(0, 3), min_size=K, max_size=K).filter(any))
        drawn |= {"branch_ranks": branch_ranks, "rank": sum(branch_ranks)}
    else:
        drawn |= {"rank": draw(between(1, 2 * K + 2))}
    drawn["order"] = draw(orders(m, n))
    return drawn | fixed


def linear(W0, bias=True, base_class=nn.Linear):
    m, n = W0.shape
    base = base_class(n, m, bias=bias, dtype=W0.dtype)
    base.weight.data.copy_(W0)
    return base


def factors(model):
    """Every A_k and B_k of the model, a list for each of its layers."""
    return [[*layer.A, *layer.B] for _, layer in smoa.adapters(model)]


def fill(model, seed=0):
    """Trained factors, as it were: each is drawn from a normal distribution."""
    for i, of_layer in enumerate(factors(model)):
        for j, p in enumerate(of_layer):
            p.data.copy_(normal(*p.shape, seed=seed + 1000 * i + j))
    return model


@st.composite
def layers(
    draw,
    shapes=shapes,
    kinds=KINDS,
    dtypes=FLOATS,
    base_classes=(nn.Linear, LinearWithItsOwnForward),
    trained=True,
    **fixed,
):
    """A SMoALinear, trained or fresh, and its W0, in a copy that nothing can touch."""
    W0 = draw(weights(shapes, kinds, dtypes))
    base_class = draw(st.sampled_from(list(base_classes)))
    base = linear(W0, draw(st.booleans()), base_class)
    layer = smoa.SMoALinear(base, **draw(options(*W0.shape, **fixed)))
    if trained:
        fill(layer, draw(seeds))
    return layer, W0.clone()


def input_of(layer, *batch, seed):
    """An input that the layer takes, (*batch, n)."""
    return normal(*batch, layer.in_features, seed=seed, dtype=layer.base.weight.dtype)


# --------------------------------------------------------------------------------------------------
# A model, and what must not change in it


class Net(nn.Module):
    """Three layers, named first (width, 6), second (5, width) and head (3, 5)."""

    def __init__(self, width=8, seed=0, dtype=torch.float32):
        super().__init__()
        self.first = nn.Linear(6, width)
        self.second = nn.Linear(width, 5, bias=False)
        self.head = nn.Linear(5, 3)
        for i, p in enumerate(self.parameters()):
            p.data.copy_(normal(*p.shape, seed=seed + i))
        self.to(dtype)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.second(x))
        return self.head(x)


X = normal(4, 6, seed=3, dtype=torch.float32)  # an input of a Net


def adapted(
    targets=("first", "second"),
    seed=0,
    width=8,
    dtype=torch.float32,
    fill_seed=0,
    rank=4,
    num_blocks=2,
    **layer_options,
):
    """A Net with trained adapters."""
    model = Net(width, seed, dtype)
    smoa.inject(model, list(targets), rank=rank, num_blocks=num_blocks, **layer_options)
    return fill(model, fill_seed)


def names_of_factors(model):
    """The names of all the factors of the branches that have a rank."""
    names = set()
    for name, layer in smoa.adapters(model):
        for k, r_k in enumerate(layer.branch_ranks):
            if r_k > 0:
                names |= {f"{name}.A_{k}".lstrip("."), f"{name}.B_{k}".lstrip(".")}
    return names


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def bits(tensor):
    """The bytes of a tensor, so that -0.0 differs from 0.0 and NaN equals itself."""
    kind = tensor.dtype, tuple(tensor.shape)
    if tensor.is_meta:
        return kind
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    flat = tensor.detach().contiguous().view(-1)
    return *kind, flat.view(torch.uint8).numpy().tobytes()


def all_bits(tensors):
    return {name: bits(tensor) for name, tensor in tensors.items()}


def snapshot(model):
    """All that a refused call must leave alone: values, what is frozen, which module hangs where,
    and the modes."""
    layers = dict(smoa.adapters(model))
    everywhere = list(model.named_modules(remove_duplicate=False))
    return {
        "parameters": all_bits(dict(model.named_parameters())),
        "buffers": all_bits(dict(model.named_buffers())),
        "trained": trained_names(model),
        "modules": {name: id(module) for name, module in everywhere},
        "types": {name: type(module) for name, module in everywhere},
        "training": {name: module.training for name, module in everywhere},
        "merged": {name: layer.merged for name, layer in layers.items()},
        "rows": {name: layer.row_order.tolist() for name, layer in layers.items()},
        "cols": {name: layer.col_order.tolist() for name, layer in layers.items()},
    }


@contextlib.contextmanager
def refused(error, *words, model):
    """A block that raises one error with all the words in it, and leaves no trace in the model."""
    before = snapshot(model)
    with pytest.raises(error) as caught:
        yield
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)
    assert snapshot(model) == before


# --------------------------------------------------------------------------------------------------
# Measures and comparisons


def kept_for_backward(module, x):
    """What the module returns, and the bytes of what autograd keeps for its backward.

    Each storage counts once, and those of the module's parameters do not count.
    """
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    for p in module.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    return y, sum(kept.values())


def to_numpy(tensor):
    return tensor.detach().double().numpy()


def same_orders(orders, others):
    """Whether two pairs of row and column orders are the same."""
    return all(torch.equal(order, other) for order, other in zip(orders, others))


def assert_close(actual, exact, magnitude, dtype, roundings):
    """|actual - exact| <= roundings * eps * magnitude, entry by entry.

    The a-priori error bound of a sum of products, where `magnitude` is the same sum over absolute
    values (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
    """
    info = torch.finfo(dtype)
    bound = roundings * info.eps * magnitude + info.tiny
    error = np.abs(to_numpy(actual) - exact)
    np.testing.assert_array_less(error, bound + np.finfo(float).tiny)
