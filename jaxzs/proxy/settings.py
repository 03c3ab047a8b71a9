"""The options of proxy learning as one value that travels through all of its functions."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.typing import ArrayLike

from jaxzs.errors import ConfigError
from jaxzs.proxy import checks
from jaxzs.proxy.rows import Products, Rows

Solver = Literal["fast", "reference", "closed_form"]
Gamma = ArrayLike | Literal["auto"]
PAPER_LOGIT_SCALE = 100.0  # of OpenAI's CLIP: there the paper's temperatures of labels and proxies, 0.01 and 0.04, are
VISION_OVER_TEXT = 4.0  # 1/s and 4/s
SIMILARITIES_PER_BLOCK = 2**22  # similarities of a block of images, about four million


@jax.tree_util.register_static
class _Auto(str):
    """The gamma that is chosen from the images: a text for who reads it, and no leaf of the settings."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["gamma", "label_temperature", "temperature", "confidence", "ridge", "tolerance"],
    meta_fields=["solver", "iterations", "sinkhorn_iterations", "product_dtype", "block_size", "sharding"],
)
@dataclasses.dataclass(frozen=True)
class Settings:
    """How proxies are learned. The numbers are leaves, which `vmap`, `grad` and `jit` may trace; choices are static.

    Numbers, each [] and checked where they are used:
      gamma: class marginal of the pseudo labels, 0 to 1: 0 uniform, 1 as the text predicts it; "auto" is chosen without
        labels, see `choose_gamma`. The option that matters most.
      label_temperature: tau_t > 0 of the pseudo labels; by default 1/logit_scale.
      temperature: tau_i > 0 of the vision proxies; by default 4/logit_scale.
      confidence: pseudo labels with an entry strictly above it become one-hot, once; 0 to 1.
      ridge: regularisation of the closed form, 0.01 to 1e6; 1 to 3 are good.
      tolerance: "fast" stops where a step lowers the objective by less than this fraction of its value.

    Choices:
      solver: "fast", preconditioned Riemannian conjugate gradient from the closed form; "reference", the paper's
        gradient descent; "closed_form", discriminant analysis on the labels, without iterations.
      iterations: by default 28 of "fast", or 47 where N < 2C (at most 30 and 50 passes), fewer where the gradient is
        down to its rounding errors; 2000 of "reference".
      sinkhorn_iterations: scalings of columns and rows of the labels; 20 in the paper.
      product_dtype: of the operands of the large products, accumulated in float32: jnp.bfloat16 speeds up "fast"; keep
        float32 for "reference", whose step halving reacts to rounding.
      block_size: images of a block; by default such that it has about four million similarities.
      sharding: of the rows of image_features over devices; found from a sharded array, to be named under `jit`.

    Raises:
      ConfigError: a choice that there is not; numbers out of range, by the function that uses them.

    >>> settings = proxy.Settings(gamma="auto", solver="closed_form")
    >>> settings.gamma, jax.tree.leaves(settings)  # "auto" is no number, temperatures follow the logit scale
    ('auto', [0.6, 1.0, 0.0])
    >>> proxy.Settings(solver="best")
    Traceback (most recent call last):
    jaxzs.errors.ConfigError: solver is 'best'; expected one of fast, reference, closed_form
    """

    gamma: Gamma = 0.0
    label_temperature: ArrayLike | None = None
    temperature: ArrayLike | None = None
    confidence: ArrayLike = 0.6
    ridge: ArrayLike = 1.0
    tolerance: ArrayLike = 0.0
    solver: Solver = "fast"
    iterations: int | None = None
    sinkhorn_iterations: int = 20
    product_dtype: Any = jnp.float32
    block_size: int | None = None
    sharding: NamedSharding | None = None

    def __post_init__(self) -> None:
        if isinstance(self.gamma, str):
            if self.gamma != "auto":
                raise ConfigError(f'gamma is {self.gamma!r}; expected a number from 0 to 1, or "auto"')
            object.__setattr__(self, "gamma", _Auto("auto"))
        if self.solver not in get_args(Solver):
            raise ConfigError(f"solver is {self.solver!r}; expected one of {', '.join(get_args(Solver))}")
        for name in ("iterations", "block_size"):
            if getattr(self, name) is not None:
                checks.whole_number(getattr(self, name), name)
        checks.whole_number(self.sinkhorn_iterations, "sinkhorn_iterations")
        object.__setattr__(self, "product_dtype", checks.product_dtype(self.product_dtype))
        checks.row_sharding(self.sharding)

    @property
    def auto(self) -> bool:
        """Whether gamma is to be chosen."""
        return isinstance(self.gamma, str)

    @property
    def products(self) -> Products:
        return Products(self.product_dtype)

    @property
    def row_axes(self) -> Any:
        """The mesh axis or axes over which rows are spread, or None."""
        return None if self.sharding is None else self.sharding.spec[0]


DEFAULTS = Settings()

if TYPE_CHECKING:

    class Checked(Settings):
        """Settings as `in_float32` and `for_rows` return them: every number is there, and an array."""

        gamma: jax.Array
        label_temperature: jax.Array
        temperature: jax.Array
        confidence: jax.Array
        ridge: jax.Array
        tolerance: jax.Array
        block_size: int
else:
    Checked = Settings


def in_float32(settings: Settings, logit_scale: ArrayLike = PAPER_LOGIT_SCALE) -> Checked:
    """The settings with every number checked and a float32 scalar, temperatures filled in."""
    if not isinstance(settings, Settings):
        raise ConfigError(f"settings is {settings!r}; expected proxy.Settings(...)")
    scale = checks.scale(logit_scale, "logit_scale")
    given = settings.label_temperature, settings.temperature
    label_temperature = 1 / scale if given[0] is None else checks.scale(given[0], "label_temperature")
    temperature = VISION_OVER_TEXT / scale if given[1] is None else checks.scale(given[1], "temperature")
    return dataclasses.replace(  # type: ignore[return-value]
        settings,
        gamma=settings.gamma if settings.auto else checks.between(settings.gamma, "gamma", 0, 1),
        label_temperature=label_temperature,
        temperature=temperature,
        confidence=checks.between(settings.confidence, "confidence", 0, 1),
        # below, float32 no longer inverts the covariance: its condition number is up to E / ridge
        ridge=checks.between(settings.ridge, "ridge", 1e-2, 1e6),
        tolerance=checks.between(settings.tolerance, "tolerance", 0, 1e6),
    )


def for_rows(settings: Checked, rows: Rows, num_classes: int) -> Checked:
    """The settings with the sharding and the block size that these rows have."""
    sharding = _sharding_of(rows.features) if settings.sharding is None else settings.sharding
    size = block_rows(settings, checks.rows_per_device(rows.features.shape[0], sharding), num_classes)
    return dataclasses.replace(settings, sharding=sharding, block_size=size)


def block_rows(settings: Settings, num_rows: int, num_classes: int) -> int:
    """Images in a block: as asked, or such that [block, C] holds about four million numbers."""
    # At least 256 however many classes there are: products of a few rows are slow.
    return min(settings.block_size or max(SIMILARITIES_PER_BLOCK // num_classes, 256), num_rows)


def _sharding_of(x: jax.Array) -> NamedSharding | None:
    """Over which devices the rows of a concrete array are spread, if they are."""
    # A tracer does not say where its rows will lie: under `jit` the sharding must be named.
    sharding = getattr(x, "sharding", None) if checks.concrete(x) else None
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return None
    return None if not sharding.spec or sharding.spec[0] is None else sharding
