"""smoa.py in other people's models.

Alone in an empty folder, under parents that read a weight past `forward`, in half precision,
compiled, checkpointed, on several processes.
"""

import copy
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from strategies import (
    HALVES,
    Net,
    X,
    adapted,
    bits,
    fill,
    generic,
    input_of,
    layers,
    linear,
    normal,
    same_orders,
    seeds,
    to_numpy,
    trained_names,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import smoa

BUDGETS = {
    "r past K": {"rank": 4, "num_blocks": 2},
    "r below K": {"rank": 2, "num_blocks": 4},  # two blocks have no branch
    "one block": {"rank": 2, "num_blocks": 1},
    "no anchor": {"modulate": False},
}
each_budget = pytest.mark.parametrize("layer_options", BUDGETS.values(), ids=BUDGETS)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def flat_gradient(model):
    """All gradients of the model in one float64 vector."""
    return torch.cat([grad.double().flatten() for grad in gradients(model).values()])


def assert_same_gradients(model, other, rtol=1e-5, atol=1e-5):
    """float32 sums in another order."""
    assert gradients(model)
    torch.testing.assert_close(gradients(model), gradients(other), rtol=rtol, atol=atol)


# --------------------------------------------------------------------------------------------------
# Alone in an empty folder


def run_alone(folder, script, processes=1):
    """Run the script beside a lone copy of smoa.py, once for each process, with its number."""
    shutil.copy(smoa.__file__, folder / "smoa.py")
    (folder / "script.py").write_text(textwrap.dedent(script))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = "1"
    environment["GLOO_SOCKET_IFNAME"] = "lo"  # the processes meet on 127.0.0.1
    command = [sys.executable, "-W", "error::UserWarning:smoa", "script.py"]
    running = []
    for number in range(processes):
        process = subprocess.Popen(
            [*command, str(number)],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        running.append(process)
    try:
        outputs = [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, output in zip(running, outputs):
        assert process.returncode == 0, output


WHOLE_LIFE = """
    from pathlib import Path

    import smoa

    here = Path(__file__).parent
    assert Path(smoa.__file__).parent == here
    assert {path.name for path in here.glob("*.py")} == {"script.py", "smoa.py"}
    assert not {"numpy", "gpt_mini", "tqdm"} & set(vars(smoa))

    import torch
    from torch import nn


    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))


    model, x, target = make(), torch.randn(16, 6), torch.randn(16, 3)
    before = model(x)
    assert smoa.inject(model, "0|2", rank=4, num_blocks=2) == ["0", "2"]
    assert torch.equal(model(x), before)

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
    assert smoa.load(fresh, "adapter.pt") == ["0", "2"]
    assert torch.equal(fresh(x), trained)
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
    files = {path.name for path in here.iterdir() if path.is_file()}
    assert files == {"adapter.pt", "script.py", "smoa.py"}
"""


def test_smoa_alone_in_an_empty_folder_lives_a_whole_life(tmp_path):
    run_alone(tmp_path, WHOLE_LIFE)


def test_smoa_imports_torch_and_the_standard_library_only():
    imported = set()
    for line in Path(smoa.__file__).read_text().splitlines():
        if line.startswith(("import ", "from ")):
            imported.add(line.split()[1].partition(".")[0])
    assert "torch" in imported
    assert imported - {"torch"} <= sys.stdlib_module_names


# --------------------------------------------------------------------------------------------------
# nn.TransformerEncoderLayer, whose attention reads out_proj.weight, and whose fast path reads every
# weight, past `forward`

TRANSFORMER = ["out_proj", "linear1", "linear2"]
SEQUENCE = normal(2, 5, 8, seed=4, dtype=torch.float32)


def transformer():
    """Frozen from the start: for weights that want no gradient, torch's kernels round otherwise."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return model.requires_grad_(False)


def folded(model):
    """A plain copy whose weights are W0 + delta_W, put there by hand."""
    plain = transformer()
    for name, layer in smoa.adapters(model):
        W = layer.original_weight() + layer.delta_weight()
        plain.get_submodule(name).weight.copy_(W.detach())
    return plain.train(model.training)


@each_budget
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("watched", [True, False])  # in eval, unwatched by autograd: the fast path
@pytest.mark.parametrize("merged", [True, False])
def test_transformer_encoder_layer_applies_every_update(training, watched, merged, layer_options):
    model = transformer().train(training)
    before = model(SEQUENCE)
    names = smoa.inject(model, TRANSFORMER, **layer_options)
    assert names == ["self_attn.out_proj", "linear1", "linear2"]
    # In eval, factors that want a gradient keep PyTorch from its fast path, which rounds otherwise.
    torch.testing.assert_close(model(SEQUENCE), before, rtol=0, atol=0 if training else 1e-5)
    expected = folded(fill(model))(SEQUENCE)
    assert (expected - before).abs().max() > 0.1
    if merged:
        smoa.merge(model)
    with torch.set_grad_enabled(watched):
        y = model(SEQUENCE)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)  # float32, kernels of its own
    smoa.unload(model)
    assert torch.equal(model(SEQUENCE), before)


def test_fast_path_of_a_transformer_encoder_runs_with_adapters_in_it():
    model = nn.TransformerEncoder(transformer(), 2).eval()
    smoa.inject(model, TRANSFORMER, rank=4)
    slow = fill(model)(SEQUENCE)
    with torch.no_grad():
        torch.testing.assert_close(model(SEQUENCE), slow, rtol=1e-4, atol=1e-5)


def test_fast_path_of_a_transformer_encoder_runs_over_padded_sequences():
    model = nn.TransformerEncoder(transformer(), 2).eval()
    smoa.inject(model, TRANSFORMER, rank=4)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    slow = fill(model)(SEQUENCE, src_key_padding_mask=padding)
    with torch.no_grad():
        fast = model(SEQUENCE, src_key_padding_mask=padding)
    torch.testing.assert_close(fast[~padding], slow[~padding], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", TRANSFORMER)
def test_every_adapter_in_a_transformer_encoder_layer_receives_the_dense_gradient(target):
    model, plain = transformer(), transformer()
    g = normal(2, 5, 8, seed=5, dtype=torch.float32)
    smoa.inject(model, [target], rank=4)
    ((name, layer),) = smoa.adapters(fill(model))
    W = plain.get_submodule(name).weight
    W.add_(layer.delta_weight().detach())
    W.requires_grad_()
    model(SEQUENCE).backward(g)
    plain(SEQUENCE).backward(g)
    G = layer.scale * W.grad * layer.original_weight()
    for A_k, B_k, rows, cols in zip(layer.A, layer.B, layer.rows, layer.cols):
        G_k = G[rows][:, cols]
        torch.testing.assert_close(A_k.grad, B_k.mT @ G_k, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(B_k.grad, G_k @ A_k.mT, rtol=1e-4, atol=1e-4)
    assert gradients(model).keys() == trained_names(model)


def test_multihead_attention_alone_trains_merges_and_unloads():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).requires_grad_(False)

    def attend():
        return attention(SEQUENCE, SEQUENCE, SEQUENCE)[0]

    before = attend()
    smoa.inject(attention, ["out_proj"], rank=4)
    assert torch.equal(attend(), before)
    fill(attention)
    unmerged = attend()
    assert (unmerged - before).abs().max() > 0.1
    smoa.merge(attention)
    torch.testing.assert_close(attend(), unmerged)
    smoa.unload(attention)
    assert torch.equal(attend(), before)


def test_merged_out_proj_in_training_mode_raises_at_backward():
    model = transformer()
    smoa.inject(model, TRANSFORMER, rank=4)
    # The other two would train on, and the loss go down, without it.
    model.self_attn.out_proj.merge()
    with pytest.raises(RuntimeError, match="merged"):
        model(SEQUENCE).sum().backward()


# --------------------------------------------------------------------------------------------------
# GPT-2's Conv1D


class Conv1D(nn.Module):
    """The linear layer of Hugging Face's GPT-2: y = x weight + bias, with weight (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view(*x.shape[:-1], -1)


def conv1d_and_linear(dtype, **layer_options):
    """The same layer twice, as Conv1D and as nn.Linear, with the same trained factors."""
    torch.manual_seed(0)
    conv = Conv1D(5, 8).to(dtype)
    twin = nn.Linear(8, 5, dtype=dtype)
    twin.weight.data.copy_(conv.weight.data.mT)
    twin.bias.data.copy_(conv.bias.data)
    conv = smoa.SMoALinear(conv, **layer_options)
    twin = smoa.SMoALinear(twin, **layer_options)
    return fill(conv), fill(twin)


@each_budget
def test_conv1d_is_adapted_as_the_linear_layer_that_it_is(layer_options):
    conv, twin = conv1d_and_linear(torch.float64, **layer_options)
    assert (conv.out_features, conv.in_features) == (5, 8)
    assert conv.weight.shape == (8, 5)
    torch.testing.assert_close(conv.weight, twin.weight.mT)
    assert same_orders((conv.row_order, conv.col_order), (twin.row_order, twin.col_order))


@each_budget
def test_conv1d_computes_and_learns_as_the_linear_layer_that_it_is(layer_options):
    conv, twin = conv1d_and_linear(torch.float64, **layer_options)
    x = input_of(conv, 2, 3, seed=1).requires_grad_()
    x_twin = input_of(twin, 2, 3, seed=1).requires_grad_()
    y, y_twin = conv(x), twin(x_twin)
    y.square().sum().backward()
    y_twin.square().sum().backward()
    torch.testing.assert_close(y, y_twin)
    torch.testing.assert_close(x.grad, x_twin.grad)
    assert_same_gradients(conv, twin)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_conv1d_merges_and_unmerges_in_its_own_orientation(dtype):
    conv, twin = conv1d_and_linear(dtype)
    before = bits(conv.base.weight)
    x = input_of(conv, 3, seed=1)
    conv.merge()
    twin.merge()
    torch.testing.assert_close(conv.base.weight, twin.base.weight.mT)
    torch.testing.assert_close(conv(x), twin(x))
    assert bits(conv.original_weight().mT) == before
    conv.unmerge()
    assert bits(conv.base.weight) == before


class ShiftedConv1D(Conv1D):
    def forward(self, x):
        return super().forward(x) + 1


def test_a_conv1d_with_a_forward_of_its_own_is_asked(way):
    torch.manual_seed(0)
    layer = fill(smoa.SMoALinear(ShiftedConv1D(5, 8), rank=4))
    x = input_of(layer, 3, seed=1).float()
    W = layer.original_weight() + layer.delta_weight()
    torch.testing.assert_close(layer(x), F.linear(x, W, layer.bias) + 1)


class TwoConv1Ds(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.c_attn = Conv1D(24, 8)
        self.c_proj = Conv1D(8, 24)

    def forward(self, x):
        return self.c_proj(torch.tanh(self.c_attn(x)))


def test_conv1d_model_starts_as_it_was_and_comes_back_plain(tmp_path):
    model, fresh = TwoConv1Ds(), TwoConv1Ds()
    before = model(SEQUENCE)
    smoa.inject(model, ["c_attn", "c_proj"], rank=4)
    assert torch.equal(model(SEQUENCE), before)
    trained = fill(model)(SEQUENCE)
    smoa.save(model, tmp_path / "adapter")
    smoa.load(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(SEQUENCE), trained)
    merged = smoa.unload(fresh, merge=True)
    assert type(merged.c_attn) is Conv1D
    assert merged.c_attn.weight.shape == (8, 24)
    torch.testing.assert_close(merged(SEQUENCE), trained)
    assert torch.equal(smoa.unload(model)(SEQUENCE), before)


# --------------------------------------------------------------------------------------------------
# Half precision


@each_budget
@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_model_learns_in_float32_factors(base_dtype, autocast, layer_options):
    model = adapted(dtype=base_dtype, **layer_options)
    exact = adapted(dtype=base_dtype, **layer_options).double()  # same values, room to compute
    x = X if autocast else X.to(base_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    assert y.dtype == (torch.bfloat16 if autocast else base_dtype)
    expected = exact(x.to(y.dtype).double())
    y.float().square().sum().backward()
    expected.square().sum().backward()
    # Two hidden layers, each rounded and then amplified by a slope of a few; the gradients are
    # compared by their direction.
    tolerance = 20 * torch.finfo(y.dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance)
    assert gradients(model).keys() == gradients(exact).keys() == trained_names(model)
    assert {grad.dtype for grad in gradients(model).values()} == {torch.float32}
    error = flat_gradient(model) - flat_gradient(exact)
    assert error.norm() <= tolerance * flat_gradient(exact).norm()


def test_a_small_update_is_not_lost_in_the_rounding_of_a_bfloat16_base():
    base = linear(generic(6, 6, 0).bfloat16(), bias=False)
    layer = fill(smoa.SMoALinear(base, rank=2))
    for B_k in layer.B:
        B_k.data.mul_(1e-3)  # an update below half a unit in the last place of W0
    x = input_of(layer, 500, seed=1)
    assert (layer.weight == layer.base.weight).double().mean() > 0.5
    assert (layer(x) != layer.base(x)).double().mean() > 0.02


def test_a_small_update_is_not_lost_where_float32_products_drop_bits(monkeypatch):
    layer = fill(smoa.SMoALinear(linear(generic(64, 64, 0).float(), bias=False), rank=8))
    x = input_of(layer, 20, seed=1)
    product = F.linear  # TF32 keeps 10 bits of a factor: W0 + delta_W must not be one
    factors = []

    def watched(x, weight, bias=None):
        factors.append(weight.detach().clone())
        return product(x, weight, bias)

    monkeypatch.setattr(F, "linear", watched)
    torch.set_float32_matmul_precision("high")
    try:
        y = layer(x)
    finally:
        torch.set_float32_matmul_precision("highest")
    expected = x @ (layer.base.weight + layer.delta_weight()).T
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
    whole = [weight for weight in factors if weight.shape == layer.base.weight.shape]
    assert all(torch.equal(weight, layer.base.weight) for weight in whole)


def test_a_small_update_is_not_lost_in_the_rounding_of_bfloat16_autocast():
    base = linear(generic(64, 64, 0).float(), bias=False)
    layer = fill(smoa.SMoALinear(base, rank=8))
    share = layer.delta_weight().norm() / base.weight.norm()
    for B_k in layer.B:
        B_k.data.mul_(5e-4 / share)  # an update of 0.05 %
    x = input_of(layer, 200, seed=1)
    exact = x @ layer.delta_weight().T
    with torch.autocast("cpu", torch.bfloat16):
        change = layer(x).float() - layer.base(x).float()
    # The outputs are rounded to bfloat16: about 0.5 is left. W0 + delta_W rounded, about 0.25.
    assert F.cosine_similarity(change.flatten(), exact.flatten(), dim=0) > 0.4


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, *HALVES])
def test_a_model_may_change_its_dtype_merged_or_not(dtype, merged):
    model, plain = adapted(), Net().to(dtype)
    before = model.first.row_order.clone(), model.first.col_order.clone()
    if merged:
        smoa.merge(model)
    model.to(dtype)
    assert model(X.to(dtype)).dtype == dtype
    assert same_orders((model.first.row_order, model.first.col_order), before)
    smoa.unload(model)
    assert [bits(p) for p in model.parameters()] == [bits(p) for p in plain.parameters()]


# --------------------------------------------------------------------------------------------------
# Dropout: on the adapter's input, and nowhere else


def diagonal(modulate):
    """A layer of 24 blocks of 1 x 1: output i shows what became of input i."""
    torch.manual_seed(0)
    base = nn.Linear(24, 24)
    order = "natural"
    layer = smoa.SMoALinear(base, 24, 24, dropout=0.25, modulate=modulate, order=order)
    return fill(layer)


@pytest.mark.parametrize("modulate", [True, False])
def test_dropout_zeroes_or_scales_each_input_of_the_update_alone(modulate):
    layer = diagonal(modulate)
    x = input_of(layer, 200, seed=1).sign()
    update = (layer(x) - layer.base(x)) / (x * layer.delta_weight().diagonal())
    kept = update > 0.5
    # float32, after a difference of larger numbers
    torch.testing.assert_close(update, kept / 0.75, rtol=0.02, atol=0.02)
    assert abs(kept.float().mean() - 0.75) < 0.03  # five standard deviations of 4800 draws
    assert (kept[1:] != kept[:-1]).any()
    assert (kept[:, 1:] != kept[:, :-1]).any()


@given(layers(dtypes=[torch.float32, torch.float64], dropout=0.9), seeds)
def test_dropout_does_nothing_in_eval_mode(drawn, seed):
    layer, _ = drawn
    x = input_of(layer, 3, seed=seed)
    y = layer.eval()(x)
    layer.dropout = 0.0
    assert torch.equal(y, layer(x))


@given(layers(dtypes=[torch.float64], trained=False, dropout=0.9), seeds)
def test_dropout_never_touches_the_base(drawn, seed):
    layer, _ = drawn
    x = input_of(layer, 3, seed=seed)
    assert layer.training
    assert torch.equal(layer(x), layer.base(x))


@given(layers(dtypes=[torch.float64], dropout=0.5), seeds)
def test_dropout_is_the_dense_formula_on_the_input_that_it_leaves(drawn, seed):
    layer, _ = drawn
    x = input_of(layer, 3, seed=seed)
    torch.manual_seed(seed)
    y = layer(x)
    torch.manual_seed(seed)
    z = F.dropout(x, 0.5)
    exact = to_numpy(layer.base(x)) + to_numpy(z) @ to_numpy(layer.delta_weight()).T
    # float64; entries up to about 1e3
    np.testing.assert_allclose(to_numpy(y), exact, rtol=1e-9, atol=1e-9)


# --------------------------------------------------------------------------------------------------
# What else people do to a linear layer: all on both ways to a gradient, plain and lean


def layer_6_8(**layer_options):
    return fill(smoa.SMoALinear(nn.Linear(8, 6), rank=4, **layer_options))


@pytest.mark.parametrize("merged", [False, True])
def test_output_may_be_changed_in_place(way, merged):
    layer = layer_6_8()
    x = input_of(layer, 2, 3, seed=1)
    if merged:
        layer.merge()
    torch.testing.assert_close(nn.ReLU(inplace=True)(layer(x)), layer(x).relu())


def test_hooks_on_the_base_act_as_before(way):
    base = nn.Linear(8, 6)
    x = normal(3, 8, seed=1, dtype=torch.float32)
    plain = base(x)
    base.register_forward_hook(lambda module, args, output: 2 * output)
    layer = smoa.SMoALinear(base, rank=4)
    assert torch.equal(layer(x), 2 * plain)


def test_a_forward_put_on_the_base_is_asked(way):
    base = nn.Linear(8, 6)
    x = normal(3, 8, seed=1, dtype=torch.float32)
    layer = smoa.SMoALinear(base, rank=4)
    plain = base(x)
    base.forward = lambda x: 3 * F.linear(x, base.weight, base.bias)
    assert torch.equal(layer(x), 3 * plain)


def test_orders_follow_factors_that_are_moved_one_by_one(way):
    layer = layer_6_8(num_blocks=2)
    for module in layer.modules():  # as DataParallel's replicas and offloading do it
        for name, p in module._parameters.items():
            module._parameters[name] = nn.Parameter(p.detach().to("meta"), p.requires_grad)
    assert {index.device.type for index in (*layer.rows, *layer.cols)} == {"meta"}
    y = layer(torch.empty(3, 8, device="meta"))
    assert y.shape == (3, 6) and y.is_meta


class Doubled(nn.Module):
    def forward(self, W):
        return 2 * W


def test_a_base_parametrized_later_computes_with_its_new_weight():
    layer = smoa.SMoALinear(nn.Linear(6, 4), rank=4)
    for B_k in layer.B:
        nn.init.normal_(B_k)
    nn.utils.parametrize.register_parametrization(layer.base, "weight", Doubled())
    x = torch.randn(3, 6)
    expected = F.linear(x, layer.base.weight + layer.delta_weight(), layer.bias)
    torch.testing.assert_close(layer(x), expected)


def test_a_base_that_is_unfrozen_learns(way):
    layer = layer_6_8()
    x = input_of(layer, 3, seed=1)
    layer.base.requires_grad_(True)
    layer(x).sum().backward()
    assert torch.equal(layer.base.bias.grad, torch.full((6,), 3.0))
    # d/dW0 of sum(x (W0 + (B A) * W0)^T)
    dense = (1 + layer.delta_weight() / layer.base.weight) * x.sum(0)
    torch.testing.assert_close(layer.base.weight.grad, dense.detach(), rtol=1e-3, atol=1e-4)


def test_a_bias_that_is_no_parameter_passes_its_gradient_on(way):
    base = nn.Linear(8, 6)
    bias = torch.zeros(6, requires_grad=True)
    del base.bias
    base.bias = bias
    layer = smoa.SMoALinear(base, rank=4)
    layer(torch.ones(3, 8)).sum().backward()
    assert torch.equal(bias.grad, torch.full((6,), 3.0))


@pytest.mark.parametrize("layer_options", [{}, {"modulate": False}, {"dropout": 0.5}], ids=repr)
def test_a_float64_layer_under_autocast_computes_as_its_base_does(way, layer_options):
    layer = smoa.SMoALinear(linear(generic(6, 8, seed=1)), rank=4, **layer_options)
    x = input_of(layer, 3, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.float64
        assert torch.equal(y, layer.base(x))
        assert fill(layer).delta_weight().dtype == torch.float64


def pruned(base):
    return prune.l1_unstructured(base, "weight", 0.5)


@pytest.mark.parametrize("compute", [pruned, nn.utils.parametrizations.weight_norm])
def test_a_weight_that_a_hook_computes_is_refused(compute):
    with pytest.raises(TypeError, match="computed"):
        smoa.SMoALinear(compute(nn.Linear(8, 6)), rank=4)


def test_a_numpy_scalar_for_an_option_is_saved_and_loaded(tmp_path):
    model, fresh = adapted(alpha=np.float64(8), dropout=np.float32(0.5)), Net()
    smoa.save(model, tmp_path / "adapter.pt")
    smoa.load(fresh, tmp_path / "adapter.pt")
    assert fresh.first.alpha == 8
    assert fresh.first.dropout == 0.5
    assert fresh.first.scale == 2


def test_an_unload_inside_disabled_leaves_the_plain_base():
    model = adapted()
    smoa.merge(model)
    with smoa.disabled(model):
        smoa.unload(model)
    assert type(model.first) is nn.Linear
    assert bits(model.first.weight) == bits(Net().first.weight)


# --------------------------------------------------------------------------------------------------
# Bases with a forward, or with hooks, of their own


class Scaled(nn.Linear):
    """As muP's readout has it."""

    def forward(self, x):
        return super().forward(x / 4)


class Activated(nn.Linear):
    def forward(self, x):
        return F.gelu(super().forward(x))


class Ternary(nn.Linear):
    """As BitNet's layers: twice the weight gives twice the output, and yet it is not linear."""

    def forward(self, x):
        size = self.weight.abs().mean().clamp(min=1e-8)
        return F.linear(x, (self.weight / size).round().clamp(-1, 1) * size, self.bias)


class Clamped(nn.Linear):
    """Linear only as long as the outputs are small."""

    def forward(self, x):
        return super().forward(x).clamp(-5, 5)


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x))


class Conv1DByNameAlone(nn.Linear):
    """A pointwise convolution, with its weight as nn.Linear keeps it."""


Conv1DByNameAlone.__name__ = "Conv1D"


@pytest.mark.parametrize("dropout", [0.0, 1e-20])  # which drops nothing, but asks for two products
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_forward_of_its_own_computes_the_same_merged_and_unmerged(way, dtype, dropout):
    layer = fill(smoa.SMoALinear(Scaled(8, 6).to(dtype), rank=4, dropout=dropout))
    x = input_of(layer, 5, seed=1)
    y = layer(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        autocast = layer(x)
    layer.merge()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y, layer(x), rtol=8 * eps, atol=8 * eps)
    torch.testing.assert_close(autocast, layer(x), rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("make", [Activated, Ternary, Clamped])
def test_a_forward_that_is_not_linear_in_its_weight_is_right_as_one_product_or_refused(way, make):
    layer = fill(smoa.SMoALinear(make(8, 6), rank=4))
    x = input_of(layer, 5, seed=1)
    expected = torch.func.functional_call(layer.base, {"weight": layer.weight}, (x,))
    torch.testing.assert_close(layer(x), expected)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="not linear"):
        layer(x)
    dropping = fill(smoa.SMoALinear(make(8, 6), rank=4, dropout=0.5))
    with pytest.raises(RuntimeError, match=f"{make.__name__} has a forward of its own"):
        dropping(x)


@pytest.mark.parametrize("before", [True, False])
def test_a_forward_put_on_one_module_is_right_as_one_product_or_refused(way, before):
    base = nn.Linear(8, 6)
    twice = types.MethodType(lambda self, x: 2 * F.linear(x, self.weight, self.bias), base)
    if before:
        base.forward = twice
    layer = fill(smoa.SMoALinear(base, rank=4))
    base.forward = twice
    x = input_of(layer, 5, seed=1)
    torch.testing.assert_close(layer(x), 2 * F.linear(x, layer.weight, layer.bias))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="of its own"):
        layer(x)


def test_a_base_that_another_tool_puts_in_the_place_of_the_first_is_asked_again():
    layer = fill(smoa.SMoALinear(Scaled(8, 6), rank=4, dropout=0.5))
    x = input_of(layer, 5, seed=1)
    layer(x)
    layer.base = Ternary(8, 6).requires_grad_(False)
    with pytest.raises(RuntimeError, match="Ternary has a forward of its own"):
        layer(x)


def test_asking_a_base_whether_it_is_linear_leaves_no_trace_in_it():
    base = torch.ao.nn.qat.Linear(8, 6, qconfig=torch.ao.quantization.get_default_qat_qconfig())
    before = copy.deepcopy(base.state_dict())
    smoa.SMoALinear(base, rank=4)
    assert all(torch.equal(before[key], tensor) for key, tensor in base.state_dict().items())
    draws = []
    for make in (nn.Linear, Noisy):
        base = make(8, 6)
        torch.manual_seed(0)
        smoa.SMoALinear(base, rank=4)
        draws.append(torch.rand(1))
    assert torch.equal(*draws)


def test_a_linear_layer_by_the_name_of_conv1d_keeps_its_orientation(way):
    base = Conv1DByNameAlone(8, 8)
    x = normal(3, 8, seed=1, dtype=torch.float32)
    layer = smoa.SMoALinear(base, rank=4)
    assert torch.equal(layer(x), F.linear(x, base.weight, base.bias))


@pytest.mark.parametrize("how", ["float32", "bfloat16", "autocast", "dropout"])
def test_a_backward_hook_of_the_base_acts_on_the_whole_sum(way, how):
    base = nn.Linear(8, 6)
    layer = fill(smoa.SMoALinear(base, rank=4, dropout=0.5 if how == "dropout" else 0.0))
    layer.base.register_full_backward_pre_hook(lambda module, gradients: (gradients[0] * 0,))
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    layer.base.to(dtype)
    x = torch.randn(5, 8, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        y = layer(x)
    y.sum().backward()
    assert all(p.grad.count_nonzero() == 0 for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("make", [Scaled, nn.Linear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_that_share_a_model_do_not_disturb_each_other(make, dtype):
    torch.manual_seed(0)
    layer = fill(smoa.SMoALinear(make(64, 64).to(dtype), rank=4)).eval()
    layer.base.register_forward_hook(lambda module, args, output: None)
    before = bits(layer.base.weight)
    inputs = [input_of(layer, 64, seed=seed) for seed in range(100)]
    expected = [layer(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(layer, inputs))
    assert all(torch.equal(*pair) for pair in zip(outputs, expected))
    assert bits(layer.base.weight) == before and len(layer.base._forward_hooks) == 1


@pytest.mark.parametrize("shape", [(4, 6), (2, 2, 4), (0, 4)])
def test_an_input_of_another_width_is_refused_as_by_the_base(way, shape):
    layer = fill(smoa.SMoALinear(nn.Linear(8, 6), rank=4))
    with pytest.raises(RuntimeError, match="mat1 and mat2|size"):
        layer(torch.randn(shape))


def test_a_sparse_input_is_taken_as_by_the_base(way):
    layer = fill(smoa.SMoALinear(nn.Linear(8, 6), rank=4))
    x = torch.randn(3, 8)
    torch.testing.assert_close(layer(x.to_sparse()), layer(x))


@pytest.mark.parametrize("of_base, of_factors", [("float64", "float32"), ("float32", "bfloat16")])
def test_factors_in_another_dtype_than_the_base_compute_and_learn(way, of_base, of_factors):
    layer = fill(smoa.SMoALinear(nn.Linear(8, 6), rank=4))
    layer.base.to(getattr(torch, of_base))
    for p in [*layer.A, *layer.B]:
        p.data = p.data.to(getattr(torch, of_factors))
    x = input_of(layer, 5, seed=1).to(layer.base.weight.dtype)
    wanted = [*layer.A, *layer.B]
    grads = torch.autograd.grad(layer(x).square().sum(), wanted)
    expected = F.linear(x, layer.original_weight() + layer.delta_weight(), layer.bias)
    eps = torch.finfo(getattr(torch, of_factors)).eps
    torch.testing.assert_close(layer(x), expected, rtol=8 * eps, atol=8 * eps)
    for grad, other in zip(grads, torch.autograd.grad(expected.square().sum(), wanted)):
        assert grad.dtype == other.dtype
        assert (grad - other).norm() <= 8 * eps * other.norm()


@pytest.mark.parametrize("verb", ["unload", "load"])
def test_an_adapted_layer_that_is_compiled_by_itself_is_not_taken_out(verb, tmp_path):
    model = adapted()
    smoa.save(model, tmp_path / "file")
    before = model(X)
    model.first = torch.compile(model.first, backend="eager")
    verbs = {"unload": smoa.unload, "load": lambda model: smoa.load(model, tmp_path / "file")}
    with pytest.raises(ValueError, match="first: this adapted layer is compiled by itself"):
        verbs[verb](model)
    torch.testing.assert_close(model(X), before)


# --------------------------------------------------------------------------------------------------
# torch.func, torch.export, nested tensors: as transparent as the base


def float64_layer(**layer_options):
    return fill(smoa.SMoALinear(linear(generic(6, 8, 0)), rank=4, **layer_options))


def half_layer():
    return fill(smoa.SMoALinear(linear(generic(6, 8, 0).bfloat16()), rank=4))


TRANSPARENT = {
    "SMoA": float64_layer,
    "no anchor": lambda: float64_layer(modulate=False),
    "r below K": lambda: float64_layer(num_blocks=6),
    "half": half_layer,
}
each_layer = pytest.mark.parametrize("make", TRANSPARENT.values(), ids=TRANSPARENT)


def assert_close_in_its_dtype(actual, expected):
    eps = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=20 * eps, atol=100 * eps)


@each_layer
def test_vmap_is_a_loop(way, make):
    layer = make()
    x = input_of(layer, 5, 3, seed=1)
    y = torch.func.vmap(layer)(x)
    assert_close_in_its_dtype(y, torch.stack([layer(sample) for sample in x]))


@each_layer
def test_vmap_over_the_weights_of_the_base_alone_is_a_loop(way, make):
    layer = make()
    x = input_of(layer, 5, seed=1)
    W0 = layer.base.weight.detach()

    def loss(W):
        return torch.func.functional_call(layer, {"base.weight": W}, (x,)).float().square().sum()

    several = torch.stack([W0, 2 * W0])
    for function in (loss, torch.func.grad(loss)):
        expected = torch.stack([function(W) for W in several])
        found = torch.func.vmap(function)(several)
        error = (found - expected).double().norm() / expected.double().norm()
        assert error < 10 * torch.finfo(x.dtype).eps


@each_layer
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_layer_compiles_whole_without_gradients(way, make, context):
    layer = make()
    x = input_of(layer, 5, seed=1)
    with context():
        assert_close_in_its_dtype(compiled_whole(layer)(x), layer(x))


@each_layer
def test_gradients_of_each_sample_are_a_loop(way, make):
    layer = make()
    trained = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}

    def loss(factors, sample):
        return torch.func.functional_call(layer, factors, (sample,)).square().sum()

    gradient = torch.func.grad(loss)
    x = input_of(layer, 5, seed=1)
    grads = torch.func.vmap(gradient, in_dims=(None, 0))(trained, x)
    for i, sample in enumerate(x):
        for name, expected in gradient(trained, sample).items():
            scale = max(1.0, float(expected.abs().max()))
            eps = torch.finfo(x.dtype).eps
            torch.testing.assert_close(grads[name][i], expected, rtol=0, atol=50 * eps * scale)


@each_layer
def test_forward_mode_agrees_with_reverse_mode(way, make):
    layer = make()
    x, tangent = input_of(layer, 3, seed=1), input_of(layer, 3, seed=2)
    _, y_tangent = torch.func.jvp(layer, (x,), (tangent,))
    _, pull = torch.func.vjp(layer, x)
    g = normal(3, 6, seed=3, dtype=x.dtype)
    (pulled,) = pull(g)
    there, back = (g * y_tangent).double().sum(), (pulled * tangent).double().sum()
    magnitude = (g * y_tangent).double().abs().sum()
    assert abs(there - back) <= 20 * torch.finfo(x.dtype).eps * magnitude


@each_layer
def test_a_jacobian_in_one_batch_of_tangents_is_the_one_row_by_row(way, make):
    layer = make()
    x = input_of(layer, 2, seed=1)
    jacobian = torch.autograd.functional.jacobian
    batched = jacobian(layer, x, vectorize=True, strategy="forward-mode")
    assert_close_in_its_dtype(batched, jacobian(layer, x))


@each_layer
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
def test_a_linearized_layer_moves_as_forward_mode_says(way, make):
    layer = make()
    x, tangent = input_of(layer, 3, seed=1), input_of(layer, 3, seed=2)
    y, move = torch.func.linearize(layer, x)
    assert_close_in_its_dtype(y, layer(x))
    _, expected = torch.func.jvp(layer, (x,), (tangent,))
    for _ in range(2):  # what is kept from call to call stays as it is
        assert_close_in_its_dtype(move(tangent), expected)


@each_layer
def test_an_exported_layer_computes_the_same(way, make):
    layer = make().eval()
    x = input_of(layer, 3, seed=1)
    exported = torch.export.export(layer, (x,)).module()
    assert_close_in_its_dtype(exported(x), layer(x))


@each_layer
@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
def test_a_traced_layer_computes_the_same(way, make):
    layer = make().eval()
    x = input_of(layer, 3, seed=1)
    traced = torch.jit.trace(layer, (x,))  # which traces it again, without gradients, to compare
    more = input_of(layer, 5, seed=2)
    assert_close_in_its_dtype(traced(more), layer(more))


@each_layer
def test_a_jagged_input_is_a_list_of_inputs(way, make):
    layer = make()
    samples = [input_of(layer, length, seed=length) for length in (2, 5, 1)]
    y = layer(torch.nested.nested_tensor(samples, layout=torch.jagged))
    for sample, output in zip(samples, y.unbind()):
        assert_close_in_its_dtype(output, layer(sample))


# --------------------------------------------------------------------------------------------------
# Averaged, offloaded and wrapped models


def averaged(model):
    average = get_ema_multi_avg_fn(0.9999)
    return AveragedModel(model, use_buffers=True, multi_avg_fn=average)


def test_an_averaged_copy_has_the_orders_of_its_model():
    model = adapted(rank=1)  # a branch without factors in each layer
    copy = averaged(model)
    for _ in range(10):
        copy.update_parameters(model)
    for (_, layer), (_, twin) in zip(smoa.adapters(model), smoa.adapters(copy)):
        assert same_orders((twin.row_order, twin.col_order), (layer.row_order, layer.col_order))
    torch.testing.assert_close(copy(X), model(X))


def offload(base):
    """As accelerate does: weights that are there while the module is called, and only then."""
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}

    def put(device):
        for name, p in weights.items():
            setattr(base, name, nn.Parameter(p.to(device), requires_grad=False))

    base.register_forward_pre_hook(lambda module, args: put("cpu"))
    base.register_forward_hook(lambda module, args, output: put("meta"))
    put("meta")


@each_budget
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_there_only_in_the_call_of_the_base_is_used_there(
    way, layer_options, dtype
):
    model, plain = adapted(dtype=dtype, **layer_options), adapted(dtype=dtype, **layer_options)
    for _, layer in smoa.adapters(model):
        offload(layer.base)
    x = X.to(dtype)
    y, expected = model(x), plain(x)
    y.square().sum().backward()
    expected.square().sum().backward()
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    error = flat_gradient(model) - flat_gradient(plain)
    assert error.norm() <= tolerance * flat_gradient(plain).norm()


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([self.block(), self.block()])

    def block(self):
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def compiled_block(block):
    return torch.compile(block, backend="eager")


@pytest.mark.parametrize("wrap", [compiled_block, checkpoint_wrapper])
@pytest.mark.parametrize("targets", [["blocks.0.0", "blocks.1.2"], r"blocks\.(0\.0|1\.2)"])
def test_wrapped_blocks_have_the_names_of_the_plain_model_s(tmp_path, wrap, targets):
    model, plain = Blocks(), Blocks()
    model.blocks[0] = wrap(model.blocks[0])
    model.blocks[1] = wrap(model.blocks[1])
    names = smoa.inject(model, targets, rank=4)
    assert names == ["blocks.0.0", "blocks.1.2"] == [name for name, _ in smoa.adapters(model)]
    smoa.save(fill(model), tmp_path / "adapter")
    assert smoa.load(plain, tmp_path / "adapter") == names
    torch.testing.assert_close(plain(SEQUENCE), model(SEQUENCE))


class Residual(nn.Module):
    """A part of a model, no wrapper of one, whose only child is called `module`."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.module(x)


def test_a_scripted_part_of_a_model_is_no_hindrance(tmp_path):
    model = nn.ModuleDict({"linear": nn.Linear(6, 5), "scripted": torch.jit.script(nn.ReLU())})
    assert smoa.inject(model, ["linear"], rank=2) == ["linear"]
    smoa.merge(model)
    smoa.save(model, tmp_path / "adapter.pt")
    assert type(smoa.unload(model)["linear"]) is nn.Linear


def test_a_child_called_module_keeps_its_name(tmp_path):
    model, plain = nn.Sequential(Residual()), nn.Sequential(Residual())
    plain.load_state_dict(model.state_dict())
    assert smoa.inject(model, ["module"], rank=4) == ["0.module"]
    assert model.get_submodule("0.module") is dict(smoa.adapters(model))["0.module"]
    smoa.save(fill(model), tmp_path / "adapter")
    assert smoa.load(plain, tmp_path / "adapter") == ["0.module"]
    assert smoa.inject(Residual(), ["module"], rank=4) == ["module"]
    torch.testing.assert_close(plain(SEQUENCE), model(SEQUENCE))


def test_data_parallel_gives_its_model_s_names():
    model = nn.DataParallel(Blocks())
    assert smoa.inject(model, ["blocks.0.0"], rank=4) == ["blocks.0.0"]


@pytest.mark.parametrize("wrap", [compiled_block, checkpoint_wrapper])
def test_an_adapter_of_the_plain_model_loads_into_wrapped_blocks(tmp_path, wrap):
    model, plain = Blocks(), Blocks()
    model.blocks[0] = wrap(model.blocks[0])
    names = smoa.inject(plain, ["blocks.0.0", "blocks.1.2"], rank=4)
    smoa.save(fill(plain), tmp_path / "adapter")
    assert smoa.load(model, tmp_path / "adapter") == names
    torch.testing.assert_close(model(SEQUENCE), plain(SEQUENCE))


def test_an_averaged_copy_saves_the_adapter_of_the_plain_model(tmp_path):
    model, plain = adapted(), Net()
    smoa.save(averaged(model), tmp_path / "adapter")
    assert smoa.load(plain, tmp_path / "adapter") == ["first", "second"]
    assert torch.equal(plain(X), model(X))


# --------------------------------------------------------------------------------------------------
# torch.compile, activation checkpointing


def compiled_whole(model):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


TO_COMPILE = BUDGETS | {"dropout": {"dropout": 1e-9}}  # that drops nothing: outputs compare


def test_vmap_over_models_gives_an_unfrozen_base_its_gradient(way):
    models = [adapted(seed=seed, order="natural") for seed in (0, 1)]
    for model in models:
        model.first.base.requires_grad_(True)
    params, buffers = torch.func.stack_module_state(models)

    def call(params, buffers):
        return torch.func.functional_call(models[0], (params, buffers), (X,))

    torch.vmap(call)(params, buffers).square().sum().backward()
    for i, model in enumerate(models):
        model(X).square().sum().backward()
        for name in ("first.base.weight", "first.base.bias", "first.A_0", "second.B_1"):
            torch.testing.assert_close(params[name].grad[i], model.get_parameter(name).grad)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_layer_with_its_own_forward_compiles_whole(duplicate):
    layer = duplicate(fill(smoa.SMoALinear(Scaled(8, 6).bfloat16(), rank=4)))
    x = input_of(layer, 5, seed=1)
    compiled = torch.compile(nn.Sequential(layer), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("layer_options", TO_COMPILE.values(), ids=TO_COMPILE)
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_compiled_model_computes_and_learns_the_same(base_dtype, layer_options):
    model = adapted(dtype=base_dtype, **layer_options)
    plain = adapted(dtype=base_dtype, **layer_options)
    compiled = compiled_whole(model)
    x = X.to(base_dtype)
    y, expected = compiled(x), plain(x)
    y.float().square().sum().backward()
    expected.float().square().sum().backward()
    tolerance = 20 * torch.finfo(base_dtype).eps
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    largest = float(flat_gradient(plain).abs().max())
    assert_same_gradients(model, plain, rtol=tolerance, atol=tolerance * largest)


def test_verbs_reach_through_torch_compile(tmp_path):
    model, plain = Net(), Net()
    compiled = compiled_whole(model)
    torch.testing.assert_close(compiled(X), plain(X))
    names = smoa.inject(compiled, ["first", "second"], rank=4)
    assert names == ["first", "second"] == [name for name, _ in smoa.adapters(compiled)]
    smoa.save(fill(compiled), tmp_path / "adapter")
    assert smoa.load(plain, tmp_path / "adapter") == ["first", "second"]
    expected = plain(X)
    torch.testing.assert_close(compiled(X), expected)  # it has noticed the adapters
    smoa.merge(compiled.eval())
    torch.testing.assert_close(compiled(X), expected)
    with smoa.disabled(compiled):
        torch.testing.assert_close(compiled(X), Net()(X))
    assert smoa.unload(compiled) is compiled
    assert torch.equal(model(X), Net()(X))


TO_CHECKPOINT = BUDGETS | {"dropout": {"dropout": 0.5}}


@pytest.mark.parametrize("layer_options", TO_CHECKPOINT.values(), ids=TO_CHECKPOINT)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_model_learns_the_same(layer_options, use_reentrant):
    model, plain = adapted(**layer_options), adapted(**layer_options)
    x = X.clone().requires_grad_()
    torch.manual_seed(1)
    checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    torch.manual_seed(1)
    plain(x).square().sum().backward()
    assert_same_gradients(model, plain, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------
# DistributedDataParallel

IN_EACH_PROCESS = """
    import gc
    import sys
    from pathlib import Path

    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    import smoa

    rank = int(sys.argv[1])
    here = Path(__file__).parent
    meeting = f"file://{here / 'meet'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)


    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


    def make(**layer_options):
        model = net()
        smoa.inject(model, "0|2", **layer_options)
        for _, layer in smoa.adapters(model):
            for B_k in layer.B:
                nn.init.normal_(B_k)
        return model.train("dropout" not in layer_options)


    def train(model, batch):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(batch).square().sum(-1).mean().backward()
            optimizer.step()
"""

TWO_PROCESSES = """
    cases = {
        "r past K": {"rank": 4, "num_blocks": 2},
        "r below K": {"rank": 2, "num_blocks": 3},
        "dropout": {"rank": 2, "num_blocks": 2, "dropout": 0.5},
    }
    for case, layer_options in cases.items():
        alone, model = make(**layer_options), DistributedDataParallel(make(**layer_options))
        x = torch.randn(8, 6)
        train(alone, x)
        train(model, x[4 * rank :][:4])
        for (name, p), q in zip(alone.named_parameters(), model.parameters()):
            torch.testing.assert_close(p, q, msg=lambda message: f"{case}, {name}: {message}")
        assert [name for name, _ in smoa.adapters(model)] == ["0", "2"]

        smoa.save(model, here / f"{case}.{rank}")
        dist.barrier()
        assert (here / f"{case}.0").read_bytes() == (here / f"{case}.1").read_bytes()
        trained = model(x)
        plain = net().train(alone.training)
        assert smoa.load(plain, here / f"{case}.0") == ["0", "2"]
        assert torch.equal(plain(x), trained)
        smoa.merge(model.eval())
        torch.testing.assert_close(model(x), trained)

    late = DistributedDataParallel(net())
    for verb, what in ((smoa.inject, ["0"]), (smoa.load, here / "dropout.0")):
        try:
            verb(late, what)
            raise SystemExit("factors that are never synchronised")
        except ValueError as error:
            assert "before DistributedDataParallel" in str(error), error

    del model, late  # no DistributedDataParallel may outlive its process group
    gc.collect()
    dist.destroy_process_group()
"""


def test_two_processes_learn_what_one_would_from_the_whole_batch(tmp_path):
    run_alone(tmp_path, IN_EACH_PROCESS + TWO_PROCESSES, processes=2)


# --------------------------------------------------------------------------------------------------
# FSDP2: weights and factors sharded over two processes

SHARDED = """
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (2,))
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


    def shard(model):
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)


    cases = {"r past K": {"rank": 4, "num_blocks": 2}, "r below K": {"rank": 2, "num_blocks": 3}}
    for case, layer_options in cases.items():
        alone, model = make(**layer_options), shard(make(**layer_options))
        train(alone, x)
        train(model, x[4 * rank :][:4])
        expected = smoa.state_dict(alone)
        for key, value in smoa.state_dict(model).items():
            torch.testing.assert_close(value, expected.pop(key), msg=f"{case}: {key}")
        assert not expected

        file = here / f"{case}.{rank}"
        smoa.save(model, file)
        plain = net()
        assert smoa.load(plain, file) == ["0", "2"]
        torch.testing.assert_close(plain(x), alone(x))
        torch.testing.assert_close(shard(plain)(x), alone(x))
        try:
            smoa.merge(model)
            raise SystemExit("merged what is sharded")
        except ValueError as error:
            assert "sharded" in str(error), error
        root = fully_shard(make(**layer_options), mesh=mesh)
        with torch.no_grad():
            root(x)  # leaves the weights of the outermost module whole, for a while
        whole = fully_shard(net(), mesh=mesh)
        whole(x)
        try:
            smoa.inject(whole, ["0"], rank=3)
            raise SystemExit("adapted what is sharded")
        except ValueError as error:
            assert "adapt it first" in str(error), error
        state = smoa.state_dict(alone)
        for verb in (smoa.merge, lambda model: smoa.load_state_dict(model, state)):
            try:
                verb(root)
                raise SystemExit("wrote where the next shard is not taken from")
            except ValueError as error:
                assert "sharded" in str(error), error
    del alone, model, plain, root  # what holds a process group must not outlive it
    gc.collect()
    dist.destroy_process_group()
"""


def test_two_processes_that_shard_a_model_learn_what_one_would(tmp_path):
    run_alone(tmp_path, IN_EACH_PROCESS + SHARDED, processes=2)


# --------------------------------------------------------------------------------------------------
# FullyShardedDataParallel, the older one: while it computes, a weight is an attribute of its module

FLAT_SHARDS = """
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    options = {"rank": 3, "num_blocks": 2}
    alone, inner = make(**options), make(**options)
    model = FSDP(inner, use_orig_params=True, device_id=torch.device("cpu"))
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(x), alone(x))
    train(alone, x)
    train(model, x[4 * rank :][:4])
    torch.testing.assert_close(model(x), alone(x))

    file = here / f"adapter.{rank}"
    for verb in (lambda: smoa.save(model, file), lambda: smoa.merge(model)):
        try:
            verb()
            raise SystemExit("used the shards as if they were weights")
        except ValueError as error:
            assert "shard" in str(error), error
    other = FSDP(net(), use_orig_params=True, device_id=torch.device("cpu"))
    with FSDP.summon_full_params(other):
        try:
            smoa.inject(other, ["0"], rank=3)
            raise SystemExit("adapted what is sharded")
        except ValueError as error:
            assert "adapt it first" in str(error), error
    with FSDP.summon_full_params(model):
        smoa.save(model, file)
    plain = net()
    assert smoa.load(plain, file) == ["0", "2"]
    torch.testing.assert_close(plain(x), alone(x))
    del model, inner
    gc.collect()
    dist.destroy_process_group()
"""


def test_two_processes_with_flat_shards_learn_what_one_would(tmp_path):
    run_alone(tmp_path, IN_EACH_PROCESS + FLAT_SHARDS, processes=2)
