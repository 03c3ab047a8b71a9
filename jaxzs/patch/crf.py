"""Dense conditional random field (Kraehenbuehl and Koltun 2011, arXiv 1210.5644): mean field, in two ways.

Every pixel sums over all others with weights exp(-|f_i - f_j|^2 / 2). Exactly, the terms are attention without the
softmax: rows of that kernel are made in blocks, so that the N x N matrix never exists. On permutohedral lattices
(`lattice.py`), as pydensecrf has it, they are linear in the pixels. Potts compatibility, symmetric normalisation.
Axis letters: B photos, N = H*W pixels, S of them as sources, C labels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.errors import DataError, ImageError, renamed
from jaxzs.patch.batching import padded_side
from jaxzs.patch.lattice import Lattice, blur, build, padded
from jaxzs.patch.settings import CRF, is_known

_BLOCK_ELEMENTS = 2**24  # of the kernel held at once, 64 MiB
MOST_POINTS = 2**21  # of a lattice: about 2 GB while it is built
_LEAST_CORNERS = 2**16  # of a padded lattice: fewer save milliseconds, and cost seconds of compiling another program
_SMALL, _SMALL_LABELS = 2**14, 8  # pixels; such photos share one program whatever their labels, up to so many
_CLIP_ES_MEAN = (104.008, 116.669, 122.675)  # of BGR


@renamed(**{name: f"settings=patch.CRF({name}=...)" for name in CRF.__dataclass_fields__})
def dense_crf(probabilities: jax.Array | np.ndarray, image: jax.Array | np.ndarray, settings: CRF = CRF()) -> jax.Array:
    """Label probabilities sharpened along the edges of the photo: [C,H,W] float32, summing to 1 over C.

    Args:
      probabilities: [C,H,W], 0 to 1, need not sum to 1; the unary term is -log(clip(p, 1e-5, 1)). Or [B,C,H,W].
      image: [H,W,3] with levels 0 to 255. Or [B,H,W,3].
      settings: `CRF`, by default the values of CLIP-ES. Its kernel says what is differentiable.

    Returns:
      The mean field, of the shape of the probabilities.

    Raises:
      ImageError: the image does not fit the probabilities, has other levels, or is too large for the memory that the
        lattice may take.
      DataError: a lattice where photo or widths are traced, or whose widths are too small.

    >>> image = np.zeros((4, 6, 3), np.uint8)
    >>> image[:, 3:] = 255
    >>> probabilities = np.full((2, 4, 6), 0.5, np.float32)
    >>> probabilities[:, 0, 0], probabilities[:, 0, 5] = (0.9, 0.1), (0.1, 0.9)  # all that is known
    >>> np.asarray(patch.dense_crf(probabilities, image)).argmax(0)[2].tolist()
    [0, 0, 0, 1, 1, 1]
    """
    probabilities, image = (x if hasattr(x, "shape") else np.asarray(x) for x in (probabilities, image))
    _check_photo(probabilities, image)
    if np.ndim(probabilities) == 4:
        return _of_batch(probabilities, image, settings)
    if _on_lattice(image, settings):
        return _lattice_field(probabilities, np.asarray(image), settings)
    return _exact_field(jnp.asarray(probabilities, jnp.float32), jnp.asarray(image).astype(jnp.float32), settings)


def _check_photo(probabilities: jax.Array | np.ndarray, image: jax.Array | np.ndarray) -> None:
    *batch, _, height, width = shape = tuple(probabilities.shape)
    if len(shape) not in (3, 4) or 0 in shape or tuple(image.shape) != (*batch, height, width, 3):
        raise ImageError(
            f"probabilities have shape {shape} and the image {tuple(image.shape)}, expected [C,H,W] "
            "and [H,W,3] of the same height and width"
        )
    for name, values in (("probabilities", probabilities), ("the image's levels", image)):
        if is_known(values) and not np.isfinite(np.asarray(values, np.float32)).all():
            raise ImageError(f"{name} are not all finite")
    if is_known(image):
        lowest, highest = float(image.min()), float(image.max())
        if lowest < 0 or highest > 255:
            raise ImageError(
                f"the image's levels are from {lowest:.4g} to {highest:.4g}, expected 0 to 255: pass the photo itself, "
                "not the normalised pixels that encoders take"
            )


def _on_lattice(image: jax.Array | np.ndarray, settings: CRF) -> bool:
    """Whether the lattice is asked for, or the better choice. It is built on the host, from numbers."""
    widths = settings.smooth_sigma, settings.bilateral_sigma, settings.colour_sigma
    known = is_known(image) and all(is_known(width) and np.ndim(width) == 0 for width in widths)
    if settings.kernel == "lattice" and not known:
        raise DataError("the lattice is built on the host from photo and widths, which are traced here: take 'exact'")
    if settings.kernel != "auto":
        return settings.kernel == "lattice"
    return known and settings.stride == 1 and jax.default_backend() == "cpu"


def _of_batch(probabilities: jax.Array | np.ndarray, image: jax.Array | np.ndarray, settings: CRF) -> jax.Array:
    """Photo after photo, in one program: a photo fills a machine, and its kernel the memory."""
    if not _on_lattice(image, settings):
        photos = jnp.asarray(probabilities, jnp.float32), jnp.asarray(image).astype(jnp.float32)
        return jax.lax.map(lambda photo: _exact_field(*photo, settings), photos)
    return jnp.stack([_lattice_field(*photo, settings) for photo in zip(probabilities, np.asarray(image), strict=True)])


def for_crf(photo: np.ndarray) -> np.ndarray:
    """The photo, or a smaller one where its pixels would be more than a CRF takes: 12 megapixels become 2."""
    from PIL import Image

    height, width, _ = photo.shape
    shrink = (MOST_POINTS / (height * width)) ** 0.5
    if shrink >= 1:
        return photo
    size = max(1, int(width * shrink)), max(1, int(height * shrink))
    return np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.BOX))


def nearest(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Labels [h,w] at another size, each of the pixel that it lies in: what was sharpened smaller, at its own size."""
    row, column = (np.arange(n) * old // n for n, old in zip((height, width), labels.shape, strict=True))
    return labels[row[:, None], column[None, :]]  # [height,width]


# --- on lattices ------------------------------------------------------------------------------------


def _lattice_field(probabilities: jax.Array | np.ndarray, image: np.ndarray, settings: CRF) -> jax.Array:
    """The mean field of one photo. Pixels, corners and labels are padded: photos of many sizes share few programs."""
    C, height, width = probabilities.shape
    num = height * width
    labels = _SMALL_LABELS if num <= _SMALL and C <= _SMALL_LABELS else C if C <= 4 else padded_side(C, 2)
    if num > MOST_POINTS:
        raise ImageError(
            f"{height}x{width} pixels are more than the {MOST_POINTS} that a CRF takes at once: sharpen a smaller "
            "picture and enlarge what comes out"
        )
    points = padded_side(num, 256)
    lattices = tuple(
        padded(one, points, padded_side(max(one.neighbours.shape[2], _LEAST_CORNERS), 256))
        for one in (
            _places(height, width, float(settings.smooth_sigma)),
            build(_features(image, float(settings.bilateral_sigma), float(settings.colour_sigma))),
        )
    )
    array = jnp if isinstance(probabilities, jax.Array) else np  # padding on the host compiles nothing
    flat = array.asarray(probabilities, np.float32).reshape(C, num).T  # [N,C]
    flat = array.pad(flat, ((0, points - num), (0, labels - C)))  # [points,labels]
    present = np.arange(labels) < C
    weights = jnp.float32(settings.smooth_weight), jnp.float32(settings.bilateral_weight)
    field = _mean_field_on(flat, present, (lattices, weights), iterations=settings.iterations)
    if isinstance(probabilities, jax.Array):
        return field[:num, :C].T.reshape(C, height, width)  # [C,H,W]
    found = np.ascontiguousarray(np.asarray(field)[:num, :C].T).reshape(C, height, width)
    return jax.device_put(found)  # jnp.asarray would compile a program for every size


@functools.lru_cache(maxsize=8)  # photos of one size share it
def _places(height: int, width: int, sigma: float) -> Lattice:
    return build(_grid_places(height, width) / np.float32(sigma))


def _grid_places(height: int, width: int) -> np.ndarray:
    """Column and row of each pixel: [N,2] float32."""
    row, column = np.indices((height, width), np.float32)  # [H,W] each
    return np.stack([column.ravel(), row.ravel()], axis=1)  # [N,2]


def _features(image: np.ndarray, sigma: float, colour_sigma: float) -> np.ndarray:
    """Place and colour of each pixel in units of their widths: image [H,W,3] -> [N,5]."""
    places = _grid_places(*image.shape[:2]) / np.float32(sigma)  # [N,2]
    return np.concatenate([places, image.reshape(-1, 3).astype(np.float32) / np.float32(colour_sigma)], axis=1)


@functools.partial(jax.jit, static_argnames="iterations")
def _mean_field_on(
    probabilities: jax.Array,
    present: jax.Array,
    weighted: tuple[tuple[Lattice, ...], tuple[jax.Array, ...]],
    *,
    iterations: int,
) -> jax.Array:
    """Mean field of pixels [N,C], of which labels only `present` [C] exist. weighted: lattices and their weights."""
    unary = jnp.where(present[None], -jnp.log(jnp.clip(probabilities, 1e-5, 1.0)), jnp.inf)  # [N,C]
    terms = [Term(functools.partial(blur, lattice), weight) for lattice, weight in zip(*weighted, strict=True)]
    return _iterate(unary, terms, iterations)


class Term(NamedTuple):
    """A way in which pixels are joined. sums: [N,C] -> [N,C], the sum over all that a pixel is joined with."""

    sums: Callable[[jax.Array], jax.Array]
    weight: jax.Array | float


def _iterate(unary: jax.Array, terms: Sequence[Term], iterations: int) -> jax.Array:
    """Labels of pixels by their own evidence and by what those that each term joins them with hold: [N,C]."""
    ones = jnp.ones((len(unary), 1), jnp.float32)
    norms = [jax.lax.rsqrt(term.sums(ones) + 1e-20) for term in terms]  # [N,1], on both sides of the kernel

    def step(field: jax.Array, _: None) -> tuple[jax.Array, None]:
        logits = -unary
        for term, norm in zip(terms, norms, strict=True):
            logits = logits + term.weight * norm * term.sums(norm * field)  # Potts: what agrees is rewarded
        return jax.nn.softmax(logits, axis=1), None  # [N,C]

    return jax.lax.scan(step, jax.nn.softmax(-unary, axis=1), length=iterations)[0]


# --- exactly ----------------------------------------------------------------------------------------


@jax.jit
def _exact_field(probabilities: jax.Array, image: jax.Array, settings: CRF) -> jax.Array:
    C, height, width = probabilities.shape
    unary = -jnp.log(jnp.clip(probabilities, 1e-5, 1.0)).reshape(C, -1).T  # [N,C]
    features = bilateral_features(image, settings.bilateral_sigma, settings.colour_sigma)  # [H,W,5]
    every = slice(None, None, settings.stride)
    targets, sources = features.reshape(-1, 5), features[every, every].reshape(-1, 5)  # [N,5], [S,5]

    def smooth(values: jax.Array) -> jax.Array:
        """Sum over the neighbourhood of each pixel: [N,C] -> [N,C]."""
        return _smooth(values, height, width, settings.smooth_sigma)

    def bilateral(values: jax.Array) -> jax.Array:
        """Sum over sources, each for the pixels around it: [N,C] -> [N,C]."""
        taken = values.reshape(height, width, -1)[every, every].reshape(len(sources), -1)  # [S,C]
        return float(settings.stride**2) * _kernel_product(targets, sources, taken, settings.precision)

    terms = Term(smooth, settings.smooth_weight), Term(bilateral, settings.bilateral_weight)
    field = _iterate(unary, terms, settings.iterations)  # [N,C]
    return field.T.reshape(C, height, width)  # [C,H,W]


def bilateral_features(image: jax.Array, sigma: jax.Array, colour_sigma: jax.Array) -> jax.Array:
    """Position and colour of each pixel in units of their sigmas, centred: image [H,W,3] -> [H,W,5]."""
    height, width, _ = image.shape
    row = jnp.broadcast_to(jnp.arange(height, dtype=jnp.float32)[:, None], (height, width))
    column = jnp.broadcast_to(jnp.arange(width, dtype=jnp.float32)[None, :], (height, width))
    place = jnp.stack([row, column], axis=-1) / sigma  # [H,W,2]
    features = jnp.concatenate([place, image / colour_sigma], axis=-1)  # [H,W,5]
    # Distances come from products of features: the smaller these are, the less cancels.
    return features - features.mean((0, 1), keepdims=True)


def _smooth(values: jax.Array, height: int, width: int, sigma: jax.Array) -> jax.Array:
    """Gaussian over positions, self included, separable: values [N,C] -> [N,C]."""
    C = values.shape[1]
    down, across = (jnp.exp(-0.5 * jnp.square(_differences(n) / sigma)) for n in (height, width))  # [H,H], [W,W]
    highest = jax.lax.Precision.HIGHEST
    blurred = jnp.einsum("xc,rcl->rxl", across, values.reshape(height, width, C), precision=highest)  # [H,W,C]
    return jnp.einsum("yr,rxl->yxl", down, blurred, precision=highest).reshape(-1, C)  # [N,C]


def _differences(n: int) -> jax.Array:
    """i - j: [n,n] float32."""
    place = jnp.arange(n, dtype=jnp.float32)
    return place[:, None] - place[None, :]  # [n,n]


def _kernel_product(
    targets: jax.Array, sources: jax.Array, values: jax.Array, precision: jax.lax.PrecisionLike
) -> jax.Array:
    """sum_j exp(-|f_i - f_j|^2 / 2) v_j, rows in blocks: targets [N,5], sources [S,5], values [S,C] -> [N,C]."""
    num, num_sources = len(targets), len(sources)
    block = max(1, min(num, _BLOCK_ELEMENTS // num_sources))
    count = math.ceil(num / block)
    blocks = jnp.pad(targets, ((0, count * block - num), (0, 0))).reshape(count, block, -1)  # [blocks,n,5]
    source_norms = 0.5 * jnp.square(sources).sum(1)  # [S]

    @jax.checkpoint  # the gradient makes each block anew instead of keeping it
    def rows(block_of_targets: jax.Array) -> jax.Array:
        products = jnp.matmul(block_of_targets, sources.T, precision=precision)  # [n,S]
        norms = 0.5 * jnp.square(block_of_targets).sum(1)  # [n]
        exponent = products - norms[:, None] - source_norms[None, :]  # -|f_i - f_j|^2 / 2, by the binomial formula
        kernel = jnp.exp(jnp.minimum(exponent, 0.0))  # [n,S]; by rounding, exponents may exceed 0
        return jnp.matmul(kernel, values, precision=precision)  # [n,C]

    return jax.lax.map(rows, blocks).reshape(count * block, -1)[:num]  # [N,C]


def clip_es_colours(image: np.ndarray) -> np.ndarray:
    """The picture that the original gives its CRF: BGR minus a mean, cast to 8 bits with wrap-around: [H,W,3] uint8."""
    shifted = np.asarray(image)[..., ::-1].astype(np.float32) - np.array(_CLIP_ES_MEAN, np.float32)  # [H,W,BGR]
    return shifted.astype(np.int32).astype(np.uint8)  # negative levels wrap around, the trap of the original
