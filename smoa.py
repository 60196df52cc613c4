"""SMoA, the Spectrum Modulation Adapter, in one file to read, check and copy.

Liu et al., "SMoA: Spectrum Modulation Adapter for Parameter-Efficient Fine-Tuning",
arXiv 2605.21147 (2026).

A frozen weight W0 gets an update of high rank from few parameters. Order the rows and the columns
of W0 by their place in its singular spectrum, cut both orders into K pieces, and let one low-rank
pair modulate each of the K aligned blocks:

    W0       = U diag(s) Vh                                 s descending, q = min(m, n) directions
    p_i      = sum_j j (s_j U_ij)^2 / sum_j (s_j U_ij)^2    position of row i, j from 0; columns: V
    rows_k   = piece k of argsort(p) over the rows          cols_k likewise, as torch.tensor_split
    M_k      = W0[rows_k, cols_k]                           the anchor: W0 itself, no copy is kept
    delta_W  = (alpha / r) (B_k A_k) * M_k                  at (rows_k, cols_k); 0 elsewhere
    y        = x (W0 + delta_W)^T + bias

    m, n   out_features, in_features         A_k   (r_k, n_k)   Kaiming-uniform, as nn.Linear
    r, K   rank budget, number of blocks     B_k   (m_k, r_k)   zero: delta_W = 0 at the start
    r_k    rank of branch k, sum r_k = r     M_k   (m_k, n_k)   frozen
    T      rows of x: tokens, samples        x     (T, n), or (..., n)

Trained: sum_k r_k (m_k + n_k) numbers: where K divides r, 1/K of what LoRA of rank r trains.
The rank of delta_W still reaches sum_k min(m_k, n_k, r_k rank M_k): a Hadamard product multiplies
ranks; LoRA's stops at r.

One square holds the family: `num_blocks=1, modulate=False` is LoRA (2106.09685), `num_blocks=1`
is HiRA (ICLR 2025), `modulate=False, order="natural"` is MELoRA (2402.17263), the default is SMoA.

    names = smoa.inject(model, ["q_proj", "v_proj"], rank=8, num_blocks=4)  # the rest is frozen
    ...                                                                     # train as ever
    smoa.save(model, "adapter.pt")                                          # a file of its own
    smoa.load(fresh_model, "adapter.pt")
    smoa.merge(fresh_model)                                                 # at the base's speed

Where this file departs from the paper's code, and why:
- The order is saved with the factors. Close positions sort differently on another machine, and
  the factors would land elsewhere.
- Singular values that cannot be told apart share their mean index, and positions are compared to
  6 decimals, so that exact ties go by index, not by rounding.
- With one block the order changes nothing, so none is computed.
- Merging puts W0's own blocks aside and unmerging puts them back: bit for bit, in every dtype.

Recipe, and when not to use it: start with LoRA; more rank is no better by itself (README.md). For
SMoA take K = 2 and r_k = LoRA's r, as many parameters; search the rate around three times LoRA's,
by factors of two, since a step is scaled by |W0|; order="natural" spares the set-up and costs next
to nothing. Merge before generating token by token. A zero weight cannot be adapted: zero anchors.

Stop where you like: order, layer, verbs, file, counts, door (checks), small tools, what saves time.
"""

import contextlib
import copy
import hashlib
import io
import numbers
import os
import pathlib
import re
import shutil
import tempfile
import threading

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

# ------------------------------------------------------------------------------------------------
# The order


def spectral_order(weight):
    """Rows and columns of a weight, sorted by their mean position in its singular spectrum.

    With W = U diag(s) Vh, row i spreads its energy (s_j U_ij)^2 over the directions j; its position
    is the mean j, weighted with that energy. Of a column: the same with V (2605.21147).

    Args:
        weight: (m, n), floating, finite, any device. Computed in float64.
    Returns:
        row_order (m,) and col_order (n,), int64 permutations on the weight's device. Ties keep
        their natural order; a zero row or column has position 0.
    Raises:
        TypeError: the weight is no dense 2-D floating tensor.
        ValueError: it has no values (meta device), or not only finite ones.

    >>> spectral_order(torch.diag(torch.tensor([1.0, 3.0, 2.0])))
    (tensor([1, 2, 0]), tensor([1, 2, 0]))
    """
    _check_weight(weight)
    if weight.shape[0] < weight.shape[1]:  # so that W^T W below is the smaller Gram matrix
        col_order, row_order = spectral_order(weight.mT)
        return row_order, col_order

    W = _scaled_to_one(weight)
    s2, V, col_energy = _right_singular(W)  # s_j^2 (n,), V (n, n), s_j^2 V_ij^2 (n, n)
    row_energy = (W @ V).square()  # s_j^2 U_ij^2 (m, n), since W V = U diag(s)
    index = _direction_index(s2)  # 0, 1, ..., n - 1

    def sorted_by(energy):  # (size, n) -> (size,)
        position = energy @ index / energy.sum(1).clamp(min=_TINY)  # a zero row stays at 0
        # Ties must go by index, and rounding errors are far below 1e-6.
        return position.round(decimals=6).argsort(stable=True).to(weight.device)

    return sorted_by(row_energy), sorted_by(col_energy)


# ------------------------------------------------------------------------------------------------
# The layer


