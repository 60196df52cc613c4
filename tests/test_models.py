"""smoa.py in other people's models: alone in an empty folder, under parents that read a weight past `forward`, in half precision, compiled,
checkpointed, on several processes."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from strategies import (
    HALVES,
    Net,
    adapted,
    bits,
    fill,
    generic,
    layers,
    linear,
    normal,
    seeds,
    to_numpy,
)
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import smoa

X = normal(4, 6, seed=3, dtype=torch.float32)
BUDGETS = {
    "r past K": dict(rank=4, num_blocks=2),
    "r below K": dict(rank=2, num_blocks=4),  # two blocks have no branch
    "one block": dict(rank=2, num_blocks=1),
    "no anchor": dict(modulate=False),
}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(model, other, rtol=1e-5, atol=1e-5):
    """float32 sums in another order."""
    assert gradients(model) and gradients(model).keys() == gradients(other).keys()
    torch.testing.assert_close(gradients(model), gradients(other), rtol=rtol, atol=atol)


# ---------------------------------------------------------------------------------------------------------------------
# Alone in an empty folder


def run_alone(folder, script, *args):
    """Processes that run the script beside a lone copy of smoa.py, one for each of args; with nothing else on their path."""
    shutil.copy(smoa.__file__, folder / "smoa.py")
    (folder / "script.py").write_text(textwrap.dedent(script))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }  # the processes meet on 127.0.0.1
    command = [sys.executable, "-W", "error::UserWarning:smoa", "script.py"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    running = [
        subprocess.Popen([*command, *map(str, arg)], cwd=folder, env=environment, **pipes)
        for arg in args
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), "\n".join(outputs)


def test_smoa_alone_in_an_empty_folder_lives_a_whole_life(tmp_path):
    script = """
        import sys
        from pathlib import Path
        import smoa
        here = Path(__file__).parent
        assert Path(smoa.__file__).parent == here and sorted(path.name for path in here.glob("*.py")) == ["script.py", "smoa.py"]
        assert not {"numpy", "gpt_mini", "tqdm"} & set(vars(smoa))
        import torch
        from torch import nn

        def make():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))

        model, x, target = make(), torch.randn(16, 6), torch.randn(16, 3)
        before = model(x)
        assert smoa.inject(model, "0|2", rank=4, num_blocks=2) == ["0", "2"] and torch.equal(model(x), before)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for _ in range(30):
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0], losses
        trained = model(x)
        smoa.save(model, "adapter.pt")
        fresh = make()
        assert smoa.load(fresh, "adapter.pt") == ["0", "2"] and torch.equal(fresh(x), trained)
        smoa.merge(fresh)
        torch.testing.assert_close(fresh(x), trained)
        with smoa.disabled(fresh):
            assert torch.equal(fresh(x), before)
        smoa.unmerge(fresh)
        assert torch.equal(fresh(x), trained)
        merged = smoa.unload(fresh, merge=True)
        torch.testing.assert_close(merged(x), trained)
        assert [type(module) for module in merged] == [nn.Linear, nn.GELU, nn.Linear]
        assert torch.equal(smoa.unload(model)(x), before)
        assert sorted(path.name for path in here.iterdir() if path.is_file()) == ["adapter.pt", "script.py", "smoa.py"]
    """
    run_alone(tmp_path, script, ())


def test_smoa_imports_torch_and_the_standard_library_only():
    lines = Path(smoa.__file__).read_text().splitlines()
    imports = {
        line.split()[1].partition(".")[0] for line in lines if line.startswith(("import ", "from "))
    }
    assert "torch" in imports and imports - {"torch"} <= sys.stdlib_module_names


# ---------------------------------------------------------------------------------------------------------------------
# nn.TransformerEncoderLayer, whose attention reads out_proj.weight and whose fast path reads every weight, past `forward`

TRANSFORMER = ["out_proj", "linear1", "linear2"]
SEQUENCE = normal(2, 5, 8, seed=4, dtype=torch.float32)


def transformer():
    """Frozen from the start: PyTorch has other kernels for weights that want no gradient, which round otherwise."""
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).requires_grad_(False)


def folded(model):
    """A plain copy whose weights are W0 + delta_W, put there by hand."""
    plain = transformer()
    state = {}
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            layer = model.get_submodule(name)
            state[f"{name}.weight"] = (layer.original_weight() + layer.delta_weight()).detach()
    plain.load_state_dict(plain.state_dict() | state)
    return plain.train(model.training)


@pytest.mark.parametrize("layer_options", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "watched", [True, False]
)  # by autograd; in eval, without it, the fast path runs
@pytest.mark.parametrize("merged", [True, False])
def test_transformer_encoder_layer_applies_every_update(training, watched, merged, layer_options):
    model = transformer().train(training)
    before = model(SEQUENCE)
    assert smoa.inject(model, TRANSFORMER, **layer_options) == [
        "self_attn.out_proj",
        "linear1",
        "linear2",
    ]
    # In eval, the factors want a gradient, so that PyTorch leaves its fast path, which rounds otherwise.
    torch.testing.assert_close(model(SEQUENCE), before, rtol=0, atol=0 if training else 1e-5)
    expected = folded(fill(model))(SEQUENCE)
    assert (expected - before).abs().max() > 0.1
    if merged:
        smoa.merge(model)
    with torch.set_grad_enabled(watched):
        torch.testing.assert_close(
            model(SEQUENCE), expected, rtol=1e-4, atol=1e-5
        )  # float32, the fast path has its own kernels
    smoa.unload(model)
    assert torch.equal(model(SEQUENCE), before)


def test_fast_path_of_a_transformer_encoder_runs_with_adapters_in_it():
    model = nn.TransformerEncoder(transformer(), 2).eval()
    smoa.inject(model, TRANSFORMER, rank=4)
    fill(model)
    slow, mask = model(SEQUENCE), torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    with torch.no_grad():
        torch.testing.assert_close(model(SEQUENCE), slow, rtol=1e-4, atol=1e-5)
        fast = model(SEQUENCE, src_key_padding_mask=mask)
    torch.testing.assert_close(
        fast[~mask], model(SEQUENCE, src_key_padding_mask=mask)[~mask], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("target", TRANSFORMER)
def test_every_adapter_in_a_transformer_encoder_layer_receives_the_dense_gradient(target):
    model, plain, g = transformer(), transformer(), normal(2, 5, 8, seed=5, dtype=torch.float32)
    smoa.inject(model, [target], rank=4)
    ((name, layer),) = smoa.adapters(fill(model))
    W = plain.get_submodule(name).weight.requires_grad_()
    W.data.add_(layer.delta_weight().detach())
    model(SEQUENCE).backward(g)
    plain(SEQUENCE).backward(g)
    for A_k, B_k, rows, cols in zip(layer.A, layer.B, layer.rows, layer.cols):
        G_k = layer.scale * (W.grad * layer.original_weight())[rows][:, cols]
        torch.testing.assert_close(A_k.grad, B_k.mT @ G_k, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(B_k.grad, G_k @ A_k.mT, rtol=1e-4, atol=1e-4)
    assert gradients(model).keys() == {f"{name}.{factor}.{k}" for factor in "AB" for k in (0, 1)}


def test_multihead_attention_alone_trains_merges_and_unloads():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).requires_grad_(False)
    before = attention(SEQUENCE, SEQUENCE, SEQUENCE)[0]
    smoa.inject(attention, ["out_proj"], rank=4)
    assert torch.equal(attention(SEQUENCE, SEQUENCE, SEQUENCE)[0], before)
    unmerged = fill(attention)(SEQUENCE, SEQUENCE, SEQUENCE)[0]
    smoa.merge(attention)
    torch.testing.assert_close(attention(SEQUENCE, SEQUENCE, SEQUENCE)[0], unmerged)
    assert (unmerged - before).abs().max() > 0.1
    smoa.unload(attention)
    assert torch.equal(attention(SEQUENCE, SEQUENCE, SEQUENCE)[0], before)


def test_merged_out_proj_in_training_mode_raises_at_backward():
    model = transformer()
    smoa.inject(model, TRANSFORMER, rank=4)
    model.self_attn.out_proj.merge()  # the other two would train on, and the loss go down, without it
    with pytest.raises(RuntimeError, match="merged"):
        model(SEQUENCE).sum().backward()


# ---------------------------------------------------------------------------------------------------------------------
# GPT-2's Conv1D


class Conv1D(nn.Module):
    """The linear layer of Hugging Face's GPT-2: y = x weight + bias, with weight (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(nx, nf) * 0.5),
            nn.Parameter(torch.randn(nf)),
        )

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


