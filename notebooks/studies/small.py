"""The small model: every method and budget at its own best rate, with five seeds.

    python notebooks/studies/small.py --summary            # what the record says
    python notebooks/studies/small.py --record mine.jsonl  # all of it on a base of your own; hours
    python notebooks/studies/small.py --record mine.jsonl --share 1/2    # and 2/2 beside it
    python notebooks/studies/small.py --summary --record notebooks/studies/records/large.jsonl

gpt_mini.py, pretrained on the modern plays, is adapted to the First Folio. Rates and early stops
are chosen on the last 100,000 characters of the training plays, never on the test plays.
"""

import copy
import itertools
import math
import statistics
import time
from pathlib import Path

import torch
from anchors import give_other_anchor
from runner import RECORDS, ROOT, Study, adapter_options, command, digest

import smoa
from train_shakespeare import (
    PRESETS,
    TARGETS,
    evaluate,
    load_texts,
    make_plan,
    pretrain,
    train,
)

VALIDATION = 100_000  # characters at the end of the training plays
LOW = 20_000  # characters that the "low" arms train on, stopped where the validation is best
TEST_WINDOWS = 1000
LOWEST = {"lora": 0.01, "melora": 0.01, "hira": 0.05, "smoa": 0.05, "full": 0.0005}  # of four rates
RANKS = (1, 2, 4, 8)  # LoRA's; the others train as many parameters

# What one learning rate for all would say: these arms are also tried at the same rates.
SHARED_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
SHARED_ARMS = ("lora r=1", "hira r=1", "melora r=4 K=4", "smoa r=4 K=4")
SHARED_ARMS += ("lora r=4", "hira r=4", "melora r=16 K=4", "smoa r=16 K=4")


def ready_base(out, steps=1000):
    """(model, characters): the base of so many steps in folder `out`, trained now if need be.

    1000 steps take half a minute.
    """
    plan = make_plan(["--out", str(out), "--pretrain-steps", str(steps), "--device", "cpu"])
    plan.out.mkdir(parents=True, exist_ok=True)
    texts = load_texts(plan)
    return pretrain(plan, texts), texts.characters


# ---- What is compared ----------------------------------------------------------------------------


def arms():
    """The arms by name, in the order in which they are run."""
    yield "full"
    for r in (4, 1, 2, 8):
        yield from (f"lora r={r}", f"hira r={r}", f"melora r={4 * r} K=4")
        yield from (f"smoa r={4 * r} K=4{order}" for order in ("", " natural", " random"))
    # Below the parameters of a rank-1 LoRA on all layers: blocks without a pair, fewer layers.
    for r, K in ((1, 2), (1, 4), (2, 4), (1, 8)):
        yield from (f"smoa r={r} K={K}", f"melora r={r} K={K}")
    yield from (f"lora r=1 on {target}" for target in ("qkv", "fc", "mlp.proj", "attn.proj"))
    for r in (1, 4):
        yield from (f"lora r={r} low", f"hira r={r} low")
        yield from (f"melora r={4 * r} K=4 low", f"smoa r={4 * r} K=4 low")
    yield "full low"
    # What might make SMoA win; longer training for both sides.
    for variant in ("scale sqrt(r)", "anchor rms 1", "A around ones", "weight decay 0.1"):
        yield f"smoa r=16 K=4 {variant}"
    yield "smoa r=4 K=4 A ones"  # a second row of ones in a block would stay equal to the first
    yield from ("smoa r=64 K=16", "lora r=4 long", "smoa r=16 K=4 long")
    for r in (4, 1, 2, 8):
        for K in (2, 8):
            yield from (f"smoa r={K * r} K={K}", f"melora r={K * r} K={K}")
    # Must the anchor be W0? On record in anchors.jsonl, with hira and lora over the same base.
    yield from (f"hira r={r} {kind}" for r in (1, 4) for kind in ("permuted", "noise"))


def budgets(ours, theirs):
    """The pairs of two arms at LoRA's four ranks; "4r" stands for four times that rank."""
    pairs = []
    for r in RANKS:
        numbers = {f"{k}r": k * r for k in (1, 2, 4, 8)}
        pairs.append(tuple(arm.format(**numbers) for arm in (ours, theirs)))
    return pairs


