"""Dense conditional random field (Kraehenbuehl and Koltun 2011, arXiv 1210.5644): mean field without a lattice.

The fully connected Gaussian terms are attention without the softmax: every pixel sums over all others with weights
exp(-|f_i - f_j|^2 / 2). Rows of that kernel are made in blocks, so that the N x N matrix never exists. Potts
compatibility, symmetric normalisation: what pydensecrf does by default, without its approximation.
Axis letters: N = H*W pixels, S of them as sources, C labels.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.errors import ImageError, renamed
from jaxzs.patch.settings import CRF, is_known

_BLOCK_ELEMENTS = 2**24  # of the kernel held at once, 64 MiB
_CLIP_ES_MEAN = (104.008, 116.669, 122.675)  # of BGR


@renamed(**{name: f"settings=patch.CRF({name}=...)" for name in CRF.__dataclass_fields__})
def dense_crf(probabilities: jax.Array | np.ndarray, image: jax.Array | np.ndarray, settings: CRF = CRF()) -> jax.Array:
    """Label probabilities sharpened along the edges of the photo: [C,H,W] float32, summing to 1 over C.

    Args:
      probabilities: [C,H,W], 0 to 1, need not sum to 1; the unary term is -log(clip(p, 1e-5, 1)).
      image: [H,W,3] with levels 0 to 255.
      settings: `CRF`, by default the values of CLIP-ES.

    Returns:
      The mean field. Differentiable in `probabilities` and `image`.

    Raises:
      ImageError: the image does not fit the probabilities. DataError: numbers out of range.

    >>> image = np.zeros((4, 6, 3), np.uint8)
    >>> image[:, 3:] = 255
    >>> probabilities = np.full((2, 4, 6), 0.5, np.float32)
    >>> probabilities[:, 0, 0], probabilities[:, 0, 5] = (0.9, 0.1), (0.1, 0.9)  # all that is known
    >>> np.asarray(patch.dense_crf(probabilities, image)).argmax(0)[2].tolist()
    [0, 0, 0, 1, 1, 1]
    """
    shape = tuple(probabilities.shape)
    if len(shape) != 3 or shape[0] < 1 or tuple(image.shape) != (*shape[1:], 3):
        raise ImageError(
            f"probabilities have shape {shape} and the image {tuple(image.shape)}, expected [C,H,W] "
            "and [H,W,3] of the same height and width"
        )
    for name, values in (("probabilities", probabilities), ("the image's levels", image)):
        if is_known(values) and not np.isfinite(np.asarray(values, np.float32)).all():
            raise ImageError(f"{name} are not all finite")
    return _mean_field(jnp.asarray(probabilities, jnp.float32), jnp.asarray(image).astype(jnp.float32), settings)


@jax.jit
def _mean_field(probabilities: jax.Array, image: jax.Array, settings: CRF) -> jax.Array:
    C, height, width = probabilities.shape
    unary = -jnp.log(jnp.clip(probabilities, 1e-5, 1.0)).reshape(C, -1).T  # [N,C]
    features = bilateral_features(image, settings.bilateral_sigma, settings.colour_sigma)  # [H,W,5]
    targets = features.reshape(-1, 5)
    sources = features[:: settings.stride, :: settings.stride].reshape(-1, 5)
    every = jnp.arange(height * width).reshape(height, width)[:: settings.stride, :: settings.stride].reshape(-1)

    def smooth(values: jax.Array) -> jax.Array:
        """Sum over the neighbourhood of each pixel: [N,C] -> [N,C]."""
        return _smooth(values, height, width, settings.smooth_sigma)

    def bilateral(values: jax.Array) -> jax.Array:
        """Sum over sources, each for the pixels around it: [N,C] -> [N,C]."""
        return float(settings.stride**2) * _kernel_product(targets, sources, values[every], settings.precision)

    ones = jnp.ones((height * width, 1), jnp.float32)
    weights = settings.smooth_weight, settings.bilateral_weight
    norms = [jax.lax.rsqrt(term(ones) + 1e-20) for term in (smooth, bilateral)]

    def step(field: jax.Array, _: None) -> tuple[jax.Array, None]:
        logits = -unary
        for weight, norm, term in zip(weights, norms, (smooth, bilateral), strict=True):
            logits = logits + weight * norm * term(norm * field)
        return jax.nn.softmax(logits, axis=1), None

    field, _ = jax.lax.scan(step, jax.nn.softmax(-unary, axis=1), length=settings.iterations)
    return field.T.reshape(C, height, width)


def bilateral_features(image: jax.Array, sigma: jax.Array, colour_sigma: jax.Array) -> jax.Array:
    """Position and colour of each pixel in units of their sigmas, centred: image [H,W,3] -> [H,W,5]."""
    height, width, _ = image.shape
    row = jnp.broadcast_to(jnp.arange(height, dtype=jnp.float32)[:, None], (height, width))
    column = jnp.broadcast_to(jnp.arange(width, dtype=jnp.float32)[None, :], (height, width))
    place = jnp.stack([row, column], axis=-1) / sigma
    features = jnp.concatenate([place, image / colour_sigma], axis=-1)
    # Distances come from products of features: the smaller these are, the less cancels.
    return features - features.mean((0, 1), keepdims=True)


def _smooth(values: jax.Array, height: int, width: int, sigma: jax.Array) -> jax.Array:
    """Gaussian over positions, self included, separable: values [N,C] -> [N,C]."""
    C = values.shape[1]
    down, across = (jnp.exp(-0.5 * jnp.square(_differences(n) / sigma)) for n in (height, width))
    highest = jax.lax.Precision.HIGHEST
    blurred = jnp.einsum("xc,rcl->rxl", across, values.reshape(height, width, C), precision=highest)
    return jnp.einsum("yr,rxl->yxl", down, blurred, precision=highest).reshape(-1, C)


def _differences(n: int) -> jax.Array:
    """i - j: [n,n] float32."""
    place = jnp.arange(n, dtype=jnp.float32)
    return place[:, None] - place[None, :]


def _kernel_product(
    targets: jax.Array, sources: jax.Array, values: jax.Array, precision: jax.lax.PrecisionLike
) -> jax.Array:
    """sum_j exp(-|f_i - f_j|^2 / 2) v_j, rows in blocks: targets [N,5], sources [S,5], values [S,C] -> [N,C]."""
    num, num_sources = len(targets), len(sources)
    block = max(1, min(num, _BLOCK_ELEMENTS // num_sources))
    count = math.ceil(num / block)
    blocks = jnp.pad(targets, ((0, count * block - num), (0, 0))).reshape(count, block, -1)
    source_norms = 0.5 * jnp.square(sources).sum(1)

    @jax.checkpoint  # the gradient makes each block anew instead of keeping it
    def rows(block_of_targets: jax.Array) -> jax.Array:
        products = jnp.matmul(block_of_targets, sources.T, precision=precision)
        norms = 0.5 * jnp.square(block_of_targets).sum(1)
        exponent = products - norms[:, None] - source_norms[None, :]
        return jnp.matmul(jnp.exp(jnp.minimum(exponent, 0.0)), values, precision=precision)

    return jax.lax.map(rows, blocks).reshape(count * block, -1)[:num]


def clip_es_colours(image: np.ndarray) -> np.ndarray:
    """The picture that the original gives its CRF: BGR minus a mean, cast to 8 bits with wrap-around: [H,W,3] uint8."""
    shifted = np.asarray(image)[..., ::-1].astype(np.float32) - np.array(_CLIP_ES_MEAN, np.float32)
    return shifted.astype(np.int32).astype(np.uint8)
