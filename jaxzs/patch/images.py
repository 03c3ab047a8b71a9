"""Tags for images of any size, batch by batch, at several scales, from several origins, on several devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxzs import parallel
from jaxzs.clip import Model
from jaxzs.clip.layers import Numerics
from jaxzs.errors import renamed
from jaxzs.patch.batching import DEFAULT_BATCHING, OF_BATCHING, Batching, Piece, Stack, finer, stacks, whole_images
from jaxzs.patch.grid import full_grid
from jaxzs.patch.settings import Tagging
from jaxzs.patch.tags import OF_TAGGING, Tagger, Task, check_foreground, check_texts, check_tower, decide, tag_program


class ImageTags(NamedTuple):
    """Tags of one image, as NumPy arrays on its own grid.

    number: its place among the images given. size: (height, width) as given.
    scores, tags, threshold: [F]. reidentified, probability: [F] second looks.
    refined: [rows,columns,C] scores after dual masking. coarse: the same before.
    boxes: [F,4] (top, bottom, left, right) as fractions of the image, where each class scores high.

    With several views of an image, scores are their mean, and everything that has places is from the first scale: maps
    are the mean of its origins on a grid so many times as fine, boxes are the first origin's.
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


@renamed(**OF_TAGGING, **OF_BATCHING)
def tag_images(
    model: Model,
    images: Iterable[Any],
    text_features: jax.Array | np.ndarray,
    settings: Tagging = Tagging(),
    *,
    num_foreground: int,
    batching: Batching = DEFAULT_BATCHING,
    numerics: Numerics = Numerics(),
) -> Iterator[ImageTags]:
    """Tags of many images of any sizes, batch by batch; read lazily, in the order in which batches fill up.

    Args:
      model: a loaded checkpoint.
      images: PIL images or uint8 arrays.
      text_features: [C,E], foreground first.
      settings: as in `jaxzs.patch.tag`. With `Tagging(exact=True)` nothing is padded.
      num_foreground: F.
      batching: sizes of batches, padding, scales, the devices that share the work, what becomes of images that cannot
        be used. With several processes each reads all images and yields all results.
      numerics: how the encoder's products are computed.

    Yields:
      `ImageTags`; `number` says of which image.

    Raises:
      ImageError: an image that cannot be used, with its number, unless there is `Batching(on_error=)`.
      DataError, LabelError: texts, settings or F that do not fit the model, before any image is read.

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
    check_tower(model.config)
    check_texts("text_features", text_features, model.config)
    check_foreground(num_foreground, len(text_features))
    settings = settings.resolved(model.config.vision.num_hidden_layers, num_foreground)
    task = Task(model.config, num_foreground, numerics)
    run = on_mesh(tag_program, Tagger(model.params, jnp.asarray(text_features), settings), batching.mesh, task)
    batches = stacks(model, images, batching if settings.pads else batching.unpadded())
    found = whole_images(_tag_stacks(batches, run), batching.views)
    return (_together(views, batching.offsets, settings) for _, views in found)


def on_mesh(function: Callable[..., Any], shared: Any, mesh: Mesh | None, task: Any) -> Callable[..., Any]:
    """`function(shared, rows, task)` with its rows divided over the devices, and results on the host.

    function is of a module, so that what is compiled serves later calls. Each device loops over what its own rows
    need: nothing is exchanged but the results, where other processes hold some.
    """
    if mesh is None:
        return lambda *rows: jax.device_get(_on_device((function, task), shared, rows))
    shared, divided = parallel.replicate(shared, mesh), NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def run(*rows: np.ndarray) -> Any:
        placed = [jax.make_array_from_callback(row.shape, divided, row.__getitem__) for row in rows]
        return jax.tree.map(parallel.gather, _on_devices((function, task), mesh, shared, placed))

    return run


@functools.partial(jax.jit, static_argnums=0)
def _on_device(program, shared, rows):
    function, task = program
    return function(shared, rows, task)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _on_devices(program, mesh, shared, rows):
    function, task = program
    return parallel.map_rows(lambda shared, *rows: function(shared, rows, task), mesh)(shared, *rows)


def _tag_stacks(batches: Iterable[Stack], run: Callable[..., Any]) -> Iterator[tuple[Piece, ImageTags]]:
    """Every view and its tags."""
    for stack in batches:
        yield from zip(stack.pieces, _tag_stack(run, stack), strict=True)


def _tag_stack(run: Callable[..., Any], stack: Stack) -> Iterator[ImageTags]:
    """Run the program on a batch, and cut every image's result out of it."""
    found = run(stack.pixels, stack.mask)  # on the host
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
            boxes=found.boxes[row] / np.array([rows, rows, columns, columns]),  # of the true grid, not the padded
        )


def _together(views: Sequence[ImageTags], offsets: int, settings: Tagging) -> ImageTags:
    """Scores averaged over all views, and tags decided anew; maps averaged over the origins of the first scale."""
    first, origins = views[0], views[: offsets**2]
    if len(views) == 1:
        return first
    scores = np.stack([found.scores for found in views]).mean(0, dtype=np.float32)  # [F]
    tags, threshold = decide(jnp.asarray(scores)[None], settings.tag_threshold, full_grid(1, 2, 2))
    return first._replace(
        scores=scores,
        tags=np.asarray(tags[0]),
        threshold=np.asarray(threshold[0]),
        coarse=finer([found.coarse for found in origins], offsets),
        refined=finer([found.refined for found in origins], offsets),
    )
