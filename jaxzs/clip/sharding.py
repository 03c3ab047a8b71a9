"""Where the parameters of a CLIP lie on a mesh: a logical name for every axis of every leaf, and rules by placement.

Model code never names a mesh axis: `parallel.sharding` maps logical axes to those of the mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxzs.clip.config import CLIPConfig
from jaxzs.clip.params import Tree, abstract_params, flatten, unflatten
from jaxzs.errors import ConfigError
from jaxzs.parallel import DATA, MODEL, Rules, sharding

Placement = Literal["replicated", "fully_sharded", "tensor", "tensor_fully_sharded"]

# Logical axes of parameters to mesh axes, by placement. Axes not named here are not split.
PARAMETER_RULES: Mapping[str, Rules] = {
    "replicated": {},
    "fully_sharded": {"width": DATA},
    # As Megatron-LM (arXiv 1909.08053): columns of one matrix, rows of the next, one sum over the devices behind both.
    "tensor": {"heads": MODEL, "mlp": MODEL, "vocabulary": MODEL},
    "tensor_fully_sharded": {"width": DATA, "heads": MODEL, "mlp": MODEL, "vocabulary": MODEL},
}

# Logical axes of a parameter by the last two names of its path; everything else is a vector of the tower's width.
_PARAMETER_AXES: Mapping[tuple[str, str], tuple[str | None, ...]] = {
    ("q_proj", "kernel"): ("width", "heads"),
    ("k_proj", "kernel"): ("width", "heads"),
    ("v_proj", "kernel"): ("width", "heads"),
    ("q_proj", "bias"): ("heads",),
    ("k_proj", "bias"): ("heads",),
    ("v_proj", "bias"): ("heads",),
    ("out_proj", "kernel"): ("heads", "width"),
    ("fc1", "kernel"): ("width", "mlp"),
    ("fc1", "bias"): ("mlp",),
    ("fc2", "kernel"): ("mlp", "width"),
    ("token_embedding", "embedding"): ("vocabulary", "width"),
    ("position_embedding", "embedding"): (None, "width"),
    ("patch_embedding", "kernel"): (None, None, None, "width"),
    ("visual_projection", "kernel"): ("width", "embedding"),
    ("text_projection", "kernel"): ("width", "embedding"),
    ("visual_projection", "bias"): ("embedding",),
    ("text_projection", "bias"): ("embedding",),
    **{(name, "kernel"): (None, None, None, "width") for name in ("conv1", "conv2", "conv3", "shortcut")},
    ("", "logit_scale"): (),
    ("", "logit_bias"): (),
}


def parameter_axes(config: CLIPConfig) -> Tree:
    """Logical axis names of every leaf of `abstract_params(config)`: nested dict of tuples.

    Which mesh axis each takes is in `PARAMETER_RULES`, by placement.

    >>> clip.parameter_axes(clip.CLIPConfig())["visual_projection"]["kernel"]
    ('width', 'embedding')
    """
    return unflatten({path: _axes_of(path) for path, _ in flatten(abstract_params(config))})


def _axes_of(path: str) -> tuple[str | None, ...]:
    *_, owner, name = ("", *path.split("/"))  # logit_scale has no owner
    return _PARAMETER_AXES.get((owner, name), ("width",))


def parameter_shardings(config: CLIPConfig, mesh: Mesh, placement: Placement = "replicated") -> Tree:
    """`NamedSharding` of every parameter.

    placement: "replicated"; "fully_sharded" (every weight matrix split over "data" and gathered where used);
    "tensor" (heads, MLP and vocabulary split over "model"); "tensor_fully_sharded" (both). Where "model" does not
    divide the number of heads, attention stays whole. Raises `ConfigError` for an unknown placement.

    >>> mesh = parallel.make_mesh(devices=jax.devices()[:1])
    >>> where = clip.parameter_shardings(clip.CLIPConfig(), mesh, "fully_sharded")
    >>> tuple(where["visual_projection"]["kernel"].spec)
    ('data', None)
    """
    leaves = dict(flatten(abstract_params(config)))
    return unflatten(
        {path: _parameter_sharding(path, leaf.shape, config, mesh, placement) for path, leaf in leaves.items()}
    )


def _parameter_sharding(
    path: str, shape: Sequence[int], config: CLIPConfig, mesh: Mesh, placement: Placement
) -> NamedSharding:
    if placement not in PARAMETER_RULES:
        raise ConfigError(f"placement is {placement!r}, expected {', '.join(PARAMETER_RULES)}")
    rules = dict(PARAMETER_RULES[placement])
    tower = config.vision if path.startswith("vis") else config.text
    if tower.num_attention_heads % mesh.shape.get(MODEL, 1):
        rules.pop("heads", None)  # half a head on a device would mean communication within attention
    return sharding(mesh, _axes_of(path), shape, rules)


def place_parameters(params: Tree, config: CLIPConfig, mesh: Mesh, placement: Placement = "replicated") -> Tree:
    """Parameters (host or device arrays) put on the mesh. Values do not change.

    placement: as in `parameter_shardings`, with its errors.

    >>> model, mesh = jaxzs.load("demo"), parallel.make_mesh()
    >>> params = clip.place_parameters(model.params, model.config, mesh)
    >>> len(params["logit_scale"].devices()) == mesh.size
    True
    """
    place = placer(config, mesh, placement)
    return unflatten({path: place(path, leaf) for path, leaf in flatten(params)})


def placer(config: CLIPConfig, mesh: Mesh, placement: Placement = "replicated") -> Callable[[str, Any], jax.Array]:
    """`place(path, array)` for `clip.read_checkpoint(path, place=...)`: each leaf goes shard by shard from the file
    to the devices of this process, and no host ever holds a second copy.

    placement: as in `parameter_shardings`, with its errors.

    >>> model, mesh = clip.find_checkpoint("demo"), parallel.make_mesh()
    >>> place = clip.placer(clip.CLIPConfig.from_hf(model), mesh, "fully_sharded")
    >>> params, config = clip.read_checkpoint(model, place=place)
    >>> tuple(params["visual_projection"]["kernel"].sharding.spec)
    ('data', None)
    """

    def place(path: str, leaf: Any) -> jax.Array:
        where = _parameter_sharding(path, leaf.shape, config, mesh, placement)
        if isinstance(leaf, jax.Array):
            return jax.device_put(leaf, where)
        # A copy of each shard alone: a CPU device would keep the view into the file.
        return jax.make_array_from_callback(leaf.shape, where, lambda index: np.array(leaf[index]))

    return place
