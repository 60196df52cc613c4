"""Reach on a real language model: how much of a wanted change the best of each family can be.

    python notebooks/reach_lm.py                 # the gradient at the base, its signs, and noise
    python notebooks/reach_lm.py --keep FOLDER   # the trained updates that `study_lm.py --keep
                                                 # FOLDER` left there, at the rate that is best

reach.py says what reach is and how it is found; here are only the language model's targets, layers
and controls. The signs of the gradient are where Adam's first step goes. The result is
reach_lm.json, a row a number; rows of other targets stay in it.
"""

import argparse
import copy
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


def trained_update(base, arm, path):
    """{layer: what a run of an arm of the study has added to W0, (m, n)}, from its file."""
    model = copy.deepcopy(base)
    if arm != "full":
        smoa.inject(model, LAYERS, **study_lm.ARMS[arm][1])
    model.load_state_dict(torch.load(path, weights_only=True), strict=False)
    found = {}
    for name in LAYERS:
        layer, W0 = model.get_submodule(name), base.get_submodule(name).weight
        found[name] = layer.weight - W0 if arm == "full" else layer.delta_weight()
    return found


def trained_updates(base, folder):
    """{target: updates} of the arms whose best run is in the folder."""
    records, found = study_lm.read_records(study_lm.RECORD), {}
    for arm in ("full", *study_lm.HEADLINE):
        runs = [r for r in records if r["arm"] == arm]
        path = folder / study_lm.kept_name(arm, study_lm.best_rung(arm, records) if runs else 0, 0)
        if runs and path.exists():
            found[f"update of {arm}"] = trained_update(base, arm, path)
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
    parser.add_argument("--keep", type=Path, help="a folder of trained factors")
    args = parser.parse_args(argv)
    base, tokenizer = study_lm.load_base()
    weights = {name: base.get_submodule(name).weight.detach() for name in LAYERS}
    if args.keep:
        with torch.no_grad():
            targets = trained_updates(base, args.keep)
    else:
        tokens = study_lm.load_texts(tokenizer)["train"]
        found = gradients(base, tokens, LAYERS)
        targets = {"gradient": found}
        targets["its signs"] = {name: gradient.sign() for name, gradient in found.items()}
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
