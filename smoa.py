"""SMoA, the Spectrum Modulation Adapter, in one file to read, check and copy.

Liu et al., "SMoA: Spectrum Modulation Adapter for Parameter-Efficient Fine-Tuning", arXiv 2605.21147 (2026).

A frozen weight W0 gets an update of high rank from few parameters. Order the rows and the columns of W0 by their place in
its singular spectrum, cut both orders into K pieces, and let one low-rank pair modulate each of the K aligned blocks:

    W0          = U diag(s) Vh                                   s descending, q = min(m, n) directions
    p_i         = sum_j j (s_j U_ij)^2 / sum_j (s_j U_ij)^2      position of row i; of a column, the same with V
    rows_k      = piece k of argsort(p) over the rows            cols_k likewise; pieces as torch.tensor_split
    M_k         = W0[rows_k, cols_k]                             the anchor, read from W0 itself, never stored again
    delta_W     = (alpha / r) (B_k A_k) * M_k  at (rows_k, cols_k), k = 1..K, and zero everywhere else
    y           = x (W0 + delta_W)^T + bias

    m, n   out_features, in_features        A_k   (r_k, n_k)   Kaiming-uniform, as nn.Linear
    r, K   rank budget, number of blocks    B_k   (m_k, r_k)   zero, so that delta_W = 0 at the start, exactly
    r_k    rank of branch k, sum_k r_k = r  M_k   (m_k, n_k)   frozen

Trained: sum_k r_k (m_k + n_k) numbers, r (m + n) / K where K divides r: K times fewer than LoRA of rank r. The rank of
delta_W can still reach sum_k min(m_k, n_k, r_k rank M_k), since a Hadamard product multiplies ranks; LoRA's stops at r.

One square holds the family: `num_blocks=1, modulate=False` is LoRA (2106.09685), `num_blocks=1` is HiRA (ICLR 2025),
`modulate=False, order="natural"` is MELoRA (2402.17263), and the default is SMoA.

    names = smoa.inject(model, ["q_proj", "v_proj"], rank=8, num_blocks=4)   # the rest of the model is frozen
    ...                                                                      # train as ever
    smoa.save(model, "adapter.pt")                                           # factors, orders, configuration
    smoa.load(fresh_model, "adapter.pt"); smoa.merge(fresh_model)            # runs at the base's own speed

Where this file departs from the paper's code, and why:
- The order is saved with the factors. Close positions sort differently on another machine, and the factors would land elsewhere.
- Equal singular values share their mean index and positions are compared to 6 decimals, so that exact ties go by index, not by rounding.
- With one block the order changes nothing, so none is computed: the factors of K = 1 are in the coordinates of the weight.
- Merging puts W0's own blocks aside and unmerging puts them back: bit for bit, in every dtype.

When not to use it: the step is scaled by |W0|, so it wants a learning rate several times LoRA's; a zero weight cannot be
adapted (its anchor is zero); and a higher rank is not by itself a better result, see README.md. Merge before generating token by token:
unmerged, a forward forms W0 + delta_W, which costs as much as r more tokens.
"""

import contextlib
import hashlib
import io
import pathlib
import re
import tempfile

import torch
import torch.nn.functional as F
from torch import nn


def _require(condition, message, error=ValueError):
    if not condition:
        raise error(message)


# ---------------------------------------------------------------------------------------------------------------------
# Pure functions: the order, the sizes, the counts


def _block_sizes(out_features, in_features, rank, num_blocks):
    """[(r_k, m_k, n_k)]: each total cut as `torch.tensor_split` cuts, as evenly as possible, the first pieces get the remainder."""
    for name, value in (
        ("out_features", out_features),
        ("in_features", in_features),
        ("rank", rank),
        ("num_blocks", num_blocks),
    ):
        _require(
            isinstance(value, int) and value >= 1,
            f"{name} must be a whole number of at least 1, got {value!r}",
        )
    _require(
        num_blocks <= min(out_features, in_features),
        f"num_blocks={num_blocks} does not fit a ({out_features}, {in_features}) weight: at most {min(out_features, in_features)} blocks do",
    )
    return [
        tuple(
            total // num_blocks + (k < total % num_blocks)
            for total in (rank, out_features, in_features)
        )
        for k in range(num_blocks)
    ]


