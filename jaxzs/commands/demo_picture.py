"""The picture of `jaxzs demo`: what changed, by how much, and where things are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxzs.commands.demo import Classified, Masked, Tagged
    from jaxzs.data.samples import SceneSamples

_GREEN, _RED, _GREY = "#1a7f37", "#c62828", "#757575"
_COLOURS = ("#b0b7bf", "#2f6db5", "#e08a1e")  # of the methods
_ROWS, _COLUMNS = 3, 12  # of things
_SCENES, _HEATS = 3, 3  # scenes shown, heat maps of each


def draw(
    path: Path,
    images: np.ndarray,
    scenes: SceneSamples,
    *,
    things: Classified,
    digits: Classified,
    tags: Tagged,
    masks: Masked,
) -> None:
    """Write the picture, atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from jaxzs.files import atomic_path

    figure = Figure(figsize=(12, 14.2), layout="constrained")
    FigureCanvasAgg(figure)  # it attaches itself to the figure
    parts: Any = figure.subfigures(3, 1, height_ratios=(3.9, 2.1, 8.2))
    _things(parts[0], images, things)
    _bars(parts[1], things, digits)
    _scenes(parts[2], scenes, tags, masks)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _things(part: Any, images: np.ndarray, things: Classified) -> None:
    """Pictures whose label changed, with the label before and after."""
    before, after = things.predicted["zero-shot"], things.predicted["adapted"]
    changed = np.flatnonzero(before != after)
    shown = np.random.default_rng(0).permutation(changed)[: _ROWS * _COLUMNS]
    first, last = things.accuracy["zero-shot"], things.accuracy["adapted"]
    part.suptitle(
        f"{first:.1f} % \N{RIGHTWARDS ARROW} {last:.1f} % right, without a label", fontsize=18, fontweight="bold"
    )
    axes: Any = part.subplots(_ROWS, _COLUMNS)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, index in zip(axes.flat, shown, strict=False):  # fewer may have changed
        axis.imshow(images[index], interpolation="bicubic")
        right, lost = after[index] == things.labels[index], before[index] == things.labels[index]
        colour = _GREEN if right else _RED if lost else _GREY
        names = things.names[before[index]], things.names[after[index]]
        axis.set_title(f"{names[0]}\n\N{RIGHTWARDS ARROW} {names[1]}", color=colour, fontsize=7.5, pad=2)
    part.supxlabel(
        f"pictures by an artist whom the model never saw, zero-shot label \N{RIGHTWARDS ARROW} label adapted to them; "
        f"{len(shown)} of the {len(changed)} that changed. green: now right, red: now wrong, grey: wrong both times",
        fontsize=8,
    )


def _bars(part: Any, things: Classified, digits: Classified) -> None:
    """Accuracy of each method on both sets, the number on its bar."""
    axis: Any = part.subplots()
    methods = list(things.accuracy)
    for place, (method, colour) in enumerate(zip(methods, _COLOURS, strict=True)):
        at = np.arange(2) + 0.27 * (place - 1)
        bars = axis.barh(
            at, [one.accuracy[method] for one in (things, digits)], height=0.25, color=colour, label=method
        )
        axis.bar_label(bars, fmt="%.1f %%", padding=3, fontsize=9)
    axis.set(yticks=[0, 1], yticklabels=["100 things by an\nunseen artist", "scanned digits"], xlim=(0, 109))
    axis.set_xlabel("accuracy, %", fontsize=9)
    axis.invert_yaxis()
    axis.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def _scenes(part: Any, scenes: SceneSamples, tags: Tagged, masks: Masked) -> None:
    """Some scenes: named boxes, heat maps of the best tags, masks."""
    from PIL import Image

    from jaxzs.patch.overlay import colour_of, draw_box, draw_boxes, draw_heat, draw_masks

    first, last = (figure.value for figure in tags.figures)
    part.suptitle(
        f"Every thing in a scene: {first:.1f} % \N{RIGHTWARDS ARROW} {last:.1f} % mAP with TagCLIP; "
        f"masks from the tags found: {masks.figures[0].value:.1f} % mIoU",
        fontsize=13,
        fontweight="bold",
    )
    axes: Any = part.subplots(_SCENES, 2 + _HEATS)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, (found, labels) in enumerate(zip(tags.found[:_SCENES], masks.labels, strict=False)):
        photo = Image.fromarray(scenes.images[row])
        best = [int(c) for c in np.argsort(-found.scores) if found.tags[c]]
        draw_boxes(axes[row, 0], photo, found, best[:5], scenes.names)
        true = ", ".join(scenes.names[c] for c in np.flatnonzero(scenes.tags[row]))
        axes[row, 0].set_title(f"truly: {true}", fontsize=7.5)
        for place, c in enumerate(best[:_HEATS]):
            axis = axes[row, 1 + place]
            draw_heat(axis, photo, found.refined[..., c])
            draw_box(axis, photo, found.boxes[c], colour_of(place))
            axis.set_title(
                f"{scenes.names[c]} {found.scores[c]:.2f}", fontsize=9, color=_GREEN if scenes.tags[row, c] else _RED
            )
        draw_masks(axes[row, -1], photo, labels, ("background", *scenes.names), first=[c + 1 for c in best])
        axes[row, -1].set_title("masks", fontsize=9)
