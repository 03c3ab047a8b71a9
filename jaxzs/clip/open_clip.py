"""Configurations that HuggingFace's config.json does not hold: open_clip's JSON, and what shapes of arrays tell.

open_clip writes `open_clip_config.json`; OpenAI's own files and big_vision's have no configuration at all, so that
sizes come from the arrays, as in OpenAI's `build_model`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxzs.clip.config import CLIPConfig, ResNetConfig, TextConfig, VisionConfig
from jaxzs.clip.files import read_json
from jaxzs.errors import ConfigError
from jaxzs.files import from_json

CONFIG_FILE = "open_clip_config.json"
Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class _Vision:
    """`vision_cfg` with open_clip's defaults."""

    image_size: int | tuple[int, int] = 224
    layers: int | tuple[int, int, int, int] = 12  # four of them make a ResNet
    width: int = 768
    head_width: int = 64  # heads = width // head_width
    mlp_ratio: float = 4.0
    patch_size: int | None = 16
    ls_init_value: float | None = None
    no_ln_pre: bool = False  # CLIPA
    pool_type: str = "tok"  # the class token
    final_ln_after_pool: bool = False  # CLIPA
    attentional_pool: Any = False  # CoCa
    timm_model_name: str | None = None
    act_kwargs: Mapping[str, Any] | None = None
    norm_kwargs: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class _Text:
    """`text_cfg` with open_clip's defaults."""

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0
    ls_init_value: float | None = None
    embed_cls: bool = False  # CoCa
    pool_type: str = "argmax"  # the highest id
    eos_id: int = 2  # looked at by pool_type "eos" alone
    pad_id: int = 0
    no_causal_mask: bool = False
    proj_bias: bool = False
    proj_type: str | None = "linear"
    hf_model_name: str | None = None
    act_kwargs: Mapping[str, Any] | None = None
    norm_kwargs: Mapping[str, Any] | None = None


# Further norms and scales of a block, which no published model has.
_CUSTOM = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")


@dataclasses.dataclass(frozen=True)
class _Top:
    """`model_cfg` without its towers."""

    embed_dim: int
    quick_gelu: bool = False  # of both towers, but not of timm's
    init_logit_scale: float = math.log(1 / 0.07)
    init_logit_bias: float | None = None


