"""pytest setup: the same draws on every machine, one thread."""

import torch
from hypothesis import HealthCheck, settings

# No deadline: the first call of an operator is slow.
# Few examples: each draws a shape, a weight and the options at once.
common = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("smoa", max_examples=50, derandomize=True, **common)
settings.register_profile("explore", max_examples=100, **common)  # fresh draws
settings.load_profile("smoa")  # `pytest --hypothesis-profile=explore` comes later, and wins

torch.set_num_threads(1)  # the matrices are small
