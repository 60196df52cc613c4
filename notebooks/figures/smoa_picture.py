"""Draw smoa.png: W0 x (1 + B A) = W above W0 + B A = W.

W0 is made up: noise with loud and quiet rows and columns, in spectral order. The factors are
random; both rows of the picture have equally many, and change W0 by as much (Frobenius norm).
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # smoa.py is two folders up
import smoa

M, N, K = 24, 32, 2
RED, BLUE = "#c44e52", "#4c72b0"  # SMoA, LoRA


def made_up_weight(rng):
    volume = np.exp(0.5 * rng.normal(size=(M, 1))) * np.exp(0.5 * rng.normal(size=N))  # (M, N)
    W0 = volume * rng.normal(size=(M, N))
    rows, cols = smoa.spectral_order(torch.from_numpy(W0))
    return W0[rows.numpy()][:, cols.numpy()]


def random_pair(rng, m, n):
    """B A (m, n) of rank 1, every entry between -1 and 1."""
    b, a = (rng.choice((-1, 1), size) * rng.uniform(0.3, 1, size) for size in (m, n))
    return np.outer(b, a)


def draw(axes, color, sign, W0, factor, W, texts):
    """One row: three matrices, the signs between them, a line above and a line below each."""
    neutral = 1 if sign == "×" else 0
    reach = np.abs(factor - neutral).max()
    red_blue = dict(cmap="RdBu_r", vmin=neutral - reach, vmax=neutral + reach)
    grey = dict(cmap="Greys", vmin=0, vmax=3)
    for ax, symbol in zip(axes[1::2], (sign, "=")):
        ax.text(0.5, 0.5, symbol, fontsize=44, color=color, ha="center", va="center")
        ax.axis("off")
    panels = (np.abs(W0), grey), (factor, red_blue), (np.abs(W), grey)
    for ax, (matrix, options), (above, below) in zip(axes[::2], panels, texts):
        ax.imshow(matrix, **options, aspect="auto")
        ax.set_title(above, fontsize=19, color=color, fontweight="bold", pad=8)
        ax.set_xlabel(below, fontsize=16, labelpad=6)
        ax.set(xticks=[], yticks=[])


def main():
    rng = np.random.default_rng(0)
    W0 = made_up_weight(rng)
    blocks = [random_pair(rng, M // K, N // K) for _ in range(K)]
    BA = torch.block_diag(*map(torch.from_numpy, blocks)).numpy()  # SMoA's
    W = W0 * (1 + BA)
    BA_lora = random_pair(rng, M, N)
    BA_lora *= np.linalg.norm(W - W0) / np.linalg.norm(BA_lora)
    W_lora = W0 + BA_lora
    rank, rank_lora = (np.linalg.matrix_rank(changed - W0) for changed in (W, W_lora))

    options = dict(figsize=(14, 8.4), width_ratios=(9, 1, 9, 1, 9), layout="constrained")
    figure, axes = plt.subplots(2, 5, **options)
    frozen = "frozen weight W0", f"{M} × {N}, in spectral order"
    trained = "SMoA multiplies by 1 + B A", f"B A: rank {K}, {M + N} trained numbers; white = 1"
    adapted = "adapted weight W", f"W − W0 has rank {rank}"
    draw(axes[0], RED, "×", W0, 1 + BA, W, (frozen, trained, adapted))
    frozen = "frozen weight W0", "the same; darker = larger"
    trained = "LoRA adds B A", f"B A: rank 1, {M + N} trained numbers; white = 0"
    adapted = "adapted weight W", f"W − W0 has rank {rank_lora}"
    draw(axes[1], BLUE, "+", W0, BA_lora, W_lora, (frozen, trained, adapted))
    figure.savefig(Path(__file__).with_name("smoa.png"), dpi=100)


if __name__ == "__main__":
    main()