def _check_weight(weight):
    _require(
        isinstance(weight, torch.Tensor),
        f"a weight must be a 2-D floating tensor, got {type(weight).__name__}",
        TypeError,
    )
    _require(
        weight.ndim == 2 and weight.is_floating_point(),
        f"a linear layer's weight must be a 2-D floating tensor, got {weight.dtype} of shape {tuple(weight.shape)}",
        TypeError,
    )
    _require(
        not weight.is_meta,
        "the weight is on the meta device and has no values to order by: load or initialise the model first",
    )
    _require(
        torch.isfinite(weight).all(),
        "the weight holds NaN or infinity: a spectrum needs finite numbers",
    )


def spectral_order(weight):
    """Rows and columns of a weight, sorted by their energy-weighted mean position in its singular spectrum.

    Args:
        weight: (m, n), floating, finite, any device. Computed in float64.
    Returns:
        row_order (m,) and col_order (n,), int64 permutations on the weight's device; ties keep their natural order.
    Raises:
        TypeError, ValueError: the weight is not 2-D floating, is on the meta device, or is not finite.
    Source: 2605.21147. The energies need one eigendecomposition of the smaller Gram matrix, W^T W = V s^2 V^T, not an SVD.

    >>> spectral_order(torch.diag(torch.tensor([1.0, 3.0, 2.0])))
    (tensor([1, 2, 0]), tensor([1, 2, 0]))
    """
    _check_weight(weight)
    W = weight.detach().to(
        "cpu" if weight.device.type == "mps" else weight.device, torch.float64
    )  # mps has no float64
    W = W / W.abs().max().clamp(
        min=torch.finfo(W.dtype).tiny
    )  # scale-free: squares can neither overflow nor vanish
    wide = W.shape[0] < W.shape[1]
    W = W.mT if wide else W  # (tall, q)
    s2, V = torch.linalg.eigh(W.mT @ W)  # ascending
    s2, V = s2.flip(0).clamp(min=0), V.flip(1)
    norms = W.square().sum(0)  # (q,), of the columns
    column_energy = (
        s2 * V.square() * (norms > 0)[:, None]
    )  # (s_j V_ij)^2, exactly 0 for a zero column
    if (
        (0 < norms) & (norms < 1e-7 * s2[0])
    ).any():  # such a small column drowns in the rounding of the Gram matrix
        U, s, Vh = torch.linalg.svd(W, full_matrices=False)
        s2, V, column_energy = s.square(), Vh.mT, (W.mT @ U).square()
    row_energy = (W @ V).square()  # (s_j U_ij)^2, accurate relative to each row

    # Within equal singular values the basis is free, so their directions share one index, the mean.
    group = F.pad(
        (s2[:-1] - s2[1:] > 2e-9 * s2[:-1] + 1e-14 * s2[0]).long().cumsum(0), (1, 0)
    )  # 1e-14: the rounding of the Gram matrix
    size = group.bincount().to(s2)
    index = (size.cumsum(0) - (size + 1) / 2)[group]  # 0..q-1 where all are apart

    def order(energy):
        position = (
            energy @ index / energy.sum(1).clamp(min=torch.finfo(s2.dtype).tiny)
        )  # a zero row stays at 0
        return torch.argsort(position.round(decimals=6), stable=True).to(weight.device)

    return (
        (order(column_energy), order(row_energy))
        if wide
        else (order(row_energy), order(column_energy))
    )


def count_parameters(out_features, in_features, rank, num_blocks):
    """Trained numbers of one layer, sum_k r_k (m_k + n_k). For rank divisible by num_blocks: LoRA's r (m + n), over K.

    >>> count_parameters(768, 768, rank=8, num_blocks=1), count_parameters(768, 768, rank=8, num_blocks=4)
    (12288, 3072)
    """
    return sum(
        r_k * (m_k + n_k)
        for r_k, m_k, n_k in _block_sizes(out_features, in_features, rank, num_blocks)
    )


def rank_bound(out_features, in_features, rank, num_blocks, *, modulate=True):
    """Upper bound on rank(delta_W) where every anchor has full rank: sum_k min(m_k, n_k, r_k rank M_k).

    Without the anchor (`modulate=False`, LoRA and MELoRA) it is sum_k min(m_k, n_k, r_k). Reached by generic factors.

    >>> rank_bound(768, 768, rank=8, num_blocks=4), rank_bound(768, 768, rank=8, num_blocks=4, modulate=False)
    (768, 8)
    """
    sizes = _block_sizes(out_features, in_features, rank, num_blocks)
    return sum(min(m_k, n_k, r_k * (min(m_k, n_k) if modulate else 1)) for r_k, m_k, n_k in sizes)


# ---------------------------------------------------------------------------------------------------------------------
# The layer


