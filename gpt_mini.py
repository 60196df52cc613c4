"""A small decoder-only GPT in plain PyTorch, to be read in one sitting.

It knows nothing of adapters: `smoa.inject` reaches it from outside. After nanoGPT (pre-norm blocks,
tied embedding and head, no biases), with rotary positions (2104.09864) and a token shift (RWKV,
2305.13048). Its training is in train_shakespeare.py.

    model = GPT(GPTConfig(vocab_size=65))
    logits, loss = model(idx, targets)                      # idx, targets (B, T) int64
    text = model.generate(idx, 200, temperature=0.8, top_k=20)
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int = 64  # longest context, in tokens
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128  # a multiple of 2 n_head: rotary positions turn pairs of channels
    dropout: float = 0.0  # on the residual branches; 0 while the model sees its data about once


class TokenShift(nn.Module):
    """x_t -> (1 - mix) x_t + mix x_{t-1}, per channel, with zeros before the first position.

    Neighbouring letters then meet without an attention head; the records of the studies rely on it.
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
    """Causal self-attention with rotary positions, (B, T, C) -> (B, T, C)."""

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
    """Two layers with a GELU between them, at each position alone, (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        x = F.gelu(self.fc(x))
        return F.dropout(self.proj(x), self.dropout, self.training)


class Block(nn.Module):
    """Attention, then the MLP, each added to the residual stream, (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd, bias=False)
        self.shift1 = TokenShift(config.n_embd)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.n_embd, bias=False)
        self.shift2 = TokenShift(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.shift1(self.norm1(x)))
        return x + self.mlp(self.shift2(self.norm2(x)))


class GPT(nn.Module):
    """Tokens in, next-token logits out, through n_layer blocks; see `forward` and `generate`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, bias=False)
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
            targets: (B, T) int64, the tokens one place on.
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
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, *, temperature=1.0, top_k=None, generator=None):
        """Continue idx (B, T) by sampling; returns (B, T + max_new_tokens).

        Args:
            temperature: >= 0; below 1 sharpens the distribution, 0 takes the likeliest token.
            top_k: sample among the k likeliest tokens only; None among all.
            generator: a torch.Generator on idx's device, for samples that repeat.
        """
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
