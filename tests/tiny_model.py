"""A random CLIP of a few thousand weights, for tests of everything around the model."""

from __future__ import annotations

import jax
import numpy as np

from jaxzs import clip
from jaxzs.clip.params import random_params

CONFIG = clip.CLIPConfig(
    text=clip.TextConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=64,
        max_position_embeddings=16,
        eos_token_id=63,
    ),
    vision=clip.VisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    ),
    projection_dim=12,
)


def tiny_model(seed: int = 0, size: int = 16) -> clip.Model:
    """A model without a tokenizer that takes images of `size` pixels (preprocessed to its own 16)."""
    return clip.Model(
        params=random_params(jax.random.key(seed), CONFIG),
        config=CONFIG,
        tokenizer=None,  # type: ignore[arg-type]
        preprocessor=clip.ImagePreprocessor(size=size, crop_size=(16, 16)),
        name=f"tiny-{seed}",
        card={},
    )


def noise(number: int, seed: int = 0) -> np.ndarray:
    """Images [N,20,24,3] uint8."""
    shape = (number, 20, 24, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
