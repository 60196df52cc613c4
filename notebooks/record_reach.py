"""Measure reach on the small model, and write notebooks/reach.jsonl: what notebook 2 shows.

    python notebooks/record_reach.py              # a quarter of an hour on one core

Trains full fine-tuning, LoRA (rank 4) and SMoA (r = 16, K = 4) on the First Folio as the study
does, seed 0, each at the study's rate, and takes seven wanted changes of each of 16 linear layers:

    noise, rescaling, rank one, gradient, full, lora, smoa

Each line is one of
    kind "base"      what the base and the trained models are
    kind "order"     layer, side, Spearman correlation of spectral place and norm
    kind "overlap"   update, layer, side; for 4, 8, 16, 32, 64 leading directions of W0 the share of
                     the update's four leading directions, and of its energy, that lies in them
    kind "ceiling"   target, layer, order, blocks, share of the target inside the blocks, energy
    kind "reach"     target, layer, family, rho, reach by start, energy of the target
"""

import argparse
import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from reach import FAMILIES, ceiling, family, noise_like, reach_by_start, shuffled  # noqa: E402
from study import VALIDATION, describe, ready_base, updates  # noqa: E402

import smoa  # noqa: E402
from gpt_mini import Recipe, batch, evaluate, train_steps  # noqa: E402
from train_shakespeare import load_texts, make_plan, prepare  # noqa: E402

RATES = {"full": 0.004, "lora": 0.03, "smoa": 0.1}  # each the best of its sweep in the study
LEADING = (4, 8, 16, 32, 64)
FIT = dict(count=2, sweeps=300, tolerance=1e-5)


def random_order(W0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randperm(size, generator=generator) for size in W0.shape)


def norm_order(T):
    return T.norm(dim=1).argsort(descending=True), T.norm(dim=0).argsort(descending=True)


def leading_order(T):
    """By the entries of the leading singular vectors, from negative to positive."""
    U, _, Vh = torch.linalg.svd(T, full_matrices=False)
    return U[:, 0].argsort(), Vh[0].argsort()


def gradient(base, tokens, layers, batches=32):
    """{layer: the gradient of the mean loss over some batches}."""
    parameters = [base.get_submodule(name).weight.requires_grad_(True) for name in layers]
    for step in range(batches):
        (base(*batch(tokens, base.config.block_size, 12, 1, step))[1] / batches).backward()
    gradients = {name: p.grad.double() for name, p in zip(layers, parameters)}
    base.requires_grad_(False)
    return gradients


def trained(base, text):
    """{method: (model, {layer: its update})}, as the study trains them."""
    found = {}
    for method, lr in RATES.items():
        torch.manual_seed(0)
        model = prepare(base, method, rank=4, blocks=4)
        list(train_steps(model, text, Recipe(steps=250, batch_size=12, lr=lr)))
        deltas = {name: D.double() for name, D in updates(model, base).items()}
        found[method] = model, deltas
    return found


def targets_of(i, W0, known):
    """{target: matrix} for layer number i; `known` has the measured ones."""
    generator = torch.Generator().manual_seed(i)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    m, n = W0.shape
    made = {"noise": normal(m, n)}
    made["rescaling"] = normal(m, 1) * W0 * normal(n)
    made["rank one"] = normal(m, 1) * normal(n)
    return known | made


def reach_lines(layer, W0, targets):
    noise, shuffle = noise_like(W0), shuffled(W0)
    random, spectral = random_order(W0), smoa.spectral_order(W0)
    for target, T in targets.items():
        for rho in (1, 4):
            tried = {name: (W0, family(name, rho)) for name in FAMILIES}
            tried["SMoA K=2"] = W0, family("SMoA", rho, num_blocks=2)
            tried["SMoA random"] = W0, family("SMoA", rho) | dict(order=random)
            tried["HiRA, noise anchor"] = noise, family("HiRA", rho)
            tried["HiRA, shuffled anchor"] = shuffle, family("HiRA", rho)
            tried["SMoA, noise anchor"] = noise, family("SMoA", rho) | dict(order=spectral)
            for name, (anchor, options) in tried.items():
                shares = reach_by_start(T, anchor, **options, **FIT)
                head = dict(kind="reach", target=target, layer=layer, family=name, rho=rho)
                yield head | dict(reach=shares, energy=T.square().sum().item())