def _fold(W0, A, B, scale, modulate):
    """W0 + delta_W, (m, n), from the stacked pair A (r, n), B (m, r)."""
    with torch.autocast(W0.device.type, enabled=False):
        D = (
            B @ A if W0.is_contiguous() else (A.mT @ B.mT).mT
        )  # (m, r) @ (r, n) -> (m, n), in W0's memory layout
    out = None if torch.is_grad_enabled() else D  # reuse the buffer where autograd does not watch
    return (
        torch.addcmul(W0, D, W0, value=scale, out=out)
        if modulate
        else torch.add(W0, D, alpha=scale, out=out)
    )


def _stack(factors, rows, cols):
    """The pairs A_1..A_K, B_1..B_K as one, A (r, n) and B (m, r): their product is B_k A_k at (rows_k, cols_k) and 0 elsewhere."""
    A, B = (
        torch.block_diag(*factors[: len(rows)]),
        torch.block_diag(*factors[len(rows) :]),
    )  # in spectral order
    return torch.empty_like(A).index_copy(1, torch.cat(cols), A), torch.empty_like(B).index_copy(
        0, torch.cat(rows), B
    )


_PLAIN_UP_TO = (
    2**17
)  # weights in a layer; below that, autograd's full weight gradient takes less time than gathering blocks for a part of it


class _FoldedLinear(torch.autograd.Function):
    """y = x W^T + bias with W = W0 + delta_W. In one line, which autograd could also differentiate:

        y = F.linear(x, _fold(W0, *_stack(factors, rows, cols), scale, modulate=True), bias)

    This backward is leaner by two things: of the weight gradient g^T x it computes only the K aligned blocks, 1/K of
    the work, and it builds W again rather than keep one per layer from the forward to the backward.
    """

    @staticmethod
    def forward(ctx, x, W0, bias, rows, cols, scale, *factors):
        ctx.save_for_backward(x, W0, *factors)
        ctx.rows, ctx.cols, ctx.scale = rows, cols, scale
        return F.linear(x, _fold(W0, *_stack(factors, rows, cols), scale, modulate=True), bias)

    @staticmethod
    def backward(ctx, g):
        x, W0, *factors = ctx.saved_tensors  # (T, n), (m, n)
        K, grads = len(ctx.rows), [None] * len(factors)
        # (T, m) @ (m, n) -> (T, n)
        dx = (
            g
            @ _fold(W0, *_stack(factors, ctx.rows, ctx.cols), ctx.scale, modulate=True).to(g.dtype)
            if ctx.needs_input_grad[0]
            else None
        )
        for k, (rows, cols, A_k, B_k) in enumerate(zip(ctx.rows, ctx.cols, factors, factors[K:])):
            if len(A_k):
                g_k, x_k = (
                    g.gather(1, rows.expand(len(g), -1)),
                    x.gather(1, cols.expand(len(x), -1)).to(g.dtype),
                )
                G_k = (g_k.mT @ x_k).to(A_k.dtype) * W0.index_select(0, rows).index_select(
                    1, cols
                )  # (m_k, T) @ (T, n_k) -> (m_k, n_k)
                grads[k], grads[K + k] = ctx.scale * (B_k.mT @ G_k), ctx.scale * (G_k @ A_k.mT)
        return dx, None, None, None, None, None, *grads


def _permutation(order, size, name):
    """An order from outside, as an int64 tensor of its own."""
    order = torch.as_tensor(order if isinstance(order, torch.Tensor) else list(order))
    _require(
        not order.is_floating_point() and sorted(order.tolist()) == list(range(size)),
        f"{name} must be a permutation of 0..{size - 1}, got {order}",
    )
    return order.long().clone()


def _is_conv1d(base):
    """GPT-2's Conv1D of Hugging Face: a linear layer that keeps its weight as (in, out)."""
    return any(cls.__name__ == "Conv1D" for cls in type(base).__mro__)


def _check_linear(base):
    """Raise unless `base` can be wrapped: a 2-D floating finite `weight` and a `bias` that is None or matches it."""
    kind = type(base).__name__
    _require(
        not isinstance(base, SMoALinear),
        "this layer is adapted already: unload it first, or load another adapter onto the model",
    )
    linear = (
        isinstance(base, nn.Module)
        and hasattr(base, "weight")
        and hasattr(base, "bias")
        and not hasattr(base, "normalized_shape")
    )
    _require(
        linear,
        f"{kind} is no linear layer: SMoA wraps nn.Linear, or a module with its weight and bias",
        TypeError,
    )
    _require(
        "weight" in base._parameters,
        f"the weight of this {kind} is computed, by a parametrization or a hook: remove that first",
        TypeError,
    )
    _check_weight(base.weight)
    m = base.weight.shape[1 if _is_conv1d(base) else 0]
    _require(
        base.bias is None or base.bias.shape == (m,),
        f"{kind} is no linear layer: its bias is {getattr(base.bias, 'shape', None)}, not ({m},)",
        TypeError,
    )


