"""Tags for images of any size, batch by batch, at several scales, on several devices."""

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
from jaxzs.clip.layers import Params
from jaxzs.errors import ImageError
from jaxzs.patch.batching import DEFAULT_BATCHING, Batching, Stack, stacks
from jaxzs.patch.grid import full_grid
from jaxzs.patch.tags import Tags, decide, tag


class ImageTags(NamedTuple):
    """Tags of one image, as NumPy arrays on its own grid.

    number: its place among the images given. size: (height, width) as given.
    scores, tags, threshold: [F]. reidentified, probability: [F] second looks.
    refined: [rows,columns,C] scores after dual masking. coarse: the same before.
    boxes: [F,4] (top, bottom, left, right) as fractions of the image, where each class scores high.

    With several scales, scores are their mean, and everything that has places is from the first scale.
    """

    number: int
    size: tuple[int, int]
    scores: np.ndarray
    tags: np.ndarray
    threshold: np.ndarray
    reidentified: np.ndarray
    probability: np.ndarray
    coarse: np.ndarray
    refined: np.ndarray
    boxes: np.ndarray


def tag_images(
    model: Model,
    images: Iterable[Any],
    text_features: jax.Array | np.ndarray,
    *,
    num_foreground: int,
    batching: Batching = DEFAULT_BATCHING,
    mesh: Mesh | None = None,
    on_error: Callable[[int, ImageError], None] | None = None,
    **options: Any,
) -> Iterator[ImageTags]:
    """Tags of many images of any sizes, batch by batch; read lazily, in the order in which batches fill up.

    Args:
      model: a loaded checkpoint.
      images: PIL images or uint8 arrays.
      text_features: [C,E], foreground first.
      num_foreground: F.
      batching: sizes of batches, padding, scales. With `exact=True` among the options nothing is padded.
      mesh: devices to divide each batch over; every device works on its own images. Default: one device.
      on_error: told the number of each image that cannot be used, which is then left out; by default it raises.
      options: of `jaxzs.patch.tag`.

    Yields:
      `ImageTags`; `number` says of which image.

    Raises:
      ImageError: an image that cannot be used, with its number, unless there is `on_error`.

    >>> model = jaxzs.load("demo")
    >>> image = np.full((96, 96, 3), 40, np.uint8)
    >>> image[20:60, 30:70] = (220, 40, 40)
    >>> texts = patch.tag_texts(model, ["red square", "blue circle"], templates=["a picture of a {}."])
    >>> [found] = patch.tag_images(model, [image], texts, num_foreground=2)
    >>> found.tags.tolist(), found.refined.shape
    ([True, False], (12, 12, 2))
    >>> found.boxes[0].round(1).tolist()  # top, bottom, left, right of the red square
    [0.2, 0.7, 0.2, 0.8]
    """
    run = _program(model, jnp.asarray(text_features), num_foreground, mesh, options)
    parts: dict[int, dict[int, ImageTags]] = {}  # by image and scale
    for stack in stacks(
        model,
        images,
        batching,
        padded=not options.get("exact"),
        multiple=1 if mesh is None else mesh.size,
        on_error=on_error,
    ):
        for piece, found in zip(stack.pieces, _tag_stack(run, stack), strict=True):
            of_image = parts.setdefault(piece.number, {})
            of_image[piece.scale] = found
            if len(of_image) == len(batching.scales):
                scales = [of_image[place] for place in range(len(of_image))]
                yield _mean_of_scales(scales, options) if len(scales) > 1 else found
                del parts[piece.number]


def _tag_stack(run: Callable[..., Tags], stack: Stack) -> Iterator[ImageTags]:
    """Run the program on a batch, and cut every image's result out of it."""
    found: Any = jax.device_get(run(stack.pixels, stack.mask))
    for row, (piece, (rows, columns)) in enumerate(zip(stack.pieces, stack.grids, strict=True)):
        coarse, refined = (
            part[row].reshape(*stack.mask.shape[1:], -1)[:rows, :columns] for part in (found.coarse, found.refined)
        )
        yield ImageTags(
            number=piece.number,
            size=piece.size,
            scores=found.scores[row],
            tags=found.tags[row],
            threshold=found.threshold[row],
            reidentified=found.reidentified[row],
            probability=found.probability[row],
            coarse=coarse,
            refined=refined,
            boxes=found.boxes[row] / np.array([rows, rows, columns, columns]),
        )


def _program(
    model: Model, text_features: jax.Array, num_foreground: int, mesh: Mesh | None, options: Mapping[str, Any]
) -> Callable[[np.ndarray, np.ndarray], Tags]:
    """`tag` as a function of pixels and mask, divided over the mesh where there is one."""

    def run(shared: tuple[Params, jax.Array], pixels: Any, mask: Any) -> Tags:
        params, texts = shared
        return tag(params, pixels, texts, model.config, num_foreground=num_foreground, mask=mask, **options)

    shared = model.params, text_features
    if mesh is None:
        return functools.partial(run, shared)
    # Each device makes encoder calls of its own for the candidates of its images.
    return functools.partial(parallel.map_rows(run, mesh), parallel.replicate(shared, mesh))


def _mean_of_scales(scales: Sequence[ImageTags], options: Mapping[str, Any]) -> ImageTags:
    """Scores averaged over scales, and tags decided anew; everything with places is the first scale's."""
    scores = np.stack([found.scores for found in scales]).mean(0, dtype=np.float32)
    relative = options.get("tag_threshold")
    relative = options.get("relative_threshold", 0.5) if relative is None else relative
    fraction = jnp.broadcast_to(jnp.asarray(relative, jnp.float32), scores.shape)
    tags, threshold = decide(jnp.asarray(scores)[None], fraction, full_grid(1, 2, 2))
    return scales[0]._replace(scores=scores, tags=np.asarray(tags[0]), threshold=np.asarray(threshold[0]))
