"""Grids of patches: how many rows and columns each image of a batch truly has, and how to sample on them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grid:
    """The patches of a batch of images that share one padded shape. A pytree, like everything traced.

    rows, columns: [B] int32, the true grid of each image, in the upper left of the padded one.
    valid: [B,rows,columns] bool of the padded grid, True inside the true one.
    padded: static; False promises that every grid is full, which saves masks.

    >>> valid = jnp.array([[[True, True, False], [True, True, False]]])
    >>> grid = patch.grid_from_mask(valid)
    >>> grid.rows.tolist(), grid.columns.tolist(), grid.shape, grid.patches.shape
    ([2], [2], (2, 3), (1, 6))
    """

    rows: jax.Array
    columns: jax.Array
    valid: jax.Array
    padded: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the padded grid."""
        return self.valid.shape[1], self.valid.shape[2]

    @property
    def patches(self) -> jax.Array:
        """[B,P] bool: `valid`, row-major."""
        return self.valid.reshape(self.valid.shape[0], -1)


def full_grid(num_images: int, rows: int, columns: int) -> Grid:
    """Grid of images without padding.

    num_images B, each of rows x columns patches.

    >>> grid = patch.full_grid(4, rows=6, columns=8)
    >>> grid.shape, grid.patches.shape, bool(grid.valid.all())
    ((6, 8), (4, 48), True)
    """
    return Grid(
        jnp.full((num_images,), rows, jnp.int32),
        jnp.full((num_images,), columns, jnp.int32),
        jnp.ones((num_images, rows, columns), bool),
        padded=False,
    )


def grid_from_mask(valid: jax.Array) -> Grid:
    """Grid of padded images: valid [B,rows,columns] bool, a rectangle in the upper left of each (or nothing).

    >>> patch.grid_from_mask(jnp.array([[[True, True, False], [True, True, False]]])).columns.tolist()
    [2]
    """
    return Grid(valid.any(2).sum(1, dtype=jnp.int32), valid.any(1).sum(1, dtype=jnp.int32), valid)


def bilinear_taps(
    length: int | jax.Array, new_length: int | jax.Array, samples: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What to read when `length` samples are resized to `new_length`, as torch's `interpolate` does it.

    Half-pixel centres, clamped borders, no antialiasing. The lengths may be traced integers; `samples` is the static
    size of the result. Returns lower and upper index [samples] int32 and the upper one's weight [samples] float32.
    """
    scale = jnp.asarray(length, jnp.float32) / jnp.asarray(new_length, jnp.float32)  # old samples for each new one
    centre = jnp.maximum(scale * (jnp.arange(samples, dtype=jnp.float32) + 0.5) - 0.5, 0.0)  # [samples]
    lower = jnp.minimum(centre.astype(jnp.int32), length - 1)  # beyond new_length it repeats the border
    return lower, jnp.minimum(lower + 1, length - 1), centre - lower.astype(jnp.float32)


def interpolate(lower: jax.Array, upper: jax.Array, weight: jax.Array) -> jax.Array:
    """Linear interpolation, in the order of operations of torch's `interpolate`."""
    return (1.0 - weight) * lower + weight * upper


def divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y elementwise, rounded correctly: y is broadcast to x, both float32.

    XLA turns a division by something broadcast or constant into a product with the reciprocal, so that the largest of
    `x / x.max()` is 0.99999994 for every third map, and thresholds and 8-bit levels behind it flip. The compiler does
    not see through the barrier.

    >>> x = jnp.arange(1.0, 50.0)[:, None] * jnp.array([[0.1, 0.3, 0.7]])
    >>> jax.jit(lambda x: divide(x, x.max(0)[None]).max(0))(x).tolist()
    [1.0, 1.0, 1.0]
    """
    return x / jax.lax.optimization_barrier(jnp.broadcast_to(y, x.shape))
