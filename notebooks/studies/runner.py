"""What all studies share: arms, rates and seeds, the record and what it says, and the command.

A study is a function from the runs on record to the runs still wanted, so that it can be stopped,
continued, and divided among processes. Its record holds one line per run.
"""

import argparse
import hashlib
import json
import math
import re
import statistics
import sys
import time
from pathlib import Path

from stats import holm, interval, p_value

ROOT = Path(__file__).resolve().parents[2]
RECORDS = Path(__file__).resolve().parent / "records"
sys.path.insert(0, str(ROOT))  # smoa.py, gpt_mini.py, train_shakespeare.py


def present_name(arm):
    """The name of an arm by its own r and K: "smoa r=4 K=2 natural".

    Older lines of the records name it by the rank of the LoRA with as many parameters, "smoa 2 K=2
    natural", and leave out K = 4.
    """
    former = re.match(r"(lora|hira|melora|smoa) (\d+)(?: K=(\d+))?", arm)
    if not former:
        return arm
    method, rank, K = former.groups()
    K = int(K or (4 if method in ("melora", "smoa") else 1))
    name = f"{method} r={int(rank) * K}" + (f" K={K}" if K > 1 else "")
    return name + arm[former.end() :]


def adapter_options(arm):
    """Options of `smoa.inject` for an arm, by its name."""
    method, r, K = re.match(r"(\w+)\+? r=(\d+)(?: K=(\d+))?", arm).groups()
    options = dict(rank=int(r), num_blocks=int(K or 1), modulate=method in ("hira", "smoa"))
    if method == "melora" or "natural" in arm.split():
        options["order"] = "natural"
    return options