def ceiling_lines(layer, W0, targets):
    grad, full = targets["gradient"], targets["full"]
    orders = {
        "spectral": "spectral",
        "natural": "natural",
        "random": random_order(W0),
        "norms of W0": norm_order(W0),
        "norms of the gradient": norm_order(grad),
        "leading vectors of the gradient": leading_order(grad),
        "norms of the update": norm_order(full),
        "spectrum of the update": smoa.spectral_order(full),
    }
    for order, given in orders.items():
        for blocks in (2, 4, 8):
            for target, T in (targets | {"W0": W0}).items():
                inside = ceiling(T, W0, num_blocks=blocks, order=given)
                head = dict(kind="ceiling", target=target, layer=layer, order=order)
                yield head | dict(blocks=blocks, share=inside, energy=T.square().sum().item())


def overlap_lines(layer, W0, targets):
    U, _, Vh = torch.linalg.svd(W0, full_matrices=True)
    for update in ("gradient", "full", "lora", "smoa"):
        for side, D, basis in (
            ("left", targets[update], U),
            ("right", targets[update].mT, Vh.mT),
        ):
            rank = 4  # of LoRA's update; of the others the four leading directions of their own
            own = torch.linalg.svd(D, full_matrices=False)[0][:, :rank]
            space = (basis.mT @ own).square().sum(1) / rank  # over the directions of W0, sums to 1
            energy = (D.mT @ basis).square().sum(0) / D.square().sum()
            head = dict(kind="overlap", update=update, layer=layer, side=side, size=len(basis))
            space = [space[:j].sum().item() for j in LEADING]
            energy = [energy[:j].sum().item() for j in LEADING]
            yield head | dict(leading=LEADING, space=space, energy=energy)


def ranks(values):
    return values.argsort().argsort().double()


def order_lines(layer, W0):
    for side, order, norms in zip(
        ("left", "right"), smoa.spectral_order(W0), (W0.norm(dim=1), W0.norm(dim=0))
    ):
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        pair = torch.stack([place.double(), ranks(norms)])
        yield dict(kind="order", layer=layer, side=side, spearman=torch.corrcoef(pair)[0, 1].item())


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--record", type=Path, default=HERE / "reach.jsonl")
    parser.add_argument("--out", type=Path, default=HERE.parent / "out", help="the base's folder")
    args = parser.parse_args()
    base, _ = ready_base(args.out, steps=4000)
    texts = load_texts(make_plan(["--out", str(args.out)]))
    text = texts.folio[0][:-VALIDATION]
    models = trained(base, text)
    layers = list(models["full"][1])
    gradients = gradient(base, text, layers)
    losses = {
        name: evaluate(model, texts.folio[1], limit=1000) for name, (model, _) in models.items()
    }
    with open(args.record, "w", encoding="utf-8") as file:
        head = dict(kind="base", base=describe(base, texts), folio=losses, rates=RATES)
        file.write(json.dumps(head | dict(torch=torch.__version__)) + "\n")
        for i, layer in enumerate(layers):
            W0 = base.get_submodule(layer).weight.detach().double()
            known = {name: deltas[layer] for name, (_, deltas) in models.items()}
            targets = targets_of(i, W0, {"gradient": gradients[layer]} | known)
            for lines in (
                order_lines(layer, W0),
                overlap_lines(layer, W0, targets),
                ceiling_lines(layer, W0, targets),
                reach_lines(layer, W0, targets),
            ):
                for line in lines:
                    file.write(json.dumps(line) + "\n")
            file.flush()
            print(layer, flush=True)


if __name__ == "__main__":
    main()
