"""When SMoA wins: four damages with a known right answer, repaired from data by four methods.

    python notebooks/rescaling.py                 # run what the record lacks (an hour on one core)
    python notebooks/rescaling.py --share 1/2     # the same, as process 1 of 2
    python notebooks/rescaling.py --summary       # print the table of the record

A trained gpt_mini is damaged in all its linear layers, W0 = W - answer. The answer, the update that
repairs the layer, is known to us, never to the method: it sees the damaged model and the modern
plays that the model was trained on. Each answer is a member of one family at 8,192 parameters:

    rank one               u v^T                                LoRA of rank 1
    rank one in blocks     u_k v_k^T in each of 4 blocks        MELoRA, r_k = 1
    rescaled               diag(d) W0                           HiRA of rank 1
    rescaled in blocks     diag(d_k) M_k in each of 4 blocks    SMoA, r_k = 1, in the same blocks

A rescaling multiplies output channels by factors exp(0.7 z), z normal. A damage of rank one has, in
each layer, the norm of the damage that "rescaled in blocks" does there. The blocks are those of the
natural order: SMoA in spectral order has the right kind of update in the wrong blocks, a control.
"""

import argparse
import copy
import hashlib
import json
import statistics
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from reach import blocks  # noqa: E402
from study import read_records, ready_base  # noqa: E402

import smoa  # noqa: E402
from gpt_mini import Recipe, evaluate, train_steps  # noqa: E402
from train_shakespeare import TARGETS, corpus, encode, stop, with_bar  # noqa: E402

RECORD = HERE / "rescaling.jsonl"
STEPS, BATCH, SEEDS, K, SPREAD = 250, 12, 3, 4, 0.7
TASKS = ("rescaled in blocks", "rank one", "rescaled", "rank one in blocks")
METHODS = {  # options of `inject`, 8,192 parameters each; lowest of four rates, each twice the last
    "SMoA": (dict(rank=K, num_blocks=K, order="natural"), 0.05),
    "LoRA": (dict(rank=1, num_blocks=1, modulate=False), 0.01),
    "HiRA": (dict(rank=1, num_blocks=1), 0.05),
    "MELoRA": (dict(rank=K, num_blocks=K, modulate=False, order="natural"), 0.01),
    "SMoA spectral": (dict(rank=K, num_blocks=K), 0.05),
}


def linear_layers(model):
    """[(name, layer)] of what the methods adapt."""
    modules = model.named_modules()
    return [(name, layer) for name, layer in modules if name.endswith(tuple(TARGETS))]


def rescaling(W, pieces, generator):
    """(damaged weight, answer): each output channel of each block times a factor of its own."""
    damaged = W.clone()
    for rows, cols in pieces:
        factor = torch.exp(SPREAD * torch.randn(len(rows), 1, generator=generator))
        damaged[rows[:, None], cols] *= factor
    return damaged, W - damaged


def rank_one(W, pieces, norm, generator):
    """(damaged weight, answer): u v^T in each block, of the given norm in all."""
    answer = torch.zeros_like(W)
    for rows, cols in pieces:
        u = torch.randn(len(rows), 1, generator=generator)
        v = torch.randn(len(cols), generator=generator)
        answer[rows[:, None], cols] = u * v
    answer *= norm / answer.norm()
    return W - answer, answer


@torch.no_grad()
def damage(base, task, seed=0):
    """(a damaged copy of the base, {layer: the update that repairs it})."""
    model, answers = copy.deepcopy(base), {}
    for i, (name, layer) in enumerate(linear_layers(model)):
        W = layer.weight.clone()
        generator = torch.Generator().manual_seed(1000 * seed + i)
        in_blocks = blocks(W, K, "natural")
        damaged, answer = rescaling(W, in_blocks, generator)
        pieces = in_blocks if task.endswith("in blocks") else blocks(W, 1, "natural")
        if task.startswith("rank one"):
            damaged, answer = rank_one(W, pieces, answer.norm(), generator)
        elif task == "rescaled":
            damaged, answer = rescaling(W, pieces, generator)
        layer.weight.copy_(damaged)
        answers[name] = answer
    return model, answers


def wanted(lowest, runs):
    """The (rate, seed) pairs that an arm of these runs still wants.

    First four rates, more while the best one is at an edge, then more seeds at the best.
    """
    found = {(run["lr"], run["seed"]): run["validation"] for run in runs}
    rates = {lowest * 2**k for k in range(4)} | {lr for lr, _ in found}
    missing = [(lr, 0) for lr in sorted(rates) if (lr, 0) not in found]
    if missing:
        return missing
    best = min(rates, key=lambda lr: found[lr, 0])
    if best == min(rates):
        return [(best / 2, 0)]
    if best == max(rates):
        return [(best * 2, 0)]
    return [(best, seed) for seed in range(1, SEEDS) if (best, seed) not in found]


