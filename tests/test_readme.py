"""What the README shows is what runs, and what the records say."""

import contextlib
import io
import json
import os
import re
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = " ".join(README.split())
STUDIES = ROOT / "notebooks" / "studies"
sys.path.insert(0, str(STUDIES))
import rank  # noqa: E402
import small  # noqa: E402

SMALL, LANGUAGE = small.Small(), rank.Rank()  # each with its whole record


def test_the_snippet_prints_what_is_shown(tmp_path):
    code, shown = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", README, re.DOTALL).groups()
    printed, here = io.StringIO(), os.getcwd()
    os.chdir(tmp_path)
    try:
        with contextlib.redirect_stdout(printed):
            exec(code, {})
    finally:
        os.chdir(here)
    number = r"\d+\.\d+"
    assert re.sub(number, "", printed.getvalue()) == re.sub(number, "", shown)
    losses = [
        [float(found) for found in re.findall(number, text)] for text in (printed.getvalue(), shown)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=0.0011)  # another CPU rounds otherwise


def test_every_linked_file_exists():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links and all((ROOT / link.split("#")[0]).exists() for link in links)


SHARES = [  # (study, arm, the LoRA whose gain it has a share of)
    (SMALL, "hira r=4", "lora r=4"),
    (SMALL, "melora r=8 K=2", "lora r=4"),
    (SMALL, "smoa r=8 K=2", "lora r=4"),
    (LANGUAGE, "hira r=1", "lora r=1"),
    (LANGUAGE, "melora r=2 K=2", "lora r=1"),
    (LANGUAGE, "smoa r=2 K=2", "lora r=1"),
    (LANGUAGE, "hira r=4", "lora r=4"),
    (LANGUAGE, "melora r=8 K=2", "lora r=4"),
    (LANGUAGE, "smoa r=8 K=2", "lora r=4"),
    (LANGUAGE, "hira r=1 japanese", "lora r=1 japanese"),
    (LANGUAGE, "smoa r=2 K=2 japanese", "lora r=1 japanese"),
    (LANGUAGE, "smoa r=8 K=2 japanese", "lora r=4 japanese"),
    (LANGUAGE, "smoa r=8 K=2 natural japanese", "lora r=4 japanese"),
    (LANGUAGE, "melora r=8 K=2 japanese", "lora r=4 japanese"),
]


def test_the_shares_are_those_of_the_records():
    for study, ours, theirs in SHARES:
        share, half = study.share_of_gain(ours, theirs)
        assert f"{100 * share:.1f} ± {100 * half:.1f}" in WORDS, ours


def test_the_losses_to_rivals_are_in_the_readme():
    leads = []
    for r in (1, 2, 4, 8):
        lead, half, _ = SMALL.compare(f"smoa r={2 * r} K=2", f"melora r={2 * r} K=2")
        assert lead > half
        leads.append(lead)
    assert f"{min(leads):.3f} to {max(leads):.3f} nats" in WORDS
    lead, half, _ = LANGUAGE.compare("smoa r=2 K=2", "hira r=1")
    assert f"{lead:.4f} ± {half:.4f} nats" in WORDS


def test_the_luckier_rate_is_in_the_readme():
    difference, half, _ = LANGUAGE.compare("smoa r=8 K=2", "lora r=4", lucky=True)
    lucky = [LANGUAGE.loss(line) for line in LANGUAGE.runs("lora r=4", lucky=True).values()]
    gain = statistics.fmean(LANGUAGE.base_losses("folio")) - statistics.fmean(lucky)
    assert f"{100 * (1 - difference / gain):.1f} ± {100 * half / gain:.1f} %" in WORDS


def test_the_rank_is_that_of_the_record():
    rows = LANGUAGE.dose_response("folio")
    losses = [f"{rows[p]['loss']:.3f}" for p in rank.DOSES]
    assert f"{', '.join(losses[:-1])} and {losses[-1]}, and {rows[0]['loss']:.3f}" in WORDS
    lead, half, _ = LANGUAGE.compare("smoa r=8 K=2", "lora+ r=4 ratio 16")
    assert f"{-lead:.4f} ± {half:.4f} are left" in WORDS


def test_the_times_are_those_of_the_record():
    record = json.loads((STUDIES / "records" / "cost.json").read_text(encoding="utf-8"))
    columns = ("hira r=4", "smoa r=8 K=2", "peft hira r=4")
    table = [line for line in README.splitlines() if line.startswith(("| HiRA", "| SMoA"))]
    places = table[0], table[1], next(line for line in README.splitlines() if "PEFT's HiRA" in line)
    for column, place in zip(columns, places):
        times = [row[column]["median"] for row in record["peft"]["rows"]]
        assert f"{min(times):.1f} to {max(times):.1f}" in place
