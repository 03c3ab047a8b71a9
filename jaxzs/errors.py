"""Named errors: whatever a user can get wrong ends in one of these, never in a traceback from inside jax.

All are `ValueError`s, so that callers who do not care about the kind can catch that. Every message
says what was wrong, where, what was expected and what to do. What to do may differ with the place: `python` is the
advice to a caller of the function, `command` the advice on the command line, which has options instead of arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, Self, TypeVar

_P = ParamSpec("_P")  # so that type checkers see the signatures of what `renamed` wraps
_R = TypeVar("_R")


class JaxzsError(ValueError):
    """Base of all errors that jaxzs raises on bad input.

    Args:
      message: what was wrong, where, what was expected.
      python: what a caller of the function can do; part of `str(error)`.
      command: what can be done on the command line, which shows this in its place.

    >>> error = jaxzs.errors.TextError("a text has 90 tokens, at most 77", python="truncate=True", command="--truncate")
    >>> str(error), error.shown(on_command_line=True)
    ('a text has 90 tokens, at most 77; truncate=True', 'a text has 90 tokens, at most 77; --truncate')
    """

    def __init__(self, message: str, *, python: str = "", command: str = "") -> None:
        # `str` is for whoever calls from Python; the command line asks `shown`.
        super().__init__("; ".join(filter(None, (message, python))))
        self.message, self.python, self.command = message, python, command

    def within(self, where: str) -> Self:
        """The same error, saying where: which file, which line.

        >>> str(jaxzs.errors.DataError("'cat' is listed twice").within("labels.csv"))
        "labels.csv: 'cat' is listed twice"
        """
        # Of the same class: callers catch by it, and advice is not doubled.
        return type(self)(f"{where}: {self.message}", python=self.python, command=self.command)

    def shown(self, *, on_command_line: bool) -> str:
        """The text for a reader of that place."""
        return "; ".join(filter(None, (self.message, self.command))) if on_command_line else str(self)


class ConfigError(JaxzsError):
    """A model configuration is not a CLIP configuration, or its numbers do not fit together."""


class CheckpointError(JaxzsError):
    """A checkpoint cannot be found, read, or does not hold the leaves that its configuration asks for."""


class ImageError(JaxzsError):
    """An image cannot be read, or is unfit (zero area, too large)."""


class TextError(JaxzsError):
    """A text cannot be encoded: empty, too long, or made of words the model has never seen."""


class LabelError(JaxzsError):
    """A list of class names or labels is unfit: empty, duplicated, out of range."""


class DataError(JaxzsError):
    """A data source, feature file or array is unfit: missing, empty, wrong shape, not finite."""


class PeerError(JaxzsError):
    """Another process of the same run has died, or ended before the others; what it had finished is kept."""


class DependencyError(JaxzsError):
    """An optional package is absent; the message gives the install command."""


class RecordError(JaxzsError):
    """A file is not the record of a run, is damaged, or is of a schema that this version does not know."""


def renamed(**spellings: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorator: a keyword of an earlier version is a `ConfigError` that names what is written instead.

    >>> @jaxzs.errors.renamed(compute_dtype="numerics=clip.Numerics(compute_dtype)")
    ... def encode(pixels, *, numerics=None):
    ...     pass
    >>> encode(1, compute_dtype="bfloat16")
    Traceback (most recent call last):
    jaxzs.errors.ConfigError: encode has no argument compute_dtype any more; write numerics=clip.Numerics(compute_dtype)
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            # Before Python's own TypeError, which would name no remedy.
            for old in kwargs.keys() & spellings.keys():
                raise ConfigError(f"{function.__name__} has no argument {old} any more; write {spellings[old]}")
            return function(*args, **kwargs)

        return checked

    return decorate
