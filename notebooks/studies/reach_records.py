"""Measure reach (see reach.py) on both models, and write the records that the notebooks show.

    python notebooks/studies/reach_records.py small                 # a quarter of an hour
    python notebooks/studies/reach_records.py smollm                # gradient, its signs, noise
    python notebooks/studies/reach_records.py smollm --keep FOLDER  # trained updates, as
                                                                    # smollm.py --keep left them
    python notebooks/studies/reach_records.py losses --keep FOLDER  # losses of the best members

"small" writes reach.jsonl. Full fine-tuning, LoRA (r = 4) and SMoA (r = 16, K = 4) are trained on
the First Folio as in small.py, and seven wanted changes of each of 16 layers are taken: noise,
rescaling, rank one, gradient, full, lora, smoa. Each line is one of
    kind "base"      what the base and the trained models are
    kind "order"     layer, side, Spearman correlation of spectral place and norm
    kind "overlap"   update, layer, side; for 4, 8, 16, 32, 64 leading directions of W0 the share of
                     the update's four leading directions, and of its energy, that lies in them
    kind "ceiling"   target, layer, order, blocks, share of the target inside the blocks, energy
    kind "reach"     target, layer, family, rho, reach by start, energy of the target

"smollm" adds to reach_lm.json, a row for each target, layer and family; the signs of the gradient
are where Adam's first step goes. Plain reach counts every entry of the wanted change alike, but
what the layer puts out is T x, and some input channels are much louder than others. With channels
that do not correlate, E |(T - D) x|^2 = ||(T - D) diag(rms x)||^2, so the reach "as the inputs see
it" is that of T diag(rms x) over W0 diag(rms x). "losses" puts the best members in this sense, of
full fine-tuning's update and in all layers at once, into the model: reach_lm_losses.json.
"""

import argparse
import copy
import json
import math
import statistics
from pathlib import Path

import small
import smollm
import torch
from reach import FAMILIES, best_fit, ceiling, family, noise_like, reach, reach_by_start, shuffled
from runner import RECORDS, ROOT, adapter_options, digest, present_name

import smoa
from train_shakespeare import batch, evaluate, load_texts, make_plan, train


def gradients(model, layers, losses, count):
    """{layer: gradient (m, n) of the mean of `count` losses}; `losses` computes them one by one."""
    weights = {name: model.get_submodule(name).weight.requires_grad_(True) for name in layers}
    for loss in losses:
        (loss / count).backward()
    found = {name: weight.grad for name, weight in weights.items()}
    model.requires_grad_(False)
    return found


def random_order(W0):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randperm(size, generator=generator) for size in W0.shape)


# ---- The small model -----------------------------------------------------------------------------

RATES = {"full": 0.004, "lora r=4": 0.03, "smoa r=16 K=4": 0.1}  # each the best of its sweep
LEADING = (4, 8, 16, 32, 64)
FIT = dict(count=2, sweeps=300, tolerance=1e-5)


def norm_order(T):
    return T.norm(dim=1).argsort(descending=True), T.norm(dim=0).argsort(descending=True)


def leading_order(T):
    """By the entries of the leading singular vectors, from negative to positive."""
    U, _, Vh = torch.linalg.svd(T, full_matrices=False)
    return U[:, 0].argsort(), Vh[0].argsort()


def made_targets(i, W0):
    """{target: matrix} for layer number i, of those that need no training."""
    generator = torch.Generator().manual_seed(i)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    m, n = W0.shape
    made = {"noise": normal(m, n)}
    made["rescaling"] = normal(m, 1) * W0 * normal(n)
    made["rank one"] = normal(m, 1) * normal(n)
    return made


