"""The study behind the defaults: every method and budget at its own best rate, with five seeds.

    python notebooks/study.py --summary           # the table and the verdicts of study.jsonl
    python notebooks/study.py --record mine.jsonl # all of it on a base of your own; hours
    python notebooks/study.py --record mine.jsonl --share 1/2   # and --share 2/2 beside it
    python notebooks/study.py --record notebooks/study_large.jsonl --summary  # "large", on a card

A record holds one line a run. The study is a function from the runs on record to the runs still
wanted, so that it can be stopped, gone on with, and shared out between processes.
"""

import argparse
import copy
import hashlib
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import smoa  # noqa: E402
from gpt_mini import Recipe, evaluate, has_diverged, train_steps  # noqa: E402
from train_shakespeare import (  # noqa: E402
    PRESETS,
    TARGETS,
    adapter_options,
    corpus,
    errors_in_one_line,
    load_texts,
    make_plan,
    open_out,
    pretrain,
    read_base,
    say,
    stop,
    with_bar,
)

STUDY_STEPS, STUDY_SEEDS, STUDY_WINDOWS = PRESETS["small"]["steps"], 5, 1000
VALIDATION = 100_000  # characters, the last of the Folio's training plays
LOWEST = {"lora": 0.01, "melora": 0.01, "hira": 0.05, "smoa": 0.05, "full": 0.0005}  # of four rates
RANKS = (1, 2, 4, 8)  # LoRA's; the others train as many parameters

# What one learning rate for all would say: these arms are also tried at the same rates.
SHARED_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
SHARED_ARMS = [
    arm.format(rank)
    for rank in (1, 4)
    for arm in ("lora {}", "hira {}", "melora {} K=4", "smoa {} K=4")
]


# ---- Bases, for the notebooks --------------------------------------------------------------------


def finished_base(out):
    """(model, characters, steps) of the finished base in `out` with the most steps, or None."""
    best = None
    for path in sorted(Path(out).glob("base-*.pt")):
        model, state = read_base(path)
        finished = state["step"] == state["settings"]["recipe"]["steps"]
        sound = not has_diverged(state["loss"], len(state["characters"]))
        if finished and sound and (best is None or state["step"] > best[2]):
            best = model, state["characters"], state["step"]
    return best


def ready_base(out, steps=1000):
    """(model, characters): the finished base in `out`, or a new one, left there as any other.

    The one found must have the small preset's width, the corpus's letters and so many steps. A new
    one of 1000 steps takes half a minute.
    """
    found = finished_base(out)
    if found is not None:
        model, characters, trained = found
        width = PRESETS["small"]["model"]["n_embd"]
        letters = set("".join(corpus("folio")))
        fits = model.config.n_embd == width and letters <= set(characters)
        if fits and trained >= steps:
            print(f"a finished base of {trained} steps from {out}")
            return model, characters
    plan = make_plan(["--out", str(out), "--pretrain-steps", str(steps), "--device", "cpu"])
    plan.out.mkdir(parents=True, exist_ok=True)
    texts = load_texts(plan)
    return pretrain(plan, texts)[0], texts.characters


# ---- What is compared ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One thing to compare: a method with a budget, and what departs from the default."""

    method: str
    rank: int = 0  # LoRA's, for the parameter count
    blocks: int = 0
    steps: int = STUDY_STEPS  # with another preset, in proportion to its own
    targets: tuple = tuple(TARGETS)
    variant: str | None = None
    order: str = "spectral"
    characters: int | None = None  # of the Folio to train on; with early stopping
    total_rank: int | None = None  # r < K: fewer parameters than a LoRA of rank 1


