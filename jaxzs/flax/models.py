"""FlaxCLIPModel and the three one-tower classes, with the signatures of transformers 4.57.6.

An object holds parameters and a configuration; every call is a pure function of `params=` (by default its own), so
that it may be differentiated, compiled and mapped as the classes of transformers could.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.clip.config import CLIPConfig
from jaxzs.clip.formats import open_weights
from jaxzs.clip.hub import find_checkpoint
from jaxzs.clip.layers import Numerics, dense
from jaxzs.clip.model import TowerOutput, text_tower, vision_tower
from jaxzs.clip.params import Tree, abstract_params, flatten, random_params, unflatten
from jaxzs.clip.tokenizer_files import _quiet_transformers
from jaxzs.clip.weights import _stored_parts, is_dual_encoder, read_checkpoint, read_config, weight_file
from jaxzs.errors import CheckpointError, ConfigError
from jaxzs.files import atomic_path
from jaxzs.flax.outputs import FlaxBaseModelOutputWithPooling, FlaxCLIPOutput, FlaxCLIPTextModelOutput, ModelOutput

WEIGHTS, SAFE_WEIGHTS = "flax_model.msgpack", "model.safetensors"


class Flags(NamedTuple):
    """What is asked for beside the main values; static."""

    attentions: bool
    hidden_states: bool


class FlaxCLIPPreTrained:
    """What the four classes share. config: of transformers; dtype: of computation; params: HuggingFace's Flax tree."""

    config_name: ClassVar[str]  # of transformers' configuration class
    towers: ClassVar[tuple[str, ...]]
    leaves: ClassVar[tuple[str, ...]]  # names at the top of the parameter tree

    def __init__(
        self, config: Any, input_shape: Any = None, seed: int = 0, dtype: Any = jnp.float32, _do_init: bool = True
    ) -> None:
        self.config, self.dtype = config, dtype
        self._config = _own_config(config)
        self._is_initialized = _do_init
        self._params: Any = self.init_weights(jax.random.key(seed), input_shape) if _do_init else None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        dtype: Any = jnp.float32,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        _do_init: bool = True,
        **kwargs: Any,
    ) -> Any:
        """A model of a hub id, a folder, or the embedded "demo"; every weight format that `jaxzs.load` reads.

        dtype: of computation, as there; weights keep the type they are stored in. `from_pt` is not needed. Other
        keywords are entries of the configuration, such as `output_hidden_states=True`. With `_do_init=False` the
        parameters are returned beside the model. Raises `CheckpointError` and `ConfigError`.
        """
        folder = find_checkpoint(pretrained_model_name_or_path, revision=revision, local_files_only=local_files_only)
        own = read_config(folder, towers=cls.towers)
        _check_family(cls, own)  # before gigabytes are read
        params, config = cls._read(folder, own), _hf_config(cls.config_name, folder, own)
        # Of transformers' loader; accepted for the sake of older code, without effect here.
        for name in ("from_pt", "cache_dir", "token", "force_download", "subfolder"):
            kwargs.pop(name, None)
        for name, value in kwargs.items():
            if not hasattr(config, name):
                raise ConfigError(f"{cls.__name__}.from_pretrained has no argument {name}, nor has its configuration")
            setattr(config, name, value)
        model = cls(config, dtype=dtype, _do_init=False)  # random weights would only be replaced
        model._config = own
        if not _do_init:
            return model, params
        model._is_initialized, model._params = True, params
        return model

    @classmethod
    def _read(cls, folder: Path, config: CLIPConfig) -> Tree:
        """The parameters of these towers, also of a file that holds one tower without its projection."""
        try:
            params, _ = read_checkpoint(folder, towers=cls.towers)
        except CheckpointError as error:
            # A file of one tower has no projection, which the ordinary reader misses.
            found = cls._read_alone(folder, config)
            if found is None:
                raise CheckpointError(str(error)) from error
            return found
        # A whole checkpoint holds projections that the class of one tower has no place for.
        return {name: params[name] for name in cls.leaves}

    @classmethod
    def _read_alone(cls, folder: Path, config: CLIPConfig) -> Tree | None:
        """One tower's file without its projection: of these classes, or the text encoder of an image generator.

        None for any other file: what is wrong with it has been named by the ordinary reader.
        """
        wanted, stored = cls._shapes(config), open_weights(weight_file(folder))
        parts = [part for part in _stored_parts(config, stored, cls.towers) if part.paths[0] in wanted]
        if not all(name in stored for part in parts for name in part.names):
            return None
        found: dict[str, jax.Array] = {}
        for part in parts:
            leaves = part.split(*(stored[name].read() for name in part.names))  # one array may be q, k and v
            found |= {path: jnp.asarray(leaf) for path, leaf in zip(part.paths, leaves, strict=True)}
        whole = {path: leaf.shape for path, leaf in found.items()} == wanted
        return unflatten(found) if whole and all(jnp.isfinite(leaf).all() for leaf in found.values()) else None

    def save_pretrained(
        self,
        save_directory: str | Path,
        params: Tree | None = None,
        push_to_hub: bool = False,
        max_shard_size: str = "10GB",
        token: Any = None,
        safe_serialization: bool = False,
    ) -> None:
        """Write `config.json` and the weights, which transformers 4's Flax classes and jaxzs read; one file each.

        safe_serialization: `model.safetensors` (with Flax names) instead of `flax_model.msgpack`. Nothing is uploaded:
        `push_to_hub` is a `ConfigError`; use `huggingface_hub.upload_folder` on the folder.
        """
        if push_to_hub:  # before anything is written
            raise ConfigError("jaxzs uploads nothing; write the folder, then huggingface_hub.upload_folder")
        tree, folder = self._tree(params), Path(save_directory)
        from flax import serialization
        from safetensors.numpy import save

        target = folder / (SAFE_WEIGHTS if safe_serialization else WEIGHTS)
        with atomic_path(target) as temporary, temporary.open("wb") as file:
            if safe_serialization:
                names = {path.replace("/", "."): np.array(leaf, order="C") for path, leaf in flatten(tree)}
                file.write(save(names, metadata={"format": "flax"}))
            else:
                file.write(serialization.msgpack_serialize(jax.tree.map(np.asarray, tree)))
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(folder)

    # --- parameters ---------------------------------------------------------------------------------------------------

    @property
    def params(self) -> Tree:
        """The parameter tree; replaced as a whole, by one of the same names and shapes."""
        if not self._is_initialized:
            raise ConfigError(
                "the model was made with _do_init=False and holds no parameters; pass params= to each call"
            )
        return self._params

    @params.setter
    def params(self, params: Mapping[str, Any]) -> None:
        tree = _plain(params)
        if not self._is_initialized:
            raise ConfigError("the model was made with _do_init=False: its parameters live outside of it")
        # Here, and not in the first call, where a product of wrong shapes would tell little.
        if _shapes_of(tree) != self._shapes(self._config):
            raise CheckpointError("the parameters do not have the names and shapes of this model")
        self._params = tree

    @classmethod
    def _shapes(cls, config: CLIPConfig) -> dict[str, tuple[int, ...]]:
        whole = abstract_params(config)
        return _shapes_of({name: whole[name] for name in cls.leaves})

    def init_weights(self, rng: jax.Array, input_shape: Any = None, params: Tree | None = None) -> Tree:
        """Random parameters; leaves that `params` has already are kept."""
        # input_shape is of transformers' signature; the configuration alone says the shapes.
        drawn = random_params(rng, self._config)
        leaves = dict(flatten({name: drawn[name] for name in self.leaves}))
        return unflatten({**leaves, **(dict(flatten(_plain(params))) if params else {})})

    def _tree(self, params: Mapping[str, Any] | None) -> Tree:
        return self.params if params is None else _plain(params)

    def to_bf16(self, params: Tree, mask: Any = None) -> Tree:
        """Floating leaves in bfloat16 (where mask is True)."""
        return _cast(params, jnp.bfloat16, mask)

    def to_fp16(self, params: Tree, mask: Any = None) -> Tree:
        """Floating leaves in float16 (where mask is True)."""
        return _cast(params, jnp.float16, mask)

    def to_fp32(self, params: Tree, mask: Any = None) -> Tree:
        """Floating leaves in float32 (where mask is True)."""
        return _cast(params, jnp.float32, mask)

    # --- calls --------------------------------------------------------------------------------------------------------

    def _finished(self, output: ModelOutput, return_dict: bool | None) -> Any:
        """In the type of computation, as an output or a tuple."""
        kind = jnp.dtype(self.dtype)
        # The towers add up in float32 whatever the type of their products; transformers gives the type of computation.
        output = jax.tree.map(lambda x: x.astype(kind), output)
        # The argument of a call wins over the configuration, as there.
        wanted = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if wanted else output.to_tuple()

    def _flags(self, attentions: bool | None, hidden_states: bool | None) -> Flags:
        own = lambda name, given: bool(getattr(self.config, name, False) if given is None else given)  # noqa: E731
        return Flags(own("output_attentions", attentions), own("output_hidden_states", hidden_states))

    @property
    def _numerics(self) -> Numerics:
        kind = jnp.dtype(self.dtype)
        return Numerics(None if kind == jnp.float32 else kind.type)

    def _check_train(self, train: bool) -> None:
        # The configuration of both towers holds two, that of one tower is itself the one.
        parts = [getattr(self.config, f"{tower}_config", self.config) for tower in self.towers]
        if train and any(getattr(part, "attention_dropout", 0) for part in parts):
            raise ConfigError("attention_dropout is not 0: jaxzs' towers have no dropout; set it to 0, or train=False")

    def __repr__(self) -> str:
        size = sum(leaf.size for leaf in jax.tree.leaves(self._params))
        return f"{type(self).__name__}({size:,} parameters)"


