"""A patch classifier learned from unlabelled images (PIAA, ICML 2026), and tags by it.

The patches that CLIP is most certain of teach a discriminant of patches, which sees what the texts alone do not. Of
each class the K most certain patches are kept while the images stream by, equal to the best K of all; one discriminant
is fitted to them, one more to those of them that it is sure of.
Axis letters: B images, P patches, E embedding, C classes, K patches kept of a class.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.adapt import Head
from jaxzs.clip import Model, ResNetConfig, VisionConfig
from jaxzs.clip.layers import Numerics
from jaxzs.clip.model import normalize
from jaxzs.clip.preprocess import to_rgb
from jaxzs.errors import DataError
from jaxzs.patch.batching import SIXTEEN, Batching, usable
from jaxzs.patch.boxes import min_max, tight_boxes
from jaxzs.patch.dense import Attention, DenseTask, check_last, default_attention, dense_and_whole, last_of
from jaxzs.patch.grid import full_grid
from jaxzs.patch.images import ImageTags, on_mesh
from jaxzs.patch.settings import check_positive, check_share, check_whole, is_known
from jaxzs.patch.tags import check_foreground, check_pixels, decide

_HIGHEST = jax.lax.Precision.HIGHEST
_LEAST_SPREAD = 1e-6  # of features of length 1: scores stay below 1e9, where float32 still tells them apart


class PatchClassifier(NamedTuple):
    """A linear classifier of normalised patches, scores = x weights^T + bias, and the texts it started from.

    weights: [C,E]. bias: [C]. text_proxies: [C,E] normalised. All float32; a pytree.

    >>> classifier = patch.PatchClassifier(jnp.eye(2), jnp.zeros(2), jnp.eye(2))
    >>> print(adapt.scores(classifier.head, jnp.array([[3.0, 4.0]])))  # a head of `jaxzs.adapt`
    [[0.6 0.8]]
    """

    weights: jax.Array
    bias: jax.Array
    text_proxies: jax.Array

    @property
    def head(self) -> Head:
        """The same scores as a head, for patches or whatever else is a normalised feature."""
        return Head(self.weights, self.bias)


class Bank(NamedTuple):
    """The most certain patches of each class, best first. features [C,K,E]; log_entropy [C,K] of their probabilities,
    +inf where there is none; probability [C,K] of the class."""

    features: jax.Array
    log_entropy: jax.Array
    probability: jax.Array


def learn_patch_classifier(
    patch_features: jax.Array | np.ndarray | Iterable[jax.Array | np.ndarray],
    text_proxies: jax.Array | np.ndarray,
    *,
    per_class: int = 512,
    scale: float | jax.Array = 60.0,
    temperature: float | jax.Array | None = 0.01,
) -> PatchClassifier:
    """Learn to tell patches apart, without labels: PIAA, ICML 2026.

    Args:
      patch_features: [images,P,E] of `dense_features`, or an iterable of such blocks, of a store of any size; each is
        read once. L2-normalised here.
      text_proxies: [C,E]; L2-normalised here.
      per_class: K.
      scale: of the cosines when certainty is judged.
      temperature: factor of the first discriminant's scores when it chooses from the bank; None keeps the first
        discriminant. The authors set it by data set (100 for VOC, where everything is kept, 0.01 for COCO).

    Raises `DataError` for shapes that do not fit, values that are not finite, or no patches at all.

    >>> texts = np.eye(3, dtype=np.float32)
    >>> images = (texts[:, None] + 0.1 * np.random.default_rng(0).normal(size=(3, 20, 3))).astype(np.float32)
    >>> classifier = patch.learn_patch_classifier(images, texts, per_class=10)
    >>> patch.tag_with(classifier, images, images.mean(1)).argmax(1).tolist()
    [0, 1, 2]
    """
    text = normalize(_checked("text_proxies", text_proxies, 2))
    check_whole("per_class", per_class)
    check_positive("scale", scale)
    if temperature is not None:
        check_positive("temperature", temperature)
    C, E = text.shape
    bank = Bank(jnp.zeros((C, per_class, E)), jnp.full((C, per_class), jnp.inf), jnp.zeros((C, per_class)))
    for block in [patch_features] if hasattr(patch_features, "shape") else patch_features:
        features = _checked("patch_features", block, 3)
        if features.shape[2] != E:
            raise DataError(f"patch_features have {features.shape[2]} numbers a patch, text_proxies {E}")
        bank = kept(bank, features.reshape(-1, E), text, jnp.asarray(scale, jnp.float32))
    if not bool(_there(bank).any()):
        raise DataError("there are no patches to learn from")
    factor = None if temperature is None else jnp.asarray(temperature, jnp.float32)
    weights, bias = _fit(bank, text, factor)
    return PatchClassifier(weights, bias, text)


@jax.jit
def kept(bank: Bank, patches: jax.Array, text: jax.Array, scale: jax.Array) -> Bank:
    """The bank after more patches [n,E]: of each class the K of lowest entropy, the earlier ones where equal."""
    K = bank.log_entropy.shape[1]
    x = normalize(patches)
    logits = scale * jnp.matmul(x, text.T, precision=_HIGHEST)  # [n,C]
    own = jax.nn.one_hot(logits.argmax(1), len(text), axis=0, dtype=bool)  # [C,n]
    few = min(K, len(x))  # top_k takes no more than there are
    found, place = jax.lax.top_k(jnp.where(own, -log_entropy(logits)[None], -jnp.inf), few)  # [C,few] of this block
    candidates = jnp.concatenate([bank.log_entropy, -found], axis=1)  # [C,K+few]
    _, best = jax.lax.top_k(-candidates, K)  # [C,K]; of equals the earlier, which is what came before
    take = lambda rows: jnp.take_along_axis(rows, best, axis=1)  # noqa: E731
    return Bank(
        jnp.take_along_axis(jnp.concatenate([bank.features, x[place]], axis=1), best[:, :, None], axis=1),
        take(candidates),
        take(jnp.concatenate([bank.probability, jax.nn.softmax(logits).max(1)[place]], axis=1)),
    )


def log_entropy(logits: jax.Array) -> jax.Array:
    """Logarithm of the entropy of softmax(logits), however certain: [n,C] -> [n] float32; -inf for a single class.

    Patches that a bank is made of are so certain that their probabilities round to 1 and 0. With s the sum of
    exp(d) over the other classes, d their distances below the best, the entropy is log(1 + s) - sum exp(d) d / (1 + s):
    no part of it cancels, and all of it has a logarithm.
    """
    best = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=bool)  # [n,C]
    below = jnp.where(best, -jnp.inf, logits - logits.max(-1, keepdims=True))  # [n,C], d
    log_s = jax.nn.logsumexp(below, axis=-1)  # [n]
    log_total = jnp.log1p(jnp.exp(log_s))  # [n]
    of_best = jnp.where(log_s < -15, log_s, jnp.log(jnp.maximum(log_total, 1e-30)))  # log log(1 + s), which is log s
    of_others = jax.nn.logsumexp(below + jnp.log(jnp.where(best, 1.0, -below)), axis=-1) - log_total  # [n]
    return jnp.logaddexp(of_best, of_others)


def _there(bank: Bank) -> jax.Array:
    """Which places of the bank hold a patch: [C,K] bool."""
    return bank.log_entropy < jnp.inf


@jax.jit
def _fit(bank: Bank, text: jax.Array, temperature: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Weights [C,E] and bias [C] from a bank; temperature None: without the second look."""
    C, K, E = bank.features.shape
    x, probability = bank.features.reshape(-1, E), bank.probability.reshape(-1)  # [n,E], [n]
    label = jnp.repeat(jnp.arange(C), K)  # [n]
    there = _there(bank).reshape(-1)
    weights, bias = discriminant(Patches(x, label, jnp.where(there, probability, 0.0), there), text)
    if temperature is None:
        return weights, bias
    q = jax.nn.softmax(temperature * (jnp.matmul(x, weights.T, precision=_HIGHEST) + bias[None]))  # [n,C]
    label, probability = q.argmax(1), q.max(1)  # [n], [n]: the second look may change labels
    sure = there & (probability >= _threshold(probability, label, there, C)[label])  # [n]
    second = discriminant(Patches(x, label, jnp.where(sure, probability, 0.0), sure), text)
    # One patch a class at most says nothing of how patches of a class differ: the first look stays.
    enough = jax.ops.segment_sum(sure.astype(jnp.int32), label, C).max() > 1
    return jax.tree.map(lambda one, two: jnp.where(enough, two, one), (weights, bias), second)


