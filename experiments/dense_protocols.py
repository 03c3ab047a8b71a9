"""The published protocols of masks without tags, and how their data sets lie on disk (as MMSegmentation has them).

Names, sizes and thresholds are those of the configurations in wangf3014/SCLIP and sinahmr/NACLIP. What is done
otherwise: photos are resized by PIL's bicubic filter to whole patches instead of bilinearly to any number of pixels,
so that windows begin at patches; SCLIP's other scales of the softmax and its smallest area of a class are left out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import jaxzs
from jaxzs.clip import Numerics
from jaxzs.clip.model import resize_weights
from jaxzs.data import DatasetInfo, dataset_info, open_image, template_set
from jaxzs.errors import DataError, LabelError
from jaxzs.files import cache_folder
from jaxzs.patch import Batching, Dense, segment_dense, tag_texts
from jaxzs.patch.windows import DenseMask, decided

Pair = tuple[Path, Path]  # a photo and its label image
VOID = 255
METHODS = {  # last layer of each paper
    "NACLIP": Dense(attention="naclip"),
    "SCLIP": Dense(attention="csa"),
    "ClearCLIP": Dense(attention="qq"),
    "MaskCLIP": Dense(attention="v"),
}
# mcordts/cityscapesScripts, helpers/labels.py: the id of each of the 19 classes.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a data set is evaluated.

    names: in `jaxzs.data`, and under which variant. images: of the published list, where its number is known. pairs:
    photos and label images below the data set's folder. truth: what the numbers of a label image mean, [256]: labels,
    255 where nothing is known, -1 what does not occur. background: whether label 0 is background. threshold: what is
    less probable is background.
    """

    names: str
    images: int | None
    pairs: Callable[[Path], list[Pair]]
    truth: Callable[[Path], np.ndarray]
    background: bool = False
    threshold: float = 0.0
    short_side: int = 336
    variant: str | None = None

    def info(self) -> DatasetInfo:
        """Class names."""
        info = dataset_info(self.names)
        return info.renamed(self.variant) if self.variant else info

    def settings(self, method: str) -> Dense:
        """Of a paper on this data set."""
        return dataclasses.replace(
            METHODS[method], short_side=self.short_side, threshold=self.threshold, background=self.background
        )

    def dense_names(self) -> list[tuple[str, int]]:
        """Names and their classes; those of the background only where there is one."""
        return [(name, c) for name, c in self.info().dense_names if c >= 0 or self.background]


# --- on disk ------------------------------------------------------------------------------------------------


def listed_pairs(split: str, labels: str, root: Path) -> list[Pair]:
    """VOC's layout: a list of names, JPEGImages, and a folder of label images."""
    file = root / "ImageSets" / split / "val.txt"
    try:
        names = file.read_text(encoding="utf-8").split()
    except OSError as error:
        raise DataError(f"cannot read the list of images {file}: {error.strerror}") from error
    return [(root / "JPEGImages" / f"{name}.jpg", root / labels / f"{name}.png") for name in names]


def beside(photos: str, labels: str, endings: tuple[str, Sequence[str]], root: Path) -> list[Pair]:
    """Two trees of folders alike. endings: of photos; of label images, the first that is there counts."""
    of_photo, of_labels = endings
    found = []
    for photo in sorted((root / photos).rglob(f"*{of_photo}")):
        stem = photo.relative_to(root / photos).as_posix().removesuffix(of_photo)
        possible = [root / labels / f"{stem}{ending}" for ending in of_labels]
        found.append((photo, next((path for path in possible if path.exists()), possible[0])))
    if not found:
        raise DataError(f"no {of_photo} below {root / photos}")
    return found


