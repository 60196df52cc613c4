"""The study asks for what its record lacks, builds what it names, and draws no more than that."""

import json
import statistics
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import smoa
from gpt_mini import GPT, GPTConfig
from train_shakespeare import LEARNING_RATES, Texts, make_plan

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "notebooks"))
import rescaling  # noqa: E402
import study  # noqa: E402


def record(arm, lr, seed, validation, folio=0.0):
    return dict(arm=arm, lr=lr, seed=seed, validation=validation, folio=folio)


def lora(losses, seeds=()):
    first = [record("lora 2", lr, 0, loss) for lr, loss in losses.items()]
    return first + [record("lora 2", 0.02, seed, 0) for seed in seeds]


def test_the_study_widens_a_grid_whose_best_rate_is_at_the_edge_and_then_wants_seeds():
    inside = {0.01: 2, 0.02: 1, 0.04: 3, 0.08: 3}
    assert study.wanted("lora 2", []) == [(0.01, 0), (0.02, 0), (0.04, 0), (0.08, 0)]
    high = lora({0.01: 3, 0.02: 2, 0.04: 1.5, 0.08: 1})
    assert study.wanted("lora 2", high) == [(0.16, 0)]
    low = lora({0.01: 1, 0.02: 2, 0.04: 3, 0.08: 3})
    assert study.wanted("lora 2", low) == [(0.005, 0)]
    assert study.wanted("lora 2", lora(inside, [1, 2])) == [(0.02, 3), (0.02, 4)]
    assert study.wanted("lora 2", lora(inside, range(1, study.STUDY_SEEDS))) == []


def test_the_arms_that_show_what_one_rate_would_say_are_tried_at_the_shared_rates_too():
    rates = {lr for lr, _ in study.wanted("lora 4", [])}
    assert rates == {0.01, 0.02, 0.04, 0.08, *study.SHARED_RATES}
    assert set(study.SHARED_ARMS) < study.study_arms().keys()


@pytest.fixture
def base():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=5, block_size=8, n_layer=1, n_head=2, n_embd=32))


@pytest.fixture
def texts(monkeypatch):
    monkeypatch.setattr(study, "VALIDATION", 500)
    tokens = torch.randint(5, (2000,), generator=torch.Generator().manual_seed(0))
    return Texts("abcde", (tokens, tokens), (tokens, tokens), "a")


def test_a_record_of_another_base_is_not_gone_on_with(tmp_path, base, texts, capsys):
    path = tmp_path / "study.jsonl"
    path.write_text(json.dumps(dict(arm="full", base=dict(weights="another"))) + "\n")
    before = path.read_text()
    with pytest.raises(SystemExit):
        study.study(path, (1, 1), base, texts)
    assert "of base another, this one" in capsys.readouterr().err
    assert path.read_text() == before


def test_repairs_of_another_base_are_not_gone_on_with(tmp_path, base, monkeypatch, capsys):
    record = tmp_path / "repairs.jsonl"
    record.write_text(json.dumps(dict(base="another")) + "\n")
    monkeypatch.setattr(rescaling, "ready_base", lambda *args, **options: (base, None))
    with pytest.raises(SystemExit):
        rescaling.run_all(record, 1, 1, tmp_path)
    assert "are of base another" in capsys.readouterr().err


def test_a_run_that_diverges_is_on_record_as_the_worst(base, texts):
    run = study.study_run("full", 1e30, 0, base, texts)
    assert run["validation"] == run["folio"] == float("inf")


