"""The model: configuration, weights in and out, encoders, image and text preprocessing."""

from jaxzs.clip.config import CLIPConfig, TextConfig, VisionConfig
from jaxzs.clip.model import (
    Numerics,
    TowerOutput,
    contrastive_loss,
    encode_image,
    encode_text,
    logits_per_image,
    normalize,
    text_tower,
    vision_tower,
)
from jaxzs.clip.params import abstract_params, random_params

__all__ = [
    "CLIPConfig",
    "Numerics",
    "TextConfig",
    "TowerOutput",
    "VisionConfig",
    "abstract_params",
    "contrastive_loss",
    "encode_image",
    "encode_text",
    "logits_per_image",
    "normalize",
    "random_params",
    "text_tower",
    "vision_tower",
]
