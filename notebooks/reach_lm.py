"""Reach on a real language model: how much of a wanted change the best of each family can be.

    python notebooks/reach_lm.py                 # the gradient at the base, its signs, and noise
    python notebooks/reach_lm.py --keep FOLDER   # the trained updates that `study_lm.py --keep
                                                 # FOLDER` left there, at the rate that is best
    python notebooks/reach_lm.py --keep FOLDER --losses    # the best members' own losses

reach.py says what reach is and how it is found; here are only the language model's targets, layers
and controls. The signs of the gradient are where Adam's first step goes. The result is
reach_lm.json, a row a number; targets that are in it are not measured again.

Plain reach counts every entry of the wanted change alike. What the layer puts out is T x, and some
input channels are much louder than others. With channels that do not correlate,

    E |(T - D) x|^2 = ||(T - D) diag(rms x)||^2

so the reach "as the inputs see it" is that of T diag(rms x) over W0 diag(rms x): scaled columns
lead from a member of a family to a member of it. With --losses the best member in this sense, of
full fine-tuning's update and in all layers at once, is put into the model, and its loss measured.
"""

import argparse
import copy
import json
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import study_lm  # noqa: E402
from reach import best_fit, ceiling, noise_like, reach, shuffled  # noqa: E402

import smoa  # noqa: E402

RESULT = Path(__file__).resolve().with_suffix(".json")
LOSSES = RESULT.with_name("reach_lm_losses.json")
BLOCKS = (5, 24)  # of 30 transformer blocks, an early and a late one
KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
LAYERS = [f"model.layers.{block}.{kind}" for block in BLOCKS for kind in KINDS]
BATCHES = 16  # of training text, for the gradient and the inputs
SEEN = ", as the inputs see it"


def gradients(model, tokens, layers):
    """{layer: gradient of the mean loss over BATCHES batches, (m, n)}."""
    weights = {name: model.get_submodule(name).weight.requires_grad_(True) for name in layers}
    for step in range(BATCHES):
        loss = study_lm.token_losses(model, study_lm.batch(tokens, 0, step)).mean()
        (loss / BATCHES).backward()
    found = {name: weight.grad for name, weight in weights.items()}
    model.requires_grad_(False)
    return found


@torch.no_grad()
def input_rms(model, tokens, layers):
    """{layer: root mean square of each of its input channels, (n,)} over BATCHES batches."""
    squares, handles = {}, []
    for name in layers:

        def watch(module, inputs, name=name):
            x = inputs[0].double().flatten(0, -2)  # (T, n)
            squares[name] = squares.get(name, 0) + x.square().mean(0) / BATCHES

        handles.append(model.get_submodule(name).register_forward_pre_hook(watch))
    for step in range(BATCHES):
        study_lm.token_losses(model, study_lm.batch(tokens, 0, step))
    for handle in handles:
        handle.remove()
    return {name: square.sqrt() for name, square in squares.items()}


def trained_update(base, arm, path, layers):
    """{layer: what a run of an arm of the study has added to W0, (m, n)}, from its file."""
    model = copy.deepcopy(base)
    if arm != "full":
        smoa.inject(model, layers, **study_lm.ARMS[arm][1])
    model.load_state_dict(torch.load(path, weights_only=True), strict=False)
    found = {}
    for name in layers:
        layer, W0 = model.get_submodule(name), base.get_submodule(name).weight
        found[name] = layer.weight - W0 if arm == "full" else layer.delta_weight()
    return found


def trained_updates(base, folder, layers, arms=("full", *study_lm.HEADLINE)):
    """{target: updates} of the arms whose best run is in the folder."""
    records, found = study_lm.read_records(study_lm.RECORD), {}
    for arm in arms:
        runs = [r for r in records if r["arm"] == arm]
        path = folder / study_lm.kept_name(arm, study_lm.best_rung(arm, records) if runs else 0, 0)
        if runs and path.exists():
            found[f"update of {arm}"] = trained_update(base, arm, path, layers)
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


