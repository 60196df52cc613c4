"""SMoA, the Spectrum Modulation Adapter, in one file to read, check and copy.

Liu et al., "SMoA: Spectrum Modulation Adapter for Parameter-Efficient Fine-Tuning",
arXiv 2605.21147 (2026). An independent implementation.

LoRA adds a low-rank product to a frozen weight W0. SMoA multiplies W0, entry by entry:

    LoRA    W = W0 + s B A          A (r, n) and B (m, r) are trained; s = alpha / r
    SMoA    W = W0 * (1 + s B A)    B A is zero outside of K diagonal blocks

The blocks: sort the rows and the columns of W0 by their position in its singular spectrum and cut
both orders into K pieces. Row piece k and column piece k form block k, with its own pair A_k, B_k:

    W0       = U diag(sigma) V^T                     sigma descending, q = min(m, n) directions
    p_i      = sum_j j e_ij / sum_j e_ij             position of row i, by its energy in direction
                                                     j = 0, 1, ...: e_ij = (sigma_j U_ij)^2;
                                                     V in the place of U gives the columns'
    rows_k   = piece k of argsort(p) over the rows   cols_k likewise, as torch.tensor_split
    delta_W  = s (B_k A_k) * W0[rows_k, cols_k]      in block k; 0 elsewhere. W = W0 + delta_W

    m, n     out_features, in_features        A_k   (r_k, n_k)   starts Kaiming-uniform
    r, K     rank budget, number of blocks    B_k   (m_k, r_k)   starts at zero, so W = W0
    r_k      rank of block k, sum r_k = r     A, B  the pairs, padded with zeros and stacked

Trained: sum_k r_k (m_k + n_k) numbers; where K divides r, 1/K of what LoRA of rank r trains. The
rank of delta_W is still at most sum_k min(m_k, n_k, r_k rank M_k), M_k = W0[rows_k, cols_k], and
generic factors reach that: a Hadamard product can multiply ranks. LoRA's rank stops at r.

One class holds the family: `num_blocks=1, modulate=False` is LoRA (2106.09685), `num_blocks=1` is
HiRA (ICLR 2025), `modulate=False, order="natural"` is MELoRA (2402.17263), the default is SMoA.

    names = smoa.inject(model, ["q_proj", "v_proj"], rank=8)     # freezes all but the adapters
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    ...                                                          # lr: several times LoRA's
    smoa.save(model, "adapter.pt")
    smoa.load(fresh_model, "adapter.pt")
    smoa.merge(fresh_model.eval())                               # inference at the base's speed

You can stop reading after any section: order, layer, verbs, file, counts, input checks, less time
and memory.
"""

import contextlib
import numbers
import os
import re
import zipfile

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

# ------------------------------------------------------------------------------------------------
# The order


def spectral_order(weight):
    """Sort the rows and the columns of a weight by their position in its singular spectrum.

    Row i spreads its energy (sigma_j U_ij)^2 over the singular directions j; its position is the
    mean of j, weighted with that energy. For a column, the same with V (arXiv 2605.21147).

    Args:
        weight: (m, n), floating, finite. Computed in float64.
    Returns:
        row_order (m,) and col_order (n,), int64 permutations on the weight's device. Ties go by
        index; a zero row or column has position 0. Close positions may sort differently on another
        machine, so we save the order with the factors; the paper's code computes it anew.

    >>> spectral_order(torch.diag(torch.tensor([1.0, 3.0, 2.0])))
    (tensor([1, 2, 0]), tensor([1, 2, 0]))
    """
    if weight.shape[0] < weight.shape[1]:  # so that W^T W below is the smaller Gram matrix
        col_order, row_order = spectral_order(weight.mT)
        return row_order, col_order
    W = weight.detach().to("cpu" if weight.is_mps else weight.device, torch.float64)
    W = W / W.abs().max().clamp(min=1e-300)  # so that no square overflows or vanishes
    sigma2, V = torch.linalg.eigh(W.mT @ W)  # (n, n) = V diag(sigma^2) V^T, ascending
    sigma2, V = sigma2.flip(0).clamp(min=0), V.flip(1)
    index = torch.arange(len(sigma2)).to(sigma2)  # j = 0 ... q - 1; here q = n

    def sorted_by(energy):  # (size, q) -> (size,)
        position = energy @ index / energy.sum(1).clamp(min=1e-300)
        # Rounded, since equal positions may come out unequal in their last digits.
        return position.round(decimals=6).argsort(stable=True).to(weight.device)

    row_energy = (W @ V).square()  # (m, q), since W V = U diag(sigma)
    col_energy = sigma2 * V.square() * W.any(0)[:, None]  # (n, q); a zero column has exactly none
    return sorted_by(row_energy), sorted_by(col_energy)