COCO = "images/val2017", "annotations/val2017"
VOC = functools.partial(listed_pairs, "Segmentation", "SegmentationClass")
CONTEXT = functools.partial(listed_pairs, "SegmentationContext", "SegmentationClassContext")
ADE = functools.partial(beside, "images/validation", "annotations/validation", (".jpg", (".png",)))
CITY = functools.partial(
    beside, "leftImg8bit/val", "gtFine/val", ("_leftImg8bit.png", ("_gtFine_labelTrainIds.png", "_gtFine_labelIds.png"))
)
STUFF = functools.partial(beside, *COCO, (".jpg", ("_labelTrainIds.png", ".png")))
OBJECT = functools.partial(beside, *COCO, (".jpg", ("_instanceTrainIds.png", ".png")))


def counted(num: int, first: int = 0) -> np.ndarray:
    """So many labels, counted from `first`; nothing is known of what is below, and of 255; -1 elsewhere: [256]."""
    table = np.full(256, -1)
    table[:first] = table[VOID] = VOID
    table[first : first + num] = np.arange(num)
    return table


def placed(ids: Sequence[int]) -> np.ndarray:
    """The label of each id is its place; nothing is known of others: [256]."""
    table = np.full(256, VOID)
    table[list(ids)] = np.arange(len(ids))
    return table


def stuff_truth(path: Path) -> np.ndarray:
    """COCO-Stuff's 171 classes: numbered as such, or by the 182 original ids."""
    if path.name.endswith("_labelTrainIds.png"):
        return counted(171)
    ids = dataset_info("coco_stuff").label_ids
    assert ids is not None
    return placed(ids)


def object_truth(path: Path) -> np.ndarray:
    """The 80 things of COCO-Stuff; stuff is background, and so is what is unlabelled (as in cvt_coco_object.py)."""
    if path.name.endswith("_instanceTrainIds.png"):
        return counted(81)
    things = placed((dataset_info("coco_stuff").label_ids or ())[:80])  # [256]
    return np.where(things == VOID, 0, things + 1)


def city_truth(path: Path) -> np.ndarray:
    """The 19 classes of Cityscapes: numbered as such, or by the original ids."""
    return counted(19) if path.name.endswith("_labelTrainIds.png") else placed(CITYSCAPES_IDS)


def every(table: np.ndarray) -> Callable[[Path], np.ndarray]:
    return lambda path: table


PROTOCOLS = {
    "voc21": Protocol("voc21", 1449, VOC, every(counted(21)), background=True, threshold=0.1),
    "voc20": Protocol("voc21", 1449, VOC, every(counted(20, first=1))),
    "context60": Protocol("pascal_context", None, CONTEXT, every(counted(60)), background=True, threshold=0.1),
    "context59": Protocol("pascal_context", None, CONTEXT, every(counted(59, first=1))),
    "coco_object": Protocol("coco_object", 5000, OBJECT, object_truth, background=True, threshold=0.1),
    "coco_stuff171": Protocol("coco_stuff", 5000, STUFF, stuff_truth, short_side=448, variant="sclip"),
    "ade20k": Protocol("ade20k", 2000, ADE, every(counted(150, first=1))),
    "cityscapes": Protocol("cityscapes", 500, CITY, city_truth, short_side=560),
}


def read_truth(protocol: Protocol, path: Path, size: tuple[int, int]) -> np.ndarray:
    """Labels of a label image [H,W], 255 where nothing is known. Raises `DataError` naming the file."""
    try:
        with Image.open(path) as image:
            numbers = np.asarray(image)
    except OSError as error:
        raise DataError(f"cannot read the label image {path}: {error}") from error
    if numbers.shape != size or numbers.dtype != np.uint8:
        raise DataError(f"{path} is {numbers.dtype} of shape {numbers.shape}, expected one byte a pixel, {size}")
    labels = protocol.truth(path)[numbers]
    if (labels < 0).any():
        raise LabelError(f"{path} holds the number {numbers[labels < 0][0]}, which no class of {protocol.names} has")
    return labels


# --- masks --------------------------------------------------------------------------------------------------


