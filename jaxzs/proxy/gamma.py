"""The choice of gamma without labels: held-out cross-entropy of the closed form, over several splits into halves."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxzs.proxy import checks
from jaxzs.proxy.closed_form import LabelSums, closed_form, feature_sums, labelled_sums, precondition
from jaxzs.proxy.rows import EXACT, Rows
from jaxzs.proxy.settings import Checked
from jaxzs.proxy.sinkhorn import Task, rounded_labels, similarity_of, sinkhorn

GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)
MOST_SPLITS, FEWEST_SPLITS = 8, 2  # of the images into halves: one alone lets the key decide where images are few
IMAGES_SPLIT = 40_000  # images times splits: halves of many images differ little
PARTS = 8  # of a block: the fewer, the more rows of padding, at most one part in all


def random_splits(key: Any, num_rows: int) -> jax.Array:
    """Several splits of the images into halves: [N,S] bool. Without a key always the same ones."""
    splits = min(max(IMAGES_SPLIT // max(num_rows, 1), FEWEST_SPLITS), MOST_SPLITS)
    # All keys whatever the number of splits: two splits are then the first two of eight.
    keys = jax.random.split(jax.random.key(0) if key is None else checks.random_key(key), MOST_SPLITS)
    return jnp.stack([jax.random.bernoulli(k, 0.5, (num_rows,)) for k in keys[:splits]], axis=1)


class Parts(NamedTuple):
    """The rows of a block in the order of their halves, in parts of equal size that are of one half each."""

    index: jax.Array  # type: ignore[assignment] # [P,b] rows of the block; a field in the place of tuple.index
    mask: jax.Array  # [P,b] False where a half has no more rows
    half: jax.Array  # [P] 0 or 1


def parts_of(fold: jax.Array) -> Parts:
    """The parts of a split [B]: a product of a part serves its half alone, and none is of rows masked by halves."""
    num_rows = fold.shape[0]
    size = -(-num_rows // PARTS)
    # Each half fills its last part up: together at most one part more than the rows need.
    slots = jnp.arange((-(-num_rows // size) + 1) * size).reshape(-1, size)  # [P,b]
    in_first = num_rows - jnp.sum(fold)
    second = -(-in_first // size) * size  # where it begins
    place = jnp.where(slots < second, slots, slots - second + in_first)
    mask = place < jnp.where(slots < second, in_first, num_rows)
    order = jnp.argsort(fold, stable=True)  # rows of the first half, then those of the second
    return Parts(order[jnp.minimum(place, num_rows - 1)], mask, (slots[:, 0] >= second).astype(jnp.int32))


def rows_of(rows: Rows, index: jax.Array, mask: jax.Array) -> Rows:
    """Some rows of a block; the masked ones are zeros."""
    mask = mask & rows.mask[index]
    return Rows(mask, jnp.where(mask[:, None], rows.features[index], jnp.float32(0)))


def sums_by_split(rows: Rows, text: jax.Array | None, potentials: jax.Array, settings: Checked) -> LabelSums:
    """Label sums of a block, split by split and half by half: leaves [S,2,...], labelled and mass [S,2,G,...]."""
    similarity = similarity_of(rows, text)  # [B,C]

    def sums_of_part(index: jax.Array, mask: jax.Array) -> LabelSums:
        part = rows_of(rows, index, mask)
        own = similarity[index]  # [b,C]
        # Potentials one by one: equal labels must give equal bits, or rounding would decide between them.
        products, masses = jax.lax.map(lambda v: labelled_sums(part, rounded_labels(own, v, settings)), potentials)
        return LabelSums(products, masses, *feature_sums(part))

    def of(fold: jax.Array) -> LabelSums:
        parts = parts_of(fold)

        def add(halves: LabelSums, part: Parts) -> tuple[LabelSums, None]:
            own = sums_of_part(part.index, part.mask)
            return jax.tree.map(lambda total, new: total.at[part.half].add(new), halves, own), None

        shapes = jax.eval_shape(sums_of_part, parts.index[0], parts.mask[0])
        return jax.lax.scan(add, jax.tree.map(lambda s: jnp.zeros((2, *s.shape), s.dtype), shapes), parts)[0]

    return jax.lax.map(of, rows.fold.T)


def losses_by_split(
    rows: Rows, text: jax.Array | None, potentials: jax.Array, proxies: jax.Array, settings: Checked
) -> jax.Array:
    """Cross-entropy of a block's labels with the proxies [S,2,G,C,E] that are fitted on the other half: [S,G]."""
    similarity = similarity_of(rows, text)  # [B,C]

    def of(split: tuple[jax.Array, jax.Array]) -> jax.Array:
        fold, own = split

        def of_part(part: Parts) -> jax.Array:
            some = rows_of(rows, part.index, part.mask)
            of_rows = similarity[part.index]  # [b,C]

            def one(arguments: tuple[jax.Array, jax.Array]) -> jax.Array:
                potentials, fitted = arguments
                logits = EXACT.logits(some.features, fitted) / settings.temperature  # [b,C]
                # Not by the sums of the labels, as the solvers: losses of nearly sure labels would drown in rounding.
                labels = rounded_labels(of_rows, potentials, settings)
                loss = -jnp.sum(labels * jax.nn.log_softmax(logits, axis=-1), axis=-1)  # [b]
                return jnp.sum(jnp.where(some.mask, loss, jnp.float32(0)))

            # By the proxies of the other half, which these rows have not helped to fit.
            return jax.lax.map(one, (potentials, own[1 - part.half]))  # [G]

        return jnp.sum(jax.lax.map(of_part, parts_of(fold)), axis=0)

    return jax.lax.map(of, (rows.fold.T, proxies))