def study_arms():
    """{name: Arm}, in the order in which they are run."""
    arms = {"full": Arm("full")}
    for rank in (4, 1, 2, 8):
        for method in ("lora", "hira"):
            arms[f"{method} {rank}"] = Arm(method, rank, 1)
        for method in ("smoa", "melora"):
            arms[f"{method} {rank} K=4"] = Arm(method, rank, 4)
        for order in ("natural", "random"):
            arms[f"smoa {rank} K=4 {order}"] = Arm("smoa", rank, 4, order=order)
    # Below the parameters of a rank-1 LoRA on all layers: blocks without a branch, fewer layers.
    for total, blocks in ((1, 2), (1, 4), (2, 4), (1, 8)):
        arms[f"smoa r={total} K={blocks}"] = Arm("smoa", 1, blocks, total_rank=total)
        arms[f"melora r={total} K={blocks}"] = Arm("melora", 1, blocks, total_rank=total)
    for target in ("qkv", "fc", "mlp.proj", "attn.proj"):
        arms[f"lora 1 on {target}"] = Arm("lora", 1, 1, targets=(target,))
    # 20,000 characters of the Folio, stopped where the validation part is best.
    for rank in (1, 4):
        for method, blocks in (("lora", 1), ("hira", 1), ("melora", 4), ("smoa", 4)):
            arms[f"{method} {rank} low"] = Arm(method, rank, blocks, characters=20_000)
    arms["full low"] = Arm("full", characters=20_000)
    # What might make SMoA win, at rank 4; longer training for both sides.
    for variant in ("scale sqrt(r)", "anchor rms 1", "A around ones", "weight decay 0.1"):
        arms[f"smoa 4 K=4 {variant}"] = Arm("smoa", 4, 4, variant=variant)
    # More than one row of ones would stay equal for ever.
    arms["smoa 1 K=4 A ones"] = Arm("smoa", 1, 4, variant="A ones")
    arms["smoa 4 K=16"] = Arm("smoa", 4, 16)
    for method, blocks in (("lora", 1), ("smoa", 4)):
        arms[f"{method} 4 long"] = Arm(method, 4, blocks, steps=4 * STUDY_STEPS)
    for rank in (4, 1, 2, 8):
        for blocks in (2, 8):
            for method in ("smoa", "melora"):
                arms[f"{method} {rank} K={blocks}"] = Arm(method, rank, blocks)
    # Must the anchor be W0? On record in anchors.jsonl, with hira and lora over the same base.
    for rank in (1, 4):
        for kind in ("permuted", "noise"):
            arms[f"hira {rank} {kind}"] = Arm("hira", rank, 1, variant=f"{kind} anchor")
    return arms


def wanted(name, records):
    """The (rate, seed) pairs that an arm still wants.

    Its grid with seed 0, wider while the best rate is at an edge; then more seeds at the best.
    """
    mine = {(r["lr"], r["seed"]): r["validation"] for r in records if r["arm"] == name}
    lowest = LOWEST[study_arms()[name].method]
    grid = {lowest * 2**k for k in range(4)} | {lr for lr, seed in mine if seed == 0}
    if name in SHARED_ARMS:
        grid |= set(SHARED_RATES)
    grid = sorted(grid)
    missing = [(lr, 0) for lr in grid if (lr, 0) not in mine]
    if missing:
        return missing
    best = min(grid, key=lambda lr: mine[lr, 0])
    if best == grid[0]:
        return [(best / 2, 0)]
    if best == grid[-1]:
        return [(best * 2, 0)]
    return [(best, seed) for seed in range(1, STUDY_SEEDS) if (best, seed) not in mine]


# ---- One run -------------------------------------------------------------------------------------


class OtherAnchor(smoa.SMoALinear):
    """A control: a SMoALinear whose anchors are blocks of another (m, n) matrix, `other`, than W0.

    "permuted" is W0 with its rows and its columns in random order: its entries and its singular
    values, in places that mean nothing. "noise" is Gaussian, as large as W0 on average.
    """

    def delta(self, k):
        M_k = self.other[self.rows[k]][:, self.cols[k]]
        return self.scale * (self.B[k] @ self.A[k]) * M_k

    def forward(self, x):
        return self.plain_forward(x)


def give_other_anchor(layer, kind):
    """Turn a SMoALinear into an OtherAnchor; its factors and its order stay what they are."""
    W0 = layer.original_weight().detach()
    m, n = W0.shape
    if kind == "permuted":
        other = W0[torch.randperm(m)][:, torch.randperm(n)]
    else:
        other = torch.randn(m, n).to(W0) * W0.square().mean().sqrt()
    layer.__class__ = OtherAnchor
    layer.register_buffer("other", other, persistent=False)


