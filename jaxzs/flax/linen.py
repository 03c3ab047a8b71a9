"""CLIP as a `flax.linen` module: the pure functions of `jaxzs.clip` on variables of HuggingFace's tree."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from jaxzs.clip.config import CLIPConfig
from jaxzs.clip.layers import Numerics
from jaxzs.clip.model import encode_image, encode_text, logits_per_image
from jaxzs.clip.params import Tree, abstract_params, random_params


class CLIP(nn.Module):
    """Both towers; `{"params": model.params}` are its variables.

    config: of the checkpoint. numerics: type and precision of the products. Pixels are NHWC, features not normalised.

    >>> from jaxzs.flax import linen
    >>> model = jaxzs.load("demo")
    >>> module = linen.CLIP(model.config)
    >>> pixels = model.preprocess(data.open_image("photos/one/0.png"))
    >>> module.apply({"params": model.params}, pixels, method="encode_image").shape
    (1, 64)
    """

    config: CLIPConfig
    numerics: Numerics = Numerics()

    def setup(self) -> None:
        # All leaves from one key, as `random_params` draws them; when variables are given there is no key to draw from.
        drawn = random_params(self.make_rng("params"), self.config) if self.is_initializing() else None
        for name in abstract_params(self.config):
            draw = (lambda _, name=name: drawn[name]) if drawn else self._draw(name)  # bound now: the loop goes on
            self.param(name, draw)

    def _draw(self, name: str) -> Any:
        # flax asks for the shape only, to compare it with the variable: nothing is drawn.
        return lambda key: random_params(key, self.config)[name]

    @property
    def tree(self) -> Tree:
        """The parameter tree, as `jaxzs.clip` takes it."""
        return dict(self.variables["params"])

    def encode_image(self, pixels: Any) -> jax.Array:
        """Pixels [B,S,S,3] -> features [B,E], not normalised."""
        return encode_image(self.tree, pixels, self.config, numerics=self.numerics)

    def encode_text(self, input_ids: Any, attention_mask: Any = None) -> jax.Array:
        """Token ids [C,T] -> features [C,E], not normalised."""
        return encode_text(self.tree, input_ids, self.config, attention_mask, numerics=self.numerics)

    def __call__(self, pixels: Any, input_ids: Any, attention_mask: Any = None) -> jax.Array:
        """Logits [B,C] of images against texts."""
        texts = self.encode_text(input_ids, attention_mask)  # [C,E]
        return logits_per_image(self.encode_image(pixels), texts, self.tree["logit_scale"])  # [B,C]
