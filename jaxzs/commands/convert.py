"""`jaxzs convert`: a checkpoint of any layout as another one, with its tokenizer and preprocessing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxzs.commands import FINISHED
from jaxzs.commands.options import ComputeOptions, OutputOptions, Text, shown_as


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertOptions(OutputOptions, ComputeOptions):
    """From what, to what, and where."""

    model: Annotated[str, tyro.conf.Positional, shown_as("MODEL")]
    """A hub id, a folder of any layout (HuggingFace, open_clip, big_vision), or a file such as OpenAI's ViT-B-32.pt."""
    out: Annotated[Path, tyro.conf.Positional, shown_as("FOLDER")]
    """The folder to write, made if it is not there."""
    format: Literal["safetensors", "open_clip", "flax", "safetensors-flax"] = "safetensors"
    """safetensors: transformers' CLIPModel and SiglipModel; open_clip; flax: FlaxCLIPModel of transformers 4."""
    revision: Text = None
    """Commit, branch or tag of a hub id."""


def run(options: ConvertOptions) -> int:
    """Read a checkpoint of any layout, and write it as another one."""
    from jaxzs.clip import load, save

    model = load(options.model, dtype=None, revision=options.revision)  # stored types stay as they are
    folder = save(model, options.out, options.format)
    record = {
        "model": options.model,
        "out": str(folder),
        "format": options.format,
        "fingerprint": model.fingerprint,
        "files": sorted(path.name for path in folder.iterdir() if path.is_file()),
    }
    options.print_record(record)
    options.say(f"{options.model} as {options.format}: {folder}\nfingerprint {model.fingerprint[:12]}")
    if not _is_read_elsewhere(options.format, str(model.config.to_file()["model_type"])):
        options.notice(
            "no class of transformers computes this model: what is written in this format is for jaxzs alone"
        )
    elif options.format != "open_clip" and (other := _other_pixels(model.preprocessor)):
        options.notice(f"jaxzs prepares images for it as before, {other}")
    return FINISHED


def _other_pixels(preprocessor: Any) -> str:
    """What of open_clip's preprocessing the classes of transformers do not have; empty for all others."""
    if getattr(preprocessor, "letterbox", False):
        return "but transformers does not fit them into a box with black around: it squashes them"
    if getattr(preprocessor, "crop_rounding", "down") == "even" and preprocessor.do_center_crop:
        return "and transformers cuts some of them one pixel beside: it rounds half a pixel down"
    return ""


def _is_read_elsewhere(format: str, kind: str) -> bool:
    """Whether the library that a format is of has a class for a model_type; what open_clip lacks has been refused."""
    return format == "open_clip" or kind == "clip" or (format == "safetensors" and kind != "jaxzs_clip")