def conv1d_and_linear(dtype, **layer_options):
    """The same layer twice, as Conv1D and as nn.Linear, with the same trained factors."""
    torch.manual_seed(0)
    conv, twin = Conv1D(5, 8).to(dtype), nn.Linear(8, 5, dtype=dtype)
    twin.weight.data.copy_(conv.weight.data.mT)
    twin.bias.data.copy_(conv.bias.data)
    return [fill(smoa.SMoALinear(base, **layer_options)) for base in (conv, twin)]


@pytest.mark.parametrize("layer_options", BUDGETS.values(), ids=BUDGETS)
def test_conv1d_is_adapted_as_the_linear_layer_that_it_is(layer_options):
    conv, twin = conv1d_and_linear(torch.float64, **layer_options)
    x = [normal(2, 3, 8, seed=1).requires_grad_() for _ in range(2)]
    outputs = [layer(x_) for layer, x_ in zip((conv, twin), x)]
    for y in outputs:
        y.square().sum().backward()
    assert torch.equal(conv.row_order, twin.row_order) and torch.equal(
        conv.col_order, twin.col_order
    )
    assert (conv.out_features, conv.in_features) == (5, 8) and conv.weight.shape == (8, 5)
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(x[0].grad, x[1].grad)
    torch.testing.assert_close(conv.weight, twin.weight.mT)
    assert_same_gradients(conv, twin)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_conv1d_merges_and_unmerges_in_its_own_orientation(dtype):
    conv, twin = conv1d_and_linear(dtype)
    before, x = bits(conv.base.weight), normal(3, 8, seed=1, dtype=dtype)
    conv.merge()
    twin.merge()
    torch.testing.assert_close(conv.base.weight, twin.base.weight.mT)
    torch.testing.assert_close(conv(x), twin(x))
    assert bits(conv.state_dict()["base.weight"]) == before
    conv.unmerge()
    assert bits(conv.base.weight) == before


