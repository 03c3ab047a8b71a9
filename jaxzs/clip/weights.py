"""Checkpoints in and out: folders and files of HuggingFace, open_clip, OpenAI and big_vision.

Whatever the format, a file is first opened by its headers alone, then audited against `abstract_params` (every
leaf that is missing, unexpected or mis-shaped is listed in one error), and only then read, leaf by leaf: a leaf
goes from the memory-mapped file straight to where `place` puts it, so that the host never holds a second copy.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.clip import layout
from jaxzs.clip.config import MODEL_TYPES, CLIPConfig
from jaxzs.clip.files import read_json
from jaxzs.clip.formats import FLOATS, StoredLeaf, open_weights
from jaxzs.clip.open_clip import CONFIG_FILE, config_of_big_vision, config_of_openai, read_open_clip, to_open_clip
from jaxzs.clip.params import Tree, abstract_params, flatten, unflatten
from jaxzs.errors import CheckpointError, ConfigError
from jaxzs.files import atomic_path, write_json

# In order of preference where a folder holds several: no conversion by torch first, then what torch users keep
# current. An index names the shards of weights that are split over files.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "flax_model.msgpack",
    "flax_model.msgpack.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
OPEN_CLIP_FILES = (
    "open_clip_model.safetensors",
    "open_clip_model.safetensors.index.json",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.bin.index.json",
)
FORMATS = ("flax", "safetensors", "safetensors-flax", "open_clip")
_LISTED = 2000  # lines of an audit: the largest CLIP has 1,300 leaves


# --- reading -------------------------------------------------------------------------------------------------------


def read_checkpoint(
    path: str | Path,
    *,
    dtype: Any = None,
    towers: Sequence[str] = layout.TOWERS,
    place: Callable[[str, np.ndarray], Any] | None = None,
) -> tuple[Tree, CLIPConfig]:
    """Parameters and configuration of a checkpoint on disk.

    path: a folder with `config.json` and weights, or one weight file beside its `config.json`. Where a folder holds
        several formats the first of `WEIGHT_FILES` is read.
    dtype: of the returned leaves; by default each is kept as stored (float32, float16 or bfloat16; float64 becomes
        float32).
    towers: ("text", "vision"), or one of them: the other one's leaves, and the logit scale, are then left unread,
        and checkpoints of that tower alone are accepted too.
    place: called with each leaf's path ("text_model/encoder/...") and its host array, a read-only view into the
        file, in the order of the paths; returns what becomes the leaf. By default a copy on the default device.

    Returns the tree of `abstract_params(config)`, or the tower's part of it, and the configuration.
    Raises `CheckpointError` (missing, damaged or unfit weights) and `ConfigError` (configuration).

    >>> params, config = clip.read_checkpoint(clip.find_checkpoint("demo"))
    >>> params["text_projection"]["kernel"].shape, config.projection_dim
    ((64, 64), 64)
    >>> params, _ = clip.read_checkpoint(clip.find_checkpoint("demo"), towers=("vision",))
    >>> sorted(params)
    ['vision_model', 'visual_projection']
    """
    path = Path(path)
    towers = _checked_towers(towers)
    file = weight_file(path)
    stored = _open_shards(file)
    config = read_config(path, towers=towers)
    wanted = _wanted(config, towers)
    parts = _stored_parts(config, stored, towers)
    names = {name for part in parts for name in part.names}
    unread = {name for part in _stored_parts(config, stored, layout.TOWERS) for name in part.names} - names
    prefix = layout.wrapper(stored, names)  # "module." of a model trained in parallel, for one
    inside = {name.removeprefix(prefix): leaf for name, leaf in stored.items() if name.startswith(prefix)}
    inside = {name: leaf for name, leaf in inside.items() if name not in unread}  # of the tower not asked for
    outside = [name for name in stored if not name.startswith(prefix)]
    _audit(str(file), wanted, parts, inside, outside, towers)

    place = place or _copy_to_device
    holder = {path: (part, i) for part in parts for i, path in enumerate(part.paths)}
    leaves, unusable = {}, []
    for leaf_path, shape in wanted.items():
        part, i = holder[leaf_path]
        # A fused array is taken apart once for each of its leaves, which are views of the file (not so folded norms).
        array = part.split(*(inside[name].read() for name in part.names))[i].reshape(shape)
        array = _cast(array, dtype)
        if not _is_usable(array):
            unusable.append(leaf_path)
        elif leaf_path == "logit_scale":
            _check_scale(float(array), str(file))
        leaves[leaf_path] = place(leaf_path, array)
    if unusable:
        detail = f" after casting to {jnp.dtype(dtype).name}" if dtype is not None else ""
        raise CheckpointError(
            f"{file}: {len(unusable)} leaves hold NaN or infinite values, or some beyond {_LARGEST:.0e}{detail}:\n"
            + "\n".join(f"  {name}" for name in unusable)
        )
    return unflatten(leaves), config


# Weights beyond this have no square in float32: every LayerNorm and every norm of a feature would be infinite.
_LARGEST = 1e18
_LARGEST_SCALE = 1e4  # of exp(logit_scale); CLIP is trained with at most 100, SigLIP has about 120


def _is_usable(array: np.ndarray) -> bool:
    return array.size == 0 or (float(array.max()) <= _LARGEST and float(array.min()) >= -_LARGEST)  # False for NaN


def _check_scale(value: float, where: str) -> None:
    if abs(value) > math.log(_LARGEST_SCALE):
        raise CheckpointError(
            f"{where}: logit_scale is {value:.6g}; similarities are multiplied by its exponential, which is about 100 "
            "in a CLIP (logit_scale 4.6). If the scale itself was stored, store its logarithm"
        )


def read_config(path: str | Path, *, towers: Sequence[str] = layout.TOWERS) -> CLIPConfig:
    """Configuration of a checkpoint: `config.json`, `open_clip_config.json`, or what the shapes of the arrays tell.

    path: a folder, or a weight file beside its configuration. OpenAI's .pt and big_vision's .npz have none. A
        configuration of one tower alone (`clip_vision_model`, `clip_text_model`) is accepted for that tower; the other
        one then has HuggingFace's defaults. Raises `ConfigError`.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    file = folder / "config.json"
    weights = path if path.is_file() else None
    if weights is None and not file.is_file():
        weights = weight_file(path)
    if _is_open_clip(folder, weights):
        return read_open_clip(folder / CONFIG_FILE)
    if weights is not None and weights.suffix in (".pt", ".npz") and (config := _config_of_shapes(weights)) is not None:
        return config
    if not file.is_file():
        raise ConfigError(
            f"{file}: no such file. A checkpoint is a folder with config.json (or {CONFIG_FILE}) beside the weights; "
            "copy it from where the weights came from."
        )
    return _read_huggingface(file, towers)


