"""Batches of preprocessed images through grain: in order, read ahead in threads, the last one padded with a mask."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxzs.clip.naflex import Pixels
from jaxzs.data.images import one_large_at_a_time
from jaxzs.data.sources import Labels, Source
from jaxzs.errors import ConfigError, ImageError, renamed

Preprocess = Callable[[Any], Pixels]


class Batch(NamedTuple):
    """B items of a source. Rows that are padding or could not be read have mask False and a black image."""

    pixels: Pixels  # [B,S,S,3] float32; NaFlex: `clip.Patches` of B images
    mask: np.ndarray  # [B] bool
    indices: np.ndarray  # [B] int64, numbers in the source; -1 for padding
    labels: list[Labels]  # B of them
    ids: list[str]
    errors: list[str]  # why an item of this batch could not be read, one text for each that was not


class _Read(NamedTuple):
    number: int
    pixels: Pixels | None  # of one image, without the axis of the batch
    labels: Labels
    id: str
    error: str


@renamed(image_shape="nothing: `preprocess` tells the shape")
def batches(
    source: Source,
    preprocess: Preprocess,
    batch_size: int,
    *,
    indices: Sequence[int] | None = None,
    threads: int = 2,
    read_ahead: int = 2,
) -> Iterator[Batch]:
    """Batches of `source` in its own order.

    Args:
      source: items by number.
      preprocess: image -> [1,S,S,3] float32 or `clip.Patches` of one, e.g. `model.preprocess`; called in threads.
      batch_size: B, of every batch.
      indices: numbers to read, in this order, e.g. this process's share (`shard`); -1 is a row of padding.
        Default: all.
      threads: that decode and preprocess.
      read_ahead: batches prepared in advance.

    An item that cannot be read is left out (mask False) and its error told in `Batch.errors`; the caller decides.

    Yields `Batch`. Raises `ConfigError` for a batch size below 1.

    >>> model, source = jaxzs.load("demo"), data.open_source("photos")
    >>> first, last = data.batches(source, model.preprocess, 16)
    >>> first.pixels.shape, first.ids[0], first.labels[0], int(first.indices[-1])
    ((16, 48, 48, 3), 'one/0.png', (0,), 15)
    >>> last.pixels.shape, int(last.mask.sum())  # 30 images
    ((16, 48, 48, 3), 14)
    """
    import grain

    if batch_size < 1 or threads < 0:
        raise ConfigError(f"batch_size is {batch_size} and threads {threads}; expected 1 or more")
    numbers = range(len(source)) if indices is None else indices

    def opened(index: int) -> _Read:
        try:
            item = source[index]
        # Of this image alone. Any other error, such as a label out of range, is of the source and ends the pass.
        except ImageError as error:
            return _Read(index, None, (), str(index), str(error))
        try:
            return _Read(index, preprocess(item.image)[0], item.labels, item.id, "")  # [S,S,3]
        except ImageError as error:
            return _Read(index, None, (), item.id, f"{item.id}: {error.__cause__ or error}")

    def read(index: int) -> _Read:
        if index < 0:
            return _Read(-1, None, (), "", "")
        with one_large_at_a_time():  # `opened` has let go of the image when the next may come
            return opened(index)

    @functools.cache
    def blank() -> Pixels:
        from PIL import Image

        # An image like any other, not zeros: of no patches at all features would not be finite.
        return preprocess(Image.new("RGB", (1, 1)))[0]  # [S,S,3]

    def collate(rows: Sequence[_Read]) -> Batch:
        # The last batch has the shape of all others, so that one program serves them.
        padding = batch_size - len(rows)
        images = [blank() if row.pixels is None else row.pixels for row in rows] + [blank() for _ in range(padding)]
        return Batch(
            pixels=jax.tree.map(lambda *leaves: np.stack(leaves), *images),  # [B,S,S,3]
            mask=np.array([row.pixels is not None for row in rows] + [False] * padding),
            indices=np.array([row.number for row in rows] + [-1] * padding, np.int64),
            labels=[row.labels for row in rows] + [()] * padding,
            ids=[row.id for row in rows] + [""] * padding,
            errors=[row.error for row in rows if row.error],
        )

    if len(numbers) == 0:
        return
    data = grain.MapDataset.source(numbers).map(read)
    # The buffer counts rows: the map comes before the batches.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, read_ahead * batch_size))
    # Rows are read ahead one by one, by all threads; batches are put together as they are asked for.
    yield from data.to_iter_dataset(options).batch(batch_size, batch_fn=collate)


def shard(num_items: int, part: int, parts: int) -> range:
    """Numbers that part `part` of `parts` reads: neighbouring items, all parts cover each exactly once.

    Of unequal parts the last ones are shorter. Raises `ConfigError` unless 0 <= part < parts.

    >>> [list(data.shard(5, part, 2)) for part in range(2)]
    [[0, 1, 2], [3, 4]]
    """
    if not 0 <= part < parts:
        raise ConfigError(f"part {part} of {parts}")
    # Rounded up; of more parts than items the last ones are empty.
    size = -(-num_items // parts)
    return range(min(part * size, num_items), min((part + 1) * size, num_items))
