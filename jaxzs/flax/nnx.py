"""CLIP as a `flax.nnx` module: the pure functions of `jaxzs.clip` on parameters of HuggingFace's tree."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from jaxzs.clip.config import CLIPConfig
from jaxzs.clip.layers import Numerics
from jaxzs.clip.model import encode_image, encode_text, logits_per_image
from jaxzs.clip.params import Tree, random_params


class CLIP(nnx.Module):
    """Both towers. params: HuggingFace's tree, such as `model.params`; without one it is drawn from `rngs`.

    Every leaf is an `nnx.Param`: optimisers and filters of nnx see it. Pixels are NHWC, features not normalised.

    >>> from jaxzs.flax import nnx
    >>> model = jaxzs.load("demo")
    >>> module = nnx.CLIP(model.config, model.params)
    >>> pixels = model.preprocess(data.open_image("photos/one/0.png"))
    >>> module.encode_image(pixels).shape
    (1, 64)
    """

    def __init__(
        self,
        config: CLIPConfig,
        params: Tree | None = None,
        *,
        rngs: nnx.Rngs | None = None,
        numerics: Numerics = Numerics(),
    ) -> None:
        self.config, self.numerics = config, numerics
        if params is None:
            # The stream of keys that nnx' own layers draw their weights from.
            params = random_params((rngs or nnx.Rngs(0)).params(), config)
        self.params = _wrapped(params)

    @property
    def tree(self) -> Tree:
        """The parameter tree, as `jaxzs.clip` takes it."""
        return _unwrapped(self.params)

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


def _wrapped(tree: Tree) -> Any:
    node = getattr(nnx, "Dict", dict)  # before flax 0.12 a plain dict is a node of the graph
    return node({name: _wrapped(x) if isinstance(x, dict) else nnx.Param(x) for name, x in tree.items()})


def _unwrapped(tree: Any) -> Tree:
    # The arrays inside, which `jaxzs.clip` differentiates and compiles as any others.
    return {name: _array(x) if isinstance(x, nnx.Variable) else _unwrapped(x) for name, x in tree.items()}


def _array(x: nnx.Variable) -> Any:
    # Of `nnx.eval_shape` there are shapes alone, which cannot be indexed.
    (leaf,) = jax.tree.leaves(x)
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else x[...]