class SMoALinear(nn.Module):
    """A linear layer with a frozen base and a trainable update, y = x (W0 + delta_W)^T + bias.

    Args:
        base: nn.Linear, a module with the same `weight` (m, n) and `bias` (m,) or None, or GPT-2's Conv1D with `weight` (n, m).
            Kept as `.base` and frozen, never copied or re-initialised.
        rank: r >= 1, the sum of the branch ranks.
        num_blocks: K, 1 to min(m, n).
        alpha: the update is scaled by alpha / rank; None means alpha = rank, scale 1.
        dropout: probability in [0, 1) on the adapter's input, never on the base's.
        branch_ranks: K ranks that sum to `rank`; None splits it evenly, the first get the remainder, so r < K leaves blocks without a branch.
        modulate: multiply by the anchor; False leaves B_k A_k alone.
        order: "spectral", "natural", or a pair of permutations (rows (m,), columns (n,)). With one block "spectral" is "natural".

    Attributes:
        A, B: `A[k]` (r_k, n_k) and `B[k]` (m_k, r_k), in float32, or float64 over a float64 base.
        row_order (m,), col_order (n,): int64 buffers; `rows[k]`, `cols[k]` are their pieces.
        weight, bias: W0 + delta_W, in the base's own orientation and rounded to its dtype. For parents that read them past
            `forward`, as nn.MultiheadAttention does.
        merged: whether `base.weight` holds W0 + delta_W.
    Raises:
        TypeError: `base` is no linear layer, or its weight no 2-D floating tensor. ValueError: anything else out of range.
    """

    def __init__(
        self,
        base,
        rank=8,
        num_blocks=2,
        *,
        alpha=None,
        dropout=0.0,
        branch_ranks=None,
        modulate=True,
        order="spectral",
    ):
        super().__init__()
        _check_linear(base)
        self.transposed = _is_conv1d(base)
        weight = self._turn(base.weight.detach())
        m, n = self.out_features, self.in_features = weight.shape
        sizes = _block_sizes(m, n, rank, num_blocks)
        ranks = [r_k for r_k, _, _ in sizes] if branch_ranks is None else list(branch_ranks)
        _require(
            all(isinstance(r_k, int) and r_k >= 0 for r_k in ranks)
            and len(ranks) == num_blocks
            and sum(ranks) == rank,
            f"branch_ranks must be {num_blocks} whole numbers of at least 0 that sum to rank={rank}, got {ranks}",
        )
        alpha, dropout = float(rank if alpha is None else alpha), float(dropout)
        _require(0 < alpha < float("inf"), f"alpha must be positive and finite, got {alpha!r}")
        _require(0 <= dropout < 1, f"dropout must be in [0, 1), got {dropout!r}")
        self.rank, self.num_blocks, self.alpha, self.dropout, self.modulate = (
            rank,
            num_blocks,
            alpha,
            dropout,
            bool(modulate),
        )
        self.scale, self.branch_ranks = alpha / rank, ranks
        if isinstance(order, str) and order in ("spectral", "natural"):
            order = (
                spectral_order(weight)
                if order == "spectral" and num_blocks > 1
                else (range(m), range(n))
            )
        _require(
            isinstance(order, (tuple, list)) and len(order) == 2,
            f'order must be "spectral", "natural" or a pair of permutations, got {order}',
        )
        self.register_buffer(
            "row_order", _permutation(order[0], m, "the order of the rows").to(weight.device)
        )
        self.register_buffer(
            "col_order", _permutation(order[1], n, "the order of the columns").to(weight.device)
        )
        # Half precision is for the frozen weight; a factor that learns by small steps needs float32.
        options = dict(dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        for r_k, (_, m_k, n_k) in zip(ranks, sizes):
            A_k = torch.empty(r_k, n_k, **options)
            self.A.append(
                nn.Parameter(
                    nn.init.kaiming_uniform_(A_k, a=5**0.5) if r_k else A_k, requires_grad=r_k > 0
                )
            )
            self.B.append(nn.Parameter(torch.zeros(m_k, r_k, **options), requires_grad=r_k > 0))
        self.base = base.requires_grad_(False)
        self.enabled = True  # False inside `disabled(model)`
        self._replaced = None  # the blocks of W0 that a merge put aside, K times (m_k, n_k)
        self.train(base.training)

    def extra_repr(self):
        return f"rank={self.rank}, num_blocks={self.num_blocks}, alpha={self.alpha}, dropout={self.dropout}, modulate={self.modulate}"

    @property
    def rows(self):
        """K pieces of `row_order`: rows[k] (m_k,) are the output coordinates of block k."""
        return self.row_order.tensor_split(self.num_blocks)

    @property
    def cols(self):
        """K pieces of `col_order`: cols[k] (n_k,) are the input coordinates of block k."""
        return self.col_order.tensor_split(self.num_blocks)

    @property
    def merged(self):
        return self._replaced is not None

    def _turn(self, weight):
        """From the base's own orientation to nn.Linear's (m, n), or back."""
        return weight.mT if self.transposed else weight

    def _blocks(self, weight):
        return [
            weight[rows[:, None], cols] for rows, cols in zip(self.rows, self.cols)
        ]  # (m_k, n_k) each, a copy

    def _put(self, blocks, weight):
        for rows, cols, block in zip(self.rows, self.cols, blocks):
            weight[rows[:, None], cols] = block.to(weight)
        return weight

    def original_weight(self):
        """W0, (m, n) in the orientation of nn.Linear.weight, merged or not. A view of the base's weight where that is W0."""
        weight = self._turn(self.base.weight)
        return self._put(self._replaced, weight.detach().clone()) if self.merged else weight

    def _stacked(self):
        return _stack([*self.A, *self.B], self.rows, self.cols)

    def delta_weight(self):
        """delta_W, (m, n) in the orientation of nn.Linear.weight, differentiable in A and B; in the dtype of the factors."""
        W0 = self.original_weight()
        delta = _fold(torch.zeros_like(W0), *self._stacked(), self.scale, modulate=False)
        return delta * W0 if self.modulate else delta

    @property
    def weight(self):
        if self.merged or not self.enabled:
            return self._guard(self.base.weight)
        return self._turn(
            _fold(self.original_weight(), *self._stacked(), self.scale, self.modulate)
        ).to(self.base.weight.dtype)

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        if self.merged or not self.enabled:
            return self._guard(self.base(x))
        W0 = self.original_weight()
        if self.modulate and self._folds():
            # A small layer, or a base that somebody unfroze: autograd's own gradient, of the whole weight.
            if W0.numel() <= _PLAIN_UP_TO or any(
                t is not None and t.requires_grad for t in (W0, self.bias)
            ):
                return F.linear(
                    x, _fold(W0, *self._stacked(), self.scale, modulate=True), self.bias
                )
            y = _FoldedLinear.apply(
                x.reshape(-1, x.shape[-1]),
                W0,
                self.bias,
                self.rows,
                self.cols,
                self.scale,
                *self.A,
                *self.B,
            )
            return y.view(*x.shape[:-1], self.out_features)
        z = F.dropout(x, self.dropout, self.training)
        if not self.modulate:  # LoRA, MELoRA: a thin detour, (T, n) @ (n, r) @ (r, m) -> (T, m)
            A, B = self._stacked()
            return self.base(x) + self.scale * F.linear(F.linear(z, A.to(z.dtype)), B.to(z.dtype))
        blocks = [
            F.linear(
                z[..., cols], (self.scale * (B_k @ A_k) * M_k).to(z.dtype)
            )  # (T, n_k) @ (n_k, m_k) -> (T, m_k)
            for M_k, cols, A_k, B_k in zip(self._blocks(W0), self.cols, self.A, self.B)
        ]
        return self.base(x) + torch.cat(blocks, -1)[..., self.row_order.argsort()]

    def _guard(self, tensor):
        """The tensor, whose backward raises where a merged layer would only look as if it trained."""
        training = self.merged and self.training and torch.is_grad_enabled()
        return _NoGradientPastMerge.apply(tensor, *self.A, *self.B) if training else tensor

    def _folds(self):
        """Whether one matmul with W0 + delta_W says the same as two. Not under dropout, which acts on the update's input alone;
        not over half precision, whose rounding of the sum swallows a small delta_W; not for a base with a forward of its own."""
        plain = "forward" not in vars(self.base) and (
            self.transposed or type(self.base).forward is nn.Linear.forward
        )
        plain = plain and not (
            self.base._forward_pre_hooks or self.base._forward_hooks or self.base._backward_hooks
        )
        return (
            plain
            and self.base.weight.dtype in (torch.float32, torch.float64)
            and not (self.training and self.dropout)
        )

    @torch.no_grad()
    def merge(self):
        """Put W0 + delta_W into `base.weight`, in place, keeping the blocks of W0 that it replaces. Merging twice is merging once.

        Every module that shares the weight sees the change: `smoa.merge(model)` checks for that, a lone layer cannot.
        """
        if not self.merged:
            W0 = self.original_weight().detach()
            self._replaced, blocks = (
                self._blocks(W0),
                self._blocks(_fold(W0, *self._stacked(), self.scale, self.modulate)),
            )
            self._put(blocks, W0)

    @torch.no_grad()
    def unmerge(self):
        """Put W0 back into `base.weight`, bit for bit. Harmless on a layer that is not merged."""
        if self.merged:
            self._put(self._replaced, self._turn(self.base.weight.detach()))
            self._replaced = None

    # A state dict always holds W0, merged or not, so that it fits a freshly injected model.

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        if self.merged:
            state[kwargs.get("prefix", "") + "base.weight"] = self._turn(self.original_weight())
        return state

    def _load_from_state_dict(self, *args, **kwargs):
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)