def adapted(arm, base, seed):
    """A copy of the base with the arm's trainable parameters."""
    model = copy.deepcopy(base)
    if arm.startswith("full"):
        return model.requires_grad_(True)
    target = arm.partition(" on ")[2]
    ends = tuple(f".{end}" for end in ([target] if target else TARGETS))
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)  # of random orders
    for name in [name for name, _ in model.named_modules() if f".{name}".endswith(ends)]:
        W0 = model.get_submodule(name).weight.detach()
        options = adapter_options(arm)
        if arm.endswith("random"):
            options["order"] = tuple(torch.randperm(n, generator=generator) for n in W0.shape)
        elif arm.endswith("scale sqrt(r)"):
            options["alpha"] = options["rank"] ** 1.5
        elif arm.endswith("anchor rms 1"):
            options["alpha"] = options["rank"] / W0.square().mean().sqrt().item()
        smoa.inject(model, [name], **options)
    for _, layer in smoa.adapters(model):
        if arm.endswith(("permuted", "noise")):
            give_other_anchor(layer, arm.split()[-1])
        elif arm.endswith("ones"):
            for A_k in layer.A:
                A_k.data = A_k.data + 1 if "around" in arm else torch.ones_like(A_k)
    return model


# ---- One run -------------------------------------------------------------------------------------


class Best:
    """The parameters at the lowest validation loss, looked at after each `every` training steps."""

    def __init__(self, model, loss, every):
        self.model, self.validate, self.every = model, loss, every
        self.loss, self.step, self.state = math.inf, None, {}
        self.steps = itertools.count()
        model.register_forward_pre_hook(self.before_step)

    def before_step(self, *_):
        if self.model.training:
            self.look(next(self.steps))

    def look(self, step):
        if step == 0 or step % self.every:
            return
        loss = self.validate(self.model)
        if loss < self.loss:
            named = self.model.named_parameters()
            self.state = {name: p.detach().clone() for name, p in named if p.requires_grad}
            self.loss, self.step = loss, step


