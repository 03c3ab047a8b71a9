"""Label maps for images of any size: tags given or found, segmented batch by batch, sharpened by the CRF."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.clip import Model
from jaxzs.clip.layers import Numerics
from jaxzs.clip.preprocess import to_rgb
from jaxzs.errors import DataError, renamed
from jaxzs.patch.batching import DEFAULT_BATCHING, OF_BATCHING, Batching, Piece, Stack, finer, stacks, whole_images
from jaxzs.patch.cam import check_tower
from jaxzs.patch.crf import clip_es_colours, dense_crf, for_crf, nearest
from jaxzs.patch.images import ImageTags, on_mesh
from jaxzs.patch.segmentation import (
    OF_SEGMENTING,
    Segmenter,
    check_maps,
    class_numbers,
    enlarge,
    labels_of_maps,
    segment_program,
)
from jaxzs.patch.settings import Segmenting
from jaxzs.patch.tags import check_texts


class ImageMask(NamedTuple):
    """Segmentation of one image.

    number: its place among the images given. tags: K class numbers. labels: [height,width] int32, 0 background and
    c + 1 class c (without a background: c). maps: [K,rows,columns] 0 to 1, on the grid of patches,
    `Batching(offsets=n)` times as fine. activation: the same before the affinity.
    """

    number: int
    tags: np.ndarray
    labels: np.ndarray
    maps: np.ndarray
    activation: np.ndarray


@renamed(**OF_SEGMENTING, **OF_BATCHING)
def segment_images(
    model: Model,
    images: Iterable[Any],
    tags: Sequence[Sequence[int]] | Mapping[int, Sequence[int]],
    text_features: jax.Array | np.ndarray,
    background_features: jax.Array | np.ndarray,
    settings: Segmenting = Segmenting(),
    *,
    batching: Batching = DEFAULT_BATCHING,
    numerics: Numerics = Numerics(),
) -> Iterator[ImageMask]:
    """Label maps of many images of any sizes, whose tags are known.

    Args:
      model: a loaded checkpoint.
      images: PIL images or uint8 arrays, read lazily.
      tags: class numbers of each image, by its number; an image without any is all background.
      text_features: [C,E]. background_features: [M,E].
      settings: thresholds, whether there is a background, the CRF. With `Segmenting(exact=True)` nothing is padded.
      batching: sizes of batches and padding, the devices that share the work, what becomes of images that cannot be
        used; one scale, and as many origins as wanted, over which maps are averaged. The CRF runs image by image. With
        several processes each reads all images, yields all results.
      numerics: how the encoder's products are computed.

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
    check_tower(model.config)
    check_texts("text_features", text_features, model.config)
    check_texts("background_features", background_features, model.config)
    texts, others = jnp.asarray(text_features, jnp.float32), jnp.asarray(background_features, jnp.float32)
    shared = Segmenter(model.params, texts, others, settings.resolved(model.config.vision.num_hidden_layers))
    run = on_mesh(segment_program, shared, batching.mesh, (model.config, numerics))
    batches = stacks(model, images, batching if settings.pads else batching.unpadded())
    found = whole_images(_map_stacks(_with_tags(batches, tags, len(texts)), run), batching.views)
    return (_mask_of(piece, views, batching.offsets, settings) for piece, views in found)


def _with_tags(batches: Iterator[Stack], tags: Any, num_classes: int) -> Iterator[tuple[Stack, list[np.ndarray]]]:
    """Batches, and the tags of their images, checked as soon as they are known."""
    for stack in batches:
        yield stack, [_tags_of(piece.number, tags, num_classes) for piece in stack.pieces]


def _tags_of(number: int, tags: Any, num_classes: int) -> np.ndarray:
    """Class numbers of one image: [K] int32. -1 fills up lists of unequal lengths, as in `segment`."""
    try:
        own = np.asarray(tags[number])
    except LookupError as error:
        raise DataError(f"there are no tags for image {number}: give each image a list, empty for none") from error
    return class_numbers(own[own != -1] if own.ndim == 1 and own.dtype.kind == "i" else own, num_classes)


class _Maps(NamedTuple):
    """Of one view. tags [K]; maps, activation: [K,rows,columns]."""

    tags: np.ndarray
    maps: np.ndarray
    activation: np.ndarray


def _map_stacks(
    batches: Iterable[tuple[Stack, list[np.ndarray]]], run: Callable[..., Any]
) -> Iterator[tuple[Piece, _Maps]]:
    """Every view and its maps, cut out of the padded batch."""
    for stack, of_images in batches:
        found = run(stack.pixels, _padded_tags(of_images, len(stack.pixels)), stack.mask)
        for row, (piece, own) in enumerate(zip(stack.pieces, of_images, strict=True)):
            rows, columns = stack.grids[row]
            yield (
                piece,
                _Maps(own, *(part[row, : len(own), :rows, :columns] for part in (found.maps, found.activation))),
            )


def _mask_of(piece: Piece, views: Sequence[_Maps], offsets: int, settings: Segmenting) -> ImageMask:
    """Maps averaged over the origins, and the labels that follow from them."""
    tags = views[0].tags
    maps, activation = (
        np.moveaxis(finer([np.moveaxis(part, 0, -1) for part in parts], offsets), -1, 0)  # [K,n rows,n columns]
        for parts in ([view.maps for view in views], [view.activation for view in views])
    )
    return ImageMask(piece.number, tags, pixel_labels(piece.image, maps, tags, settings), maps, activation)


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
    every = np.moveaxis(tagged.refined, -1, 0)  # [C,rows,columns]
    scores = every[class_numbers(tags, len(every))]  # [K,rows,columns]
    shifted = scores - scores.min((1, 2), keepdims=True)
    return shifted / np.maximum(shifted.max((1, 2), keepdims=True), 1e-7)


@renamed(**OF_SEGMENTING)
def pixel_labels(
    image: Any, maps: np.ndarray, tags: Sequence[int] | np.ndarray, settings: Segmenting = Segmenting()
) -> np.ndarray:
    """Labels of one image at its own size, [height,width] int32: maps [K,rows,columns] of its K tags.

    image: PIL image or array. settings: of backgrounds, the CRF, and whether that sees the original's colours.

    Raises what `dense_crf` raises, and `DataError` for maps that do not fit the tags or are not finite, and for no tags
    without a background.

    >>> image, maps = np.zeros((2, 8, 3), np.uint8), np.array([[[1.0, 0.0]]])
    >>> patch.pixel_labels(image, maps, [3])[0].tolist()
    [4, 4, 4, 4, 0, 0, 0, 0]
    """
    photo, maps, tags = np.asarray(to_rgb(image)), np.asarray(maps), class_numbers(tags)
    check_maps(maps, tags)
    small = for_crf(photo) if settings.crf is not None and len(tags) else photo
    large = enlarge(maps, *small.shape[:2])  # [K,height,width]
    if settings.crf is None or len(tags) == 0:
        return labels_of_maps(large, tags, settings.background)
    scores = large.astype(np.float32)  # [K,height,width]
    if settings.background:
        scores = np.concatenate([1 - scores.max(0, keepdims=True), scores])  # [1+K,height,width]
    colours = clip_es_colours(small) if settings.wrap_colours else small
    best = np.asarray(dense_crf(scores, colours, settings.crf)).argmax(0)  # [height,width]
    best = nearest(best, *photo.shape[:2])
    return (np.concatenate([[0], tags + 1]) if settings.background else tags).astype(np.int32)[best]
