"""What can be chosen in patch classification, as values: numbers may be traced, everything else is static.

`exact` asks for the original code's oddities as well; what it changes is listed here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.errors import DataError
from jaxzs.patch.local import default_attention_layers, default_votes

Number = Any  # a float, or a float32 array of one or several: may be traced
Kernel = Literal["auto", "lattice", "exact"]


def _static(default: Any) -> Any:
    """A field that is part of the program, not of its arguments."""
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Fidelity:
    """How closely the original code is followed.

    exact: do as it does where it is odd. keep_border: let boxes reach the last row and column (it never does).
    """

    exact: bool = _static(False)
    keep_border: bool = _static(False)

    @property
    def half_positions(self) -> bool:
        """Positions are rounded to half precision."""
        return self.exact

    @property
    def stop_at_empty(self) -> bool:
        """A candidate without a box ends the re-identification of its image."""
        return self.exact

    @property
    def wrap_colours(self) -> bool:
        """The CRF is given colours minus a mean, wrapped around in 8 bits."""
        return self.exact

    @property
    def pads(self) -> bool:
        """Images of several grids may share a batch; padding changes the order of sums, and so the last bits."""
        return not self.exact


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tagging(_Fidelity):
    """How images are tagged (TagCLIP, arXiv 2312.12828), with the published values.

    Args:
      attention_layers: whose attention is averaged; by default the three before the last (8, 9, 10 of 12). COCO-Stuff
        takes all before the last, `default_attention_layers(12, "all")`.
      votes: layers that must agree, 1 to L; by default a third of them (4 of 12).
      relative_threshold: 0 to 1, the fraction of the range of scores above which a class is re-identified, and tagged.
      tag_threshold: the fraction for tags alone, a number or one for each class [F]; by default `relative_threshold`.
      renormalize: make the rows of the fused attention sum to 1 (not in the paper).
      capacity: candidates that go through the encoder at a time, by default B; any number of them is served.
      exact: do as the original code does where it is odd: positions rounded to half precision, nothing padded, and a
        candidate without a box ends the re-identification of the image.
      keep_border: let boxes reach the last row and column of the grid (not in the paper's code).

    Raises `DataError` for numbers out of range.

    >>> patch.Tagging(relative_threshold=0.1).votes is None  # by the depth of the model
    True
    >>> patch.Tagging(votes=0)
    Traceback (most recent call last):
    jaxzs.errors.DataError: votes is 0, expected a whole number of layers, at least 1
    """

    attention_layers: Sequence[int] | None = _static(None)
    votes: Any = None
    relative_threshold: Number = 0.5
    tag_threshold: Number = None
    renormalize: bool = _static(False)
    capacity: int | None = _static(None)

    def __post_init__(self) -> None:
        _freeze(self, "attention_layers")
        check_share("relative_threshold", self.relative_threshold)
        check_share("tag_threshold", self.tag_threshold)
        _check_votes(self.votes, None)
        if self.capacity is not None:
            check_whole("capacity", self.capacity)

    def resolved(self, num_layers: int, num_foreground: int) -> Tagging:
        """With every default filled in for a model of L layers and F classes: tag_threshold [F], the others scalars."""
        layers = default_attention_layers(num_layers) if self.attention_layers is None else self.attention_layers
        check_layers("attention_layers", layers, num_layers)
        _check_votes(self.votes, num_layers)
        fraction = self.relative_threshold if self.tag_threshold is None else self.tag_threshold
        if np.ndim(fraction) > 1 or (np.ndim(fraction) == 1 and len(fraction) != num_foreground):
            raise DataError(f"tag_threshold has shape {np.shape(fraction)}, expected one number or [{num_foreground}]")
        return dataclasses.replace(
            self,
            attention_layers=layers,
            votes=jnp.asarray(default_votes(num_layers) if self.votes is None else self.votes, jnp.int32),
            relative_threshold=jnp.asarray(self.relative_threshold, jnp.float32),
            tag_threshold=jnp.broadcast_to(jnp.asarray(fraction, jnp.float32), (num_foreground,)),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class CRF:
    """The dense CRF (arXiv 1210.5644), with the values of CLIP-ES.

    Args:
      iterations: of the mean field.
      smooth_weight: of the Gaussian over positions.
      smooth_sigma: its width in pixels.
      bilateral_weight: of the Gaussian over positions and colours.
      bilateral_sigma: its width in pixels.
      colour_sigma: its width in levels of 0 to 255.
      kernel: "lattice", what pydensecrf computes: linear in the pixels, differentiable in the probabilities; "exact",
        quadratic, differentiable in the photo, too; "auto": the lattice on a CPU, where photo and widths are known.
      stride: of the exact kernel; 1 costs N^2 an iteration. Above 1, an approximation for slow machines: the bilateral
        term takes only every stride-th row and column of pixels as its sources, each standing for stride^2.
      precision: XLA precision of the exact kernel's distances; they are large, and lower ones blur colours.

    Raises `DataError` for numbers out of range.

    >>> patch.CRF(iterations=5).bilateral_sigma
    67.0
    """

    iterations: int = _static(10)
    smooth_weight: Number = 3.0
    smooth_sigma: Number = 1.0
    bilateral_weight: Number = 4.0
    bilateral_sigma: Number = 67.0
    colour_sigma: Number = 3.0
    kernel: Kernel = dataclasses.field(default="auto", metadata={"static": True})
    stride: int = _static(1)
    precision: jax.lax.PrecisionLike = dataclasses.field(default="highest", metadata={"static": True})

    def __post_init__(self) -> None:
        check_whole("iterations", self.iterations, least=0)
        check_whole("stride", self.stride)
        if self.kernel not in ("auto", "lattice", "exact"):
            raise DataError(f"kernel is {self.kernel!r}, expected one of auto, lattice, exact")
        if self.kernel == "lattice" and self.stride > 1:
            raise DataError("stride is of the exact kernel: leave it at 1 with the lattice")
        for name in ("smooth_sigma", "bilateral_sigma", "colour_sigma"):
            check_positive(name, getattr(self, name))
        for name in ("smooth_weight", "bilateral_weight"):
            if (value := _concrete(getattr(self, name))) is not None and not np.isfinite(value).all():
                raise DataError(f"{name} is {value}, expected a finite number")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmenting(_Fidelity):
    """How tags become masks (CLIP-ES, arXiv 2212.09506), with the values for VOC.

    Args:
      box_threshold: 0 to 1, fraction of a map's maximum above which it is boxed; 0.4 for VOC, 0.7 for COCO.
      affinity_layers: default a third of the depth to the last but one (4 to 10 of 12, VOC); COCO takes the last too.
      background: whether label 0 is background (VOC, COCO), or every pixel belongs to a tag (COCO-Stuff).
      crf: None, or how maps are sharpened along the edges of the photo, `CRF()` as published.
      exact: do as the original does where it is odd: positions rounded to half precision, nothing padded, colours
        wrapped around for the CRF.
      keep_border: let boxes reach the last row and column of the grid (not in the original).

    Raises `DataError` for numbers out of range.

    >>> patch.Segmenting(box_threshold=0.7, crf=patch.CRF(iterations=5)).background
    True
    """

    box_threshold: Number = 0.4
    affinity_layers: Sequence[int] | None = _static(None)
    background: bool = _static(True)
    crf: CRF | None = None

    def __post_init__(self) -> None:
        _freeze(self, "affinity_layers")
        check_share("box_threshold", self.box_threshold)

    def resolved(self, num_layers: int) -> Segmenting:
        """What the program for a model of L layers takes: every default filled in, nothing of what comes after it."""
        layers = default_affinity_layers(num_layers) if self.affinity_layers is None else self.affinity_layers
        check_layers("affinity_layers", layers, num_layers)
        threshold = jnp.asarray(self.box_threshold, jnp.float32)
        return dataclasses.replace(self, affinity_layers=layers, box_threshold=threshold, crf=None)


def default_affinity_layers(num_layers: int, *, last: bool = False) -> tuple[int, ...]:
    """Layers whose attention makes the affinity: from a third of the depth on, to the last but one, or the last.

    >>> patch.default_affinity_layers(12), patch.default_affinity_layers(5, last=True)
    ((4, 5, 6, 7, 8, 9, 10), (2, 3, 4))
    """
    end = num_layers if last or num_layers == 1 else num_layers - 1
    return tuple(range(min(round(num_layers / 3), end - 1), end))


# --- checks: settings travel through transformations, whose leaves are no numbers -------------------


def check_layers(name: str, layers: Sequence[int], num_layers: int) -> None:
    """Raise `DataError` unless there are layers, and the model has them."""
    if not layers or not all(0 <= layer < num_layers for layer in layers):
        raise DataError(f"{name} are {list(layers)}, expected numbers from 0 to {num_layers - 1}")


def is_known(x: Any) -> bool:
    """Whether the values of an array can be looked at: not inside a trace, not on another process's devices."""
    return not isinstance(x, jax.Array) or (not isinstance(x, jax.core.Tracer) and x.is_fully_addressable)


def _freeze(settings: Any, name: str) -> None:
    """A sequence as a tuple, which can be hashed."""
    if (value := getattr(settings, name)) is not None:
        object.__setattr__(settings, name, tuple(value))


def _concrete(value: Any) -> np.ndarray | None:
    """The number as it can be looked at, or None: not given, traced, or a placeholder of a pytree."""
    if isinstance(value, str):
        raise DataError(f"{value!r} is a text, expected a number")
    if not isinstance(value, int | float | np.ndarray | np.generic | jax.Array) or not is_known(value):
        return None
    return np.asarray(value, np.float64)


def check_positive(name: str, value: Any) -> None:
    """Raise `DataError` unless a number that can be looked at is finite and above 0."""
    if (number := _concrete(value)) is not None and not (np.isfinite(number) & (number > 0)).all():
        raise DataError(f"{name} is {value}, expected a number above 0")


def check_whole(name: str, value: Any, *, least: int = 1, most: float = math.inf) -> None:
    """Raise `DataError` unless a size or a count is a whole number in its range."""
    if not isinstance(value, int | np.integer) or not least <= value <= most:
        least_or_range = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise DataError(f"{name} is {value!r}, expected a whole number {least_or_range}")


def check_share(name: str, value: Any) -> None:
    """Raise `DataError` unless a number that can be looked at is from 0 to 1."""
    if (number := _concrete(value)) is not None and not ((number >= 0) & (number <= 1)).all():
        raise DataError(f"{name} is {value}, expected a fraction from 0 to 1")


def _check_votes(votes: Any, num_layers: int | None) -> None:
    if (number := _concrete(votes)) is None:
        return
    if not ((number >= 1) & (number == np.floor(number))).all():
        raise DataError(f"votes is {votes}, expected a whole number of layers, at least 1")
    if num_layers is not None and (number > num_layers).any():
        raise DataError(f"votes is {votes}, expected 1 to {num_layers}, the layers of the model")
