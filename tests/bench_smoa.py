"""What SMoA costs beside LoRA, HiRA and the frozen base, as Markdown tables and one JSON record.

    python tests/bench_smoa.py --json notebooks/studies/records/cost.json
    python tests/bench_smoa.py --only layers,steps --threads 1
    python tests/bench_smoa.py --only layers --against another/smoa.py
    python tests/bench_smoa.py --quick                           # tiny sizes: does it run?

What a row compares runs in turns in one process, so that what disturbs one disturbs all. The first
time in a row is in milliseconds; the others are ratios to it, taken within each turn. A cell is the
median and half the distance between the quartiles. pytest does not collect this file.
"""

import argparse
import importlib.util
import json
import platform
import re
import runpy
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nets import LoRA, kept_bytes  # noqa: E402

import smoa  # noqa: E402
from gpt_mini import GPT, GPTConfig  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BLOCKS = {"hira r=4": 1, "smoa r=8 K=2": 2, "smoa r=16 K=4": 4, "smoa r=32 K=8": 8}
KINDS = ["lora r=4", "frozen", *BLOCKS]  # all but "frozen" train equally many parameters


def adapt(model, kind, inject=smoa.inject):
    """Adapt all linear layers but the head. Random orders: they cost what spectral ones do."""
    model.requires_grad_(False)
    linear = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    for name, base in linear.items():
        if name.endswith("head"):
            continue
        if kind == "lora r=4":
            model.set_submodule(name, LoRA(base, rank=4))
        elif kind in BLOCKS:
            K = BLOCKS[kind]
            order = [torch.randperm(size) for size in base.weight.shape] if K > 1 else "natural"
            inject(model, [name], rank=4 * K, num_blocks=K, order=order)
    return model


# --------------------------------------------------------------------------------------------------
# Measuring

synchronize = torch.get_device_module(DEVICE).synchronize


def seconds(function):
    synchronize()
    begin = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - begin


def spread(values):
    low, median, high = (float(f"{q:.4g}") for q in statistics.quantiles(values, n=4))
    return {"median": median, "quartiles": [low, high]}


def compare(size, functions, quick):
    """Run {name: function} in turns, five at least and (unless quick) for ten seconds; one row.

    "other X" is divided by X, everything else by the first function.
    """
    turns = []
    end = time.perf_counter() + (0 if quick else 10)
    while len(turns) < 6 or time.perf_counter() < end:
        turns.append({name: seconds(function) for name, function in functions.items()})
    del turns[0]  # it warms up
    first, *others = functions
    row = {"size": size, f"{first}, ms": spread([1000 * turn[first] for turn in turns])}
    for name in others:
        below = name.removeprefix("other ") if name.startswith("other ") else first
        row[name] = spread([turn[name] / turn[below] for turn in turns])
    return row


def captured(function):
    """A function's kernels as one CUDA graph, which spends no time on launching them one by one."""
    with torch.cuda.stream(torch.cuda.Stream()):  # to warm up, aside as a capture asks for
        for _ in range(3):
            function()
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def training_step(model, loss_of):
    """A function that takes one step; with nothing to train, it goes forward and backward."""
    embedding = next(part for part in model.modules() if isinstance(part, nn.Embedding))
    # A gradient asked for there gives the frozen model a backward, as long as everybody else's.
    embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-3, fused=True) if parameters else None

    def step():
        loss_of(model).backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()

    return step


# --------------------------------------------------------------------------------------------------
# The tables: each function yields (table, row)


def layer_step(kind, m, n, T, dtype, inject=smoa.inject):
    base = nn.Linear(n, m, bias=False, device=DEVICE, dtype=dtype)
    model = adapt(nn.Sequential(base), kind, inject)
    x = torch.randn(T, n, device=DEVICE, dtype=dtype, requires_grad=True)
    g = torch.randn(T, m, device=DEVICE, dtype=dtype)
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(model(x), inputs, g)


def layers(args):
    """Forward and backward of one layer, over LoRA's."""
    square = [(768, 768, 256), (768, 768, 2048), (2048, 2048, 1024), (4096, 4096, 512)]
    sizes = [(384, 128, 4096), (1536, 384, 1024), (3072, 768, 1024), *square]
    for dtype in DTYPES:
        for m, n, T in [(96, 64, 32)] if args.quick else sizes:
            size = f"{m} x {n}, {T} tokens"
            shape = m, n, T, DTYPES[dtype]
            steps = {kind: layer_step(kind, *shape) for kind in KINDS}
            if args.against:
                inject = runpy.run_path(args.against)["inject"]
                steps |= {f"other {kind}": layer_step(kind, *shape, inject) for kind in BLOCKS}
            yield f"layers {dtype}", compare(size, steps, args.quick)
            if DEVICE == "cuda":
                graphs = {kind: captured(step) for kind, step in steps.items()}
                yield f"layers {dtype}, captured", compare(size, graphs, args.quick)


