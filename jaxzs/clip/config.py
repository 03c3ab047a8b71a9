"""Configuration of a dual encoder: frozen, hashable (a static argument of `jit`), read from HuggingFace JSON.

CLIP, SigLIP and the ResNets are one configuration: what the families differ in are fields whose defaults are CLIP's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

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
_FAMILY_FIELDS = (
    "pooling", "causal", "projection", "projection_bias", "class_token", "patch_bias", "pre_norm", "variable",
)  # fmt: skip
LEGACY_END = 2  # the end token of the first published configurations: the highest id is pooled then
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
    hidden_act: str = "quick_gelu"  # OpenAI's; LAION's files say "gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407  # 2 in the first published configs: the pooled position is then argmax(ids)
    pad_token_id: int | None = 1
    # Which token is the text's: HuggingFace's rule ("end"), the first end token whatever its id ("eos"), the highest id
    # ("highest"), or the last place, padding or not ("last").
    pooling: Literal["end", "eos", "highest", "last"] = "end"
    causal: bool = True  # False in SigLIP and CLIPA
    projection: bool = True  # False in one SigLIP of open_clip, whose widths agree
    projection_bias: bool = False  # True in SigLIP, whose head is a Linear


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
    pooling: Literal["class", "mean", "map"] = "class"  # of the patches: their mean, or attention by a learned probe
    class_token: bool = True  # False in SigLIP
    patch_bias: bool = False  # True in SigLIP
    pre_norm: bool = True  # False in SigLIP and CLIPA
    projection: bool = True  # False in SigLIP, whose head ends in the shared space
    variable: bool = False  # NaFlex: any grid of patches, positions resized to it

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at the native image size."""
        return self.image_size // self.patch_size, self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches at the native image size."""
        return self.grid[0] * self.grid[1]


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """The ModifiedResNet of CLIP's RN50 to RN50x64: four stages of bottlenecks, then attention pooling.

    >>> tower = clip.ResNetConfig(layers=(3, 4, 6, 3), width=64, num_attention_heads=32, image_size=224)
    >>> tower.hidden_size, tower.grid
    (2048, (7, 7))
    """

    layers: tuple[int, int, int, int]
    width: int  # of the stem; stage s, from 0, ends with 4 * width * 2^s channels
    num_attention_heads: int  # of the pool, the only attention there is
    image_size: int = 224
    num_channels: int = 3

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage, which the pool reads."""
        return 32 * self.width

    @property
    def patch_size(self) -> int:
        """Pixels that one place of the last stage stands for."""
        return 32

    @property
    def num_hidden_layers(self) -> int:
        """Bottlenecks of all stages."""
        return sum(self.layers)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the last stage at the native image size."""
        return self.image_size // 32, self.image_size // 32

    @property
    def num_patches(self) -> int:
        """Places of the last stage at the native image size."""
        return self.grid[0] * self.grid[1]


