"""Why re-identification (CWR) helps or hurts on rendered scenes: what is in its crops, and other crops beside them.

Part of `experiments/patch_demo.py`. A class is looked at a second time in the box around everything above half of its
range, stretched to the size that the checkpoint was trained with. Here the same second looks are taken through other
boxes: around the best patch's own piece alone, with its surroundings so that nothing is enlarged, and around the truth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

import jaxzs
from experiments.demo_world import Scenes
from experiments.demo_world.captions import SHAPES
from jaxzs import patch, report
from jaxzs.patch.metrics import mean_average_precision
from jaxzs.patch.reidentify import Candidates, best_scores

Boxes = np.ndarray  # [4] top, bottom, left, right in patches


class Looks(NamedTuple):
    """Second looks at some scenes through boxes of one kind. probability: [N,F], of each class in its crop.
    boxes: [N,F,4] in patches. accepted: [N,F], where there was a second look."""

    probability: np.ndarray
    boxes: np.ndarray
    accepted: np.ndarray


def around(inside: np.ndarray) -> Boxes:
    """The tight box of a region [rows,columns]."""
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return np.array([rows[0], rows[-1] + 1, columns[0], columns[-1] + 1])


def with_context(box: Boxes, grid: tuple[int, int], native: int) -> Boxes:
    """The box grown to a square of `native` patches at least, moved into the picture: nothing is enlarged."""
    grown = box.copy()
    side = max(native, box[1] - box[0], box[3] - box[2])
    for first, length in ((0, grid[0]), (2, grid[1])):
        own = min(side, length)
        start = (box[first] + box[first + 1] - own) // 2
        grown[first] = min(max(start, 0), length - own)
        grown[first + 1] = grown[first] + own
    return grown


def best_piece(region: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Of a region [rows,columns] the connected piece that holds its best patch."""
    pieces, _ = ndimage.label(region, np.ones((3, 3)))
    return pieces == pieces.flat[np.where(region, scores, -np.inf).argmax()]


def ways(native: int) -> dict[str, Callable[..., tuple[np.ndarray, Boxes]]]:
    """Kinds of crops: (region, scores, truth [rows,columns], box) -> what the class token sees, and the box."""
    grown = lambda box, region: with_context(box, region.shape, native)  # noqa: E731

    def piece(region, scores, truth, box):
        own = best_piece(region, scores)
        return own, around(own)

    def piece_in_context(region, scores, truth, box):
        own = best_piece(region, scores)
        return own, grown(around(own), region)

    def true_object(region, scores, truth, box):
        own = truth if truth.any() else best_piece(region, scores)
        return own, grown(around(own), region)

    return {
        "the paper: all above half, stretched": lambda region, scores, truth, box: (region, box),
        "the same, never enlarged": lambda region, scores, truth, box: (region, grown(box, region)),
        "its best piece, stretched": piece,
        "its best piece, never enlarged": piece_in_context,
        "the true object (where there), never enlarged": true_object,
    }


@dataclasses.dataclass
class Scored:
    """Scenes with their refined scores [N,P,C] and candidates, ready for second looks."""

    model: jaxzs.Model
    world: Scenes
    texts: jax.Array
    refined: np.ndarray
    candidates: Candidates

    @classmethod
    def of(cls, model: jaxzs.Model, world: Scenes, texts: jax.Array, found: list[Any]) -> Scored:
        refined = np.stack([tagged.refined for tagged in found])  # [N,rows,columns,C]
        N, rows, columns, C = refined.shape
        grid = patch.full_grid(N, rows, columns)
        candidates = patch.find_candidates(jnp.asarray(refined.reshape(N, -1, C)), len(SHAPES), 0.5, grid)
        return cls(model, world, texts, refined, jax.device_get(candidates))

    @property
    def best(self) -> np.ndarray:
        """Scores before second looks: [N,F]."""
        N, rows, columns, C = self.refined.shape
        grid = patch.full_grid(N, rows, columns)
        return np.asarray(best_scores(jnp.asarray(self.refined.reshape(N, -1, C)), len(SHAPES), grid))

    def truth(self, image: int, label: int) -> np.ndarray:
        """Patches at least half of which are of a shape, or its best ones where none is: [rows,columns] bool."""
        size = self.model.config.vision.patch_size
        rows, columns = self.refined.shape[1:3]
        mask = (self.world.masks[image] == 1 + label).reshape(rows, size, columns, size).mean((1, 3))
        return mask >= min(0.5, mask.max()) if mask.any() else mask > 0

    def look(self, way: Callable[..., tuple[np.ndarray, Boxes]]) -> Looks:
        """Second looks through boxes of a kind."""
        boxes, region = self.candidates.boxes.copy(), self.candidates.region.copy()
        for image, label in np.argwhere(self.candidates.accepted):
            own = region[image, label], self.refined[image, ..., label], self.truth(image, label)
            region[image, label], boxes[image, label] = way(*own, boxes[image, label])
        model, candidates = self.model, self.candidates._replace(boxes=boxes, region=region)
        pixels = jnp.asarray(model.preprocessor.normalize(self.world.images))
        run = jax.jit(patch.reidentify, static_argnames=("config", "capacity"))
        found = run(model.params, pixels, self.texts, jax.tree.map(jnp.asarray, candidates), model.config, capacity=32)
        return Looks(np.asarray(found), boxes, self.candidates.accepted)

    def objects_in(self, image: int, box: Boxes) -> int:
        """Shapes with at least a tenth of their pixels in a box."""
        size = self.model.config.vision.patch_size
        mask = self.world.masks[image]
        top, bottom, left, right = box * size
        inside, whole = (np.bincount(part.ravel(), minlength=256)[1:] for part in (mask[top:bottom, left:right], mask))
        return int((inside > 0.1 * np.maximum(whole, 1)).sum())


