"""One call from a name to a ready checkpoint: weights, configuration, tokenizer, image preprocessing."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxzs.clip import weights
from jaxzs.clip.config import CLIPConfig, ResNetConfig, VisionConfig
from jaxzs.clip.files import read_json
from jaxzs.clip.hub import find_checkpoint
from jaxzs.clip.layout import TOWERS
from jaxzs.clip.naflex import Patches
from jaxzs.clip.naflex_images import PatchPreprocessor
from jaxzs.clip.preprocess import ImagePreprocessor
from jaxzs.clip.sharding import Placement, placer
from jaxzs.clip.tokenizer import Tokenizer
from jaxzs.errors import CheckpointError, ImageError, TextError


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A loaded checkpoint. A pytree: its leaves are the parameters, all else is static, so that `jit(f)(model)` works.

    params: HuggingFace's Flax tree, nested dicts of arrays. config: frozen and hashable.
    tokenizer, preprocessor: what `tokenize` and `preprocess` call. name: what was asked for.
    vocabulary: the words the model was trained on, when its model card tells them, else None.
    card: the model card's JSON, empty when there is none.

    >>> model = jaxzs.load("demo")
    >>> model.preprocess(np.zeros((60, 90, 3), np.uint8)).shape, model.tokenize(["the digit seven"])[0].shape
    ((1, 48, 48, 3), (1, 5))
    >>> len(model.vocabulary), len(model.fingerprint)
    (135, 64)
    >>> digit = jax.jit(lambda model, pixels: clip.encode_image(model.params, pixels, model.config))
    >>> digit(model, np.zeros((1, 48, 48, 3), np.float32)).shape
    (1, 64)
    >>> model
    Model('demo': 799,649 parameters, images of 48 x 48, texts of up to 32 tokens, features of 64)
    """

    params: dict[str, Any]
    config: CLIPConfig
    tokenizer: Tokenizer
    preprocessor: ImagePreprocessor
    name: str
    card: dict[str, Any]

    def tokenize(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Texts -> (input_ids [B,T], attention_mask [B,T]) int32, T that of the longest text; SigLIP's T is fixed.

        Raises `TextError` for an empty text, or one too long for the context.
        """
        if self.tokenizer is None:
            raise TextError(f"the checkpoint {self.name!r} was loaded without its text tower")
        return self.tokenizer(texts)

    def preprocess(self, images: Any) -> np.ndarray | Patches:
        """PIL images, uint8 arrays, or a list of them -> normalised pixels [B,S,S,3] float32; NaFlex: `Patches`.

        Both have a length and rows, and are what `encode_image` takes. Raises `ImageError`, naming the unfit one.
        """
        if self.preprocessor is None:
            raise ImageError(f"the checkpoint {self.name!r} was loaded without its image tower")
        return self.preprocessor(images)

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """The parameters, and all else as one static value."""
        static = _Same((self.tokenizer, self.preprocessor, self.name, self.card))
        return ((jax.tree_util.GetAttrKey("params"), self.params),), (self.config, static)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> Model:
        """The inverse."""
        config, others = static
        return cls(children[0], config, *others)

    def __repr__(self) -> str:
        size, config = sum(getattr(leaf, "size", 1) for leaf in jax.tree.leaves(self.params)), self.config
        side = config.vision.image_size
        images = "any aspect" if getattr(config.vision, "variable", False) else f"{side} x {side}"  # NaFlex
        return (
            f"Model({self.name!r}: {size:,} parameters, images of {images}, texts of up to "
            f"{config.text.max_position_embeddings} tokens, features of {config.projection_dim})"
        )

    @property
    def logit_scale(self) -> float:
        """s = exp(logit_scale), 100 for OpenAI's checkpoints.

        The paper's temperatures 0.01 and 0.04 are 1/s and 4/s there; jaxzs uses these for every checkpoint.
        """
        if "logit_scale" not in self.params:
            raise CheckpointError(
                f"the checkpoint {self.name!r} was loaded without one of its towers, and has no scale"
            )
        scale = self.params["logit_scale"]
        # Inside of a trace there is no float yet; an array serves all arithmetic.
        return jnp.exp(scale) if isinstance(scale, jax.core.Tracer) else math.exp(float(scale))  # type: ignore

    @property
    def vocabulary(self) -> frozenset[str] | None:
        """Words the model has been trained on; None when it does not say (any published CLIP)."""
        words = self.card.get("vocabulary")
        return None if words is None else frozenset(word.lower() for word in words)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of weights and configuration: what features and prompts made with this model are keyed by."""
        return weights.fingerprint(self.params, self.config)

    def check_words(self, texts: Sequence[str]) -> None:
        """Raise `TextError` naming the words of `texts` that this model has never seen in training."""
        if self.vocabulary is None:
            return
        unknown = sorted(
            {word for text in texts for word in re.findall(r"[^\W_]+", text.lower()) if word not in self.vocabulary}
        )
        if unknown:
            raise TextError(
                f"the checkpoint {self.name!r} has never seen the words: {', '.join(unknown)}. It knows "
                f"{len(self.vocabulary)} words{self._such_as()} and would guess",
                python='load a real CLIP, e.g. "openai/clip-vit-base-patch32"',
                command="use a real CLIP, e.g. --model openai/clip-vit-base-patch32, or --force",
            )

    def _such_as(self) -> str:
        """Two of the names of each kind that the model card lists."""
        kinds = self.card.get("classes")
        if not isinstance(kinds, Mapping) or not all(isinstance(names, Sequence) for names in kinds.values()):
            return ""  # the card of somebody else
        names = dict.fromkeys(str(name) for names in kinds.values() for name in names[:2])
        return f", such as {', '.join(names)}," if names else ""


class _Same(tuple[Any, ...]):
    """Values that are equal only to themselves: a tokenizer cannot be compared, and a card cannot be hashed."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and all(a is b for a, b in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(map(id, self)))


def load(
    name_or_path: str | Path = "demo",
    *,
    dtype: Any = jnp.float32,
    revision: str | None = None,
    local_files_only: bool = False,
    mesh: Mesh | None = None,
    placement: Placement = "replicated",
    towers: Sequence[str] = TOWERS,
) -> Model:
    """Load a checkpoint: the embedded "demo", a local folder, or a HuggingFace hub id.

    Args:
      name_or_path: "demo"; a folder of HuggingFace's or open_clip's (configuration, weights, tokenizer, preprocessing);
        a file such as OpenAI's ViT-B-32.pt; or a hub id, e.g. "openai/clip-vit-base-patch32".
      dtype: of storage (float32, bfloat16, float16). Computation is float32 unless a function is told otherwise.
      revision: commit, branch or tag of a hub id.
      local_files_only: never go to the network; `HF_HUB_OFFLINE=1` does the same.
      mesh: devices to put the parameters on (`jaxzs.parallel.make_mesh()`), each leaf shard by shard as it is read: no
        host ever holds a second copy. Default: the first device.
      towers: ("text", "vision"), or one of them, which is then all that is read: images alone need no text tower.
      placement: on the mesh "replicated", "fully_sharded" over its axis "data", "tensor" (heads, MLP and vocabulary
        over "model") or "tensor_fully_sharded"; see `jaxzs.clip.parameter_shardings`.

    Returns:
      A `Model`.

    Raises:
      CheckpointError: not found, unreadable, or not matching its configuration; says what was tried.
      ConfigError: not the configuration of a CLIP.

    >>> model = jaxzs.load("demo")
    >>> model.params["logit_scale"].dtype, model.config.projection_dim
    (dtype('float32'), 64)
    >>> model = jaxzs.load("openai/clip-vit-base-patch32")  # doctest: +SKIP
    >>> jaxzs.load("./no/such/folder")
    Traceback (most recent call last):
    jaxzs.errors.CheckpointError: ./no/such/folder: no such file or folder, and not a hub id (owner/name). ...
    """
    folder = find_checkpoint(name_or_path, revision=revision, local_files_only=local_files_only)
    place = None if mesh is None else placer(weights.read_config(folder, towers=towers), mesh, placement)
    params, config = weights.read_checkpoint(folder, dtype=dtype, place=place, towers=towers)
    text_cfg, preprocess_cfg = weights.open_clip_values(folder)
    folder = folder if folder.is_dir() else folder.parent  # beside a single file lies what belongs to it
    tokenizer = Tokenizer.for_tower(folder, config.text, text_cfg) if "text" in towers else None
    preprocessor = _preprocessor(folder, config.vision, preprocess_cfg) if "vision" in towers else None
    return Model(
        params=params,
        config=config,
        tokenizer=tokenizer,  # type: ignore[arg-type]  # None where its tower was not asked for; `tokenize` says so
        preprocessor=preprocessor,  # type: ignore[arg-type]
        name=str(name_or_path),
        card=_model_card(folder / "model_card.json"),
    )


def fixed_size(model: Model) -> Model:
    """A NaFlex checkpoint as the tower of one size that its positions were learned for; any other as it is.

    For what needs one grid of patches for all images: tags, masks, visual prompts. The same weights read square pixels,
    as SigLIP 2 with a fixed resolution; whole images of other aspects are squashed to the square. Defined here, in no
    paper; a square has the features that the NaFlex tower gives it at that number of patches.

    >>> model = jaxzs.load("demo")
    >>> clip.fixed_size(model) is model
    True
    """
    vision = model.config.vision
    if isinstance(vision, ResNetConfig) or not vision.variable:
        return model
    config = dataclasses.replace(model.config, vision=dataclasses.replace(vision, variable=False))
    square: Any = (vision.image_size, vision.image_size)
    own: Any = model.preprocessor  # None where the tower was left out
    pixels = own and dataclasses.replace(
        own.levels, size=square, crop_size=square, do_resize=True, do_center_crop=False, letterbox=False
    )
    return dataclasses.replace(model, config=config, preprocessor=pixels)


def _preprocessor(
    folder: Path, vision: VisionConfig | ResNetConfig, open_clip: Mapping[str, Any] | None
) -> ImagePreprocessor | PatchPreprocessor:
    if isinstance(vision, VisionConfig) and vision.variable:
        return PatchPreprocessor.for_tower(folder, vision)
    return ImagePreprocessor.for_tower(folder, vision, open_clip)


def _model_card(path: Path) -> dict[str, Any]:
    """The card beside the weights, empty when there is none; the words in it are checked here, once."""
    card = read_json(path, CheckpointError) if path.is_file() else {}
    words = card.get("vocabulary")
    if words is not None and not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
        raise CheckpointError(f"{path}: vocabulary must be a list of words, found {words!r:.80}")
    return card