# ------------------------------------------------------------------------------------------------
# The layer


class SMoALinear(nn.Module):
    """A linear layer over a frozen weight W0: y = x W^T + bias with W = W0 * (1 + s B A).

    Args:
        base: nn.Linear, or Hugging Face's Conv1D, whose weight is (n, m). Kept as `.base`, frozen;
            the tensor of its weight is never copied or written into.
        rank: r >= 1. The blocks share it as evenly as possible, the first ones get the remainder.
        num_blocks: K, 1 to min(m, n).
        alpha: s = alpha / rank. None: alpha = rank, so that s = 1.
        dropout: probability in [0, 1). Acts on the input of the update, never on the base's.
        modulate: True: W0 * (1 + s B A). False: W0 + s B A.
        order: "spectral", "natural", or a pair of permutations (rows (m,), columns (n,)).
    Attributes:
        A, B: min(r, K) parameters each, A[k] (r_k, n_k) and B[k] (m_k, r_k), in float32 (float64
            over a float64 base). Blocks beyond r have none and stay as they are. A is drawn on the
            CPU, so that a seed means the same on every device.
        row_order (m,), col_order (n,): int64, in the state dict. They are not buffers, since what
            averages a model's buffers (an EMA) would spoil them.
        merged: whether `base.weight` holds W.
    Raises:
        TypeError, ValueError: the base cannot be adapted, or an option is out of range.
    """

    def __init__(
        self,
        base,
        rank=8,
        num_blocks=2,
        *,
        alpha=None,
        dropout=0.0,
        modulate=True,
        order="spectral",
    ):
        super().__init__()
        _check_base(base, modulate)
        self.transposed = not isinstance(base, nn.Linear)  # Conv1D
        W0 = self._oriented(base.weight.detach())
        self.out_features, self.in_features = m, n = W0.shape
        alpha = rank if alpha is None else alpha
        _check_options(m, n, rank, num_blocks, alpha, dropout)
        self.rank, self.num_blocks, self.modulate = int(rank), int(num_blocks), bool(modulate)
        self.alpha, self.dropout = float(alpha), float(dropout)
        if isinstance(order, str) and order == "spectral" and num_blocks > 1:
            order = spectral_order(W0)
        self.row_order, self.col_order = _checked_order(order, m, n, W0.device)

        wide = torch.promote_types(W0.dtype, torch.float32)
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        for r_k, rows_k, cols_k in zip(split(self.rank, self.num_blocks), self.rows, self.cols):
            if r_k > 0:
                A_k = torch.empty(r_k, len(cols_k), dtype=wide, device="cpu")
                nn.init.kaiming_uniform_(A_k, a=5**0.5)
                self.A.append(A_k.to(W0.device))
                self.B.append(torch.zeros(len(rows_k), r_k, dtype=wide, device=W0.device))
        self.base = base.requires_grad_(False)
        self.register_buffer("kept_W0", None, persistent=False)  # while merged: W0
        self.enabled = True  # False inside `disabled(model)`
        self.train(base.training)

    @property
    def rows(self):
        """K index tensors (m_k,): the output coordinates of each block."""
        return self.row_order.tensor_split(self.num_blocks)

    @property
    def cols(self):
        """K index tensors (n_k,): the input coordinates of each block."""
        return self.col_order.tensor_split(self.num_blocks)

    @property
    def scale(self):
        return self.alpha / self.rank

    @property
    def merged(self):
        return self.kept_W0 is not None

    @property
    def bias(self):
        return self.base.bias

    def original_weight(self):
        """W0 (m, n), merged or not."""
        return self._oriented(self.kept_W0 if self.merged else self.base.weight)

    def factors(self):
        """A (r, n) and B (m, r): the pairs, padded with zeros and stacked."""
        return _stacked(self, (*self.A, *self.B))

    def delta_weight(self):
        """delta_W (m, n), in the dtype of the factors. Differentiable in A and B."""
        A, B = self.factors()
        with torch.autocast(A.device.type, enabled=False):
            BA = (self.scale * B) @ A  # (m, r) @ (r, n) -> (m, n)
        return BA * self.original_weight() if self.modulate else BA

    @property
    def weight(self):
        """W, in the orientation and the dtype of the base's weight, rounded to it once, as a merge
        does. nn.MultiheadAttention and others read it without `forward`, hence without dropout.
        """
        if self.merged and self.enabled and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "a merged layer does not train: call smoa.unmerge(model), or model.eval() to use it"
            )
        if self.merged == self.enabled:  # the base holds what is wanted: W merged, W0 disabled
            return self.base.weight
        W = self.original_weight()
        W = W + self.delta_weight() if self.enabled else W
        return self._oriented(W).to(self.base.weight.dtype)

    def forward(self, x):  # (..., n) -> (..., m)
        if self.enabled and not self.merged:
            z = F.dropout(x, self.dropout, self.training)
            if not self.modulate:  # LoRA, MELoRA: a detour through r numbers
                A, B = (factor.to(x.dtype) for factor in self.factors())
                return self.base(x) + self.scale * F.linear(F.linear(z, A), B)
            if self.dropout and self.training:
                return self.base(x) + F.linear(z, self.delta_weight().to(x.dtype))
            if not _has_hooks(self.base):
                return modulated_linear(self, x)  # F.linear(x, W, bias): see the last section
        W = self.weight
        if W is self.base.weight:
            return self.base(x)
        if _has_hooks(self.base):  # so that the base itself runs
            return torch.func.functional_call(self.base, {"weight": W}, (x,))
        return F.linear(x, self._oriented(W), self.bias)

    def _oriented(self, W):
        """From the orientation of the base's weight to (m, n), or back."""
        return W.mT if self.transposed else W

    @torch.inference_mode(False)  # so that W can take part in later training
    @torch.no_grad()
    def merge(self):
        """Put W in `base.weight`, as a new tensor. W0 is kept aside; nothing is written into it."""
        if not self.merged:
            _check_mergeable([self])
            W = self._oriented(self.original_weight() + self.delta_weight())
            W = W.to(self.base.weight.dtype).contiguous()
            self.kept_W0 = self.base.weight.detach()
            self.base.weight = nn.Parameter(W, requires_grad=False)

    def unmerge(self):
        """Put W0 back in `base.weight`: the same memory as before the merge."""
        if self.merged:
            self.base.weight = nn.Parameter(self.kept_W0, requires_grad=False)
            self.kept_W0 = None

    def get_extra_state(self):
        """(2 + m + n,) int64 for the state dict: alpha, modulate, the two orders."""
        if self.merged:
            raise RuntimeError(
                "a merged layer has no state dict, its factors would count twice: call "
                "smoa.unmerge(model), or smoa.unload(model, merge=True) for a plain model"
            )
        options = torch.tensor([self.alpha, self.modulate], dtype=torch.float64, device="cpu")
        # As bits, since integers stay what they are where a state dict is cast to half precision.
        return torch.cat([options.view(torch.int64), self.row_order.cpu(), self.col_order.cpu()])

    def set_extra_state(self, state):
        m, n = self.out_features, self.in_features
        options, *orders = state.cpu().split([2, m, n])
        _require(
            torch.equal(options, self.get_extra_state()[:2]),
            f"the state has another alpha or modulate than this layer ({self.extra_repr()})",
        )
        self.row_order, self.col_order = _checked_order(orders, m, n, self.row_order.device)

    def _load_from_state_dict(self, *args, **kwargs):
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn, recurse=True):
        """What `.to`, `.half` and the like do. The factors stay in float32 or wider: half precision
        would round away the small steps of training.
        """

        def widened(tensor):
            new = fn(tensor)
            return new if new.dtype.itemsize >= 4 else tensor.to(new.device)

        for child in self.children():
            child._apply(fn if child is self.base else widened)
        super()._apply(fn, recurse=False)  # kept_W0
        device = self.A[0].device
        if device.type != "meta":
            self.row_order, self.col_order = self.row_order.to(device), self.col_order.to(device)
        return self

    def extra_repr(self):
        return ", ".join(f"{option}={getattr(self, option)}" for option in _OPTIONS)


