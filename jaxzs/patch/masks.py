"""Label maps for images of any size: tags given or found, segmented batch by batch, sharpened by the CRF."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.clip import Model
from jaxzs.errors import DataError, ImageError
from jaxzs.patch.batching import DEFAULT_BATCHING, Batching, Stack, stacks
from jaxzs.patch.crf import clip_es_colours, dense_crf
from jaxzs.patch.segmentation import enlarge, label_map, segment


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
      on_error: told the number of each image that cannot be used, which is left out; by default it raises.
      options: of `jaxzs.patch.segment`.

    Yields:
      `ImageMask`; `number` says of which image.

    Raises:
      ImageError: an image that cannot be used. DataError: several scales, or images without tags and background.
    """
    if batching.scales != (1.0,):
        raise DataError(f"scales are {batching.scales}: segmentation takes images at one, 1.0")
    exact = bool(options.get("exact"))
    texts, others = jnp.asarray(text_features), jnp.asarray(background_features)
    for stack in stacks(model, images, batching, padded=not exact, on_error=on_error):
        of_images = [np.asarray(tags[piece.number], np.int32) for piece in stack.pieces]
        padded = _padded_tags(of_images, len(stack.pixels))
        found: Any = jax.device_get(
            segment(
                model.params,
                stack.pixels,
                texts,
                others,
                padded,
                model.config,
                mask=stack.mask,
                **options,
            )
        )
        for row, own in enumerate(of_images):
            rows, columns = stack.grids[row]
            maps, activation = (
                part[row, : len(own), :rows, :columns] for part in (found.maps, found.activation)
            )
            labels = _labels(stack, row, maps, own, background, crf, exact)
            yield ImageMask(stack.pieces[row].number, own, labels, maps, activation)


def _padded_tags(tags: Sequence[np.ndarray], num_images: int) -> np.ndarray:
    """Tags of all images, filled up with -1 to a power of two, so that few shapes are compiled: [B,K] int32."""
    most = max(1, *(len(own) for own in tags))
    padded = np.full((num_images, 1 << (most - 1).bit_length()), -1, np.int32)
    for row, own in enumerate(tags):
        padded[row, : len(own)] = own
    return padded


def _labels(
    stack: Stack,
    row: int,
    maps: np.ndarray,
    tags: np.ndarray,
    background: bool,
    crf: Mapping[str, Any] | None,
    exact: bool,
) -> np.ndarray:
    """Labels of one image at its own size."""
    piece = stack.pieces[row]
    large = enlarge(maps, *piece.size)
    if crf is None or len(tags) == 0:
        return label_map(large, tags, background=background)
    scores = large.astype(np.float32)
    if background:
        scores = np.concatenate([1 - scores.max(0, keepdims=True), scores])
    photo = np.asarray(piece.image)
    best = np.asarray(dense_crf(scores, clip_es_colours(photo) if exact else photo, **crf)).argmax(
        0
    )
    names = np.concatenate([[0], tags + 1]) if background else tags
    return names.astype(np.int32)[best]
