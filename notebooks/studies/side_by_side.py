"""Several runs of SmolLM2 side by side: one batch, in which every run has its own factors.

A card launches the many small operations of one run more slowly than it computes them. A linear
layer here has the factors of S runs and gets the windows of all of them at once; so the operations
are S times as large, and as many as of one run.
"""

import copy

import runner  # noqa: F401 (puts smoa.py on the path)
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import smoa
from train_shakespeare import learning_rate


class SideBySide(nn.Module):
    """One layer of S models, (S B, T, n) -> (S B, T, m): y = x W^T with W = W0 + s B A * M.

    M is W0, another anchor, or 1. `A[k]` (S, r_k, n_k) and `B[k]` (S, m_k, r_k) are set from
    outside, before each forward.
    """

    def __init__(self, layers):
        super().__init__()
        first = layers[0]
        self.W0, self.scale = first.original_weight().detach(), first.scale
        self.rows, self.cols = first.rows, first.cols
        self.anchor = self.W0 if first.modulate else torch.ones_like(self.W0[:1, :1])
        if hasattr(first, "other"):
            self.anchor = torch.stack([layer.other for layer in layers])

    def forward(self, x):
        S, (m, n) = len(self.A[0]), self.W0.shape
        A = torch.cat(
            [
                A_k.new_zeros(S, A_k.shape[1], n).index_copy(2, cols_k, A_k)
                for A_k, cols_k in zip(self.A, self.cols)
            ],
            1,
        )
        B = torch.cat(
            [
                B_k.new_zeros(S, m, B_k.shape[2]).index_copy(1, rows_k, B_k)
                for B_k, rows_k in zip(self.B, self.rows)
            ],
            2,
        )
        W = self.W0 + self.scale * (B @ A) * self.anchor  # (S, m, n)
        y = x.unflatten(0, (S, -1)).flatten(1, 2) @ W.mT  # (S, B T, n) @ (S, n, m)
        return y.view(*x.shape[:-1], m)


def train(models, settings, steps, token_losses):
    """Train adapted models that are alike, as they would train one by one.

    Args:
        settings: for each model, a dictionary of its `lr`, of `ratio` (B's rate over A's), and of
            `batch`, a function from the step to its windows (B, T + 1).
        token_losses: a function from a model and windows (B, T + 1) to losses (B, T).
    Returns:
        The losses of each model, a list for each, up to the first that is not finite.
    """
    carrier = copy.deepcopy(models[0])  # it has their layers, and shares all else
    adapted = [dict(smoa.adapters(model)) for model in models]
    first, sides = adapted[0], {}
    for name in first:
        sides[name] = SideBySide([layers[name] for layers in adapted])
        carrier.set_submodule(name, sides[name])
    factors = {kind: [[*getattr(layer, kind)] for layer in first.values()] for kind in "AB"}

    def of_run(layers, kind):
        return [p for layer in layers.values() for p in getattr(layer, kind)]

    vectors, optimizers = [], []  # all of a run's A in one vector, all of its B in another
    for layers, setting in zip(adapted, settings):
        own = [parameters_to_vector(of_run(layers, kind)).detach() for kind in "AB"]
        vectors.append([nn.Parameter(vector.clone()) for vector in own])
        groups = [dict(params=[p], ratio=r) for p, r in zip(vectors[-1], (1, setting["ratio"]))]
        optimizers.append(torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0))
    history = []
    for step in range(steps):
        for j, kind in enumerate("AB"):
            shapes = [p.shape for layer in factors[kind] for p in layer]
            stacked = torch.stack([own[j] for own in vectors])  # (S, numbers)
            pieces = stacked.split([shape.numel() for shape in shapes], 1)
            pieces = iter([piece.unflatten(1, shape) for piece, shape in zip(pieces, shapes)])
            for side, own in zip(sides.values(), factors[kind]):
                setattr(side, kind, [next(pieces) for _ in own])
        windows = torch.cat([setting["batch"](step) for setting in settings])
        losses = token_losses(carrier, windows).view(len(models), -1).mean(1)  # (S,)
        losses.sum().backward()
        history.append(losses.detach())
        for own, setting, optimizer in zip(vectors, settings, optimizers):
            for group in optimizer.param_groups:
                group["lr"] = group["ratio"] * learning_rate(step, steps, setting["lr"])
            torch.nn.utils.clip_grad_norm_(own, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    for layers, own in zip(adapted, vectors):
        for kind, vector in zip("AB", own):
            vector_to_parameters(vector.detach(), of_run(layers, kind))
    found = torch.stack(history, 1).cpu()  # (S, steps)
    return [row[: finite_steps(row)].tolist() for row in found]


def finite_steps(losses):
    """How many losses there are up to and with the first that is not finite."""
    bad = (~losses.isfinite()).nonzero()
    return len(losses) if len(bad) == 0 else int(bad[0]) + 1