_OPTIONS = ("rank", "num_blocks", "alpha", "dropout", "modulate")


def split(total, pieces):
    """`total` as `pieces` whole numbers, as even as possible, the larger ones first."""
    return [total // pieces + (k < total % pieces) for k in range(pieces)]


def _has_hooks(base):
    forward = base._forward_pre_hooks or base._forward_hooks
    return bool(forward or base._backward_pre_hooks or base._backward_hooks)


def _pairs(layer, factors):
    """[(A_k, B_k, rows_k, cols_k)] of the blocks that have a pair."""
    half = len(factors) // 2
    return list(zip(factors[:half], factors[half:], layer.rows, layer.cols))


def _stacked(layer, factors):
    m, n, pairs = layer.out_features, layer.in_features, _pairs(layer, factors)
    A = [A_k.new_zeros(len(A_k), n).index_copy(1, cols_k, A_k) for A_k, _, _, cols_k in pairs]
    B = [B_k.new_zeros(m, B_k.shape[1]).index_copy(0, rows_k, B_k) for _, B_k, rows_k, _ in pairs]
    return torch.cat(A), torch.cat(B, 1)  # (r, n), (m, r)


# ------------------------------------------------------------------------------------------------
# The verbs on a model. Those that need an adapter raise a ValueError where there is none


def adapters(model):
    """Iterate over (dotted name, SMoALinear), in the order of the model's modules.

    The names are the plain model's: torch.compile, activation checkpointing,
    DistributedDataParallel and AveragedModel add nothing to them.
    """
    for name, module in _named_modules(model):
        if _is_adapted(module):
            yield name, module


def inject(model, targets, **options):
    """Wrap every target in a SMoALinear, in place, and freeze everything but the adapters.

    Make the optimizer afterwards: the factors are new parameters. If more should train, such as a
    classifier's new head, unfreeze it after the last `inject`; `save` then saves it as well.

    The order of a large layer takes seconds; `for name in tqdm(names): inject(model, [name])` shows
    progress. With several processes let one inject and save, and all load, before
    DistributedDataParallel wraps the model: it sends factors to the others, but not the orders.

    Args:
        targets: a list of names, each of which matches the modules whose dotted name is equal to it
            or ends in "." + it; or one string, a regular expression for the whole dotted name.
        options: those of SMoALinear, the same for all.
    Returns:
        The names of the layers adapted by this call.
    Raises:
        TypeError, ValueError: a target matches nothing, or what cannot be adapted, or an option is
            out of range. The model is then as before.
    """
    bases = _find(model, targets)
    layers = _build(model, bases, lambda name, base: SMoALinear(base, **options))
    _replace(model, {bases[name]: layers[name] for name in layers})
    _freeze_all_but_factors(model)
    return list(layers)


def merge(model):
    """Put W in every adapted layer's `base.weight`: inference at the base's own speed."""
    layers = _adapted_layers(model)
    _check_mergeable(layers)
    for layer in layers:
        layer.merge()


def unmerge(model):
    """Put every W0 back, bit for bit."""
    for layer in _adapted_layers(model):
        layer.unmerge()


def unload(model, *, merge=False):
    """Take the adapters out: the bases are back in their places. Nothing is unfrozen.

    Args:
        merge: leave W in the bases, permanently, instead of W0.
    Returns:
        The plain model (another object only where the model itself is a SMoALinear).
    """
    layers = _adapted_layers(model)
    if merge:
        _check_mergeable(layers)
    _replace(model, {layer: layer.base for layer in layers})
    for layer in layers:
        layer.merge() if merge else layer.unmerge()
    return model.base if _is_adapted(model) else model


@contextlib.contextmanager
def disabled(model):
    """A context in which the model computes exactly what its base does, merged or not."""
    before = [(layer, layer.enabled) for layer in _adapted_layers(model)]
    try:
        for layer, _ in before:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in before:
            layer.enabled = enabled


def _is_adapted(module):
    """By the name of the class, which outlives `importlib.reload(smoa)`."""
    return any(kind.__name__ == "SMoALinear" for kind in type(module).__mro__)


def _adapted_layers(model):
    layers = [layer for _, layer in adapters(model)]
    _require(layers, "the model has no adapter: smoa.inject or smoa.load one first")
    return layers


_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}  # torch.compile's, checkpointing's