class FlaxCLIPTextModel(FlaxCLIPPreTrained):
    """The text tower: called with input_ids [B,T], returns `FlaxBaseModelOutputWithPooling`.

    >>> model = jaxzs.flax.FlaxCLIPTextModel.from_pretrained("demo")
    >>> ids, mask = jaxzs.load("demo").tokenize(["the digit seven"])
    >>> model(ids, mask).pooler_output.shape, sorted(model.params)
    ((1, 64), ['text_model'])
    """

    config_name = "CLIPTextConfig"
    towers = ("text",)
    leaves: ClassVar[tuple[str, ...]] = ("text_model",)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Mapping[str, Any] | None = None,
        dropout_rng: Any = None,  # nothing is drawn from it
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        self._check_train(train)
        flags = self._flags(output_attentions, output_hidden_states)
        texts = _texts(input_ids, attention_mask, position_ids)
        output = self._text(self._tree(params), texts, self._config, self._numerics, flags)
        return self._finished(output, return_dict)

    @staticmethod
    def _text(*arguments: Any) -> ModelOutput:
        return _text(*arguments)


class FlaxCLIPTextModelWithProjection(FlaxCLIPTextModel):
    """The text tower and its projection: returns `FlaxCLIPTextModelOutput`.

    >>> model = jaxzs.flax.FlaxCLIPTextModelWithProjection.from_pretrained("demo")
    >>> ids, mask = jaxzs.load("demo").tokenize(["the digit seven"])
    >>> model(ids, mask).text_embeds.shape
    (1, 64)
    """

    leaves = ("text_model", "text_projection")

    @staticmethod
    def _text(*arguments: Any) -> ModelOutput:
        return _projected_text(*arguments)