def dense_masks(
    model: jaxzs.Model,
    protocol: Protocol,
    method: str,
    photos: Sequence[Path],
    *,
    batch: int,
    pamr: int,
    bfloat16: bool,
) -> Iterator[np.ndarray]:
    """Label maps of photos, in order; pamr: steps of refinement along the photo's colours, 0 for none."""
    names, settings = protocol.dense_names(), protocol.settings(method)
    texts = tag_texts(
        model,
        [name for name, _ in names],
        templates=template_set("imagenet80"),  # of SCLIP and all that follow it
        distinct=False,  # COCO-Object calls a class and a background "bed"
        cache=cache_folder(),
    )
    classes = [c for _, c in names]
    masks = segment_dense(
        model,
        map(open_image, photos),
        texts,
        settings,
        classes=classes,
        batching=Batching(batch),
        numerics=Numerics(jnp.bfloat16 if bfloat16 else None),
    )
    for mask in masks:
        if pamr:
            photo = np.asarray(open_image(photos[mask.number]).convert("RGB"))
            yield refined_labels(mask, photo, np.asarray(classes), settings, pamr)
        else:
            yield mask.labels


def refined_labels(mask: DenseMask, photo: np.ndarray, classes: np.ndarray, settings: Dense, steps: int) -> np.ndarray:
    """Labels [H,W] of scores that were enlarged to the photo and refined along its colours."""
    down, across = (
        resize_weights(old, new, "bilinear") for old, new in zip(mask.scores.shape[:2], photo.shape[:2], strict=True)
    )
    at_pixels = np.einsum("yr,rcn,xc->nyx", down, mask.scores, across, optimize=True).astype(np.float32)  # [N,H,W]
    return decided(np.moveaxis(np.asarray(pamr(photo, at_pixels, steps=steps)), 0, -1), classes, settings)


NEIGHBOURS = tuple((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0))
DILATIONS = (8, 16)  # as NACLIP has them


@functools.partial(jax.jit, static_argnames="steps")
def pamr(photo: Any, maps: Any, *, steps: int) -> jax.Array:
    """Pixel-adaptive refinement (Araslanov and Roth, CVPR 2020): photo [H,W,3] of 0 to 255, maps [N,H,W] -> [N,H,W].

    Every pixel becomes the mean of its neighbours 8 and 16 pixels away, weighted by how alike they look.
    """
    spread = jnp.asarray([68.501, 66.632, 70.323], jnp.float32)[:, None, None]
    x = jnp.moveaxis(photo, -1, 0).astype(jnp.float32) / spread  # [3,H,W]; the mean cancels in differences
    away = [(d * y, d * x) for d in DILATIONS for y, x in NEIGHBOURS]
    looks = jnp.stack([shifted(x, step) for step in away])  # [16,3,H,W]
    # The pixel itself is counted once a dilation, as the original does.
    with_itself = jnp.concatenate([looks, jnp.broadcast_to(x, (len(DILATIONS), *x.shape))])
    deviation = with_itself.std(0, ddof=1)  # [3,H,W]
    weights = jax.nn.softmax((-jnp.abs(x[None] - looks) / (1e-8 + 0.1 * deviation[None])).mean(1), axis=0)  # [16,H,W]

    def step(maps: jax.Array, _: None) -> tuple[jax.Array, None]:
        gathered = jnp.zeros_like(maps)
        for where, weight in zip(away, weights, strict=True):
            gathered = gathered + weight[None] * shifted(maps, where)  # [N,H,W]
        return gathered, None

    return jax.lax.scan(step, jnp.asarray(maps), length=steps)[0]


def shifted(x: jax.Array, step: tuple[int, int]) -> jax.Array:
    """What lies (down, right) of each pixel, the outermost where that is outside: [...,H,W] -> [...,H,W]."""
    for axis, by in zip((-2, -1), step, strict=True):
        size = x.shape[axis]
        x = jnp.take(x, np.clip(np.arange(size) + by, 0, size - 1), axis=axis)
    return x
