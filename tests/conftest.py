"""pytest setup: modules importable, draws repeatable where CI is set, one thread."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # smoa.py and gpt_mini.py, with nothing installed

# No deadline: the first call of an operator is slow.
# Few examples: each draws a shape, a weight and a configuration at once.
settings.register_profile(
    "smoa",
    deadline=None,
    max_examples=50,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("smoa")
torch.set_num_threads(1)  # the matrices are tiny

import smoa  # noqa: E402

# The shapes drawn have 1 to 144 weights: the laws meet both ways to a gradient.
smoa.LEAN_ABOVE = 40
# And both ways to x delta_W^T in half precision, whatever this CPU is good at: float16 by blocks.
smoa.DENSE_BFLOAT16 = ["cpu", "cuda"]


@pytest.fixture(params=["lean", "plain"])
def way(request, monkeypatch):
    """The way to a gradient that a layer takes, whatever its size."""
    threshold = {"lean": 0, "plain": 2**40}
    monkeypatch.setattr(smoa, "LEAN_ABOVE", threshold[request.param])
    return request.param
