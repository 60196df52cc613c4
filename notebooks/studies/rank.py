"""Is it the rank? SmolLM2 with anchors of rank p, and LoRA at its strongest.

    python notebooks/studies/rank.py --summary       # the dose-response, verdicts, what is missing
    python notebooks/studies/rank.py                 # run what the record lacks (hours on a CPU)

Model, texts, steps and rates are those of smollm.py, and so is the record. The dose is the rank p
of a random matrix in the place of W0: SMoA of r = 8, K = 2 in natural order then has an update of
rank 8 p, up to the layer's own, from the same parameters on the same entries.
"""

import statistics

from runner import command
from smollm import SmolLM
from stats import holm, p_value

# Written before the first run, what each outcome would mean:
# - The lead over "melora r=8 K=2" (p = 0: no anchor) grows with p: the rank is what helps.
# - It is all there at p = 1, where delta_W = diag(u) blockdiag(B_k A_k) diag(v) has MELoRA's rank:
#   it is the random rescaling of rows and columns, not the rank.
# - No p leads: with this support and this order the anchor does not help.
# - LoRA+ (2402.12354, a higher rate for B than for A) is level with SMoA: LoRA's baseline was weak.
DOSES = (1, 2, 8, 64, "full")

MIDDLES = {f"smoa r=8 K=2 natural p={p}": 2 if p == 1 else 3 for p in DOSES}
MIDDLES |= {"melora r=8 K=2": 0, "smoa r=8 K=2 natural": 3, "smoa r=8 K=2": 3, "smoa r=2 K=2": 5}
for r, middle in ((4, -1), (1, 1)):
    MIDDLES[f"lora r={r}"] = middle
    MIDDLES |= {f"lora+ r={r} ratio {ratio}": middle - ratio // 4 for ratio in (4, 16)}
TEXTS = {"folio": "", "japanese": " japanese"}


def dose_arms(text):
    """({p: arm}, {rival: arm}) on a text: anchors by their rank, and what else has the budget."""
    end = TEXTS[text]
    doses = {0: f"melora r=8 K=2{end}"}
    doses |= {p: f"smoa r=8 K=2 natural p={p}{end}" for p in DOSES}
    rivals = ("lora r=4", "lora+ r=4 ratio 4", "lora+ r=4 ratio 16", "smoa r=8 K=2")
    return doses | {"W0": f"smoa r=8 K=2 natural{end}"}, {name: name + end for name in rivals}


def claims():
    found = {"an anchor of rank p beats none": [], "a higher rank beats rank 1": []}
    found |= {"SMoA beats LoRA": [], "SMoA beats LoRA+": [], "LoRA+ beats LoRA": []}
    for text, end in TEXTS.items():
        doses, _ = dose_arms(text)
        none, *others = doses.values()
        found["an anchor of rank p beats none"] += [(arm, none) for arm in others]
        found["a higher rank beats rank 1"].append((doses["full"], doses[1]))
        for ours, r in (("smoa r=2 K=2", 1), ("smoa r=8 K=2", 4), ("smoa r=8 K=2 natural", 4)):
            found["SMoA beats LoRA"].append((ours + end, f"lora r={r}{end}"))
            for ratio in (4, 16):
                pair = ours + end, f"lora+ r={r} ratio {ratio}{end}"
                found["SMoA beats LoRA+"].append(pair)
        for r in (1, 4):
            plus = [f"lora+ r={r} ratio {ratio}{end}" for ratio in (4, 16)]
            found["LoRA+ beats LoRA"] += [(arm, f"lora r={r}{end}") for arm in plus]
    return found


class Rank(SmolLM):
    ARMS = {arm + end: (middle, 5) for end in TEXTS.values() for arm, middle in MIDDLES.items()}
    CLAIMS = claims()

    def summary(self):
        super().summary()
        for text in TEXTS:
            self.print_dose_response(text)

    def dose_response(self, text):
        """A row for each anchor and each rival on record, over the seeds that p = 0 has too.

        Returns:
            {p or rival: dict}: arm, seeds, loss; train, the mean loss of the last ten steps;
            validation, the loss of seed 0 by which the rate was chosen; rank, stable_rank and size
            of the updates (None where runs have not recorded them); the difference to p = 0 and
            half of its 95 % interval (None where it is missing); of the anchors p, after Holm's
            correction for the anchors of this text.
        """
        doses, rivals = dose_arms(text)
        rows, p_values = {}, {}
        for name, arm in (doses | rivals).items():
            runs = self.runs(arm)
            if not runs:
                continue
            common = runs.keys() & self.runs(doses[0]).keys() or runs.keys()
            runs = [runs[seed] for seed in common]
            row = dict(arm=arm, seeds=len(runs), loss=statistics.fmean(map(self.loss, runs)))
            row["train"] = statistics.fmean(loss for line in runs for loss in line["train"][-10:])
            row["validation"] = self.loss(self.runs(arm)[0], "validation")
            for key in ("rank", "stable_rank", "size"):
                found = [line["update"][key] for line in runs if "update" in line]
                row[key] = statistics.fmean(found) if found else None
            row["difference"], row["half"], _ = self.compare(arm, doses[0]) or (None, None, 0)
            if name in doses and name != 0 and row["half"] is not None:
                p_values[name] = p_value(self.paired(arm, doses[0]))
            rows[name] = row
        for name, p in holm(p_values).items():
            rows[name]["p"] = p
        return rows

    def dose_verdict(self, text):
        """What the outcome means, by the rule above DOSES; "grows" is p = full against p = 1."""
        doses, _ = dose_arms(text)
        lacking = [
            p for p, arm in doses.items() if not self.settled(arm) or len(self.runs(arm)) < 3
        ]
        if lacking:
            return f"not on record yet: runs of p = {', '.join(map(str, lacking))} are missing"
        rows = self.dose_response(text)
        leads = {p: rows[p]["difference"] < 0 and rows[p]["p"] < 0.05 for p in DOSES}
        difference, half, _ = self.compare(doses["full"], doses[1])
        if not any(leads.values()):
            return "no p leads: with this support and this order the anchor does not help"
        if leads["full"] and difference + half < 0:
            return "the lead grows with p: the rank is what helps"
        if leads[1]:
            return "the lead is there at p = 1: the random rescaling of rows and columns"
        return "some p lead, but neither p = 1 nor growth from it is significant: undecided"

    def print_dose_response(self, text):
        print(f"\nIs it the rank? Anchors of rank p on {text}, and rivals of as many parameters:")
        print("  p                   seeds    loss  less that of p = 0  p (Holm)", end="")
        print("   rank  stable rank   size  training  validation")
        for name, row in self.dose_response(text).items():
            compared = name != 0 and row["half"] is not None
            difference = f"{row['difference']:+.4f} +- {row['half']:.4f}" if compared else "-"
            p = f"{row['p']:.3f}" if "p" in row else "-"
            print(f"  {name!s:20}{row['seeds']:5}{row['loss']:8.4f}{difference:>20}{p:>10}", end="")
            if row["rank"] is None:
                print(f"{'-':>7}{'-':>13}{'-':>7}", end="")
            else:
                print(f"{row['rank']:7.1f}{row['stable_rank']:13.1f}{row['size']:7.3f}", end="")
            print(f"{row['train']:10.4f}{row['validation']:12.4f}")
        print(f"  Verdict: {self.dose_verdict(text)}")


if __name__ == "__main__":
    command(Rank, __doc__)
