"""A whole model into a folder: weights, configuration, tokenizer and preprocessing, to be loaded elsewhere."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jaxzs.clip.load import Model
from jaxzs.clip.open_clip import CONFIG_FILE, to_open_clip
from jaxzs.clip.preprocess import BICUBIC, BILINEAR, ImagePreprocessor
from jaxzs.clip.texts import RULES
from jaxzs.clip.tokenizer import Tokenizer
from jaxzs.clip.tokenizer_files import OWN_CLASS, OWN_PADDING, WORD_END, packaged_pipeline
from jaxzs.clip.weights import check_folder, write_checkpoint
from jaxzs.errors import CheckpointError, ConfigError
from jaxzs.files import atomic_path, write_json

Format = Literal["safetensors", "flax", "safetensors-flax", "open_clip"]
# Not written here, but read where they are, before or beside what is.
_FOREIGN = ("processor_config.json", "added_tokens.json", "spiece.model", "model_card.json")


def save(model: Model, folder: str | Path, format: Format = "safetensors") -> Path:
    """Write a model so that `jaxzs.load(folder)` gives it back; returns the folder.

    format: "safetensors" for transformers' CLIPModel, MetaClip2Model, SiglipModel and Siglip2Model, "open_clip" for
        open_clip, "flax" for transformers 4's FlaxCLIPModel, "safetensors-flax" for Flax names in safetensors. Towers
        that transformers does not have (ResNets, CLIPA, a CLIP with a bias) are written for this package alone.

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
    # Whatever may be refused is made before anything is written: the folder may hold another model.
    pipeline, settings = _tokenizer_files(model.tokenizer, folder)
    described = _open_clip_files(model) if format == "open_clip" else None
    check_folder(folder, format)
    _check_nothing_foreign(model, folder)
    write_checkpoint(folder, model.params, model.config, format)
    with atomic_path(folder / "tokenizer.json") as temporary:
        temporary.write_text(pipeline, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", settings)
    if described is not None:
        write_json(folder / CONFIG_FILE, described)  # over the one without preprocessing
    else:
        write_json(folder / "preprocessor_config.json", model.preprocessor.to_json())
    if model.card:
        write_json(folder / "model_card.json", dict(model.card))
    return folder


def _check_nothing_foreign(model: Model, folder: Path) -> None:
    """Raise `CheckpointError` for files of another model, which would be read as if they were of this one."""
    own = {"model_card.json"} if model.card else set()
    if there := [name for name in _FOREIGN if name not in own and (folder / name).exists()]:
        raise CheckpointError(
            f"{folder}: already holds {', '.join(there)}, which would be read beside what is written; remove it or "
            "write to another folder"
        )


def _open_clip_files(model: Model) -> dict[str, Any]:
    """`open_clip_config.json`. Raises `ConfigError` or `CheckpointError` for what it cannot say."""
    values = to_open_clip(model.config)
    if model.tokenizer.backend.get_vocab() != packaged_pipeline()[1]["model"]["vocab"]:
        # open_clip takes OpenAI's byte pairs, whatever lies in the folder, unless another tokenizer is named.
        # Lower case, as with OpenAI's, where the pipeline has it too; MetaCLIP 2 tells capitals apart.
        own = model.tokenizer.backend.normalizer
        lowers = own is not None and own.normalize_str("A") == "a"
        options = {"clean": "lower" if lowers else "whitespace"}
        values["text_cfg"] |= {"hf_tokenizer_name": Path(model.name).name, "tokenizer_kwargs": options}
    return {"model_cfg": values, "preprocess_cfg": _open_clip_preprocessing(model)}


def _open_clip_preprocessing(model: Model) -> dict[str, Any]:
    own: ImagePreprocessor = model.preprocessor
    if own.size == own.crop_size:  # there is nothing left to cut
        own = dataclasses.replace(own, do_center_crop=False)
    written = {
        "mean": list(own.image_mean), "std": list(own.image_std),
        "interpolation": {BILINEAR: "bilinear", BICUBIC: "bicubic"}.get(own.resample, f"filter {own.resample}"),
        "resize_mode": "longest" if own.letterbox else "shortest" if own.do_center_crop else "squash",
    }  # fmt: skip
    try:
        read = ImagePreprocessor.from_open_clip(written, model.config.vision.image_size)
    except ConfigError as error:
        raise CheckpointError(f"{model.name}: its preprocessing cannot be written for open_clip: {error}") from error
    # Not compared: what open_clip has no choice of, and a crop that is not made.
    own = dataclasses.replace(own, crop_rounding=read.crop_rounding, do_convert_rgb=read.do_convert_rgb)
    own = own if own.do_center_crop else dataclasses.replace(own, crop_size=read.crop_size)
    mine, theirs = dataclasses.asdict(own), dataclasses.asdict(read)
    if other := [f"{name} {mine[name]} (open_clip: {theirs[name]})" for name in mine if mine[name] != theirs[name]]:
        raise CheckpointError(
            f"{model.name}: its preprocessing cannot be written for open_clip: {', '.join(other)}; write another format"
        )
    return written


def _tokenizer_files(tokenizer: Tokenizer, folder: Path) -> tuple[str, dict[str, Any]]:
    """`tokenizer.json` with the tokens around a text, and the `tokenizer_config.json` that names its class."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    name = lambda number: tokenizer.backend.id_to_token(number)  # noqa: E731
    start, end = None if tokenizer.start_id is None else name(tokenizer.start_id), name(tokenizer.end_id)
    if (tokenizer.clean, start is None) not in _CLASSES:
        raise CheckpointError(
            f"{folder}: no tokenizer class of transformers has this tokenizer's rule for texts ({tokenizer.clean!r}); "
            "write the weights by clip.write_checkpoint, and copy the tokenizer's files"
        )
    backend = Backend.from_str(tokenizer.backend.to_str())
    around = [token for token in (start, end) if token is not None]
    backend.post_processor = TemplateProcessing(  # what transformers puts around a text; jaxzs does it itself
        single=" ".join(filter(None, (start, "$A", end))),
        special_tokens=[(token, backend.token_to_id(token)) for token in around],
    )
    _put_rule_into_pipeline(backend, tokenizer.clean)
    model, pad = json.loads(backend.to_str())["model"], name(tokenizer.pad_id)
    # Padding such as "!" would be taken out of texts by transformers, where a pad token is never a word.
    word = pad is not None and backend.token_to_id(pad + WORD_END) is not None
    settings = {
        # Only CLIP's own class is known to build what the file says; others would be built anew without the rule.
        "tokenizer_class": "CLIPTokenizer" if _is_clip(model) else "PreTrainedTokenizerFast",
        OWN_CLASS: _CLASSES[tokenizer.clean, start is None],
        "model_max_length": tokenizer.max_length,
        "truncation_side": "left" if tokenizer.cut_left else None,
        "padding_side": "right",  # the default of transformers is the left for some classes, and SigLIP reads padding
        "model_input_names": ["input_ids"] if start is None else None,  # SigLIP reads padding: a mask would hide it
        "bos_token": start,
        "eos_token": end,
        "unk_token": model["vocab"][model["unk_id"]][0] if model["type"] == "Unigram" else model.get("unk_token"),
        "pad_token": end if word else pad,
        OWN_PADDING: pad if word else None,
    }
    return backend.to_str(), {key: value for key, value in settings.items() if value is not None}


def _is_clip(model: Mapping[str, Any]) -> bool:
    return model["type"] == "BPE" and model.get("end_of_word_suffix") == WORD_END


def _put_rule_into_pipeline(backend: Any, clean: str) -> None:
    """What SigLIP does to a text as steps of the pipeline, where it is not one already: a copy of jaxzs' own rule.

    transformers has it in classes that read other files (spiece.model), or that are not in version 4.
    """
    from tokenizers import Regex
    from tokenizers.normalizers import Lowercase, Replace, Sequence

    sample, own = "A!", backend.normalizer
    plain = own.normalize_str if own is not None else str
    if clean in ("siglip", "lower") and plain(sample) != plain(RULES[clean](sample)):
        steps = [Lowercase(), *([Replace(Regex(_PUNCTUATION), "")] if clean == "siglip" else [])]
        backend.normalizer = Sequence([*steps, *([own] if own is not None else [])])


_PUNCTUATION = r"[!-/:-@\[-`{-~]"  # of ASCII, as string.punctuation
# The rule for a text and whether it has no start token, of the tokenizers that can be written; and jaxzs' own name
# for the class, where that of transformers does not tell it.
_CLASSES = {
    ("", False): None,
    ("open_clip lower", False): None,
    ("siglip", True): "SiglipTokenizer",
    ("lower", True): "GemmaTokenizer",
}