class SMoALinear(nn.Module):
    """A linear layer with a frozen base and a trained update, y = x (W0 + delta_W)^T + bias.

    Args:
        base: nn.Linear, a module with the same `weight` (m, n) and `bias` (m,) or None, or GPT-2's
            Conv1D, whose `weight` is (n, m). Kept as `.base` and frozen, never copied.
        rank: r >= 1, the sum of the branch ranks.
        num_blocks: K, 1 to min(m, n).
        alpha: the update is scaled by alpha / rank. None: alpha = rank, scale 1.
        dropout: probability in [0, 1) on the update's input, never on the base's.
        branch_ranks: K ranks that sum to `rank`. None: as even as can be, the first ones larger, so
            that r < K leaves blocks without a branch.
        modulate: multiply by the anchor. False leaves B_k A_k alone.
        order: "spectral", "natural", or a pair of permutations (rows (m,), columns (n,)). With one
            block "spectral" is "natural".

    Attributes:
        A, B: lists; A[k] (r_k, n_k) and B[k] (m_k, r_k) are parameters `A_k` and `B_k` in float32,
            in float64 over a float64 base. A branch of rank 0 has none: its entries are empty.
        row_order (m,), col_order (n,): int64. In the state dict, but no buffers: what averages or
            casts a model's buffers must not move them.
        weight, bias: W0 + delta_W in the base's own orientation, rounded to its dtype. For parents
            that read them past `forward`, as nn.MultiheadAttention does.
        merged: whether `base.weight` holds W0 + delta_W.
    Raises:
        TypeError: `base` is no linear layer. ValueError: anything else is out of range.
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
        W0 = self._turn(base.weight.detach())
        self.out_features, self.in_features = W0.shape
        self.branch_ranks = _checked_branch_ranks(branch_ranks, *W0.shape, rank, num_blocks)
        self.rank, self.num_blocks = rank, num_blocks = int(rank), int(num_blocks)
        self.alpha = _checked_alpha(rank if alpha is None else alpha)
        self.dropout = _checked_dropout(dropout)
        self.modulate = bool(modulate)
        if isinstance(order, str) and order == "spectral" and num_blocks > 1:
            order = spectral_order(W0)
        self.row_order, self.col_order = _checked_orders(order, *W0.shape, W0.device)
        # Half precision is for the frozen weight; a factor that learns in small steps needs more.
        options = dict(dtype=torch.promote_types(W0.dtype, torch.float32), device=W0.device)
        rows, cols = (order.tensor_split(num_blocks) for order in (self.row_order, self.col_order))
        for k, r_k in enumerate(self.branch_ranks):
            A_k = torch.empty(r_k, len(cols[k]), **options)
            B_k = torch.zeros(len(rows[k]), r_k, **options)
            if r_k > 0:
                nn.init.kaiming_uniform_(A_k, a=5**0.5)
                self.register_parameter(f"A_{k}", nn.Parameter(A_k))
                self.register_parameter(f"B_{k}", nn.Parameter(B_k))
            else:
                self.register_buffer(f"A_{k}", A_k, persistent=False)
                self.register_buffer(f"B_{k}", B_k, persistent=False)

        self.base = base.requires_grad_(False)
        self.base_kind = self.base_is_linear = None
        _ask_whether_linear(self)
        self.enabled = True  # False inside `disabled(model)`
        self._set_aside = None  # while merged: the K blocks of W0 that the merge replaced
        self.train(base.training)

    @property
    def rows(self):
        """K index tensors; rows[k] (m_k,) are the output coordinates of block k."""
        return self.row_order.to(self.A[0].device).tensor_split(self.num_blocks)

    @property
    def cols(self):
        """K index tensors; cols[k] (n_k,) are the input coordinates of block k."""
        return self.col_order.to(self.A[0].device).tensor_split(self.num_blocks)

    @property
    def scale(self):
        return self.alpha / self.rank

    @property
    def A(self):
        return [getattr(self, f"A_{k}") for k in range(self.num_blocks)]

    @property
    def B(self):
        return [getattr(self, f"B_{k}") for k in range(self.num_blocks)]

    def anchor(self, k):
        """M_k = W0[rows_k, cols_k], (m_k, n_k), to be read only."""
        if self.merged:
            return self._set_aside[k]
        return self._turn(self.base.weight)[self.rows[k]][:, self.cols[k]]

    def delta(self, k):
        """(alpha / r) (B_k A_k) * M_k, (m_k, n_k), in the dtype of the factors."""
        A_k, B_k = self.A[k], self.B[k]
        with _no_autocast(A_k.device):
            product = self.scale * (B_k @ A_k)  # (m_k, r_k) @ (r_k, n_k) -> (m_k, n_k)
        return product * self.anchor(k).to(product.dtype) if self.modulate else product

    def delta_weight(self):
        """delta_W (m, n): the deltas in their blocks, 0 elsewhere. Differentiable in A and B."""
        deltas = [self.delta(k) for k in range(self.num_blocks)]
        delta_W = deltas[0].new_zeros(self.out_features, self.in_features)  # with vmap's batch
        for rows_k, cols_k, delta_k in zip(self.rows, self.cols, deltas):
            delta_W[rows_k[:, None], cols_k] = delta_k
        return delta_W

    def original_weight(self):
        """W0 (m, n), merged or not; a view of the base's weight where that is W0."""
        W = self._turn(self.base.weight)
        if self.merged:
            W = W.detach().clone()
            self._put(W, self._set_aside)
        return W

    @property
    def weight(self):
        if self.merged or not self.enabled:
            return _no_gradient_past_merge(self, self.base.weight)
        W = self.original_weight() + self.delta_weight()
        return self._turn(W).to(self.base.weight.dtype)

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):  # (..., n) -> (..., m)
        if self.merged or not self.enabled:
            return _no_gradient_past_merge(self, self.base(x))
        if _is_bare(self.base) and x.layout == torch.strided and not x.is_nested:
            return _lean_forward(self, x)  # the same numbers in less time and memory: last section
        return self.plain_forward(x)

    def plain_forward(self, x):  # (..., n) -> (..., m)
        """The formula: the base runs with W0 + delta_W for its weight, or beside x delta_W^T."""
        with _alone():
            if _one_matmul_will_do(self, x):
                return torch.func.functional_call(self.base, {"weight": self.weight}, (x,))
            return _add_within(self.base, x, self.update)

    def update(self, x):  # (..., n) -> (..., m)
        """x delta_W^T, with dropout on x."""
        _check_at_hand(self, x)
        z = F.dropout(x, self.dropout, self.training)
        return _linear(self, z, self.delta_weight().to(_matmul_dtype(x)))

    @property
    def merged(self):
        return self._set_aside is not None

    @torch.no_grad()
    def merge(self):
        """Let base.weight become W0 + delta_W, in place; the blocks of W0 it replaces are kept.

        Until `unmerge`, backward in training mode and `nn.Module.state_dict` raise. What shares the
        weight changes too: `smoa.merge(model)` refuses that, a lone layer cannot.
        """
        if self.merged:
            return
        _check_own_weight(self.base, ValueError)
        anchors = [self.anchor(k) for k in range(self.num_blocks)]
        sums = [anchor + self.delta(k) for k, anchor in enumerate(anchors)]
        W = self._turn(self.base.weight)
        try:
            self._put(W, sums)
        except BaseException:  # half-way: W0 again, as far as it can be written
            with contextlib.suppress(Exception):
                self._put(W, anchors)
            raise
        self._set_aside = anchors

    @torch.no_grad()
    def unmerge(self):
        """Let base.weight become W0 again, bit for bit. Harmless on a layer that is not merged."""
        if self.merged:
            _check_own_weight(self.base, ValueError)
            self._put(self._turn(self.base.weight), self._set_aside)
            self._set_aside = None

    def get_extra_state(self):
        """The orders, (m + n,) int32, rows first: in the state dict, beside the factors."""
        _check_not_merged(self)
        return torch.cat([self.row_order, self.col_order]).int()

    def set_extra_state(self, orders):
        shape, device = (self.out_features, self.in_features), self.row_order.device
        orders = orders.tensor_split([self.out_features])
        self.row_order, self.col_order = _checked_orders(orders, *shape, device)

    def _load_from_state_dict(self, *args, **kwargs):
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn, *args, **kwargs):
        """`.to`, `.half`, `.cuda` and the like: an order changes its device and nothing else."""
        super()._apply(fn, *args, **kwargs)
        if self.merged:
            self._set_aside = [fn(anchor) for anchor in self._set_aside]
        device = self.A[0].device
        if device.type != "meta":
            self.row_order = self.row_order.to(device)
            self.col_order = self.col_order.to(device)
        return self

    def __getstate__(self):
        """For a copy or a pickle: `disabled` is over this layer, and over no copy of it."""
        return super().__getstate__() | {"enabled": True}

    def extra_repr(self):
        names = ("rank", "num_blocks", "alpha", "dropout", "modulate")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def _turn(self, W):
        """From the base's own orientation to (m, n), or back."""
        return W.mT if self.transposed else W

    def _put(self, W, blocks):
        """Write K blocks into W (m, n), in place."""
        for k, block in enumerate(blocks):
            W[self.rows[k][:, None], self.cols[k]] = block.to(W)


# ------------------------------------------------------------------------------------------------
# The verbs on a model


def adapters(model):
    """Iterate over (dotted name, SMoALinear), in the order of the model's modules.

    The names are the plain model's: what wraps it or a part of it (torch.compile, activation
    checkpointing, FSDP, DistributedDataParallel, AveragedModel) adds nothing to them.
    """
    seen = set()
    for name, module in _named_modules(model):
        if isinstance(module, SMoALinear) and module not in seen:
            seen.add(module)
            yield name, module


def inject(model, targets, **layer_options):
    """Wrap every target in a SMoALinear, in place, and freeze everything but the adapters.

    What is frozen loses the gradients of an earlier training: they would count when gradients are
    clipped.
    The order of a large layer takes seconds. To see it go on, adapt the layers one by one:
    `for name in tqdm(names): smoa.inject(model, [name])`. Of several processes let one inject and
    save, and all load: DistributedDataParallel sends factors around, but no orders.
    Running statistics, as BatchNorm's, are no parameters: they move on in training mode, and no
    adapter file holds them.

    Args:
        targets: a list of names, each of which matches the modules whose dotted name equals it or
            ends in "." + it; or one string, a regular expression for the whole dotted name.
        layer_options: of SMoALinear, the same for all.
    Returns:
        The dotted names of the layers adapted now, as `adapters` has them.
    Raises:
        ValueError: a target matches nothing, a layer is adapted already, its weight is tied by
            name to another, or an option is out of range.
        TypeError: a match is no linear layer.
        The model is then as before.
    """
    plan = _matches(model, targets)
    layers = _build(model, plan, {name: layer_options for name in plan})
    _install(model, layers.values())
    return list(layers)


def merge(model):
    """Let every base weight become W0 + delta_W, in place and in its dtype; see SMoALinear.merge.

    Raises:
        ValueError: a weight to be merged is another module's too (tied embeddings), is sharded, is
            computed by a parametrization or a pruning, or is not there; or the model is `disabled`.
            No layer is then merged.
    """
    _check_mergeable(model)
    _merge_all(model)


def unmerge(model):
    """Put every base weight back, bit for bit.

    Raises:
        ValueError: a merged weight has been sharded or become computed since.
    """
    _check_unmergeable(model)
    for _, layer in adapters(model):
        layer.unmerge()


def unload(model, *, merge=False):
    """Take the adapters out: every SMoALinear becomes its base again. Nothing is unfrozen.

    Args:
        merge: leave W0 + delta_W in the base, for good, instead of W0.
    Returns:
        The plain model (another object only where the model itself is a SMoALinear).
    """
    _check_removable(model)
    layers = [layer for _, layer in adapters(model)]
    if merge:
        _check_mergeable(model)
        _merge_all(model)
        for layer in layers:
            layer._set_aside = None  # for good: there is no way back
    else:
        unmerge(model)
    _swap(model, {layer: layer.base for layer in layers})
    return model.base if isinstance(model, SMoALinear) else model


_disabled = []  # (model, {layer: was it merged?}) of each `disabled` that is open


