"""Label maps for images of any size: tags given or found, segmented batch by batch, sharpened by the CRF."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.clip import Model
from jaxzs.clip.preprocess import to_rgb
from jaxzs.errors import DataError, ImageError
from jaxzs.patch.batching import DEFAULT_BATCHING, Batching, stacks
from jaxzs.patch.crf import clip_es_colours, dense_crf
from jaxzs.patch.images import ImageTags
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
            labels = pixel_labels(
                stack.pieces[row].image, maps, own, background=background, crf=crf, exact=exact
            )
            yield ImageMask(stack.pieces[row].number, own, labels, maps, activation)


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