def steps(args):
    """A training step of gpt_mini in float32, over LoRA's."""
    small = GPTConfig(vocab_size=89)
    large = GPTConfig(vocab_size=89, block_size=256, n_layer=6, n_head=6, n_embd=384)
    plan = [("small", small, 12), ("small", small, 64), ("large", large, 4)]
    for preset, config, batch in plan[:1] if args.quick else plan:
        idx = torch.randint(89, (batch, config.block_size + 1), device=DEVICE)

        def loss_of(model):
            return model(idx[:, :-1], idx[:, 1:])[1]

        models = {kind: adapt(GPT(config).to(DEVICE), kind) for kind in KINDS}
        functions = {kind: training_step(model, loss_of) for kind, model in models.items()}
        size = f"{preset}, {batch} x {config.block_size} tokens"
        yield "steps", compare(size, functions, args.quick)


def kept(args):
    """MiB kept for the backward of 16 layers 768 <-> 3072 with GELUs, 256 tokens."""
    for weights in (*DTYPES, "float32, autocast to bfloat16"):
        options = dict(device=DEVICE, dtype=DTYPES[weights.split(",")[0]])
        row = {"weights": weights}
        for kind in KINDS:
            parts = []
            for n, m in [(768, 3072), (3072, 768)] * (1 if args.quick else 8):
                parts += [nn.Linear(n, m, **options), nn.GELU()]
            model = adapt(nn.Sequential(*parts), kind)
            x = torch.randn(256, 768, requires_grad=True, **options)
            with torch.autocast(DEVICE, torch.bfloat16, enabled="autocast" in weights):
                row[kind] = kept_bytes(model, x) / 2**20
        yield "kept", row


def llama(kind):
    """Four layers of SmolLM2-135M's widths, with random weights."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = dict(num_attention_heads=9, num_key_value_heads=3)
    widths = dict(hidden_size=576, intermediate_size=1536, vocab_size=512)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **heads, **widths)).to(DEVICE)
    configs = {"peft lora r=4": peft.LoraConfig, "peft hira r=4": peft.HiraConfig}
    if kind in configs:
        return peft.get_peft_model(model, configs[kind](r=4, target_modules="all-linear"))
    return adapt(model, kind)


def beside_peft(args):
    """A training step of four Llama layers in float32, over that of PEFT's LoRA."""
    if not importlib.util.find_spec("peft"):
        print("\npeft: skipped, pip install -r tests/requirements-peers.txt")
        return
    kinds = ["peft lora r=4", "frozen", "peft hira r=4", *BLOCKS]
    for batch, T in [(1, 8)] if args.quick else [(4, 96), (4, 256), (8, 256)]:
        idx = torch.randint(512, (batch, T), device=DEVICE)

        def loss_of(model):
            return model(input_ids=idx, labels=idx).loss

        functions = {kind: training_step(llama(kind), loss_of) for kind in kinds}
        yield "peft", compare(f"{batch} x {T} tokens", functions, args.quick)


def order(args):
    """spectral_order, and torch.linalg.svd over it, both in float64."""
    for m, n in [(96, 64)] if args.quick else [(768, 768), (2048, 2048), (1024, 4096)]:
        W = torch.randn(m, n, device=DEVICE)
        functions = {"spectral_order": lambda: smoa.spectral_order(W)}
        functions["svd"] = lambda: torch.linalg.svd(W.double(), full_matrices=False)
        yield "order", compare(f"{m} x {n}", functions, args.quick)


TABLES = {"layers": layers, "steps": steps, "kept": kept, "peft": beside_peft, "order": order}

# --------------------------------------------------------------------------------------------------
# The report


def machine():
    path = Path("/proc/cpuinfo")
    cpuinfo = path.read_text() if path.exists() else ""
    model = re.search(r"model name\s*: (.*)", cpuinfo)
    cpu = model[1] if model else platform.processor() or platform.machine()
    amx = "with AMX" if "amx_bf16" in cpuinfo else "without AMX"
    kernels = torch.backends.cpu.get_cpu_capability()
    gpu = f"{torch.cuda.get_device_name()}, " if DEVICE == "cuda" else ""
    threads = torch.get_num_threads()
    return f"{gpu}{cpu} {amx}, {kernels} kernels, {threads} threads, torch {torch.__version__}"


def markdown(rows):
    def text(cell):
        if isinstance(cell, dict):
            low, high = cell["quartiles"]
            return f"{cell['median']:.2f} ± {(high - low) / 2:.2f}"
        return cell if isinstance(cell, str) else f"{cell:.2f}"

    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[text(cell) for cell in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="TABLES", default=",".join(TABLES), help="%(default)s")
    parser.add_argument("--against", help="another smoa.py, whose layers' time over ours is added")
    parser.add_argument("--json", type=Path, help="put the tables in this record as well")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: the times mean nothing")
    args = parser.parse_args()
    unknown = set(args.only.split(",")) - TABLES.keys()
    if unknown:
        parser.error(f"--only: no {', '.join(unknown)} in {', '.join(TABLES)}")
    torch.set_num_threads(args.threads)
    print(machine())
    record = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for name in args.only.split(","):
        tables = {}
        for table, row in TABLES[name](args):
            tables.setdefault(table, []).append(row)
        for table, rows in tables.items():
            what = TABLES[name].__doc__
            print(f"\n{table}: {what}\n\n{markdown(rows)}", flush=True)
            about = {"what": what, "machine": machine(), "quick": args.quick}
            record[table] = about | {"rows": rows}
        if args.json:
            args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