def _named_modules(model):
    """(dotted name, module). Wrappers add no name; the inside of an adapted layer is left out."""
    while hasattr(model, "_orig_mod") or isinstance(
        model, (DistributedDataParallel, AveragedModel)
    ):
        model = getattr(model, "_orig_mod", None) or model.module
    inside = {part for layer in model.modules() if _is_adapted(layer) for part in layer.children()}
    for name, module in model.named_modules(inside):  # which walks past those
        yield ".".join(part for part in name.split(".") if part not in _WRAPPERS), module


def _find(model, targets):
    """{name: module} of what the targets name, in the model's order."""
    modules, found = dict(_named_modules(model)), set()
    regex = isinstance(targets, str)
    for target in [targets] if regex else targets:
        pattern = target if regex else rf"(.*\.)?{re.escape(target)}"
        matches = {name for name in modules if name and re.fullmatch(pattern, name)}
        _require(
            matches,
            f"target {target!r} matches no module. The linear layers here are named "
            f"{_linear_names(model)}; a list holds names or ends of dotted names, a lone string is "
            "a regular expression for the whole name",
        )
        found |= matches
    _require(found, "no targets given: name at least one layer")
    return {name: module for name, module in modules.items() if name in found}


def _build(model, bases, make_layer):
    """{name: new SMoALinear} over {name: base}. The model stays as it is."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    layers = {}
    for name, base in bases.items():
        try:
            layers[name] = make_layer(name, base)
            _check_untied(model, base)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
        finally:
            for p, requires_grad in flags:
                p.requires_grad = requires_grad
    return layers


def _replace(model, new):
    """Put new[module] wherever a module hangs in the model: a shared one has several places."""
    parents = list(model.modules())
    for parent in parents:
        compiled = getattr(parent, "_orig_mod", None) in new
        _require(
            not compiled and not isinstance(parent, DistributedDataParallel),
            f"{type(parent).__name__} would not see the change: do this to the plain model (or "
            "layer) first, then wrap it",
        )
    for parent in parents:
        parent._modules.update({k: new[m] for k, m in parent._modules.items() if m in new})


def _freeze_all_but_factors(model):
    factors = {p for _, layer in adapters(model) for p in (*layer.A, *layer.B)}
    for p in model.parameters():
        if p not in factors:
            p.requires_grad = False
            p.grad = None  # it would count when gradients are clipped


# ------------------------------------------------------------------------------------------------
# The file: what torch.save makes of `state_dict(model)`

_FORMAT = "SMoA adapter 1"


def state_dict(model):
    """The adapter alone, and what else trains: plain data and tensors, copied to the CPU.

    Returns:
        {"format": a fixed string, "layers": {name: {"options": {...}, "A": [A_k], "B": [B_k],
        "order": [(m,), (n,)] int32, "base_sketch": (1025,)}}, "trained": {name: parameter}}.
        "trained" is what else requires a gradient, unfrozen after `inject`, under its name in the
        plain model. Buffers, such as BatchNorm's statistics, are not in it.
    """
    _adapted_layers(model)
    layers = {
        name: {
            "options": {option: getattr(layer, option) for option in _OPTIONS},
            "A": [A_k.detach().cpu().clone() for A_k in layer.A],
            "B": [B_k.detach().cpu().clone() for B_k in layer.B],
            "order": [layer.row_order.cpu().int(), layer.col_order.cpu().int()],
            "base_sketch": _sketch(layer.original_weight()),
        }
        for name, layer in adapters(model)
    }
    trained = {name: p for name, p in _plain_parameters(model) if p.requires_grad}
    trained = {name: p.detach().cpu().clone() for name, p in trained.items()}
    return {"format": _FORMAT, "layers": layers, "trained": trained}


def load_state_dict(model, state, *, check_base=True):
    """Give the model this adapter, and no other: what `load` does with a file's content."""
    known = isinstance(state, dict) and state.get("format") == _FORMAT
    _require(known, "this is not the state of a SMoA adapter, as smoa.state_dict gives it")
    adapted = dict(adapters(model))
    bases = {name: module for name, module in _named_modules(model) if name}
    bases |= {name: layer.base for name, layer in adapted.items() if name}
    parameters = dict(_plain_parameters(model))
    absent = [name for name in state["layers"] if name not in bases]
    absent += [name for name in state["trained"] if name not in parameters]
    _require(not absent, f"the adapter is for another model: {absent} are not in this one")
    for name, saved in state["trained"].items():
        _check_shape(name, saved, parameters[name])

    def make_layer(name, base):
        own = state["layers"][name]
        layer = SMoALinear(base, order=own["order"], **own["options"])
        for new, saved in zip((*layer.A, *layer.B), (*own["A"], *own["B"]), strict=True):
            _check_shape("a factor", saved, new)
            new.data.copy_(saved)
        sketch = _sketch(adapted.get(name, layer).original_weight())
        distance, norm = (sketch - own["base_sketch"]).norm(), own["base_sketch"][-1]
        _require(
            distance <= 0.004 * norm or f"{name}.weight" in state["trained"] or not check_base,
            f"the adapter is for another base weight, {distance / norm:.1%} away in Frobenius norm "
            "(0.4% is allowed): load that base, or pass check_base=False",
        )
        return layer

    layers = _build(model, {name: bases[name] for name in state["layers"]}, make_layer)
    new = {layer: layer.base for layer in adapted.values()}
    new |= {adapted.get(name, layer.base): layer for name, layer in layers.items()}
    _replace(model, new)
    for layer in adapted.values():
        layer.unmerge()
    _freeze_all_but_factors(model)
    for name, p in _plain_parameters(model):
        if name in state["trained"]:
            p.data.copy_(state["trained"][name])
            p.requires_grad_(True)
    return list(layers)


