"""Teach a tiny GPT modern-spelling Shakespeare, then the First Folio's spelling, by SMoA and LoRA.

    python train_shakespeare.py                                 # everything: minutes on a laptop
    python train_shakespeare.py --quick                         # a first look, into out/quick
    python train_shakespeare.py --methods smoa lora hira melora full
    python train_shakespeare.py --rank 1 --blocks 2 --lr smoa=0.2
    python train_shakespeare.py --data mine.txt --adapt-data other.txt
    torchrun --nproc_per_node=2 train_shakespeare.py            # the same batches, shared out

The base sees the modern plays only. Each method then adapts its own copy of it to the Folio
("haue", "vpon", "loue") and is judged on plays that nobody has seen in either spelling: Hamlet,
Macbeth and The Tempest. The base, the adapters and results.json land in out/; a run that was
stopped goes on. From top to bottom here: training -> the base -> a method -> the command. The
flags are in plan.py, the texts in texts.py.
"""

import contextlib
import copy
import gc
import hashlib
import io
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import smoa
from gpt_mini import GPT, GPTConfig
from plan import Recipe, UsageError, make_plan, process
from texts import Vocabulary as Vocabulary
from texts import corpus as corpus
from texts import load_texts

TARGETS = ["qkv", "proj", "fc"]  # all linear layers but the head, which is tied to the embedding
TEST_WINDOWS = 2000  # of the held-out text, evenly spread: a third of the plays, for seconds
SAMPLE_LENGTH = 300  # characters


class Diverged(Exception):
    """A training whose numbers are no longer finite, or a base that is worse than guessing."""


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
    keep = torch.linspace(0, count - 1, min(count, limit or count)).long()
    idx = tokens[: count * T].view(count, T)[keep]
    targets = tokens[1 : count * T + 1].view(count, T)[keep]
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
    rising = (step + 1) / warmup
    progress = max(0, step - warmup) / max(1, steps - warmup)
    falling = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * min(rising, falling)


def make_optimizer(model, recipe):
    """AdamW on what requires a gradient; vectors (norms, shifts) do not decay."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        dict(params=[p for p in params if p.ndim >= 2], weight_decay=recipe.weight_decay),
        dict(params=[p for p in params if p.ndim < 2], weight_decay=0.0),
    ]
    fused = params[0].device.type != "mps"
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=fused)


def train(model, tokens, *, label, every=None, on_evaluation=None, state=None, **recipe):
    """Train what requires a gradient, from step 0 or from the optimizer and the step in `state`.

    All randomness of a step comes from the seed and the step's number, so that a run can go on
    where another was killed. Under torchrun every process takes its share of each batch, and
    gradients and losses are averaged.

    Args:
        on_evaluation: called with (step, optimizer) every `every` steps, and at the last.
        recipe: the fields of Recipe.
    Returns:
        the loss of each step, and the median seconds a step.
    Raises:
        Diverged: a loss is not finite.
    """
    recipe = Recipe(**recipe)
    device = next(model.parameters()).device
    rank, world = process()
    optimizer = make_optimizer(model, recipe)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
    first = 0 if state is None else state["step"]
    net = torch.compile(model) if recipe.compile else model
    if world > 1:
        net = DistributedDataParallel(net, [device] if device.type == "cuda" else None)
    model.train()
    losses, seconds = [], []
    hide = True if rank > 0 else None  # None shows the bar on a terminal only
    with tqdm(total=recipe.steps, initial=first, desc=label, unit="step", disable=hide) as bar:
        for step in range(first, recipe.steps):
            begin = time.perf_counter()
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
            seconds.append(time.perf_counter() - begin)
            if not math.isfinite(losses[-1]):
                raise Diverged(f"the loss is {losses[-1]} at step {step + 1}")
            bar.update()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
            due = step + 1 == recipe.steps or (every and (step + 1) % every == 0)
            if due and on_evaluation is not None:
                on_evaluation(step + 1, optimizer)
    return losses, statistics.median(seconds)


# ---- The base ------------------------------------------------------------------------------------


def write(path, content):
    """What torch.save makes of the content, in one file, whole or not at all; by one process."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    if process()[0] == 0:
        smoa.write_whole(path, buffer.getvalue())


def check_base(loss, vocab_size):
    """Raise Diverged for a loss that is no number, or twice that of guessing."""
    if not loss <= 2 * math.log(vocab_size):
        raise Diverged(f"the loss on the held-out text is {loss:.3g}")