@contextlib.contextmanager
def disabled(model):
    """A context in which the model computes exactly what its base does.

    Merged layers are unmerged for the time. Layers that come in meanwhile are off as well.
    """
    _check_unmergeable(model)
    merged = {layer: layer.merged for _, layer in adapters(model)}
    here = model, merged
    _disabled.append(here)
    try:
        for layer in merged:
            layer.unmerge()
            layer.enabled = False
        yield model
    finally:
        _disabled[:] = [other for other in _disabled if other is not here]  # an equal one may stay
        here_now = [layer for _, layer in adapters(model)]
        for layer in (*merged, *here_now):  # those that were taken out may come back
            layer.enabled = _starts_enabled(layer)
        for layer in here_now:
            if merged.get(layer):
                _merge_once_enabled(layer)


def _merge_once_enabled(layer):
    """Merge now, or when the last `disabled` over the layer ends."""
    if layer.enabled:
        layer.merge()
    for _, merged in _disabled:
        if layer in merged:
            merged[layer] = True


def _starts_enabled(layer):
    modules = [module for model, _ in _disabled for module in model.modules()]
    return not any(layer.base is module for module in modules)


def state_dict(model):
    """The adapter alone, as a flat dict of tensors; the factors are the live ones.

    Per layer: `NAME.A_k` and `NAME.B_k` of every branch with a rank; `NAME.order`, (m + n,) int32,
    rows first, unless it is the natural order; `NAME.base_sketch`, which tells the base weight
    that it belongs to. Under FSDP2 every process must call it, and gets whole tensors.
    torch.func.functional_call and stack_module_state take no orders from any state: use them among
    layers of one order.
    """
    state = {}
    for name, layer in adapters(model):
        with _named_errors(name):
            for key, tensor in _layer_state(layer).items():
                state[_join(name, key)] = tensor
    return state


def load_state_dict(model, state, *, check_base=True):
    """Copy an adapter's state into the adapted layers of the model, which come out unmerged.

    Args:
        state: what `state_dict` gave for layers of the same names and shapes. It does not hold
            alpha, dropout and modulate, which must be the same; `load` sees to them.
        check_base: refuse a base weight that differs from the adapter's own by more than 0.4 % in
            Frobenius norm: enough for a cast to bfloat16 (0.2 %), not for another checkpoint.
    Raises:
        ValueError: names, shapes, orders or a base weight do not fit. The model is then as before.
    """
    _check_not_sharded(model, "given an adapter's state")
    _check_unmergeable(model)
    _fill(dict(adapters(model)), state, check_base)


# What the verbs are made of


def _merge_all(model):
    """Merge every layer, or none."""
    merged_now = [layer for _, layer in adapters(model) if not layer.merged]
    try:
        for layer in merged_now:
            layer.merge()
    except BaseException:  # out of memory, say
        for layer in merged_now:
            layer.unmerge()
        raise


# How wrappers name the one module that they wrap; "module" is theirs only in the types below.
_WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def _named_modules(model, name=""):
    """(dotted name, module) over the model, a shared module once for every place it hangs in.

    A wrapper passes its own name on to the module that it wraps.
    """
    yield name, model
    if isinstance(model, SMoALinear):
        return
    wraps = isinstance(model, _WRAPPERS) or not _WRAPPED.isdisjoint(model._modules.keys())
    for child_name, child in model._modules.items():
        if child is not None:
            yield from _named_modules(child, name if wraps else _join(name, child_name))


def _join(name, key):
    return f"{name}.{key}" if name else key


def _matches(model, targets):
    """{name: module} of the modules that the targets name, in the model's order, each once."""
    modules = {name: module for name, module in _named_modules(model) if name}  # the innermost
    raw_names = {module: name for name, module in model.named_modules()}
    if isinstance(targets, str):
        _check_pattern(targets)
        patterns = {targets: targets}
    else:
        targets = list(targets)
        names = all(isinstance(target, str) for target in targets)
        _require(names, f"targets must be names of modules, got {targets!r}", TypeError)
        patterns = {target: r"(.*\.)?" + re.escape(target) for target in targets}
    wanted = set()
    for target, pattern in patterns.items():
        found = set()
        for name, module in modules.items():
            if re.fullmatch(pattern, name) or re.fullmatch(pattern, raw_names.get(module, "")):
                found.add(module)
        _check_found(found, target, modules)
        wanted |= found
    _require(wanted, "no targets given: name at least one module")
    names = {}
    for name, module in modules.items():
        if module in wanted and module not in names:
            names[module] = name
    return {name: module for module, name in names.items()}


def _build(model, plan, options):
    """{name: new SMoALinear} over the modules of {name: module}; the model is as before."""
    _check_injectable(model, plan)
    requires_grad = {p: p.requires_grad for p in model.parameters()}
    layers = {}
    try:
        for name, module in plan.items():
            with _named_errors(name):
                layers[name] = SMoALinear(module, **options[name])
                _check_parent(model, layers[name])
                layers[name].enabled = _starts_enabled(layers[name])
    finally:  # a layer freezes its base, but the model may yet refuse it
        for p, value in requires_grad.items():
            if p.requires_grad != value:
                p.requires_grad_(value)
    return layers


def _swap(model, new):
    """Put new[module] wherever a module hangs in the model: a shared one hangs in several."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]


def _install(model, layers):
    """Put new layers in the place of their bases, and freeze all but factors.

    Factors that were there before keep their flag.
    """
    _swap(model, {layer.base: layer for layer in layers})
    factors = set()
    for _, layer in adapters(model):
        factors |= {*layer.A, *layer.B}
    for p in model.parameters():
        p.requires_grad_(p.requires_grad and p in factors)
        if not p.requires_grad:
            p.grad = None


def _layer_state(layer):
    _check_own_factors(layer)
    _check_has_values(layer)
    state = {}
    for k, r_k in enumerate(layer.branch_ranks):
        if r_k > 0:
            state[f"A_{k}"] = _unsharded(layer.A[k])
            state[f"B_{k}"] = _unsharded(layer.B[k])
    order = torch.cat([layer.row_order, layer.col_order]).int()
    if not torch.equal(order, _natural_order(layer)):
        state["order"] = order
    state["base_sketch"] = _sketch(layer)
    return state


def _natural_order(layer):
    device = layer.row_order.device
    sizes = (layer.out_features, layer.in_features)
    return torch.cat([torch.arange(size, dtype=torch.int32, device=device) for size in sizes])


def _fill(layers, state, check_base):
    """Check a state against {name: layer} as a whole, then copy it into the layers."""
    own = {}
    for name, layer in layers.items():
        with _named_errors(name):
            own[name] = _layer_state(layer)
        own[name].setdefault("order", _natural_order(layer))
    tensors = all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    _require(tensors, "a state must be a flat dict of tensors; a file is for smoa.load", TypeError)
    state = {key: tensor.detach() for key, tensor in state.items()}
    for name in layers:
        state.setdefault(_join(name, "order"), _natural_order(layers[name]))
    _check_state(layers, own, state, check_base)
    for name, layer in layers.items():
        layer.unmerge()
        for key, tensor in own[name].items():
            if key.startswith(("A_", "B_")):
                tensor.detach().copy_(state[_join(name, key)])
        layer.set_extra_state(state[_join(name, "order")])


# ------------------------------------------------------------------------------------------------
# The file: what torch.save writes of {"config": {NAME: options}, "state": state_dict(model)}, then
# 32 bytes, the sha256 of that


def save(model, path):
    """Write the model's adapter (factors, orders, configuration) to one file, whole or not at all.

    Under FSDP2 every process must call it; all write the same.

    Raises:
        ValueError: the model has no adapter.
        OSError: the file cannot be written.
    """
    state = {key: tensor.detach().cpu() for key, tensor in state_dict(model).items()}
    _require(state, "the model has no adapter to save: inject one first")
    buffer = io.BytesIO()
    torch.save({"config": _config(model), "state": state}, buffer)
    body = buffer.getvalue()
    write_whole(path, body + hashlib.sha256(body).digest())


def load(model, path, *, check_base=True):
    """Give the model the adapter of a file, and no other: layers not in the file are plain again.

    No spectrum is computed: the orders are in the file. As after `inject`, the factors are what
    trains, and all else is frozen, without gradients: unfreeze a head after the load, and make the
    optimizer then.

    Args:
        check_base: as in `load_state_dict`.
    Returns:
        The names of the adapted layers.
    Raises:
        OSError: the file cannot be read.
        ValueError, TypeError: it is damaged, names a layer that the model has not or that is no
            linear one, or does not fit the shapes or the base weights. The model is as before.
    """
    _check_not_sharded(model, "given an adapter")
    _check_removable(model)
    config, state = _read(path)
    if isinstance(model, SMoALinear):  # it hangs nowhere, where another could take its place
        _check_same_config(config, _config(model))
        load_state_dict(model, state, check_base=check_base)
        return [""]
    bases = {}
    for name, module in _named_modules(model):
        if name:
            bases[name] = module.base if isinstance(module, SMoALinear) else module
    missing = sorted(config.keys() - bases.keys())
    _require(not missing, f"the adapter's layers {missing} are not in the model")
    with disabled(model):  # so that each base holds W0 while it is checked
        plan = {name: bases[name] for name in config}
        layers = _build(model, plan, {name: config[name] | {"order": "natural"} for name in plan})
        _fill(layers, state, check_base)
        unload(model)
        _install(model, layers.values())
    return list(config)


def _config(model):
    """{name: options of SMoALinear}: what builds the layers again, but for their orders."""
    options = ("rank", "num_blocks", "alpha", "dropout", "branch_ranks", "modulate")
    config = {}
    for name, layer in adapters(model):
        config[name] = {option: getattr(layer, option) for option in options}
    return config


def _read(path):
    """(configuration, state) of a whole adapter file. No code in it can run."""
    raw = pathlib.Path(path).read_bytes()
    body, digest = raw[:-32], raw[-32:]
    try:
        _require(hashlib.sha256(body).digest() == digest, "its checksum does not match")
        _require(body.startswith(b"PK"), "it is no zip file")  # weights_only wants the new format
        file = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        return file["config"], {key: tensor.cpu() for key, tensor in file["state"].items()}
    except Exception as error:
        raise ValueError(f"{path} is no SMoA adapter file, or is damaged: {error}") from error


def write_whole(path, data):
    """Write bytes to a file: all, or it stays as it was, whenever this process may be stopped.

    The data go to a temporary file beside it, which then takes its name: the folder must let us
    write. As with a plain write, an old file keeps its mode, a symbolic link still points to it,
    and a pipe or device gets the data.

    Raises:
        OSError: of this path.
    """
    path = pathlib.Path(path)
    if path.exists() and not path.is_file():
        path.write_bytes(data)  # a pipe or device; a folder raises
        return
    target = pathlib.Path(os.path.realpath(path))
    if target.is_file() or target.is_symlink():  # a link is left where links lead round in a circle
        target.open("r+b").close()  # raises where we may not write
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, suffix=".tmp") as folder:
            whole = pathlib.Path(folder, target.name)
            whole.write_bytes(data)
            if target.is_file():
                shutil.copymode(target, whole)
                _copy_owner(target, whole)
            whole.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _copy_owner(source, target):
    """Where we may: another user's file stays that user's when root rewrites it."""
    if hasattr(os, "chown"):
        with contextlib.suppress(PermissionError):
            os.chown(target, source.stat().st_uid, source.stat().st_gid)


def _sketch(layer):
    """1025 float32 numbers that tell a W0 from another: L^T W0 R / 32 and the norm of W0.

    L and R are fixed probes of 32 columns. For a difference E, the squared norm of L^T E R / 32 is
    about ||E||_F^2 (a random projection: Johnson and Lindenstrauss). The probes are chirps,
    sqrt(2) cos(i^2 sqrt(a)): as good as random for this, and the same on every machine.
    """
    W = _unsharded(layer.original_weight()).detach().cpu().double()
    probes = []
    a = W.new_tensor(range(1, 33))
    for size in W.shape:
        i = W.new_tensor(range(1, size + 1))
        probes.append(2**0.5 * torch.cos(torch.outer(i.square(), a.sqrt())))  # (size, 32)
    L, R = probes
    projection = L.mT @ W @ R / 32  # (32, m) @ (m, n) @ (n, 32) -> (32, 32)
    return torch.cat([projection.flatten(), W.norm()[None]]).float()


def _unsharded(tensor):
    """A tensor sharded by FSDP2 in one piece; any other as it is."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor


