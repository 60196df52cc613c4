"""The layer on an accelerator: `pytest -m gpu`, a minute. Without one all of these are skipped.

What the CPU's tests show of the formula is not shown again, but what a card does in its own way:
its kernels and its rounding, queued work, captured graphs, two memories, one sharded process.
"""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from strategies import HALVES, Net, X, adapted, bits, fill, kept_for_backward, normal, same_orders
from test_cost import LoRA
from torch import nn

import smoa

CUDA, MPS = torch.cuda.is_available(), torch.backends.mps.is_available()
m, n, T = 48, 36, 20

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (CUDA or MPS), reason="there is neither cuda nor mps here"),
]
cuda_only = pytest.mark.skipif(not CUDA, reason="there is no cuda here")
DEVICE = "cuda" if CUDA else "mps"


def layer(dtype=torch.float32, m=m, n=n, rank=8, K=2, **options):
    """An adapted layer with trained factors, on the CPU."""
    base = nn.Linear(n, m, dtype=dtype)
    base.weight.data.copy_(normal(m, n, seed=1) / n**0.5)
    return fill(smoa.SMoALinear(base, rank, K, **options))


def outputs_and_gradients(module, x):
    """The output, and the gradients of x and of all that trains, on the CPU in float64."""
    x = x.detach().requires_grad_()
    y = module(x)
    y.backward(normal(*y.shape, seed=2, dtype=y.dtype).to(y.device))
    tensors = [y, x.grad, *(p.grad for p in module.parameters() if p.requires_grad)]
    return [tensor.detach().cpu().double() for tensor in tensors]


def cosine(a, b):
    return F.cosine_similarity(a.double().flatten(), b.double().flatten(), 0).item()


# --------------------------------------------------------------------------------------------------
# The same numbers as on the CPU


@pytest.mark.parametrize("modulate", [True, False])
@pytest.mark.parametrize("K", [1, 2, 5])
def test_outputs_and_gradients_are_those_of_the_cpu(way, K, modulate):
    there = layer(K=K, modulate=modulate)
    x = normal(T, n, seed=3, dtype=torch.float32)
    expected = outputs_and_gradients(there, x)
    found = outputs_and_gradients(copy.deepcopy(there).to(DEVICE), x.to(DEVICE))
    for actual, exact in zip(found, expected, strict=True):
        assert torch.allclose(actual, exact, rtol=1e-4, atol=1e-4 * exact.abs().max())


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_stays_close_to_float32(way, dtype):
    there = layer(dtype)
    x = normal(T, n, seed=3, dtype=dtype)
    whole = copy.deepcopy(there).float()
    expected = outputs_and_gradients(whole, x.float())
    found = outputs_and_gradients(there.to(DEVICE), x.to(DEVICE))
    for actual, exact in zip(found, expected, strict=True):
        assert cosine(actual, exact) > 0.999


@cuda_only
@pytest.mark.parametrize("cut", ["autocast to bfloat16", "autocast to float16", "TF32"])
def test_a_small_update_is_not_rounded_away(way, cut):
    there = layer(m=256, n=192).to(DEVICE)
    for B_k in there.B:
        B_k.data.mul_(1e-4)
    x = normal(T, 192, seed=3, dtype=torch.float32).to(DEVICE)
    exact = x.double() @ there.delta_weight().double().mT
    reduced = {"autocast to bfloat16": torch.bfloat16, "autocast to float16": torch.float16}
    before = torch.get_float32_matmul_precision()
    if cut == "TF32":
        torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast(DEVICE, reduced.get(cut), enabled=cut in reduced):
            update = there.update(x)
            y, y0 = there(x), there.base(x)
    finally:
        torch.set_float32_matmul_precision(before)
    assert cosine(update, exact) > 0.999
    rounding = 2**-8 if "bfloat16" in cut else 2**-10
    error = (y.double() - y0.double() - exact).abs().max()
    assert error <= 2 * rounding * y0.double().abs().max()


def test_the_order_is_that_of_the_cpu():
    for shape in [(40, 40), (30, 50), (50, 30)]:
        W = normal(*shape, seed=4, dtype=torch.float32)
        on_card = smoa.spectral_order(W.to(DEVICE))
        assert {order.device.type for order in on_card} == {DEVICE}
        assert same_orders([order.cpu() for order in on_card], smoa.spectral_order(W))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_unmerging_gives_back_every_bit(dtype):
    there = layer(dtype).to(DEVICE)
    before = bits(there.base.weight.cpu())
    x = normal(T, n, seed=3, dtype=dtype).to(DEVICE)
    unmerged = there.eval()(x)
    there.merge()
    assert bits(there.base.weight.cpu()) != before
    assert cosine(there(x), unmerged) > 0.999
    there.to("cpu").to(DEVICE)
    there.unmerge()
    assert bits(there.base.weight.cpu()) == before


