"""What SMoA costs beside a LoRA of equally many parameters and the frozen base, side by side.

    python tests/bench_smoa.py                          # all tables; on a GPU where there is one
    python tests/bench_smoa.py --only layer,kept        # some of them
    python tests/bench_smoa.py --json out.json
    python tests/bench_smoa.py --quick                  # small sizes: to see that it runs

Times are medians of runs in turns, after two turns to warm up. Nothing here asserts on a time, and
pytest does not collect this file; what is exact is asserted in test_cost.py. LoRA is written as its
paper has it, x W0^T + (x A^T) B^T. "dense" is the formulation to beat: copies of the anchors, a
dense delta_W at every forward, and a second full matmul with it. Orders are random: they cost the
same as spectral ones, once they are there.
"""

import argparse
import importlib.util
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from strategies import kept_for_backward  # noqa: E402

import smoa  # noqa: E402
from gpt_mini import GPT, GPTConfig  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANK = 4  # LoRA's; SMoA of rank 4 K in K blocks trains as many numbers
MIB = 2**20

SMALL = GPTConfig(vocab_size=89, block_size=64, n_layer=4, n_head=4, n_embd=128)
LARGE = GPTConfig(vocab_size=89, block_size=256, n_layer=6, n_head=6, n_embd=384)
TWELVE = GPTConfig(vocab_size=89, block_size=256, n_layer=12, n_head=12, n_embd=768)


# --------------------------------------------------------------------------------------------------
# What is compared


class LoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        m, n = base.weight.shape
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(RANK, n, device=base.weight.device) / n**0.5)
        self.B = nn.Parameter(torch.zeros(m, RANK, device=base.weight.device))

    def forward(self, x):
        z = F.linear(x, self.A.to(x.dtype))
        return self.base(x) + F.linear(z, self.B.to(x.dtype))


def smoa_of(num_blocks):
    def adapt(base):
        m, n = base.weight.shape
        order = torch.randperm(m), torch.randperm(n)
        return smoa.SMoALinear(base, RANK * num_blocks, num_blocks, order=order)

    return adapt


