"""Joint prompt: textual and visual tokens mixed by one small transformer block.

UPT, arXiv 2210.07225, as the code of GRIP (arXiv 2306.01669) has it.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp

from jaxzs.clip.config import CLIPConfig, TextConfig
from jaxzs.clip.layers import Numerics, Params, block, dense
from jaxzs.errors import ConfigError
from jaxzs.prompt.modality import Frozen, Prompts, check_settings
from jaxzs.prompt.text import TextPrompt
from jaxzs.prompt.visual import VisualPrompt, read_prompted

Pairing = Literal["pairs", "sequence"]


def joint_prefixes(
    joint_params: Prompts, *, pairing: Pairing = "pairs", half: bool = True
) -> tuple[jax.Array, jax.Array]:
    """The prefixes of both towers from the parameters of the joint prompt.

    Args:
      joint_params: the tree of `JointPrompt.init`: "text" [K,D_text], "visual" [K,D_vision], four linear maps and
        one transformer block of width d with one head.
      pairing: "pairs" lets text token j attend to itself and visual token j only, as the authors' code does (it
        exchanges the sequence and the batch axis); "sequence" mixes all 2K tokens, as UPT describes.
      half: round the block's output (and its gradient) to float16, as the authors' code does.

    Returns:
      (text_prefix [K,D_text], visual_prefix [K,D_vision]).

    >>> init = lambda key: prompt.JointPrompt().init(key, clip.CLIPConfig())
    >>> text, visual = jax.eval_shape(lambda key: prompt.joint_prefixes(init(key)), jax.random.key(0))
    >>> text.shape, visual.shape
    ((4, 512), (4, 768))
    """
    text = dense(joint_params["text_in"], joint_params["text"])  # [K,d]
    visual = dense(joint_params["visual_in"], joint_params["visual"])  # [K,d]
    K, d = text.shape
    # As released: pairs are the batch, so prompt j meets its counterpart j alone. UPT has one sequence of all.
    if pairing == "pairs":
        x = jnp.stack([text, visual], axis=1)  # [K,2,d]: attention over each pair
    else:
        x = jnp.concatenate([text, visual])[None]  # [1,2K,d]
    x, _ = block(joint_params["block"], x, _block_config(d))  # unmasked, no norm behind it
    x = x.swapaxes(0, 1) if pairing == "pairs" else x.reshape(2, K, d)  # [2,K,d]
    if half:
        x = x.astype(jnp.float16).astype(jnp.float32)  # as released, also on a CPU; the gradient is rounded as well
    # No residual around the block: the towers see only what comes out of it.
    return dense(joint_params["text_out"], x[0]), dense(joint_params["visual_out"], x[1])  # [K,D_text], [K,D_vision]


def _block_config(width: int) -> TextConfig:
    """One pre-norm block of this width: one head, MLP 4d, quick_gelu, eps 1e-5."""
    return TextConfig(hidden_size=width, intermediate_size=4 * width, num_attention_heads=1)


@dataclasses.dataclass(frozen=True)
class JointPrompt:
    """The joint modality: both towers run at every step; the constants of an image are its embedded patches.

    >>> modality, config = prompt.JointPrompt(), jaxzs.load("demo").config
    >>> prompts = jax.eval_shape(lambda key: modality.init(key, config), jax.random.key(0))
    >>> prompts["text"].shape, prompts["visual"].shape, modality.learning_rate
    ((4, 64), (4, 96), 0.01)
    """

    name: ClassVar[str] = "joint"
    learning_rate: ClassVar[float] = 0.01
    length: int = 4  # of each of the two prefixes
    width: int = 128
    pairing: Pairing = "pairs"
    half: bool = True
    half_embeddings: bool = False
    share_context: bool = True
    recompute: bool = False

    def __post_init__(self) -> None:
        check_settings(self, length=1, width=1)
        if self.pairing not in get_args(Pairing):
            raise ConfigError(f"pairing is {self.pairing!r}, expected one of {', '.join(get_args(Pairing))}")

    def init(self, key: jax.Array, config: CLIPConfig) -> Prompts:
        """Tokens and maps drawn as in the authors' code (PyTorch's defaults for the linear maps)."""
        text, vision, d = config.text.hidden_size, config.vision, self.width
        keys = iter(jax.random.split(key, 10))
        # As in VPT: Xavier's bound with the numbers of a patch, 3 channels, as fan-in.
        limit = (6 / (3 * vision.patch_size**2 + vision.hidden_size)) ** 0.5
        tokens = 0.02 * jax.random.normal(next(keys), (self.length, text), jnp.float32)
        norm = {"scale": jnp.ones(d), "bias": jnp.zeros(d)}
        qkv = _uniform(next(keys), (d, 3 * d), (6 / (4 * d)) ** 0.5)  # Xavier over the fused map
        projections = {
            f"{name}_proj": {"kernel": kernel, "bias": jnp.zeros(d)}
            for name, kernel in zip("qkv", jnp.split(qkv, 3, axis=1), strict=True)  # three of [d,d]
        }
        out = {"kernel": _uniform(next(keys), (d, d), d**-0.5), "bias": jnp.zeros(d)}
        return {
            "text": tokens,
            "visual": _uniform(next(keys), (self.length, vision.hidden_size), limit),
            "text_in": _linear(next(keys), text, d),
            "visual_in": _linear(next(keys), vision.hidden_size, d),
            "text_out": _linear(next(keys), d, text),
            "visual_out": _linear(next(keys), d, vision.hidden_size),
            "block": {
                "layer_norm1": norm,
                "self_attn": {**projections, "out_proj": out},
                "layer_norm2": norm,
                "mlp": {"fc1": _linear(next(keys), d, 4 * d), "fc2": _linear(next(keys), 4 * d, d)},
            },
        }

    def restart(self, key: jax.Array, config: CLIPConfig, initial: Prompts, last: Prompts) -> Prompts:
        """Where the authors' next iteration starts: the last tokens, with fresh maps and a fresh block."""
        # The authors build all modules anew, but wrap the two token tensors, which SGD has updated in place.
        return {**self.init(key, config), "text": last["text"], "visual": last["visual"]}

    def constant_images(
        self, params: Params, pixels: jax.Array, config: CLIPConfig, numerics: Numerics = Numerics()
    ) -> jax.Array:
        """What of the images no prompt changes, computed once: pixels [B,S,S,3] -> embedded patches [B,1+P,D]."""
        return VisualPrompt().constant_images(params, pixels, config, numerics)

    def plain_features(
        self, frozen: Frozen, images: jax.Array, config: CLIPConfig, numerics: Numerics = Numerics()
    ) -> jax.Array:
        """Features of images without any prompt: [B,E]."""
        return VisualPrompt().plain_features(frozen, images, config, numerics)

    def prefixes(self, prompts: Prompts) -> tuple[jax.Array, jax.Array]:
        """Both towers' prefixes, with this modality's pairing and rounding."""
        return joint_prefixes(prompts, pairing=self.pairing, half=self.half)

    def class_features(
        self, prompts: Prompts, frozen: Frozen, config: CLIPConfig, numerics: Numerics = Numerics()
    ) -> jax.Array:
        """Prompted text features [C,E]."""
        text = TextPrompt(half=self.half_embeddings, share_context=self.share_context, recompute=self.recompute)
        prefix, _ = self.prefixes(prompts)
        return text.class_features({"prefix": prefix}, frozen, config, numerics)

    def image_features(
        self, prompts: Prompts, frozen: Frozen, images: jax.Array, config: CLIPConfig, numerics: Numerics = Numerics()
    ) -> jax.Array:
        """Prompted features [B,E] of embedded patches [B,1+P,D]."""
        _, prefix = self.prefixes(prompts)
        return read_prompted(frozen.params, prefix, images, config, numerics, self.recompute)


def _linear(key: jax.Array, rows: int, columns: int) -> dict[str, jax.Array]:
    """PyTorch's default: weight and bias uniform within 1/sqrt(fan_in)."""
    kernel, bias = jax.random.split(key)
    limit = rows**-0.5
    return {"kernel": _uniform(kernel, (rows, columns), limit), "bias": _uniform(bias, (columns,), limit)}


def _uniform(key: jax.Array, shape: tuple[int, ...], limit: float) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, -limit, limit)
