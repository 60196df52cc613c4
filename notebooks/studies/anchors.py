"""Controls of the anchor: SMoA and HiRA with another matrix in the place of W0."""

import runner  # noqa: F401 (puts smoa.py on the path)
import torch
import torch.nn.functional as F

import smoa


class OtherAnchor(smoa.SMoALinear):
    """A SMoALinear with delta_W = s (B A) * other, for a matrix `other` (m, n) instead of W0."""

    def delta_weight(self):
        A, B = self.factors()
        return (self.scale * B) @ A * self.other

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


def give_other_anchor(layer, kind):
    """Turn a SMoALinear into an OtherAnchor; its factors and its order stay what they are.

    Args:
        kind: "permuted": W0 with its rows and its columns in random order. It has W0's entries and
            singular values, in places that mean nothing.
            "noise": Gaussian, with W0's mean square in expectation.
            "rank 8": a product of Gaussian matrices (m, 8) and (8, n), with W0's mean square in
            every block. "rank full": a Gaussian matrix, scaled likewise.
    """
    W0 = layer.original_weight().detach()
    m, n = W0.shape
    if kind == "permuted":
        other = W0[torch.randperm(m)][:, torch.randperm(n)]
    elif kind == "noise":
        other = torch.randn(m, n).to(W0) * W0.square().mean().sqrt()
    else:
        if kind == "rank full":
            other = torch.randn(m, n).to(W0)
        else:
            p = int(kind.removeprefix("rank "))
            other = (torch.randn(m, p) @ torch.randn(p, n)).to(W0)
        for rows, cols in zip(layer.rows, layer.cols):
            block = rows[:, None], cols
            other[block] *= (W0.square().mean() / other[block].square().mean()).sqrt()
    layer.__class__ = OtherAnchor
    layer.register_buffer("other", other, persistent=False)
