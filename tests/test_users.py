"""smoa.py in the hands of its ordinary users: each thing is right, or refused with the remedy.

In a notebook, in a model, in another precision, in training, after training. What cannot be
adapted is in test_refused.py, files are in test_files.py.
"""

import contextlib
import copy
import importlib
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from nets import (
    LARGE,
    Net,
    adapted,
    all_bits,
    bits,
    both_sizes,
    dense,
    gradients,
    input_for,
    near,
    normal,
    refused,
    trained_names,
)
from strategies import HALVES, fill
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import smoa

FORMS = {
    "SMoA": {},
    "MELoRA": {"modulate": False, "order": "natural"},
    "blocks without a pair": {"rank": 2, "num_blocks": 4},
    "dropout": {"dropout": 0.5},
}
each_form = pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
both_forms = pytest.mark.parametrize("options", [{}, {"modulate": False}], ids=["SMoA", "MELoRA"])


def run_alone(folder, script, processes=1):
    """Run a script beside a lone copy of smoa.py, in processes that know their number."""
    shutil.copy(smoa.__file__, folder / "smoa.py")
    (folder / "script.py").write_text(textwrap.dedent(script))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    running = []
    for number in range(processes):
        command = [sys.executable, "script.py", str(number)]
        running.append(subprocess.Popen(command, cwd=folder, env=environment, **pipes))
    try:
        outputs = [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * processes, outputs
    return outputs


# ------------------------------------------------------------------------------------------------
# In a notebook


def test_it_imports_torch_and_python_alone():
    lines = Path(smoa.__file__).read_text().splitlines()
    imports = [line.split()[1] for line in lines if line.startswith(("import ", "from "))]
    packages = {name.partition(".")[0] for name in imports}
    assert "torch" in packages
    assert packages - {"torch"} <= sys.stdlib_module_names


@pytest.mark.parametrize("reloaded", [False, True])
def test_a_cell_run_twice_is_refused(reloaded):
    model = adapted()
    if reloaded:
        importlib.reload(smoa)
    with refused("second: ", "adapted already", "unload", model=model):
        smoa.inject(model, ["second"])
    with refused("'base'", "matches no module", model=model):
        smoa.inject(model, ["base"])
    assert type(smoa.unload(model).second) is nn.Linear


# {targets: what the error says}
BAD_TARGETS = {
    ("q_proj",): ["'q_proj' matches no module", "are named first, head, second; a list holds"],
    ("irst",): ["'irst' matches no module"],
    ("first", "f.rst"): ["'f.rst' matches no module"],
    "fir": ["'fir' matches no module", "a lone string is a regular expression"],
    (): ["no targets given"],
}


@pytest.mark.parametrize("targets", BAD_TARGETS, ids=repr)
def test_a_target_that_fits_nothing_says_so(targets):
    model = Net()
    with refused(*BAD_TARGETS[targets], model=model):
        smoa.inject(model, targets)


def test_targets_are_names_their_ends_or_a_pattern():
    for targets in (["a.first", "second"], r"a\.first|.*second"):
        model = nn.ModuleDict({"a": Net(), "b": Net()})
        assert smoa.inject(model, targets) == ["a.first", "a.second", "b.second"]
        assert [name for name, _ in smoa.adapters(model)] == ["a.first", "a.second", "b.second"]


def test_layer_by_layer_is_all_at_once():
    states = []
    for calls in ([["first", "second"]], [["first"], ["second"]]):
        model = Net()
        torch.manual_seed(0)
        assert [smoa.inject(model, targets) for targets in calls] == calls
        states.append((all_bits(model.state_dict()), trained_names(model)))
    assert states[0] == states[1]


AUTORELOAD = """
    import os
    from pathlib import Path

    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()

    def cell(source):
        shell.run_cell(source).raise_error()

    cell("%load_ext autoreload")
    cell("%autoreload 2")
    # In one cell: only right after an import does autoreload run the whole module again; later it
    # patches what has changed.
    cell(
        "import torch, smoa\\n"
        "model = torch.nn.Sequential(torch.nn.Linear(400, 400))\\n"
        "smoa.inject(model, ['0'])"
    )
    file = Path("smoa.py")
    file.write_text(file.read_text() + "\\nEDITED = True\\n")
    os.utime(file, (2e9, 2e9))
    cell("model(torch.ones(3, 400)).sum().backward()")
    cell("assert smoa.EDITED and model[0].B[0].grad.any()")
"""


def test_autoreload_takes_up_an_edit(tmp_path):
    pytest.importorskip("IPython")
    (output,) = run_alone(tmp_path, AUTORELOAD)
    assert "failed" not in output and "Error" not in output, output


# ------------------------------------------------------------------------------------------------
# In a model


def transformer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


@both_forms
@pytest.mark.parametrize("way", ["train", "fast path", "merged, fast path"])
def test_a_transformer_encoder_uses_every_w(way, options, monkeypatch):
    model, plain = transformer().train(way == "train"), transformer().train(way == "train")
    targets = ["out_proj", "linear1", "linear2"]  # which the fast path reads past `forward`
    smoa.inject(model, targets, rank=4, **options)
    weights = {f"{name}.weight": dense(layer) for name, layer in smoa.adapters(fill(model))}
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    inputs = normal(2, 5, 8, seed=4), None, padding
    expected = torch.func.functional_call(plain, weights, inputs)[~padding]
    fast, kernel = [], torch._transformer_encoder_layer_fwd
    watched = lambda *args: fast.append(args) or kernel(*args)  # noqa: E731
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", watched)
    if "merged" in way:
        smoa.merge(model)
    with torch.set_grad_enabled("fast" not in way):
        y = model(*inputs)[~padding]
    assert near(y, expected)
    assert bool(fast) == ("fast" in way)


def test_a_shared_module_gets_one_adapter():
    for targets in (["a"], "a|b"):
        layer = nn.Linear(8, 5)
        model = nn.ModuleDict({"a": layer, "b": layer})
        with refused("'b' matches no module", "are named a;", model=model):
            smoa.inject(model, ["b"])
        assert smoa.inject(model, targets, rank=4) == ["a"]
        assert model["a"] is model["b"]
        smoa.unload(model)
        assert model["a"] is model["b"] is layer


HOOKS = {
    "on the input": lambda m: m.register_forward_pre_hook(lambda m, args: (2 * args[0],)),
    "on the output": lambda m: m.register_forward_hook(lambda m, args, y: y.sin()),
    "on the gradient": lambda m: m.register_full_backward_hook(lambda m, to, g: (3 * to[0],)),
    "before the gradient": lambda m: m.register_full_backward_pre_hook(lambda m, g: (2 * g[0],)),
}


@both_sizes
@pytest.mark.parametrize("where", ["layer", "base"])
@pytest.mark.parametrize("state", ["adapted", "merged", "disabled", "merged, disabled"])
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_hooks_act_as_on_a_plain_layer(hook, state, where, size):
    layer, plain = adapted(size, order="natural").first, Net(size).first
    x = normal(4, size, seed=1).requires_grad_()
    hook(plain)
    hook(layer if where == "layer" else layer.base)
    if "merged" in state:
        smoa.merge(layer.eval())
    with smoa.disabled(layer) if "disabled" in state else contextlib.nullcontext():
        plain.weight.data = layer.weight.detach().clone()
        y, expected = layer(x), plain(x)
        (found,) = torch.autograd.grad(y.square().sum(), x)
        (exact,) = torch.autograd.grad(expected.square().sum(), x)
    assert near(y, expected) and near(found, exact)


def test_a_layer_compiled_by_itself():
    model = Net()
    plain, model.second = model.second, torch.compile(model.second, backend="eager")
    with refused("OptimizedModule", "then wrap it", model=model):
        smoa.inject(model, ["first", "second"], rank=4)
    model.second = plain
    smoa.inject(model, ["first", "second"], rank=4)
    x = input_for(fill(model))
    y = model(x)
    model.second = torch.compile(model.second, backend="eager")
    assert near(model(x), y)
    assert [name for name, _ in smoa.adapters(model)] == ["first", "second"]
    with refused("OptimizedModule", "then wrap it", model=model):
        smoa.unload(model)


# ------------------------------------------------------------------------------------------------
# In another precision


@both_sizes
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
def test_a_model_cast_after_inject_still_trains(dtype, merged, size):
    model, plain = adapted(size), Net(size).to(dtype)
    orders = [model.first.row_order.clone(), model.first.col_order.clone()]
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=1e-4)  # steps that half precision would round away
    if merged:
        smoa.merge(model)
    model.to(dtype)
    smoa.unmerge(model)
    before = [p.detach().clone() for p in factors]
    gradients(model, input_for(model))
    optimizer.step()
    wide = torch.promote_types(dtype, torch.float32)
    for p, old in zip(factors, before):
        assert p.dtype == p.grad.dtype == wide and p.isfinite().all()
        assert (p != old).double().mean() > 0.9
    assert all(map(torch.equal, orders, [model.first.row_order, model.first.col_order]))
    assert all_bits(smoa.unload(model).state_dict()) == all_bits(plain.state_dict())