# ------------------------------------------------------------------------------------------------
# The counts


def count_parameters(out_features, in_features, rank, num_blocks):
    """Trained numbers of one layer: sum_k r_k (m_k + n_k).

    Where num_blocks divides rank, that is LoRA's r (m + n), over K.

    >>> count_parameters(768, 768, rank=8, num_blocks=1)
    12288
    >>> count_parameters(768, 768, rank=8, num_blocks=4)
    3072
    """
    sizes = _block_sizes(out_features, in_features, rank, num_blocks)
    return sum(r_k * (m_k + n_k) for r_k, m_k, n_k in sizes)


def rank_bound(out_features, in_features, rank, num_blocks, *, modulate=True):
    """Upper bound on rank(delta_W) where every anchor has full rank. Generic factors reach it.

    sum_k min(m_k, n_k, r_k rank M_k), since rank(X * Y) <= rank X rank Y; without the anchor (LoRA,
    MELoRA) sum_k min(m_k, n_k, r_k).

    >>> rank_bound(768, 768, rank=8, num_blocks=4)
    768
    >>> rank_bound(768, 768, rank=8, num_blocks=4, modulate=False)
    8
    """
    bound = 0
    for r_k, m_k, n_k in _block_sizes(out_features, in_features, rank, num_blocks):
        anchor_rank = min(m_k, n_k) if modulate else 1
        bound += min(m_k, n_k, r_k * anchor_rank)
    return bound


def _block_sizes(out_features, in_features, rank, num_blocks):
    """[(r_k, m_k, n_k)]: each total cut as evenly as can be, the first pieces one larger."""
    _check_sizes(out_features, in_features, rank, num_blocks)

    def piece(total, k):
        return total // num_blocks + (k < total % num_blocks)

    totals = (rank, out_features, in_features)
    return [tuple(piece(total, k) for total in totals) for k in range(num_blocks)]


# ------------------------------------------------------------------------------------------------
# The door: every check, and what it says


def _require(condition, message, error=ValueError):
    if not condition:
        raise error(message)


def _check_sizes(out_features, in_features, rank, num_blocks):
    sizes = dict(
        out_features=out_features, in_features=in_features, rank=rank, num_blocks=num_blocks
    )
    for name, size in sizes.items():
        whole = isinstance(size, numbers.Integral) and size >= 1
        _require(whole, f"{name} must be a whole number of at least 1, got {size!r}")
    most = min(out_features, in_features)
    _require(
        num_blocks <= most,
        f"num_blocks={num_blocks} does not fit a ({out_features}, {in_features}) weight: "
        f"at most {most} blocks do",
    )


def _checked_branch_ranks(branch_ranks, m, n, rank, num_blocks):
    even = [r_k for r_k, _, _ in _block_sizes(m, n, rank, num_blocks)]
    ranks = even if branch_ranks is None else list(branch_ranks)
    whole = all(isinstance(r_k, numbers.Integral) and r_k >= 0 for r_k in ranks)
    _require(
        whole and len(ranks) == num_blocks and sum(ranks) == rank,
        f"branch_ranks must be {num_blocks} whole numbers of at least 0 that sum to rank={rank}, "
        f"got {ranks}",
    )
    return [int(r_k) for r_k in ranks]


def _checked_alpha(alpha):
    alpha = float(alpha)
    _require(0 < alpha < float("inf"), f"alpha must be positive and finite, got {alpha!r}")
    return alpha


def _checked_dropout(dropout):
    dropout = float(dropout)
    _require(0 <= dropout < 1, f"dropout must be in [0, 1), got {dropout!r}")
    return dropout


def _checked_orders(order, m, n, device):
    """(row_order, col_order), int64 tensors of their own on the device."""
    if isinstance(order, str) and order in ("natural", "spectral"):  # "spectral": of one block
        order = (range(m), range(n))
    _require(
        isinstance(order, (tuple, list)) and len(order) == 2 and str not in map(type, order),
        f'order must be "spectral", "natural" or a pair of permutations, got {order}',
    )
    with torch.inference_mode(False):  # a later training step keeps them for its backward
        row_order = _checked_permutation(order[0], m, "the order of the rows")
        col_order = _checked_permutation(order[1], n, "the order of the columns")
        return row_order.to(device), col_order.to(device)


def _checked_permutation(order, size, name):
    if not isinstance(order, torch.Tensor):
        order = torch.tensor(list(order), device="cpu")  # whatever the default device is
    whole = order
    if order.is_floating_point():
        # The average of equal orders has rounding errors; that of others is no permutation at all.
        near = (order - order.round()).abs() < 0.01
        whole = torch.where(near, order.round(), order)
    is_permutation = whole.ndim == 1 and sorted(whole.tolist()) == list(range(size))
    _require(is_permutation, f"{name} must be a permutation of 0..{size - 1}, got {order}")
    return whole.long().clone()


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check_weight(weight):
    _require(
        isinstance(weight, torch.Tensor),
        f"a weight must be a 2-D floating tensor, got {type(weight).__name__}",
        TypeError,
    )
    _require(
        not _is_sharded(weight),
        "the weight is sharded over processes: adapt the model first, then shard it",
    )
    layout = "" if weight.layout == torch.strided else f", layout {weight.layout}"
    _require(
        weight.ndim == 2 and weight.numel() and weight.dtype in _DTYPES and not layout,
        "a linear layer's weight must be a dense 2-D tensor, not empty, of float16, bfloat16, "
        f"float32 or float64, got {weight.dtype} of shape {tuple(weight.shape)}{layout}",
        TypeError,
    )
    _require(
        not weight.is_meta,
        "the weight is on the meta device and has no values to order by: "
        "load or initialise the model first",
    )
    _require(
        torch.isfinite(weight).all(),
        "the weight holds NaN or infinity: a spectrum needs finite numbers",
    )