def enlargement(boxes: np.ndarray, native: int) -> np.ndarray:
    """By how much crops are enlarged, geometric mean of both directions: [...,4] -> [...]."""
    rows, columns = boxes[..., 1] - boxes[..., 0], boxes[..., 3] - boxes[..., 2]
    return native / np.sqrt(np.maximum(rows * columns, 1))


def figures_of(scored: Scored, looks: Looks, chosen: np.ndarray) -> dict[str, Any]:
    """Of second looks that are chosen [N,F] bool: how many, how large, and whether they tell true from false."""
    there, p = scored.world.tags[chosen], looks.probability[chosen]
    true, false = p[there], p[~there]
    native, where = scored.model.config.vision.grid[0], np.argwhere(chosen)

    def mean(values: Any) -> float | None:
        return float(np.mean(values)) if np.size(values) else None

    return {
        "looks": len(where),
        "true": mean(there),
        "enlarged": float(np.median(enlargement(looks.boxes[chosen], native))) if len(where) else None,
        "objects": mean([scored.objects_in(i, looks.boxes[i, c]) for i, c in where]),
        "p_true": mean(true),
        "p_false": mean(false),
        "true_above_false": mean(true[:, None] > false[None]),
    }


SIDES = {  # by how much crops are enlarged
    "of the paper, shrunk below 3/4": (0, 0.75),
    "of the paper, 3/4 to 4/3": (0.75, 1.34),
    "of the paper, enlarged by over 4/3": (1.34, 99),
}


def explained(model: jaxzs.Model, world: Scenes, texts: jax.Array, found: list[Any]) -> dict[str, dict[str, Any]]:
    """mAP with each kind of crops, and what the paper's crops tell, by how much they are enlarged."""
    scored, native = Scored.of(model, world, texts, found), model.config.vision.grid[0]
    best, rows = scored.best, {}
    rows["no second look"] = {"mAP": mean_average_precision(best, world.tags)}
    for name, way in ways(native).items():
        looks = scored.look(way)
        scores = np.where(looks.accepted, 0.5 * (best + looks.probability), best)
        rows[name] = {"mAP": mean_average_precision(scores, world.tags), **figures_of(scored, looks, looks.accepted)}
        if "paper" in name:
            by = enlargement(looks.boxes, native)
            for side, (least, most) in SIDES.items():
                chosen = looks.accepted & (by >= least) & (by < most)
                # A class that is looked at again is averaged with what it looks like; the others keep their scores.
                only = np.where(chosen, 0.5 * (best + looks.probability), best)
                rows[f"only those {side}"] = {
                    "mAP": mean_average_precision(only, world.tags),
                    **figures_of(scored, looks, chosen),
                }
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Of `explained`."""
    header = ["second looks", "mAP, %", "looks", "enlarged", "objects", "p, true", "p, false", "true above false, %"]

    def shown(row: dict[str, Any], key: str, digits: int, times: float = 1) -> str:
        return "" if row.get(key) is None else f"{times * row[key]:.{digits}f}"

    columns = ("mAP", 1, 100), ("looks", 0), ("enlarged", 2), ("objects", 1), ("p_true", 2), ("p_false", 2)
    columns = (*columns, ("true_above_false", 0, 100))
    cells = [[name, *(shown(row, *column) for column in columns)] for name, row in rows.items()]
    return report.markdown_table(header, cells)
