"""Checkpoints in and out: HuggingFace folders with Flax msgpack, safetensors or torch weights.

Whatever the format, a file is first opened by its headers alone, then audited against `abstract_params` (every
leaf that is missing, unexpected or mis-shaped is listed in one error), and only then read, leaf by leaf: a leaf
goes from the memory-mapped file straight to where `place` puts it, so that the host never holds a second copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.clip import layout
from jaxzs.clip.config import CLIPConfig
from jaxzs.clip.files import read_json
from jaxzs.clip.formats import FLOATS, SAFETENSORS_DTYPES, StoredLeaf, open_weights
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
FORMATS = ("flax", "safetensors", "safetensors-flax")
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
    Raises `CheckpointError` (missing, damaged or unfit weights), `ConfigError` (config.json) and
    `DependencyError` (torch files without torch).

    >>> params, config = clip.read_checkpoint(clip.find_checkpoint("demo"))
    >>> params["text_projection"]["kernel"].shape, config.projection_dim
    ((64, 64), 64)
    >>> params, _ = clip.read_checkpoint(clip.find_checkpoint("demo"), towers=("vision",))
    >>> sorted(params)
    ['vision_model', 'visual_projection']
    """
    path = Path(path)
    towers = _checked_towers(towers)
    weights = weight_file(path)
    config = read_config(path, towers=towers)
    stored = _open_shards(weights)
    wanted = _wanted(config, towers)
    names = layout.stored_names(wanted, stored, towers)
    as_torch = layout.has_torch_names(stored)
    _audit(str(weights), wanted, names, stored, towers, as_torch=as_torch)

    place = place or _copy_to_device
    leaves, not_finite = {}, []
    for leaf_path in wanted:
        array = stored[names[leaf_path]].read()
        array = layout.from_torch(leaf_path, array) if as_torch else array
        array = _cast(array, dtype)
        if not np.isfinite(array).all():
            not_finite.append(leaf_path)
        leaves[leaf_path] = place(leaf_path, array)
    if not_finite:
        detail = f" after casting to {jnp.dtype(dtype).name}" if dtype is not None else ""
        raise CheckpointError(
            f"{weights}: {len(not_finite)} leaves hold NaN or infinite values{detail}:\n"
            + "\n".join(f"  {name}" for name in not_finite)
        )
    return unflatten(leaves), config