def _is_conv1d(base):
    """GPT-2's Conv1D of Hugging Face: a linear layer that keeps its weight as (in, out)."""
    named = any(cls.__name__ == "Conv1D" for cls in type(base).__mro__)
    return named and not isinstance(base, nn.Linear)


def _check_linear(base):
    kind = type(base).__name__
    _require(
        not isinstance(base, SMoALinear),
        "this layer is adapted already: unload it first, or load another adapter onto the model",
    )
    _require(isinstance(base, nn.Module), f"{kind} is no linear layer", TypeError)
    children = [name for name in base._modules.keys() if name != "parametrizations"]
    if "weight" not in base._parameters and children:
        holds = ", ".join(children)
        raise TypeError(
            f"{kind} is no plain linear layer but holds others ({holds}): target a linear layer "
            "among those; if this is another adapter's layer, take that adapter out first"
        )
    # LayerNorm and its kin have a weight and a bias, too.
    norm = hasattr(base, "eps") and not isinstance(base, nn.Linear)
    linear = hasattr(base, "weight") and hasattr(base, "bias") and not norm
    _require(
        linear,
        f"{kind} is no linear layer: SMoA wraps nn.Linear, or a module with its weight and bias",
        TypeError,
    )
    _check_own_weight(base, TypeError)
    _check_weight(base.weight)
    m = base.weight.shape[1 if _is_conv1d(base) else 0]
    bias_shape = None if base.bias is None else tuple(base.bias.shape)
    _require(
        bias_shape in (None, (m,)),
        f"{kind} is no linear layer: its bias has shape {bias_shape}, not ({m},)",
        TypeError,
    )


def _ask_whether_linear(layer):
    """Set `base_is_linear`, once for each kind of base: a tool may put another in its place."""
    base = layer.base
    kind = type(base), id(type(base).forward), "forward" in vars(base)
    if kind != layer.base_kind:
        layer.base_is_linear = _is_plain(base) or _is_linear_in_weight(base)
        layer.base_kind = kind


@torch.no_grad()
def _is_linear_in_weight(base):
    """Whether W -> base(x) - base(x; 0) is linear in W for one x: gelu(x W^T), say, is not."""
    if "forward" in vars(base):
        return False  # put on this one module: nobody can say what it reads
    W, n = base.weight, base.weight.shape[0 if _is_conv1d(base) else 1]
    x = torch.linspace(-1, 1, n, dtype=W.dtype, device=W.device)[None]
    V = 0.3 * W.flip(0, 1)  # no multiple of W: a rounding to three values, say, passes for linear
    cards = [W.device] if W.is_cuda else []
    try:
        probed = copy.copy(base)  # the base's own observers and statistics must not see the probe
        probed._modules, probed._buffers = copy.deepcopy((base._modules, base._buffers))
        with torch.random.fork_rng(cards):
            of_W, of_V, of_sum, far = (
                _through_own_forward(probed, x, Z) for Z in (W, V, W + V, -64 * W)
            )
        error = (of_sum - of_W - of_V).abs().max() + (far / 64 + of_W).abs().max()
        return bool(error <= 20 * torch.finfo(W.dtype).eps * n**0.5 * of_W.abs().max())
    except Exception:  # it wants another input, or gives no tensor: one cannot add to that
        return False


def _check_own_weight(base, error):
    _require(
        "weight" in base._parameters,
        f"the weight of this {type(base).__name__} is computed, by a parametrization, a hook "
        "(pruning, weight norm) or another adapter: remove that first",
        error,
    )


def _check_pattern(pattern):
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{pattern!r} is no regular expression ({error}): a lone string is one, for the whole "
            "dotted name; a list holds names, or ends of names"
        ) from None


def _check_found(found, target, modules):
    leaves = set()
    for name, module in modules.items():
        if isinstance(module, (nn.Linear, SMoALinear)) or _is_conv1d(module):
            leaves.add(name.rpartition(".")[2])
    _require(
        found,
        f"target {target!r} matches no module; this model's linear layers are named "
        f"{', '.join(sorted(leaves)) or '(none)'} (in a list, a name or the end of a dotted one; "
        "a lone string is a regular expression for the whole dotted name)",
    )


def _check_injectable(model, plan):
    """Refuse what would hold the old layer in a hand of its own, past the model's modules."""
    _require(
        not _is_fsdp(model),
        "the model is sharded over processes (FSDP): adapt it first, then shard it",
    )
    for name, layer in adapters(model):
        with _named_errors(name):
            _check_own_factors(layer)
    lazy = any(nn.parameter.is_lazy(p) for p in model.parameters())
    _require(not lazy, "the model has lazy layers, of no shape yet: run it once first")
    _check_not_tied_by_name(model, plan)
    _require(len(set(plan.values())) == len(plan), f"of {list(plan)}, some are one module")
    names = {module: name for name, module in plan.items()}
    _check_not_compiled(
        model,
        names,
        "this layer is compiled by itself, and what is compiled would not see the adapter: adapt "
        "first, then torch.compile",
    )
    for parent in model.modules():
        _require(
            not isinstance(parent, nn.parallel.DistributedDataParallel),
            "adapt the model before DistributedDataParallel wraps it",
        )
        for key, name in _held_in_lists(parent, names):
            raise ValueError(
                f"{name}: the model holds this layer in a plain list, too "
                f"({type(parent).__name__}.{key}), and would call it there without its adapter: "
                "make that an nn.ModuleList"
            )
        inner = getattr(parent, "base_layer", None)
        _require(
            inner not in names,
            f"{names.get(inner)}: another adapter ({type(parent).__name__}) wraps this layer and "
            "writes into its weight: take that adapter out first",
        )


def _held_in_lists(parent, names):
    """(attribute, name) of each of the modules {module: name} in a list that is no ModuleList."""
    for key, value in vars(parent).items():
        for part in value if isinstance(value, (list, tuple)) else ():
            if isinstance(part, nn.Module) and part in names:
                yield key, names[part]


def _check_not_compiled(model, names, message):
    """Refuse modules, {module: name}, that torch.compile has wrapped one by one."""
    for parent in model.modules():
        inner = getattr(parent, "_orig_mod", None)
        _require(inner not in names, f"{names.get(inner)}: {message}")


def _check_removable(model):
    _check_not_compiled(
        model,
        {layer: name for name, layer in adapters(model)},
        "this adapted layer is compiled by itself, and what is compiled would keep its adapter: "
        "compile the model, or call layer.compile(), which can follow",
    )


def _check_parent(model, layer):
    for parent in model.modules():
        if not isinstance(parent, nn.MultiheadAttention):
            continue
        children = [getattr(child, "base", child) for child in parent._modules.values()]
        _require(
            not (layer.base in children and layer.dropout),
            "nn.MultiheadAttention reads the weight past forward, where dropout cannot act: "
            "use dropout=0",
        )


@contextlib.contextmanager
def _named_errors(name):
    """Say in which layer an error arose."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}" if name else str(error)) from None


def _owners(model):
    """[(parameter, dotted name)] over the model; a shared one under each of its names."""
    owners = []
    for name, module in model.named_modules():
        for key, p in module._parameters.items():
            if p is not None:
                owners.append((p, _join(name, key)))
    return owners


def _check_not_tied_by_name(model, plan):
    """Hugging Face ties weights again by their names, which an adapter changes."""
    if not any(hasattr(module, "tie_weights") for module in model.modules()):
        return
    owners = _owners(model)
    for name, module in plan.items():
        weight = module._parameters.get("weight")
        shared = [owner for p, owner in owners if p is weight]
        _require(
            len(shared) < 2,
            f"{name}: {' and '.join(shared)} are one tensor, and this model ties them again by "
            "name (tie_weights): leave it out of the targets, or untie them first",
        )


def _check_mergeable(model):
    _check_not_sharded(model, "merged")
    places = _places(model)
    for name, layer in adapters(model):
        with _named_errors(name):
            _require(layer.enabled, "it is off: leave `disabled` before a merge")
            _check_own_weight(layer.base, ValueError)
            if layer.merged:
                continue
            weight = layer.base.weight
            _require(
                not any(tensor.is_meta for tensor in (weight, *layer.A, *layer.B)),
                "a weight or a factor is on the meta device, with no values to merge",
            )
            _require(0 not in weight.stride(), "entries of the weight share their memory (expand)")
            _require(
                not weight.is_inference() or torch.is_inference_mode_enabled(),
                "the weight was made under torch.inference_mode and cannot be written outside: "
                "load the model under torch.no_grad",
            )
            first, last, _ = _place(weight, "")
            shared = {owner for start, end, owner in places if start <= last and first <= end}
            _require(
                len(shared) == 1,
                f"a merge would change {' and '.join(sorted(shared))}, which share their memory: "
                "untie them first",
            )


def _place(tensor, owner):
    """(address of the first entry, of the last, owner) of a tensor."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + last * tensor.element_size(), owner


