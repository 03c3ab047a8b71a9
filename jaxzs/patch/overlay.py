"""Pictures that show what was found where: boxes and heat maps of tags, coloured masks of label maps.

Names stand at the boxes and masks themselves. Colours are told apart by people who see all of them and by those who do
not (Okabe and Ito 2008), and by number beyond the first eight.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxzs.errors import LabelError
from jaxzs.files import atomic_path
from jaxzs.patch.images import ImageTags

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

_DPI = 150
_COLUMNS = 3
_PANELS = 6  # the photo, and the five best-scoring tags
_SIDE = 3.6  # inches of a panel's width
_OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#FFFFFF")


def colour_of(number: int) -> tuple[float, float, float]:
    """A colour that is told apart from the others: the first eight by everyone, later ones lighter or darker.

    >>> colour_of(0) == colour_of(8), [round(part, 2) for part in colour_of(4)]
    (False, [0.0, 0.45, 0.7])
    """
    base = _OKABE_ITO[number % len(_OKABE_ITO)]
    red, green, blue = (int(base[i : i + 2], 16) / 255 for i in (1, 3, 5))
    shade = (1.0, 0.6, 0.8, 0.45)[number // len(_OKABE_ITO) % 4]
    return red * shade, green * shade, blue * shade


def draw_overlay(image: Image.Image, found: ImageTags, class_names: Sequence[str]) -> Figure:
    """Figure of one image: named boxes of its best tags on the photo, then where each of them was seen.

    image: the PIL image that was tagged. class_names: the F foreground names. Tags are in the order of their scores;
    the five best are drawn, and the title says how many there are.
    """
    tags = [c for c in np.argsort(-found.scores) if found.tags[c]]
    shown = tags[: _PANELS - 1]
    axes = _panels(image, 1 + len(shown))
    colours = [colour_of(place) for place in range(len(shown))]
    draw_boxes(axes[0], image, found, shown, class_names)
    more = "" if len(shown) == len(tags) else f", the {len(shown)} best are shown"
    axes[0].set_title(f"{len(tags)} tag{'s' * (len(tags) != 1)}{more}", fontsize=9)
    for axis, c, colour in zip(axes[1:], shown, colours, strict=False):
        draw_heat(axis, image, found.refined[..., c])
        draw_box(axis, image, found.boxes[c], colour)
        axis.set_title(_wrapped(f"{class_names[c]}: {found.scores[c]:.2f}"), fontsize=9, parse_math=False)
    return axes[0].figure


def write_overlay(path: str | Path, image: Image.Image, found: ImageTags, class_names: Sequence[str]) -> None:
    """`draw_overlay` as a picture file, atomically; the format goes by the suffix (.png, .jpg, .pdf, .svg)."""
    _save(draw_overlay(image, found, class_names), path)


def _panels(image: Image.Image, number: int) -> np.ndarray:
    """Axes of a figure with so many panels of the image's shape, all in sight; those left over are empty."""
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, number)
    rows = math.ceil(number / columns)
    tall = _SIDE * min(max(image.height / image.width, 0.3), 2.5) + 0.5  # and a title
    figure = Figure(figsize=(_SIDE * columns, rows * tall), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    return axes


def _save(figure: Figure, path: str | Path) -> None:
    path = Path(path)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, format=path.suffix.lstrip("."))


def _wrapped(name: str) -> str:
    """A long name in lines of a panel's width."""
    return "\n".join(textwrap.wrap(name, 40)[:3])


def draw_boxes(
    axis: Axes, image: Image.Image, found: ImageTags, shown: Sequence[int], class_names: Sequence[str]
) -> None:
    """The photo with a named box for each of the classes `shown`; colours go by their order."""
    axis.imshow(image)
    names = _Names(axis, image)
    for place, c in enumerate(shown):
        draw_box(axis, image, found.boxes[c], colour_of(place))
    for place, c in enumerate(shown):  # above all boxes
        top, bottom, left, right = found.boxes[c] * np.repeat([image.height, image.width], 2)
        if bottom > top and right > left:
            names.draw(left, top, class_names[c], colour_of(place))


def draw_heat(axis: Axes, image: Image.Image, scores: np.ndarray) -> None:
    """Where one class was seen over the greyed photo, bright where its scores [rows,columns] are high."""
    low, high = float(scores.min()), float(scores.max())
    heat = (scores - low) / (high - low) if high > low else np.zeros_like(scores)
    axis.imshow(image.convert("L"), cmap="gray", vmin=-80, vmax=335)  # faint, to let the heat show
    axis.imshow(
        heat,
        cmap="viridis",
        alpha=0.85 * heat,
        extent=(-0.5, image.width - 0.5, image.height - 0.5, -0.5),
        interpolation="bilinear",
    )
    axis.set_xlim(-0.5, image.width - 0.5)
    axis.set_ylim(image.height - 0.5, -0.5)