def read_config(path: str | Path, *, towers: Sequence[str] = layout.TOWERS) -> CLIPConfig:
    """Configuration from the `config.json` in a folder, or beside a weight file.

    A configuration of one tower alone (`clip_vision_model`, `clip_text_model`) is accepted for that tower; the
    other one then has HuggingFace's defaults. Raises `ConfigError`.
    """
    path = Path(path)
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"{file}: no such file. A checkpoint is a folder with config.json beside the weights; copy it from "
            "where the weights came from."
        )
    values = read_json(file, ConfigError)
    kind = values.get("model_type")
    for tower in layout.TOWERS:
        if kind == f"clip_{tower}_model":
            if tuple(towers) != (tower,):
                raise ConfigError(
                    f"{file}: a checkpoint of the {tower} tower alone; pass towers=({tower!r},), or take the "
                    "full CLIP checkpoint"
                )
            values = {
                "model_type": "clip",
                "projection_dim": values.get("projection_dim", CLIPConfig.projection_dim),
                f"{tower}_config": values,
            }
    try:
        return CLIPConfig.from_hf(values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def weight_file(path: str | Path) -> Path:
    """The weight file, or index of shards, that is read for a folder: the first of `WEIGHT_FILES` in it.

    Raises `CheckpointError` where there is none, saying what is there instead.
    """
    path = Path(path)
    if os.path.isfile(path):  # unlike Path.is_file, False for names that no file can have
        return path
    if not os.path.isdir(path):
        raise CheckpointError(f"{path}: no such file or folder")
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    found = sorted(entry.name for entry in path.iterdir())[:20]
    raise CheckpointError(
        f"{path}: no weights. Expected one of {', '.join(WEIGHT_FILES)}; the folder holds "
        f"{', '.join(found) or 'nothing'}."
    )


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
    names: Mapping[str, str],
    stored: Mapping[str, StoredLeaf],
    towers: Sequence[str],
    *,
    as_torch: bool,
) -> None:
    """Raises one `CheckpointError` that lists every leaf that differs from what the configuration asks for."""
    missing, misfit = [], []
    for path, shape in wanted.items():
        if as_torch:
            shape = tuple(shape[axis] for axis in layout.torch_axes(path, len(shape)))
        leaf = stored.get(names[path])
        if leaf is None:
            missing.append(f"missing      {names[path]} {shape}")
        elif leaf.shape != shape:
            misfit.append(f"wrong shape  {names[path]} is {leaf.shape}, expected {shape}")
        elif leaf.dtype not in FLOATS:
            misfit.append(f"wrong dtype  {names[path]} is {leaf.dtype}, expected one of {[*FLOATS]}")
    known = set(names.values())
    unexpected = [
        f"unexpected   {name[:200]} {leaf.shape}"
        for name, leaf in sorted(stored.items())
        if name not in known and not layout.is_ignored(name, towers)
    ]
    lines = missing + misfit + unexpected
    if lines:
        more = [f"... and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
        raise CheckpointError(
            f"{where}: the weights do not fit config.json ({len(missing)} missing, {len(misfit)} of wrong "
            f"shape or dtype, {len(unexpected)} unexpected; {len(stored)} stored):\n"
            + "\n".join(f"  {line}" for line in lines[:_LISTED] + more)
        )


def _cast(array: np.ndarray, dtype: Any) -> np.ndarray:
    if dtype is None:
        dtype = np.float32 if array.dtype == np.float64 else array.dtype
    with np.errstate(over="ignore"):  # float16 that overflows is reported as not finite
        return array.astype(jnp.dtype(dtype), copy=False)


def _copy_to_device(path: str, array: np.ndarray) -> jax.Array:
    return jnp.array(array, copy=True)  # never an alias of the file


# --- writing -------------------------------------------------------------------------------------------------------


def write_checkpoint(
    path: str | Path,
    params: Tree,
    config: CLIPConfig,
    format: Literal["flax", "safetensors", "safetensors-flax"] = "flax",
) -> Path:
    """Writes `config.json` and the weights into a folder that transformers can load; returns the weight file.

    path: the folder, made if absent. params: the full tree of `abstract_params(config)`; each leaf keeps its dtype
        (float32, float16 or bfloat16).
    format: "flax" writes `flax_model.msgpack` (transformers 4's FlaxCLIPModel), "safetensors" torch names (every
        CLIPModel), "safetensors-flax" Flax names.

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
    if format not in FORMATS:
        raise CheckpointError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    leaves = dict(flatten(params))
    held = {name: StoredLeaf(np.shape(leaf), str(leaf.dtype), lambda: np.empty(())) for name, leaf in leaves.items()}
    wanted = _wanted(config, layout.TOWERS)
    _audit("params", wanted, {p: p for p in wanted}, held, layout.TOWERS, as_torch=False)
    target = folder / ("flax_model.msgpack" if format == "flax" else "model.safetensors")
    preferred = WEIGHT_FILES[: WEIGHT_FILES.index(target.name)]
    shadowing = [name for name in preferred if (folder / name).exists()]
    if shadowing:
        raise CheckpointError(
            f"{folder}: already holds {', '.join(shadowing)}, which would be read instead of {target.name}; "
            "remove it or write to another folder"
        )
    with atomic_path(target) as temporary, temporary.open("wb") as file:
        if format == "flax":
            _write_msgpack(file, params)
        else:
            _write_safetensors(file, leaves, as_torch=format == "safetensors")
    write_json(folder / "config.json", config.to_hf())
    return target


def _write_msgpack(file: IO[bytes], tree: Tree) -> None:
    """Flax's serialisation: nested maps; an array is extension 1 around [shape, dtype name, bytes]."""
    import msgpack

    packer = msgpack.Packer()

    def write(node: Any) -> None:
        if isinstance(node, Mapping):
            file.write(packer.pack_map_header(len(node)))
            for name, value in node.items():
                file.write(packer.pack(name))
                write(value)
        else:
            leaf = np.asarray(node)
            packed = msgpack.packb((leaf.shape, leaf.dtype.name, leaf.tobytes()))
            file.write(packer.pack_ext_type(1, packed))

    write(tree)


def _write_safetensors(file: IO[bytes], leaves: Mapping[str, Any], *, as_torch: bool) -> None:
    """An 8-byte header length, the JSON header, then the leaves without gaps, as the header says."""
    stored_dtypes = {name: code for code, name in SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt" if as_torch else "flax"}}
    position = 0
    for path, leaf in leaves.items():
        axes = layout.torch_axes(path, len(leaf.shape)) if as_torch else range(len(leaf.shape))
        end = position + leaf.size * leaf.dtype.itemsize
        header[layout.torch_name(path) if as_torch else layout.flax_name(path)] = {
            "dtype": stored_dtypes[leaf.dtype.name],
            "shape": [leaf.shape[axis] for axis in axes],
            "data_offsets": [position, end],
        }
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the leaves start aligned
    file.write(struct.pack("<Q", len(encoded)) + encoded)
    for path, leaf in leaves.items():
        array = np.asarray(leaf)
        file.write((layout.to_torch(path, array) if as_torch else array).tobytes())


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
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
