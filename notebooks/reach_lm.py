"""Reach on a real language model: how much of a wanted change the best of each family can be.

    python notebooks/reach_lm.py                        # the gradient at the base, and noise
    python notebooks/reach_lm.py --update full.pt       # also full fine-tuning's update, of a file
                                                        # that `study_lm.py --keep FOLDER` left

reach.py says what reach is and how it is found; here are only the language model's targets, layers
and controls. The result is reach_lm.json, a row a number; rows of other targets stay in it.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import study_lm  # noqa: E402
from reach import ceiling, noise_like, reach, shuffled  # noqa: E402

import smoa  # noqa: E402

RESULT = Path(__file__).resolve().with_suffix(".json")
BLOCKS = (5, 24)  # of 30 transformer blocks, an early and a late one
KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
LAYERS = [f"model.layers.{block}.{kind}" for block in BLOCKS for kind in KINDS]
BATCHES = 16  # of training text, for the gradient


def gradients(model, tokens, layers):
    """{layer: gradient of the mean loss over BATCHES batches, (m, n)}."""
    weights = {name: model.get_submodule(name).weight.requires_grad_(True) for name in layers}
    for step in range(BATCHES):
        loss = study_lm.token_losses(model, study_lm.batch(tokens, 0, step)).mean()
        (loss / BATCHES).backward()
    found = {name: weight.grad for name, weight in weights.items()}
    model.requires_grad_(False)
    return found


def families(W0):
    """{name: (what stands in W0's place, options of reach)}: m + n numbers, unless named by r."""
    generator = torch.Generator().manual_seed(0)
    orders = {
        "spectral": smoa.spectral_order(W0),
        "natural": tuple(torch.arange(size) for size in W0.shape),
        "random": tuple(torch.randperm(size, generator=generator) for size in W0.shape),
    }
    found = {
        "LoRA": (W0, dict(rank=1, modulate=False)),
        "MELoRA K=4": (W0, dict(rank=4, num_blocks=4, modulate=False, order="natural")),
        "HiRA": (W0, dict(rank=1)),
        "HiRA, noise for W0": (noise_like(W0), dict(rank=1)),
        "HiRA, W0 shuffled": (shuffled(W0), dict(rank=1)),
    }
    for K in (2, 4):
        for name, order in orders.items():
            found[f"SMoA K={K} {name}"] = (W0, dict(rank=K, num_blocks=K, order=order))
    two = dict(rank=2, num_blocks=2, order=orders["spectral"])
    found["SMoA K=2, noise for W0"] = (noise_like(W0), two)
    found["SMoA K=2, W0 shuffled"] = (shuffled(W0), two)
    found["LoRA rank 4"] = (W0, dict(rank=4, modulate=False))
    found["HiRA rank 4"] = (W0, dict(rank=4))
    found["SMoA r=8 K=2"] = (W0, dict(rank=8, num_blocks=2, order=orders["spectral"]))
    return found


def measure(target, W0):
    """{family: reach} of one target, and the ceilings: the share that lies in the blocks at all."""
    found = {}
    for name, (anchor, options) in families(W0).items():
        found[name] = reach(target, anchor, count=2, sweeps=100, tolerance=1e-5, **options)
    for K in (2, 4):
        for order in ("spectral", "natural"):
            found[f"all of the blocks, K={K} {order}"] = ceiling(
                target, W0, num_blocks=K, order=order
            )
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", type=Path, help="a file of full fine-tuning's weights")
    args = parser.parse_args(argv)
    base, tokenizer = study_lm.load_base()
    weights = {name: base.get_submodule(name).weight.detach() for name in LAYERS}
    if args.update:
        trained = torch.load(args.update, weights_only=True)
        targets = {"update": {n: trained[f"{n}.weight"] - W0 for n, W0 in weights.items()}}
    else:
        tokens = study_lm.load_texts(tokenizer)["train"]
        targets = {"gradient": gradients(base, tokens, LAYERS)}
        targets["noise"] = {name: noise_like(W0, seed=1) for name, W0 in weights.items()}
    rows = json.loads(RESULT.read_text()) if RESULT.exists() else []
    rows = [row for row in rows if row["target"] not in targets]
    for target, changes in targets.items():
        for layer, change in changes.items():
            found = measure(change, weights[layer])
            print(target, layer, {name: round(value, 4) for name, value in found.items()})
            rows += [
                dict(target=target, layer=layer, family=name, reach=round(value, 5))
                for name, value in found.items()
            ]
            lines = ",\n".join(json.dumps(row) for row in rows)
            RESULT.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
