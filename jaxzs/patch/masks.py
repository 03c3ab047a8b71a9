"""Label maps for images of any size: tags given or found, segmented batch by batch, sharpened by the CRF."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxzs import parallel
from jaxzs.clip import Model
from jaxzs.clip.preprocess import to_rgb
from jaxzs.errors import DataError, ImageError
from jaxzs.patch.batching import DEFAULT_BATCHING, Batching, stacks
from jaxzs.patch.crf import clip_es_colours, dense_crf
from jaxzs.patch.images import ImageTags
from jaxzs.patch.segmentation import Segmentation, check_tags, enlarge, label_map, segment


class ImageMask(NamedTuple):
    """Segmentation of one image.

    number: its place among the images given. tags: K class numbers. labels: [height,width] int32, 0 background and
    c + 1 class c (without a background: c). maps: [K,rows,columns] 0 to 1, on the grid of patches.
    activation: the same before the affinity.
    """

    number: int
    tags: np.ndarray
    labels: np.ndarray
    maps: np.ndarray
    activation: np.ndarray


def segment_images(
    model: Model,
    images: Iterable[Any],
    tags: Sequence[Sequence[int]] | Mapping[int, Sequence[int]],
    text_features: jax.Array | np.ndarray,
    background_features: jax.Array | np.ndarray,
    *,
    background: bool = True,
    crf: Mapping[str, Any] | None = None,
    batching: Batching = DEFAULT_BATCHING,
    mesh: Mesh | None = None,
    on_error: Callable[[int, ImageError], None] | None = None,
    **options: Any,
) -> Iterator[ImageMask]:
    """Label maps of many images of any sizes, whose tags are known.

    Args:
      model: a loaded checkpoint.
      images: PIL images or uint8 arrays, read lazily.
      tags: class numbers of each image, by its number; an image without any is all background.
      text_features: [C,E]. background_features: [M,E].
      background: whether label 0 is background (VOC, COCO), or every pixel belongs to a tag (COCO-Stuff).
      crf: None, or options of `dense_crf` to sharpen the maps with, {} for the published ones. Quadratic in the
        pixels: on a CPU give a stride, e.g. {"stride": 8}.
      batching: sizes of batches and padding; one scale. With `exact=True` among the options nothing is padded.
      mesh: devices to divide each batch over; every device works on its own images. Default: one device. The CRF runs
        image by image.
      on_error: told the number of each image that cannot be used, which is left out; by default it raises.
      options: of `jaxzs.patch.segment`.

    Yields:
      `ImageMask`; `number` says of which image.

    Raises:
      ImageError: an image that cannot be used. DataError: several scales, or images without tags and background.

    >>> model = jaxzs.load("demo")
    >>> image = np.full((96, 96, 3), 40, np.uint8)
    >>> image[20:60, 30:70] = (220, 40, 40)
    >>> texts = patch.tag_texts(model, ["red square", "blue circle"], templates=["a picture of a {}."])
    >>> others = zeroshot.text_proxies(model, ["ground", "wall"])
    >>> [mask] = patch.segment_images(model, [image], {0: [0]}, texts, others)
    >>> mask.labels.shape, np.unique(mask.labels).tolist()
    ((96, 96), [0, 1])
    """
    if batching.scales != (1.0,):
        raise DataError(f"scales are {batching.scales}: segmentation takes images at one, 1.0")
    exact = bool(options.get("exact"))
    texts, others = jnp.asarray(text_features), jnp.asarray(background_features)
    run = _program(model, texts, others, mesh, options)
    for stack in stacks(
        model, images, batching, padded=not exact, multiple=1 if mesh is None else mesh.size, on_error=on_error
    ):
        of_images = [np.asarray(tags[piece.number], np.int32) for piece in stack.pieces]
        padded = _padded_tags(of_images, len(stack.pixels))
        check_tags(padded, len(padded), len(texts))
        found: Any = jax.device_get(run(stack.pixels, padded, stack.mask))
        for row, own in enumerate(of_images):
            rows, columns = stack.grids[row]
            maps, activation = (part[row, : len(own), :rows, :columns] for part in (found.maps, found.activation))
            labels = pixel_labels(stack.pieces[row].image, maps, own, background=background, crf=crf, exact=exact)
            yield ImageMask(stack.pieces[row].number, own, labels, maps, activation)


def _program(
    model: Model,
    text_features: jax.Array,
    background_features: jax.Array,
    mesh: Mesh | None,
    options: Mapping[str, Any],
) -> Callable[[np.ndarray, np.ndarray, np.ndarray], Segmentation]:
    """`segment` as a function of pixels, tags and mask, divided over the mesh where there is one."""

    def run(shared: Any, pixels: Any, tags: Any, mask: Any) -> Segmentation:
        params, texts, others = shared
        return segment(params, pixels, texts, others, tags, model.config, mask=mask, **options)

    shared = model.params, text_features, background_features
    if mesh is None:
        return functools.partial(run, shared)
    return functools.partial(parallel.map_rows(run, mesh), parallel.replicate(shared, mesh))


def _padded_tags(tags: Sequence[np.ndarray], num_images: int) -> np.ndarray:
    """Tags of all images, filled up with -1 to a power of two, so that few shapes are compiled: [B,K] int32."""
    most = max(1, *(len(own) for own in tags))
    padded = np.full((num_images, 1 << (most - 1).bit_length()), -1, np.int32)
    for row, own in enumerate(tags):
        padded[row, : len(own)] = own
    return padded


def score_maps(tagged: ImageTags, tags: Sequence[int] | np.ndarray) -> np.ndarray:
    """Maps of tags by their patch scores instead of activation maps: [K,rows,columns], each from 0 to 1.

    Not in the paper. Refined scores say where a class is without a gradient, which suits models whose patches were
    trained, as the demo checkpoint's were; CLIP's own gain from `segment_images`.

    >>> model = jaxzs.load("demo")
    >>> image = np.full((96, 96, 3), 40, np.uint8)
    >>> image[20:60, 30:70] = (220, 40, 40)
    >>> texts = patch.tag_texts(model, ["red square", "blue circle"], templates=["a picture of a {}."])
    >>> [found] = patch.tag_images(model, [image], texts, num_foreground=2)
    >>> maps = patch.score_maps(found, [0])
    >>> maps.shape, float(maps.min()), float(maps.max())
    ((1, 12, 12), 0.0, 1.0)
    """
    scores = np.moveaxis(tagged.refined, -1, 0)[np.asarray(tags, int)]
    shifted = scores - scores.min((1, 2), keepdims=True)
    return shifted / np.maximum(shifted.max((1, 2), keepdims=True), 1e-7)


def pixel_labels(
    image: Any,
    maps: np.ndarray,
    tags: Sequence[int] | np.ndarray,
    *,
    background: bool = True,
    crf: Mapping[str, Any] | None = None,
    exact: bool = False,
) -> np.ndarray:
    """Labels of one image at its own size, [height,width] int32: maps [K,rows,columns] of its K tags.

    image: PIL image or array. background, crf: as in `segment_images`. exact: give the CRF the colours that the
    original gives it, wrapped around.

    Raises what `dense_crf` raises, and `DataError` for no tags without a background.

    >>> image, maps = np.zeros((2, 8, 3), np.uint8), np.array([[[1.0, 0.0]]])
    >>> patch.pixel_labels(image, maps, [3])[0].tolist()
    [4, 4, 4, 4, 0, 0, 0, 0]
    """
    photo, tags = np.asarray(to_rgb(image)), np.asarray(tags, np.int32)
    large = enlarge(maps, *photo.shape[:2])
    if crf is None or len(tags) == 0:
        return label_map(large, tags, background=background)
    scores = large.astype(np.float32)
    if background:
        scores = np.concatenate([1 - scores.max(0, keepdims=True), scores])
    colours = clip_es_colours(photo) if exact else photo
    best = np.asarray(dense_crf(scores, colours, **crf)).argmax(0)
    return (np.concatenate([[0], tags + 1]) if background else tags).astype(np.int32)[best]
