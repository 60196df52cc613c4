"""What the tests draw, and the few helpers that several of them share."""

import torch
from hypothesis import strategies as st
from torch import nn

import smoa

FLOATS = [torch.float32, torch.float64]
HALVES = [torch.bfloat16, torch.float16]

# ------------------------------------------------------------------------------------------------
# Shapes (m, n). Sizes come from `sampled_from`, which is even: `integers` prefers the least


def between(low, high):
    return st.sampled_from(range(low, high + 1))


seeds = st.integers(0, 2**31 - 1)
batches = st.sampled_from([(), (5,), (2, 3), (0,)])  # what stands before the features of x

small = st.tuples(between(1, 12), between(1, 12))
not_thin = st.tuples(between(2, 12), between(2, 12))
large = st.sampled_from([(400, 330), (330, 400)])  # just above smoa.LEAN_ABOVE


@st.composite
def shapes_and_blocks(draw, shapes=small):
    """A shape (m, n), and a number of blocks K that fits into it."""
    shape = draw(shapes)
    return shape, draw(between(1, min(*shape, 12)))


# ------------------------------------------------------------------------------------------------
# Weights


def normal(*size, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)


def permutation(size, seed):
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def generic(m, n, seed):
    return normal(m, n, seed=seed)


def low_rank(m, n, seed, rank=None):
    rank = 1 + seed % min(m, n) if rank is None else rank
    return normal(m, rank, seed=seed) @ normal(rank, n, seed=seed + 1) / rank**0.5


def zero_rows_and_columns(m, n, seed):
    W = generic(m, n, seed)
    W[seed % 2 :: 2] = 0
    W[:, 1::3] = 0
    return W


@st.composite
def weights(draw, shapes=small, kinds=(generic, low_rank, zero_rows_and_columns)):
    """A weight (m, n) in float64."""
    make = draw(st.sampled_from(kinds))
    return make(*draw(shapes), draw(seeds))


# ------------------------------------------------------------------------------------------------
# Layers


class Conv1D(nn.Module):
    """Hugging Face's linear layer with a transposed weight, as in GPT-2."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.zeros(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        y = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], self.nf)


def linear(W0, bias=True, conv1d=False):
    """A base layer whose weight is W0 (m, n)."""
    m, n = W0.shape
    base = Conv1D(m, n) if conv1d else nn.Linear(n, m, bias=bias)
    base.to(W0.dtype).weight.data.copy_(W0.mT if conv1d else W0)
    if base.bias is not None:
        base.bias.data.copy_(normal(m, seed=m))
    return base


def fill(model, seed=0):
    """Trained factors, as it were: each is drawn from a normal distribution."""
    for i, (_, layer) in enumerate(smoa.adapters(model)):
        for j, p in enumerate([*layer.A, *layer.B]):
            p.data.copy_(normal(*p.shape, seed=seed + 1000 * i + j))
    return model


@st.composite
def layers(draw, shapes=small, dtypes=FLOATS, trained=True, **fixed):
    """A SMoALinear over a Linear or Conv1D, and its W0 (m, n), in a copy that nothing can touch."""
    W0 = draw(weights(shapes)).to(draw(st.sampled_from(dtypes)))
    m, n = W0.shape
    K = fixed.get("num_blocks") or draw(between(1, min(m, n, 12)))
    given_order = permutation(m, draw(seeds)), permutation(n, draw(seeds))
    options = {
        "num_blocks": K,
        "rank": draw(between(1, 2 * K + 2)),
        "alpha": draw(st.sampled_from([None, 0.25, 16])),
        "order": draw(st.sampled_from(["spectral", "natural", given_order])),
        "modulate": draw(st.booleans()),
    }
    options |= fixed
    if not W0.any():  # it cannot be modulated
        options["modulate"] = False
    base = linear(W0, bias=draw(st.booleans()), conv1d=draw(st.booleans()))
    layer = smoa.SMoALinear(base, **options)
    if trained:
        fill(layer, draw(seeds))
    return layer, W0.clone()


def blocks(layer):
    """K pairs (rows (m_k, 1), columns (n_k,)): W[rows, columns] is block k."""
    rows = layer.row_order.tensor_split(layer.num_blocks)
    cols = layer.col_order.tensor_split(layer.num_blocks)
    return [(rows_k[:, None], cols_k) for rows_k, cols_k in zip(rows, cols)]


def dense_update(layer, W0, As, Bs):
    """delta_W (m, n) by the definition, in float64, as all that is given. Differentiable.

    Nothing is taken from the layer but its options and the two orders.
    """
    delta = torch.zeros(W0.shape, dtype=torch.float64)
    for (rows, cols), A_k, B_k in zip(blocks(layer), As, Bs):
        M_k = W0[rows, cols] if layer.modulate else 1.0
        delta[rows, cols] = layer.alpha / layer.rank * (B_k @ A_k) * M_k
    return delta


def input_of(layer, *batch, seed=0):
    """An input that the layer takes, (*batch, n)."""
    return normal(*batch, layer.in_features, seed=seed, dtype=layer.base.weight.dtype)


def bits(tensor):
    """The bytes of a tensor, so that -0.0 differs from 0.0, and NaN equals itself."""
    flat = tensor.detach().contiguous().view(-1)
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()