@jax.jit
def closed_forms(sums: LabelSums, ridge: jax.Array) -> jax.Array:
    """Proxies [G, C, E] of labels [G, ...] of the same images."""
    inverse = precondition(sums, ridge)  # [E,E] of the images alone: one for all labels

    def one(labelled: jax.Array, mass: jax.Array) -> jax.Array:
        return closed_form(sums._replace(labelled=labelled, mass=mass), inverse)

    return jax.vmap(one)(sums.labelled, sums.mass)


class Compared(NamedTuple):
    """What the splits say of each gamma of `GAMMAS`, and what who goes on with one of them needs."""

    losses: jax.Array  # [S,G] cross-entropy of one half's labels under the proxies of the other
    potentials: jax.Array  # [G,C]
    sums: LabelSums  # of all images, labelled and mass [G,...]

    def of_gamma(self, index: jax.Array) -> tuple[jax.Array, LabelSums]:
        """Potentials [C] and label sums of one gamma."""
        labelled, mass = self.sums.labelled[index], self.sums.mass[index]
        return self.potentials[index], self.sums._replace(labelled=labelled, mass=mass)


def compared(task: Task, settings: Checked) -> Compared:
    """How badly the closed form of one half predicts the other, for each split and gamma."""
    # Labels are those of all images, for each gamma; only the proxies are of a half. Those of gamma 1 are the text's.
    scaled = sinkhorn(task, jnp.array(GAMMAS[:-1], jnp.float32), settings)
    potentials = jnp.concatenate([scaled, jnp.zeros_like(scaled[:1])])  # [G,C]
    sums = task.reduce(sums_by_split, task.text, potentials, settings)

    def of_halves(halves: LabelSums) -> jax.Array:
        return jax.lax.map(lambda half: closed_forms(half, settings.ridge), halves)  # [2,G,C,E]

    # One after the other: LAPACK's batched triangular solve waits, inside the threads that compute, for those threads.
    # Several host devices on two cores then wait for ever (jaxlib 0.10).
    proxies = jax.lax.map(of_halves, sums)  # [S,2,G,C,E]
    losses = task.reduce(losses_by_split, task.text, potentials, proxies, settings)
    whole = jax.tree.map(lambda leaf: leaf[0, 0] + leaf[0, 1], sums)  # of any split
    return Compared(losses, potentials, whole)


def with_gamma(task: Task, settings: Checked) -> tuple[jax.Array, LabelSums | None]:
    """Class potentials [C] of the gamma that is given or chosen; the sums of its labels where choosing has had them."""
    if settings.auto:
        found = compared(task, settings)
        return found.of_gamma(best_gamma(found.losses))
    return sinkhorn(task, settings.gamma[None], settings)[0], None


def best_gamma(losses: jax.Array) -> jax.Array:
    """The index in `GAMMAS` with the least loss [S,G] over all splits: []."""
    # Losses are added up: a clear split counts more than one in which all balances are alike.
    return jnp.argmin(jnp.sum(losses, axis=0))