def test_conv1d_model_starts_as_it_was_and_comes_back_plain(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.ModuleDict({"c_attn": Conv1D(24, 8), "c_proj": Conv1D(8, 24)})

    model, fresh, x = make(), make(), normal(2, 3, 8, seed=1, dtype=torch.float32)

    def run(m):
        return m["c_proj"](torch.tanh(m["c_attn"](x)))

    before = run(model)
    smoa.inject(model, ["c_attn", "c_proj"], rank=4)
    torch.testing.assert_close(run(model), before, rtol=0, atol=0)
    smoa.save(fill(model), tmp_path / "adapter")
    smoa.load(fresh, tmp_path / "adapter")
    assert torch.equal(run(fresh), run(model))
    merged = smoa.unload(fresh, merge=True)
    assert type(merged["c_attn"]) is Conv1D and merged["c_attn"].weight.shape == (8, 24)
    torch.testing.assert_close(run(merged), run(model))
    assert torch.equal(run(smoa.unload(model)), before)


# ---------------------------------------------------------------------------------------------------------------------
# Half precision


@pytest.mark.parametrize("layer_options", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_model_learns_in_float32_factors(base_dtype, autocast, layer_options):
    model = adapted(dtype=base_dtype, **layer_options)
    exact = adapted(
        dtype=base_dtype, **layer_options
    ).double()  # the same values, with room to compute
    x = X.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(X if autocast or base_dtype == torch.float32 else x)
    assert y.dtype == (torch.bfloat16 if autocast else base_dtype)
    y.float().square().sum().backward()
    expected = exact(x.double() if y.dtype == torch.bfloat16 else X.double())
    expected.square().sum().backward()
    eps = torch.finfo(y.dtype).eps
    # Two hidden layers, each rounded and then amplified by a slope of a few; the gradients are compared by their direction.
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=20 * eps)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert (
        {p.grad.dtype for p in trained.values()}
        == {p.dtype for p in trained.values()}
        == {torch.float32}
    )
    assert gradients(model).keys() == gradients(exact).keys() == trained.keys()
    here, there = (
        torch.cat([g.double().flatten() for g in gradients(m).values()]) for m in (model, exact)
    )
    assert (here - there).norm() <= 20 * eps * there.norm()


def test_a_small_update_is_not_lost_in_the_rounding_of_a_bfloat16_base():
    layer, _ = fill(smoa.SMoALinear(linear(generic(6, 6, 0).bfloat16(), bias=False), rank=2)), None
    x = normal(500, 6, seed=1, dtype=torch.bfloat16)
    for B_k in layer.B:
        B_k.data.mul_(1e-3)  # an update below half a unit in the last place of W0
    change = to_numpy(layer(x)) - to_numpy(layer.base(x))
    assert (to_numpy(layer.weight) == to_numpy(layer.base.weight)).mean() > 0.5 and (
        change != 0
    ).mean() > 0.02


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, *HALVES])
def test_a_model_may_change_its_dtype_merged_or_not(dtype, merged):
    model = adapted()
    if merged:
        smoa.merge(model)
    model.to(dtype)
    assert model(X.to(dtype)).dtype == dtype
    smoa.unload(model)
    assert [bits(p) for p in model.parameters()] == [bits(p) for p in Net().to(dtype).parameters()]