# ------------------------------------------------------------------------------------------------
# In training


@both_sizes
@each_form
def test_an_input_in_another_dtype_is_refused(size, options):
    layer, x = adapted(size, **options).first, normal(3, size, seed=1)
    for refuses in (layer.base, layer):
        for wrong in (x.double(), x.bfloat16()):
            with pytest.raises(RuntimeError, match="dtype"):
                refuses(wrong)


@both_sizes
@each_form
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_bit(size, options, use_reentrant):
    model, found = adapted(size, **options), []
    x = input_for(model).requires_grad_()
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        torch.manual_seed(0)
        found.append(all_bits(gradients(model, x, call)))
    assert found[0] == found[1]


@both_sizes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both_forms
def test_a_compiled_model_learns_the_same(size, options, dtype):
    model, found = adapted(size, dtype=dtype, **options), []
    torch._dynamo.reset()
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        grads = gradients(model, input_for(model), call)
        found.append(torch.cat([grads[name].flatten() for name in sorted(grads)]))
    # A large layer has another way to its gradient there, which in bfloat16 rounds elsewhere.
    assert near(found[1], found[0], 20 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps)


@both_sizes
@pytest.mark.parametrize(
    "options",
    [{}, {"modulate": False}, {"dtype": torch.bfloat16}],
    ids=["SMoA", "MELoRA", "bfloat16"],
)
def test_gradients_of_each_sample_are_a_loop(size, options):
    model, dtype = adapted(size, **options), options.get("dtype", torch.float32)
    roundings = 100 if dtype == torch.float32 else 2**20  # of float32: 2**16 are one of bfloat16
    factors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(factors, x):
        return torch.func.functional_call(model, factors, (x,)).square().sum()

    x, gradient = normal(3, 5, size, seed=1, dtype=dtype), torch.func.grad(loss)
    assert near(torch.func.vmap(model)(x), model(x), 20)
    found = torch.func.vmap(gradient, in_dims=(None, 0))(factors, x)
    for i, sample in enumerate(x):
        for name, exact in gradient(factors, sample).items():
            assert near(found[name][i], exact, roundings), name