def _places(model):
    """The `_place` of every parameter and buffer; a shared one under each of its names."""
    places = []
    for name, module in model.named_modules():
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and tensor.layout == torch.strided and tensor.numel():
                if not (tensor.is_meta or _is_sharded(tensor)):
                    places.append(_place(tensor, _join(name, key)))
    return places


def _check_unmergeable(model):
    """Refuse to give back what a merge set aside, where it would not arrive."""
    merged = [(name, layer) for name, layer in adapters(model) if layer.merged]
    if merged:
        _check_not_sharded(model, "unmerged")
    for name, layer in merged:
        with _named_errors(name):
            _check_own_weight(layer.base, ValueError)


def _check_not_sharded(model, done):
    """Refuse shards, and weights that FSDP2 has gathered for a while: no write to them lasts."""
    for name, layer in adapters(model):
        with _named_errors(name):
            _check_is_tensor(layer)
    tensors = [t for _, layer in adapters(model) for t in (layer.base.weight, *layer.A, *layer.B)]
    sharded = any(_is_sharded(tensor) or tensor.ndim != 2 for tensor in tensors)
    _require(
        not (sharded or _is_fsdp(model)),
        f"a model that is sharded over processes (FSDP) cannot be {done}: do that to the plain "
        "model, then shard it (smoa.save writes a sharded model's adapter)",
    )


def _is_sharded(tensor):
    return hasattr(tensor, "full_tensor")


def _is_fsdp(model):
    """Whether FSDP, the first or the second, has a part of the model; told by names of classes."""
    classes = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    return not classes.isdisjoint({"FSDPModule", "FullyShardedDataParallel"})


def _check_own_factors(layer):
    own = {*layer._parameters, *layer._buffers}
    for k in range(layer.num_blocks):
        _require(
            {f"A_{k}", f"B_{k}"} <= own,
            f"the factors A_{k}, B_{k} are computed, by a parametrization or a pruning: remove "
            "that first",
        )


def _check_not_merged(layer):
    _require(
        not layer.merged,
        "a merged layer has no state dict: its base weight is W0 + delta_W, and its factors would "
        "be applied a second time. Call smoa.unmerge(model), or smoa.unload(model, merge=True) "
        "for a plain model (smoa.save writes the adapter of a merged model, too)",
        RuntimeError,
    )


def _check_is_tensor(layer):
    """A quantized module that took the base's place has a method `weight`, or one of integers."""
    weight = layer.base.weight
    _require(
        isinstance(weight, torch.Tensor) and weight.dtype in _DTYPES,
        f"the base is {type(layer.base)} now, whose weight is no anchor: "
        "smoa.unload(model, merge=True) before the model is quantized",
        TypeError,
    )


def _check_has_values(layer):
    _check_is_tensor(layer)
    for tensor in [layer.base.weight, *layer.A, *layer.B]:
        _require(
            not tensor.is_meta,
            "weights are on the meta device and have no values: save or load an adapter while "
            "the model is in memory, before it is offloaded",
        )
        _require(
            tensor.ndim == 2,
            "weights are flat shards of FullyShardedDataParallel: do this inside its "
            "summon_full_params(model)",
        )


def _check_linear_in_weight(layer):
    _ask_whether_linear(layer)
    _require(
        layer.base_is_linear,
        f"{type(layer.base).__name__} has a forward of its own that is not linear in its weight, "
        "so the update must be a part of the weight; but in half precision, under autocast or "
        "TF32, and with dropout, the two are computed apart: use float32 without dropout, or "
        "leave this layer out",
        RuntimeError,
    )


def _check_at_hand(layer, x):
    """Offloading and sharding bring weights back within a module's own call, and only there."""
    _check_is_tensor(layer)
    weight = layer.base.weight
    shape = (layer.out_features, layer.in_features)
    gone = weight.is_meta and not x.is_meta
    _require(
        not _is_sharded(weight),
        "the base weight is split over processes (a DTensor, as of tensor parallelism), where "
        "blocks of it cannot be had",
        RuntimeError,
    )
    _require(
        not gone and tuple(layer._turn(weight).shape) == shape,
        f"the base weight is not at hand: it is {tuple(weight.shape)} on {weight.device}, as "
        "offloading and sharding leave it outside of the base's own call. Keep the adapted layers "
        "on their device, or smoa.unload(model, merge=True) before offloading",
        RuntimeError,
    )


def _check_state(layers, own, state, check_base):
    """Check a flat state against {name: {key: tensor}} of the layers that are to take it."""
    wanted = {}
    for name, tensors in own.items():
        wanted |= {_join(name, key): tensor for key, tensor in tensors.items()}
    _require(
        wanted and wanted.keys() == state.keys(),
        "the adapter's layers are not the model's: "
        f"missing {sorted(wanted.keys() - state.keys()) or 'none'}, "
        f"unexpected {sorted(state.keys() - wanted.keys()) or 'none'}",
    )
    for key, tensor in wanted.items():
        new = state[key]
        _require(
            new.layout == torch.strided and not new.is_meta and not new.is_complex(),
            f"{key}: a dense real tensor with values is wanted, got {new.layout}, {new.dtype} on "
            f"{new.device}",
        )
        shape, own_shape = tuple(new.shape), tuple(tensor.shape)
        _require(shape == own_shape, f"{key}: the adapter has shape {shape}, the model {own_shape}")
    for name, layer in layers.items():
        m, n = layer.out_features, layer.in_features
        order_key = _join(name, "order")
        with _named_errors(order_key):
            _checked_orders(state[order_key].tensor_split([m]), m, n, "cpu")
        if check_base:
            key = _join(name, "base_sketch")
            _check_base(name, wanted[key], state[key].to(wanted[key].device))


def _check_same_config(config, own_config):
    _require(
        config == own_config,
        f"a lone SMoALinear can take an adapter of its own configuration only, {own_config}; "
        f"the file's is {config}",
    )


def _check_base(name, sketch, adapter_sketch):
    norm = sketch[-1]
    distance = (sketch - adapter_sketch).norm()
    _require(
        distance <= 0.004 * norm,
        f"{name}: the adapter was made for another base weight, {distance / norm:.1%} away in "
        "Frobenius norm (0.4% is allowed); load that base, or pass check_base=False",
    )


class _NoGradientPastMerge(torch.autograd.Function):
    """The identity, whose backward raises: in a merged layer the factors take no part."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y, *factors):
        return y.clone()  # a view could not be changed in place, as nn.ReLU(inplace=True) does

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError(
            "backward through a merged SMoALinear in training mode: "
            "call smoa.unmerge(model) to train, or model.eval()"
        )

    @staticmethod
    def jvp(ctx, tangent, *factor_tangents):
        return tangent.clone()


def _no_gradient_past_merge(layer, tensor):
    """The tensor, whose backward raises where a merged layer would only look as if it trained."""
    if layer.merged and layer.training and torch.is_grad_enabled():
        return _NoGradientPastMerge.apply(tensor, *layer.A, *layer.B)
    return tensor


# ------------------------------------------------------------------------------------------------
# Number formats, hooks, and the singular spectrum: small tools for what stands above

_TINY = torch.finfo(torch.float64).tiny


def _one_matmul_will_do(layer, x):
    """Whether the base, run with W0 + delta_W for its weight, says what the two terms say."""
    base = layer.base
    if base._forward_pre_hooks or "weight" not in base._parameters or "weight" in vars(base):
        return False  # hook, parametrization, sharding, another adapter: theirs, not to be replaced
    _check_at_hand(layer, x)
    half = (torch.float16, torch.bfloat16)
    if _matmul_dtype(x) in half or base.weight.dtype in half or _float32_is_cut():
        return False  # the sum would be rounded, and a small delta_W lost in it
    return not (layer.training and layer.dropout)  # which is for the input of delta_W alone


def _matmul_dtype(x):
    """The dtype in which F.linear multiplies x: under autocast another one than its own."""
    kind = x.device.type
    autocast = _knows_autocast(kind) and torch.is_autocast_enabled(kind)
    if autocast and x.dtype != torch.float64:  # autocast leaves float64 alone
        return torch.get_autocast_dtype(kind)
    return x.dtype


@torch.compiler.assume_constant_result  # while torch.compile looks on
def _float32_is_cut():
    """Whether a float32 product may drop bits of its factors, as TF32 does."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set by a newer function, of one backend: ask no further
        return True


