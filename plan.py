"""What may be asked of train_shakespeare.py: presets, rates, flags, and every refusal of them."""

import argparse
import math
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist

# fmt: off
PRESETS = {
    # 0.8 million parameters: minutes on two cores.
    "small": dict(
        model=dict(block_size=64, n_layer=4, n_head=4, n_embd=128),
        batch_size=12, pretrain_steps=4000, pretrain_lr=6e-3, steps=250,
    ),
    # 10.7 million, meant for a GPU, on which it has not been run yet.
    "large": dict(
        model=dict(block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.1),
        batch_size=64, pretrain_steps=2500, pretrain_lr=3e-3, steps=400,
    ),
}
# fmt: on
QUICK = dict(pretrain_steps=1000, steps=100, out=Path("out/quick"))

# Each the best of its own method's sweep in notebooks/study.jsonl (small preset, rank 4, 4 blocks).
# The multiplicative methods step in units of |W0| and want several times the rate of the additive
# ones: one shared rate would decide the contest.
LEARNING_RATES = {"smoa": 0.1, "hira": 0.1, "lora": 0.03, "melora": 0.03, "full": 0.004}
PROMPT = "My lord, I have "


class UsageError(Exception):
    """Something that the person at the keyboard can put right: one line, exit code 2."""


@dataclass(frozen=True)
class Recipe:
    """How one model is trained."""

    steps: int
    batch_size: int  # windows of block_size characters, over all processes together
    lr: float  # at its peak
    weight_decay: float
    seed: int
    compile: bool = False


@dataclass(frozen=True)
class Plan:
    """All that a run depends on."""

    model: dict  # options of GPTConfig, all but the size of the vocabulary
    pretraining: Recipe
    adaptations: dict  # {method: Recipe}
    rank: int  # LoRA's; the other methods train equally many parameters
    blocks: int  # of smoa and melora
    eval_every: int
    seed: int
    device: torch.device
    out: Path
    data: str | None  # a file in place of the modern plays
    adapt_data: str | None  # a file in place of the Folio
    prompt: str


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(message)


def whole(low, high=2**31 - 1):
    """What reads a whole number from low to high, for argparse."""

    def whole_number(text):
        number = int(text)
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"it must be {low} to {high}, got {text}")
        return number

    return whole_number


def rate(text):
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"a rate must be positive and finite, got {text}")
    return number


def method_rate(text):
    """("smoa", 0.1) from "smoa=0.1"."""
    method, _, number = text.partition("=")
    if method not in LEARNING_RATES or not number:
        methods = ", ".join(LEARNING_RATES)
        raise argparse.ArgumentTypeError(f"it wants METHOD=RATE, for {methods}, got {text!r}")
    return method, rate(number)


def parse(argv, description):
    swept = ", ".join(f"{method} {lr:g}" for method, lr in LEARNING_RATES.items())
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=description, formatter_class=style)
    add = parser.add_argument
    # fmt: off
    add("--quick", action="store_true",
        help="a first look: 1000 steps for the base and 100 a method, if not given; in out/quick")
    add("--methods", nargs="+", default=["smoa", "lora"], choices=list(LEARNING_RATES),
        help="what adapts the base (default: smoa lora)")
    add("--rank", type=whole(1), default=4,
        help="LoRA's rank; the others train equally many parameters (default: 4)")
    add("--blocks", type=whole(1), default=4, help="blocks K of smoa and melora (default: 4)")
    add("--lr", type=method_rate, nargs="+", default=[], metavar="METHOD=RATE",
        help=f"peak learning rates (default, each method's own best: {swept})")
    add("--preset", choices=list(PRESETS), default="small", help="model size (default: small)")
    add("--pretrain-lr", type=rate, help="peak rate of the base (default: the preset's)")
    add("--pretrain-steps", type=whole(1), help="steps of the base (default: the preset's)")
    add("--steps", type=whole(1), help="steps of each method (default: the preset's)")
    add("--batch-size", type=whole(1), help="windows in a batch (default: the preset's)")
    add("--eval-every", type=whole(1), default=500,
        help="steps between the base's checkpoints (default: 500)")
    add("--seed", type=whole(0, 2**32 - 1), default=0,
        help="of the base, the factors, the batches and the samples (default: 0)")
    add("--device", help="cuda, mps or cpu (default: the first of them that works)")
    add("--compile", action="store_true", help="run the model through torch.compile")
    add("--data", metavar="FILE",
        help="pretrain on this UTF-8 text, its last tenth held out (default: the modern plays)")
    add("--adapt-data", metavar="FILE",
        help="adapt to this UTF-8 text, its last tenth held out (default: the First Folio)")
    add("--prompt", default=PROMPT, help=f"what the samples continue (default: {PROMPT!r})")
    add("--out", type=Path, help="folder of all that is written (default: out)")
    # fmt: on
    return parser.parse_args(argv)


def make_plan(argv=None, description=None):
    """The plan for a command line. What cannot work is refused here, before any work.

    Raises:
        UsageError: a flag, or a device that cannot compute.
    """
    args = parse(argv, description)
    given = {name: value for name, value in vars(args).items() if value is not None}
    wish = dict(out=Path("out"), data=None, adapt_data=None) | PRESETS[args.preset]
    wish |= (QUICK if args.quick else {}) | given
    width, world = wish["model"]["n_embd"], process()[1]
    for name in ("rank", "blocks"):
        if wish[name] > width:
            raise UsageError(f"--{name} must be at most {width}, the model's width")
    if wish["batch_size"] % world:
        raise UsageError(f"{world} processes cannot share a --batch-size of {wish['batch_size']}")
    if not args.prompt:
        raise UsageError("--prompt must hold a character at least")

    pretraining = Recipe(
        steps=wish["pretrain_steps"],
        batch_size=wish["batch_size"],
        lr=wish["pretrain_lr"],
        weight_decay=0.1,
        seed=args.seed,
        compile=args.compile,
    )
    rates = LEARNING_RATES | dict(args.lr)
    adapting = replace(pretraining, steps=wish["steps"], weight_decay=0.0)
    wish["pretraining"] = pretraining
    wish["adaptations"] = {method: replace(adapting, lr=rates[method]) for method in args.methods}
    wish["device"] = choose_device(args.device)
    return Plan(**{field.name: wish[field.name] for field in fields(Plan)})


def process():
    """(rank, world): which process this is, and of how many. (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def choose_device(name):
    """The named device, or the first of cuda, mps and cpu that can add two numbers."""
    here = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    names = [name for name, there in here.items() if there] if name is None else [name]
    for name in names:
        if name.startswith("cuda") and dist.is_initialized():
            if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
                raise UsageError("torchrun started more processes than there are CUDA devices")
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        try:
            device = torch.device(name)
            torch.ones(2, device=device).sum().item()  # a meta tensor, say, has no values to show
            return device
        except (RuntimeError, AssertionError, ImportError) as error:
            reason = str(error).splitlines()[0][:100]
    raise UsageError(f"--device {name} is not to be had here: {reason}")