def reach_lines(W0, targets):
    noise = noise_like(W0)
    for target, T in targets.items():
        for rho in (1, 4):
            tried = {name: (W0, family(name, rho)) for name in FAMILIES}
            tried["SMoA K=2"] = W0, family("SMoA", rho, num_blocks=2)
            tried["SMoA random"] = W0, family("SMoA", rho) | dict(order=random_order(W0))
            tried["HiRA, noise anchor"] = noise, family("HiRA", rho)
            tried["HiRA, shuffled anchor"] = shuffled(W0), family("HiRA", rho)
            spectral = dict(order=smoa.spectral_order(W0))
            tried["SMoA, noise anchor"] = noise, family("SMoA", rho) | spectral
            for name, (anchor, options) in tried.items():
                line = dict(kind="reach", target=target, family=name, rho=rho)
                line["reach"] = reach_by_start(T, anchor, **options, **FIT)
                yield line | dict(energy=T.square().sum().item())


def ceiling_lines(W0, targets):
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
    for name, order in orders.items():
        for blocks in (2, 4, 8):
            for target, T in (targets | {"W0": W0}).items():
                line = dict(kind="ceiling", target=target, order=name, blocks=blocks)
                line["share"] = ceiling(T, W0, num_blocks=blocks, order=order)
                yield line | dict(energy=T.square().sum().item())


def overlap_lines(W0, targets, rank=4):
    U, _, Vh = torch.linalg.svd(W0, full_matrices=True)
    for update in ("gradient", "full", "lora", "smoa"):
        D = targets[update]
        for side, D, basis in (("left", D, U), ("right", D.mT, Vh.mT)):
            own = torch.linalg.svd(D, full_matrices=False)[0][:, :rank]
            space = (basis.mT @ own).square().sum(1) / rank  # over the directions of W0, sums to 1
            energy = (D.mT @ basis).square().sum(0) / D.square().sum()
            line = dict(kind="overlap", update=update, side=side, size=len(basis), leading=LEADING)
            line["space"] = [space[:j].sum().item() for j in LEADING]
            yield line | dict(energy=[energy[:j].sum().item() for j in LEADING])


def order_lines(W0):
    norms = W0.norm(dim=1), W0.norm(dim=0)
    for side, order, norm in zip(("left", "right"), smoa.spectral_order(W0), norms):
        pair = torch.stack([order.argsort().double(), norm.argsort().argsort().double()])
        yield dict(kind="order", side=side, spearman=torch.corrcoef(pair)[0, 1].item())


