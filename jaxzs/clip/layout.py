"""Layouts on disk against the one parameter tree: which stored arrays hold which leaves, in both directions.

A layout is a list of `Part`s: what a few stored arrays are called, which leaves they hold, how the one becomes the
other. Most parts are one array and one leaf with its axes in another order; a fused projection is one array and three
leaves, a folded BatchNorm five arrays and two leaves. The audit, reading and writing are the same for all layouts.

The tree is HuggingFace's Flax tree: `text_model/encoder/layers/0/self_attn/q_proj/kernel`, kernels stored (in, out),
convolutions (height, width, in, out). Files of torch say `weight` for kernels, scales and tables, join names with ".",
and store (out, in) and (out, in, height, width).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxzs.clip.config import CLIPConfig, ResNetConfig
from jaxzs.clip.params import abstract_params, flatten

TOWERS = ("text", "vision")
_TOWER_ROOTS = {"text": ("text_model/", "text_projection/"), "vision": ("vision_model/", "visual_projection/")}
# Constants that torch keeps as buffers, and counters of BatchNorm: no leaf of any tree.
_IGNORED = ("position_ids", "num_batches_tracked", "attn_mask", "input_resolution", "context_length", "vocab_size")
_TORCH_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
QKV = ("q_proj", "k_proj", "v_proj")


class Part(NamedTuple):
    """Stored arrays, the leaves that they hold, and the way there and back.

    split: the stored arrays, in the order of `names`, -> the leaves in the order of `paths`. join: its inverse, which
    tells the audit what shapes to expect, and writes.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    split: Callable[..., Sequence[np.ndarray]]
    join: Callable[..., Sequence[np.ndarray]]


def belongs_to(path: str, towers: Sequence[str]) -> bool:
    """Whether a leaf is needed for these towers; scale and bias of the logits only where both are."""
    if path in ("logit_scale", "logit_bias"):
        return set(towers) == set(TOWERS)
    return any(path.startswith(_TOWER_ROOTS[tower]) for tower in towers)


def is_ignored(name: str, towers: Sequence[str]) -> bool:
    """Whether a stored name may be left unread: a constant buffer, or a leaf of a tower not asked for."""
    path = name.replace(".", "/")
    return path.rsplit("/", 1)[-1] in _IGNORED or (belongs_to(path, TOWERS) and not belongs_to(path, towers))


def kind_of(names: Iterable[str]) -> str:
    """The layout that names are of: "open_clip" (OpenAI's too), "big_vision", "flax" or "torch" (HuggingFace's).

    Decided by the names themselves and not by the file's name or its metadata: square kernels look alike in
    both orders of axes, so that a wrong guess would pass every check of shapes.
    """
    names = list(names)
    if any("params/img/" in name for name in names):
        return "big_vision"
    if any(re.search(r"(^|\.)(visual\.|transformer\.resblocks\.)", name) for name in names):
        return "open_clip"
    return "flax" if any(name.endswith(("kernel", "/scale", ".scale")) for name in names) else "torch"


def wrapper(stored: Iterable[str], expected: Iterable[str]) -> str:
    """The one prefix under which a file holds what is expected: "module.", "params/", "clip_model.", or none.

    The prefix that most expected names stand behind; of several alike the shortest.
    """
    wanted, found = set(expected), Counter[str]()
    for name in stored:
        for cut in [0, *(mark.end() for mark in re.finditer(r"[./]", name))][:8]:  # prefixes of up to 7 parts
            found[name[:cut]] += name[cut:] in wanted
    return min(found, key=lambda prefix: (-found[prefix], len(prefix)), default="")


# --- kinds of parts ------------------------------------------------------------------------------------------------


def same(name: str, path: str) -> Part:
    """Stored as it is; one element stands for a number, too."""
    return Part((name,), (path,), lambda x: (x,), lambda x: (x,))


def moved(name: str, path: str, axes: Sequence[int]) -> Part:
    """Stored with the leaf's axes in this order."""
    back = tuple(int(axis) for axis in np.argsort(axes))  # the inverse permutation
    return Part((name,), (path,), lambda x: (x.transpose(back),), lambda x: (x.transpose(axes),))


