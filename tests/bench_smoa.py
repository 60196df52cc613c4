"""What SMoA costs, as ratios to a LoRA of equally many parameters and to the frozen base, measured side by side in one run.

    python tests/bench_smoa.py                 # four tables, within 5 minutes on two cores; on a GPU if there is one
    python tests/bench_smoa.py --json out.json

Not collected by pytest, and nothing here asserts on a time. LoRA is written as its paper has it, x W0^T + (x A^T) B^T. "dense" is
the formulation to beat: copies of the anchors, a dense delta_W at every forward, and a second full matmul with it.
"""

import argparse
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
import smoa  # noqa: E402
from gpt_mini import GPT, GPTConfig  # noqa: E402
from plan import PRESETS  # noqa: E402
from train_shakespeare import TARGETS  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANK, BLOCKS = 4, 4  # LoRA of rank 4; SMoA(16, K=4) trains as many numbers


class LoRA(nn.Module):
    def __init__(self, base, rank=RANK):
        super().__init__()
        m, n = base.weight.shape
        self.base = base.requires_grad_(False)
        self.A, self.B = (
            nn.Parameter(torch.randn(rank, n, device=base.weight.device) / n**0.5),
            nn.Parameter(torch.zeros(m, rank, device=base.weight.device)),
        )

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.A), self.B)


class Dense(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.inner = smoa.SMoALinear(base, RANK * BLOCKS, BLOCKS)
        self.anchors = [
            base.weight[rows[:, None], cols].clone()
            for rows, cols in zip(self.inner.rows, self.inner.cols)
        ]

    def forward(self, x):
        layer = self.inner
        delta = torch.zeros_like(layer.base.weight)
        for rows, cols, A_k, B_k, M_k in zip(
            layer.rows, layer.cols, layer.A, layer.B, self.anchors
        ):
            delta[rows[:, None], cols] = layer.scale * (B_k @ A_k) * M_k
        return layer.base(x) + F.linear(x, delta)


KINDS = {
    "frozen": lambda base: base.requires_grad_(False),
    "lora": LoRA,
    "smoa": lambda base: smoa.SMoALinear(base, RANK * BLOCKS, BLOCKS),
    "smoa K=8": lambda base: smoa.SMoALinear(base, RANK * 8, 8),
    "dense": Dense,
    "merged": lambda base: merged(smoa.SMoALinear(base, RANK * BLOCKS, BLOCKS)),
}


def merged(layer):
    layer.merge()
    return layer.eval()


def adapted(kind, config):
    """A GPT whose target layers are of the kind. The embedding's output asks for a gradient, as below an adapter it always must."""
    torch.manual_seed(0)
    model = GPT(config).to(DEVICE).requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in TARGETS:
            setattr(
                model.get_submodule(name.rpartition(".")[0]),
                name.rpartition(".")[2],
                KINDS[kind](module),
            )
    model.embed.register_forward_hook(lambda module, args, output: output.requires_grad_())
    return model


def medians(functions, repeats):
    """Median seconds of each function, in turns, so that what disturbs one disturbs all; two turns to warm up."""
    times = {name: [] for name in functions}
    for _ in range(repeats + 2):
        for name, function in functions.items():
            torch.cuda.synchronize() if DEVICE == "cuda" else None
            begin = time.perf_counter()
            function()
            torch.cuda.synchronize() if DEVICE == "cuda" else None
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds[2:]) for name, seconds in times.items()}


def table(title, rows):
    print(f"\n{title}")
    columns = list(rows[0])
    cells = [columns] + [
        [f"{row[c]:.2f}" if isinstance(row[c], float) else str(row[c]) for c in columns]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths)), flush=True)
    return rows


def ratios(times, reference):
    return {
        f"{name}/{reference}": times[name] / times[reference] for name in times if name != reference
    }


def layers():
    """Forward and backward of one layer."""
    rows = []
    for m, n, T in (
        (384, 128, 4096),
        (1536, 384, 4096),
        (768, 768, 4096),
        (3072, 768, 4096),
        (4096, 4096, 2048),
        (14336, 4096, 2048),
    ):
        torch.manual_seed(0)
        base = nn.Linear(n, m, bias=False, device=DEVICE)
        x, g = (
            torch.randn(T, n, device=DEVICE, requires_grad=True),
            torch.randn(T, m, device=DEVICE),
        )
        order = (torch.randperm(m), torch.randperm(n))
        modules = {
            "frozen": base,
            "lora": LoRA(base),
            "smoa": smoa.SMoALinear(base, RANK * 4, 4, order=order),
            "smoa K=8": smoa.SMoALinear(base, RANK * 8, 8, order=order),
        }
        if m * n < 1e7:
            modules["dense"] = Dense(base)
        times = medians(
            {name: lambda module=module: module(x).backward(g) for name, module in modules.items()},
            15 if m * n < 1e7 else 3,
        )
        r = ratios(times, "lora")
        rows.append({"out x in": f"{m} x {n}", "tokens": T, "lora ms": 1000 * times["lora"], "lora/frozen": times["lora"] / times["frozen"],
                     "smoa/lora": r["smoa/lora"], "smoa K=8/lora": r["smoa K=8/lora"], "dense/lora": r.get("dense/lora", "")})  # fmt: skip
    return table("Layer: forward + backward, at equal parameters (LoRA r=4, K=4 unless said)", rows)