def _no_autocast(device):
    """The factors are in float32 for a reason: their products must not be cast to less."""
    if _knows_autocast(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


@torch.compiler.assume_constant_result  # torch 2.11's compiler cannot trace the question
def _knows_autocast(kind):
    return torch.amp.is_autocast_available(kind)


_LINEAR_FORWARD = nn.Linear.forward  # torch's own, whoever replaces it later


def _is_plain(base):
    """Whether a base computes x W^T + bias, so far as we know it."""
    if "forward" in vars(base) and not hasattr(base, "_hf_hook"):  # which accelerate puts around
        return False
    if type(base).forward is _LINEAR_FORWARD:
        return True
    return _is_conv1d(base) and type(base).__name__ == "Conv1D"


def _linear(layer, x, W):
    """x W^T, or what the base's own forward makes of that."""
    if _is_plain(layer.base) or "weight" not in layer.base._parameters:
        return F.linear(x, W)
    _check_linear_in_weight(layer)
    return _through_own_forward(layer.base, x, layer._turn(W))


def _through_own_forward(base, x, W):
    """What a base's own forward makes of x and W, less what it makes of x alone, as a bias."""
    outputs = [_with_weight(base, weight, x) for weight in (W, torch.zeros_like(W))]
    return outputs[0] - outputs[1]


def _with_weight(base, W, x):
    """The base's forward with another weight, past all hooks; the base is not touched."""
    twin = object.__new__(type(base))
    twin.__dict__.update(base.__dict__)
    twin._parameters = {**base._parameters, "weight": W}
    return type(base).forward(twin, x)


def _has_hooks(base):
    forward = base._forward_pre_hooks or base._forward_hooks
    return bool(forward or base._backward_pre_hooks or base._backward_hooks)


_ONE_THREAD = threading.RLock()


def _alone():
    """A context for one thread at a time: what changes the base for a call is seen by all."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _ONE_THREAD


def _add_within(base, x, update):
    """base(x) + update(x), added between the base's hooks, where there are any.

    What they bring (an offloaded weight) is then there, and what they do is done to the sum.
    """
    if not _has_hooks(base):
        y = base(x)
        return y + update(x).to(y.dtype)
    handle = base.register_forward_hook(
        lambda _, args, y: y + update(*args).to(y.dtype), prepend=True
    )
    try:
        return base(x)
    finally:
        handle.remove()


def _scaled_to_one(weight):
    """In float64, and free of scale: no square can overflow or vanish."""
    device = "cpu" if weight.device.type == "mps" else weight.device  # mps has no float64
    W = weight.detach().to(device, torch.float64)
    return W / W.abs().max().clamp(min=_TINY)


def _right_singular(W):
    """s_j^2 (n,), V (n, n) and s_j^2 V_ij^2 (n, n) of a tall W (m, n), s descending.

    From the Gram matrix W^T W = V diag(s^2) V^T, in half the time of an SVD. A column so small that
    it drowns in the rounding of W^T W wants the SVD after all.
    """
    s2, V = torch.linalg.eigh(W.mT @ W)  # ascending
    s2, V = s2.flip(0).clamp(min=0), V.flip(1)
    energy = W.square().sum(0)  # (n,), of the columns
    drowned = (0 < energy) & (energy < 1e-7 * s2[0])
    if drowned.any():
        U, s, Vh = torch.linalg.svd(W, full_matrices=False)
        return s.square(), Vh.mT, (W.mT @ U).square()
    return s2, V, s2 * V.square() * (energy > 0)[:, None]  # a zero column has exactly none


def _direction_index(s2):
    """0, 1, ..., q - 1; equal singular values have no basis of their own and share their mean."""
    rounding = 2e-9 * s2[:-1] + 1e-14 * s2[0]  # relative, and of the Gram matrix
    apart = s2[:-1] - s2[1:] > rounding
    group = F.pad(apart.long().cumsum(0), (1, 0))  # (q,), as 0 0 1 2 2 2
    size = group.bincount()
    last = size.cumsum(0) - 1
    return ((2 * last - size + 1).to(s2) / 2)[group]


# ------------------------------------------------------------------------------------------------
# Same numbers, less time and memory: delete all from here on, and the two lines of `forward` that
# call it, and every result stays the same up to rounding (a test does).

LEAN_ABOVE = 2**17  # weights in a layer; up to that, autograd's full weight gradient is faster
# On a card up to eight times as many: so an H200 takes two thirds of the time for 1536 x 576, and
# keeps W0 + delta_W for the backward.

# Devices that multiply bfloat16 so fast that x delta_W^T with all its zeros is sooner had than the
# blocks' rows and columns are gathered. (In float16 what is outside the blocks could overflow.)
DENSE_BFLOAT16 = ["cuda"]
if getattr(torch.cpu, "_is_amx_tile_supported", bool)():
    DENSE_BFLOAT16.append("cpu")


def _is_bare(base):
    """Whether a base is a linear layer and no more: no hook, forward or gradient of its own."""
    if not _is_plain(base) or "forward" in vars(base) or _has_hooks(base):
        return False
    return not any(p is not None and p.requires_grad for p in (base.weight, base.bias))


def _lean_forward(layer, x):  # (..., n) -> (..., m)
    """As `layer.plain_forward(x)`, over a bare base."""
    if layer.modulate and _one_matmul_will_do(layer, x):
        few = LEAN_ABOVE * (8 if x.is_cuda else 1)
        if layer.base.weight.numel() > few:
            return _product(layer, x, add_W0=True)
        orders = layer.row_order.to(x.device), layer.col_order.to(x.device)
        W = _summed_weight(layer.original_weight(), layer.scale, *orders, layer.A, layer.B)
        return F.linear(x, W, layer.bias)
    z = F.dropout(x, layer.dropout, layer.training)
    z = z.to(_matmul_dtype(z))
    if layer.modulate:
        return layer.base(x) + _product(layer, z, add_W0=False)
    # LoRA, MELoRA: a thin detour, first to (..., r)
    orders = layer.row_order.to(x.device), layer.col_order.to(x.device)
    A, B = _stacked(z.dtype, *orders, layer.A, layer.B)
    return layer.base(x) + layer.scale * F.linear(F.linear(z, A), B)


def _product(layer, x, add_W0):  # (..., n) -> (..., m)
    """x (W0 + delta_W)^T + bias, or x delta_W^T alone."""
    function = _Product if torch.compiler.is_compiling() else _ProductWithTangents
    call = function.apply
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        call = _Product.forward  # without gradients torch.compile calls it with a ctx before all
    y = call(  # (T, n) -> (T, m)
        x.reshape(-1, x.shape[-1]),
        layer.original_weight(),
        layer.bias if add_W0 else None,
        layer.row_order.to(x.device),
        layer.col_order.to(x.device),
        layer.num_blocks,
        layer.scale,
        add_W0,
        *layer.A,
        *layer.B,
    )
    return y.view(*x.shape[:-1], layer.out_features)


class _Product(torch.autograd.Function):
    """y = x W^T + bias, where W is W0 + delta_W, or delta_W alone and there is no bias.

    Autograd could differentiate the plain formula as well. This backward is leaner by two things:
    of the weight's gradient g^T x it computes only the K aligned blocks, where that is faster, and
    it builds the weight again rather than keep one per layer from the forward to the backward.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, W0, bias, row_order, col_order, K, scale, add_W0, *factors):
        factors = [factor.detach() for factor in factors]  # linearize takes them for constants
        parts = scale, row_order, col_order, factors[:K], factors[K:]
        with _no_autocast(x.device):
            if add_W0:
                return F.linear(x, _summed_weight(W0, *parts), bias)
            if _is_dense(x):
                A, B = _stacked(x.dtype, *parts[1:])
                return F.linear(x, _modulated(W0, scale * B, A))  # (T, n) @ (n, m)
            return _block_product(x, W0, *parts)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, W0, _, row_order, col_order, ctx.K, ctx.scale, ctx.add_W0, *factors = inputs
        ctx.save_for_backward(x, W0, row_order, col_order, *factors)
        ctx.save_for_forward(x, W0, row_order, col_order, *factors)

    @staticmethod
    def backward(ctx, g):  # (T, m)
        x, W0, row_order, col_order, *factors = ctx.saved_tensors  # (T, n), (m, n)
        parts = ctx.scale, row_order, col_order, factors[: ctx.K], factors[ctx.K :]
        want_dx, want_dW0, want_dbias, *_ = ctx.needs_input_grad
        dx = dW0 = dbias = None
        with _no_autocast(g.device):
            if _is_dense(x) and not ctx.add_W0:
                dx, dA, dB = _dense_gradients(g, x, W0, parts, want_dx)
            else:
                dx, dA, dB = _block_gradients(g, x, W0, parts, want_dx and not ctx.add_W0)
            if want_dx and ctx.add_W0:
                dx = g @ _summed_weight(W0, *parts).to(g.dtype)  # (T, m) @ (m, n)
            if want_dW0:  # vmap over models hides from `_is_bare` what trains
                factor = _summed_weight(torch.ones_like(W0), *parts)
                dW0 = (g.mT @ x.to(g.dtype)).to(W0.dtype) * (factor if ctx.add_W0 else factor - 1)
            if want_dbias:
                dbias = g.sum(0)
        return dx, dW0, dbias, *[None] * 5, *dA, *dB


