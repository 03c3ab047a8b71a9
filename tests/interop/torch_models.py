"""Random models of other libraries, and how near to them ours must be."""

from __future__ import annotations

import math

import numpy as np


def assert_near(ours, theirs, rtol: float = 5e-6) -> None:
    """Of the largest value: each side's float32 is within 1.1e-6 of float64, the smallest mistake moves it by 1e-4."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * np.abs(theirs).max())


def randomize(model, seed: int = 0) -> None:
    """Every parameter and every statistic of a torch model away from where it starts, so that all of them count."""
    import torch

    torch.manual_seed(seed)
    for name, value in model.state_dict().items():  # the tensors themselves, not copies
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point():
            # As wide as the model is, the products stay of one size: rounding does not grow from layer to layer.
            value += torch.randn(value.shape) * min(0.1, 0.5 * math.prod(value.shape[1:]) ** -0.5)
    model.eval()