# ---------------------------------------------------------------------------------------------------------------------
# Dropout: on the adapter's input, and nowhere else


def diagonal(modulate, base_class=nn.Linear):
    """A layer whose update is diagonal, so that output i shows what became of input i: 24 blocks of 1 x 1."""
    torch.manual_seed(0)
    base = base_class(24, 24)
    options = dict(rank=24, num_blocks=24, dropout=0.25, modulate=modulate, order="natural")
    return fill(smoa.SMoALinear(base, **options))


@pytest.mark.parametrize("modulate", [True, False])
def test_dropout_zeroes_or_scales_each_input_of_the_update_alone(modulate):
    layer, x = diagonal(modulate), normal(200, 24, seed=1, dtype=torch.float32).sign()
    update = (layer(x) - layer.base(x)) / (x * layer.delta_weight().diagonal())
    kept = update > 0.5
    torch.testing.assert_close(
        update, kept / 0.75, rtol=0.02, atol=0.02
    )  # float32, after a difference of larger numbers
    assert abs(kept.float().mean() - 0.75) < 0.03  # five standard deviations of 4800 draws
    assert (kept[1:] != kept[:-1]).any() and (kept[:, 1:] != kept[:, :-1]).any()


@given(layers(dtypes=[torch.float32, torch.float64], dropout=0.9), seeds)
def test_dropout_does_nothing_in_eval_mode(drawn, seed):
    layer, W0 = drawn
    x = normal(3, layer.in_features, seed=seed, dtype=W0.dtype)
    y = layer.eval()(x)
    layer.dropout = 0.0
    assert torch.equal(y, layer(x))


@given(layers(dtypes=[torch.float64], trained=False, dropout=0.9), seeds)
def test_dropout_never_touches_the_base(drawn, seed):
    layer, W0 = drawn
    x = normal(3, layer.in_features, seed=seed, dtype=W0.dtype)
    assert layer.training and torch.equal(layer(x), layer.base(x))


@given(layers(dtypes=[torch.float64], dropout=0.5), seeds)
def test_dropout_is_the_dense_formula_on_the_input_that_it_leaves(drawn, seed):
    layer, W0 = drawn
    x = normal(3, layer.in_features, seed=seed, dtype=W0.dtype)
    torch.manual_seed(seed)
    y = layer(x)
    torch.manual_seed(seed)
    z = nn.functional.dropout(x, 0.5)
    exact = to_numpy(layer.base(x)) + to_numpy(z) @ to_numpy(layer.delta_weight()).T
    np.testing.assert_allclose(
        to_numpy(y), exact, rtol=1e-9, atol=1e-9
    )  # float64; entries up to about 1e3


# ---------------------------------------------------------------------------------------------------------------------
# What else people do to a linear layer: all on both ways to a gradient, plain and lean

both_ways = pytest.mark.parametrize("limit", [0, 2**20], ids=["lean", "plain"])


@both_ways
@pytest.mark.parametrize("merged", [False, True])
def test_output_may_be_changed_in_place(monkeypatch, limit, merged):
    monkeypatch.setattr(smoa, "_PLAIN_UP_TO", limit)
    layer, x = (
        fill(smoa.SMoALinear(nn.Linear(8, 6), rank=4)),
        normal(2, 3, 8, seed=1, dtype=torch.float32),
    )
    if merged:
        layer.merge()
    torch.testing.assert_close(nn.ReLU(inplace=True)(layer(x)), layer(x).relu())


