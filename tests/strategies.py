"""What the tests draw, by name, and the few helpers that several of them share."""

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

import smoa

# ---------------------------------------------------------------------------------------------------------------------
# Shapes (m, n). All are small: a law that holds for every small shape has no size left to hide in. Sizes are drawn by `sampled_from`,
# which is even, and not by `integers`, which prefers the least: half of all draws would be of one block.


def between(low, high):
    return st.sampled_from(range(low, high + 1))


square = between(2, 12).map(lambda size: (size, size))
odd = st.sampled_from([3, 5, 7, 11]).map(lambda size: (size, size))
wide = st.tuples(between(2, 6), between(7, 12))
tall = wide.map(lambda shape: shape[::-1])
single_row_or_column = st.tuples(between(1, 12), st.booleans()).map(
    lambda drawn: (drawn[0], 1) if drawn[1] else (1, drawn[0])
)
shapes = st.one_of(square, odd, wide, tall, single_row_or_column)
shapes_of_two_or_more = st.one_of(square, odd, wide, tall)

seeds = st.integers(0, 2**31 - 1)
batches = st.sampled_from([(), (5,), (2, 3), (0,)])  # what stands before the feature dimension of x


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*size, seed, dtype=torch.float64):
    return torch.randn(*size, generator=generator(seed), dtype=torch.float64).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def generic(m, n, seed):
    return normal(m, n, seed=seed)


def low_rank(m, n, seed, rank=None):
    rank = 1 + seed % min(m, n) if rank is None else rank
    return normal(m, rank, seed=seed) @ normal(rank, n, seed=seed + 1)


def zero_rows_and_columns(m, n, seed):
    W = generic(m, n, seed)
    W[seed % 2 :: 2], W[:, 1::3] = 0, 0
    return W


def zero(m, n, seed):
    return torch.zeros(m, n, dtype=torch.float64)


def with_spectrum(m, n, s, seed):
    """U, V with orthonormal columns and U diag(s) V^T, (m, n), for q = min(m, n) singular values s."""
    U, V = (
        torch.linalg.qr(normal(size, len(s), seed=seed + i))[0] for i, size in enumerate((m, n))
    )
    return U, V, U * torch.as_tensor(s, dtype=torch.float64) @ V.mT


def repeated_singular_values(m, n, seed):
    return with_spectrum(m, n, [3 - j // 2 % 3 for j in range(min(m, n))], seed)[2]


KINDS = [generic, low_rank, zero_rows_and_columns, zero, repeated_singular_values]
FLOATS = [torch.float32, torch.float64]
HALVES = [torch.bfloat16, torch.float16]


@st.composite
def weights(draw, shapes=shapes, kinds=KINDS, dtypes=FLOATS):
    make, (m, n) = draw(st.sampled_from(kinds)), draw(shapes)
    return make(m, n, draw(seeds)).to(draw(st.sampled_from(dtypes)))


# ---------------------------------------------------------------------------------------------------------------------
# Layers


class LinearWithItsOwnForward(nn.Linear):
    """As logging or quantising layers have: SMoA must go through `forward`, and may not multiply by the weight itself."""

    def forward(self, x):
        return super().forward(x) + 0


@st.composite
def options(draw, m, n, **fixed):
    """Keyword arguments of SMoALinear: r below, at and past K, given branch ranks or not, each kind of order."""
    K = fixed.get("num_blocks") or draw(between(1, min(m, n)))
    drawn = dict(
        num_blocks=K, modulate=draw(st.booleans()), alpha=draw(st.sampled_from([None, 0.25, 16]))
    )
    if draw(st.booleans()):
        branch_ranks = draw(st.lists(between(0, 3), min_size=K, max_size=K).filter(any))
        drawn.update(branch_ranks=branch_ranks, rank=sum(branch_ranks))
    else:
        drawn.update(rank=draw(between(1, 2 * K + 2)))
    given_order = tuple(torch.randperm(size, generator=generator(draw(seeds))) for size in (m, n))
    drawn["order"] = draw(st.sampled_from(["spectral", "natural", given_order]))
    return drawn | fixed


def linear(W0, bias=True, base_class=nn.Linear):
    m, n = W0.shape
    base = base_class(n, m, bias=bias, dtype=W0.dtype)
    base.weight.data.copy_(W0)
    return base


def fill(model, seed=0):
    """Trained factors, as it were: every A_k and B_k of the model is drawn from a normal distribution."""
    for i, (_, layer) in enumerate(smoa.adapters(model)):
        for j, p in enumerate([*layer.A, *layer.B]):
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
    base = linear(W0, draw(st.booleans()), draw(st.sampled_from(list(base_classes))))
    layer = smoa.SMoALinear(base, **draw(options(*W0.shape, **fixed)))
    return (fill(layer, draw(seeds)) if trained else layer), W0.clone()


# ---------------------------------------------------------------------------------------------------------------------
# A model, and what must not change in it


class Net(nn.Module):
    def __init__(self, width=8, seed=0, dtype=torch.float32):
        super().__init__()
        self.first, self.second, self.head = (
            nn.Linear(6, width),
            nn.Linear(width, 5, bias=False),
            nn.Linear(5, 3),
        )
        for i, p in enumerate(self.parameters()):
            p.data.copy_(normal(*p.shape, seed=seed + i))
        self.to(dtype)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def adapted(
    targets=("first", "second"), seed=0, width=8, dtype=torch.float32, fill_seed=0, **layer_options
):
    model = Net(width, seed, dtype)
    smoa.inject(model, list(targets), **(dict(rank=4, num_blocks=2) | layer_options))
    return fill(model, fill_seed)


def bits(tensor):
    """The bytes of a tensor, so that -0.0 differs from 0.0 and NaN equals itself."""
    return (
        tensor.dtype,
        tuple(tensor.shape),
        None
        if tensor.is_meta
        else tensor.detach().contiguous().view(torch.uint8).numpy().tobytes(),
    )


def snapshot(model):
    """All that a refused call must leave alone: values, what is frozen, which module hangs where, modes."""
    tensors = {
        name: bits(t.view(1) if t.ndim == 0 else t)
        for name, t in [*model.named_parameters(), *model.named_buffers()]
    }
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    modules = {
        name: (id(module), type(module), module.training)
        for name, module in model.named_modules(remove_duplicate=False)
    }
    merged = {name: layer.merged for name, layer in smoa.adapters(model)}
    return tensors, frozen, modules, merged


def to_numpy(tensor):
    return tensor.detach().double().numpy()


def assert_close(actual, exact, magnitude, dtype, roundings):
    """|actual - exact| <= roundings * eps * magnitude, entry by entry: the a-priori error bound of a sum of products (Higham,
    Accuracy and Stability of Numerical Algorithms, section 3.1), where `magnitude` is the same sum over absolute values."""
    bound = roundings * torch.finfo(dtype).eps * magnitude + torch.finfo(dtype).tiny
    np.testing.assert_array_less(np.abs(to_numpy(actual) - exact), bound + np.finfo(float).tiny)
