"""The art checkpoint's model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.art_world.batches import vocabulary
from experiments.art_world.names import EVERYDAY, NAMES
from experiments.demo_world.captions import PLAIN_TEMPLATES


def write_card(folder: Path, training: dict[str, Any], results: dict[str, Any] | None = None) -> None:
    """Write model_card.json."""
    card = {
        "name": "jaxzs art CLIP",
        "vocabulary": [word for word in vocabulary() if word.isalnum()],
        "classes": {"everyday": list(EVERYDAY.values()), "things": list(NAMES)},
        "templates": {"plain": list(PLAIN_TEMPLATES), "trained_on": "tagclip85"},
        "training": training,
        "results": results or {},
    }
    (folder / "model_card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
