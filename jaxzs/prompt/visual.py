"""Visual prompt: learned tokens between the class token and the patches, in the first layer only.

Shallow VPT, arXiv 2203.12119.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxzs.clip.config import CLIPConfig
from jaxzs.clip.layers import Numerics, Params
from jaxzs.clip.model import _check_pixels, read_image, vision_embeddings
from jaxzs.errors import ImageError, renamed
from jaxzs.prompt.modality import Frozen, Prompts, check_prefix, check_settings


@renamed(compute_dtype="numerics=clip.Numerics(compute_dtype)", precision="numerics=clip.Numerics(precision=...)")
def image_features(
    params: Params,
    prefix: jax.Array,
    pixels: jax.Array,
    config: CLIPConfig,
    *,
    recompute: bool = False,
    numerics: Numerics = Numerics(),
) -> jax.Array:
    """Features of images with learned tokens in front of the patches, projected, NOT normalised.

    Args:
      params: the checkpoint's tree, frozen.
      prefix: [K,D_vision] float32, the prompt. It gets no positions, but the pre-LayerNorm.
      pixels: [B,S,S,3] float, normalised by the checkpoint's mean and standard deviation.
      config: of the checkpoint.
      recompute: keep no activations of the blocks for the gradient (`jax.checkpoint`).
      numerics: type and precision of the products.

    Returns:
      [B,E] float32.

    Raises:
      DataError: a prefix of another width, or not finite.
      ImageError: pixels of another size or type.

    >>> model = jaxzs.load("demo")
    >>> pixels = model.preprocess(data.open_image("photos/one/0.png"))
    >>> prefix = jnp.zeros((4, model.config.vit.hidden_size))
    >>> prompt.image_features(model.params, prefix, pixels, model.config).shape
    (1, 64)
    """
    prefix = jnp.asarray(prefix)
    config.check_one_size()
    _check_pixels(pixels, config.vit, False)
    if not len(pixels):
        raise ImageError("there are no images: pixels are empty")
    check_prefix(prefix, config.vit.hidden_size)
    return _image_features(params, prefix, pixels, config, recompute, numerics)


@functools.partial(jax.jit, static_argnames=("config", "recompute", "numerics"))
def _image_features(params, prefix, pixels, config, recompute, numerics):
    x = vision_embeddings(params["vision_model"], pixels, config.vit, numerics=numerics)  # [B,1+P,D]
    return read_prompted(params, prefix, x, config, numerics, recompute)  # [B,E]


def read_prompted(
    params: Params,
    prefix: jax.Array,
    embeddings: jax.Array,
    config: CLIPConfig,
    numerics: Numerics = Numerics(),
    recompute: bool = False,
) -> jax.Array:
    """`image_features` from the embedded patches [B,1+P,D], which no prompt changes; prefix [K,D], K may be 0."""
    B, embeddings = embeddings.shape[0], embeddings.astype(jnp.float32)
    tokens = jnp.broadcast_to(prefix[None], (B, *prefix.shape))  # [B,K,D]
    # Inserted behind the addition of positions, of which prompts get none, and before the pre-LayerNorm.
    first = int(config.vit.class_token)  # 0 in SigLIP
    x = jnp.concatenate([embeddings[:, :first], tokens, embeddings[:, first:]], axis=1)  # [B,1+K+P,D]
    # What a mean or a MAP head pools stays what it was trained for, the patches: prompts only change them.
    return read_image(params, x, config, numerics, recompute, prefix=len(prefix))  # [B,E]


@dataclasses.dataclass(frozen=True)
class VisualPrompt:
    """The visual modality. Prompts are {"prefix": [K,D_vision]}; class features and embedded patches are constants.

    >>> modality = prompt.VisualPrompt(length=4)
    >>> modality.init(jax.random.key(0), jaxzs.load("demo").config)["prefix"].shape
    (4, 96)
    """

    name: ClassVar[str] = "image"
    learning_rate: ClassVar[float] = 0.1
    length: int = 16
    recompute: bool = False

    def __post_init__(self) -> None:
        check_settings(self, length=1)

    def init(self, key: jax.Array, config: CLIPConfig) -> Prompts:
        """{"prefix": [K,D_vision]} drawn from N(0, 1/D_vision)."""
        width = config.vit.hidden_size
        draw = jax.random.normal(key, (self.length, width), jnp.float32)
        return {"prefix": width**-0.5 * draw}  # [K,D], rows of a length about 1

    def restart(self, key: jax.Array, config: CLIPConfig, initial: Prompts, last: Prompts) -> Prompts:
        """Where the authors' next iteration starts on an accelerator: from the same initial prompts."""
        # There the drawn tensor stays on the CPU and is copied, so SGD does not reach it; on a CPU it would.
        return initial

    def constant_images(
        self, params: Params, pixels: jax.Array, config: CLIPConfig, numerics: Numerics = Numerics()
    ) -> jax.Array:
        """What of the images no prompt changes, computed once: pixels [B,S,S,3] -> embedded patches [B,1+P,D]."""
        config.check_one_size()
        _check_pixels(pixels, config.vit, False)
        return vision_embeddings(params["vision_model"], pixels, config.vit, numerics=numerics)

    def plain_features(
        self, frozen: Frozen, images: jax.Array, config: CLIPConfig, numerics: Numerics = Numerics()
    ) -> jax.Array:
        """Features of images without any prompt: [B,E]."""
        none = jnp.zeros((0, config.vit.hidden_size), jnp.float32)  # K = 0
        return read_prompted(frozen.params, none, images, config, numerics)

    def class_features(
        self, prompts: Prompts, frozen: Frozen, config: CLIPConfig, numerics: Numerics = Numerics()
    ) -> jax.Array:
        """The constant features of the template filled with each class name [C,E]."""
        return frozen.text_features

    def image_features(
        self, prompts: Prompts, frozen: Frozen, images: jax.Array, config: CLIPConfig, numerics: Numerics = Numerics()
    ) -> jax.Array:
        """Prompted features [B,E] of embedded patches [B,1+P,D]."""
        return read_prompted(frozen.params, prompts["prefix"], images, config, numerics, self.recompute)
