"""Learning proxies: from given labels in memory (`learn_proxies`), or the whole method by blocks (`fit`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxzs.errors import renamed
from jaxzs.proxy import checks
from jaxzs.proxy.closed_form import label_sums, sums_of
from jaxzs.proxy.gamma import random_splits, with_gamma
from jaxzs.proxy.rows import Blocks, Rows, normalize, prepare, where_rows_lie
from jaxzs.proxy.settings import DEFAULTS, PAPER_LOGIT_SCALE, Checked, Settings, Solver, for_rows, in_float32
from jaxzs.proxy.sinkhorn import Task, rounded
from jaxzs.proxy.solvers import ProxyResult, solve
from jaxzs.proxy.sweeps import Kept, Recomputed

IN_SETTINGS = {
    name: f"proxy.Settings({name}=...)"
    for name in (
        *("gamma", "sinkhorn_iterations", "confidence", "solver", "iterations"),
        *("tolerance", "product_dtype", "ridge", "block_size"),
    )
} | {
    "label_temperature": "logit_scale=model.logit_scale, or proxy.Settings(label_temperature=...)",
    "temperature": "logit_scale=model.logit_scale, or proxy.Settings(temperature=...)",
    "mesh": "proxy.Settings(sharding=NamedSharding(mesh, PartitionSpec('data')))",
    "data_axis": "proxy.Settings(sharding=NamedSharding(mesh, PartitionSpec(data_axis)))",
}
_OF_FIT = {name: f"proxy.fit(..., {IN_SETTINGS[name]})" for name in ("tolerance", "product_dtype", "ridge")}


@renamed(**_OF_FIT)
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
) -> ProxyResult:
    """Vision proxies that reproduce soft labels: argmin_W of the cross-entropy with softmax(X W^T / tau_i).

    InMaP, arXiv 2310.19752, equations 4 to 6. Predict with argmax(X W^T). Labels and logits [N,C] are in memory.

    Args:
      image_features: X [N,E], any float type; L2-normalised here.
      text_proxies: Z [C,E], any float type; L2-normalised here. The start of "reference".
      soft_labels: [N,C] of `pseudo_labels`; rows are distributions.
      temperature: tau_i > 0; 0.04 in the paper, 4/s for a checkpoint of logit scale s.
      confidence: rows of labels with an entry strictly above it become one-hot, once; 0 to 1.
      solver: see `Settings`.
      iterations: see `Settings`.
      mask: [N] bool, False for padding.

    Returns:
      `ProxyResult`.

    Raises:
      DataError: shapes that do not fit, values that are not finite, rows of zeros, labels that are no distributions.
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
    labels = checks.distributions(soft_labels, x.shape[0], z.shape[0], rows_mask)
    tau = checks.scale(temperature, "temperature")
    settings = Settings(temperature=tau, confidence=confidence, solver=solver, iterations=iterations)
    return learn(Rows(rows_mask, features=x), z, labels, in_float32(settings))


@jax.jit
def learn(rows: Rows, text: jax.Array, labels: jax.Array, settings: Checked) -> ProxyResult:
    """`learn_proxies` without its checks; settings `in_float32`."""
    # Rounded once, before any solver: afterwards only P^T X and the masses of the labels are needed.
    sums = sums_of(prepare(rows), rounded(labels.astype(jnp.float32), settings.confidence))
    return solve(Kept(rows, settings), sums, text, settings)


def whole_method(task: Task, settings: Checked) -> ProxyResult:
    """Sinkhorn, labels and proxies, from sums over the images alone."""
    potentials, sums = with_gamma(task, settings)  # [C]
    if sums is None:
        sums = task.reduce(label_sums, task.text, potentials, settings)
    return solve(Recomputed(task.reduce, settings), sums, task.text, settings)


@renamed(**IN_SETTINGS)
def fit(
    image_features: ArrayLike,
    text_proxies: ArrayLike,
    settings: Settings = DEFAULTS,
    *,
    logit_scale: ArrayLike = PAPER_LOGIT_SCALE,
    mask: ArrayLike | None = None,
    key: jax.Array | None = None,
) -> ProxyResult:
    """The whole method, pseudo labels and proxies, by blocks of images: no [N,C] array ever exists.

    InMaP, arXiv 2310.19752. Equal to `learn_proxies` on `pseudo_labels`: labels are computed again from class
    potentials and logits from proxies, so that a step of "fast" costs two passes instead of one, and memory is that of
    one block.

    Args:
      image_features: X [N,E], any float type; L2-normalised here. Rows that are spread over devices stay where they
        are: one all-reduce of [C,E] and some of O(C) per step.
      text_proxies: Z [C,E], any float type; L2-normalised here.
      settings: `Settings`.
      logit_scale: s > 0 of the checkpoint, `model.logit_scale`: the temperatures are 1/s of the labels and 4/s of the
        proxies, unless set. 100 of OpenAI's CLIP, the paper's.
      mask: [N] bool, False for padding.
      key: of the splits of the images that gamma="auto" compares; by default always the same ones.

    Returns:
      `ProxyResult`.

    Raises:
      DataError: shapes that do not fit, values that are not finite, rows of zeros.
      ConfigError: options out of range; a keyword that is now one of `Settings`.

    >>> x = jnp.array([[1.0, 0.1], [0.9, -0.1], [0.1, 1.0], [0.0, 0.8]])
    >>> z = jnp.array([[1.0, 0.9], [0.9, 1.0]])
    >>> zeroshot.predict(x, proxy.fit(x, z, logit_scale=100.0).proxies).tolist()
    [0, 0, 1, 1]
    >>> sweep = jax.vmap(lambda gamma: proxy.fit(x, z, proxy.Settings(gamma=gamma)).proxies)
    >>> sweep(jnp.array([0.0, 0.5, 1.0])).shape
    (3, 2, 2)
    """
    x, z, rows_mask = checks.features_and_proxies(image_features, text_proxies, mask)
    checked = in_float32(settings, logit_scale)
    rows = Rows(rows_mask, features=x, fold=random_splits(key, x.shape[0]) if settings.auto else None)
    return _fit(rows, z, for_rows(checked, rows, z.shape[0]))


@jax.jit
def _fit(rows: Rows, text: jax.Array, settings: Checked) -> ProxyResult:
    def run(rows: Rows, text: jax.Array, settings: Checked) -> ProxyResult:
        return whole_method(task_of(rows, text, settings), settings)

    return where_rows_lie(run, settings.sharding)(rows, text, settings)


def task_of(rows: Rows, text: jax.Array, settings: Checked) -> Task:
    """The rows of a device seen block by block, with classes [C, E]."""
    reduce = Blocks(rows, settings.block_size, settings.row_axes)
    return Task(reduce, reduce.num_images, text.shape[0], normalize(text))
