"""The art checkpoint's model card: what it knows, whose drawings taught it, what it reached, what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.art_world.batches import vocabulary
from experiments.art_world.names import EVERYDAY, NAMES
from experiments.demo_world.captions import PLAIN_TEMPLATES

LIMITS = (
    "It knows the things it lists, as emoji artists draw them, and no words outside of its vocabulary.",
    "It has seen no photograph.",
    "It has seen the same few drawings of each thing again and again: another hand is a shift of domain that it feels.",
    "Patch scores come from a patch-level training term on image-level captions; contrastive training alone leaves "
    "them near random at this size.",
    "Small images of few objects only: it works at 48 to 96 pixels, beyond nothing was measured.",
)
SOURCES = (
    "Noto Emoji and its older edition by Google, Apache-2.0 (npm: emoji-datasource-google, @iconify-json/noto-v1)",
    "Twemoji, graphics by Twitter, Inc and other contributors, CC-BY 4.0 "
    "<https://creativecommons.org/licenses/by/4.0/> (npm: emoji-datasource-twitter); scaled, turned, recoloured and "
    "composed into images for training",
)
# Of 0.5, 0.3, 0.2, 0.1, 0.05 and 0.03 the one with the best F1 on 60 scenes by the artists that are trained on.
TAG_THRESHOLD = 0.2
UNSEEN = "Fluent Emoji by Microsoft, MIT (npm: @lobehub/fluent-emoji-3d): tests only, never trained on"


def write_card(folder: Path, training: dict[str, Any], results: dict[str, Any] | None = None, tables: str = "") -> None:
    """Write model_card.json and README.md."""
    words = [word for word in vocabulary() if word.isalnum()]
    card = {
        "name": "jaxzs art CLIP",
        "vocabulary": words,
        "classes": {"everyday": list(EVERYDAY.values()), "things": list(NAMES)},
        "templates": {"plain": list(PLAIN_TEMPLATES), "trained_on": "tagclip85"},
        "temperatures": {"text": "1/s", "vision": "4/s", "s": training.get("logit_scale")},
        "tagging": {"relative_threshold": TAG_THRESHOLD},
        "training": training,
        "results": results or {},
        "limits": list(LIMITS),
        "drawings": {"trained": list(SOURCES), "tested": UNSEEN},
        "licence": "Apache-2.0",
    }
    (folder / "model_card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    if training:
        (folder / "README.md").write_text(_text(card, tables), encoding="utf-8")


def _text(card: dict[str, Any], tables: str) -> str:
    run, words = card["training"], card["vocabulary"]
    of_run = f" Of this run {run['note']}." if "note" in run else ""
    seconds = {"wall": "seconds", "training": "cpu_seconds_training", "composing": "cpu_seconds_rendering"}
    minutes = {name: run[key] / 60 for name, key in seconds.items()}
    vision, text = run["config"]["vision_config"], run["config"]["text_config"]
    listed = lambda lines: "\n".join(f"- {line}" for line in lines)  # noqa: E731
    return f"""---
license: apache-2.0
library_name: jaxzs
tags: [clip, demo]
---
# {card["name"]}

A CLIP of {run["parameters"] / 1e6:.2f} M parameters that knows {len(card["classes"]["things"])} things, trained from
scratch on {run["images"]:,} images that the project composes of emoji. It exists so that every method in jaxzs can be
shown without a download, on drawings by an artist that it never saw. It is an ordinary HuggingFace CLIP (float16).

- Vision: {vision["image_size"]} x {vision["image_size"]} pixels, patch {vision["patch_size"]},
  width {vision["hidden_size"]}, {vision["num_hidden_layers"]} layers. Text: width {text["hidden_size"]},
  {text["num_hidden_layers"]} layers, context {text["max_position_embeddings"]}.
  Shared space: {run["config"]["projection_dim"]}. {len(words)} words.
- Training: `{run["command"]}`; {run["steps"]:,} steps, seed {run["plan"]["seed"]}; {minutes["wall"]:.0f} minutes
  on {run["cpu_cores"]} CPU cores that other work shared: {minutes["training"]:.0f} CPU minutes of training,
  {minutes["composing"]:.0f} of composing. From easy images to hard ones; in the second part a patch-level term and
  scenes of 96 pixels.{of_run}
- Temperatures for proxy learning: 1/s and 4/s with s = {run["logit_scale"]}. Tags: `--threshold {TAG_THRESHOLD}`,
  chosen on scenes by the artists it was trained on.

## Drawings

Trained on:

{listed(card["drawings"]["trained"])}

{card["drawings"]["tested"]}.

## Measured

{tables or "Not yet."}

## Limits

{listed(card["limits"])}
"""