@both_ways
def test_hooks_and_a_forward_of_its_own_on_the_base_act_as_before(monkeypatch, limit):
    monkeypatch.setattr(smoa, "_PLAIN_UP_TO", limit)
    x, base = normal(3, 8, seed=1, dtype=torch.float32), nn.Linear(8, 6)
    plain = base(x)
    hook = base.register_forward_hook(lambda module, args, output: 2 * output)
    layer = smoa.SMoALinear(base, rank=4)
    assert torch.equal(layer(x), 2 * plain)
    hook.remove()
    base.forward = lambda x: 3 * F.linear(x, base.weight, base.bias)
    assert torch.equal(layer(x), 3 * plain)


@both_ways
def test_a_base_that_is_unfrozen_learns(monkeypatch, limit):
    monkeypatch.setattr(smoa, "_PLAIN_UP_TO", limit)
    layer, x = (
        fill(smoa.SMoALinear(nn.Linear(8, 6), rank=4)),
        normal(3, 8, seed=1, dtype=torch.float32),
    )
    layer.base.requires_grad_(True)
    layer(x).sum().backward()
    assert torch.equal(layer.base.bias.grad, torch.full((6,), 3.0))
    dense = (1 + layer.delta_weight() / layer.base.weight) * x.sum(
        0
    )  # d/dW0 of sum(x (W0 + (B A) * W0)^T)
    torch.testing.assert_close(layer.base.weight.grad, dense.detach(), rtol=1e-3, atol=1e-4)


@both_ways
def test_a_bias_that_is_no_parameter_passes_its_gradient_on(monkeypatch, limit):
    monkeypatch.setattr(smoa, "_PLAIN_UP_TO", limit)
    base, bias = nn.Linear(8, 6), torch.zeros(6, requires_grad=True)
    del base.bias
    base.bias = bias
    smoa.SMoALinear(base, rank=4)(torch.ones(3, 8)).sum().backward()
    assert torch.equal(bias.grad, torch.full((6,), 3.0))


@both_ways
def test_a_float64_layer_under_autocast_computes_as_its_base_does(monkeypatch, limit):
    monkeypatch.setattr(smoa, "_PLAIN_UP_TO", limit)
    for layer_options in ({}, {"modulate": False}, {"dropout": 0.5}):
        layer, x = (
            smoa.SMoALinear(linear(normal(6, 8, seed=1)), rank=4, **layer_options),
            normal(3, 8, seed=2),
        )
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), layer.base(x)) and layer(x).dtype == torch.float64
            assert fill(layer).delta_weight().dtype == torch.float64


def test_a_weight_that_a_hook_computes_is_refused():
    for compute in (
        lambda base: prune.l1_unstructured(base, "weight", 0.5),
        nn.utils.parametrizations.weight_norm,
    ):
        with pytest.raises(TypeError, match="computed"):
            smoa.SMoALinear(compute(nn.Linear(8, 6)), rank=4)


def test_a_numpy_scalar_for_an_option_is_saved_and_loaded(tmp_path):
    model = adapted(alpha=np.float64(8), dropout=np.float32(0.5))
    smoa.save(model, tmp_path / "adapter.pt")
    smoa.load(fresh := Net(), tmp_path / "adapter.pt")
    assert fresh.first.alpha == 8 and fresh.first.dropout == 0.5 and fresh.first.scale == 2


def test_an_unload_inside_disabled_leaves_the_plain_base():
    model = adapted()
    base = bits(model.first.base.weight)
    smoa.merge(model)
    with smoa.disabled(model):
        smoa.unload(model)
    assert type(model.first) is nn.Linear and bits(model.first.weight) == base


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile, activation checkpointing


@pytest.mark.parametrize(
    "layer_options", [*BUDGETS.values(), dict(dropout=1e-9)], ids=[*BUDGETS, "dropout"]
)
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_compiled_model_computes_and_learns_the_same(base_dtype, layer_options):
    torch._dynamo.reset()
    model, plain = (adapted(dtype=base_dtype, **layer_options) for _ in range(2))
    compiled, x = torch.compile(model, fullgraph=True, backend="aot_eager"), X.to(base_dtype)
    for m in (compiled, plain):
        m(x).float().square().sum().backward()
    tolerance = 20 * torch.finfo(base_dtype).eps
    torch.testing.assert_close(compiled(x), plain(x), rtol=tolerance, atol=tolerance)
    assert_same_gradients(
        model,
        plain,
        rtol=tolerance,
        atol=tolerance * max(g.abs().max() for g in gradients(plain).values()),
    )


