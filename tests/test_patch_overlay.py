"""Pictures that a person can read: names in sight, colours apart, nothing cut off."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from jaxzs.patch.images import ImageTags
from jaxzs.patch.overlay import colour_of, draw_masks, draw_overlay, write_mask_overlay, write_overlay

NAMES = [f"class {number}" for number in range(11)] + [
    "a name of far more words than any box in any picture has room for"
]


def tagged(num_tags: int) -> ImageTags:
    random = np.random.default_rng(0)
    F = len(NAMES)
    scores = np.linspace(1, 0.1, F).astype(np.float32)
    boxes = np.tile([0.1, 0.7, 0.1, 0.8], (F, 1))  # all in one place
    maps = random.random((6, 8, F)).astype(np.float32)
    tags, nothing = np.arange(F) < num_tags, np.zeros(F, np.float32)
    return ImageTags(0, (60, 80), scores, tags, nothing, nothing.astype(bool), nothing, maps, maps, boxes)


IMAGE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 80, 3), np.uint8))


@pytest.mark.parametrize(
    ("tags", "panels", "title"), [(1, 2, "1 tag"), (6, 6, "6 tags, the 5 best are shown"), (3, 4, "3 tags")]
)
def test_at_most_six_panels_of_the_best(tags, panels, title):
    figure = draw_overlay(IMAGE, tagged(tags), NAMES)
    drawn = [axis for axis in figure.axes if axis.images]
    assert len(drawn) == panels
    assert drawn[0].get_title() == title
    assert [axis.get_title().split(":")[0] for axis in drawn[1:]] == NAMES[: panels - 1]


def test_names_are_in_sight_and_apart():
    """Six tags in one place: every name inside its picture and over no other one."""
    figure = draw_overlay(IMAGE, tagged(6), NAMES)
    figure.canvas.draw()
    places = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(places) == 5
    assert not any(one.overlaps(other) for one, other in itertools.combinations(places, 2))
    panel = figure.axes[0].get_window_extent()
    assert all(panel.x0 - 3 <= place.x0 and place.x1 <= panel.x1 + 3 for place in places)


def test_pictures_are_sharp(tmp_path):
    write_overlay(tmp_path / "tags.png", IMAGE, tagged(6), NAMES)
    with Image.open(tmp_path / "tags.png") as picture:
        assert picture.info["dpi"] == pytest.approx((150, 150), abs=0.1)


@pytest.mark.parametrize("size", [(60, 80), (200, 20), (20, 200)])
@pytest.mark.parametrize("labels", [0, 1, 12])
def test_legend_is_never_cut_off(size, labels, tmp_path, monkeypatch):
    """All labels of a picture are listed, inside of it."""
    figures = []
    monkeypatch.setattr("jaxzs.patch.overlay._save", lambda figure, path: figures.append(figure))
    grid = np.arange(size[0] * size[1]).reshape(size) % (labels + 1)
    write_mask_overlay(tmp_path / "x.png", Image.new("RGB", size[::-1]), grid, ["background", *NAMES])
    [figure] = figures
    figure.canvas.draw()
    assert len(figure.legends) == (labels > 0)
    for legend in figure.legends:
        assert len(legend.get_texts()) == labels
        box, whole = legend.get_window_extent(), figure.bbox
        assert whole.x0 - 1 <= box.x0 <= box.x1 <= whole.x1 + 1
        assert whole.y0 - 1 <= box.y0 <= box.y1 <= whole.y1 + 1


def test_colours_are_apart():
    """In every pair of the first sixteen, also where red and green look alike (deuteranopia, roughly)."""
    colours = np.array([colour_of(number) for number in range(16)])
    red_green = 0.6 * colours[:, 0] + 0.4 * colours[:, 1]
    seen = np.stack([red_green, colours[:, 2], 0.5 * colours.sum(1)], 1)
    apart = np.linalg.norm(seen[:8, None] - seen[None, :8], axis=-1) + 10 * np.eye(8)
    assert apart.min() > 0.15
    assert (np.linalg.norm(colours[:, None] - colours[None], axis=-1) + 10 * np.eye(16)).min() > 0.15


def test_masks_take_the_colours_that_their_tags_have():
    from matplotlib.figure import Figure

    labels = np.repeat([[0, 2, 5, 7]], 60, axis=0).repeat(20, axis=1)
    colours = draw_masks(Figure().subplots(), IMAGE, labels, ["background", *NAMES], first=[7, 3, 2])
    assert colours == {2: colour_of(2), 5: colour_of(3), 7: colour_of(0)}


def test_names_are_no_formulas(tmp_path):
    """What stands between dollar signs is a name: one that is no formula ended the command, one that is was redrawn."""
    names = ["$\\frac{$", "$x$", "5$ or $6", *NAMES[3:]]
    figure = draw_overlay(IMAGE, tagged(3), names)
    figure.canvas.draw()
    assert [text.get_text() for text in figure.axes[0].texts] == names[:3]
    assert not any(text.get_parse_math() for text in figure.axes[0].texts)
    write_overlay(tmp_path / "tags.png", IMAGE, tagged(3), names)
    write_mask_overlay(tmp_path / "masks.png", IMAGE, np.repeat([0, 1, 2], 20)[:, None] + np.zeros(80, int), names)