def repair(damaged, method, lr, seed, text):
    """The damaged model, adapted from data."""
    torch.manual_seed(seed)
    model = copy.deepcopy(damaged)
    smoa.inject(model, TARGETS, **METHODS[method][0])
    label = f"{method} {lr:g} {seed}"
    list(with_bar(train_steps(model, text, Recipe(STEPS, BATCH, lr, seed=seed)), label, STEPS))
    return model


@torch.no_grad()
def found_share(model, answers):
    """Cosine squared between the update found and the answer, over all layers together."""
    inner = own = right = 0.0
    for name, layer in smoa.adapters(model):
        delta = layer.delta_weight().double()
        inner += (delta * answers[name]).sum().item()
        own += delta.square().sum().item()
        right += answers[name].double().square().sum().item()
    return inner**2 / (own * right)


def digest(model):
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(weights).hexdigest()[:12]


def all_arms():
    """Every task with every method, the question's own four first."""
    arms = [(task, method) for task in TASKS for method in METHODS]
    return sorted(
        arms, key=lambda arm: (arm[0] not in TASKS[:2]) + (arm[1] not in ("SMoA", "LoRA"))
    )


def next_run(arms, records):
    """(task, method, rate, seed) of the first run that is missing, or None."""
    for task, method in arms:
        runs = [r for r in records if (r["task"], r["method"]) == (task, method)]
        todo = wanted(METHODS[method][1], runs)
        if todo:
            return task, method, *todo[0]
    return None


def run_all(record, i, n, out):
    """Run what the record lacks, a line a run; process i of n takes every n-th arm."""
    base, characters = ready_base(out, steps=4000)
    weights = digest(base)
    others = {row["base"] for row in read_records(record)} - {weights}
    if others:
        stop(
            f"the runs in {record} are of base {', '.join(sorted(others))}, this one is {weights}: "
            "give another --record"
        )
    plays, held_out = (encode(text, characters, "the corpus") for text in corpus("modern"))
    text, validation = plays[:-100_000], plays[-100_000:]
    healthy = evaluate(base, held_out, limit=1000)
    arms = all_arms()[i - 1 :: n]
    while todo := next_run(arms, read_records(record)):
        task, method, lr, seed = todo
        damaged, answers = damage(base, task)
        model = repair(damaged, method, lr, seed, text)
        layers = [layer for _, layer in smoa.adapters(model)]
        row = dict(
            task=task,
            method=method,
            lr=lr,
            seed=seed,
            trainable=sum(p.numel() for layer in layers for p in (*layer.A, *layer.B)),
            validation=evaluate(model, validation, limit=1000),
            healthy=healthy,
            damaged=evaluate(damaged, held_out, limit=1000),
            repaired=evaluate(model, held_out, limit=1000),
            found=found_share(model, answers),
            base=weights,
            torch=torch.__version__,
        )
        with open(record, "a") as file:
            file.write(json.dumps(row) + "\n")


def at_best_rate(records):
    """{(task, method): its runs at the rate that validated best for the first seed}."""
    best = {}
    for run in records:
        arm = run["task"], run["method"]
        if run["seed"] == 0 and run["validation"] < best.get(arm, run)["validation"] + 1e-12:
            best[arm] = run
    return {
        arm: [r for r in records if (r["task"], r["method"], r["lr"]) == (*arm, run["lr"])]
        for arm, run in best.items()
    }


def repaired_share(run):
    """How much of the damage, in loss, is undone: 0 none, 1 all of it."""
    return (run["damaged"] - run["repaired"]) / (run["damaged"] - run["healthy"])


def summarize(record):
    head = f"{'task':20} {'method':14} {'rate':>6} {'seeds':>5}"
    print(f"{head} {'damage undone, SD':>19} {'cos^2':>6}")
    for (task, method), runs in sorted(at_best_rate(read_records(record)).items()):
        shares = [repaired_share(run) for run in runs]
        spread = statistics.stdev(shares) if len(runs) > 1 else float("nan")
        found = statistics.mean(run["found"] for run in runs)
        mean = statistics.mean(shares)
        print(
            f"{task:20} {method:14} {runs[0]['lr']:6g} {len(runs):5}"
            f" {mean:10.1%} +- {spread:5.1%} {found:6.2f}"
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--share", default="1/1", metavar="I/N", help="be process I of N")
    parser.add_argument("--summary", action="store_true", help="print the record's table, and stop")
    parser.add_argument("--record", type=Path, default=RECORD, help="a line a run")
    parser.add_argument("--out", type=Path, default=HERE.parent / "out", help="the base's folder")
    args = parser.parse_args()
    if args.summary:
        summarize(args.record)
        return
    i, n = map(int, args.share.split("/"))
    run_all(args.record, i, n, args.out)


if __name__ == "__main__":
    main()