@both_sizes
@each_form
def test_an_output_may_be_changed_in_place(size, options):
    layer = adapted(size, **options).first.eval()
    for shape in ((size,), (5, size), (3, 5, size)):
        x = normal(*shape, seed=1)
        expected = layer(x).relu()
        assert torch.equal(nn.ReLU(inplace=True)(layer(x)), expected)
        layer(x).add_(1).sum().backward()


@both_sizes
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_lives_a_life_of_its_own(how, merged, size):
    model = adapted(size).eval()
    if merged:
        smoa.merge(model)
    x = input_for(model)
    y, twin = model(x), how(model)
    assert torch.equal(twin(x), y) and twin.first.merged == merged
    smoa.unload(fill(twin, seed=5), merge=True)
    assert torch.equal(model(x), y)


def test_an_average_keeps_the_orders(tmp_path):
    model, plain = adapted(LARGE), Net(LARGE)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for seed in range(3):
        average.update_parameters(fill(model, seed))
    assert not torch.equal(average.module.first.A[0], model.first.A[0])
    smoa.save(torch.compile(average, backend="eager"), tmp_path / "adapter.pt")
    assert smoa.load(plain, tmp_path / "adapter.pt") == ["first", "second"]
    assert torch.equal(plain(input_for(plain)), average(input_for(plain)))
    for layer, twin in ((model.first, plain.first), (model.second, average.module.second)):
        assert torch.equal(twin.row_order, layer.row_order)
        assert torch.equal(twin.col_order, layer.col_order)