def shaped(name: str, path: str, leaf: Sequence[int], stored: Sequence[int]) -> Part:
    """Stored in another shape, the elements in the same order."""
    return Part((name,), (path,), lambda x: (x.reshape(leaf),), lambda x: (x.reshape(stored),))


def fused(name: str, paths: Sequence[str]) -> Part:
    """Several matrices (or vectors) of torch on top of each other."""
    count = len(paths)
    return Part(
        (name,),
        tuple(paths),
        lambda x: [piece.T for piece in np.split(x, count)],  # [3D,D] -> 3 times [D,D]; of a bias [3D] the .T is itself
        lambda *leaves: (np.concatenate([leaf.T for leaf in leaves]),),  # and back: (in,out) -> (out,in)
    )


def linear(name: str, path: str, *, bias: bool = True) -> list[Part]:
    """A torch `Linear` or convolution: weight, and bias."""
    weight = Part((f"{name}.weight",), (f"{path}/kernel",), lambda x: (_from_torch(x),), lambda x: (_to_torch(x),))
    return [weight, same(f"{name}.bias", f"{path}/bias")] if bias else [weight]


def layer_norm(name: str, path: str) -> list[Part]:
    """A torch `LayerNorm`."""
    return [same(f"{name}.weight", f"{path}/scale"), same(f"{name}.bias", f"{path}/bias")]


def fused_linear(name: str, path: str, owners: Sequence[str]) -> list[Part]:
    """Projections stored as one: `name` + "weight" and "bias"."""
    return [fused(f"{name}{end}", [f"{path}/{o}/{leaf}" for o in owners]) for end, leaf in _FUSED]


_FUSED = (("weight", "kernel"), ("bias", "bias"))


def folded(conv: str, norm: str, path: str) -> Part:
    """A convolution without bias and the BatchNorm behind it, as one convolution with a bias.

    In float64: kernel * g / sqrt(v + eps), and b - m * g / sqrt(v + eps). Back as a BatchNorm that does nothing.
    """
    names = (f"{conv}.weight", *(f"{norm}.{end}" for end in ("weight", "bias", "running_mean", "running_var")))

    def split(kernel: np.ndarray, *statistics: np.ndarray) -> list[np.ndarray]:
        gain, shift, mean, variance = (x.astype(np.float64) for x in statistics)
        scale = gain / np.sqrt(variance + _BATCH_NORM_EPS)  # [out]
        weight, bias = _from_torch(kernel) * scale, shift - mean * scale  # HWIO: the last axis is scale's
        return [weight.astype(np.float32), bias.astype(np.float32)]

    def join(kernel: np.ndarray, bias: np.ndarray) -> list[np.ndarray]:
        one = np.ones_like(bias)
        # A variance of 1 - eps, so that the norm divides by 1 and the convolution is read back as it was.
        return [_to_torch(kernel), one, bias, 0 * bias, (one * (1 - _BATCH_NORM_EPS)).astype(bias.dtype)]

    return Part(names, (f"{path}/kernel", f"{path}/bias"), split, join)


_BATCH_NORM_EPS = 1e-5  # torch's default; with 0 the features of a small ResNet were off by 19 %


def _to_torch(kernel: np.ndarray) -> np.ndarray:
    return kernel.transpose((1, 0) if kernel.ndim == 2 else (3, 2, 0, 1))  # (in,out) -> (out,in), HWIO -> OIHW


def _from_torch(weight: np.ndarray) -> np.ndarray:
    return weight.transpose((1, 0) if weight.ndim == 2 else (2, 3, 1, 0))  # (out,in) -> (in,out), OIHW -> HWIO


# --- HuggingFace ---------------------------------------------------------------------------------------------------


def flax_parts(config: CLIPConfig, separator: str) -> list[Part]:
    """Flax names: the paths themselves, joined by "/" (msgpack) or "." (safetensors)."""
    return [same(path.replace("/", separator), path) for path, _ in flatten(abstract_params(config))]