def models():
    """A training step of the tiny GPT, and the speed of generation."""
    rows = []
    for preset, B, repeats in (("small", 12, 15), ("small", 64, 9), ("large", 4, 7)):
        model_options = PRESETS[preset]["model"] | dict(dropout=0.0)
        config = GPTConfig(vocab_size=89, **model_options)
        idx = torch.randint(89, (B, config.block_size + 1), device=DEVICE)
        steps = {}
        for kind in ("frozen", "lora", "smoa", "dense"):
            model = adapted(kind, config)
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, 1e-3, fused=True) if trained else None

            def step(model=model, optimizer=optimizer):
                model(idx[:, :-1], idx[:, 1:])[1].backward()
                if optimizer is not None:
                    optimizer.step()
                    optimizer.zero_grad()

            steps[kind] = step
        times = medians(steps, repeats)
        generation = {
            kind: lambda model=adapted(kind, config).eval(): model.generate(idx[:1, :8], 30)
            for kind in ("frozen", "merged")
        }
        speed = medians(generation, 7)
        rows.append({"preset": preset, "batch": f"{B} x {config.block_size}", "lora ms": 1000 * times["lora"], "lora/frozen": times["lora"] / times["frozen"],
                     "smoa/lora": times["smoa"] / times["lora"], "smoa/dense": times["smoa"] / times["dense"],
                     "merged/frozen, generating": speed["merged"] / speed["frozen"]})  # fmt: skip
    return table("Model: a training step of gpt_mini", rows)


def setup():
    rows = []
    for size in (768, 2048, 4096):
        W = torch.randn(size, size, device=DEVICE)
        functions = {
            "order": lambda: smoa.spectral_order(W),
            "svd float32": lambda: torch.linalg.svd(W, full_matrices=False),
        }
        if size < 4096:
            functions["svd float64"] = lambda: torch.linalg.svd(W.double(), full_matrices=False)
        times = {}
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            times[name] = time.perf_counter() - begin
        rows.append({"size": f"{size} x {size}", "order s": times["order"], "svd float32/order": times["svd float32"] / times["order"],
                     "svd float64/order": times.get("svd float64", 0.0) / times["order"] or ""})  # fmt: skip
    return table("Set-up: spectral_order (in float64) against a full SVD", rows)


def peak(kind):
    """Peak memory, in bytes, of two training steps of a 12-layer, 768-wide GPT; to be called in a process of its own."""
    config = GPTConfig(vocab_size=89, block_size=256, n_layer=12, n_head=12, n_embd=768)
    smoa.spectral_order = lambda W: (
        torch.randperm(W.shape[0]),
        torch.randperm(W.shape[1]),
    )  # the step is measured, not the set-up
    model = adapted(kind, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3, fused=True) if trained else None
    idx = torch.randint(89, (4, 257), device=DEVICE)
    for _ in range(2):
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    return (
        torch.cuda.max_memory_allocated()
        if DEVICE == "cuda"
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )


def memory():
    peaks = {
        kind: int(
            subprocess.run(
                [sys.executable, __file__, "--peak", kind],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for kind in ("frozen", "lora", "smoa", "dense")
    }
    row = {
        "lora MB": peaks["lora"] / 1e6,
        "lora/frozen": peaks["lora"] / peaks["frozen"],
        "smoa/lora": peaks["smoa"] / peaks["lora"],
        "dense/lora": peaks["dense"] / peaks["lora"],
    }
    return table(
        f"Memory: peak {'allocated' if DEVICE == 'cuda' else 'of the process'}, training steps of 12 layers, 768 wide, 4 x 256 tokens",
        [row],
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the tables there as well")
    parser.add_argument("--peak", choices=list(KINDS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(peak(args.peak))
        return
    name = (
        torch.cuda.get_device_name()
        if DEVICE == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    print(f"torch {torch.__version__}, {name}; medians of alternating runs")
    begin = time.time()
    tables = {"layers": layers(), "models": models(), "setup": setup(), "memory": memory()}
    print(f"\n{time.time() - begin:.0f} s")
    if args.json:
        args.json.write_text(
            json.dumps(dict(torch=torch.__version__, device=name, **tables), indent=2)
        )


if __name__ == "__main__":
    main()