class _NoGradientPastMerge(torch.autograd.Function):
    """The identity, whose backward raises: a merged layer has no factors to train, and must not look as if it had."""

    @staticmethod
    def forward(ctx, y, *factors):
        return y.clone()  # a view could not be changed in place, as nn.ReLU(inplace=True) does

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError(
            "backward through a merged SMoALinear in training mode: call smoa.unmerge(model) to train, or model.eval()"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Verbs on a model


def _unwrap(model):
    """The model inside DistributedDataParallel, DataParallel or torch.compile, so that names are the plain model's."""
    while hasattr(model, "_orig_mod") or isinstance(
        model, (nn.parallel.DistributedDataParallel, nn.DataParallel)
    ):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def adapters(model):
    """Iterate over (dotted name, SMoALinear), in the order of `model.named_modules()`."""
    return (
        (name, module)
        for name, module in _unwrap(model).named_modules()
        if isinstance(module, SMoALinear)
    )


def _swap(model, new):
    """Put new[module] wherever a module hangs in the model; a shared one hangs in several places."""
    for parent in list(model.modules()):
        parent._modules.update(
            {name: new[child] for name, child in parent._modules.items() if child in new}
        )


def _adapt(model, plan, progress=None, state=None, check_base=True):
    """Wrap modules, {name: (module, options)}, and freeze the rest. With a `state` they take its values, and the place of all other adapters.

    All is built and checked before the model changes, so that an error leaves it as it was.
    """
    _require(
        not isinstance(model, nn.parallel.DistributedDataParallel),
        "adapt the model before DistributedDataParallel wraps it",
    )
    model, new = (
        _unwrap(model),
        nn.Module(),
    )  # `new` holds the layers side by side, under their dotted names
    with contextlib.ExitStack() as after:
        for p in model.parameters():
            after.callback(
                p.requires_grad_, p.requires_grad
            )  # a layer freezes its base when it is built: too early
        for name, (module, options) in plan.items():
            try:
                new._modules[name] = layer = SMoALinear(module, **options)
                _require(
                    not layer.dropout
                    or not isinstance(
                        model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention
                    ),
                    "nn.MultiheadAttention reads the weight past forward, where dropout cannot act: use dropout=0",
                )
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from None
            if progress is not None:
                progress(len(new._modules), len(plan), name)
        if state is not None:
            load_state_dict(new, state, check_base=check_base)
            unload(model)
    _swap(model, {layer.base: layer for layer in new.children()})
    factors = {p for _, layer in adapters(model) for p in [*layer.A, *layer.B]}
    for p in model.parameters():
        p.requires_grad_(p.requires_grad and p in factors)


def inject(model, targets, *, progress=None, **layer_options):
    """Wrap every target in a SMoALinear, in place, and freeze everything but the adapters.

    Running statistics, as BatchNorm's, are no parameters: they move on in training mode, and no adapter file holds them.

    Args:
        targets: a list of names, each of which matches the modules whose dotted name equals it or ends in "." + it;
            or one string, a regular expression that the whole dotted name must match.
        progress: None, or a function (done, total, name), called after each layer: orders of large layers take seconds.
        layer_options: of SMoALinear, the same for all.
    Returns:
        The dotted names of the layers adapted now.
    Raises:
        ValueError: a target matches nothing, a layer is adapted already, an option is out of range. TypeError: a match is no
        linear layer. The model is then as before.
    """
    inside = {
        module for _, layer in adapters(model) for module in layer.modules() if module is not layer
    }
    modules = {
        name: module
        for name, module in _unwrap(model).named_modules(remove_duplicate=False)
        if name and module not in inside
    }
    linear = {
        name.rpartition(".")[2]
        for name, module in modules.items()
        if isinstance(module, (nn.Linear, SMoALinear)) or _is_conv1d(module)
    }
    wanted, patterns = (
        set(),
        {targets: targets}
        if isinstance(targets, str)
        else {target: r"(.*\.)?" + re.escape(target) for target in targets},
    )
    for target, pattern in patterns.items():
        found = {module for name, module in modules.items() if re.fullmatch(pattern, name)}
        _require(
            found,
            f"target {target!r} matches no module; this model's linear layers are named {', '.join(sorted(linear)) or '(none)'} (in a "
            "list, a name or the end of a dotted one; a lone string is a regular expression for the whole dotted name)",
        )
        wanted |= found
    _require(wanted, "no targets given: name at least one module")
    # In the model's order, and a shared module once.
    plan = {
        name: (module, layer_options)
        for name, module in _unwrap(model).named_modules()
        if module in wanted
    }
    _adapt(model, plan, progress)
    return list(plan)


def _sketch(weight):
    """1025 numbers that tell a weight from another: L^T W0 R / 32 with fixed probes of 32 columns, which keeps distances, and its norm.

    For a difference E, the squared norm of L^T E R / 32 is about ||E||_F^2 (a random projection: Johnson and Lindenstrauss).
    The probes are chirps, sqrt(2) cos(i^2 sqrt(a)): as good as random for this, and the same on every machine.
    """
    W = weight.detach().cpu().double()
    L, R = (
        2**0.5
        * torch.cos(
            torch.outer(
                W.new_tensor(range(1, size + 1)).square(), W.new_tensor(range(1, 33)).sqrt()
            )
        )
        for size in W.shape
    )
    return torch.cat(
        [(L.mT @ W @ R).flatten() / 32, W.norm()[None]]
    )  # (32, m) @ (m, n) @ (n, 32) -> (32, 32)


def state_dict(model):
    """The adapter alone: per layer its factors and orders, as views of the live ones, and a sketch of the base weight it belongs to."""
    state = {}
    for name, layer in adapters(model):
        prefix = f"{name}." if name else ""
        own = nn.Module.state_dict(layer)  # SMoALinear's would restore W0 for nothing
        state |= {prefix + key: value for key, value in own.items() if not key.startswith("base.")}
        state[f"{prefix}base_sketch"] = _sketch(layer.original_weight())
    return state


def load_state_dict(model, state, *, check_base=True):
    """Copy an adapter's state into the adapted layers of the model, which come out unmerged.

    Args:
        state: what `state_dict` gave for layers of the same names and shapes.
        check_base: refuse a base weight that differs from the adapter's own by more than 0.4 % in Frobenius norm:
            enough for a cast to bfloat16 (0.2 %), too little for another checkpoint.
    Raises:
        ValueError: keys, shapes, orders or a base weight do not fit. The model is then as before.
    """
    mine = state_dict(model)
    _require(
        mine and mine.keys() == state.keys(),
        "the adapter's layers are not the model's: "
        f"missing {sorted(mine.keys() - state.keys()) or 'none'}, unexpected {sorted(state.keys() - mine.keys()) or 'none'}",
    )
    for key, here in mine.items():
        there = state[key].to(here.device)
        _require(
            here.shape == there.shape,
            f"{key}: the adapter has shape {tuple(there.shape)}, the model {tuple(here.shape)}",
        )
        if key.endswith("_order"):
            _permutation(there, len(here), key)
        elif key.endswith("base_sketch") and check_base:
            distance, norm = (here - there).norm(), here[-1]
            _require(
                distance <= 0.004 * norm,
                f"{key.removesuffix('base_sketch')[:-1]}: the adapter was made for another base weight, "
                f"{distance / norm:.1%} away in Frobenius norm (0.4% is allowed); load that base, or pass check_base=False",
            )
    unmerge(model)
    for key, here in mine.items():
        here.copy_(state[key])


def _config(model):
    """What builds the adapter's layers again, but for their orders: {name: options of SMoALinear}."""
    options = ("rank", "num_blocks", "alpha", "dropout", "branch_ranks", "modulate")
    return {
        name: {option: getattr(layer, option) for option in options}
        for name, layer in adapters(model)
    }


def save(model, path):
    """Write the model's adapter, factors, orders and configuration, to one file; whole or not at all.

    The file is what `torch.save` writes of {"config": ..., "state": ...}, and its sha256 after it.

    Raises:
        ValueError: the model has no adapter.
    """
    state = {key: tensor.cpu() for key, tensor in state_dict(model).items()}
    _require(state, "the model has no adapter to save: inject one first")
    buffer = io.BytesIO()
    torch.save({"config": _config(model), "state": state}, buffer)
    body = buffer.getvalue()
    with tempfile.TemporaryDirectory(
        dir=pathlib.Path(path).parent
    ) as folder:  # beside the file, where a rename is all or nothing
        whole = pathlib.Path(folder, "adapter")
        whole.write_bytes(body + hashlib.sha256(body).digest())
        whole.replace(path)


def _read(path):
    """(configuration, state) of an adapter file. ValueError if it is anything but a whole one. No code in it can run."""
    raw = pathlib.Path(path).read_bytes()
    body, digest = raw[:-32], raw[-32:]
    try:
        # A zip file begins with PK. weights_only is unsafe for the older formats, which do not.
        _require(
            body.startswith(b"PK") and hashlib.sha256(body).digest() == digest,
            "its checksum does not match, or its format is another",
        )
        file = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        return file["config"], {key: tensor.cpu() for key, tensor in file["state"].items()}
    except Exception as error:
        raise ValueError(f"{path} is no SMoA adapter file, or is damaged: {error}") from error


def load(model, path, *, check_base=True):
    """Give the model the adapter of a file, and no other: layers that the file names are wrapped, all others are plain again.

    No spectrum is computed: the orders are in the file. Where the model has an adapter of the very same configuration, only
    its values change and an optimizer keeps its hold on them.

    Args:
        check_base: as in `load_state_dict`.
    Returns:
        The names of the adapted layers.
    Raises:
        OSError: the file cannot be read. ValueError: it is damaged, names a layer that the model has not, or does not fit
        the model's shapes or its base weights. The model is then as before.
    """
    config, state = _read(path)
    if config == _config(model):
        load_state_dict(model, state, check_base=check_base)
    else:
        bases = {
            name: module.base if isinstance(module, SMoALinear) else module
            for name, module in _unwrap(model).named_modules()
            if name
        }
        _require(
            config.keys() <= bases.keys(),
            f"the adapter's layers {sorted(config.keys() - bases.keys())} are not in the model",
        )
        with disabled(model):  # unmerged for the time of the check
            plan = {
                name: (bases[name], options | {"order": "natural"})
                for name, options in config.items()
            }
            _adapt(model, plan, state=state, check_base=check_base)
    return list(config)


def _check_untied(model):
    owners = [
        (p.data_ptr(), f"{name}.{key}")
        for name, module in _unwrap(model).named_modules()
        for key, p in module.named_parameters(recurse=False)
    ]
    for name, layer in adapters(model):
        mine = layer.base.weight.data_ptr()
        shared = [owner for pointer, owner in owners if pointer == mine]
        _require(
            len(shared) == 1,
            f"{name}: a merge would change {' and '.join(shared)}, which are one tensor: untie them first",
        )


def merge(model):
    """Fold every update into its base weight, in place; see SMoALinear.merge.

    Raises:
        ValueError: another module shares a weight to be merged, as tied embeddings do. No layer is then merged.
    """
    _check_untied(model)
    for _, layer in adapters(model):
        layer.merge()


def unmerge(model):
    """Put every base weight back, bit for bit."""
    for _, layer in adapters(model):
        layer.unmerge()


def unload(model, *, merge=False):
    """Take the adapters out: every SMoALinear becomes its base again, with the update folded in if `merge`. All stays frozen.

    Returns:
        The plain model (another object only where the model itself is a SMoALinear).
    """
    if merge:
        _check_untied(model)
    layers = [layer for _, layer in adapters(model)]
    for layer in layers:
        layer.merge() if merge else layer.unmerge()
        layer._replaced = None  # a merge is for good now
    _swap(_unwrap(model), {layer: layer.base for layer in layers})
    return _unwrap(model).base if isinstance(_unwrap(model), SMoALinear) else model


@contextlib.contextmanager
def disabled(model):
    """A context in which the model computes exactly what its base does; merged layers are unmerged for the time."""
    before = [(layer, layer.enabled, layer.merged) for _, layer in adapters(model)]
    try:
        for layer, _, _ in before:
            layer.unmerge()
            layer.enabled = False
        yield model
    finally:
        left = {layer for _, layer in adapters(model)}  # an unload inside stays one
        for layer, enabled, merged in before:
            layer.enabled = enabled
            if merged and layer in left:
                layer.merge()


def write_whole(path, data):
    """Write bytes to a file, whole or not at all. (A stand-in.)"""
    path = pathlib.Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = pathlib.Path(folder, path.name)
        whole.write_bytes(data)
        whole.replace(path)
