"""The parameter tree of every family: HuggingFace's Flax tree of CLIP and a few more leaves, as plain nested dicts.

`abstract_params` is the single truth for names and shapes; random initialisation, the checkpoint audit and
shardings are derived from it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxzs.clip.config import CLIPConfig, ResNetConfig, TextConfig, VisionConfig

Tree = dict[str, Any]


def abstract_params(config: CLIPConfig, dtype: Any = jnp.float32) -> Tree:
    """Nested dict of `jax.ShapeDtypeStruct`, one for each leaf of the checkpoint.

    >>> clip.abstract_params(clip.CLIPConfig())["visual_projection"]["kernel"]
    ShapeDtypeStruct(shape=(768, 512), dtype=float32)
    """
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    text, vision = config.text, config.vision
    tree = {"logit_scale": leaf(), "text_model": _text_tower(text, leaf)}
    if config.logit_bias:
        tree["logit_bias"] = leaf()
    if text.projection:
        tree["text_projection"] = _linear(leaf, text.hidden_size, config.projection_dim, bias=text.projection_bias)
    if isinstance(vision, ResNetConfig):
        tree["vision_model"] = _resnet(vision, leaf)
        return tree | {"visual_projection": _linear(leaf, vision.hidden_size, config.projection_dim)}
    tree["vision_model"] = _vision_tower(vision, leaf)
    if vision.projection:
        tree["visual_projection"] = _linear(leaf, vision.hidden_size, config.projection_dim, bias=False)
    return tree


def _text_tower(text: TextConfig, leaf: Any) -> Tree:
    return {
        "embeddings": {
            "token_embedding": {"embedding": leaf(text.vocab_size, text.hidden_size)},
            "position_embedding": {"embedding": leaf(text.max_position_embeddings, text.hidden_size)},
        },
        "encoder": _encoder(text, leaf),
        "final_layer_norm": _layer_norm(text.hidden_size, leaf),
    }


def _vision_tower(vision: VisionConfig, leaf: Any) -> Tree:
    size, width = vision.patch_size, vision.hidden_size
    patch = {"kernel": leaf(size, size, vision.num_channels, width)}  # HWIO
    embeddings = {
        "patch_embedding": patch | ({"bias": leaf(width)} if vision.patch_bias else {}),
        "position_embedding": {"embedding": leaf(vision.class_token + vision.num_patches, width)},
    }
    tower = {"encoder": _encoder(vision, leaf), "post_layernorm": _layer_norm(width, leaf)}
    if vision.class_token:
        embeddings["class_embedding"] = leaf(width)
    if vision.pre_norm:
        tower["pre_layrnorm"] = _layer_norm(width, leaf)  # [sic]
    if vision.pooling == "map":
        tower["head"] = {
            "probe": leaf(width),  # files have (1, 1, width)
            "attention": {name: _linear(leaf, width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
            "layernorm": _layer_norm(width, leaf),
            "mlp": _mlp(vision, leaf),
        }
    return tower | {"embeddings": embeddings}


def _resnet(vision: ResNetConfig, leaf: Any) -> Tree:
    """BatchNorm is folded into the kernels and biases."""
    width, depth = vision.width, vision.hidden_size
    conv = lambda side, rows, columns: {"kernel": leaf(side, side, rows, columns), "bias": leaf(columns)}  # noqa: E731
    stages: Tree = {}
    entering = width
    for stage, count in enumerate(vision.layers):
        inner = width * 2**stage  # of the two narrow convolutions
        blocks = {}
        for i in range(count):
            block = {
                "conv1": conv(1, entering, inner),
                "conv2": conv(3, inner, inner),
                "conv3": conv(1, inner, 4 * inner),
            }
            blocks[str(i)] = block | ({"shortcut": conv(1, entering, 4 * inner)} if i == 0 else {})
            entering = 4 * inner
        stages[str(stage)] = blocks
    return {
        "stem": {
            "conv1": conv(3, vision.num_channels, width // 2),
            "conv2": conv(3, width // 2, width // 2),
            "conv3": conv(3, width // 2, width),
        },
        "stages": stages,
        "embeddings": {"position_embedding": {"embedding": leaf(1 + vision.num_patches, depth)}},
        "attention_pool": {name: _linear(leaf, depth, depth) for name in ("q_proj", "k_proj", "v_proj")},
    }


def _linear(leaf: Any, rows: int, columns: int, *, bias: bool = True) -> Tree:
    return {"kernel": leaf(rows, columns)} | ({"bias": leaf(columns)} if bias else {})  # (in, out)


def _mlp(tower: TextConfig | VisionConfig, leaf: Any) -> Tree:
    width, inner = tower.hidden_size, tower.intermediate_size
    return {"fc1": _linear(leaf, width, inner), "fc2": _linear(leaf, inner, width)}


def _encoder(tower: TextConfig | VisionConfig, leaf: Any) -> Tree:
    width = tower.hidden_size
    projections = ("q_proj", "k_proj", "v_proj", "out_proj")
    layer = {
        "layer_norm1": _layer_norm(width, leaf),
        "self_attn": {name: _linear(leaf, width, width) for name in projections},
        "layer_norm2": _layer_norm(width, leaf),
        "mlp": _mlp(tower, leaf),
    }
    # Keys are strings: HuggingFace's file has maps, and no lists.
    return {"layers": {str(number): layer for number in range(tower.num_hidden_layers)}}


def _layer_norm(width: int, leaf: Any) -> Tree:
    return {"scale": leaf(width), "bias": leaf(width)}


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def random_params(key: jax.Array, config: CLIPConfig, dtype: Any = jnp.float32) -> Tree:
    """Random weights to train from, scaled as OpenAI's CLIP initialises them (arXiv 2103.00020, released code).

    key: PRNG key. Returns the tree of `abstract_params(config, dtype)`.

    >>> config = jaxzs.load("demo").config
    >>> params = clip.random_params(jax.random.key(0), config)
    >>> params["visual_projection"]["kernel"].shape
    (96, 64)
    """
    leaves = dict(flatten(abstract_params(config, dtype)))
    # One draw cut into pieces: a hundred draws of their own would take long to compile.
    noise = jax.random.normal(key, (sum(leaf.size for leaf in leaves.values()),), jnp.float32)
    flat, start = {}, 0
    for path, leaf in leaves.items():
        piece = noise[start : start + leaf.size].reshape(leaf.shape)
        flat[path] = _initial(path, piece, config).astype(dtype)
        start += leaf.size
    return unflatten(flat)


def _initial(path: str, noise: jax.Array, config: CLIPConfig) -> jax.Array:
    """Initial value of one leaf: a constant, or standard normal noise scaled by its place in the network."""
    *_, owner, name = f"/{path}".split("/")
    if path == "logit_scale":
        return jnp.full_like(noise, config.logit_scale_init_value)
    if path == "logit_bias":
        return jnp.full_like(noise, -10)  # as SigLIP begins: nearly all pairs are no match
    if name in ("scale", "bias"):
        return jnp.full_like(noise, 1 if name == "scale" else 0)
    tower = config.vision if path.startswith("vis") else config.text
    width, depth = tower.hidden_size, tower.num_hidden_layers
    deviation = {
        "token_embedding": 0.02,
        "position_embedding": 0.01 if path.startswith("text") else width**-0.5,
        "patch_embedding": math.prod(noise.shape[:-1]) ** -0.5,
        "shortcut": math.prod(noise.shape[:-1]) ** -0.5,
        **{f"conv{i}": (math.prod(noise.shape[:-1]) / 2) ** -0.5 for i in (1, 2, 3)},  # He et al., for ReLU
        "fc1": (2 * width) ** -0.5,
        "out_proj": width**-0.5 * (2 * depth) ** -0.5,
        "fc2": width**-0.5 * (2 * depth) ** -0.5,
    }.get(owner, width**-0.5)
    return deviation * noise


def flatten(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts as ("a/b/c", leaf), sorted by path."""
    for name in sorted(tree):
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(tree[name], dict):
            yield from flatten(tree[name], path)
        else:
            yield path, tree[name]


def unflatten(leaves: dict[str, Any]) -> Tree:
    """Inverse of `flatten`: {"a/b/c": leaf} as nested dicts."""
    tree: Tree = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