TWO_PROCESSES = """
    import gc
    import sys

    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    import smoa

    rank = int(sys.argv[1])
    dist.init_process_group("gloo", store=dist.FileStore("meet", 2), rank=rank, world_size=2)

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(384, 400), nn.Tanh(), nn.Linear(400, 3))

    def train(model, batch):
        for _ in range(2):
            model.zero_grad()
            model(batch).square().sum(-1).mean().backward()
            for p in model.parameters():
                if p.requires_grad:
                    p.data -= p.grad

    if rank == 0:  # one injects and saves, all load
        model = net()
        smoa.inject(model, ["0", "2"], rank=3)
        for _, layer in smoa.adapters(model):
            for B_k in layer.B:
                nn.init.normal_(B_k)
        smoa.save(model, "start.pt")
    dist.barrier()
    alone, model = net(), net()
    for each in (alone, model):
        smoa.load(each, "start.pt")
    model = DistributedDataParallel(model)
    x = torch.randn(8, 384, generator=torch.Generator().manual_seed(1))
    before = alone(x)
    train(alone, x)
    train(model, x[4 * rank :][:4])
    assert not torch.allclose(alone(x), before, atol=0.01)
    torch.testing.assert_close(model(x), alone(x), rtol=1e-4, atol=1e-4)
    assert [name for name, _ in smoa.adapters(model)] == ["0", "2"]

    late = DistributedDataParallel(net())
    for verb, what in ((smoa.inject, ["0"]), (smoa.load, "start.pt")):
        try:
            verb(late, what)
            raise SystemExit("factors that are never synchronised")
        except ValueError as error:
            assert "DistributedDataParallel" in str(error), error
    del model, late  # no DistributedDataParallel may outlive its process group
    gc.collect()
    dist.destroy_process_group()
"""


def test_two_processes_learn_what_one_would(tmp_path):
    run_alone(tmp_path, TWO_PROCESSES, processes=2)


# ------------------------------------------------------------------------------------------------
# After training


def test_verbs_without_an_adapter_raise(tmp_path):
    model, verbs = Net(), [smoa.merge, smoa.unmerge, smoa.unload]
    verbs.append(lambda model: smoa.disabled(model).__enter__())
    verbs.append(lambda model: smoa.save(model, tmp_path / "adapter.pt"))
    for verb in verbs:
        with refused("no adapter", "smoa.inject or smoa.load", model=model):
            verb(model)
    assert not list(tmp_path.iterdir())


@both_sizes
@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_merge_is_undone_bit_for_bit(dtype, context, size):
    model, plain = adapted(size, dtype=dtype), Net(size, dtype=dtype)
    x, W, delta = input_for(model), model.first.weight, model.first.delta_weight()
    y = model(x)
    with context():
        smoa.merge(model.eval())
        smoa.merge(model)  # twice is once
        merged = dict(model.named_parameters())["first.base.weight"]
        assert near(merged, W, 1) and not merged.requires_grad
        assert near(model(x), y)
        assert bits(model.first.original_weight()) == bits(plain.first.weight)
        assert bits(model.first.delta_weight()) == bits(delta)
        smoa.unmerge(model.train())
    assert torch.equal(model(x), y)
    assert all(grad.isfinite().all() for grad in gradients(model, x).values())
    first, second = model.first, model.second.base
    assert smoa.unload(model) is model and model.second is second
    assert all_bits(model.state_dict()) == all_bits(plain.state_dict())
    with context():
        assert smoa.unload(first, merge=True) is model.first
    assert near(model.first.weight, W, 1)
    model.first.weight.requires_grad_(True)
    assert gradients(model, x)["first.weight"].any()


@both_sizes
def test_a_disabled_model_is_its_base(size):
    """Bit for bit, as the reference of DPO has to be."""
    model, plain = adapted(size, dropout=0.1), Net(size)
    x = input_for(model)
    y = model.eval()(x)
    for merged in (False, True):
        if merged:
            smoa.merge(model)
        with smoa.disabled(model.train()):
            for _ in range(2):
                assert torch.equal(model(x), plain(x))
                assert bits(model.first.weight) == bits(plain.first.weight)
                with smoa.disabled(model):  # a reference inside a reference
                    pass
        assert near(model.eval()(x), y) and model.first.merged == merged
    smoa.unmerge(model)
    with smoa.disabled(model):
        smoa.merge(model)
        assert torch.equal(model(x), plain(x))
    assert near(model(x), y)
    with smoa.disabled(model):
        smoa.unload(model)
    assert all_bits(model.state_dict()) == all_bits(plain.state_dict())


@both_sizes
@each_form
def test_a_merged_model_does_not_train(size, options):
    model = adapted(size, **options)
    x = input_for(model)
    smoa.merge(model)
    for use in (lambda: model(x), lambda: model.first.weight):
        with pytest.raises(RuntimeError, match="a merged layer does not train.*unmerge.*eval"):
            use()
    with torch.no_grad():
        y = model(x)
    assert torch.equal(model.eval()(x), y)
    smoa.unmerge(model)
    model.second.base.weight.requires_grad_(True)
    with refused("base weight trains", model=model):
        smoa.merge(model)