def _threshold(probability: jax.Array, label: jax.Array, there: jax.Array, num_classes: int) -> jax.Array:
    """Mean and standard deviation (unbiased) of a class's probabilities, summed: [C]; a class of one keeps none."""
    own = (label[:, None] == jnp.arange(num_classes)[None]) & there[:, None]  # [n,C]
    count = own.sum(0, dtype=jnp.float32)  # [C]
    mean = jnp.where(own, probability[:, None], 0.0).sum(0) / jnp.maximum(count, 1.0)  # [C]
    squares = jnp.where(own, jnp.square(probability[:, None] - mean[None]), 0.0).sum(0)  # [C]
    return jnp.where(count > 1, mean + jnp.sqrt(squares / jnp.maximum(count - 1, 1.0)), jnp.inf)


class Patches(NamedTuple):
    """Patches to learn from. x [n,E]; label [n]; mass [n], what each counts in its class's mean; there [n] bool."""

    x: jax.Array
    label: jax.Array
    mass: jax.Array
    there: jax.Array


def discriminant(patches: Patches, text: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gaussian discriminant with one covariance, shrunk towards its trace (gda): weights [C,E] and bias [C].

    A class without patches has its text as mean.
    """
    x, label, mass, there = patches
    C, E = text.shape
    of_class = jnp.where(label[:, None] == jnp.arange(C)[None], mass[:, None], 0.0)  # [n,C]
    total = of_class.sum(0)  # [C]
    sums = jnp.matmul(of_class.T, x, precision=_HIGHEST)  # [C,E]
    means = jnp.where(total[:, None] > 0, sums / jnp.where(total > 0, total, 1.0)[:, None], text)  # [C,E]
    num = jnp.maximum(there.sum(dtype=jnp.float32), 2.0)
    away = jnp.where(there[:, None], x - means[label], 0.0)  # [n,E]
    away = jnp.where(there[:, None], away - away.sum(0)[None] / num, 0.0)  # centred, as torch.cov does
    scatter = jnp.matmul(away.T, away, precision=_HIGHEST)  # [E,E]
    # Inverts what fewer patches than E leave singular; patches that are all alike differ by rounding alone.
    ridge = jnp.maximum(jnp.trace(scatter) / (num - 1), _LEAST_SPREAD)
    precision = E * jnp.linalg.pinv(scatter + ridge * jnp.eye(E), hermitian=True)  # [E,E]
    weights = jnp.matmul(means, precision, precision=_HIGHEST)  # [C,E]
    return weights, -jnp.log(jnp.float32(C)) - 0.5 * (weights * means).sum(1)


def tag_with(
    classifier: PatchClassifier,
    patch_features: jax.Array | np.ndarray,
    global_features: jax.Array | np.ndarray,
    *,
    sharpness: float | jax.Array = 200.0,
    softness: float | jax.Array = 500.0,
    global_scale: float | jax.Array = 80.0,
    global_share: float | jax.Array = 0.1,
) -> jax.Array:
    """Scores of classes in images, by their best patches and a little by the whole: [B,C] float32, summing to 1.

    Args:
      classifier: of `learn_patch_classifier`.
      patch_features: [B,P,E]. global_features: [B,E] of `clip.encode_image`. Both are L2-normalised here.
      sharpness: of the softmax over each class's best patch; 200 for VOC, 400 for COCO.
      softness: by which the classifier's scores are divided in a patch's softmax.
      global_scale: of the cosines of the whole image. global_share: what these count, 0 to 1.

    All numbers may be traced. PIAA, ICML 2026. Raises `DataError` for shapes that do not fit or values not finite.

    >>> classifier = patch.PatchClassifier(100 * jnp.eye(2), jnp.zeros(2), jnp.eye(2))
    >>> patch.tag_with(classifier, jnp.eye(2)[None], jnp.array([[1.0, 0.0]])).argmax(1).tolist()
    [0]
    """
    x, whole = _checked("patch_features", patch_features, 3), _checked("global_features", global_features, 2)
    E = classifier.weights.shape[1]
    if x.shape[0] != whole.shape[0] or {x.shape[2], whole.shape[1]} != {E}:
        raise DataError(
            f"patch_features {x.shape} and global_features {whole.shape} do not fit a classifier of {E} numbers a patch"
        )
    for name, value in (("sharpness", sharpness), ("softness", softness), ("global_scale", global_scale)):
        check_positive(name, value)
    check_share("global_share", global_share)
    weighing = Weighing(sharpness, softness, global_scale, global_share)
    return _scores(classifier, x, whole, weighing.as_float32())[0]


class Weighing(NamedTuple):
    """Numbers of `tag_with`, as published for VOC: how patches and the whole image are weighed."""

    sharpness: float | jax.Array = 200.0
    softness: float | jax.Array = 500.0
    global_scale: float | jax.Array = 80.0
    global_share: float | jax.Array = 0.1

    def as_float32(self) -> Weighing:
        """As arrays, so that other numbers compile nothing."""
        return Weighing(*(jnp.asarray(number, jnp.float32) for number in self))


@jax.jit
def _scores(classifier, patches, whole, weighing):
    """Scores [B,C], and probabilities of patches [B,P,C]."""
    sharpness, softness, global_scale, global_share = weighing
    x = normalize(patches)
    logits = jnp.einsum("bpe,ce->bpc", x, classifier.weights, precision=_HIGHEST)  # [B,P,C]
    logits = logits + classifier.bias[None, None]
    of_patches = jax.nn.softmax(logits / softness)  # [B,P,C]
    cosine = jnp.matmul(normalize(whole), classifier.text_proxies.T, precision=_HIGHEST)  # [B,C]
    by_patches = jax.nn.softmax(sharpness * of_patches.max(1))  # [B,C]
    return global_share * jax.nn.softmax(global_scale * cosine) + (1 - global_share) * by_patches, of_patches


# --- from images ------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """A batch of images; only the first `len(numbers)` rows count. numbers: places among the images given.
    sizes: (height, width) of each. patches [B,P,E], whole [B,E], on the host."""

    numbers: list[int]
    sizes: list[tuple[int, int]]
    patches: np.ndarray
    whole: np.ndarray


def encoded_patches(
    model: Model,
    images: Iterable[Any],
    *,
    side: int | None = None,
    attention: Attention | None = None,
    batching: Batching = SIXTEEN,
    numerics: Numerics = Numerics(),
) -> Iterator[Encoded]:
    """Patch and image features of images of any sizes, each made a square of one size: `Encoded` batches.

    side: of the square in pixels, a multiple of the patch size; by default the size that the model was trained with. A
      larger one shows smaller things; its grid is [side/p,side/p].
    attention: of the last layer, see `dense_features`; by default "csa", of a ResNet "v".
    batching: how many images at a time, the devices that share them, and what becomes of those that cannot be used.

    >>> model = jaxzs.load("demo")
    >>> [batch] = patch.encoded_patches(model, [np.zeros((60, 90, 3), np.uint8)], batching=patch.Batching(2))
    >>> batch.numbers, batch.sizes, batch.patches.shape
    ([0], [(60, 90)], (2, 36, 64))
    """
    model.config.check_one_size()
    batching.check_one_view("encoded patches")
    side = _checked_side(model.config.vision, side, batching.max_patches)
    check_last(attention, "bicubic_offset")
    last = last_of(attention or default_attention(model.config, "csa"), None, "bicubic_offset", model.config)
    shared = model.params, jnp.float32(5)  # of NACLIP's neighbourhood
    run = on_mesh(patches_and_whole, shared, batching.mesh, DenseTask(model.config, last, numerics))
    size = batching.devices * -(-batching.batch_size // batching.devices)
    photos = usable(images, functools.partial(_squashed, model, side), batching)
    while some := list(itertools.islice(photos, size)):
        numbers, sizes, pixels = (list(part) for part in zip(*some, strict=True))
        padded = np.zeros((size, *pixels[0].shape), np.float32)  # [B,H,W,3], one shape for all batches
        padded[: len(pixels)] = pixels
        check_pixels(padded, model.config, None)
        yield Encoded(numbers, sizes, *run(padded))


def patches_and_whole(shared: Any, rows: tuple[jax.Array], task: DenseTask) -> tuple[jax.Array, jax.Array]:
    """Features of patches [B,P,E] and of whole images [B,E] from pixels [B,H,W,3]."""
    (params, neighbourhood), (pixels,) = shared, rows
    return dense_and_whole(params, pixels, neighbourhood, task=task)


def _checked_side(vision: VisionConfig | ResNetConfig, side: int | None, max_patches: int) -> int:
    if side is None:
        return vision.image_size
    size = vision.patch_size
    if not isinstance(side, int | np.integer) or side % size or side < 2 * size or (side // size) ** 2 > max_patches:
        raise DataError(
            f"side is {side}, expected a multiple of the patch size {size} from {2 * size} to "
            f"{size * math.isqrt(max_patches)}, which {max_patches} patches hold"
        )
    return side


def _squashed(model: Model, side: int, number: int, image: Any) -> tuple[int, tuple[int, int], np.ndarray]:
    """Number, height and width, and pixels of a square, whatever the photo's shape."""
    from PIL import Image

    rgb = to_rgb(image)
    small = np.asarray(rgb.resize((side, side), Image.Resampling.BICUBIC))
    return number, (rgb.height, rgb.width), model.preprocessor.normalize(small)


def tag_images_with(
    classifier: PatchClassifier,
    batches: Iterable[Encoded],
    grid: tuple[int, int],
    *,
    num_foreground: int,
    relative_threshold: float = 0.5,
) -> Iterator[ImageTags]:
    """Tags of images by a learned classifier: `ImageTags`, without second looks.

    batches: of `encoded_patches`. grid: its rows and columns, `config.vision.grid` without a `side`.
    num_foreground: F of the C classes become tags, the others compete. relative_threshold: as in `Tagging`, 0 to 1.

    >>> model, image = jaxzs.load("demo"), np.zeros((60, 90, 3), np.uint8)
    >>> texts = patch.tag_texts(model, ["circle", "square"], ["ground"], ["a picture of a {}."])
    >>> batches = list(patch.encoded_patches(model, [image], batching=patch.Batching(1)))
    >>> classifier = patch.learn_patch_classifier([batch.patches for batch in batches], texts, per_class=8)
    >>> [found] = patch.tag_images_with(classifier, batches, model.config.vision.grid, num_foreground=2)
    >>> found.scores.shape, int(found.tags.sum()) >= 1
    ((2,), True)
    """
    check_foreground(num_foreground, len(classifier.weights))
    check_share("relative_threshold", relative_threshold)
    fraction = jnp.full((num_foreground,), relative_threshold, jnp.float32)
    weighing = Weighing().as_float32()
    for batch in batches:
        scores, of_patches = _scores(classifier, batch.patches, batch.whole, weighing)
        of_batch = full_grid(len(scores), *grid)
        tags, threshold = decide(scores[:, :num_foreground], fraction, of_batch)
        boxes = _boxes(of_patches[:, :, :num_foreground], of_batch)  # [B,F,4]
        host = jax.device_get((scores[:, :num_foreground], tags, threshold, of_patches, boxes))
        for row, (number, size) in enumerate(zip(batch.numbers, batch.sizes, strict=True)):
            score, own, level, places, box = (part[row] for part in host)
            maps, nothing = places.reshape(*grid, -1), np.zeros(num_foreground, np.float32)  # no second looks
            box = box / np.repeat(grid, 2)
            yield ImageTags(number, size, score, own, level, nothing.astype(bool), nothing, maps, maps, box)


@jax.jit
def _boxes(scores: jax.Array, grid: Any) -> jax.Array:
    """Where each class scores above half of its range: [B,P,F] -> [B,F,4] in patches."""
    region = (min_max(scores, grid.patches) > 0.5).swapaxes(1, 2)  # [B,F,P]
    return tight_boxes(region.reshape(*region.shape[:2], *grid.shape), grid, keep_border=True)


def _checked(name: str, x: Any, rank: int) -> jax.Array:
    """Float32, of that rank, nothing empty, finite where that can be seen."""
    dtype = getattr(x, "dtype", type(x).__name__)
    if isinstance(dtype, str) or np.ndim(x) != rank or 0 in np.shape(x) or not jnp.issubdtype(dtype, jnp.floating):
        axes = {2: "[C,E]", 3: "[images,P,E]"}[rank]
        raise DataError(f"{name} are {dtype} of shape {np.shape(x)}, expected floats {axes}")
    if is_known(x) and not np.isfinite(np.asarray(x, np.float32)).all():
        raise DataError(f"{name} are not all finite")
    return jnp.asarray(x, jnp.float32)
