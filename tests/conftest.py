"""pytest setup: the repository's modules are importable, draws are repeatable where CI is set, one thread is enough."""

import os
import sys
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # smoa.py and gpt_mini.py, with nothing installed

# No deadline: the first call of an operator is slow. Few examples: each draws a shape, a weight and a configuration at once.
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

smoa._PLAIN_UP_TO = (
    40  # the shapes drawn have 1 to 144 weights, so that the laws meet both ways to a gradient
)
