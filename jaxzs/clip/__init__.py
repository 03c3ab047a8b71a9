"""The model: configuration, weights in and out, encoders, image and text preprocessing."""

from jaxzs.clip.config import ARCHITECTURES, CLIPConfig, ResNetConfig, TextConfig, VisionConfig
from jaxzs.clip.hub import find_checkpoint
from jaxzs.clip.layers import Numerics
from jaxzs.clip.load import Model, fixed_size, load
from jaxzs.clip.model import (
    TowerOutput,
    contrastive_loss,
    encode_image,
    encode_text,
    logits_per_image,
    normalize,
    sigmoid_loss,
    text_tower,
    vision_tower,
)
from jaxzs.clip.naflex import Patches
from jaxzs.clip.naflex_images import PatchPreprocessor
from jaxzs.clip.params import abstract_params, random_params
from jaxzs.clip.preprocess import ImagePreprocessor
from jaxzs.clip.save import save
from jaxzs.clip.sharding import parameter_axes, parameter_shardings, place_parameters, placer
from jaxzs.clip.tokenizer import Tokenizer
from jaxzs.clip.weights import fingerprint, read_checkpoint, towers_of, write_checkpoint

__all__ = [
    "ARCHITECTURES",
    "CLIPConfig",
    "ImagePreprocessor",
    "Model",
    "Numerics",
    "PatchPreprocessor",
    "Patches",
    "ResNetConfig",
    "TextConfig",
    "Tokenizer",
    "TowerOutput",
    "VisionConfig",
    "abstract_params",
    "contrastive_loss",
    "encode_image",
    "encode_text",
    "find_checkpoint",
    "fingerprint",
    "fixed_size",
    "load",
    "logits_per_image",
    "normalize",
    "parameter_axes",
    "parameter_shardings",
    "place_parameters",
    "placer",
    "random_params",
    "read_checkpoint",
    "save",
    "sigmoid_loss",
    "text_tower",
    "towers_of",
    "vision_tower",
    "write_checkpoint",
]
