"""A small decoder-only GPT and its training loop in plain PyTorch, to be read in one sitting.

They know nothing of adapters: `smoa.inject` reaches the model from outside, and what is frozen does
not train. After nanoGPT (pre-norm blocks, tied embedding and head, no biases), with two changes
that pay at this size: rotary positions (2104.09864), and a token shift (RWKV, 2305.13048): before
attention and before the MLP each channel mixes in the position before it, by a share that it
learns, so that pairs of characters need no attention head to meet.

    model = GPT(GPTConfig(vocab_size=65))
    logits, loss = model(idx, targets)                      # idx, targets (B, T) int64
    losses = list(train_steps(model, tokens, Recipe(steps=1000, batch_size=12, lr=6e-3)))
    text = model.generate(idx, 200, temperature=0.8, top_k=20)
"""

import contextlib
import gc
import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# ---- The model -----------------------------------------------------------------------------------


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int = 64  # longest context, in tokens
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0  # on the residual branches; 0 while the model sees its data about once

    def __post_init__(self):
        if self.n_embd % (2 * self.n_head):
            raise ValueError(
                f"n_embd={self.n_embd} must be a multiple of 2 n_head={2 * self.n_head}: "
                "rotary positions turn pairs of channels"
            )


class Norm(nn.LayerNorm):
    """LayerNorm without bias.

    As good here as RMSNorm, in a third of its time on a CPU, where PyTorch has no fused RMSNorm.
    """

    def __init__(self, n_embd):
        super().__init__(n_embd, bias=False)


class TokenShift(nn.Module):
    """x_t -> (1 - mix) x_t + mix x_{t-1}, per channel, with zeros before the first position.

    Starts half and half.
    """

    def __init__(self, n_embd):
        super().__init__()
        self.mix = nn.Parameter(torch.full((n_embd,), 0.5))

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        zero = torch.zeros_like(x[:, :1])
        previous = torch.cat((zero, x[:, :-1]), dim=1)
        return torch.lerp(x, previous, self.mix.to(x.dtype))


def rotate(x, cos, sin):
    """Rotary positions: turn channels (i, i + d/2) of each head by the angle t theta_i.

    x (B, H, T, d); cos, sin (T, d).
    """
    other = x.roll(x.shape[-1] // 2, dims=-1)  # channel i meets i + d/2, and the other way round
    return x * cos + other * sin


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        d = C // config.n_head
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.proj = nn.Linear(C, C, bias=False)
        theta = 10000.0 ** (-torch.arange(0, d, 2) / d)
        angle = torch.outer(torch.arange(config.block_size), theta)  # (block_size, d / 2)
        cos = torch.cat((angle.cos(), angle.cos()), dim=-1)  # (block_size, d)
        sin = torch.cat((-angle.sin(), angle.sin()), dim=-1)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, d) each
        cos, sin = self.cos[:T], self.sin[:T]
        q = rotate(q, cos, sin).to(v.dtype)
        k = rotate(k, cos, sin).to(v.dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, d)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.proj(y), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        x = F.gelu(self.fc(x))
        return F.dropout(self.proj(x), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = Norm(config.n_embd)
        self.shift1 = TokenShift(config.n_embd)
        self.attn = Attention(config)
        self.norm2 = Norm(config.n_embd)
        self.shift2 = TokenShift(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.shift1(self.norm1(x)))
        return x + self.mlp(self.shift2(self.norm2(x)))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = Norm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.head.weight = self.embed.weight  # tied
        # GPT-2's start: the 2 n_layer projections that add to the residual stream are smaller.
        small = 0.02 / math.sqrt(2 * config.n_layer)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = small if name.endswith("proj.weight") else 0.02
                nn.init.normal_(p, std=std)

    def forward(self, idx, targets=None):
        """Next-token logits, and their loss where targets are given.

        Args:
            idx: (B, T) int64 tokens, T <= block_size.
            targets: (B, T) int64, the tokens one place on; -1 is left out of the loss.
        Returns:
            logits (B, T, vocab_size); the mean cross-entropy in nats per token, or None.
        Raises:
            ValueError: the context is longer than block_size.
        """
        B, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"the model reads at most {self.config.block_size} tokens, got {T}")
        x = self.embed(idx)  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, *, temperature=1.0, top_k=None, generator=None):
        """Continue idx (B, T) by sampling; returns (B, T + max_new_tokens).

        Args:
            temperature: >= 0; below 1 sharpens the distribution, 0 takes the likeliest token.
            top_k: sample among the k likeliest tokens only; None among all.
            generator: a torch.Generator on idx's device, for samples that repeat.
        Raises:
            ValueError: temperature below 0, top_k below 1, or an empty idx.
        """
        if temperature < 0 or (top_k is not None and top_k < 1) or idx.shape[1] == 0:
            raise ValueError(
                "need temperature >= 0, top_k >= 1 and at least one token, "
                f"got {temperature}, {top_k} and {idx.shape[1]}"
            )
        training = self.training
        self.eval()
        for _ in range(max_new_tokens):
            context = idx[:, -self.config.block_size :]
            logits, _ = self(context)
            logits = logits[:, -1].float()  # (B, vocab_size)
            if top_k is not None:
                k = min(top_k, logits.shape[-1])
                kth = logits.topk(k).values[:, -1:]  # (B, 1)
                logits[logits < kth] = -math.inf
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)  # (B, 1)
            else:
                chances = F.softmax(logits / temperature, dim=-1)
                token = torch.multinomial(chances, 1, generator=generator)
            idx = torch.cat((idx, token), dim=1)
        self.train(training)
        return idx


