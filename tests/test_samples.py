"""The images inside the package, and what is said of them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxzs.clip import find_checkpoint
from jaxzs.data import samples


def test_things_are_balanced_and_all_different():
    images, labels, names = samples.things()
    assert images.shape == (600, 72, 72, 3)
    assert (np.bincount(labels) == 6).all()
    assert len(set(names)) == len(names) == 100
    assert len({image.tobytes() for image in images}) == 600
    assert (images.reshape(600, -1).std(1) > 5).all()  # none is blank


def test_scenes_hold_what_their_tags_and_masks_say():
    found = samples.scenes()
    assert ((found.tags.sum(1) >= 2) & (found.tags.sum(1) <= 5)).all()
    for tags, mask in zip(found.tags, found.masks, strict=True):
        covered = np.unique(mask[mask > 0]) - 1
        assert set(covered) <= set(np.flatnonzero(tags))
    assert found.tags.any(0).sum() > 60  # of the hundred things
    assert found.names == samples.things()[2]


def test_the_checkpoint_knows_the_names_of_the_samples():
    card = json.loads((find_checkpoint("art") / "model_card.json").read_text())
    assert tuple(card["classes"]["everyday"]) == samples.things()[2]
    assert set(card["classes"]["everyday"]) < set(card["classes"]["things"])


@pytest.mark.parametrize("file", ["README.md", "index.json", "things.webp", "scenes.webp", "masks.png"])
def test_sheets_come_with_their_licence(file):
    assert (samples.FOLDER / file).is_file()
    assert "Permission is hereby granted" in (samples.FOLDER / "README.md").read_text()