def save(model, path):
    """Write `state_dict(model)` to a file, whole, or leave the file as it was."""
    state, path = state_dict(model), os.path.realpath(path)  # through a symbolic link
    part = f"{path}.{os.getpid()}.tmp"
    with open(part, "wb") as file:
        torch.save(state, file)
    os.replace(part, path)


def load(model, path, *, check_base=True):
    """Give the model the adapter of a file, in place of any that it has.

    No spectrum is computed: the orders are in the file. Afterwards the factors train, as do other
    parameters that the file holds; everything else is frozen. Make the optimizer afterwards.

    Args:
        check_base: refuse a base weight that differs from the adapter's own by more than 0.4 % in
            Frobenius norm. A cast to bfloat16 is 0.2 %; another checkpoint is far more.
    Returns:
        The names of the adapted layers.
    Raises:
        OSError: the file cannot be read.
        TypeError, ValueError: it is damaged, or not an adapter, or does not fit the model, which
            is then as before.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # by the checksums in it, which do not cover the flags
            damaged = damaged or any(entry.external_attr for entry in file.infolist())
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # not a zip file, or one with other content, which is not executed
        damaged = error
    _require(not damaged, f"{path} is not a SMoA adapter, or is damaged: {damaged}")
    return load_state_dict(model, state, check_base=check_base)


def _plain_parameters(model):
    """(name in the plain model, parameter) of all parameters but the factors."""
    for name, module in _named_modules(model):
        owner = module.base if _is_adapted(module) else module
        for key, p in owner._parameters.items():
            if p is not None:
                yield f"{name}.{key}" if name else key, p


def _sketch(W):
    """1025 numbers that tell a weight from another: L^T W R / 32, and the norm of W.

    L and R are fixed probes of 32 columns. For a difference E, the squared norm of L^T E R / 32 is
    about ||E||_F^2 (a random projection: Johnson and Lindenstrauss). The probes are chirps,
    sqrt(2) cos(i^2 sqrt(a)): as good as random for this, and the same on every machine.
    """
    W = W.detach().cpu().double()
    a, *squares = (torch.arange(1, size + 1, device="cpu").double() for size in (32, *W.shape))
    L, R = (
        2**0.5 * torch.cos(torch.outer(i.square(), a.sqrt())) for i in squares
    )  # (m, 32), (n, 32)
    return torch.cat([(L.mT @ W @ R / 32).flatten(), W.norm()[None]]).float()


# ------------------------------------------------------------------------------------------------
# The counts


def count_parameters(out_features, in_features, rank, num_blocks):
    """Trained numbers of one layer: sum_k r_k (m_k + n_k).

    >>> count_parameters(768, 768, rank=8, num_blocks=1), count_parameters(768, 768, 8, 4)
    (12288, 3072)
    """
    _check_options(out_features, in_features, rank, num_blocks)
    sizes = (split(size, num_blocks) for size in (rank, out_features, in_features))
    return sum(r_k * (m_k + n_k) for r_k, m_k, n_k in zip(*sizes))


def rank_bound(out_features, in_features, rank, num_blocks, *, modulate=True):
    """Upper bound on rank(delta_W) over blocks M_k of full rank. Generic factors reach it.

    sum_k min(m_k, n_k, r_k rank M_k), since rank(X * Y) <= rank X rank Y; for LoRA and MELoRA,
    `modulate=False`, sum_k min(m_k, n_k, r_k).

    >>> rank_bound(768, 768, rank=8, num_blocks=4), rank_bound(768, 768, 8, 4, modulate=False)
    (768, 8)
    """
    _check_options(out_features, in_features, rank, num_blocks)
    sizes = (split(size, num_blocks) for size in (rank, out_features, in_features))
    return sum(
        min(m_k, n_k, r_k * min(m_k, n_k) if modulate else r_k) for r_k, m_k, n_k in zip(*sizes)
    )


# ------------------------------------------------------------------------------------------------
# Input checks


def _require(condition, message):
    if not condition:
        raise ValueError(message)


def _is_linear(module):
    """nn.Linear, or a subclass with the same forward; or Hugging Face's Conv1D."""
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _linear_names(model):
    """The last parts of the names of all linear layers, adapted or not."""
    linear = [name for name, m in _named_modules(model) if _is_linear(m) or _is_adapted(m)]
    return ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "(none)"