def read_base(path, settings=None):
    """(model, checkpoint) at path; refused unless it is whole, sound, and of the settings given."""
    remedy = "move it away to train a new base"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        theirs, loss = state["settings"], state["curve"][-1][1]
        model = GPT(GPTConfig(**theirs["model"]))
        model.load_state_dict(state["model"])
        recipe = Recipe(theirs["steps"], theirs["batch_size"], theirs["lr"], 0.1, theirs["seed"])
        make_optimizer(model, recipe).load_state_dict(state["optimizer"])
        whole = 0 < state["step"] <= recipe.steps
    except Exception:
        whole = False
    if not whole:
        raise UsageError(f"{path} is no whole checkpoint; {remedy}")
    if settings is not None and theirs != settings:
        differing = ", ".join(key for key in sorted(settings) if settings[key] != theirs.get(key))
        raise UsageError(f"{path} was trained with another {differing}; {remedy}")
    check_base(loss, model.config.vocab_size)
    return model, state


def base_settings(plan, texts):
    """All that decides what the base becomes; its file is named by their hash."""
    recipe, characters = plan.pretraining, texts.vocabulary.characters
    content = characters.encode() + texts.modern[0].numpy().tobytes()
    return dict(
        model=asdict(GPTConfig(vocab_size=len(characters), **plan.model)),
        text=hashlib.sha256(content).hexdigest(),
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        seed=recipe.seed,
    )


def pretrain(plan, texts):
    """The base and its curve, [(step, loss)]: an earlier run's, finished or not, or a new one."""
    recipe, vocabulary = plan.pretraining, texts.vocabulary
    tokens, held_out = texts.modern
    settings = base_settings(plan, texts)
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    path = plan.out / f"base-{name}.pt"
    torch.manual_seed(recipe.seed)
    model = GPT(GPTConfig(**settings["model"])).to(plan.device)
    curve, state = [], None

    def checkpoint(step, optimizer):
        loss = evaluate(model, held_out, limit=500)
        check_base(loss, model.config.vocab_size)
        say(f"  step {step}: {loss:.4f} on a part of the held-out text")
        curve.append((step, loss))
        whole = dict(settings=settings, characters=vocabulary.characters, step=step, curve=curve)
        write(path, whole | dict(model=model.state_dict(), optimizer=optimizer.state_dict()))

    look = dict(every=plan.eval_every, on_evaluation=checkpoint)
    try:
        if path.exists():
            saved, state = read_base(path, settings)
            model.load_state_dict(saved.state_dict())
            curve += state["curve"]
            if state["step"] == recipe.steps:
                say(f"base: {path}, finished before")
                return model, curve
            say(f"base: {path}, going on from step {state['step']}")
        train(model, tokens, label="pretrain", state=state, **look, **asdict(recipe))
    except Diverged as error:
        remedy = f"with --pretrain-lr {recipe.lr:g}; give a smaller one"
        raise UsageError(f"the base diverged ({error}) {remedy}") from None
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
    return statistics.fmean(torch.linalg.matrix_rank(delta).item() for delta in deltas)


