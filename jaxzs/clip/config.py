"""Configuration of a CLIP checkpoint: frozen, hashable (a static argument of `jit`), read from HuggingFace JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxzs.clip.files import read_json
from jaxzs.errors import ConfigError
from jaxzs.files import from_json

# Larger than any published CLIP; a config.json is untrusted input and decides what gets allocated.
_LARGEST = {
    "hidden_size": 16_384,
    "intermediate_size": 65_536,
    "num_hidden_layers": 256,
    "num_attention_heads": 256,
    "vocab_size": 2_000_000,
    "max_position_embeddings": 65_536,
    "image_size": 8_192,
    "patch_size": 1_024,
    "num_channels": 16,
    "projection_dim": 16_384,
}
_Tower = TypeVar("_Tower")
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Text transformer; the defaults are those that HuggingFace leaves out of config.json.

    >>> clip.TextConfig().max_position_embeddings, clip.TextConfig(hidden_size=768).hidden_act
    (77, 'quick_gelu')
    """

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407  # 2 in the first published configs: the pooled position is then argmax(ids)
    pad_token_id: int | None = 1


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Vision transformer; the defaults are those that HuggingFace leaves out of config.json.

    >>> vision = clip.VisionConfig(image_size=224, patch_size=16)
    >>> vision.grid, vision.num_patches
    ((14, 14), 196)
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at the native image size."""
        return self.image_size // self.patch_size, self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches at the native image size."""
        return self.grid[0] * self.grid[1]


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Both towers and the width of the shared space. `projection_dim` at the top rules, as in HuggingFace.

    >>> config = clip.CLIPConfig.from_hf({"model_type": "clip", "vision_config": {"patch_size": 16}})
    >>> config.vision.patch_size, config.vision.hidden_size, config.projection_dim
    (16, 768, 512)
    >>> clip.CLIPConfig.from_hf({"model_type": "siglip"})
    Traceback (most recent call last):
    jaxzs.errors.ConfigError: config: model_type is 'siglip', expected 'clip'. ...
    """

    text: TextConfig = TextConfig()
    vision: VisionConfig = VisionConfig()
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | Path) -> CLIPConfig:
        """Configuration from a HuggingFace `config.json`: its dict, its path, or the folder it is in.

        Raises `ConfigError` when the file is not JSON, is not of a CLIP model, or its numbers do not fit.
        """
        values, where = (source, "config") if isinstance(source, Mapping) else _read_json(source)
        kind = values.get("model_type", "clip" if "vision_config" in values else None)
        if kind != "clip":
            raise ConfigError(
                f"{where}: model_type is {kind!r}, expected 'clip'. Only CLIP checkpoints of the "
                "HuggingFace layout (text and vision transformers) are supported."
            )
        shared = {key: values[key] for key in ("projection_dim", "logit_scale_init_value") if key in values}
        return dataclasses.replace(
            from_json(cls, shared, where, ConfigError),
            text=_tower(TextConfig, values, "text", where),
            vision=_tower(VisionConfig, values, "vision", where),
        )

    def to_hf(self) -> dict[str, Any]:
        """The dict that HuggingFace's `CLIPConfig` reads; `from_hf(to_hf())` is the identity."""
        return {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": self.projection_dim,
            "logit_scale_init_value": self.logit_scale_init_value,
            "text_config": {
                "model_type": "clip_text_model",
                "projection_dim": self.projection_dim,
                **dataclasses.asdict(self.text),
            },
            "vision_config": {
                "model_type": "clip_vision_model",
                "projection_dim": self.projection_dim,
                **dataclasses.asdict(self.vision),
            },
        }


def _read_json(path: str | Path) -> tuple[Mapping[str, Any], str]:
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    return read_json(path, ConfigError), str(path)


def _tower(kind: type[_Tower], values: Mapping[str, Any], name: str, where: str) -> _Tower:
    """One tower's dataclass. `text_config_dict` of early files replaces all of `text_config`, as in HuggingFace."""
    early = values.get(f"{name}_config_dict")
    part = values.get(f"{name}_config") or {} if early is None else early
    return from_json(kind, part, f"{where}: {name}_config", ConfigError, ignore_unknown=True)


def _check(config: CLIPConfig) -> None:
    for part, values in (("text", config.text), ("vision", config.vision), ("model", config)):
        for key, largest in _LARGEST.items():
            value = getattr(values, key, None)
            if value is not None and not 0 < value <= largest:
                raise ConfigError(f"{part}: {key} is {value}, expected 1 to {largest}")
    for part, tower in (("text", config.text), ("vision", config.vision)):
        if tower.hidden_size % tower.num_attention_heads:
            raise ConfigError(
                f"{part}: hidden_size {tower.hidden_size} is not a multiple of "
                f"num_attention_heads {tower.num_attention_heads}"
            )
        if tower.hidden_act not in ACTIVATIONS:
            raise ConfigError(f"{part}: hidden_act {tower.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}")
        if not 0 < tower.layer_norm_eps < 1:
            raise ConfigError(f"{part}: layer_norm_eps is {tower.layer_norm_eps}, expected 0 to 1")
    if not math.isfinite(config.logit_scale_init_value):
        raise ConfigError("model: logit_scale_init_value must be finite")
    if config.vision.patch_size > config.vision.image_size:
        raise ConfigError(
            f"vision: patch_size {config.vision.patch_size} exceeds image_size {config.vision.image_size}"
        )
    # An end token outside the vocabulary never occurs, and pooling would silently take position 0.
    if not 0 <= config.text.eos_token_id < config.text.vocab_size:
        raise ConfigError(
            f"text: eos_token_id {config.text.eos_token_id} lies outside the vocabulary of "
            f"{config.text.vocab_size} tokens; set it in text_config"
        )


_LARGE_TEXT = TextConfig(768, 3072, 12, 12)

# The published shapes of OpenAI's CLIP, for measuring and compiling without their weights.
ARCHITECTURES: Mapping[str, CLIPConfig] = {
    "ViT-B/32": CLIPConfig(),
    "ViT-B/16": CLIPConfig(vision=VisionConfig(patch_size=16)),
    "ViT-L/14": CLIPConfig(_LARGE_TEXT, VisionConfig(1024, 4096, 24, 16, 224, 14), 768),
    "ViT-L/14@336": CLIPConfig(_LARGE_TEXT, VisionConfig(1024, 4096, 24, 16, 336, 14), 768),
}