def torch_parts(config: CLIPConfig) -> list[Part]:
    """transformers' CLIPModel and SiglipModel; ResNets have no such layout but get names by the same rule."""
    parts, attention = [], "vision_model/head/attention"
    for path, leaf in flatten(abstract_params(config)):
        name = torch_name(path)
        if path.startswith(attention) and not path.startswith(f"{attention}/out_proj"):
            continue  # fused, below
        if path == "vision_model/head/probe":  # [D] in the tree, [1,1,D] in the file
            parts.append(shaped(name, path, leaf.shape, (1, 1, *leaf.shape)))
        elif path.startswith("logit_") and config.logit_bias:  # SigLIP stores both as [1], CLIP its scale as []
            parts.append(shaped(name, path, (), (1,)))
        elif path.endswith("patch_embedding/kernel") and getattr(config.vision, "variable", False):
            parts.append(_linear_patches(name, path, leaf.shape))
        elif path.endswith("/kernel"):
            parts += linear(name.removesuffix(".weight"), path.removesuffix("/kernel"), bias=False)
        else:
            name = name.replace("text_projection", "text_model.head") if config.text.projection_bias else name
            parts.append(same(name, path))
    if getattr(config.vision, "pooling", "") == "map":
        parts += fused_linear("vision_model.head.attention.in_proj_", attention, QKV)
    if config.text.projection_bias:
        parts = [p for p in parts if p.paths[0] != "text_projection/kernel"]
        parts += linear("text_model.head", "text_projection", bias=False)
    return parts


def torch_name(path: str) -> str:
    """Name of a leaf in files of transformers.

    >>> torch_name("text_model/final_layer_norm/scale")
    'text_model.final_layer_norm.weight'
    """
    *parents, name = path.split("/")
    return ".".join([*parents, _TORCH_NAMES.get(name, name)])


def _linear_patches(name: str, path: str, shape: Sequence[int]) -> Part:
    """NaFlex: patches are cut out before the model, whose kernel is a matrix over (row, column, channel)."""
    width, size = shape[-1], int(np.prod(shape[:-1]))
    # [D,p*p*3] of a torch Linear <-> [p,p,3,D]: the order of a patch's pixels is the same.
    return Part((name,), (path,), lambda x: (x.T.reshape(shape),), lambda x: (x.reshape(size, width).T,))


# --- open_clip and OpenAI ------------------------------------------------------------------------------------------


def open_clip_parts(config: CLIPConfig, names: Iterable[str] = ()) -> list[Part]:
    """open_clip's names, which are OpenAI's. names: of the file, which tell where the text tower stands."""
    names = list(names)
    # open_clip's `custom_text` gives the text tower a name of its own; here the stored names say whether it has one.
    prefix = "text." if any(re.search(r"(^|\.)text\.", name) for name in names) else ""
    text = config.text
    parts = [
        same(f"{prefix}token_embedding.weight", "text_model/embeddings/token_embedding/embedding"),
        same(f"{prefix}positional_embedding", "text_model/embeddings/position_embedding/embedding"),
        *_resblocks(f"{prefix}transformer", "text_model", text.num_hidden_layers),
        *layer_norm(f"{prefix}ln_final", "text_model/final_layer_norm"),
        same("logit_scale", "logit_scale"),
    ]
    if text.projection_bias:
        parts += linear(f"{prefix}text_projection", "text_projection")
    elif text.projection:
        parts.append(same(f"{prefix}text_projection", "text_projection/kernel"))  # a parameter: (in, out) already
    if config.logit_bias:
        parts.append(same("logit_bias", "logit_bias"))
    if isinstance(config.vision, ResNetConfig):
        return parts + _resnet_parts(config.vision)
    timm = config.vision.pooling == "map"
    return parts + (_timm_parts(config) if timm else _visual_parts(config))