def sample(model, vocabulary, prompt, seed, length=None):
    """The prompt, and what the model writes after it."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    idx = vocabulary.encode(prompt, "--prompt")[None].to(device)
    length = SAMPLE_LENGTH if length is None else length
    idx = model.generate(idx, length, temperature=0.8, top_k=20, generator=generator)
    return vocabulary.decode(idx[0].tolist())


def measure(model, texts):
    """Losses on the held-out plays, in both spellings."""
    folio = evaluate(model, texts.folio[1], limit=TEST_WINDOWS)
    modern = evaluate(model, texts.modern[1], limit=TEST_WINDOWS)
    if not math.isfinite(folio + modern):
        raise Diverged(f"the losses on the held-out texts are {folio} and {modern}")
    return dict(folio=folio, modern=modern)


def adapt(plan, texts, base, method):
    """A copy of the base, adapted, and what its training and its update were like."""
    torch.manual_seed(plan.seed)
    model = prepare(base, method, plan.rank, plan.blocks)
    recipe = plan.adaptations[method]
    losses, seconds = train(model, texts.folio[0], label=method, **asdict(recipe))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rank = mean_rank(model, base)
    return model, dict(trainable=trainable, rank=rank, ms=1000 * seconds, losses=losses)


def run_method(plan, texts, base, method):
    """Adapt, measure, save. (row of the results, what the model then writes or None)."""
    row = dict(method=method, lr=plan.adaptations[method].lr)
    try:
        model, training = adapt(plan, texts, base, method)
        row |= training | measure(model, texts)
    except (Diverged, torch.linalg.LinAlgError) as error:
        return row | dict(diverged=str(error)), None
    path = plan.out / f"{method}.pt"
    if method == "full":
        write(path, model.state_dict())
    elif process()[0] == 0:
        smoa.save(model, path)
    smoa.merge(model)  # samples at the base's own speed
    return row, sample(model, texts.vocabulary, texts.prompt, plan.seed)


# ---- The command ---------------------------------------------------------------------------------


def say(text):
    """Print above any progress bar, in one process. A reader that leaves (`| head`) ends no run."""
    if process()[0] > 0 or sys.stdout is None:
        return
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def open_out(plan):
    """Make the folder of all results, and refuse now what could not be written later."""
    plan.out.mkdir(parents=True, exist_ok=True)
    for name in ("results.json", *(f"{method}.pt" for method in plan.adaptations)):
        if (plan.out / name).is_dir():
            raise UsageError(f"{plan.out / name} is a folder, where a file is to be written")
    tempfile.TemporaryFile(dir=plan.out).close()


def report(results):
    """The table of results. A method that diverged has its reason in place of its losses."""
    head = f"{'method':8}{'rate':>8}{'trainable':>11}{'rank of dW':>12}"
    lines = [f"{head}{'Folio loss':>17}{'modern loss':>17}"]
    for row in results["methods"]:
        line = f"{row['method']:8}{row['lr']:>8g}"
        if "diverged" in row:
            lines.append(f"{line}  diverged: {row['diverged']}")
            continue
        line += f"{row['trainable']:>11,}{row['rank']:>12.1f}"
        for text in ("folio", "modern"):
            change = f"{results['base'][text]:.3f} -> {row[text]:.3f}"
            line += f"{change:>17}"
        lines.append(line)
    return "\n".join(lines)


def run(plan):
    """Plan -> texts -> the base -> for each method adapt, measure, save -> report."""
    begin = time.time()
    texts = load_texts(plan)
    open_out(plan)
    say(f"seed {plan.seed}, device {plan.device}, torch {torch.__version__}, {plan.model}")
    base, curve = pretrain(plan, texts)
    before = measure(base, texts)
    total = sum(p.numel() for p in base.parameters())
    losses = f"loss {before['modern']:.3f} modern, {before['folio']:.3f} on the Folio"
    say(f"base: {total:,} parameters, {losses}, held-out plays, nats a character")
    samples = {"base": sample(base, texts.vocabulary, texts.prompt, plan.seed)}
    results = dict(plan=asdict(plan), torch=torch.__version__, pretraining=curve, base=before)
    results |= dict(methods=[], samples=samples)
    for method in plan.adaptations:
        row, text = run_method(plan, texts, base, method)
        results["methods"].append(row)
        samples |= {} if text is None else {method: text}
        if process()[0] == 0:
            content = json.dumps(results, indent=2, default=str)
            smoa.write_whole(plan.out / "results.json", content.encode())
    for name, text in samples.items():
        say(f"\n--- {name} ---\n{text}")
    say(f"\n{report(results)}\n")
    say("Losses in nats a character on held-out text, before -> after.")
    say(f"{time.time() - begin:.0f} s in all; everything is in {plan.out}")


def one_line(error):
    """The error for the person at the keyboard; None where it is a fault of the program."""
    if isinstance(error, UsageError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    memory = re.search("out of memory|allocate memory|not enough memory", str(error))
    if memory or isinstance(error, MemoryError):
        return "out of memory: give a smaller --batch-size, or another --preset or --device"
    return None


@contextlib.contextmanager
def errors_in_one_line():
    """What the person at the keyboard can put right ends the command in one line, exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):  # what a terminal cannot show, it shows as its code
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        if process()[0] == 0:
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


def main(argv=None):
    try:
        with errors_in_one_line():
            if int(os.environ.get("WORLD_SIZE", 1)) > 1:
                cuda = torch.cuda.is_available()
                dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
            run(make_plan(argv, __doc__))
    finally:
        if dist.is_initialized():
            gc.collect()  # a DistributedDataParallel that outlives its group can abort the exit
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