def test_a_file_goes_from_one_device_to_the_other(tmp_path):
    path = tmp_path / "adapter.pt"
    for source, target in [(DEVICE, "cpu"), ("cpu", DEVICE)]:
        model = adapted().to(source)
        smoa.save(model, path)
        loaded = Net().to(target)
        smoa.load(loaded, path)
        for p, q in zip(model.parameters(), loaded.parameters(), strict=True):
            assert q.device.type == target
            assert bits(p.cpu()) == bits(q.cpu())
        assert torch.allclose(loaded(X.to(target)).cpu(), model(X.to(source)).cpu(), atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Memory, and work that is queued


@cuda_only
@pytest.mark.parametrize("K", [2, 4, 8])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_kept_for_the_backward_is_what_lora_keeps_and_a_tenth_of_the_weights(K, dtype):
    base = nn.Linear(768, 192, dtype=dtype, device=DEVICE)
    kept = []
    for module in (LoRA(base, 8, 0.0).to(DEVICE), smoa.SMoALinear(base, 8 * K, K)):
        x = torch.randn(64, 768, dtype=dtype, device=DEVICE, requires_grad=True)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.float32):
            kept.append(kept_for_backward(module, x)[1])
    assert kept[1] <= kept[0] + 0.1 * base.weight.numel() * 2


@cuda_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_never_waits_for_the_card(way, dtype):
    there = layer(dtype, dropout=0.1).to(DEVICE)
    optimizer = torch.optim.AdamW([p for p in there.parameters() if p.requires_grad], fused=True)
    x = normal(T, n, seed=3, dtype=dtype).to(DEVICE).requires_grad_()
    for mode in ("default", "error"):  # once to warm up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            there(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@cuda_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_graph_replays_the_step(way, dtype):
    there = layer(dtype).to(DEVICE)
    x = normal(T, n, seed=3, dtype=dtype).to(DEVICE).requires_grad_()
    trained = [x, *(p for p in there.parameters() if p.requires_grad)]

    def gradients():
        return torch.autograd.grad(there(x).square().sum(), trained)

    aside = torch.cuda.Stream()  # to warm up on, as a capture wants
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        gradients()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients()
    for p in trained:
        p.data.mul_(1.5)
    graph.replay()
    for actual, exact in zip(captured, gradients(), strict=True):
        assert torch.allclose(actual, exact, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


@cuda_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_deterministic_algorithms_a_step_repeats_to_the_bit(way, dtype, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    there = layer(dtype, m=256, n=192).to(DEVICE)
    x = normal(512, 192, seed=3, dtype=dtype).to(DEVICE)
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        smoa.spectral_order(there.base.weight.float())
        for _ in range(2):
            there.zero_grad()
            runs.append([bits(found) for found in outputs_and_gradients(there, x)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert runs[0] == runs[1]


# --------------------------------------------------------------------------------------------------
# What people do there


@cuda_only
def test_it_learns_in_float16_with_a_gradient_scaler():
    model = Net().to(DEVICE)
    smoa.inject(model, ["first", "second"], rank=4, num_blocks=2)
    x, target = (normal(64, size, seed=size).float().to(DEVICE) for size in (6, 3))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    scaler = torch.amp.GradScaler(DEVICE)
    losses = []
    for _ in range(60):
        with torch.autocast(DEVICE, torch.float16):
            loss = F.mse_loss(model(x), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@cuda_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_layer_computes_the_same(dtype):
    there = layer(dtype, m=512, n=384).to(DEVICE)  # above LEAN_ABOVE
    x = normal(T, 384, seed=3, dtype=dtype).to(DEVICE)
    expected = outputs_and_gradients(there, x)
    there.zero_grad()
    compiled = torch.compile(nn.Sequential(there), fullgraph=True)
    found = outputs_and_gradients(compiled, x)
    for actual, exact in zip(found, expected, strict=True):
        assert cosine(actual, exact) > (0.999 if dtype == torch.bfloat16 else 0.99999)


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone, as torchrun makes it."""
    os.environ.setdefault("MASTER_ADDR", "localhost")
    dist.init_process_group(
        "nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@cuda_only
@pytest.mark.parametrize("how", ["fully_shard", "DistributedDataParallel"])
def test_a_model_shared_out_over_nccl_trains_as_before(one_process, tmp_path, how):
    x = normal(16, 6, seed=3, dtype=torch.float32).to(DEVICE)
    plain = adapted().to(DEVICE)
    shared = adapted().to(DEVICE)
    if how == "fully_shard":
        from torch.distributed.fsdp import fully_shard

        run = fully_shard(shared)
    else:
        run = nn.parallel.DistributedDataParallel(shared, [0])
    files = []
    for model, call in [(plain, plain), (shared, run)]:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            call(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        path = tmp_path / f"{len(files)}.pt"
        smoa.save(model, path)
        loaded = Net()
        smoa.load(loaded, path)
        files.append(loaded(x.cpu()))
    assert torch.allclose(*files, atol=1e-5)
    assert not torch.allclose(files[0], adapted()(x.cpu()), atol=1e-3)


@cuda_only
def test_offloading_layer_by_layer_computes_what_the_model_does():
    accelerate = pytest.importorskip("accelerate")
    model = adapted()
    expected = model(X)
    accelerate.cpu_offload(model, torch.device(DEVICE), preload_module_classes=["SMoALinear"])
    assert torch.allclose(model(X.to(DEVICE)).cpu(), expected, atol=1e-5)