def measure(target, W0, loud=1.0):
    """{family: reach} of one target, and the ceilings: the share that lies in the blocks at all.

    `loud` (n,) weighs the columns: with the inputs' rms it is the reach as the inputs see it.
    """
    found = {}
    for name, (anchor, options) in families(W0).items():
        found[name] = reach(
            target * loud, anchor * loud, count=2, sweeps=100, tolerance=1e-5, **options
        )
    for K in (2, 4):
        for order in ("spectral", "natural"):
            found[f"all of the blocks, K={K} {order}"] = ceiling(
                target * loud, W0, num_blocks=K, order=order
            )
    return found


# ------------------------------------------------------------------------------------------
# The losses of the best members

SCALES = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # a part may well want to be larger
MEMBERS = {  # of m + n numbers a layer; natural order, which needs no spectrum of 210 layers
    "LoRA": dict(rank=1, modulate=False),
    "HiRA": dict(rank=1),
    "SMoA K=2 natural": dict(rank=2, num_blocks=2, order="natural"),
}


@torch.no_grad()
def losses_of(base, changes, texts):
    """Folio losses of the base plus the multiple of {layer: change} that validates best."""
    validation = study_lm.windows(texts["validation"], study_lm.WINDOWS["validation"])
    folio = study_lm.windows(texts["folio"], study_lm.WINDOWS["folio"])
    best = dict(validation=math.inf)
    for scale in SCALES:
        model = copy.deepcopy(base)
        for layer, change in changes.items():
            model.get_submodule(layer).weight += scale * change
        loss = study_lm.evaluate(model, validation).mean().item()
        if loss > best["validation"]:
            break
        best = dict(scale=scale, validation=loss, model=model)
    losses = study_lm.evaluate(best.pop("model"), folio).tolist()
    return best | dict(folio=[round(loss, 4) for loss in losses])


def measure_losses(base, texts, folder):
    """A row a family: what its best member, as the inputs see it, of full's update is worth."""
    layers = study_lm.linear_names(base)
    (wanted,) = trained_updates(base, folder, layers, ["full"]).values()
    loud = input_rms(base, texts["train"], layers)
    rows = [dict(family="full", held=1.0, **losses_of(base, wanted, texts))]
    for name, options in MEMBERS.items():
        members, held, total = {}, 0.0, 0.0
        for layer, T in wanted.items():
            x, W0 = loud[layer], base.get_submodule(layer).weight
            fit = best_fit(T * x, W0 * x, count=1, sweeps=50, tolerance=1e-4, **options)
            members[layer] = fit / x
            held += fit.square().sum().item()
            total += (T * x).square().sum().item()
        rows.append(dict(family=name, held=held / total, **losses_of(base, members, texts)))
        print(name, f"{held / total:.1%}", round(study_lm.mean(rows[-1]["folio"]), 4), flush=True)
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", type=Path, help="a folder of trained factors")
    parser.add_argument("--losses", action="store_true", help="of the best members instead")
    args = parser.parse_args(argv)
    base, tokenizer = study_lm.load_base()
    texts = study_lm.load_texts(tokenizer)
    if args.losses:
        return write(LOSSES, measure_losses(base, texts, args.keep))
    weights = {name: base.get_submodule(name).weight.detach() for name in LAYERS}
    ones = dict.fromkeys(LAYERS, 1.0)
    if args.keep:
        with torch.no_grad():
            found = trained_updates(base, args.keep, LAYERS)
        targets = {name: (changes, ones) for name, changes in found.items()}
        if "update of full" in found:
            loud = input_rms(base, texts["train"], LAYERS)
            targets["update of full" + SEEN] = (found["update of full"], loud)
    else:
        found = gradients(base, texts["train"], LAYERS)
        signs = {name: gradient.sign() for name, gradient in found.items()}
        noise = {name: noise_like(W0, seed=1) for name, W0 in weights.items()}
        targets = {"gradient": (found, ones), "its signs": (signs, ones), "noise": (noise, ones)}
    rows = json.loads(RESULT.read_text()) if RESULT.exists() else []
    for target in {row["target"] for row in rows} & targets.keys():
        del targets[target]
    for target, (changes, column_weights) in targets.items():
        for layer, change in changes.items():
            found = measure(change, weights[layer], column_weights[layer])
            print(target, layer, {name: round(value, 4) for name, value in found.items()})
            rows += [
                dict(target=target, layer=layer, family=name, reach=round(value, 5))
                for name, value in found.items()
            ]
            write(RESULT, rows)


def write(path, rows):
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
