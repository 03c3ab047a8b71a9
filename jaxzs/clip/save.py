"""A whole model into a folder: weights, configuration, tokenizer and preprocessing, to be loaded elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from jaxzs.clip.load import Model
from jaxzs.clip.open_clip import CONFIG_FILE, to_open_clip
from jaxzs.clip.preprocess import ImagePreprocessor
from jaxzs.clip.tokenizer import Tokenizer
from jaxzs.clip.weights import write_checkpoint
from jaxzs.errors import CheckpointError
from jaxzs.files import atomic_path, write_json

Format = Literal["safetensors", "flax", "safetensors-flax", "open_clip"]


def save(model: Model, folder: str | Path, format: Format = "safetensors") -> Path:
    """Write a model so that `jaxzs.load(folder)` gives it back; returns the folder.

    format: "safetensors" for transformers' CLIPModel and SiglipModel, "open_clip" for open_clip, "flax" for
        transformers 4's FlaxCLIPModel, "safetensors-flax" for Flax names in safetensors.

    Raises `CheckpointError` where a tower was left out when loading, where the tokenizer cannot be written, or where
    the folder holds weights that would be read instead; `ConfigError` for a model that open_clip does not have.

    >>> model = jaxzs.load("demo")
    >>> again = jaxzs.load(clip.save(model, "mine"))
    >>> again.fingerprint == model.fingerprint
    True
    >>> bool((again.tokenize(["the digit one"])[0] == model.tokenize(["the digit one"])[0]).all())
    True
    """
    folder = Path(folder)
    if model.tokenizer is None or model.preprocessor is None:
        raise CheckpointError(f"{model.name}: was loaded without one of its towers; load it whole to save it")
    # First, as it may refuse: no weights are written then.
    _write_tokenizer(model.tokenizer, folder)
    write_checkpoint(folder, model.params, model.config, format)
    if format == "open_clip":
        described = {"model_cfg": to_open_clip(model.config), "preprocess_cfg": _open_clip_preprocessing(model)}
        write_json(folder / CONFIG_FILE, described)  # over the one without preprocessing
    else:
        write_json(folder / "preprocessor_config.json", model.preprocessor.to_json())
    if model.card:
        write_json(folder / "model_card.json", dict(model.card))
    return folder


def _open_clip_preprocessing(model: Model) -> dict[str, Any]:
    own: ImagePreprocessor = model.preprocessor
    mode = "longest" if own.letterbox else "shortest" if own.do_center_crop else "squash"
    names = {2: "bilinear", 3: "bicubic"}
    if own.resample not in names:
        raise CheckpointError(f"{model.name}: images are resized by Pillow's filter {own.resample}, not open_clip's")
    return {
        "mean": list(own.image_mean), "std": list(own.image_std), "interpolation": names[own.resample],
        "resize_mode": mode,
    }  # fmt: skip


def _write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """`tokenizer.json` with the tokens around a text, and the `tokenizer_config.json` that names its class."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    name = lambda number: tokenizer.backend.id_to_token(number)  # noqa: E731
    start, end = None if tokenizer.start_id is None else name(tokenizer.start_id), name(tokenizer.end_id)
    backend = Backend.from_str(tokenizer.backend.to_str())
    around = [token for token in (start, end) if token is not None]
    backend.post_processor = TemplateProcessing(  # what transformers puts around a text; jaxzs does it itself
        single=" ".join(filter(None, (start, "$A", end))),
        special_tokens=[(token, backend.token_to_id(token)) for token in around],
    )
    kind = _CLASSES.get((tokenizer.clean, start is None))
    if kind is None:
        raise CheckpointError(
            f"{folder}: no tokenizer class of transformers has this tokenizer's rule for texts ({tokenizer.clean!r}); "
            "write the weights by clip.write_checkpoint, and copy the tokenizer's files"
        )
    with atomic_path(folder / "tokenizer.json") as temporary:
        temporary.write_text(backend.to_str(), encoding="utf-8")
    settings = {
        "tokenizer_class": f"{kind}Tokenizer",
        "model_max_length": tokenizer.max_length,
        "bos_token": start,
        "eos_token": end,
        "unk_token": end if kind == "CLIP" else "<unk>",
        "pad_token": name(tokenizer.pad_id),
    }
    write_json(folder / "tokenizer_config.json", {key: value for key, value in settings.items() if value is not None})


# The class whose rules for a text are those of the tokenizer: by what is done to it, and whether it has no start token.
_CLASSES = {
    ("", False): "CLIP",
    ("open_clip lower", False): "CLIP",
    ("siglip", True): "Siglip",
    ("lower", True): "Gemma",
}