def test_verbs_reach_through_torch_compile(tmp_path):
    torch._dynamo.reset()
    model, plain = Net(), Net()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), plain(X))
    assert (
        smoa.inject(compiled, ["first", "second"], rank=4)
        == ["first", "second"]
        == [name for name, _ in smoa.adapters(compiled)]
    )
    smoa.save(fill(compiled), tmp_path / "adapter")
    assert smoa.load(plain, tmp_path / "adapter") == ["first", "second"]
    expected = plain(X)
    torch.testing.assert_close(compiled(X), expected)  # it has noticed the adapters
    smoa.merge(compiled.eval())
    torch.testing.assert_close(compiled(X), expected)
    with smoa.disabled(compiled):
        torch.testing.assert_close(compiled(X), Net()(X))
    assert smoa.unload(compiled) is compiled and torch.equal(model(X), Net()(X))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    "layer_options", [*BUDGETS.values(), dict(dropout=0.5)], ids=[*BUDGETS, "dropout"]
)
def test_checkpointed_model_learns_the_same(layer_options, use_reentrant):
    model, plain = (adapted(**layer_options) for _ in range(2))
    for m, run in (
        (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)),
        (plain, plain),
    ):
        torch.manual_seed(1)
        run(X.clone().requires_grad_()).square().sum().backward()
    assert_same_gradients(model, plain, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# DistributedDataParallel


def test_two_processes_learn_what_one_would_from_the_whole_batch(tmp_path):
    script = """
        import gc
        import sys
        from pathlib import Path
        import torch
        import torch.distributed as dist
        from torch import nn
        import smoa

        rank, here = int(sys.argv[1]), Path(__file__).parent
        dist.init_process_group("gloo", init_method=f"file://{here / 'meet'}", rank=rank, world_size=2)

        def make(**layer_options):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
            smoa.inject(model, "0|2", **layer_options)
            for _, layer in smoa.adapters(model):
                for B_k in layer.B:
                    nn.init.normal_(B_k)
            return model

        cases = [dict(rank=4, num_blocks=2), dict(rank=2, num_blocks=3), dict(rank=2, num_blocks=2, dropout=0.5)]
        for case, layer_options in enumerate(cases):
            alone, model = make(**layer_options), nn.parallel.DistributedDataParallel(make(**layer_options))
            x = torch.randn(8, 6)
            if "dropout" in layer_options:
                alone.eval(), model.eval()
            for m, batch in ((alone, x), (model, x[4 * rank :][:4])):
                optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
                for _ in range(2):
                    optimizer.zero_grad()
                    m(batch).square().sum(-1).mean().backward()
                    optimizer.step()
            for (name, p), q in zip(alone.named_parameters(), model.parameters()):
                torch.testing.assert_close(p, q, msg=lambda message: f"{name}: {message}")
            assert [name for name, _ in smoa.adapters(model)] == ["0", "2"]
            smoa.save(model, here / f"{case}.{rank}")
            dist.barrier()
            files = [(here / f"{case}.{r}").read_bytes() for r in (0, 1)]
            assert files[0] == files[1]
            trained = model(x)
            plain = smoa.unload(make(**layer_options))
            assert smoa.load(plain, here / f"{case}.0") == ["0", "2"] and torch.equal(plain.train(alone.training)(x), trained)
            smoa.merge(model.eval())
            torch.testing.assert_close(model(x), trained)
        late = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
        for verb in (lambda: smoa.inject(late, ["0"]), lambda: smoa.load(late, here / "0.0")):
            try:
                verb()
                raise SystemExit("factors that are never synchronised")
            except ValueError as error:
                assert "before DistributedDataParallel" in str(error), error
        del model, late, m, verb
        gc.collect()  # no DistributedDataParallel may outlive its process group
        dist.destroy_process_group()
    """
    run_alone(tmp_path, script, (0,), (1,))