def measure(model, texts):
    """Losses on the held-out plays, in both spellings."""
    folio = evaluate(model, texts.folio[1], limit=TEST_WINDOWS)
    return dict(folio=folio, modern=evaluate(model, texts.modern[1], limit=TEST_WINDOWS // 2))


@torch.no_grad()
def updates(model, base, targets=TARGETS):
    """{name: delta_W (m, n)} of the target layers, on the CPU; in float64 where it has factors."""
    deltas = {}
    for name, linear in base.named_modules():
        if f".{name}".endswith(tuple(f".{target}" for target in targets)):
            layer = model.get_submodule(name)
            if isinstance(layer, smoa.SMoALinear):
                deltas[name] = copy.deepcopy(layer).cpu().double().delta_weight()
            else:
                deltas[name] = (layer.weight - linear.weight).cpu()
    return deltas


def train_once(arm, lr, seed, base, texts, preset="small"):
    """Train an arm once, and measure it: the line of the record, but for its base.

    A run that diverges has infinite losses.
    """
    begin = time.time()
    model = adapted(arm, base, seed)
    text, validation = texts.folio[0][:-VALIDATION], texts.folio[0][-VALIDATION:]
    steps = PRESETS[preset]["steps"] * (4 if arm.endswith("long") else 1)
    every, windows = steps, TEST_WINDOWS
    if arm.endswith("low"):
        text, every, windows = text[:LOW], 25, 300
    best = Best(model, lambda model: evaluate(model, validation, limit=windows), every)
    decay = 0.1 if arm.endswith("weight decay 0.1") else 0.0
    recipe = dict(steps=steps, batch_size=PRESETS[preset]["batch_size"], lr=lr, weight_decay=decay)
    try:
        losses = train(model, text, **recipe, seed=seed, label=f"{arm} {lr:g} {seed}")
        best.look(steps)
    except FloatingPointError:
        losses = [math.inf]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    line = dict(arm=arm, steps=steps, lr=lr, seed=seed, trainable=trainable, ranks=math.nan)
    line |= dict(train=statistics.fmean(losses[-25:]), validation=best.loss, stopped=best.step)
    line |= dict(folio=math.inf, modern=math.inf)
    if best.state:
        model.load_state_dict(best.state, strict=False)
        target = arm.partition(" on ")[2]
        deltas = updates(model, base, [target] if target else TARGETS).values()
        ranks = [torch.linalg.matrix_rank(delta).item() for delta in deltas]
        line |= dict(ranks=statistics.fmean(ranks)) | measure(model, texts)
    device = str(next(model.parameters()).device)
    line |= dict(seconds=round(time.time() - begin, 1), torch=torch.__version__, device=device)
    return line


# ---- The study -----------------------------------------------------------------------------------


class Small(Study):
    PATH = RECORDS / "small.jsonl"
    ARMS = tuple(arms())
    CLAIMS = {
        "SMoA beats LoRA at equal parameters": budgets("smoa r={4r} K=4", "lora r={1r}"),
        "spectral order beats natural": budgets("smoa r={4r} K=4", "smoa r={4r} K=4 natural"),
        "spectral order beats random": budgets("smoa r={4r} K=4", "smoa r={4r} K=4 random"),
        "a higher rank helps, with the anchor": budgets("hira r={1r}", "lora r={1r}"),
        "a higher rank helps, without it": budgets("melora r={4r} K=4", "lora r={1r}"),
        "SMoA beats LoRA on 20,000 characters": [
            ("smoa r=4 K=4 low", "lora r=1 low"),
            ("smoa r=16 K=4 low", "lora r=4 low"),
        ],
        "below LoRA's floor, SMoA on all layers beats LoRA on some": [
            ("smoa r=1 K=4", f"lora r=1 on {target}")
            for target in ("attn.proj", "qkv", "fc", "mlp.proj")
        ],
        "longer training brings SMoA past LoRA": [("smoa r=16 K=4 long", "lora r=4 long")],
        "two blocks beat four": budgets("smoa r={2r} K=2", "smoa r={4r} K=4"),
        "eight blocks beat four": budgets("smoa r={8r} K=8", "smoa r={4r} K=4"),
        "the anchor helps, with two blocks": budgets("smoa r={2r} K=2", "melora r={2r} K=2"),
        "the anchor helps because it is W0 (anchors.jsonl)": [
            (f"hira r={r}", f"hira r={r} {kind}") for r in (1, 4) for kind in ("permuted", "noise")
        ],
        "SMoA gains from what is not in the paper": [
            ("smoa r=4 K=4 A ones", "smoa r=4 K=4"),
            ("smoa r=64 K=16", "smoa r=16 K=4"),
            ("smoa r=16 K=4 scale sqrt(r)", "smoa r=16 K=4"),
            ("smoa r=16 K=4 anchor rms 1", "smoa r=16 K=4"),
            ("smoa r=16 K=4 A around ones", "smoa r=16 K=4"),
            ("smoa r=16 K=4 weight decay 0.1", "smoa r=16 K=4"),
        ],
    }

    def first_rates(self, arm):
        rates = {LOWEST[arm.split()[0]] * 2**k for k in range(4)}
        return sorted(rates | set(SHARED_RATES if arm in SHARED_ARMS else ()))

    @staticmethod
    def add_arguments(parser):
        add = parser.add_argument
        add("--preset", choices=list(PRESETS), default="small", help="size of the model (small)")
        add("--out", type=Path, default=ROOT / "out", help="folder of the base")

    def prepare(self, args):
        plan = make_plan(["--out", str(args.out), "--preset", args.preset])
        plan.out.mkdir(parents=True, exist_ok=True)
        self.preset, self.texts = args.preset, load_texts(plan)
        self.base = pretrain(plan, self.texts)
        self.origin = dict(weights=digest(self.base.parameters()), **measure(self.base, self.texts))
        self.check_base(self.origin["weights"])

    def run(self, arm, rate, seed):
        line = train_once(arm, rate, seed, self.base, self.texts, self.preset)
        return line | dict(base=self.origin)


if __name__ == "__main__":
    command(Small, __doc__)