class FlaxCLIPVisionModel(FlaxCLIPPreTrained):
    """The vision tower: called with pixel_values [B,3,S,S], returns `FlaxBaseModelOutputWithPooling`.

    >>> model = jaxzs.flax.FlaxCLIPVisionModel.from_pretrained("demo")
    >>> outputs = model(np.zeros((2, 3, 48, 48), np.float32), output_hidden_states=True)
    >>> outputs.last_hidden_state.shape, outputs[1].shape, len(outputs.hidden_states)
    ((2, 37, 96), (2, 96), 6)
    """

    config_name = "CLIPVisionConfig"
    towers = ("vision",)
    leaves = ("vision_model",)

    def __call__(
        self,
        pixel_values: Any,
        params: Mapping[str, Any] | None = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        self._check_train(train)
        flags = self._flags(output_attentions, output_hidden_states)
        output = _vision(self._tree(params), _pixels(pixel_values), self._config, self._numerics, flags)
        return self._finished(output, return_dict)


class FlaxCLIPModel(FlaxCLIPPreTrained):
    """Both towers: called with input_ids [C,T] and pixel_values [B,3,S,S], returns `FlaxCLIPOutput`.

    >>> model = jaxzs.flax.FlaxCLIPModel.from_pretrained("demo")
    >>> ids, mask = jaxzs.load("demo").tokenize(["the digit six", "the digit seven"])
    >>> outputs = model(ids, np.zeros((3, 3, 48, 48), np.float32), mask)
    >>> outputs.logits_per_image.shape, outputs["text_embeds"].shape, outputs[3].shape
    ((3, 2), (2, 64), (3, 64))
    >>> model.get_image_features(np.zeros((1, 3, 48, 48), np.float32), params=model.params).shape
    (1, 64)
    """

    config_name = "CLIPConfig"
    towers = ("text", "vision")
    leaves = ("logit_scale", "text_model", "text_projection", "vision_model", "visual_projection")

    def __call__(
        self,
        input_ids: Any,
        pixel_values: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Mapping[str, Any] | None = None,
        dropout_rng: Any = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        self._check_train(train)
        flags = self._flags(output_attentions, output_hidden_states)
        texts = _texts(input_ids, attention_mask, position_ids)
        tree, pixels = self._tree(params), _pixels(pixel_values)
        return self._finished(_both(tree, texts, pixels, self._config, self._numerics, flags), return_dict)

    def get_text_features(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Mapping[str, Any] | None = None,
        dropout_rng: Any = None,
        train: bool = False,
    ) -> jax.Array:
        """Projected text features [C,E], not normalised."""
        self._check_train(train)
        texts = _texts(input_ids, attention_mask, position_ids)
        output = _projected_text(self._tree(params), texts, self._config, self._numerics, Flags(False, False))
        return self._finished(output, True).text_embeds

    def get_image_features(
        self, pixel_values: Any, params: Mapping[str, Any] | None = None, dropout_rng: Any = None, train: bool = False
    ) -> jax.Array:
        """Projected image features [B,E], not normalised."""
        self._check_train(train)
        tree, numerics = self._tree(params), self._numerics
        output = _vision(tree, _pixels(pixel_values), self._config, numerics, Flags(False, False))
        return dense(tree["visual_projection"], output.pooler_output, numerics).astype(self.dtype)


# --- the pure functions underneath --------------------------------------------------------------------------------


# Static is what decides the program. Trees are traced: other parameters of the same shapes compile nothing.
_compiled = functools.partial(jax.jit, static_argnames=("config", "numerics", "flags"))


@_compiled
def _text(params, texts, config, numerics, flags):
    return _tower_output(_text_tower(params, texts, config, numerics), flags)


@_compiled
def _projected_text(params, texts, config, numerics, flags):
    tower = _text_tower(params, texts, config, numerics)
    embeds = dense(params["text_projection"], tower.pooled, numerics)  # [C,E]
    own = _tower_output(tower, flags)
    return FlaxCLIPTextModelOutput(embeds, own.last_hidden_state, own.hidden_states, own.attentions)


@_compiled
def _vision(params, pixels, config, numerics, flags):
    return _tower_output(vision_tower(params, pixels, config, numerics=numerics), flags)


@_compiled
def _both(params, texts, pixels, config, numerics, flags):
    text, vision = _text(params, texts, config, numerics, flags), _vision(params, pixels, config, numerics, flags)
    # As there: no guard against a feature of length 0.
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    text_embeds = unit(dense(params["text_projection"], text.pooler_output, numerics))  # [C,E]
    image_embeds = unit(dense(params["visual_projection"], vision.pooler_output, numerics))  # [B,E]
    # In float32: ln 100 in bfloat16 is 4.594, whose exp is 98.9.
    scale = jnp.exp(jnp.asarray(params["logit_scale"], jnp.float32))
    per_text = numerics.matmul(text_embeds, image_embeds.T) * scale  # [C,B]
    return FlaxCLIPOutput(per_text.T, per_text, text_embeds, image_embeds, text, vision)  # per_text.T [B,C]


def _text_tower(params: Tree, texts: tuple[Any, Any, Any], config: CLIPConfig, numerics: Numerics) -> TowerOutput:
    """The text tower, at places of the caller's own where position_ids [B,T] are given."""
    ids, mask, positions = texts
    if positions is None:
        return text_tower(params, ids, config, mask, numerics=numerics)
    positions = jnp.broadcast_to(positions, ids.shape)  # [1,T] stands for all texts, as there

    # A table of positions for each text, its rows in the order of the places that were asked for.
    def one(ids: jax.Array, mask: jax.Array | None, positions: jax.Array) -> TowerOutput:
        tree = params["text_model"]
        table = tree["embeddings"]["position_embedding"]["embedding"]  # [places,D]
        chosen = {**tree["embeddings"], "position_embedding": {"embedding": table[positions]}}  # [T,D]
        moved = {**params, "text_model": {**tree, "embeddings": chosen}}
        own = text_tower(moved, ids[None], config, None if mask is None else mask[None], numerics=numerics)
        return jax.tree.map(lambda x: x[0], own)  # without the axis of one text

    return jax.vmap(one, in_axes=(0, None if mask is None else 0, 0))(ids, mask, positions)  # tokens [B,T,D]


def _tower_output(tower: TowerOutput, flags: Flags) -> FlaxBaseModelOutputWithPooling:
    # None is no output of the compiled program: what was not asked for is not kept.
    return FlaxBaseModelOutputWithPooling(
        tower.tokens,
        tower.pooled,
        tower.hidden if flags.hidden_states else None,
        tower.attention if flags.attentions else None,
    )


# --- arguments and configurations ---------------------------------------------------------------------------------


def _texts(input_ids: Any, attention_mask: Any, position_ids: Any) -> tuple[Any, Any, Any]:
    """(ids, mask or None, positions or None), integers [B,T]."""
    integers = lambda x: None if x is None else jnp.asarray(x).astype(jnp.int32)  # noqa: E731
    return integers(input_ids), integers(attention_mask), integers(position_ids)


def _pixels(pixel_values: Any) -> jax.Array:
    """[B,3,S,S] of any type -> [B,S,S,3] float32."""
    pixels = jnp.asarray(pixel_values)
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise ConfigError(
            f"pixel_values have shape {pixels.shape}, expected [B,3,S,S]: channels first, as in transformers"
        )
    return pixels.astype(jnp.float32).transpose(0, 2, 3, 1)  # [B,S,S,3]


def _check_family(kind: type[FlaxCLIPPreTrained], config: CLIPConfig) -> None:
    """`ConfigError` for towers whose outputs are not those of a CLIP."""
    name = kind.__name__
    # SigLIP has a bias, ResNets and SigLIP pool by attention: there is no class token to be the output.
    if config.logit_bias or getattr(config.vision, "pooling", "") != "class":
        raise ConfigError(
            f"{name} is for CLIP's transformers with a class token; load SigLIP and ResNets with jaxzs.load, and "
            "jaxzs.clip.encode_image, encode_text"
        )
    if "text_projection" in kind.leaves and not config.text.projection:
        raise ConfigError(
            f"{name} has a text projection, this model none; load it with jaxzs.load, and jaxzs.clip.encode_text"
        )


def _own_config(config: Any) -> CLIPConfig:
    """jaxzs' configuration from transformers', of both towers or of one."""
    values = config.to_dict()
    kind = family = str(values.get("model_type"))
    for tower in ("text", "vision"):
        if kind.endswith(f"_{tower}_model"):
            # The configuration of one tower has its entries at the top level.
            values = {"projection_dim": values.get("projection_dim", 512), f"{tower}_config": values}
            family = kind.removesuffix(f"_{tower}_model")
    if family not in ("clip", "metaclip_2"):  # which differ in the token that is pooled
        raise ConfigError(f"a configuration of {kind!r:.80}, expected one of CLIP's")
    return CLIPConfig.from_hf({**values, "model_type": family})


def _hf_config(name: str, folder: Path, config: CLIPConfig) -> Any:
    """transformers' configuration of a folder; where it has no `config.json` of a CLIP, from what jaxzs read."""
    with _quiet_transformers():
        import transformers

        kind = getattr(transformers, name)
        folder = folder if folder.is_dir() else folder.parent
        # Asked first: without such a file transformers 5 gives the configuration of ViT-B/32, whatever lies there.
        if is_dual_encoder(folder / "config.json"):
            read = kind.from_pretrained(str(folder), local_files_only=True)
            text = getattr(read, "text_config", read if name == "CLIPTextConfig" else None)
            if config.text.pooling != "end" and text is not None:
                # MetaCLIP 2's: saved as a CLIP's configuration, an end token of 2 would mean the highest id.
                text.pooling = config.text.pooling
            return read
        values = config.to_hf()
        # CLIPTextConfig -> text_config
        return kind(**(values if name == "CLIPConfig" else values[f"{name[4:-6].lower()}_config"]))


def _plain(params: Mapping[str, Any]) -> Tree:
    """Nested dicts, also of flax' FrozenDict."""
    return {key: _plain(value) if isinstance(value, Mapping) else value for key, value in params.items()}


def _shapes_of(tree: Tree) -> dict[str, tuple[int, ...]]:
    return {path: tuple(np.shape(leaf)) for path, leaf in flatten(tree)}


def _cast(params: Tree, dtype: Any, mask: Any) -> Tree:
    kept = jax.tree.map(lambda _: True, params) if mask is None else mask
    cast = lambda x, own: x.astype(dtype) if own and jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
    return jax.tree.map(cast, params, kept)
