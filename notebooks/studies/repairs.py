"""Repairs: four damages with a known right answer, repaired from data by four methods.

    python notebooks/studies/repairs.py --summary     # the table of the record
    python notebooks/studies/repairs.py               # run what it lacks (an hour on one core)

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

import copy
import json
import statistics
from pathlib import Path

import torch
from reach import blocks
from runner import RECORDS, ROOT, Study, adapter_options, command, digest
from small import ready_base

import smoa
from train_shakespeare import TARGETS, corpus, encode, evaluate, train

STEPS, BATCH, K, SPREAD = 250, 12, 4, 0.7
VALIDATION = 100_000  # characters at the end of the training plays
TASKS = ("rescaled in blocks", "rank one", "rescaled", "rank one in blocks")
METHODS = {  # options of `inject`, 8,192 parameters each; lowest of four rates
    "SMoA": (adapter_options("smoa r=4 K=4 natural"), 0.05),
    "LoRA": (adapter_options("lora r=1"), 0.01),
    "HiRA": (adapter_options("hira r=1"), 0.05),
    "MELoRA": (adapter_options("melora r=4 K=4"), 0.01),
    "SMoA spectral": (adapter_options("smoa r=4 K=4"), 0.05),
}


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
    layers = [item for item in model.named_modules() if item[0].endswith(tuple(TARGETS))]
    for i, (name, layer) in enumerate(layers):
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


def repaired_share(run):
    """How much of the damage, in loss, is undone: 0 none, 1 all of it."""
    return (run["damaged"] - run["repaired"]) / (run["damaged"] - run["healthy"])


class Repairs(Study):
    """An arm is a task and a method: "rank one: LoRA"."""

    PATH = RECORDS / "repairs.jsonl"
    ARMS = tuple(f"{task}: {method}" for task in TASKS for method in METHODS)
    SEEDS = 3

    def read(self):
        lines = map(json.loads, self.path.read_text().splitlines()) if self.path.exists() else ()
        return [line | dict(arm=f"{line['task']}: {line['method']}") for line in lines]

    def first_rates(self, arm):
        lowest = METHODS[arm.split(": ")[1]][1]
        return [lowest * 2**k for k in range(4)]

    @staticmethod
    def add_arguments(parser):
        parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder of the base")

    def prepare(self, args):
        self.base, characters = ready_base(args.out, steps=4000)
        self.weights = digest(self.base.parameters())
        self.check_base(self.weights)
        self.plays, self.held_out = (encode(text, characters) for text in corpus("modern"))
        self.healthy = evaluate(self.base, self.held_out, limit=1000)

    def run(self, arm, rate, seed):
        task, method = arm.split(": ")
        damaged, answers = damage(self.base, task)
        model = copy.deepcopy(damaged)
        torch.manual_seed(seed)
        smoa.inject(model, TARGETS, **METHODS[method][0])
        recipe = dict(steps=STEPS, batch_size=BATCH, lr=rate, seed=seed)
        train(model, self.plays[:-VALIDATION], **recipe, label=f"{arm} {rate:g} {seed}")
        return dict(
            task=task,
            method=method,
            lr=rate,
            seed=seed,
            trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
            validation=evaluate(model, self.plays[-VALIDATION:], limit=1000),
            healthy=self.healthy,
            damaged=evaluate(damaged, self.held_out, limit=1000),
            repaired=evaluate(model, self.held_out, limit=1000),
            found=found_share(model, answers),
            base=self.weights,
            torch=torch.__version__,
        )

    def summary(self):
        """Print how much of each damage is undone, and how near the update comes to the answer."""
        print(f"{'damage: method':34}{'rate':>7}{'seeds':>6}{'undone ± SD':>18}{'cos^2':>7}")
        for arm in self.ARMS:
            runs = list(self.runs(arm).values())
            if not runs:
                continue
            shares = [repaired_share(run) for run in runs]
            spread = statistics.stdev(shares) if len(runs) > 1 else float("nan")
            found = statistics.fmean(run["found"] for run in runs)
            print(f"{arm:34}{runs[0]['lr']:7g}{len(runs):6}", end="")
            print(f"{statistics.fmean(shares):10.1%} ± {spread:5.1%}{found:7.2f}")


if __name__ == "__main__":
    command(Repairs, __doc__)