def _check_base(base, modulate):
    """One rule: torch's own linear layer over a plain weight. Everything else is refused."""
    _require(not _is_adapted(base), "it is adapted already: call smoa.unload(model) first")
    W0 = base._parameters.get("weight")
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    plain = _is_linear(base) and "forward" not in vars(base) and type(W0) is nn.Parameter
    dense = plain and W0.ndim == 2 and W0.layout == torch.strided and not W0.is_meta
    if not dense or W0.dtype not in floats:
        weight = "none of its own"
        if W0 is not None:
            weight = f"{type(W0).__name__} in {W0.dtype}, {W0.layout}, on {W0.device}"
        raise TypeError(
            f"{type(base).__module__}.{type(base).__qualname__} (weight: {weight}) cannot be "
            "adapted. SMoA adapts torch.nn.Linear (or Hugging Face's Conv1D) with its own forward "
            "and a dense matrix for its weight. If quantization, offloading, pruning or another "
            "adapter changed this layer, undo that first; otherwise leave it out. The linear "
            f"layers inside it: {_linear_names(base)}"
        )
    _require(W0.isfinite().all(), "the weight holds NaN or infinity")
    _require(W0.any() or not modulate, "the weight is zero, and so is every multiple of it")


def _check_untied(model, base):
    """Of tied weights a merge would change one, and Hugging Face ties them again on loading."""
    W0 = id(base.weight)
    parts = model.named_modules()
    owners = [name for name, part in parts if W0 in map(id, part._parameters.values())]
    _require(
        len(owners) == 1,
        f"{' and '.join(owners)} share one weight: leave this layer out, or untie them first",
    )


