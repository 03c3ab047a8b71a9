"""Learning proxies: from given labels in memory (`learn_proxies`), or the whole method by blocks (`fit`)."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from jaxzs.errors import ConfigError
from jaxzs.proxy import checks
from jaxzs.proxy.closed_form import LabelSums, closed_form, label_sums, precondition, sums_of
from jaxzs.proxy.gamma import Gamma, held_out_gamma, is_auto, random_halves
from jaxzs.proxy.rows import Products, Rows, block_rows, count, in_blocks, normalize, prepare
from jaxzs.proxy.sinkhorn import round_labels, sinkhorn
from jaxzs.proxy.solvers import (
    REFERENCE_ITERATIONS,
    ProxyResult,
    evaluate_at,
    fast,
    reference,
)
from jaxzs.proxy.sweeps import Kept, Recomputed, Sweeps

Solver = Literal["fast", "reference", "closed_form"]


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
    checks.same(
        labels.shape[0], x.shape[0], "the numbers of rows of soft_labels and image_features"
    )
    checks.same(
        labels.shape[1], z.shape[0], "the numbers of classes of soft_labels and text_proxies"
    )
    checks.finite(labels, "soft_labels", rows_mask)
    _check_solver(temperature, confidence, solver, iterations, ridge)
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
    return _solve(sweeps, sums, text, temperature, ridge, tolerance, solver, iterations)


def _solve(
    sweeps: Sweeps,
    sums: LabelSums,
    text: jax.Array,
    temperature: jax.Array,
    ridge: jax.Array,
    tolerance: jax.Array,
    solver: Solver,
    iterations: int | None,
) -> ProxyResult:
    if solver == "reference":
        steps = REFERENCE_ITERATIONS if iterations is None else iterations
        return reference(sweeps, sums, normalize(text), temperature, steps)
    inverse = precondition(sums, ridge)
    proxies = closed_form(sums, inverse)
    if solver == "closed_form":
        return evaluate_at(sweeps, proxies, sums, temperature)
    return fast(sweeps, sums, proxies, inverse, temperature, tolerance, iterations)


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
    checks.label_options(label_temperature, gamma, sinkhorn_iterations)
    _check_solver(temperature, confidence, solver, iterations, ridge)
    mesh = _mesh_of(x, data_axis) if mesh is None else mesh
    rows = Rows(rows_mask, features=x)
    if is_auto(gamma):
        rows = rows._replace(fold=random_halves(key, x.shape[0]))
    shards = 1 if mesh is None else mesh.shape[data_axis]
    checks.divides(x.shape[0], shards, data_axis)
    return _fit(
        rows,
        z,
        checks.scalar(label_temperature),
        checks.scalar(temperature),
        None if is_auto(gamma) else checks.scalar(gamma),
        checks.scalar(confidence),
        jnp.float32(ridge),
        jnp.float32(tolerance),
        sinkhorn_iterations=sinkhorn_iterations,
        solver=solver,
        iterations=iterations,
        products=Products(jnp.dtype(product_dtype)),
        block_size=block_rows(block_size, x.shape[0] // shards, z.shape[0]),
        mesh=mesh,
        data_axis=data_axis,
    )


@partial(
    jax.jit,
    static_argnames=(
        "sinkhorn_iterations",
        "solver",
        "iterations",
        "products",
        "block_size",
        "mesh",
        "data_axis",
    ),
)
def _fit(
    rows: Rows,
    text: jax.Array,
    label_temperature: jax.Array,
    temperature: jax.Array,
    gamma: jax.Array | None,
    confidence: jax.Array,
    ridge: jax.Array,
    tolerance: jax.Array,
    *,
    sinkhorn_iterations: int,
    solver: Solver,
    iterations: int | None,
    products: Products,
    block_size: int,
    mesh: Mesh | None,
    data_axis: str,
) -> ProxyResult:
    def whole_method(
        rows: Rows,
        text: jax.Array,
        label_temperature: jax.Array,
        temperature: jax.Array,
        gamma: jax.Array | None,
        confidence: jax.Array,
        ridge: jax.Array,
        tolerance: jax.Array,
    ) -> ProxyResult:
        reduce = in_blocks(rows, block_size, None if mesh is None else data_axis)
        text = normalize(text)
        scale = partial(
            sinkhorn,
            reduce,
            text,
            reduce(count),
            text.shape[0],
            temperature=label_temperature,
            iterations=sinkhorn_iterations,
        )
        if gamma is None:
            gamma = held_out_gamma(
                reduce, text, scale, label_temperature, temperature, confidence, ridge
            )
        potentials = scale(gammas=gamma[None])[0]
        sums = reduce(label_sums, text, potentials, label_temperature, confidence)
        sweeps = Recomputed(reduce, temperature, products)
        return _solve(sweeps, sums, text, temperature, ridge, tolerance, solver, iterations)

    if mesh is not None:
        whole_method = jax.shard_map(
            whole_method,
            mesh=mesh,
            in_specs=(P(data_axis), *[P()] * 7),
            out_specs=P(),
            check_vma=False,  # results are equal on all devices: every sum over rows ends in a psum
        )
    return whole_method(
        rows, text, label_temperature, temperature, gamma, confidence, ridge, tolerance
    )


def _mesh_of(x: jax.Array, data_axis: str) -> Mesh | None:
    """The mesh over which the rows of a concrete array are sharded, if they are."""
    sharding = getattr(x, "sharding", None) if checks.concrete(x) else None
    if not isinstance(sharding, NamedSharding) or not sharding.spec or sharding.spec[0] is None:
        return None
    first = sharding.spec[0]
    if (first if isinstance(first, tuple) else (first,)) != (data_axis,):
        raise ConfigError(
            f"rows of image_features are sharded over {first!r}; name that axis: data_axis={first!r}"
        )
    assert isinstance(sharding.mesh, Mesh)
    return sharding.mesh


def _check_solver(
    temperature: Any, confidence: Any, solver: str, iterations: int | None, ridge: float
) -> None:
    checks.positive(temperature, "temperature")
    checks.between(confidence, "confidence", 0, 1)
    checks.positive(ridge, "ridge")
    if solver not in get_args(Solver):
        raise ConfigError(f"solver is {solver!r}; expected one of {', '.join(get_args(Solver))}")
    if iterations is not None:
        checks.whole_number(iterations, "iterations")
