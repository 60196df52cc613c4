"""The small model of test_users.py and its neighbours, and what must not change in it."""

import contextlib
from functools import partial

import pytest
import strategies
import torch
import torch.nn.functional as F
from strategies import bits, dense_update, fill
from torch import nn

import smoa

SMALL, LARGE = 8, 384  # the weights of LARGE are above smoa.LEAN_ABOVE: smoa.py's last section
both_sizes = pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
normal = partial(strategies.normal, dtype=torch.float32)


class Net(nn.Module):
    """Layers named first (size + 2, size), second (size, size + 2), norm and head (3, size)."""

    def __init__(self, size=SMALL, dtype=torch.float32):
        super().__init__()
        self.first = nn.Linear(size, size + 2)
        self.second = nn.Linear(size + 2, size, bias=False)
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, 3)
        for i, layer in enumerate((self.first, self.second, self.head)):
            layer.weight.data = normal(*layer.weight.shape, seed=i) / size**0.5
        for i, layer in enumerate((self.first, self.head)):
            layer.bias.data = normal(*layer.bias.shape, seed=5 + i)
        self.to(dtype)

    def forward(self, x):  # (..., size) -> (..., 3)
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.second(x))
        return self.head(self.norm(x))


class LoRA(nn.Module):
    """x W0^T + (x A^T) B^T over a frozen base, as its paper has it: the rival in costs."""

    def __init__(self, base, rank):
        super().__init__()
        m, n = base.weight.shape
        device = base.weight.device
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, n, device=device) / n**0.5)
        self.B = nn.Parameter(torch.zeros(m, rank, device=device))

    def forward(self, x):
        z = F.linear(x, self.A.to(x.dtype))
        return self.base(x) + F.linear(z, self.B.to(x.dtype))


def input_for(model):
    """An input (4, size) of a Net, in its dtype."""
    return normal(4, model.head.in_features, seed=9, dtype=model.head.weight.dtype)


def adapted(size=SMALL, targets=("first", "second"), dtype=torch.float32, seed=1, **options):
    """A Net with trained factors."""
    model = Net(size, dtype)
    smoa.inject(model, list(targets), **({"rank": 4} | options))
    return fill(model, seed)


def dense(layer):
    """W by the definition, in the base's orientation and dtype. Differentiable."""
    W0, *factors = (p.double() for p in (layer.original_weight(), *layer.A, *layer.B))
    W = W0 + dense_update(layer, W0, factors[: len(layer.A)], factors[len(layer.A) :])
    return (W if isinstance(layer.base, nn.Linear) else W.mT).to(layer.base.weight.dtype)


def near(actual, expected, roundings=100):
    """Equal, in the Frobenius norm, but for roundings: sums are computed in another order."""
    allowed = roundings * torch.finfo(expected.dtype).eps * expected.double().norm()
    return actual.dtype == expected.dtype and (actual - expected).double().norm() <= allowed


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def gradients(model, x, call=None):
    """{name: gradient} of everything that trains, after one backward."""
    model.zero_grad()
    (model if call is None else call)(x).float().square().sum().backward()
    return {name: model.get_parameter(name).grad for name in trained_names(model)}


def all_bits(tensors):
    return {
        name: bits(tensor) if not tensor.is_meta and tensor.layout == torch.strided else None
        for name, tensor in tensors.items()
    }


def snapshot(model):
    """All that a refused call must leave alone."""
    parameters = dict(model.named_parameters())
    layers = [layer for _, layer in smoa.adapters(model)]
    return {
        "tensors": all_bits(parameters | dict(model.named_buffers())),
        "trained": trained_names(model),
        "gradients": {name: id(p.grad) for name, p in parameters.items()},
        "modules": [(name, id(part), part.training) for name, part in model.named_modules()],
        "merged": [layer.merged for layer in layers],
        "orders": [(layer.row_order.tolist(), layer.col_order.tolist()) for layer in layers],
    }


@contextlib.contextmanager
def refused(*words, model, error=(TypeError, ValueError)):
    """A block that raises an error with all the words in it, and leaves the model as it was."""
    before = snapshot(model)
    with pytest.raises(error) as caught:
        yield
    assert all(word in str(caught.value) for word in words), (words, str(caught.value))
    assert snapshot(model) == before


def kept_bytes(module, x):
    """What autograd keeps for the backward: each storage once, without the parameters'."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    assert y.requires_grad  # and is alive, so that no memory was used twice
    for p in module.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    return sum(kept.values())