def _check_options(m, n, rank, num_blocks, alpha=1.0, dropout=0.0):
    _require(
        isinstance(rank, numbers.Integral)
        and isinstance(num_blocks, numbers.Integral)
        and rank >= 1
        and 1 <= num_blocks <= min(m, n)
        and 0 < alpha < float("inf")
        and 0 <= dropout < 1,
        f"got rank={rank!r}, num_blocks={num_blocks!r}, {alpha=}, {dropout=}; a ({m}, {n}) "
        f"weight needs a whole rank >= 1, 1 to {min(m, n)} blocks, a finite alpha > 0 and a "
        "dropout in [0, 1)",
    )


def _checked_order(order, m, n, device):
    """[row_order, col_order], int64 on the device."""
    if isinstance(order, str) and order in ("spectral", "natural"):  # "spectral" of one block
        order = range(m), range(n)
    sides = order if isinstance(order, (tuple, list)) else ()
    checked = [torch.as_tensor(side).to(device).long() for side in sides]
    _require(
        [sorted(side.tolist()) for side in checked] == [list(range(m)), list(range(n))],
        f'order must be "spectral", "natural" or two permutations (rows 0 to {m - 1}, columns 0 to '
        f"{n - 1}), got {str(order)[:60]!r}",
    )
    return checked


def _check_mergeable(layers):
    trains = any(layer.base.weight.requires_grad for layer in layers)
    _require(not trains, "a base weight trains, and a merge would replace it: freeze it first")


def _check_shape(name, saved, own):
    _require(
        saved.shape == own.shape,
        f"{name} has shape {tuple(saved.shape)} in the adapter, {tuple(own.shape)} in the model",
    )


# ------------------------------------------------------------------------------------------------
# Less time and memory: all that follows is F.linear(x, W, bias), up to rounding

LEAN_ABOVE = 2**17  # weights in a layer; up to that, autograd's full gradient is the faster one