def adapted(arm, base, seed):
    """A copy of the base with the arm's trainable parameters."""
    model = copy.deepcopy(base)
    if arm.method == "full":
        return model.requires_grad_(True)
    options = adapter_options(arm.method, arm.rank, arm.blocks)
    if arm.total_rank is not None:
        options["rank"] = arm.total_rank
    if arm.variant == "scale sqrt(r)":
        options["alpha"] = options["rank"] ** 1.5
    if arm.order == "natural":
        options["order"] = "natural"
    ends = tuple(f".{target}" for target in arm.targets)
    layers = {name: layer for name, layer in model.named_modules() if f".{name}".endswith(ends)}
    torch.manual_seed(seed)
    orders = {}
    if arm.order == "random":  # drawn after all factors
        smoa.inject(copy.deepcopy(model), list(layers), **options | dict(order="natural"))
        for name, layer in layers.items():
            m, n = layer.weight.shape
            orders[name] = torch.randperm(m), torch.randperm(n)
        torch.manual_seed(seed)
    for name, layer in layers.items():
        own = dict(options)
        if name in orders:
            own["order"] = orders[name]
        if arm.variant == "anchor rms 1":
            own["alpha"] = own["rank"] / layer.weight.detach().square().mean().sqrt().item()
        smoa.inject(model, [name], **own)
    if arm.variant in ("permuted anchor", "noise anchor"):
        for _, layer in smoa.adapters(model):
            give_other_anchor(layer, arm.variant.split()[0])
    if arm.variant in ("A ones", "A around ones"):
        kept = 0 if arm.variant == "A ones" else 1
        for _, layer in smoa.adapters(model):
            for A_k in layer.A:
                A_k.data.mul_(kept).add_(1)
    return model


class Best:
    """The parameters at the best validation loss so far, of every `every` steps."""

    def __init__(self, model, validation, windows, every):
        self.model, self.validation, self.windows, self.every = model, validation, windows, every
        self.loss, self.step, self.state = math.inf, None, {}

    def look(self, step):
        if step % self.every:
            return
        loss = evaluate(self.model, self.validation, limit=self.windows)
        if loss < self.loss:
            self.loss, self.step = loss, step
            named = self.model.named_parameters()
            self.state = {name: p.detach().clone() for name, p in named if p.requires_grad}