def test_a_run_is_repeated_by_its_seed(base, texts, monkeypatch):
    arm = study.Arm("smoa", 1, 2, steps=3, order="random")
    monkeypatch.setattr(study, "study_arms", lambda: {"x": arm})
    losses = [study.study_run("x", 0.1, seed, base, texts)["folio"] for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_random_orders_leave_the_factors_as_the_natural_order_draws_them(base):
    arms = [study.Arm("smoa", 2, 4, order=order) for order in ("natural", "random")]
    natural, random = (dict(smoa.adapters(study.adapted(arm, base, 3))) for arm in arms)
    for name, layer in natural.items():
        assert all(torch.equal(*pair) for pair in zip(layer.A, random[name].A))
        assert not torch.equal(layer.row_order, random[name].row_order)


def test_unit_rms_anchors_scale_each_layer_by_its_weight(base):
    model = study.adapted(study.Arm("smoa", 2, 2, variant="anchor rms 1"), base, 0)
    for _, layer in smoa.adapters(model):
        rms = layer.original_weight().square().mean().sqrt().item()
        assert layer.scale == pytest.approx(1 / rms)


@pytest.mark.parametrize("kind", ["permuted", "noise"])
@pytest.mark.parametrize("K", [1, 2])
def test_another_anchor_is_as_large_as_the_weight_and_stands_in_its_place(kind, K):
    base = torch.nn.Linear(40, 30, dtype=torch.float64)
    control = smoa.SMoALinear(base, rank=3, num_blocks=K)
    ours = set(map(id, control.parameters()))
    study.give_other_anchor(control, kind)
    W0, anchor = base.weight.detach().clone(), control.other
    assert anchor.norm().item() == pytest.approx(W0.norm().item(), rel=0.1)
    assert F.cosine_similarity(W0.flatten(), anchor.flatten(), dim=0).abs() < 0.15
    if kind == "permuted":
        torch.testing.assert_close(torch.linalg.svdvals(anchor), torch.linalg.svdvals(W0))
    change = torch.zeros_like(W0)
    for A_k, B_k, rows_k, cols_k in zip(control.A, control.B, control.rows, control.cols):
        torch.nn.init.normal_(B_k)
        block = rows_k[:, None], cols_k
        change[block] = control.scale * (B_k @ A_k).detach() * anchor[block]
    x = torch.randn(5, 40, dtype=torch.float64)
    expected = base(x) + x @ change.mT
    torch.testing.assert_close(control(x), expected)
    assert set(map(id, control.parameters())) == ours
    control.merge()
    torch.testing.assert_close(base.weight, W0 + change)
    control.unmerge()
    assert torch.equal(base.weight, W0)


def test_verdicts_follow_from_the_interval_of_paired_differences(monkeypatch):
    ours, theirs = "smoa 2 K=4", "lora 2"
    claims = {
        "a beats b": [(ours, theirs)],
        "b beats a": [(theirs, ours)],
        "no runs": [("full", theirs)],
    }
    monkeypatch.setattr(study, "CLAIMS", claims)
    noise = (0.3, -0.2, 0.1, 0.0, -0.2)
    records = []
    for arm, lowest, gain in ((theirs, 0.01, 0.0), (ours, 0.05, 0.02)):
        best = 2 * lowest
        for k in range(4):
            records.append(record(arm, lowest * 2**k, 0, abs(k - 1), 1.3 - gain))
        for seed in range(1, 5):
            less = 0.0 if arm == theirs else gain + 0.001 * seed
            records.append(record(arm, best, seed, 0, 1 + noise[seed] - less))
    rows = list(study.verdicts(records))
    assert [row[5] for row in rows] == ["holds here", "fails here", "not enough runs on record"]
    differences = [-0.02, -0.021, -0.022, -0.023, -0.024]
    half = 2.776 * statistics.stdev(differences) / 5**0.5  # Student's t, four degrees of freedom
    assert rows[0][3:5] == pytest.approx((-0.022, half))
    assert rows[1][3:5] == pytest.approx((0.022, half))


def test_every_arm_of_the_study_trains_as_many_parameters_as_it_says(base):
    for name, arm in study.study_arms().items():
        if arm.method == "full" or arm.total_rank:
            continue
        model = study.adapted(arm, base, 0)
        linears = base.named_modules()
        shapes = [layer.weight.shape for name, layer in linears if name.endswith(arm.targets)]
        lora = sum(arm.rank * (m + n) for m, n in shapes)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == lora, name


def test_a_base_of_the_notebooks_is_the_finished_one_trained_longest(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The old king was merry. " * 60)
    flags = ["--data", str(text), "--adapt-data", str(text), "--device", "cpu"]
    for steps in ("3", "2"):
        plan = make_plan([*flags, "--pretrain-steps", steps, "--out", str(tmp_path)])
        study.pretrain(plan, study.load_texts(plan))
    assert study.finished_base(tmp_path)[2] == 3


@pytest.mark.parametrize(
    "arguments, message",
    [("--share 3/2", "1 <= I <= N, got '3/2'"), ("--summary --record nowhere", "no record at")],
)
def test_what_the_study_cannot_do_is_one_line_of_error(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        study.main(arguments.split())
    errors = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and message in errors and "\n" not in errors


# --------------------------------------------------------------------------------------------------
# The README's numbers are the record's

CHOSEN = study.at_best_rate(study.read_records(study.HERE / "study.jsonl"))
README = " ".join((study.HERE.parent / "README.md").read_text(encoding="utf-8").split())


def mean_loss(arm):
    return statistics.fmean(run["folio"] for run in CHOSEN[arm].values())


def share(ours, theirs):
    """(share of LoRA's gain, half width of its interval), in percent."""
    return [100 * part for part in study.share_of_gain(ours, theirs, CHOSEN)]


@pytest.mark.parametrize("rank", study.RANKS)
def test_the_readmes_table_is_the_record(rank):
    row = f"| {mean_loss(f'lora {rank}'):.4f} |"
    for arm in ("hira {}", "melora {} K=4", "smoa {} K=2", "smoa {} K=4"):
        arm = arm.format(rank)
        row += f" {mean_loss(arm):.4f}, {share(arm, f'lora {rank}')[0]:.1f} % |"
    assert f"({rank}) {row}" in README


def test_the_readmes_verdicts_are_the_record():
    ranges = []
    for K in (2, 4, 8):
        found = [share(f"smoa {rank} K={K}", f"lora {rank}")[0] for rank in study.RANKS]
        ranges.append(f"{min(found):.0f} to {max(found):.0f} %")
    two, four, eight = ranges
    assert f"K = 2 has {two} of LoRA's gain, K = 4 {four}, K = 8 {eight}." in README
    assert f"K = 4 has {share('smoa 4 long', 'lora 4 long')[0]:.1f} %" in README
    assert (
        "of text {:.0f} ± {:.0f} % (LoRA's r = 1)".format(*share("smoa 1 low", "lora 1 low"))
        in README
    )
    assert "and {:.1f} ± {:.1f} % (r = 4)".format(*share("smoa 4 low", "lora 4 low")) in README


def test_the_readme_says_of_the_large_model_what_the_card_s_record_says():
    records = study.read_records(study.HERE / "study_large.jsonl")
    best = {}
    for arm in ("lora 4", "melora 4 K=4", "smoa 4 K=2", "full"):
        best[arm] = study.best_so_far(arm, records)[0]["folio"]
    base = records[0]["base"]["folio"]
    share = 100 * (base - best["smoa 4 K=2"]) / (base - best["lora 4"])
    lora, melora, ours, full = (f"{loss:.3f}" for loss in best.values())
    assert f"brought LoRA to {lora}, MELoRA to {melora}, SMoA with K = 2 to {ours}" in README
    assert f"which is {share:.1f} % of LoRA's gain, and full fine-tuning to {full}" in README
    (broken,) = (r["folio"] for r in records if r["arm"] == "lora 4" and r["lr"] == 0.03)
    assert f"At 0.03, the small model's rate, LoRA breaks down ({broken:.3f})" in README


SWEEPS = {
    "small": ("study.jsonl", dict(smoa="smoa 4 K=4", melora="melora 4 K=4")),
    "large": ("study_large.jsonl", dict(smoa="smoa 4 K=2", melora="melora 4 K=4")),
}


@pytest.mark.parametrize("preset", SWEEPS)
def test_the_script_s_rates_are_as_good_as_the_best_of_their_sweeps(preset):
    record, names = SWEEPS[preset]
    names = dict(lora="lora 4", hira="hira 4", full="full") | names
    records = study.read_records(study.HERE / record)
    for method, lr in LEARNING_RATES[preset].items():
        runs = [r for r in records if r["arm"] == names[method] and r["seed"] == 0]
        losses = {r["lr"]: r["validation"] for r in runs}
        assert losses[lr] <= min(losses.values()) + 0.0005