def _resblocks(name: str, path: str, count: int) -> list[Part]:
    parts: list[Part] = []
    for i in range(count):
        own, leaf = f"{name}.resblocks.{i}", f"{path}/encoder/layers/{i}"
        parts += layer_norm(f"{own}.ln_1", f"{leaf}/layer_norm1") + layer_norm(f"{own}.ln_2", f"{leaf}/layer_norm2")
        parts += fused_linear(f"{own}.attn.in_proj_", f"{leaf}/self_attn", QKV)  # torch's MultiheadAttention
        parts += linear(f"{own}.attn.out_proj", f"{leaf}/self_attn/out_proj")
        parts += linear(f"{own}.mlp.c_fc", f"{leaf}/mlp/fc1") + linear(f"{own}.mlp.c_proj", f"{leaf}/mlp/fc2")
    return parts


def _visual_parts(config: CLIPConfig) -> list[Part]:
    vision, root = config.vit, "vision_model"
    parts = [
        same("visual.class_embedding", f"{root}/embeddings/class_embedding"),
        same("visual.positional_embedding", f"{root}/embeddings/position_embedding/embedding"),
        *linear("visual.conv1", f"{root}/embeddings/patch_embedding", bias=False),
        *_resblocks("visual.transformer", root, vision.num_hidden_layers),
        *layer_norm("visual.ln_post", f"{root}/post_layernorm"),
        same("visual.proj", "visual_projection/kernel"),  # a parameter too: (in, out)
    ]
    return parts + (layer_norm("visual.ln_pre", f"{root}/pre_layrnorm") if vision.pre_norm else [])


def _resnet_parts(vision: ResNetConfig) -> list[Part]:
    root = "vision_model"
    parts = [folded(f"visual.conv{i}", f"visual.bn{i}", f"{root}/stem/conv{i}") for i in (1, 2, 3)]
    for stage, count in enumerate(vision.layers):
        for i in range(count):
            own, leaf = f"visual.layer{stage + 1}.{i}", f"{root}/stages/{stage}/{i}"
            parts += [folded(f"{own}.conv{c}", f"{own}.bn{c}", f"{leaf}/conv{c}") for c in (1, 2, 3)]
            if i == 0:
                # 0 is the convolution, 1 its norm; "-1", the mean before them, has no weights.
                parts.append(folded(f"{own}.downsample.0", f"{own}.downsample.1", f"{leaf}/shortcut"))
    pool = "visual.attnpool"
    parts.append(same(f"{pool}.positional_embedding", f"{root}/embeddings/position_embedding/embedding"))
    parts += [part for name in QKV for part in linear(f"{pool}.{name}", f"{root}/attention_pool/{name}")]
    return parts + linear(f"{pool}.c_proj", "visual_projection")


def _timm_parts(config: CLIPConfig) -> list[Part]:
    """SigLIP's image tower as timm names it."""
    vision, trunk, root = config.vit, "visual.trunk", "vision_model"
    table, width = (vision.num_patches, vision.hidden_size), vision.hidden_size
    position = f"{root}/embeddings/position_embedding/embedding"
    parts = linear(f"{trunk}.patch_embed.proj", f"{root}/embeddings/patch_embedding")
    parts.append(shaped(f"{trunk}.pos_embed", position, table, (1, *table)))
    for i in range(vision.num_hidden_layers):
        own, leaf = f"{trunk}.blocks.{i}", f"{root}/encoder/layers/{i}"
        parts += layer_norm(f"{own}.norm1", f"{leaf}/layer_norm1") + layer_norm(f"{own}.norm2", f"{leaf}/layer_norm2")
        parts += fused_linear(f"{own}.attn.qkv.", f"{leaf}/self_attn", QKV)
        parts += linear(f"{own}.attn.proj", f"{leaf}/self_attn/out_proj")
        parts += linear(f"{own}.mlp.fc1", f"{leaf}/mlp/fc1") + linear(f"{own}.mlp.fc2", f"{leaf}/mlp/fc2")
    pool, head = f"{trunk}.attn_pool", f"{root}/head"
    parts += layer_norm(f"{trunk}.norm", f"{root}/post_layernorm")
    parts.append(shaped(f"{pool}.latent", f"{head}/probe", (width,), (1, 1, width)))
    parts += linear(f"{pool}.q", f"{head}/attention/q_proj") + fused_linear(f"{pool}.kv.", f"{head}/attention", QKV[1:])
    parts += linear(f"{pool}.proj", f"{head}/attention/out_proj") + layer_norm(f"{pool}.norm", f"{head}/layernorm")
    return parts + linear(f"{pool}.mlp.fc1", f"{head}/mlp/fc1") + linear(f"{pool}.mlp.fc2", f"{head}/mlp/fc2")