def read_open_clip(file: Path) -> CLIPConfig:
    """Configuration of an `open_clip_config.json`. Raises `ConfigError`, which names what is not here."""
    values = read_json(file, ConfigError).get("model_cfg")
    if not isinstance(values, Mapping):
        raise ConfigError(f"{file}: model_cfg is {type(values).__name__}, expected an object")
    vision = from_json(_Vision, values.get("vision_cfg", {}), f"{file}: vision_cfg", ConfigError, ignore_unknown=True)
    text = from_json(_Text, values.get("text_cfg", {}), f"{file}: text_cfg", ConfigError, ignore_unknown=True)
    top = from_json(_Top, values, f"{file}: model_cfg", ConfigError, ignore_unknown=True)
    if reason := _refusal(values, vision, text):
        raise ConfigError(f"{file}: {reason}; expected CLIP or SigLIP with a ViT or a ResNet of OpenAI's")
    try:
        return CLIPConfig(
            text=_text(text, top.quick_gelu),
            vision=_vision(vision, top.quick_gelu),
            projection_dim=top.embed_dim,
            logit_scale_init_value=top.init_logit_scale,
            logit_bias=top.init_logit_bias is not None,
        )
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def _refusal(values: Mapping[str, Any], vision: _Vision, text: _Text) -> str:
    """Why a model of open_clip cannot be read, or nothing."""
    timm = vision.timm_model_name
    towers = [values.get(part) or {} for part in ("vision_cfg", "text_cfg")]
    custom = [name for name in _CUSTOM if any(tower.get(name) for tower in towers)]
    reasons = {
        "a CoCa, whose text decoder and attentional pooling are not here": (
            "multimodal_cfg" in values or vision.attentional_pool or text.embed_cls
        ),
        f"its image tower is timm's {timm!r} (of timm only SigLIP is read, not ConvNeXt, EVA, MobileCLIP, ...)": (
            timm is not None and _timm_tower(timm) is None
        ),
        f"its text tower is the HuggingFace model {text.hf_model_name!r}": text.hf_model_name is not None,
        "its blocks have layer scale (ls_init_value)": vision.ls_init_value is not None
        or text.ls_init_value is not None,
        f"its blocks have {', '.join(custom)}": bool(custom),
        f"its image {vision.image_size} is not square": len(set(_sides(vision.image_size))) > 1,
        f"its image pooling is {vision.pool_type!r}": timm is None and _VISION_POOLING.get(vision.pool_type) is None,
        f"its text pooling is {text.pool_type!r}": text.pool_type not in _TEXT_POOLING,
        "its mean of the patches comes after the LayerNorm": (
            timm is None and vision.pool_type == "avg" and not vision.final_ln_after_pool
        ),
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


_VISION_POOLING = {"tok": "class", "avg": "mean"}
_TEXT_POOLING = {"argmax": "highest", "eos": "eos", "last": "last"}


def _sides(size: int | tuple[int, int]) -> tuple[int, ...]:
    return size if isinstance(size, tuple) else (size, size)


def _act(quick: bool, kwargs: Mapping[str, Any] | None) -> str:
    """quick_gelu only where the file says so; never read from the model's name."""
    if (kwargs or {}).get("approximate") == "tanh":
        return "gelu_pytorch_tanh"
    return "quick_gelu" if quick else "gelu"


def _text(text: _Text, quick: bool) -> TextConfig:
    return TextConfig(
        hidden_size=text.width,
        intermediate_size=int(text.width * text.mlp_ratio),  # rounded down, as open_clip does
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        vocab_size=text.vocab_size,
        max_position_embeddings=text.context_length,
        hidden_act=_act(quick, text.act_kwargs),
        layer_norm_eps=float((text.norm_kwargs or {}).get("eps", 1e-5)),
        # eos_id is only used by pooling "eos"; OpenAI's start and end token are the last two of the vocabulary.
        bos_token_id=text.vocab_size - 2,
        eos_token_id=text.eos_id if text.pool_type == "eos" else text.vocab_size - 1,
        pad_token_id=text.pad_id,
        pooling=_TEXT_POOLING[text.pool_type],  # type: ignore[arg-type]
        causal=not text.no_causal_mask,
        projection=text.proj_type != "none",  # null is not "none" there
        projection_bias=text.proj_bias,
    )


def _vision(vision: _Vision, quick: bool) -> VisionConfig | ResNetConfig:
    side = _sides(vision.image_size)[0]
    if vision.timm_model_name is not None:
        tower = _timm_tower(vision.timm_model_name)
        assert tower is not None  # otherwise refused
        return dataclasses.replace(tower, image_size=side)
    if isinstance(vision.layers, tuple):
        return ResNetConfig(vision.layers, vision.width, vision.width * 32 // max(vision.head_width, 1), side)
    return VisionConfig(
        hidden_size=vision.width,
        intermediate_size=int(vision.width * vision.mlp_ratio),
        num_hidden_layers=vision.layers,
        num_attention_heads=vision.width // max(vision.head_width, 1),
        image_size=side,
        patch_size=vision.patch_size or 0,  # `CLIPConfig` refuses 0
        hidden_act=_act(quick, vision.act_kwargs),
        layer_norm_eps=float((vision.norm_kwargs or {}).get("eps", 1e-5)),
        pooling=_VISION_POOLING[vision.pool_type],  # type: ignore[arg-type]
        pre_norm=not vision.no_ln_pre,
    )


# timm's SigLIP towers: width, MLP, layers, heads. Patch and image size are in the name.
_TIMM_SIZES = {
    "base": (768, 3072, 12, 12),
    "large": (1024, 4096, 24, 16),
    "so400m": (1152, 4304, 27, 16),
    "giantopt": (1536, 6144, 40, 16),
}
# Built by timm with exact gelu, all others with the tanh form that SigLIP was trained with.
_TIMM_EXACT = re.compile(r"base_patch16_\d+|large_patch16_(256|384)|so400m_patch14_\d+")


def _timm_tower(name: str) -> VisionConfig | None:
    found = re.fullmatch(r"vit_([a-z0-9]+)_patch(\d+)_siglip_(\d+)", name)
    if found is None or found[1] not in _TIMM_SIZES:
        return None
    exact = _TIMM_EXACT.fullmatch(name.removeprefix("vit_").replace("_siglip", ""))
    return siglip_tower(*_TIMM_SIZES[found[1]], int(found[3]), int(found[2]), "gelu" if exact else "gelu_pytorch_tanh")


def siglip_tower(width: int, inner: int, layers: int, heads: int, image: int, patch: int, act: str) -> VisionConfig:
    """SigLIP's image tower of these sizes."""
    return VisionConfig(
        width, inner, layers, heads, image, patch, hidden_act=act, layer_norm_eps=1e-6, pooling="map",
        class_token=False, patch_bias=True, pre_norm=False, projection=False,
    )  # fmt: skip


def to_open_clip(config: CLIPConfig) -> dict[str, Any]:
    """`model_cfg` for open_clip; `ConfigError` for towers that its own ViT, ResNet and text classes do not have."""
    vision, text = config.vision, config.text
    quick, reason = text.hidden_act == "quick_gelu", ""
    pooling = {mine: theirs for theirs, mine in _TEXT_POOLING.items()} | {"end": "argmax"}
    values: dict[str, Any] = {"image_size": vision.image_size, "width": 0}
    if isinstance(vision, ResNetConfig):
        values |= {
            "layers": list(vision.layers),
            "width": vision.width,
            "head_width": 32 * vision.width // vision.num_attention_heads,
        }
    elif vision.pooling == "map" or text.projection_bias:
        reason = "SigLIP is written for transformers"
    else:
        values |= {
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": _ratio(vision),
            "patch_size": vision.patch_size,
            "no_ln_pre": not vision.pre_norm,
            "norm_kwargs": {"eps": vision.layer_norm_eps},
        }
        values |= {"pool_type": "avg", "final_ln_after_pool": True} if vision.pooling == "mean" else {}
        if (vision.hidden_act == "quick_gelu") != quick or vision.hidden_act not in ("gelu", "quick_gelu"):
            reason = f"its towers have {vision.hidden_act} and {text.hidden_act}"
    # The highest id is the first end token only where that is the last of the vocabulary.
    if text.pooling == "end" and text.eos_token_id not in (2, text.vocab_size - 1):
        reason = "its end token is not the last of the vocabulary"
    if reason:
        raise ConfigError(f"this model cannot be written for open_clip: {reason}; write another format")
    written = {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
        "mlp_ratio": _ratio(text),
        "norm_kwargs": {"eps": text.layer_norm_eps},
        "pool_type": pooling[text.pooling],
        "no_causal_mask": not text.causal,
    }
    written |= {"eos_id": text.eos_token_id} if text.pooling == "eos" else {}
    written |= {"act_kwargs": {"approximate": "tanh"}} if text.hidden_act == "gelu_pytorch_tanh" else {}
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": quick,
        **({"init_logit_bias": -10.0} if config.logit_bias else {}),  # any number: it only makes the leaf
        "vision_cfg": values,
        "text_cfg": written,
    }


def _ratio(tower: TextConfig | VisionConfig) -> float:
    """Such that int(width * ratio) is the MLP's width again."""
    ratio = tower.intermediate_size / tower.hidden_size
    return ratio if int(tower.hidden_size * ratio) == tower.intermediate_size else math.nextafter(ratio, math.inf)


# --- shapes as a configuration -------------------------------------------------------------------------------------


def config_of_openai(shapes: Shapes, where: str) -> CLIPConfig:
    """Sizes of one of OpenAI's own checkpoints, from its arrays: heads of 64 everywhere, quick_gelu.

    Raises `ConfigError` where the arrays are not those of such a checkpoint.
    """
    with _Named(where):
        vocabulary, width = shapes["token_embedding.weight"]
        text = TextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=_count(shapes, r"transformer\.resblocks\.(\d+)\."),
            num_attention_heads=max(width // 64, 1),
            vocab_size=vocabulary,
            max_position_embeddings=shapes["positional_embedding"][0],
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=0,
            pooling="highest",
        )
        return CLIPConfig(text, _openai_tower(shapes), shapes["text_projection"][1], math.log(1 / 0.07))


def _openai_tower(shapes: Shapes) -> VisionConfig | ResNetConfig:
    if "visual.proj" in shapes:
        width, _, patch, _ = shapes["visual.conv1.weight"]  # OIHW
        side = math.isqrt(shapes["visual.positional_embedding"][0] - 1)  # without the class token
        layers = _count(shapes, r"visual\.transformer\.resblocks\.(\d+)\.")
        return VisionConfig(width, 4 * width, layers, max(width // 64, 1), side * patch, patch)
    stages = [_count(shapes, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)]
    positions, depth = shapes["visual.attnpool.positional_embedding"]
    width = shapes["visual.layer1.0.conv1.weight"][0]  # that of the stem too
    return ResNetConfig(
        (stages[0], stages[1], stages[2], stages[3]), width, max(depth // 64, 1), 32 * math.isqrt(positions - 1)
    )


def config_of_big_vision(shapes: Shapes, where: str) -> CLIPConfig:
    """Sizes of a SigLIP of big_vision, from its arrays; with tanh gelu, `jax.nn.gelu`'s default, as it is trained."""
    with _Named(where):
        block = "params/img/Transformer/encoderblock_0"
        patch, _, _, width = shapes["params/img/embedding/kernel"]  # HWIO
        heads = shapes[f"{block}/MultiHeadDotProductAttention_0/query/bias"][0]  # [H,D/H]
        inner = shapes[f"{block}/MlpBlock_0/Dense_0/bias"][0]
        side = math.isqrt(shapes["params/img/pos_embedding"][1])  # [1,P,D]
        layers = _count(shapes, r"params/img/Transformer/encoderblock_(\d+)/")
        block = "params/txt/Encoder_0/encoderblock_0"
        vocabulary, text_width = shapes["params/txt/Embed_0/embedding"]
        text = TextConfig(
            hidden_size=text_width,
            intermediate_size=shapes[f"{block}/MlpBlock_0/Dense_0/bias"][0],
            num_hidden_layers=_count(shapes, r"params/txt/Encoder_0/encoderblock_(\d+)/"),
            num_attention_heads=shapes[f"{block}/MultiHeadDotProductAttention_0/query/bias"][0],
            vocab_size=vocabulary,
            max_position_embeddings=shapes["params/txt/pos_embedding"][1],
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=1e-6,
            pooling="last",
            causal=False,
            projection_bias=True,
        )
        vision = siglip_tower(width, inner, layers, heads, side * patch, patch, "gelu_pytorch_tanh")
        return CLIPConfig(text, vision, shapes["params/txt/head/bias"][0], logit_bias=True)


def _count(shapes: Iterable[str], pattern: str) -> int:
    """One more than the highest number in the names; 0 where there is none."""
    return max((int(found[1][:6]) for name in shapes if (found := re.match(pattern, name))), default=-1) + 1


class _Named:
    """Turns what missing or odd arrays raise into a `ConfigError` that names the file."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, KeyError | ValueError | IndexError):
            found = f"lacks {error.args[0]!r}" if isinstance(error, KeyError) else str(error)
            raise ConfigError(
                f"{self.where}: no configuration beside it, and its arrays do not tell one: {found}"
            ) from error