def digest(tensors):
    """Twelve hex digits that name a base: runs on different bases must not be compared."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().numpy())
    return found.hexdigest()[:12]


class Study:
    """The arms of a study and its record.

    A task adds `first_rates(arm)`, the rates to try first; `prepare(args)`, which loads what the
    runs need; and `run(arm, rate, seed)`, which trains once and returns the line of the record.

    Args:
        path: the record, a line of JSON per run; None is the task's own.
    """

    PATH = None
    ARMS = ()  # names, in the order in which they are run
    CLAIMS = {}  # {claim: [(ours, theirs)]}: the first arm of each pair should have the lower loss
    RATE = "lr"  # the key by which a line tells its learning rate
    SEEDS = 5

    def __init__(self, path=None):
        self.path = Path(path or self.PATH)
        self.lines = self.read()

    def read(self):
        """The lines of the record, each under its arm's present name."""
        if not self.path.exists():
            return []
        lines = map(json.loads, self.path.read_text(encoding="utf-8").splitlines())
        return [line | dict(arm=present_name(line["arm"])) for line in lines]

    # ---- What a task may change ------------------------------------------------------------------

    def next_rate(self, rate, up):
        """The rate beyond the last one tried, upwards or downwards."""
        return rate * 2 if up else rate / 2

    def seeds(self, arm):
        """How many seeds an arm is to have at its best rate."""
        return self.SEEDS

    def learned(self, arm):
        """The text that an arm learns, and is judged on."""
        return "folio"

    def base_losses(self, text):
        """Losses of the base on the windows of a text; empty if they are not on record."""
        return next((self.windows(line["base"], text) for line in self.lines), [])

    @staticmethod
    def add_arguments(parser):
        """Further arguments of the command."""

    # ---- What is still to be run -----------------------------------------------------------------

    def wanted(self, arm):
        """The (rate, seed) pairs that an arm lacks.

        First a few rates with seed 0, more while the best is at an edge, then seeds at the best.
        """
        mine = {(line[self.RATE], line["seed"]) for line in self.lines if line["arm"] == arm}
        missing = [(rate, 0) for rate in self.first_rates(arm) if (rate, 0) not in mine]
        if missing:
            return missing
        rates = sorted(rate for rate, seed in mine if seed == 0)
        best = self.best_rate(arm)
        if best in (rates[0], rates[-1]):
            return [(self.next_rate(best, up=best == rates[-1]), 0)]
        return [(best, seed) for seed in range(1, self.seeds(arm)) if (best, seed) not in mine]

    def settled(self, arm):
        """Whether the best rate lies inside the rates that were tried."""
        return all(seed > 0 for _, seed in self.wanted(arm))

    def missing(self):
        """{arm: runs that it lacks at least}, of the arms that lack any."""
        counts = {arm: len(self.wanted(arm)) for arm in self.ARMS}
        return {arm: count for arm, count in counts.items() if count}

    def next_run(self, arms):
        """(arm, rate, seed), or None: the rates of every arm come first, then the seeds."""
        todo = [(arm, *pair) for arm in arms for pair in self.wanted(arm)]
        return min(todo, key=lambda run: run[2], default=None)

    def run_missing(self, arms):
        """Run what the record lacks of these arms, one line per run."""
        while todo := self.next_run(arms):
            print(time.strftime("%H:%M:%S"), *todo, flush=True)
            self.append(self.run(*todo))
            self.lines = self.read()

    def append(self, line):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def check_base(self, weights):
        """Stop where the record is of another base."""
        bases = [line["base"] for line in self.lines]
        known = {base["weights"] if isinstance(base, dict) else base for base in bases}
        if known - {weights}:
            others = ", ".join(sorted(known - {weights}))
            sys.exit(f"{self.path} is of base {others}, this one is {weights}: another --record?")

    # ---- What the record says --------------------------------------------------------------------

    def windows(self, line, text):
        """The losses of a line on the windows of a text; a record of means has one."""
        return line[text] if isinstance(line[text], list) else [line[text]]

    def loss(self, line, text=None):
        """Mean loss of a run on a text, by default on that which it learns; inf if it diverged."""
        losses = self.windows(line, text or self.learned(line["arm"]))
        return statistics.fmean(losses) if losses else math.inf

    def mean_loss(self, arm, text=None):
        """Mean over the seeds of an arm at its best rate."""
        return statistics.fmean(self.loss(line, text) for line in self.runs(arm).values())

    def by_rate(self, arm):
        """{rate: {seed: line}} of an arm."""
        found = {}
        for line in self.lines:
            if line["arm"] == arm:
                found.setdefault(line[self.RATE], {})[line["seed"]] = line
        return found

    def best_rate(self, arm):
        """The rate that has the lowest validation loss with seed 0; None without a run."""
        tried = {rate: runs[0] for rate, runs in self.by_rate(arm).items() if 0 in runs}
        return min(tried, key=lambda rate: self.loss(tried[rate], "validation"), default=None)

    def luckiest_rate(self, arm):
        """The rate that is best on the held-out text itself, over three or more common seeds.

        Nobody may choose so. It tells what a comparison owes to how the rates were chosen.
        """
        found = self.by_rate(arm)
        tuned = found.get(best := self.best_rate(arm), {})
        leads = {best: 0.0}
        for rate, runs in found.items():
            seeds = runs.keys() & tuned.keys()
            if len(seeds) >= 3:
                leads[rate] = sum(self.loss(runs[s]) - self.loss(tuned[s]) for s in seeds)
                leads[rate] /= len(seeds)
        return min(leads, key=leads.get)

    def runs(self, arm, lucky=False):
        """{seed: line} of an arm at its best rate (its luckiest); empty without a run."""
        rate = self.luckiest_rate(arm) if lucky else self.best_rate(arm)
        return self.by_rate(arm).get(rate, {})

    def paired(self, ours, theirs, text=None, lucky=False):
        """The differences of two arms, a list of windows for each seed that both have."""
        text = text or self.learned(ours)
        a, b = self.runs(ours, lucky), self.runs(theirs, lucky)
        pairs = [(self.windows(a[s], text), self.windows(b[s], text)) for s in sorted(a) if s in b]
        return [[x - y for x, y in zip(*pair)] for pair in pairs]

    def compare(self, ours, theirs, text=None, lucky=False):
        """(mean difference, half width of its 95 % interval, seeds) of two arms, or None.

        None where less than two common runs, or two windows of one, are on record.
        """
        differences = self.paired(ours, theirs, text, lucky)
        if sum(map(len, differences)) < 2:
            return None
        return (*interval(differences), len(differences))

    def p_values(self):
        """{(ours, theirs): p} of all comparisons on record."""
        pairs = [pair for pairs in self.CLAIMS.values() for pair in pairs]
        found = {pair: self.paired(*pair) for pair in pairs if self.compare(*pair)}
        return {pair: p_value(differences) for pair, differences in found.items()}

    def gain(self, arm):
        """What an arm takes off the base's loss on the text that it learns, mean of its seeds."""
        return statistics.fmean(self.base_losses(self.learned(arm))) - self.mean_loss(arm)

    def share_of_gain(self, ours, theirs):
        """(share of theirs' gain, half width of its 95 % interval) over common seeds, or None."""
        found = self.compare(ours, theirs)
        if found is None:
            return None
        difference, half, _ = found
        whole = self.gain(theirs)
        return 1 - difference / whole, half / whole

    def verdict(self, ours, theirs):
        """What the record says of "ours has the lower loss", and what it lacks to be believed."""
        found = self.compare(ours, theirs)
        if found is None:
            return "not on record yet"
        difference, half, seeds = found
        said = "no significant difference"
        if abs(difference) > half:
            said = "holds" if difference < 0 else "fails"
        lacks = [] if seeds >= 3 else [f"{seeds} of 3 seeds"]
        lacks += [f"rates of {arm} open" for arm in (ours, theirs) if not self.settled(arm)]
        said += f" ({', '.join(lacks)})" if lacks else ""
        said = f"{difference:+.4f} +- {half:.4f}, {said}"
        lucky = [arm for arm in (ours, theirs) if self.luckiest_rate(arm) != self.best_rate(arm)]
        if lucky:
            difference, half, _ = self.compare(ours, theirs, lucky=True)
            said += f"; {difference:+.4f} +- {half:.4f}"
            said += f" with {' and '.join(lucky)} at its luckiest rate"
        return said

    def summary(self):
        """Print the table of the record, a verdict for each claim, and what is missing."""
        self.print_table()
        for claim, pairs in self.CLAIMS.items():
            pairs = [pair for pair in pairs if self.runs(pair[0]) or self.runs(pair[1])]
            if pairs:
                print(f"\n{claim}?")
            for ours, theirs in pairs:
                print(f"  {ours} - {theirs}: {self.verdict(ours, theirs)}")
        print("\n(The luckiest rate is the best on the held-out text itself.)")
        corrected = holm(self.p_values())
        print(f"\nHolm's p over all {len(corrected)} comparisons, where it is below 0.1:")
        for (ours, theirs), p in corrected.items():
            if p < 0.1:
                print(f"  {ours} - {theirs}: {p:.3f}")

    def print_table(self):
        """A line for each arm: the loss on the text that it learns, with its error over seeds.

        A rate with a question mark is the best so far, at an edge of the rates that were tried.
        """
        print(f"{'arm':35}{'trainable':>12}{'rank':>7}{'rate':>11}{'seeds':>6}", end="")
        print("  loss ± error     modern")
        for arm in [arm for arm in self.ARMS if self.runs(arm)]:
            runs = list(self.runs(arm).values())
            losses = [self.loss(line) for line in runs]
            error = statistics.stdev(losses) / len(runs) ** 0.5 if len(runs) > 1 else math.nan
            rank = f"{runs[0]['ranks']:.1f}" if "ranks" in runs[0] else "-"
            rate = f"{runs[0]['lr']:.4g}" + ("" if self.settled(arm) else "?")
            first = f"{arm:35}{runs[0]['trainable']:12,}{rank:>7}{rate:>11}{len(runs):6}"
            print(f"{first}  {statistics.fmean(losses):.4f} ± {error:.4f}", end="")
            print(f"  {self.mean_loss(arm, 'modern'):.4f}")


def share(text):
    """(1, 2) from "1/2": process 1 of 2."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"it wants I/N with 1 <= I <= N, got {text!r}")
    return int(found[1]), int(found[2])


def command(task, description, argv=None):
    """Print what the record says (--summary), or run what it lacks."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=style)
    add = parser.add_argument
    add("--summary", action="store_true", help="print what is on record, and stop")
    add("--share", type=share, default=(1, 1), metavar="I/N", help="run as process I of N")
    add("--arms", nargs="+", default=list(task.ARMS), metavar="ARM", help="only these")
    add("--record", type=Path, default=task.PATH, help="the file of the runs (%(default)s)")
    task.add_arguments(parser)
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.arms) - set(task.ARMS)):
        parser.error(f"no arm {unknown[0]!r}; there are {', '.join(task.ARMS)}")
    if args.summary and not args.record.exists():
        parser.error(f"no record at {args.record}")
    study = task(args.record)
    if args.summary:
        return study.summary()
    study.prepare(args)
    i, n = args.share
    study.run_missing(args.arms[i - 1 :: n])