def modulated_linear(layer, x):  # (..., n) -> (..., m)
    """x W^T + bias with W = W0 * (1 + s B A)."""
    W0, device = layer.original_weight(), x.device.type
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    plain = W0.numel() <= LEAN_ABOVE or W0.requires_grad or traced
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    if plain or not autocast and x.dtype != W0.dtype:
        return F.linear(x, layer._oriented(layer.weight), layer.bias)
    if autocast:
        x = x.to(torch.get_autocast_dtype(device))
    tokens = x.reshape(-1, x.shape[-1])  # (T, n)
    y = _lean_linear(layer, tokens, W0, layer.bias, *layer.A, *layer.B)  # (T, m)
    return y.view(*x.shape[:-1], y.shape[-1])


class LeanLinear(torch.autograd.Function):
    """Autograd would keep W (m, n) for the backward, and compute all of the weight's gradient
    g^T x. This builds W again, and computes the K blocks of g^T x where that is quicker.
    """

    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(layer, x, W0, bias, *factors):
        W = _modulated(W0, layer.scale, *_stacked(layer, factors)).to(x.dtype)
        return F.linear(x, W, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.layer, x, W0, bias, *factors = inputs
        ctx.save_for_backward(x, W0, *factors)

    @staticmethod
    def backward(ctx, g):  # (T, m)
        layer, (x, W0, *factors) = ctx.layer, ctx.saved_tensors
        dx = db = None
        with torch.autocast(g.device.type, enabled=False):
            if ctx.needs_input_grad[1]:
                W = _modulated(W0, layer.scale, *_stacked(layer, factors)).to(g.dtype)
                dx = g @ W  # (T, m) @ (m, n)
            if ctx.needs_input_grad[3]:
                db = g.sum(0)
            dA, dB = _factor_gradients(layer, g, x, W0, factors)
        gradients = [layer.scale * d.to(p.dtype) for d, p in zip((*dA, *dB), factors)]
        return None, dx, None, db, *gradients


_lean_linear = LeanLinear.apply
del LeanLinear  # a class like this at module level sends IPython's autoreload into a loop


def _modulated(W0, scale, A, B):
    """W0 * (1 + s B A), (m, n), computed in the dtype of the factors and rounded to W0's once."""
    if W0.stride(0) < W0.stride(1):  # Conv1D's: in its layout
        return _modulated(W0.mT, scale, B.mT, A.mT).mT
    A = torch.cat([A, A.new_ones(1, A.shape[1])])
    B = torch.cat([scale * B, B.new_ones(len(B), 1)], 1)  # so that B A is 1 + s B A
    with torch.autocast(A.device.type, enabled=False):
        if W0.dtype == A.dtype:
            return (B @ A).mul_(W0)
        # By a few rows at a time, so that what is wider than W0 stays in a CPU's cache.
        size = 64 if W0.is_cpu else len(W0)
        pieces = zip(W0.split(size), B.split(size))
        return torch.cat([(B_i @ A).mul_(W0_i).to(W0.dtype) for W0_i, B_i in pieces])


def _factor_gradients(layer, g, x, W0, factors):
    """The gradients of all A_k and all B_k, up to the scale, from g (T, m) and x (T, n)."""
    pairs = _pairs(layer, factors)
    if _multiplies_fast(x):  # then all of g^T x costs less than gathering the blocks of g and x
        A, B = (factor.to(x.dtype) for factor in _stacked(layer, factors))
        G = (g.mT @ x).mul_(W0)  # (m, T) @ (T, n)
        ranks = [len(A_k) for A_k, *_ in pairs]
        stacked = zip(pairs, (B.mT @ G).split(ranks), (G @ A.mT).split(ranks, 1))
        return zip(*((dA[:, cols_k], dB[rows_k]) for (*_, rows_k, cols_k), dA, dB in stacked))
    dA, dB = [], []
    for A_k, B_k, rows_k, cols_k in pairs:
        M_k = W0.index_select(0, rows_k).index_select(1, cols_k)
        G_k = g.index_select(1, rows_k).mT @ x.index_select(1, cols_k)  # (m_k, T) @ (T, n_k)
        G_k = M_k * G_k.to(A_k.dtype)
        dA.append(B_k.mT @ G_k)
        dB.append(G_k @ A_k.mT)
    return dA, dB


def _multiplies_fast(x):
    """Whether x is in bfloat16 and its device has units for that: tensor cores, or a CPU's AMX."""
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return x.dtype == torch.bfloat16 and (x.is_cuda or x.is_cpu and has_amx())
