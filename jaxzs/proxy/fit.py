"""Learning proxies: from given labels in memory (`learn_proxies`), or the whole method by blocks (`fit`)."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from jaxzs.errors import ConfigError
from jaxzs.proxy import checks
from jaxzs.proxy.closed_form import label_sums, sums_of
from jaxzs.proxy.gamma import Gamma, held_out_gamma, is_auto, random_halves
from jaxzs.proxy.rows import Products, Reduce, Rows, block_rows, count, in_blocks, normalize, prepare
from jaxzs.proxy.sinkhorn import round_labels, sinkhorn
from jaxzs.proxy.solvers import ProxyResult, Solver, check_options, solve
from jaxzs.proxy.sweeps import Kept, Recomputed


def learn_proxies(
    image_features: ArrayLike,
    text_proxies: ArrayLike,
    soft_labels: ArrayLike,
    *,
    temperature: ArrayLike = 0.04,
    confidence: ArrayLike = 0.6,
    solver: Solver = "fast",
    iterations: int | None = None,
    mask: ArrayLike | None = None,
    tolerance: float = 0.0,
    product_dtype: Any = jnp.float32,
    ridge: float = 1.0,
) -> ProxyResult:
    """Vision proxies that reproduce soft labels: argmin_W of the cross-entropy with softmax(X W^T / tau_i).

    InMaP, arXiv 2310.19752, equations 4 to 6. Predict with argmax(X W^T).

    Args:
      image_features: X [N,E], any float type; L2-normalised here.
      text_proxies: Z [C,E], any float type; L2-normalised here. The start of "reference".
      soft_labels: [N,C] of `pseudo_labels`.
      temperature: tau_i > 0; 0.04 in the paper, 4/s for a checkpoint of logit scale s.
      confidence: rows of labels with an entry strictly above it become one-hot, once; 0 to 1.
      solver: "fast", preconditioned Riemannian conjugate gradient from the closed form; "reference", the paper's
        gradient descent; "closed_form", discriminant analysis on the labels, without iterations.
      iterations: by default 28 of "fast", or 47 where N < 2C (at most 30 and 50 passes), fewer where the gradient is
        down to its rounding errors; 2000 of "reference".
      mask: [N] bool, False for padding.
      tolerance: "fast" stops where a step lowers the objective by less than this fraction of its value.
      product_dtype: bfloat16 speeds up "fast" (accumulated in float32); keep float32 for "reference", whose step
        halving reacts to rounding.
      ridge: regularisation of the closed form, 1 to 3.

    Returns:
      `ProxyResult`.

    Raises:
      DataError: shapes that do not fit, values that are not finite.
      ConfigError: options out of range.

    >>> x = jnp.array([[1.0, 0.1], [0.9, -0.1], [0.1, 1.0], [0.0, 0.8]])
    >>> z = jnp.array([[1.0, 0.9], [0.9, 1.0]])
    >>> labels = proxy.pseudo_labels(zeroshot.similarity(x, z))
    >>> result = proxy.learn_proxies(x, z, labels)
    >>> zeroshot.predict(x, result.proxies).tolist(), result.proxies.shape
    ([0, 0, 1, 1], (2, 2))
    >>> bool(result.objective[-1] <= result.objective[0])
    True
    """
    x, z, rows_mask = checks.features_and_proxies(image_features, text_proxies, mask)
    labels = checks.matrix(soft_labels, "soft_labels", "[N,C]")
    checks.same(labels.shape[0], x.shape[0], "the numbers of rows of soft_labels and image_features")
    checks.same(labels.shape[1], z.shape[0], "the numbers of classes of soft_labels and text_proxies")
    checks.finite(labels, "soft_labels", rows_mask)
    check_options(temperature, confidence, solver, iterations, ridge)
    return _learn(
        Rows(rows_mask, features=x),
        z,
        labels,
        checks.scalar(temperature),
        checks.scalar(confidence),
        jnp.float32(ridge),
        jnp.float32(tolerance),
        solver=solver,
        iterations=iterations,
        products=Products(jnp.dtype(product_dtype)),
    )


@partial(jax.jit, static_argnames=("solver", "iterations", "products"))
def _learn(
    rows: Rows,
    text: jax.Array,
    labels: jax.Array,
    temperature: jax.Array,
    confidence: jax.Array,
    ridge: jax.Array,
    tolerance: jax.Array,
    *,
    solver: Solver,
    iterations: int | None,
    products: Products,
) -> ProxyResult:
    sums = sums_of(prepare(rows), round_labels(labels.astype(jnp.float32), confidence))
    sweeps = Kept(rows, temperature, products)
    return solve(sweeps, sums, text, temperature, ridge, tolerance, solver, iterations)


class Numbers(NamedTuple):
    """The numbers of the whole method, [] float32 each, which may be traced. gamma: None for "auto"."""

    label_temperature: jax.Array
    temperature: jax.Array
    gamma: jax.Array | None
    confidence: jax.Array
    ridge: jax.Array
    tolerance: jax.Array


class Choices(NamedTuple):
    """What decides which program is compiled."""

    sinkhorn_iterations: int
    solver: Solver
    iterations: int | None
    products: Products


def checked_options(
    *,
    label_temperature: ArrayLike,
    temperature: ArrayLike,
    gamma: Gamma,
    sinkhorn_iterations: int,
    confidence: ArrayLike,
    solver: Solver,
    iterations: int | None,
    tolerance: float,
    product_dtype: Any,
    ridge: float,
) -> tuple[Numbers, Choices]:
    """The options of `fit`, checked."""
    checks.label_options(label_temperature, gamma, sinkhorn_iterations)
    check_options(temperature, confidence, solver, iterations, ridge)
    numbers = Numbers(
        checks.scalar(label_temperature),
        checks.scalar(temperature),
        None if is_auto(gamma) else checks.scalar(gamma),
        checks.scalar(confidence),
        jnp.float32(ridge),
        jnp.float32(tolerance),
    )
    products = Products(jnp.dtype(product_dtype))
    return numbers, Choices(sinkhorn_iterations, solver, iterations, products)


def whole_method(
    reduce: Reduce, num_images: jax.Array, text: jax.Array, numbers: Numbers, choices: Choices
) -> ProxyResult:
    """Sinkhorn, labels and proxies, from sums over the images alone. text [C,E] need not be normalised."""
    text, temperature = normalize(text), numbers.label_temperature
    scale = partial(
        sinkhorn,
        reduce,
        text,
        num_images,
        text.shape[0],
        temperature=temperature,
        iterations=choices.sinkhorn_iterations,
    )
    gamma = numbers.gamma
    if gamma is None:
        gamma = held_out_gamma(reduce, text, scale, temperature, numbers.temperature, numbers.confidence, numbers.ridge)
    potentials = scale(gammas=gamma[None])[0]
    sums = reduce(label_sums, text, potentials, temperature, numbers.confidence)
    return solve(
        Recomputed(reduce, numbers.temperature, choices.products),
        sums,
        text,
        numbers.temperature,
        numbers.ridge,
        numbers.tolerance,
        choices.solver,
        choices.iterations,
    )


def fit(
    image_features: ArrayLike,
    text_proxies: ArrayLike,
    *,
    label_temperature: ArrayLike = 0.01,
    temperature: ArrayLike = 0.04,
    gamma: Gamma = 0.0,
    sinkhorn_iterations: int = 20,
    confidence: ArrayLike = 0.6,
    solver: Solver = "fast",
    iterations: int | None = None,
    mask: ArrayLike | None = None,
    key: jax.Array | None = None,
    tolerance: float = 0.0,
    product_dtype: Any = jnp.float32,
    ridge: float = 1.0,
    block_size: int | None = None,
    mesh: Mesh | None = None,
    data_axis: str = "data",
) -> ProxyResult:
    """The whole method, pseudo labels and proxies, by blocks of images: no [N,C] array ever exists.

    InMaP, arXiv 2310.19752. Equal to `learn_proxies` on `pseudo_labels`: labels are computed again from class
    potentials and logits from proxies, so that a step of "fast" costs two passes instead of one, and memory is that of
    one block.

    Args:
      image_features: X [N,E], any float type; L2-normalised here. Rows sharded over `data_axis` stay where they are:
        one all-reduce of [C,E] and some of O(C) per step.
      text_proxies: Z [C,E], any float type; L2-normalised here.
      label_temperature: tau_t > 0 of the pseudo labels; 0.01 in the paper, 1/s for a checkpoint of logit scale s.
      temperature: tau_i > 0 of the proxies; 0.04 in the paper, 4/s likewise.
      gamma: class marginal of the labels: 0 uniform, 1 as the text predicts it, "auto" chosen without labels.
      sinkhorn_iterations: of the labels' scaling.
      confidence: as in `learn_proxies`.
      solver: as in `learn_proxies`.
      iterations: as in `learn_proxies`.
      mask: [N] bool, False for padding.
      key: random key that gamma="auto" needs, for its two halves.
      tolerance: as in `learn_proxies`.
      product_dtype: as in `learn_proxies`.
      ridge: as in `learn_proxies`.
      block_size: images of a block; by default such that it has about four million similarities.
      mesh: of the rows; found from a sharded array, to be named under jit.
      data_axis: mesh axis of the rows.

    Returns:
      `ProxyResult`.

    Raises:
      DataError: shapes that do not fit, values that are not finite.
      ConfigError: options out of range.

    >>> x = jnp.array([[1.0, 0.1], [0.9, -0.1], [0.1, 1.0], [0.0, 0.8]])
    >>> z = jnp.array([[1.0, 0.9], [0.9, 1.0]])
    >>> zeroshot.predict(x, proxy.fit(x, z).proxies).tolist()
    [0, 0, 1, 1]
    """
    x, z, rows_mask = checks.features_and_proxies(image_features, text_proxies, mask)
    numbers, choices = checked_options(
        label_temperature=label_temperature,
        temperature=temperature,
        gamma=gamma,
        sinkhorn_iterations=sinkhorn_iterations,
        confidence=confidence,
        solver=solver,
        iterations=iterations,
        tolerance=tolerance,
        product_dtype=product_dtype,
        ridge=ridge,
    )
    mesh = _mesh_of(x, data_axis) if mesh is None else mesh
    rows = Rows(rows_mask, features=x)
    if is_auto(gamma):
        rows = rows._replace(fold=random_halves(key, x.shape[0]))
    shards = 1 if mesh is None else mesh.shape[data_axis]
    checks.divides(x.shape[0], shards, data_axis)
    size = block_rows(block_size, x.shape[0] // shards, z.shape[0])
    return _fit(rows, z, numbers, choices, block_size=size, mesh=mesh, data_axis=data_axis)


@partial(jax.jit, static_argnames=("choices", "block_size", "mesh", "data_axis"))
def _fit(
    rows: Rows,
    text: jax.Array,
    numbers: Numbers,
    choices: Choices,
    *,
    block_size: int,
    mesh: Mesh | None,
    data_axis: str,
) -> ProxyResult:
    def run(rows: Rows, text: jax.Array, numbers: Numbers) -> ProxyResult:
        reduce = in_blocks(rows, block_size, None if mesh is None else data_axis)
        return whole_method(reduce, reduce(count), text, numbers, choices)

    if mesh is not None:
        run = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(P(data_axis), P(), P()),
            out_specs=P(),
            check_vma=False,  # results are equal on all devices: every sum over rows ends in a psum
        )
    return run(rows, text, numbers)


def _mesh_of(x: jax.Array, data_axis: str) -> Mesh | None:
    """The mesh over which the rows of a concrete array are sharded, if they are."""
    sharding = getattr(x, "sharding", None) if checks.concrete(x) else None
    if not isinstance(sharding, NamedSharding) or not sharding.spec or sharding.spec[0] is None:
        return None
    first = sharding.spec[0]
    if (first if isinstance(first, tuple) else (first,)) != (data_axis,):
        raise ConfigError(f"rows of image_features are sharded over {first!r}; name that axis: data_axis={first!r}")
    assert isinstance(sharding.mesh, Mesh)
    return sharding.mesh