def towers_of(path: str | Path) -> tuple[str, ...]:
    """The towers that a checkpoint holds, by its config.json: one for `CLIPVisionModel` or `CLIPTextModel`.

    >>> clip.towers_of(clip.find_checkpoint("demo"))
    ('text', 'vision')
    """
    path = Path(path)
    file = (path if path.is_dir() else path.parent) / "config.json"
    kind = str(read_json(file, ConfigError).get("model_type")) if file.is_file() else ""
    alone = tuple(
        tower for tower in layout.TOWERS if re.fullmatch(rf"(clip|metaclip_2|siglip|siglip2)_{tower}_model", kind)
    )
    return alone or layout.TOWERS


def _read_huggingface(file: Path, towers: Sequence[str]) -> CLIPConfig:
    values = read_json(file, ConfigError)
    held = towers_of(file.parent)
    if len(held) == 1:
        if tuple(towers) != held:
            raise ConfigError(
                f"{file}: a checkpoint of the {held[0]} tower alone",
                python=f"pass towers=({held[0]!r},), or take the full checkpoint",
                command="`jaxzs extract` needs no more than the vision tower; for all else name the full checkpoint",
            )
        values = {
            "model_type": str(values["model_type"]).removesuffix(f"_{held[0]}_model"),  # "clip_vision_model" -> "clip"
            "projection_dim": values.get("projection_dim", CLIPConfig.projection_dim),
            **_beside(held[0], values),
            f"{held[0]}_config": values,
        }
    try:
        return CLIPConfig.from_hf(values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def _beside(tower: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The tower that a SigLIP of one tower lacks, as wide as the shared space: SigLIP's images have no projection."""
    width = values.get("hidden_size", _SIGLIP_WIDTH)
    if not str(values["model_type"]).startswith("siglip"):
        return {}
    if tower == "vision":
        return {"text_config": {"projection_size": width}}
    return {"vision_config": {"hidden_size": values.get("projection_size") or width, "num_attention_heads": 1}}


_SIGLIP_WIDTH = 768  # of files that do not say it


def open_clip_values(path: str | Path) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """`text_cfg` and `preprocess_cfg` of a checkpoint in open_clip's layout; empty for OpenAI's own, else None."""
    path = Path(path)
    folder, file = (path, weight_file(path)) if path.is_dir() else (path.parent, path)
    if _is_open_clip(folder, None if path.is_dir() else path):
        values = read_json(folder / CONFIG_FILE, ConfigError)
        return values["model_cfg"].get("text_cfg") or {}, values.get("preprocess_cfg") or {}
    return ({}, {}) if file.suffix == ".pt" else (None, None)


def _is_open_clip(folder: Path, weights: Path | None = None) -> bool:
    """Whether a folder is to be read as open_clip's.

    timm's folders hold beside it timm's own config.json and its image tower alone, LAION's a whole CLIP of HuggingFace.
    """
    if not (folder / CONFIG_FILE).is_file():
        return False
    if weights is not None:
        return weights.name.startswith("open_clip") or not is_dual_encoder(folder / "config.json")
    return not (is_dual_encoder(folder / "config.json") and any((folder / name).is_file() for name in WEIGHT_FILES))


def is_dual_encoder(file: Path) -> bool:
    """Whether a config.json is that of a CLIP or SigLIP, or of one of its towers; False where there is none."""
    if not file.is_file():
        return False
    values = read_json(file, ConfigError)
    kind = values.get("model_type", "clip" if "vision_config" in values else None)
    return (isinstance(kind, str) and kind in MODEL_TYPES) or len(towers_of(file)) == 1


def _config_of_shapes(file: Path) -> CLIPConfig | None:
    """Of OpenAI's .pt and big_vision's .npz; None for others, such as open_clip's training checkpoints.

    Both call their arrays alike, but open_clip's may have another activation; only OpenAI mixes float16 and float32.
    """
    stored = open_weights(file)
    shapes = {name: leaf.shape for name, leaf in stored.items()}
    if layout.kind_of(shapes) == "big_vision":
        return config_of_big_vision(shapes, str(file))
    mixed = {leaf.dtype for leaf in stored.values()} >= {"float16", "float32"}
    return config_of_openai(shapes, str(file)) if mixed else None


def weight_file(path: str | Path) -> Path:
    """The weight file, or index of shards, that is read for a folder.

    The first of `WEIGHT_FILES` in it, or of `OPEN_CLIP_FILES` where it is open_clip's; else the only .pt or .npz.
    Raises `CheckpointError` where there is none, saying what is there instead.
    """
    path = Path(path)
    if os.path.isfile(path):  # unlike Path.is_file, False for names that no file can have
        return path
    if not os.path.isdir(path):
        raise CheckpointError(f"{path}: no such file or folder")
    # Weights of the layout whose configuration is read come first: beside it may lie another model.
    both = (OPEN_CLIP_FILES, WEIGHT_FILES) if _is_open_clip(path) else (WEIGHT_FILES, OPEN_CLIP_FILES)
    for name in (*both[0], *both[1], "model.pt"):
        if (path / name).is_file():
            return path / name
    for suffix in (".pt", ".npz"):
        if len(others := [entry for entry in path.iterdir() if entry.suffix == suffix]) == 1:
            return others[0]
    found = sorted(entry.name for entry in path.iterdir())[:20]
    raise CheckpointError(
        f"{path}: no weights. Expected one of {', '.join(WEIGHT_FILES)}, or open_clip's; the folder holds "
        f"{', '.join(found) or 'nothing'}."
    )


def _stored_parts(config: CLIPConfig, stored: Mapping[str, StoredLeaf], towers: Sequence[str]) -> list[layout.Part]:
    """What a file of these names should hold of these towers."""
    match layout.kind_of(stored):
        case "open_clip":
            parts = layout.open_clip_parts(config, stored)
        case "big_vision":
            parts = layout.big_vision_parts(config)
        case "flax":
            parts = layout.flax_parts(config, "/" if any("/" in name for name in stored) else ".")
        case _:
            parts = layout.torch_parts(config)
    parts = [part for part in parts if any(layout.belongs_to(path, towers) for path in part.paths)]
    root = re.compile(rf"{towers[0]}_model[./]")
    if len(towers) == 1 and not any(root.search(name) for name in stored):  # a tower alone may leave out its own name
        parts = [part._replace(names=tuple(root.sub("", name) for name in part.names)) for part in parts]
    return parts


def _checked_towers(towers: Sequence[str]) -> tuple[str, ...]:
    unknown = [tower for tower in towers if tower not in layout.TOWERS]
    if unknown or not towers or isinstance(towers, str):
        raise CheckpointError(f"towers must be one or both of {layout.TOWERS} as a tuple, got {towers!r}")
    return tuple(tower for tower in layout.TOWERS if tower in towers)


def _wanted(config: CLIPConfig, towers: Sequence[str]) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flatten(abstract_params(config)) if layout.belongs_to(path, towers)}


def shard_names(index: Path) -> list[str]:
    """Names of the shards that an index (`*.index.json`) lists; they lie beside it. Raises `CheckpointError`."""
    weight_map = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: not an index of shards: 'weight_map' must map names to files")
    shards = sorted(set(weight_map.values()))
    for shard in shards:  # a name, never a path: an index must not reach outside its folder
        if shard != os.path.basename(shard) or shard in ("", ".", "..") or set(shard) & set("\\\0:*?["):
            raise CheckpointError(f"{index}: refers to {shard[:200]!r}; shards must lie in the same folder")
    return shards


def _open_shards(weights: Path) -> dict[str, StoredLeaf]:
    """Leaves of one weight file, or of all shards that an index names (parts of one tree, merged)."""
    if weights.suffix != ".json":
        return open_weights(weights)
    shards = shard_names(weights)
    absent = [shard for shard in shards if not os.path.isfile(weights.parent / shard)]
    if absent:
        raise CheckpointError(
            f"{weights}: {len(absent)} of {len(shards)} shards are missing: {', '.join(absent[:100])}"
        )
    leaves: dict[str, StoredLeaf] = {}
    for shard in shards:
        for name, leaf in open_weights(weights.parent / shard).items():
            if name in leaves:
                raise CheckpointError(f"{weights}: {name[:200]!r} lies in more than one shard")
            leaves[name] = leaf
    return leaves


def _audit(
    where: str,
    wanted: Mapping[str, tuple[int, ...]],
    parts: Sequence[layout.Part],
    stored: Mapping[str, StoredLeaf],
    outside: Sequence[str],
    towers: Sequence[str],
) -> None:
    """Raises one `CheckpointError` that lists every array that differs from what the configuration asks for.

    outside: names that stand without the prefix of all others.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for part in parts:
        leaves = (np.broadcast_to(np.uint8(0), wanted[path]) for path in part.paths)  # shapes only: one byte each
        expected |= {name: array.shape for name, array in zip(part.names, part.join(*leaves), strict=True)}
    missing = [f"missing      {name} {shape}" for name, shape in expected.items() if name not in stored]
    misfit = []
    for name, leaf in stored.items():
        shape = expected.get(name, leaf.shape)
        if leaf.shape != shape and {leaf.shape, shape} != {(), (1,)}:  # one element stands for a number
            misfit.append(f"wrong shape  {name} is {leaf.shape}, expected {shape}")
        elif name in expected and leaf.dtype not in FLOATS:
            misfit.append(f"wrong dtype  {name} is {leaf.dtype}, expected one of {[*FLOATS]}")
    unexpected = [
        f"unexpected   {_printable(name)}" + (f" {stored[name].shape}" if name in stored else "")
        for name in sorted([*stored, *outside])
        if name not in expected and not layout.is_ignored(name, towers)
    ]
    counts = f"{len(missing)} missing, {len(misfit)} of wrong shape or dtype, {len(unexpected)} unexpected"
    if len(missing) == len(expected):  # another architecture, or another way of naming: one line says so
        first, last = next(iter(expected)), [*expected][-1]
        missing = [f"missing      every array that is expected, from {first} to {last}"]
        unexpected = [f"unexpected   {', '.join(map(_printable, sorted([*stored, *outside])[:3]))}, ..."]
    lines = missing + misfit + unexpected
    if lines:
        more = [f"... and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
        raise CheckpointError(
            f"{where}: the weights do not fit the configuration ({counts}; {len(stored)} stored):\n"
            + "\n".join(f"  {line}" for line in lines[:_LISTED] + more)
        )


def _printable(name: str) -> str:
    """A name from a file, cut, without what would steer a terminal."""
    return name[:200] if name.isprintable() else repr(name[:200])


def _cast(array: np.ndarray, dtype: Any) -> np.ndarray:
    if dtype is None:
        dtype = np.float32 if array.dtype == np.float64 else array.dtype  # JAX has no float64 by default
    with np.errstate(over="ignore"):  # float16 that overflows is reported as not finite
        return array.astype(jnp.dtype(dtype), copy=False)


def _copy_to_device(path: str, array: np.ndarray) -> jax.Array:
    return jnp.array(array, copy=True)  # never an alias of the file


# --- writing -------------------------------------------------------------------------------------------------------


def write_checkpoint(
    path: str | Path,
    params: Tree,
    config: CLIPConfig,
    format: Literal["flax", "safetensors", "safetensors-flax", "open_clip"] = "flax",
) -> Path:
    """Writes `config.json` and the weights into a folder that transformers can load; returns the weight file.

    path: the folder, made if absent. params: the full tree of `abstract_params(config)`; each leaf keeps its dtype
        (float32, float16 or bfloat16).
    format: "flax" writes `flax_model.msgpack` (transformers 4's FlaxCLIPModel), "safetensors" torch names (every
        CLIPModel or SiglipModel), "safetensors-flax" Flax names, "open_clip" what open_clip loads.

    Each file is written beside its place and then renamed, so that a crash never leaves half a file.
    Raises `CheckpointError` where the tree does not fit the configuration, or where the folder already holds
    weights that `read_checkpoint` would prefer to the new ones.

    >>> model = jaxzs.load("demo")
    >>> clip.write_checkpoint("copy", model.params, model.config, "safetensors").name
    'model.safetensors'
    >>> clip.fingerprint(*clip.read_checkpoint("copy")) == model.fingerprint
    True
    """
    folder = Path(path)
    check_folder(folder, format)
    leaves = dict(flatten(params))
    # A tree in memory through the audit of files; nothing of it is read there.
    held = {name: StoredLeaf(np.shape(leaf), str(leaf.dtype), lambda: np.empty(())) for name, leaf in leaves.items()}
    _audit("params", _wanted(config, layout.TOWERS), layout.flax_parts(config, "/"), held, (), layout.TOWERS)
    file, values = "config.json", config.to_file()
    if format == "open_clip":
        file, values = CONFIG_FILE, {"model_cfg": to_open_clip(config)}
    target = folder / _TARGETS[format]
    with atomic_path(target) as temporary:
        if format == "flax":
            temporary.write_bytes(_msgpack(params))
        else:
            _write_safetensors(temporary, leaves, _written_parts(config, format), format)
    write_json(folder / file, values)
    return target


def check_folder(folder: Path, format: str) -> None:
    """Raise `CheckpointError` where a folder holds weights that would be read instead of those of this format."""
    if format not in FORMATS:
        raise CheckpointError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    target = _TARGETS[format]
    own = [*(OPEN_CLIP_FILES if format == "open_clip" else WEIGHT_FILES)]
    # Beside a whole CLIP of HuggingFace open_clip's files are not looked at.
    order = [*WEIGHT_FILES, *own] if format == "open_clip" and is_dual_encoder(folder / "config.json") else own
    if shadowing := [name for name in order[: order.index(target)] if (folder / name).exists()]:
        raise CheckpointError(
            f"{folder}: already holds {', '.join(shadowing)}, which would be read instead of {target}; "
            "remove it or write to another folder"
        )


_TARGETS = {
    "flax": "flax_model.msgpack",
    "safetensors": "model.safetensors",
    "safetensors-flax": "model.safetensors",
    "open_clip": "open_clip_model.safetensors",
}


def _msgpack(params: Tree) -> bytes:
    from flax.serialization import msgpack_serialize

    return msgpack_serialize(jax.tree.map(np.asarray, params))


def _written_parts(config: CLIPConfig, format: str) -> list[layout.Part]:
    if format == "open_clip":
        return layout.open_clip_parts(config)
    return layout.torch_parts(config) if format == "safetensors" else layout.flax_parts(config, ".")


def _write_safetensors(file: Path, leaves: Mapping[str, Any], parts: Sequence[layout.Part], format: str) -> None:
    from safetensors.numpy import save_file

    stored: dict[str, np.ndarray] = {}
    for part in parts:
        arrays = part.join(*(np.asarray(leaves[path]) for path in part.paths))
        for name, array in zip(part.names, arrays, strict=True):
            stored[name] = np.ascontiguousarray(array).reshape(array.shape)  # which makes [1] of a number
    # transformers refuses a file that does not say whose it is.
    save_file(stored, file, metadata={"format": "flax" if format == "safetensors-flax" else "pt"})


# --- identity ------------------------------------------------------------------------------------------------------


def fingerprint(params: Tree, config: CLIPConfig) -> str:
    """SHA-256 (64 hex digits) over the configuration and every leaf's path, shape, dtype and bytes.

    Equal for equal weights, whatever file they came from and wherever they are placed; about a second for 600 MB.

    >>> model = jaxzs.load("demo")
    >>> clip.fingerprint(model.params, model.config) == model.fingerprint
    True
    """
    digest = hashlib.sha256(json.dumps(config.to_hf(), sort_keys=True).encode())
    for path, leaf in flatten(params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype.name} {np.shape(leaf)}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)  # bfloat16 has no buffer of its own
    return digest.hexdigest()