def study_run(name, lr, seed, base, texts, preset="small"):
    """Train one arm once, with the preset's batch, and measure it.

    Rates and early stops are chosen on the validation part, never on the test plays. A run that
    diverges has infinite losses on record.
    """
    arm = study_arms()[name]
    text, validation = texts.folio[0][:-VALIDATION], texts.folio[0][-VALIDATION:]
    model = adapted(arm, base, seed)
    plan = PRESETS[preset]
    steps = arm.steps * plan["steps"] // STUDY_STEPS
    if arm.characters:
        best = Best(model, validation, windows=300, every=25)
    else:
        best = Best(model, validation, windows=STUDY_WINDOWS, every=steps)
    decay = 0.1 if arm.variant == "weight decay 0.1" else 0.0
    recipe = Recipe(steps, plan["batch_size"], lr, weight_decay=decay, seed=seed)
    begin = time.time()
    label = f"{name} {lr:g} {seed}"
    losses = []
    try:
        text = text[: arm.characters]
        for loss in with_bar(train_steps(model, text, recipe), label, steps):
            losses.append(loss)
            best.look(len(losses))
    except FloatingPointError as error:
        say(f"{label}: {error}")
        losses = [math.inf]
    seconds = time.time() - begin
    row = dict(arm=name, **vars(arm) | dict(steps=steps), lr=lr, seed=seed)
    row["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    row |= dict(ranks=math.nan, train=statistics.fmean(losses[-25:]), validation=best.loss)
    row |= dict(stopped=best.step, folio=math.inf, modern=math.inf)
    if best.state:
        model.load_state_dict(best.state, strict=False)
        row["ranks"] = mean_rank(model, base, arm.targets)
        row |= measure(model, texts)
    device = str(next(model.parameters()).device)
    return row | dict(seconds=round(seconds, 1), torch=torch.__version__, device=device)


@torch.no_grad()
def updates(model, base, targets=TARGETS):
    """{name: delta_W (m, n)} of the target layers, on the CPU; in float64 where it has factors."""
    deltas = {}
    for name, linear in base.named_modules():
        if any(f".{name}".endswith(f".{target}") for target in targets):
            layer = model.get_submodule(name)
            if isinstance(layer, smoa.SMoALinear):
                deltas[name] = copy.deepcopy(layer).cpu().double().delta_weight()
            else:
                deltas[name] = (layer.weight - linear.weight).cpu()
    return deltas


def mean_rank(model, base, targets=TARGETS):
    """Mean numerical rank of the weights' change over the target layers."""
    deltas = updates(model, base, targets).values()
    return sum(torch.linalg.matrix_rank(delta).item() for delta in deltas) / len(deltas)


def measure(model, texts):
    folio = evaluate(model, texts.folio[1], limit=STUDY_WINDOWS)
    return dict(folio=folio, modern=evaluate(model, texts.modern[1], limit=STUDY_WINDOWS // 2))


def describe(base, texts):
    """What a record says of its base: runs on different bases must not be compared."""
    weights = b"".join(p.detach().cpu().numpy().tobytes() for p in base.parameters())
    return dict(weights=hashlib.sha256(weights).hexdigest()[:12], **measure(base, texts))


def read_records(path):
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def study(path, names, base, texts, preset="small"):
    """Run what the record at `path` still lacks of these arms, a line a run."""
    origin = describe(base, texts)
    others = {record["base"]["weights"] for record in read_records(path)} - {origin["weights"]}
    if others:
        stop(
            f"the runs in {path} are of base {', '.join(sorted(others))}, this one is "
            f"{origin['weights']}: give another --record"
        )
    while True:
        records = read_records(path)
        todo = [(name, *pair) for name in names for pair in wanted(name, records)]
        if not todo:
            return
        say(f"{len(todo)} runs wanted at least, next: {todo[0]}")
        record = study_run(*todo[0], base, texts, preset) | dict(base=origin)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


# ---- What it says --------------------------------------------------------------------------------

# The first arm of each pair should have the lower loss.
CLAIMS = {
    "SMoA beats LoRA at equal parameters": [(f"smoa {r} K=4", f"lora {r}") for r in RANKS],
    "the spectral order beats the natural one": [
        (f"smoa {r} K=4", f"smoa {r} K=4 natural") for r in RANKS
    ],
    "the spectral order beats a random one": [
        (f"smoa {r} K=4", f"smoa {r} K=4 random") for r in RANKS
    ],
    "a higher rank helps, with the anchor (HiRA against LoRA)": [
        (f"hira {r}", f"lora {r}") for r in RANKS
    ],
    "a higher rank helps, without it (MELoRA against LoRA)": [
        (f"melora {r} K=4", f"lora {r}") for r in RANKS
    ],
    "SMoA beats LoRA on 20,000 characters": [
        ("smoa 1 low", "lora 1 low"),
        ("smoa 4 low", "lora 4 low"),
    ],
    "below LoRA's floor, SMoA on all layers beats LoRA on some": [
        ("smoa r=1 K=4", f"lora 1 on {target}") for target in ("attn.proj", "qkv", "fc", "mlp.proj")
    ],
    "longer training brings SMoA past LoRA": [("smoa 4 long", "lora 4 long")],
    "another number of blocks beats four": [
        (f"smoa {r} K={blocks}", f"smoa {r} K=4") for r in RANKS for blocks in (2, 8)
    ],
    "the anchor helps because it is W0 (anchors.jsonl)": [
        (f"hira {rank}", f"hira {rank} {kind}") for rank in (1, 4) for kind in ("permuted", "noise")
    ],
    "SMoA gains from what is not in the paper": [
        ("smoa 1 K=4 A ones", "smoa 1 K=4"),
        ("smoa 4 K=16", "smoa 4 K=4"),
        ("smoa 4 K=4 scale sqrt(r)", "smoa 4 K=4"),
        ("smoa 4 K=4 anchor rms 1", "smoa 4 K=4"),
        ("smoa 4 K=4 A around ones", "smoa 4 K=4"),
        ("smoa 4 K=4 weight decay 0.1", "smoa 4 K=4"),
    ],
}
# Student's t at 97.5 % for 1, 2, ... degrees of freedom
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(differences):
    """Mean and half width of the 95 % interval of paired differences; None for fewer than three."""
    if len(differences) < 3:
        return None
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return statistics.mean(differences), T_975[len(differences) - 2] * error


def best_so_far(name, records):
    """{seed: run} of an arm at seed 0's best validated rate."""
    mine = [record for record in records if record["arm"] == name]
    first = [record for record in mine if record["seed"] == 0]
    best = min(first, key=lambda record: record["validation"])["lr"]
    return {record["seed"]: record for record in mine if record["lr"] == best}


def at_best_rate(records):
    """{arm: {seed: run}} of the arms whose grid is complete, at seed 0's best validated rate."""
    chosen = {}
    for name in dict.fromkeys(record["arm"] for record in records):
        if any(seed == 0 for _, seed in wanted(name, records)):
            continue
        chosen[name] = best_so_far(name, records)
    return chosen


def share_of_gain(ours, theirs, chosen):
    """(share of theirs' gain over the base, half width of its interval); of `at_best_rate`."""
    a, b = chosen[ours], chosen[theirs]
    gain = b[0]["base"]["folio"] - statistics.fmean(run["folio"] for run in b.values())
    seeds = sorted(a.keys() & b.keys())
    difference, half = interval([a[seed]["folio"] - b[seed]["folio"] for seed in seeds])
    return 1 - difference / gain, half / gain


def verdicts(records):
    """(claim, ours, theirs, mean difference, half width of its interval, verdict) of each pair."""
    chosen = at_best_rate(records)
    for claim, pairs in CLAIMS.items():
        for ours, theirs in pairs:
            a, b = chosen.get(ours, {}), chosen.get(theirs, {})
            if not (a or b):
                continue  # of another record
            found = interval([a[seed]["folio"] - b[seed]["folio"] for seed in a.keys() & b.keys()])
            mean, half = found or (math.nan, math.nan)
            if found is None:
                verdict = "not enough runs on record"
            elif mean + half < 0:
                verdict = "holds here"
            elif mean - half > 0:
                verdict = "fails here"
            else:
                verdict = "cannot be told at this size"
            yield claim, ours, theirs, mean, half, verdict


def summarize(path):
    """Print the table of the record at `path`, and a verdict for each claim."""
    records = read_records(path)
    if not records:
        stop(f"there is no record at {path}")
    head = f"{'arm':28}{'trainable':>10}{'rank':>7}{'rate':>9}{'seeds':>6}"
    say(f"{head}  Folio loss ± error  modern")
    finished = at_best_rate(records)
    for name in dict.fromkeys(record["arm"] for record in records):
        runs = finished.get(name) or best_so_far(name, records)
        folio = [run["folio"] for run in runs.values()]
        modern = statistics.mean(run["modern"] for run in runs.values())
        error = f"{statistics.stdev(folio) / len(folio) ** 0.5:.4f}" if len(folio) > 1 else "?"
        rate = f"{runs[0]['lr']:.4g}" + ("" if name in finished else "?")
        size = f"{runs[0]['trainable']:10,}{runs[0]['ranks']:7.1f}{rate:>9}{len(folio):6}"
        loss = f"{statistics.mean(folio):.4f} ± {error}"
        say(f"{name:28}{size}  {loss:18}  {modern:.4f}")
    if finished.keys() < {record["arm"] for record in records}:
        say("A rate with a question mark is the best so far: its sweep is not finished.")
    last = None
    for claim, ours, theirs, mean, half, verdict in verdicts(records):
        if claim != last:
            say(f"\n{claim}?")
        numbers = "" if math.isnan(mean) else f"{mean:+.4f} ± {half:.4f}, "
        say(f"  {ours} - {theirs}: {numbers}{verdict}")
        last = claim


def share(text):
    """(1, 2) from "1/2": process 1 of 2."""
    i, slash, n = text.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise argparse.ArgumentTypeError(f"it wants I/N with 1 <= I <= N, got {text!r}")
    return int(i), int(n)


def parse(argv):
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.error = stop
    add = parser.add_argument
    add("--summary", action="store_true", help="print what the record says, and stop")
    add("--share", type=share, default=(1, 1), metavar="I/N", help="run as process I of N")
    add("--arms", nargs="+", default=list(study_arms()), metavar="ARM", help="default: all arms")
    add("--preset", choices=list(PRESETS), default="small", help="size of the model (small)")
    add("--record", type=Path, default=HERE / "study.jsonl", help="default: study.jsonl beside it")
    add("--out", type=Path, default=HERE.parent / "out", help="where the base is, or comes to be")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.arms) - study_arms().keys())
    if unknown:
        stop(f"the study has no arm {unknown[0]!r}; it has {', '.join(study_arms())}")
    return args


def main(argv=None):
    with errors_in_one_line():
        args = parse(argv)
        if args.summary:
            return summarize(args.record)
        plan = make_plan(["--out", str(args.out), "--preset", args.preset])
        texts = load_texts(plan)
        open_out(plan)
        i, n = args.share
        base = pretrain(plan, texts)[0]
        study(args.record, args.arms[i - 1 :: n], base, texts, args.preset)


if __name__ == "__main__":
    main()
