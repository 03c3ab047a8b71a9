"""The demo checkpoint's model card: what it knows, how it was trained, what it reached, what it cannot do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from experiments.demo_world.captions import (
    BACKGROUND_NAMES,
    COLOUR_NAMES,
    DIGIT_TEMPLATES,
    DIGITS,
    GLYPH_NAMES,
    PLAIN_TEMPLATES,
    SHAPES,
    vocabulary,
)

LIMITS = (
    "It knows nothing but digits, capital letters and flat coloured shapes, and no words outside of its vocabulary.",
    "It has seen no photograph and no real handwriting: scanned digits are a domain shift.",
    "Which object has which colour was not tested: do not rely on it.",
    "Outlined shapes are a style it was never trained on; outlined rings and circles can be taken for each other.",
    "0 and O, 1 and I, 2 and Z, 5 and S were never set against each other in training.",
    "Patch scores come from a patch-level training term on image-level captions; contrastive training alone, "
    "as OpenAI's CLIP had it, leaves them near random at this size.",
    "These figures, of a short trial run, were seen before batch size, learning rate and length of the final run were "
    "set; no checkpoint was chosen by them.",
    "Other image sizes work by interpolated positions; beyond 128 pixels nothing was measured.",
)


def training_facts(progress: dict[str, Any], params: Any, command: str) -> dict[str, Any]:
    """What the card says about a training run: its `progress` record and its final parameters."""
    import jax
    import numpy as np

    from jaxzs.report import environment

    return {
        "command": command,
        "images": progress["images"],
        "steps": progress["step"],
        "seconds": round(progress["seconds"]),
        "cpu_seconds_training": round(progress["cpu"]),
        "cpu_seconds_rendering": round(progress["render"]),
        "images_per_second": round(progress["images"] / progress["seconds"], 1),
        "cpu_cores": os.cpu_count(),
        "parameters": sum(int(np.size(x)) for x in jax.tree.leaves(params)),
        "logit_scale": round(float(np.exp(params["logit_scale"])), 3),
        "final": progress["log"][-1],
        "environment": environment(),
        **progress["settings"],
    }


def model_card(training: dict[str, Any], results: dict[str, Any] | None = None) -> dict[str, Any]:
    """The card as JSON; the command line refuses labels with words outside of "vocabulary"."""
    return {
        "name": "jaxzs demo CLIP",
        "vocabulary": [word for word in vocabulary() if word.isalnum()],
        "classes": {
            "digits": list(DIGITS),
            "letters": [names[0] for names in GLYPH_NAMES[len(DIGITS) :]],
            "shapes": list(SHAPES),
            "colours": list(COLOUR_NAMES),
            "backgrounds": list(BACKGROUND_NAMES),
        },
        "templates": {"digits": list(DIGIT_TEMPLATES), "plain": list(PLAIN_TEMPLATES), "trained_on": "tagclip85"},
        "temperatures": {"text": "1/s", "vision": "4/s", "s": training.get("logit_scale")},
        "training": training,
        "results": results or {},
        "limits": list(LIMITS),
        "licence": "Apache-2.0",
    }


def write_card(folder: Path, training: dict[str, Any], results: dict[str, Any] | None = None, tables: str = "") -> None:
    """Write model_card.json and README.md."""
    card = model_card(training, results)
    (folder / "model_card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_text(card, tables), encoding="utf-8")


def _text(card: dict[str, Any], tables: str) -> str:
    run = card["training"]
    minutes = {
        "wall": run["seconds"] / 60,
        "training": run["cpu_seconds_training"] / 60,
        "rendering": run["cpu_seconds_rendering"] / 60,
    }
    vision, text = run["config"]["vision_config"], run["config"]["text_config"]
    return f"""---
license: apache-2.0
library_name: jaxzs
tags: [clip, demo]
---
# {card["name"]}

A CLIP of {run["parameters"] / 1e6:.2f} M parameters, trained from scratch on {run["images"]:,} images that the project
renders itself: printed and hand-drawn digits and capital letters, and scenes of coloured shapes. It exists so
that every method in jaxzs can be shown without a download. It is an ordinary HuggingFace CLIP (float16).

- Vision: {vision["image_size"]} x {vision["image_size"]} pixels, patch {vision["patch_size"]},
  width {vision["hidden_size"]}, {vision["num_hidden_layers"]} layers. Text: width {text["hidden_size"]},
  {text["num_hidden_layers"]} layers, context {text["max_position_embeddings"]}.
  Shared space: {run["config"]["projection_dim"]}. {len(card["vocabulary"])} words.
- Training: `{run["command"]}`; {run["steps"]:,} steps, seed {run["plan"]["seed"]}. {minutes["wall"]:.0f} minutes
  on {run["cpu_cores"]} CPU cores that other work shared: {minutes["training"]:.0f} CPU minutes of training,
  {minutes["rendering"]:.0f} of rendering. Contrastive loss with several positives, from easy images to hard ones; in
  the second part a patch-level term and larger images.
- Temperatures for proxy learning: 1/s and 4/s with s = {run["logit_scale"]}.

## Measured

{tables or "Not yet."}

## Limits

{chr(10).join(f"- {limit}" for limit in card["limits"])}
"""