# --- big_vision ----------------------------------------------------------------------------------------------------


def big_vision_parts(config: CLIPConfig) -> list[Part]:
    """Google's own SigLIP files: Flax names, kernels (in, out), heads on an axis of their own."""
    vision, text = config.vit, config.text
    image, words, head = "params/img", "params/txt", "params/img/MAPHead_0"

    def plain(name: str, path: str, *ends: str) -> list[Part]:
        return [same(f"{name}/{end}", f"{path}/{end}") for end in ends]

    def attention(name: str, path: str, tower: object) -> list[Part]:
        width, heads = tower.hidden_size, tower.num_attention_heads  # type: ignore[attr-defined]
        split, parts = (heads, width // heads), []
        own = f"{name}/MultiHeadDotProductAttention_0"
        for stored, leaf in zip(("query", "key", "value"), QKV, strict=True):
            # [D,H,D/H] in the file, its bias [H,D/H]; the tree has heads side by side.
            parts.append(shaped(f"{own}/{stored}/kernel", f"{path}/{leaf}/kernel", (width, width), (width, *split)))
            parts.append(shaped(f"{own}/{stored}/bias", f"{path}/{leaf}/bias", (width,), split))
        # [H,D/H,D]: the heads are what this one sums over.
        parts.append(shaped(f"{own}/out/kernel", f"{path}/out_proj/kernel", (width, width), (*split, width)))
        return [*parts, same(f"{own}/out/bias", f"{path}/out_proj/bias")]

    def perceptron(name: str, path: str) -> list[Part]:
        both = (("Dense_0", "fc1"), ("Dense_1", "fc2"))
        return [p for old, new in both for p in plain(f"{name}/MlpBlock_0/{old}", f"{path}/{new}", "kernel", "bias")]

    def encoder(name: str, path: str, tower: object) -> list[Part]:
        parts = plain(
            f"{name}/encoder_norm",
            path + ("/final_layer_norm" if tower is text else "/post_layernorm"),
            "scale",
            "bias",
        )
        for i in range(tower.num_hidden_layers):  # type: ignore[attr-defined]
            own, leaf = f"{name}/encoderblock_{i}", f"{path}/encoder/layers/{i}"
            for norm in (0, 1):
                parts += plain(f"{own}/LayerNorm_{norm}", f"{leaf}/layer_norm{norm + 1}", "scale", "bias")
            parts += attention(own, f"{leaf}/self_attn", tower) + perceptron(own, f"{leaf}/mlp")
        return parts

    def table(name: str, path: str, rows: int, width: int) -> Part:
        return shaped(name, f"{path}/embeddings/position_embedding/embedding", (rows, width), (1, rows, width))

    root = "vision_model"
    parts = plain(f"{image}/embedding", f"{root}/embeddings/patch_embedding", "kernel", "bias")
    parts.append(table(f"{image}/pos_embedding", root, vision.num_patches, vision.hidden_size))
    parts += encoder(f"{image}/Transformer", root, vision)
    parts.append(shaped(f"{head}/probe", f"{root}/head/probe", (vision.hidden_size,), (1, 1, vision.hidden_size)))
    parts += attention(head, f"{root}/head/attention", vision) + perceptron(head, f"{root}/head/mlp")
    parts += plain(f"{head}/LayerNorm_0", f"{root}/head/layernorm", "scale", "bias")
    parts.append(same(f"{words}/Embed_0/embedding", "text_model/embeddings/token_embedding/embedding"))
    parts.append(table(f"{words}/pos_embedding", "text_model", text.max_position_embeddings, text.hidden_size))
    parts += encoder(f"{words}/Encoder_0", "text_model", text)
    parts += plain(f"{words}/head", "text_projection", "kernel", "bias")
    scalars = (("params/t", "logit_scale"), ("params/b", "logit_bias"))
    return parts + [shaped(name, path, (), (1,)) for name, path in scalars]