# ---- Its training --------------------------------------------------------------------------------


@dataclass
class Recipe:
    steps: int
    batch_size: int  # windows of block_size tokens, over all processes together
    lr: float  # at its peak
    weight_decay: float = 0.0
    seed: int = 0  # of batches and dropout


def train_steps(model, tokens, recipe, *, optimizer=None, done=0):
    """Train what requires a gradient. A generator: it takes a step for each loss that one asks for.

    All randomness of a step comes from the seed and the step's number, so that a run that was
    stopped after `done` steps goes on, with its optimizer and on as many processes, as if it had
    not been. Under torchrun every process takes its share of each batch, and gradients and losses
    are averaged.

    Args:
        tokens: (N,) int64, on the CPU; N > block_size.
        optimizer: None makes one. Its learning rate is set at each step.
    Yields:
        the loss of each step's batch before the step, in nats a token.
    Raises:
        FloatingPointError: a loss is not finite.
        ValueError: the text is too short, or nothing requires a gradient.
    """
    device = next(model.parameters()).device
    rank, world = rank_and_world()
    optimizer = optimizer or make_optimizer(model, recipe.weight_decay)
    net = model
    if world > 1:
        net = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    model.train()
    for step in range(done, recipe.steps):
        torch.manual_seed(recipe.seed * 1_000_003 + step * world + rank)  # for dropout
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.steps, recipe.lr)
        idx, targets = batch(tokens, model.config.block_size, recipe.batch_size, recipe.seed, step)
        idx = idx[rank::world].to(device)
        targets = targets[rank::world].to(device)
        with autocast(device):
            _, loss = net(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss = loss.detach()
        if world > 1:
            dist.all_reduce(loss)
        loss = loss.item() / world
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step + 1}")
        yield loss


def batch(tokens, block_size, batch_size, seed, step):
    """A step's batch, idx and targets (B, T): windows of the text, drawn by seed and step alone."""
    check_length(tokens, block_size)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(tokens) - block_size, (batch_size, 1), generator=generator)  # (B, 1)
    windows = tokens[starts + torch.arange(block_size + 1)]  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


def check_length(tokens, block_size):
    if len(tokens) <= block_size:
        raise ValueError(f"need more than {block_size} tokens, a window's, got {len(tokens)}")


def has_diverged(loss, vocab_size):
    """Whether a loss is twice that of guessing, or no number."""
    return not loss <= 2 * math.log(vocab_size)


def learning_rate(step, steps, peak):
    """Linear warm-up over a twentieth of the steps, then a cosine down to zero."""
    warmup = max(1, steps // 20)
    progress = max(0, step - warmup) / max(1, steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * min((step + 1) / warmup, cosine)


def make_optimizer(model, weight_decay):
    """AdamW on what requires a gradient; vectors (norms, shifts) do not decay."""
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError("nothing to train: no parameter requires a gradient")
    groups = [
        dict(params=[p for p in params if p.ndim >= 2], weight_decay=weight_decay),
        dict(params=[p for p in params if p.ndim < 2], weight_decay=0.0),
    ]
    fused = params[0].device.type != "mps"
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=fused)


@torch.no_grad()
def evaluate(model, tokens, *, limit=None):
    """Mean loss, in nats a token, over all windows of block_size, or `limit` evenly spread.

    Raises:
        FloatingPointError: it is not finite.
        ValueError: the text is too short.
    """
    T = model.config.block_size
    check_length(tokens, T)
    device = next(model.parameters()).device
    count = (len(tokens) - 1) // T
    starts = T * torch.linspace(0, count - 1, min(count, limit or count)).long()
    training = model.training
    model.eval()
    total = 0.0
    for part in starts.split(256):
        windows = tokens[part[:, None] + torch.arange(T + 1)].to(device)  # (256, T + 1)
        with autocast(device):
            _, loss = model(windows[:, :-1], windows[:, 1:])
        total += loss.item() * len(part)
    model.train(training)
    loss = total / len(starts)
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss on held-out text is {loss}")
    return loss


# ---- Where it trains -----------------------------------------------------------------------------


def choose_device(name=None):
    """The named device, or the first of cuda, mps and cpu that can add two numbers.

    Raises:
        ValueError: it cannot. Under torchrun also: more processes than CUDA devices.
    """
    likely = ["cuda", "cpu"] if dist.is_initialized() else ["cuda", "mps", "cpu"]
    for device in likely if name is None else [name]:
        if device == "cuda" and dist.is_initialized():
            if 0 < torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
                raise ValueError("cuda: torchrun started more processes than there are devices")
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        try:
            torch.ones(2, device=device).sum().item()  # a tensor on meta, say, has no values
            return torch.device(device)
        except (RuntimeError, AssertionError, ImportError) as error:
            reason = str(error).splitlines()[0][:100]
    raise ValueError(f"{device} is not to be had here: {reason}")


def autocast(device):
    """bfloat16 on the cards that compute in it, float32 everywhere else."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


@contextlib.contextmanager
def process_group():
    """While it lasts, the processes of a torchrun are one group. Else it does nothing."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        nccl = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
    try:
        yield
    finally:
        if dist.is_initialized():
            gc.collect()  # a DistributedDataParallel that outlives its group can abort the exit
            dist.destroy_process_group()


def is_first():
    """Whether this process is the one that prints and writes."""
    return rank_and_world()[0] == 0


def rank_and_world():
    """Which process this is, and of how many. (0, 1) without torchrun."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