def draw_box(axis: Axes, image: Image.Image, box: np.ndarray, colour: Any) -> None:
    """A box [4], in fractions of the image as in `ImageTags`, unless it is empty."""
    from matplotlib.patches import Rectangle

    top, bottom, left, right = box * np.repeat([image.height, image.width], 2)
    if bottom <= top or right <= left:
        return
    for width, edge in ((3.4, "black"), (1.8, colour)):  # a dark rim, to be seen on bright ground as well
        axis.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, ec=edge, lw=width))


class _Names:
    """Names on a picture, each on its colour, inside the picture and none over another."""

    def __init__(self, axis: Axes, image: Image.Image) -> None:
        self.axis, self.size = axis, (image.height, image.width)
        self.line = 0.05 * image.width  # what a line of text takes of a panel, in pixels
        self.taken: list[tuple[float, float]] = []

    def draw(self, x: float, y: float, name: str, colour: tuple[float, float, float]) -> None:
        """A name at a place, or a line or more below it where another one is."""
        height, width = self.size
        y = min(max(y, 0.0), height - self.line)
        while any(abs(y - other) < self.line and abs(x - at) < 0.35 * width for at, other in self.taken):
            y += self.line
        self.taken.append((x, y))
        light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 0.5
        self.axis.text(
            min(max(x, 0), width - 1),
            y,
            _short(name, 24),
            fontsize=7,
            color="black" if light else "white",
            ha="right" if x > 0.6 * width else "left",
            va="top",
            parse_math=False,  # a name between two dollar signs is no formula
            bbox={"facecolor": colour, "edgecolor": "black", "linewidth": 0.4, "pad": 1.2},
        )


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 3] + "..."


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
    """A label map [H,W], 0 to 255, as a PNG with VOC's palette: the pixel values are the labels.

    Raises `LabelError` for labels that a palette does not hold: as bytes, 256 would be the background.
    """
    from PIL import Image

    if labels.min() < 0 or labels.max() > 255:
        raise LabelError(f"labels are from {labels.min()} to {labels.max()}: a palette mask holds 0 to 255")
    mask = Image.fromarray(labels.astype(np.uint8))
    mask.putpalette(voc_palette().ravel().tolist())
    with atomic_path(path) as temporary:
        mask.save(temporary, format="PNG")


def write_mask_overlay(path: str | Path, image: Image.Image, labels: np.ndarray, names: Sequence[str]) -> None:
    """The photo, and beside it the greyed photo under its outlined label map, names in place. names: of label 0 and up.

    Every label is listed below, whatever its size; colours go by the order of labels in this image.
    """
    from matplotlib.patches import Patch

    axes = _panels(image, 2)
    axes[0].imshow(image)
    colours = draw_masks(axes[1], image, labels, names)
    if colours:
        handles = [Patch(fc=colours[label], ec="black", lw=0.4, label=_short(names[label], 28)) for label in colours]
        columns = 4
        figure = axes[0].figure
        figure.set_figheight(figure.get_figheight() + 0.22 * math.ceil(len(colours) / columns))
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=7, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    _save(axes[0].figure, path)


def draw_masks(
    axis: Axes, image: Image.Image, labels: np.ndarray, names: Sequence[str], first: Sequence[int] = ()
) -> dict[int, tuple[float, float, float]]:
    """The greyed photo under its outlined labels [H,W], the largest eight named in place; the colour of each label.

    first: labels that get the first colours, in this order; the others follow by number.
    """
    axis.imshow(image.convert("L"), cmap="gray", vmin=-80, vmax=335)  # colours are labels here
    sizes = {int(label): int((labels == label).sum()) for label in np.unique(labels) if label > 0}
    order = [*first, *(label for label in sizes if label not in first)]
    colours = {label: colour_of(order.index(label)) for label in sizes}
    cover = np.zeros((*labels.shape, 4), np.float32)
    for label, colour in colours.items():
        cover[labels == label] = (*colour, 0.6)
    axis.imshow(cover, interpolation="nearest")
    axis.imshow(_outlines(labels, max(1, round(max(labels.shape) / 300))), interpolation="nearest")
    in_place = _Names(axis, image)
    for label in sorted(sizes, key=sizes.__getitem__)[::-1][:8]:
        y, x = _inside(labels == label)
        in_place.draw(x, y, names[label], colours[label])
    return colours


def _outlines(labels: np.ndarray, width: int) -> np.ndarray:
    """Dark pixels where neighbours differ, `width` to each side: labels [H,W] -> [H,W,4] float32."""
    edge = np.zeros(labels.shape, bool)
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    for _ in range(width - 1):
        edge[1:] |= edge[:-1]
        edge[:, 1:] |= edge[:, :-1]
    return np.stack([np.zeros(labels.shape, np.float32)] * 3 + [0.9 * edge], axis=-1)


def _inside(mask: np.ndarray) -> tuple[float, float]:
    """A row and column of a mask [H,W] well inside of it: the middle of the middle one of its longest rows."""
    lengths = mask.sum(1)
    longest = np.flatnonzero(lengths == lengths.max())
    row = int(longest[len(longest) // 2])
    columns = np.flatnonzero(mask[row])
    return float(row), float(columns[len(columns) // 2])