class Dense(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.inner = smoa_of(4)(base)
        self.anchors = [self.inner.anchor(k).clone() for k in range(4)]

    def forward(self, x):
        layer = self.inner
        delta = torch.zeros_like(layer.base.weight, dtype=layer.A[0].dtype)
        for k, M_k in enumerate(self.anchors):
            block = layer.scale * (layer.B[k] @ layer.A[k]) * M_k
            delta[layer.rows[k][:, None], layer.cols[k]] = block
        return layer.base(x) + F.linear(x, delta.to(x.dtype))


def frozen(base):
    return base.requires_grad_(False)


def merged(base):
    layer = smoa_of(4)(base)
    layer.merge()
    return layer.eval()


KINDS = {
    "frozen": frozen,
    "lora": LoRA,
    "smoa K=2": smoa_of(2),
    "smoa K=4": smoa_of(4),
    "smoa K=8": smoa_of(8),
    "dense": Dense,
    "merged": merged,
}


def adapt_all(model, kind):
    """Every linear layer but the head becomes one of the kind."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("head"):
            names.append(name)
    for name in names:
        parent, _, child = name.rpartition(".")
        layer = KINDS[kind](model.get_submodule(name))
        setattr(model.get_submodule(parent), child, layer)
    return model


def adapted_gpt(kind, config, dtype=torch.float32):
    """A GPT whose embedding's output asks for a gradient, as below an adapter it always must."""
    torch.manual_seed(0)
    model = GPT(config).requires_grad_(False)
    model = adapt_all(model.to(DEVICE, dtype), kind)
    model.embed.register_forward_hook(lambda module, args, output: output.requires_grad_())
    return model


def training_step(model, loss_of):
    """A function that takes one step; without anything to train it goes backward all the same."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3, fused=True) if trained else None

    def step():
        loss_of(model).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


# --------------------------------------------------------------------------------------------------
# Measuring and printing


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(function):
    synchronize()
    begin = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - begin


def medians(functions, repeats):
    """Median seconds of each function, in turns, so that what disturbs one disturbs all."""
    times = {name: [] for name in functions}
    for _ in range(2 + repeats):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return {name: statistics.median(runs[2:]) for name, runs in times.items()}


def replayed(function):
    """On a card: the function's kernels as one captured graph, so that no time goes into launching
    them one by one."""
    aside = torch.cuda.Stream()  # to warm up on, as a capture wants
    with torch.cuda.stream(aside):
        for _ in range(3):
            function()
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def text_of(value):
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def table(title, rows):
    """Print rows, which are dicts with the same keys; returns them under the title."""
    lines = [list(rows[0])]
    for row in rows:
        lines.append([text_of(value) for value in row.values()])
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\n{title}")
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths)]
        print("  " + "  ".join(cells), flush=True)
    return {title: rows}


# --------------------------------------------------------------------------------------------------
# The tables


def forward_backward_times(kinds, m, n, T, dtype, repeats):
    """Median seconds of each kind; on a card also of "kind, replayed", without the launches."""
    torch.manual_seed(0)
    x = torch.randn(T, n, device=DEVICE, dtype=dtype, requires_grad=True)
    g = torch.randn(T, m, device=DEVICE, dtype=dtype)
    base = nn.Linear(n, m, bias=False, device=DEVICE, dtype=dtype)
    functions = {}
    for kind in kinds:
        module = KINDS[kind](base)
        functions[kind] = lambda module=module: module(x).backward(g)
        if DEVICE == "cuda" and kind != "dense":
            functions[f"{kind}, replayed"] = replayed(functions[kind])
    return medians(functions, 50 if DEVICE == "cuda" else repeats)


def layer_table(quick):
    """Forward and backward of one layer, in float32 and in bfloat16."""
    shapes = [
        (384, 128, 4096),
        (1536, 384, 4096),
        (768, 768, 4096),
        (3072, 768, 4096),
        (4096, 4096, 2048),
        (14336, 4096, 2048),
    ]
    if quick:
        shapes = [(384, 128, 64), (768, 768, 64)]
    rows = []
    for m, n, T in shapes:
        large = m * n >= 1e7
        kinds = ["frozen", "lora", "smoa K=4", "smoa K=8"]
        if not large:
            kinds.append("dense")
        times = forward_backward_times(kinds, m, n, T, torch.float32, 3 if large else 15)
        row = {
            "out x in": f"{m} x {n}",
            "tokens": T,
            "lora ms": 1000 * times["lora"],
            "lora/frozen": times["lora"] / times["frozen"],
            "smoa K=4/lora": times["smoa K=4"] / times["lora"],
            "smoa K=8/lora": times["smoa K=8"] / times["lora"],
            "dense/lora": "" if large else times["dense"] / times["lora"],
        }
        if DEVICE == "cuda":
            lora = times["lora, replayed"]
            row["replayed: lora ms"] = 1000 * lora
            row["frozen"] = times["frozen, replayed"] / lora
            for K in (4, 8):
                row[f"K={K}"] = times[f"smoa K={K}, replayed"] / lora
        rows.append(row)
    tables = table("Layer, float32: forward + backward (LoRA r=4)", rows)

    if not quick:
        # A CPU without bfloat16 instructions needs 5 s for 768 x 768 at 4096 tokens.
        slow = [(384, 128, 256), (1536, 384, 256), (768, 768, 256)]
        shapes = shapes if DEVICE == "cuda" else slow
    rows = []
    for m, n, T in shapes:
        kinds = ["frozen", "lora", "smoa K=2", "smoa K=4", "smoa K=8"]
        times = forward_backward_times(kinds, m, n, T, torch.bfloat16, 5)
        row = {
            "out x in": f"{m} x {n}",
            "tokens": T,
            "frozen ms": 1000 * times["frozen"],
            "lora/frozen": times["lora"] / times["frozen"],
        }
        for K in (2, 4, 8):
            row[f"K={K}/frozen"] = times[f"smoa K={K}"] / times["frozen"]
            row[f"count K={K}"] = 1 + 3 / (2 * K)
        if DEVICE == "cuda":
            frozen = times["frozen, replayed"]
            row["replayed: frozen ms"] = 1000 * frozen
            row["lora"] = times["lora, replayed"] / frozen
            for K in (2, 4, 8):
                row[f"K={K}"] = times[f"smoa K={K}, replayed"] / frozen
        rows.append(row)
    title = "Layer, bfloat16: forward + backward; count: of products, 1 + 3/(2K) of the frozen's"
    return tables | table(title, rows)


def model_table(quick):
    """A training step of gpt_mini, and the speed of generation."""
    plan = [("small", SMALL, 12, 15), ("small", SMALL, 64, 9), ("large", LARGE, 4, 7)]
    if DEVICE == "cuda":
        plan += [("large", LARGE, 64, 15), ("768 wide", TWELVE, 32, 7)]
    if quick:
        plan = [("small", SMALL, 2, 1)]
    rows = []
    for preset, config, batch, repeats in plan:
        idx = torch.randint(89, (batch, config.block_size + 1), device=DEVICE)

        def loss_of(model):
            return model(idx[:, :-1], idx[:, 1:])[1]

        steps = {}
        for kind in ("frozen", "lora", "smoa K=4", "dense"):
            steps[kind] = training_step(adapted_gpt(kind, config), loss_of)
        times = medians(steps, repeats)
        generation = {}
        for kind in ("frozen", "merged"):
            model = adapted_gpt(kind, config).eval()
            generation[kind] = lambda model=model: model.generate(idx[:1, :8], 30)
        speed = medians(generation, min(7, repeats))
        row = {
            "preset": preset,
            "batch": f"{batch} x {config.block_size}",
            "lora ms": 1000 * times["lora"],
            "lora/frozen": times["lora"] / times["frozen"],
            "smoa K=4/lora": times["smoa K=4"] / times["lora"],
            "dense/lora": times["dense"] / times["lora"],
            "merged/frozen, generating": speed["merged"] / speed["frozen"],
        }
        rows.append(row)
    return table("Model: a training step of gpt_mini, float32", rows)


def setup_table(quick):
    """The order of one weight, against a full SVD of it."""
    rows = []
    for size in (256,) if quick else (768, 2048, 4096):
        W = torch.randn(size, size, device=DEVICE)
        order = seconds(lambda: smoa.spectral_order(W))
        single = seconds(lambda: torch.linalg.svd(W, full_matrices=False))
        row = {"size": f"{size} x {size}", "order s": order, "svd float32/order": single / order}
        if size < 4096:
            double = seconds(lambda: torch.linalg.svd(W.double(), full_matrices=False))
            row["svd float64/order"] = double / order
        else:
            row["svd float64/order"] = ""
        rows.append(row)
    return table("Set-up: spectral_order (in float64) against a full SVD", rows)


def peak(kind, dtype, quick):
    """Peak memory in bytes of two training steps; on a CPU to be called in a process of its own."""
    config = SMALL if quick else TWELVE
    idx = torch.randint(89, (4, config.block_size + 1), device=DEVICE)
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = adapted_gpt(kind, config, dtype)
    step = training_step(model, lambda model: model(idx[:, :-1], idx[:, 1:])[1])
    for _ in range(2):
        step()
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_in_a_process_of_its_own(kind, dtype, quick):
    command = [sys.executable, __file__, "--peak", kind, str(dtype).removeprefix("torch.")]
    return int(subprocess.check_output(command + ["--quick"] * quick, text=True))


def memory_table(quick):
    measure = peak if DEVICE == "cuda" else peak_in_a_process_of_its_own
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        kinds = ("frozen", "lora", "smoa K=2", "smoa K=4", "smoa K=8", "dense")
        peaks = {kind: measure(kind, dtype, quick) for kind in kinds}
        row = {
            "weights": str(dtype).removeprefix("torch."),
            "lora MiB": peaks["lora"] / MIB,
            "lora/frozen": peaks["lora"] / peaks["frozen"],
        }
        row |= {f"{kind}/lora": peaks[kind] / peaks["lora"] for kind in kinds[2:]}
        rows.append(row)
    what = "torch.cuda.max_memory_allocated" if DEVICE == "cuda" else "of the whole process"
    return table(f"Memory: peak, {what}; 12 layers, 768 wide, 4 x 256 tokens", rows)


def stack(kind, depth, dtype):
    """Linear layers 768 -> 3072 -> 768 -> ... of the kind, each with a GELU."""
    modules = []
    for i in range(depth):
        n, m = (768, 3072) if i % 2 == 0 else (3072, 768)
        base = nn.Linear(n, m, dtype=dtype, device=DEVICE)
        modules += [KINDS[kind](base), nn.GELU()]
    return nn.Sequential(*modules)


def kept_table(quick):
    """Exact: the bytes of what autograd keeps, each storage once, parameters apart."""
    depth = 2 if quick else 16
    bases = {
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float32, autocast to bfloat16": torch.float32,
        "float32": torch.float32,
    }
    rows = []
    for name, dtype in bases.items():
        row = {"base": name, "weights": depth * 768 * 3072 * dtype.itemsize / MIB}
        for kind in ("lora", "smoa K=2", "smoa K=4", "smoa K=8"):
            model = stack(kind, depth, dtype)
            x = torch.randn(256, 768, dtype=dtype, device=DEVICE, requires_grad=True)
            with torch.autocast(DEVICE, torch.bfloat16, enabled="autocast" in name):
                row[kind] = kept_for_backward(model, x)[1] / MIB
        rows.append(row)
    title = f"Kept from forward to backward, in MiB: {depth} layers 768 <-> 3072, GELUs, 256 tokens"
    return table(title, rows)


def adapted_llama(method):
    """A Llama of SmolLM2-135M's widths with random weights, adapted on all linear layers."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).to(DEVICE).requires_grad_(False)
    model.enable_input_require_grads()
    if method == "peft lora":
        lora = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
        return peft.get_peft_model(model, lora)
    if method == "peft hira":
        return peft.get_peft_model(model, peft.HiraConfig(r=RANK, target_modules="all-linear"))
    return adapt_all(model, method)


def peft_table(quick):
    for package in ("peft", "transformers"):
        if importlib.util.find_spec(package) is None:
            print(
                f"\nBeside PEFT: skipped, no {package}: pip install -r tests/requirements-peers.txt"
            )
            return {}
    import peft

    methods = ["frozen", "peft lora", "peft hira", "smoa K=2", "smoa K=4", "smoa K=8"]
    if not hasattr(peft, "HiraConfig"):
        print(f"\nPEFT {peft.__version__} has no HiRA: its column is left out")
        methods.remove("peft hira")
    rows = []
    sizes = [(4, 96), (4, 256), (8, 256)]
    if DEVICE == "cuda":
        sizes.append((32, 1024))
    for batch, length in [(1, 8)] if quick else sizes:
        idx = torch.randint(512, (batch, length), device=DEVICE)

        def loss_of(model):
            return model(input_ids=idx, labels=idx).loss

        steps = {}
        for method in methods:
            steps[method] = training_step(adapted_llama(method), loss_of)
        times = medians(steps, 1 if quick else 9)
        row = {"tokens": f"{batch} x {length}", "peft lora ms": 1000 * times["peft lora"]}
        for method in methods:
            if method != "peft lora":
                row[method] = times[method] / times["peft lora"]
        rows.append(row)
    title = (
        f"Beside PEFT {peft.__version__}: a training step over that of its LoRA, float32, Llama of "
        "SmolLM2-135M's widths, 4 layers"
    )
    return table(title, rows)


TABLES = {
    "layer": layer_table,
    "model": model_table,
    "setup": setup_table,
    "memory": memory_table,
    "kept": kept_table,
    "peft": peft_table,
}


def table_names(text):
    names = text.split(",")
    unknown = [name for name in names if name not in TABLES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no table {', '.join(unknown)} in {', '.join(TABLES)}")
    return names


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        type=table_names,
        default=list(TABLES),
        metavar="TABLES",
        help=f"comma-separated, of {', '.join(TABLES)} (default: all)",
    )
    parser.add_argument("--json", type=Path, help="write the tables there as well")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)  # kind and dtype
    args = parser.parse_args()
    if args.peak:
        kind, dtype = args.peak
        print(peak(kind, getattr(torch, dtype), args.quick))
        return
    name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if DEVICE == "cuda":
        name = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {name}; medians of alternating runs")
    if args.quick:
        print("quick: the sizes are smaller than the titles say, and the times mean nothing")
    begin = time.time()
    tables = {}
    for table_name in args.only:
        tables |= TABLES[table_name](args.quick)
    print(f"\n{time.time() - begin:.0f} s")
    if args.json:
        results = {"torch": torch.__version__, "device": name, "tables": tables}
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