class _ProductWithTangents(_Product):
    """The same for forward-mode differentiation, by a rule that torch.compile refuses to trace."""

    @staticmethod
    def jvp(ctx, x_t, W0_t, bias_t, _rows, _cols, _K, _scale, _add_W0, *factors_t):
        """Linear in x, in W0, in A and in B: one term for the tangent of each."""
        x, W0, row_order, col_order, *factors = ctx.saved_tensors
        A, B = factors[: ctx.K], factors[ctx.K :]
        orders = ctx.scale, row_order, col_order
        A_t, B_t = factors_t[: ctx.K], factors_t[ctx.K :]
        with _no_autocast(x.device):
            y_t = _block_product(x_t, W0, *orders, A, B)
            y_t = y_t + _block_product(x, W0_t, *orders, A, B)
            y_t = y_t + _block_product(x, W0, *orders, A_t, B)
            y_t = y_t + _block_product(x, W0, *orders, A, B_t)
            if ctx.add_W0:
                y_t = y_t + F.linear(x_t, W0, bias_t) + F.linear(x, W0_t)
        return y_t


def _block_gradients(g, x, W0, parts, want_dx):
    """Gradients of x delta_W^T by x (T, n), where wanted, and by all A_k and all B_k."""
    scale, row_order, col_order, A, B = parts
    dx_blocks, dA, dB = [], [], []
    for rows_k, cols_k, A_k, B_k in _batches(row_order, col_order, A, B):
        M_k = _submatrices(W0, rows_k, cols_k).to(A_k.dtype)
        g_k = _columns(g, rows_k)  # (G, T, m_k)
        x_k = _columns(x, cols_k).to(g.dtype)  # (G, T, n_k)
        G_k = _matmul(g_k.mT, x_k).to(A_k.dtype) * M_k  # (G, m_k, T) @ (G, T, n_k)
        dA.extend((scale * torch.bmm(B_k.mT, G_k)).unbind())
        dB.extend((scale * torch.bmm(G_k, A_k.mT)).unbind())
        if want_dx:
            D_k = (scale * torch.bmm(B_k, A_k) * M_k).to(g.dtype)
            dx_blocks.append(_matmul(g_k, D_k))  # (G, T, m_k) @ (G, m_k, n_k)
    return _put_together(dx_blocks, col_order) if want_dx else None, dA, dB


def _dense_gradients(g, x, W0, parts, want_dx):
    """The same in bfloat16, from the whole of g^T x."""
    scale, row_order, col_order, A, B = parts
    stacked_A, stacked_B = _stacked(x.dtype, row_order, col_order, A, B)
    G = _modulated(W0, g.mT, x)  # (m, T) @ (T, n)
    dA = (scale * stacked_B.mT @ G).index_select(1, col_order)  # (r, m) @ (m, n)
    dB = (G @ (scale * stacked_A.mT)).index_select(0, row_order)  # (m, n) @ (n, r)
    dx = None
    if want_dx:
        dx = g @ _modulated(W0, scale * stacked_B, stacked_A)  # (T, m) @ (m, n)
    return dx, _on_diagonal(dA.to(A[0].dtype), A), _on_diagonal(dB.to(B[0].dtype), B)


def _stacked(dtype, row_order, col_order, A, B):
    """The pairs as one, A (r, n) and B (m, r): B A is B_k A_k in the blocks and 0 elsewhere."""
    A, B = torch.block_diag(*A).to(dtype), torch.block_diag(*B).to(dtype)  # in spectral order
    A = torch.empty_like(A).index_copy(1, col_order, A)
    B = torch.empty_like(B).index_copy(0, row_order, B)
    return A, B


def _summed_weight(W0, scale, row_order, col_order, A, B):
    """W0 + delta_W = W0 * (1 + scale B A), (m, n), by one product of the stacked pairs."""
    A, B = _stacked(W0.dtype, row_order, col_order, A, B)
    with _no_autocast(W0.device):
        one = W0.new_ones(())
        if W0.is_contiguous():
            factor = torch.addmm(one, B, A, alpha=scale)  # (m, r) @ (r, n) -> (m, n)
        else:  # in W0's memory layout
            factor = torch.addmm(one, A.mT, B.mT, alpha=scale).mT
    return _times(factor, W0)


def _times(M, W0):
    """M * W0 in M's dtype, and in its place where nobody watches: no second buffer of W0's size."""
    if torch.is_grad_enabled() or torch.jit.is_tracing():
        return (M * W0).to(M.dtype)
    return M.mul_(W0)


def _is_dense(x):
    return x.dtype == torch.bfloat16 and x.device.type in DENSE_BFLOAT16


def _modulated(W0, X, Y):
    """(X Y) * W0, (m, n): delta_W of (scale B, A), and of (g^T, x) the gradient by B A.

    The zero brings W0's batch, where vmap is over the weights alone.
    """
    zero = W0.new_zeros((), dtype=X.dtype)
    return _times(torch.addmm(zero, X, Y, beta=0), W0)


def _on_diagonal(M, blocks):
    """Where `torch.block_diag(*blocks)` puts its blocks: those parts of M."""
    K, shape = len(blocks), blocks[0].shape
    if all(block.shape == shape for block in blocks):  # in one operation
        rows, cols = shape
        parts = M.view(K, rows, K, cols).diagonal(dim1=0, dim2=2)  # (rows, cols, K)
        return parts.permute(2, 0, 1).contiguous().unbind()
    parts, i, j = [], 0, 0
    for block in blocks:
        rows, cols = block.shape
        parts.append(M[i : i + rows, j : j + cols])
        i, j = i + rows, j + cols
    return parts


def _batches(row_order, col_order, A, B):
    """Neighbouring blocks of one shape, G at a time: small ones cost less together.

    Large ones do not on a CPU. An H200 takes half the time for eight blocks of a 4096 x 4096 weight
    in bfloat16 if they are one batch.
    A list of rows_k (G, m_k), cols_k (G, n_k), A_k (G, r_k, n_k), B_k (G, m_k, r_k).
    """
    most = 2**18 if A[0].device.type == "cpu" else 2**24  # weights in a batch
    groups = []
    for pair in zip(A, B):
        shapes = [factor.shape for factor in pair]
        (_, n_k), (m_k, _) = shapes
        fits = groups and (len(groups[-1]) + 1) * m_k * n_k <= most
        if fits and shapes == [factor.shape for factor in groups[-1][0]]:
            groups[-1].append(pair)
        else:
            groups.append([pair])
    batches = []
    for group in groups:
        A_k, B_k = (torch.stack(factors) for factors in zip(*group))
        rows_k, row_order = _first(row_order, *B_k.shape[:2])
        cols_k, col_order = _first(col_order, len(A_k), A_k.shape[2])
        batches.append((rows_k, cols_k, A_k, B_k))
    return batches


def _first(order, G, size):
    """The first G pieces of an order, (G, size), and what is left of it."""
    return order[: G * size].view(G, size), order[G * size :]


def _block_product(x, W0, scale, row_order, col_order, A, B):
    """x delta_W^T without the zeros of delta_W, (T, n) -> (T, m)."""
    y = []
    for rows_k, cols_k, A_k, B_k in _batches(row_order, col_order, A, B):
        D_k = scale * torch.bmm(B_k, A_k) * _submatrices(W0, rows_k, cols_k)
        y.append(_matmul(_columns(x, cols_k), D_k.to(x.dtype).mT))  # (G, T, n_k) @ (G, n_k, m_k)
    return _put_together(y, row_order)


def _matmul(X, Y):
    """X @ Y for a batch. A batch of one as matrices: those need no copy of what is transposed."""
    return torch.bmm(X, Y) if len(X) > 1 else torch.mm(X[0], Y[0])[None]


def _put_together(batches, order):
    """The columns of K blocks, (G, T, m_k) a batch, each in its place in (T, m)."""
    y = []
    for batch in batches:
        G, T, m_k = batch.shape
        y.append(batch.transpose(0, 1).reshape(T, G * m_k))
    # Where each column goes: argsort(order), in a tenth of its time.
    place = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    return _columns(torch.cat(y, -1), place[None])[0]


def _columns(x, index):
    """x[:, index_k] for each of G lines of an index, (T, n), (G, n_k) -> (G, T, n_k).

    By gather: in parallel, and in half precision two to four times as fast.
    """
    return x.expand(len(index), -1, -1).gather(2, index[:, None].expand(-1, x.shape[0], -1))


def _submatrices(W, rows, cols):
    """W[rows_k][:, cols_k], (G, m_k, n_k), in a third of the time."""
    lines = W.index_select(0, rows.reshape(-1)).view(*rows.shape, -1)  # (G, m_k, n)
    return lines.gather(2, cols[:, None].expand(-1, rows.shape[1], -1))
