"""Names and layouts: the parameter tree of this package against what files on disk call the same leaves.

Parameters are the HuggingFace Flax tree: `text_model/encoder/layers/0/self_attn/q_proj/kernel`, kernels stored
(in, out), the patch kernel (height, width, in, out). Files with torch names say `weight` for kernels, scales
and embedding tables, join names with ".", and store kernels (out, in) and (out, in, height, width).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

TOWERS = ("text", "vision")
_TOWER_ROOTS = {"text": ("text_model/", "text_projection/"), "vision": ("vision_model/", "visual_projection/")}
# Constants that torch keeps as buffers: old files store them, Flax never does.
_IGNORED_NAMES = ("position_ids",)
_TORCH_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def belongs_to(path: str, towers: Sequence[str]) -> bool:
    """Whether a leaf is needed for these towers; the logit scale is needed only where both are."""
    if path == "logit_scale":
        return set(towers) == set(TOWERS)
    return any(path.startswith(_TOWER_ROOTS[tower]) for tower in towers)


def torch_name(path: str) -> str:
    """Name of a leaf in files with torch names.

    >>> torch_name("text_model/final_layer_norm/scale")
    'text_model.final_layer_norm.weight'
    """
    *parents, name = path.split("/")
    return ".".join([*parents, _TORCH_NAMES.get(name, name)])


def flax_name(path: str) -> str:
    """Name of a leaf in safetensors files with Flax names, which join with "." too."""
    return path.replace("/", ".")


def torch_axes(path: str, rank: int) -> tuple[int, ...]:
    """Axes of the Flax leaf in the order in which torch stores them: `flax.transpose(torch_axes(...))`."""
    if not path.endswith("/kernel"):
        return tuple(range(rank))
    return {2: (1, 0), 4: (3, 2, 0, 1)}[rank]


def to_torch(path: str, leaf: np.ndarray) -> np.ndarray:
    """A leaf in torch's order of axes: (out, in), (out, in, height, width)."""
    return leaf.transpose(torch_axes(path, leaf.ndim))


def from_torch(path: str, leaf: np.ndarray) -> np.ndarray:
    """A leaf stored in torch's order of axes, in Flax's: (in, out), (height, width, in, out)."""
    return leaf.transpose(np.argsort(torch_axes(path, leaf.ndim)))


def has_torch_names(names: Iterable[str]) -> bool:
    """Whether names are torch's. Names and order of axes go together; only Flax has "kernel"s.

    Decided by the names themselves and not by the file's name or its metadata: square kernels look alike in
    both orders, so that a wrong guess would pass every check of shapes.
    """
    return not any(name.endswith(("kernel", "/scale", ".scale")) for name in names)


def is_ignored(name: str, towers: Sequence[str]) -> bool:
    """Whether a stored name may be left unread: a constant buffer, or a leaf of a tower not asked for."""
    if name.replace(".", "/").split("/")[-1] in _IGNORED_NAMES:
        return True
    path = name.replace(".", "/").removeprefix("clip/")
    return belongs_to(path, TOWERS) and not belongs_to(path, towers)


def stored_names(paths: Iterable[str], names: Iterable[str], towers: Sequence[str]) -> dict[str, str]:
    """How a file spells each wanted leaf: torch or Flax names, "." or "/", with "clip." before or without.

    Files of a single tower may leave out the tower's own name: `embeddings.class_embedding`.
    """
    names = list(names)
    if has_torch_names(names):
        spelled = {path: torch_name(path) for path in paths}
        separator = "."
    else:
        separator = "/" if any("/" in name for name in names) else "."
        spelled = {path: path.replace("/", separator) for path in paths}
    if names and all(name.startswith("clip" + separator) for name in names):
        return {path: f"clip{separator}{name}" for path, name in spelled.items()}
    if len(towers) == 1:
        root = f"{towers[0]}_model{separator}"
        if not any(name.startswith(root) for name in names):
            return {path: name.removeprefix(root) for path, name in spelled.items()}
    return spelled
