"""A picture that shows what was tagged where: the photo with boxes, and one heat map for every tag."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxzs.files import atomic_path
from jaxzs.patch.images import ImageTags

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

_COLUMNS = 4
_MOST_MAPS = 11  # with the photo itself three full rows


def draw_overlay(image: Image.Image, found: ImageTags, class_names: Sequence[str]) -> Figure:
    """Figure of one image: boxes of all tags on the photo with a legend, then the heat map of each tag.

    image: the PIL image that was tagged. class_names: the F foreground names. Tags are in the order of their scores.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    tags = [c for c in np.argsort(-found.scores) if found.tags[c]][:_MOST_MAPS]
    columns = min(_COLUMNS, 1 + len(tags))
    rows = math.ceil((1 + len(tags)) / columns)
    aspect = image.height / image.width
    side = 3.2
    figure = Figure(
        figsize=(side * columns, rows * (side * min(max(aspect, 0.4), 2.5) + 0.45)),
        layout="constrained",
    )
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for axis in axes:
        axis.axis("off")
    colours = [colormaps["tab10"](place % 10) for place in range(len(tags))]
    _draw_photo(axes[0], image, found, tags, colours, class_names)
    for axis, c, colour in zip(axes[1:], tags, colours, strict=False):
        _draw_heat(axis, image, found, c, colour, class_names[c])
    return figure


def write_overlay(
    path: str | Path, image: Image.Image, found: ImageTags, class_names: Sequence[str]
) -> None:
    """`draw_overlay` as a picture file, atomically; the format goes by the suffix (.png, .jpg, .pdf, .svg)."""
    path = Path(path)
    figure = draw_overlay(image, found, class_names)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format=path.suffix.lstrip("."))


def _draw_photo(
    axis: Axes,
    image: Image.Image,
    found: ImageTags,
    tags: Sequence[int],
    colours: Sequence[Any],
    class_names: Sequence[str],
) -> None:
    from matplotlib.patches import Patch

    axis.imshow(image)
    for c, colour in zip(tags, colours, strict=True):
        _draw_box(axis, image, found.boxes[c], colour)
    legend = [
        Patch(color=colour, label=f"{class_names[c]} {found.scores[c]:.2f}")
        for c, colour in zip(tags, colours, strict=True)
    ]
    axis.legend(handles=legend, loc="lower left", fontsize=7, framealpha=0.75, borderpad=0.3)
    axis.set_title(f"{len(tags)} tags" if len(tags) != 1 else "1 tag", fontsize=9)


def _draw_heat(
    axis: Axes, image: Image.Image, found: ImageTags, c: int, colour: Any, name: str
) -> None:
    """The refined scores of one class over the greyed photo: yellow where the class was found, clear elsewhere."""
    scores = found.refined[..., c]
    low, high = float(scores.min()), float(scores.max())
    heat = (scores - low) / (high - low) if high > low else np.zeros_like(scores)
    axis.imshow(image.convert("L"), cmap="gray", vmin=-80, vmax=335)  # faint, to let the heat show
    axis.imshow(
        heat,
        cmap="inferno",
        alpha=np.clip(0.15 + 0.7 * heat, 0, 1),
        extent=(-0.5, image.width - 0.5, image.height - 0.5, -0.5),
        interpolation="bilinear",
    )
    _draw_box(axis, image, found.boxes[c], colour)
    axis.set_xlim(-0.5, image.width - 0.5)
    axis.set_ylim(image.height - 0.5, -0.5)
    second = f", second look {found.probability[c]:.2f}" if found.reidentified[c] else ""
    axis.set_title(f"{name} {found.scores[c]:.2f}{second}", fontsize=9, color=colour)


def _draw_box(axis: Axes, image: Image.Image, box: np.ndarray, colour: Any) -> None:
    from matplotlib.patches import Rectangle

    top, bottom, left, right = box * np.repeat([image.height, image.width], 2)
    if bottom > top and right > left:
        axis.add_patch(
            Rectangle(
                (left - 0.5, top - 0.5), right - left, bottom - top,
                fill=False, edgecolor=colour, linewidth=1.8,
            )
        )  # fmt: skip
