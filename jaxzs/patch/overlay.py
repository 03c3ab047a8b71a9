"""Pictures that show what was found where: boxes and heat maps of tags, coloured masks of label maps."""

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
    figure = Figure(figsize=(side * columns, rows * (side * min(max(aspect, 0.4), 2.5) + 0.8)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for axis in axes:
        axis.axis("off")
    colours = [colormaps["tab10"](place % 10) for place in range(len(tags))]
    _draw_photo(axes[0], image, found, tags, colours, class_names)
    for axis, c, colour in zip(axes[1:], tags, colours, strict=False):
        _draw_heat(axis, image, found, c, colour, class_names[c])
    return figure


def write_overlay(path: str | Path, image: Image.Image, found: ImageTags, class_names: Sequence[str]) -> None:
    """`draw_overlay` as a picture file, atomically; the format goes by the suffix (.png, .jpg, .pdf, .svg)."""
    path = Path(path)
    figure = draw_overlay(image, found, class_names)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=80, format=path.suffix.lstrip("."))


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
    # Below the photo: nothing that was found may hide behind it.
    axis.legend(handles=legend, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, fontsize=7, frameon=False)
    axis.set_title(f"{len(tags)} tags" if len(tags) != 1 else "1 tag", fontsize=9)


def _draw_heat(axis: Axes, image: Image.Image, found: ImageTags, c: int, colour: Any, name: str) -> None:
    """The refined scores of one class over the greyed photo: yellow where the class was found, clear elsewhere."""
    scores = found.refined[..., c]
    low, high = float(scores.min()), float(scores.max())
    heat = (scores - low) / (high - low) if high > low else np.zeros_like(scores)
    axis.imshow(image.convert("L"), cmap="gray", vmin=-80, vmax=335)  # faint, to let the heat show
    axis.imshow(
        heat,
        cmap="inferno",
        alpha=0.85 * heat,
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


# --- label maps -------------------------------------------------------------------------------------


def voc_palette(num_colours: int = 256) -> np.ndarray:
    """The colours of PASCAL VOC's label images: [num_colours,3] uint8, black first.

    >>> voc_palette()[1].tolist(), voc_palette()[15].tolist()
    ([128, 0, 0], [192, 128, 128])
    """
    label = np.arange(num_colours)
    palette = np.zeros((num_colours, 3), np.uint8)
    for bit in range(8):  # three bits of the label go to the next lower bit of red, green and blue
        for channel in range(3):
            palette[:, channel] |= (((label >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return palette


def write_palette_mask(path: str | Path, labels: np.ndarray) -> None:
    """A label map [H,W], 0 to 255, as a PNG with VOC's palette: the pixel values are the labels."""
    from PIL import Image

    mask = Image.fromarray(labels.astype(np.uint8))
    mask.putpalette(voc_palette().ravel().tolist())
    with atomic_path(path) as temporary:
        mask.save(temporary, format="PNG")


def write_mask_overlay(path: str | Path, image: Image.Image, labels: np.ndarray, names: Sequence[str]) -> None:
    """The photo, and beside it the greyed photo under its label map with a legend. names: of label 0 and up."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    path, palette = Path(path), voc_palette() / 255
    height = 3.6 * min(max(image.height / image.width, 0.4), 2.5) + 0.5
    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.subplots(1, 2)
    axes[0].imshow(image)
    axes[1].imshow(image.convert("L"), cmap="gray", vmin=-80, vmax=335)  # colours are labels here
    for axis in axes:
        axis.axis("off")
    cover = np.concatenate([palette[labels], np.where(labels > 0, 0.7, 0.0)[..., None]], axis=-1)
    axes[1].imshow(cover, interpolation="nearest")
    present = [label for label in np.unique(labels) if label > 0]
    legend = [Patch(color=palette[label], label=names[label]) for label in present]
    if legend:
        axes[1].legend(
            handles=legend, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4, fontsize=7, frameon=False
        )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=80, format=path.suffix.lstrip("."))