# What files of model_type "siglip" leave out. No shape would tell its epsilon and activation from CLIP's.
_SIGLIP_TEXT = TextConfig(
    768, 3072, 12, 12, 32_000, 64, "gelu_pytorch_tanh", 1e-6, pooling="last", causal=False, projection_bias=True
)
_SIGLIP_VISION = VisionConfig(
    hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, patch_size=16, pooling="map",
    class_token=False, patch_bias=True, pre_norm=False, projection=False,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Both towers and the width of the shared space. `projection_dim` at the top rules, as in HuggingFace.

    vision: a `VisionConfig`, or a `ResNetConfig`. logit_bias: whether there is one, as in SigLIP.

    >>> config = clip.CLIPConfig.from_hf({"model_type": "clip", "vision_config": {"patch_size": 16}})
    >>> config.vision.patch_size, config.vision.hidden_size, config.projection_dim
    (16, 768, 512)
    >>> clip.CLIPConfig.from_hf({"model_type": "siglip"}).vision.pooling
    'map'
    >>> clip.CLIPConfig.from_hf({"model_type": "blip"})
    Traceback (most recent call last):
    jaxzs.errors.ConfigError: config: model_type is 'blip', expected 'clip' or ...
    """

    text: TextConfig = TextConfig()
    vision: VisionConfig | ResNetConfig = VisionConfig()
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592  # ln(1 / 0.07)
    logit_bias: bool = False  # sigmoid models add it to every logit

    def __post_init__(self) -> None:
        _check(self)

    def check_one_size(self) -> None:
        """Raise `ConfigError` for NaFlex, where what is asked for needs one grid of patches for all images."""
        if isinstance(self.vision, VisionConfig) and self.vision.variable:
            raise ConfigError(
                "the image tower takes images of any aspect as lists of patches (NaFlex): classification, proxies, "
                "heads, textual prompts and stores of features take them; visual prompts, tags, masks and stores of "
                "tokens need one grid for all images",
                python="clip.fixed_size(model) reads square pixels by the same weights",
                command="use SigLIP 2 with a fixed resolution",
            )

    @property
    def vit(self) -> VisionConfig:
        """The image tower, where what is asked for needs a transformer; `ConfigError` for a ResNet."""
        if isinstance(self.vision, ResNetConfig):
            raise ConfigError(
                "the image tower is a ResNet, which has no tokens that attend to each other: visual prompts, tags and "
                "masks from tags need a vision transformer; classification, proxies, heads, textual prompts, dense "
                "features, masks without tags and learned tags do not"
            )
        return self.vision

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | Path) -> CLIPConfig:
        """Configuration from a HuggingFace `config.json`: its dict, its path, or the folder it is in.

        Raises `ConfigError` when the file is not JSON, is not of a CLIP model, or its numbers do not fit.
        """
        values, where = (source, "config") if isinstance(source, Mapping) else _read_json(source)
        kind = values.get("model_type", "clip" if "vision_config" in values else None)
        if not isinstance(kind, str) or kind not in MODEL_TYPES:
            raise ConfigError(f"{where}: model_type is {kind!r:.100}, expected {' or '.join(map(repr, MODEL_TYPES))}")
        text, vision, shared = MODEL_TYPES[kind]
        given = {
            key: values[key] for key in ("projection_dim", "logit_scale_init_value", "logit_bias") if key in values
        }
        config = from_json(cls, {**shared, **given}, where, ConfigError)
        own, words = _part(values, "vision", where), _part(values, "text", where)
        text = _tower(TextConfig, text, words, f"{where}: text_config")
        if text.pooling == "highest" and text.eos_token_id == LEGACY_END:  # as `to_file` writes it
            text = dataclasses.replace(text, eos_token_id=text.vocab_size - 1)
        tower = ResNetConfig if "layers" in own else VisionConfig
        vision = _tower(tower, vision, own, f"{where}: vision_config")
        if kind.startswith("siglip"):  # features are as wide as the text tower's head
            head = from_json(_Siglip, words, f"{where}: text_config", ConfigError, ignore_unknown=True)
            config = dataclasses.replace(config, projection_dim=head.projection_size or text.hidden_size)
        if kind == "siglip2":
            vision = _naflex(own, vision, f"{where}: vision_config")
        return dataclasses.replace(config, text=text, vision=vision)

    def to_hf(self) -> dict[str, Any]:
        """The dict that HuggingFace reads for a CLIP or SigLIP; `from_hf(to_hf())` is the identity.

        Towers that transformers does not have are written as model_type "jaxzs_clip", for this package.
        """
        kind = next(kind for kind in MODEL_TYPES if self._is(kind))  # in their order: the last one fits every model
        text, vision, shared = MODEL_TYPES[kind]
        name = {"clip": "CLIPModel", "metaclip_2": "MetaClip2Model", "siglip": "SiglipModel"}.get(kind)
        return {
            **({"architectures": [name]} if name else {}),
            "model_type": kind,
            "projection_dim": self.projection_dim,
            "logit_scale_init_value": self.logit_scale_init_value,
            **({"logit_bias": True} if self.logit_bias and not shared else {}),
            "text_config": {
                "model_type": f"{kind}_text_model",
                ("projection_size" if kind == "siglip" else "projection_dim"): self.projection_dim,
                **_written(self.text, text),
            },
            "vision_config": {
                "model_type": f"{kind}_vision_model",
                "projection_dim": self.projection_dim,
                **_written(self.vision, vision),
            },
        }

    def to_file(self) -> dict[str, Any]:
        """The dict of a `config.json`: `to_hf()`, but for models that transformers computes alike under its own names.

        Those pooled at the highest id (OpenAI's, open_clip's) are its CLIP with the legacy end token 2; NaFlex is its
        Siglip2Model. `from_hf(to_file())` is the identity, too.

        >>> highest = clip.CLIPConfig(text=clip.TextConfig(pooling="highest"))
        >>> highest.to_hf()["model_type"], highest.to_file()["model_type"]
        ('jaxzs_clip', 'clip')
        """
        text, vision = self.text, self.vision
        if text.pooling == "highest" and text.eos_token_id == text.vocab_size - 1 > LEGACY_END:
            legacy = dataclasses.replace(self, text=dataclasses.replace(text, pooling="end", eos_token_id=LEGACY_END))
            if legacy._is("clip"):
                values = legacy.to_hf()
                values["text_config"]["pooling"] = text.pooling  # unknown to transformers; here it tells them apart
                return values
        if isinstance(vision, VisionConfig) and vision.variable:
            square = dataclasses.replace(self, vision=dataclasses.replace(vision, variable=False))
            if square._is("siglip"):
                values = square.to_hf() | {"architectures": ["Siglip2Model"], "model_type": "siglip2"}
                values["text_config"]["model_type"] = "siglip2_text_model"
                values["vision_config"] |= {"model_type": "siglip2_vision_model", "num_patches": vision.num_patches}
                return values
        return self.to_hf()

    def _is(self, kind: str) -> bool:
        """Whether the fields that families differ in are those of a model_type, so that its library can read it."""
        if kind == "jaxzs_clip":
            return True
        text, vision, shared = MODEL_TYPES[kind]
        towers = zip((self.text, self.vision), (text, vision), strict=True)
        same = all(type(own) is type(base) and _family(own) == _family(base) for own, base in towers)
        return same and self.logit_bias == bool(shared) and kind != "siglip2"

    def as_json(self) -> dict[str, Any]:
        """All fields; those that CLIPs leave at their default only where they differ, so that hashes of CLIPs stay."""
        values: dict[str, Any] = {
            "text": _written(self.text, TextConfig()),
            "vision": _written(self.vision, VisionConfig()),
        }
        values |= {"projection_dim": self.projection_dim, "logit_scale_init_value": self.logit_scale_init_value}
        return values | ({"logit_bias": True} if self.logit_bias else {})


def _read_json(path: str | Path) -> tuple[Mapping[str, Any], str]:
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    return read_json(path, ConfigError), str(path)


# What each model_type leaves out of its files: text tower, vision tower, fields of the whole.
MODEL_TYPES: Mapping[str, tuple[TextConfig, VisionConfig, Mapping[str, Any]]] = {
    "clip": (TextConfig(), VisionConfig(), {}),
    "metaclip_2": (TextConfig(pooling="eos"), VisionConfig(), {}),
    "siglip": (_SIGLIP_TEXT, _SIGLIP_VISION, {"logit_bias": True}),
    "siglip2": (_SIGLIP_TEXT, dataclasses.replace(_SIGLIP_VISION, variable=True), {"logit_bias": True}),
    "jaxzs_clip": (TextConfig(), VisionConfig(), {}),
}


def _part(values: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    """One tower's values. `text_config_dict` of early files replaces all of `text_config`, as in HuggingFace."""
    early = values.get(f"{name}_config_dict")
    part = values.get(f"{name}_config") or {} if early is None else early
    if not isinstance(part, Mapping):
        raise ConfigError(f"{where}: {name}_config is {type(part).__name__}, expected an object")
    return part


def _tower(kind: Any, base: Any, part: Mapping[str, Any], where: str) -> Any:
    """One tower's dataclass: what the file says, else what its model_type leaves out."""
    defaults = dataclasses.asdict(base) if isinstance(base, kind) else {}
    return from_json(kind, {**defaults, **part}, where, ConfigError, ignore_unknown=True)


@dataclasses.dataclass(frozen=True)
class _Siglip:
    """What only SigLIP's files say: the width of the text head, the square of patches of a NaFlex position table."""

    projection_size: int | None = None
    num_patches: int = 256


def _naflex(own: Mapping[str, Any], vision: VisionConfig, where: str) -> VisionConfig:
    patches = from_json(_Siglip, own, where, ConfigError, ignore_unknown=True).num_patches
    side = math.isqrt(max(patches, 0))
    if side * side != patches:
        raise ConfigError(f"{where}: num_patches is {patches}, expected a square")
    # NaFlex has no size of images; this one stands for the square that its position table was learned on.
    return dataclasses.replace(vision, image_size=side * vision.patch_size)


def _family(tower: Any) -> dict[str, Any]:
    """The fields of a tower that families differ in."""
    return {key: value for key, value in dataclasses.asdict(tower).items() if key in _FAMILY_FIELDS}


def _written(tower: Any, base: Any) -> dict[str, Any]:
    """The fields of a tower; of those that families differ in only what differs from the base."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(tower).items()
        if key not in _FAMILY_FIELDS or value != getattr(base, key, None)
    }


def _check(config: CLIPConfig) -> None:
    parts = (("text", config.text), ("vision", config.vision), ("model", config))
    for part, values in parts:
        for key, largest in _LARGEST.items():
            value = getattr(values, key, None)
            if value is not None and not 0 < value <= largest:
                raise ConfigError(f"{part}: {key} is {value}, expected 1 to {largest}")
    for part, tower in parts[:2]:
        _check_tower(part, tower)
    vision, text = config.vision, config.text
    if not math.isfinite(config.logit_scale_init_value):
        raise ConfigError("model: logit_scale_init_value must be finite")
    if vision.patch_size > vision.image_size:
        raise ConfigError(f"vision: patch_size {vision.patch_size} exceeds image_size {vision.image_size}")
    # An end token outside the vocabulary never occurs, and pooling would silently take position 0.
    if text.pooling in ("end", "eos") and not 0 <= text.eos_token_id < text.vocab_size:
        raise ConfigError(
            f"text: eos_token_id {text.eos_token_id} lies outside the vocabulary of "
            f"{text.vocab_size} tokens; set it in text_config"
        )
    for part, tower in (("text", text), ("vision", vision)):
        if not getattr(tower, "projection", True) and tower.hidden_size != config.projection_dim:
            raise ConfigError(
                f"{part}: without a projection hidden_size {tower.hidden_size} must be projection_dim "
                f"{config.projection_dim}"
            )


def _check_tower(part: str, tower: TextConfig | VisionConfig | ResNetConfig) -> None:
    if tower.hidden_size % tower.num_attention_heads:
        raise ConfigError(
            f"{part}: hidden_size {tower.hidden_size} is not a multiple of "
            f"num_attention_heads {tower.num_attention_heads}"
        )
    if isinstance(tower, ResNetConfig):
        if min(tower.layers) < 1:
            raise ConfigError(f"{part}: layers are {tower.layers}, expected at least one in each stage")
        return
    if tower.hidden_act not in ACTIVATIONS:
        raise ConfigError(f"{part}: hidden_act {tower.hidden_act!r:.100} is not one of {', '.join(ACTIVATIONS)}")
    if not 0 < tower.layer_norm_eps < 1:
        raise ConfigError(f"{part}: layer_norm_eps is {tower.layer_norm_eps}, expected 0 to 1")
    if isinstance(tower, VisionConfig) and tower.pooling == "class" and not tower.class_token:
        raise ConfigError(f"{part}: pooling is 'class', but there is no class token")


_LARGE_TEXT = TextConfig(768, 3072, 12, 12)  # width, MLP, layers, heads

_SO400M: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
}

# Published shapes, for measuring and compiling without their weights.
ARCHITECTURES: Mapping[str, CLIPConfig] = {
    "ViT-B/32": CLIPConfig(),
    "ViT-B/16": CLIPConfig(vision=VisionConfig(patch_size=16)),
    # Of vision: width, MLP, layers, heads, image, patch.
    "ViT-L/14": CLIPConfig(_LARGE_TEXT, VisionConfig(1024, 4096, 24, 16, 224, 14), 768),
    "ViT-L/14@336": CLIPConfig(_LARGE_TEXT, VisionConfig(1024, 4096, 24, 16, 336, 14), 768),
    "RN50": CLIPConfig(vision=ResNetConfig((3, 4, 6, 3), 64, 32), projection_dim=1024),
    "SigLIP-B/16": CLIPConfig(_SIGLIP_TEXT, _SIGLIP_VISION, 768, logit_bias=True),
    "SigLIP-So400m/14@384": CLIPConfig(
        dataclasses.replace(_SIGLIP_TEXT, **_SO400M),
        dataclasses.replace(_SIGLIP_VISION, **_SO400M, image_size=384, patch_size=14),
        1152,
        logit_bias=True,
    ),
}