def record_small(out):
    base, _ = small.ready_base(out, steps=4000)
    texts = load_texts(make_plan(["--out", str(out)]))
    text = texts.folio[0][: -small.VALIDATION]
    models = {}
    for arm, lr in RATES.items():
        models[arm.split()[0]] = model = small.adapted(arm, base, seed=0)
        train(model, text, steps=250, batch_size=12, lr=lr, label=arm)
    deltas = {method: small.updates(model, base) for method, model in models.items()}
    layers = list(deltas["full"])
    losses = (base(*batch(text, base.config.block_size, 12, 1, step))[1] for step in range(32))
    deltas = {"gradient": gradients(base, layers, losses, 32)} | deltas
    origin = dict(weights=digest(base.parameters())) | small.measure(base, texts)
    trained = {name: evaluate(m, texts.folio[1], limit=1000) for name, m in models.items()}
    rates = {arm.split()[0]: lr for arm, lr in RATES.items()}
    lines = [dict(kind="base", base=origin, folio=trained, rates=rates, torch=torch.__version__)]
    for i, layer in enumerate(layers):
        W0 = base.get_submodule(layer).weight.detach().double()
        targets = {name: found[layer].double() for name, found in deltas.items()}
        targets |= made_targets(i, W0)
        found = [*order_lines(W0), *overlap_lines(W0, targets)]
        found += [*ceiling_lines(W0, targets), *reach_lines(W0, targets)]
        lines += [line | dict(layer=layer) for line in found]
        print(layer, flush=True)
    (RECORDS / "reach.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


# ---- The language model --------------------------------------------------------------------------

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
LAYERS = [f"model.layers.{block}.{kind}" for block in (5, 24) for kind in KINDS]  # of 30 blocks
BATCHES = 16  # of training text, for the gradient and the inputs
SEEN = ", as the inputs see it"
SCALES = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # a part may well want to be larger


@torch.no_grad()
def input_rms(model, tokens, layers):
    """{layer: root mean square of each of its input channels, (n,)} over BATCHES batches."""
    squares, handles = dict.fromkeys(layers, 0.0), []
    for name in layers:

        def watch(module, inputs, name=name):
            x = inputs[0].double().flatten(0, -2)  # (T, n)
            squares[name] = squares[name] + x.square().mean(0) / BATCHES

        handles.append(model.get_submodule(name).register_forward_pre_hook(watch))
    for step in range(BATCHES):
        smollm.token_losses(model, smollm.batch(tokens, 0, step))
    for handle in handles:
        handle.remove()
    return {name: square.sqrt() for name, square in squares.items()}


@torch.no_grad()
def trained_updates(base, folder, layers, arms=("full", "lora r=1", "smoa r=2 K=2")):
    """{arm: {layer: what its best run with seed 0 has added to W0}} of the runs in the folder."""
    study, found = smollm.SmolLM(), {}
    for arm in arms:
        path = folder / smollm.kept_name(arm, study.best_rate(arm), 0)
        if path.exists():
            model = copy.deepcopy(base)
            if arm != "full":
                smoa.inject(model, layers, **adapter_options(arm))
            model.load_state_dict(torch.load(path, weights_only=True), strict=False)
            weights = {name: model.get_submodule(name).weight for name in layers}
            found[arm] = {name: W - base.get_submodule(name).weight for name, W in weights.items()}
    return found


def reach_of_families(target, W0, loud):
    """{family: reach} of one target, and the ceilings: the share that lies in the blocks at all.

    `loud` (n,) weighs the columns: with the inputs' rms it is the reach as the inputs see it.
    """
    natural = tuple(torch.arange(size) for size in W0.shape)
    orders = dict(spectral=smoa.spectral_order(W0), natural=natural, random=random_order(W0))
    spectral = dict(order=orders["spectral"])
    noise, shuffle = noise_like(W0), shuffled(W0)
    families = {
        "LoRA": (W0, adapter_options("lora r=1")),
        "MELoRA K=4": (W0, adapter_options("melora r=4 K=4")),
        "HiRA": (W0, adapter_options("hira r=1")),
        "HiRA, noise for W0": (noise, adapter_options("hira r=1")),
        "HiRA, W0 shuffled": (shuffle, adapter_options("hira r=1")),
    }
    for K in (2, 4):
        for name, order in orders.items():
            options = adapter_options(f"smoa r={K} K={K}") | dict(order=order)
            families[f"SMoA K={K} {name}"] = W0, options
    two = adapter_options("smoa r=2 K=2") | spectral
    families["SMoA K=2, noise for W0"] = noise, two
    families["SMoA K=2, W0 shuffled"] = shuffle, two
    families["LoRA rank 4"] = W0, adapter_options("lora r=4")
    families["HiRA rank 4"] = W0, adapter_options("hira r=4")
    families["SMoA r=8 K=2"] = W0, adapter_options("smoa r=8 K=2") | spectral
    fit = dict(count=2, sweeps=100, tolerance=1e-5)
    found = {
        name: reach(target * loud, anchor * loud, **options, **fit)
        for name, (anchor, options) in families.items()
    }
    for K in (2, 4):
        for order in ("spectral", "natural"):
            inside = ceiling(target * loud, W0, num_blocks=K, order=orders[order])
            found[f"all of the blocks, K={K} {order}"] = inside
    return found


def record_smollm(base, texts, folder):
    weights = {name: base.get_submodule(name).weight.detach() for name in LAYERS}
    loud = {}
    if folder:
        found = trained_updates(base, folder, LAYERS)
        targets = {f"update of {arm}": changes for arm, changes in found.items()}
        if "full" in found:
            targets["update of full" + SEEN] = found["full"]
            loud["update of full" + SEEN] = input_rms(base, texts["train"], LAYERS)
    else:
        batches = (smollm.batch(texts["train"], 0, step) for step in range(BATCHES))
        losses = (smollm.token_losses(base, batch).mean() for batch in batches)
        gradient = gradients(base, LAYERS, losses, BATCHES)
        signs = {name: grad.sign() for name, grad in gradient.items()}
        noise = {name: noise_like(W0, seed=1) for name, W0 in weights.items()}
        targets = {"gradient": gradient, "its signs": signs, "noise": noise}
    path = RECORDS / "reach_lm.json"
    rows = json.loads(path.read_text())
    known = {row["target"].removeprefix("update of ") for row in rows}
    known |= {present_name(name) for name in known}
    for target in [name for name in targets if name.removeprefix("update of ") not in known]:
        for layer, change in targets[target].items():
            column_weights = loud[target][layer] if target in loud else 1.0
            found = reach_of_families(change, weights[layer], column_weights)
            for name, value in found.items():
                row = dict(target=target, layer=layer, family=name, reach=round(value, 5))
                rows.append(row)
            write_rows(path, rows)


@torch.no_grad()
def losses_of(base, changes, texts):
    """Folio losses of the base plus the multiple of {layer: change} that validates best."""
    names = ("validation", "folio")
    validation, folio = (smollm.windows(texts[name], smollm.WINDOWS[name]) for name in names)
    best = dict(validation=math.inf)
    for scale in SCALES:
        model = copy.deepcopy(base)
        for layer, change in changes.items():
            model.get_submodule(layer).weight += scale * change
        loss = smollm.evaluate(model, validation).mean().item()
        if loss > best["validation"]:
            break
        best = dict(scale=scale, validation=loss, model=model)
    losses = smollm.evaluate(best.pop("model"), folio).tolist()
    return best | dict(folio=[round(loss, 4) for loss in losses])


def record_losses(base, texts, folder):
    """A row a family: what its best member, as the inputs see it, of full's update is worth."""
    layers = smollm.linear_names(base)
    wanted = trained_updates(base, folder, layers, ["full"])["full"]
    loud = input_rms(base, texts["train"], layers)
    rows = [dict(family="full", held=1.0, **losses_of(base, wanted, texts))]
    # Of m + n numbers a layer; in natural order, which needs no spectrum of 210 layers.
    members = {"LoRA": "lora r=1", "HiRA": "hira r=1", "SMoA K=2 natural": "smoa r=2 K=2 natural"}
    for name, arm in members.items():
        changes, held, total = {}, 0.0, 0.0
        for layer, T in wanted.items():
            x, W0 = loud[layer], base.get_submodule(layer).weight
            fit = dict(count=1, sweeps=50, tolerance=1e-4)
            member = best_fit(T * x, W0 * x, **adapter_options(arm), **fit)
            changes[layer] = member / x
            held += member.square().sum().item()
            total += (T * x).square().sum().item()
        rows.append(dict(family=name, held=held / total, **losses_of(base, changes, texts)))
        print(name, f"{held / total:.1%}", statistics.fmean(rows[-1]["folio"]), flush=True)
    write_rows(RECORDS / "reach_lm_losses.json", rows)


def write_rows(path, rows):
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f"[\n{lines}\n]\n")


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("record", choices=["small", "smollm", "losses"])
    parser.add_argument("--keep", type=Path, help="a folder of trained factors")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder of the small base")
    args = parser.parse_args()
    if args.record == "small":
        return record_small(args.out)
    base, tokenizer = smollm.load_base()
    texts = smollm.load_texts(tokenizer)
    if args.record == "smollm":
        return record_smollm(base, texts, args.keep)
    record_losses(base, texts, args.keep)


if __name__ == "__main__":
    main()
