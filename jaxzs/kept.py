"""What a file of learned arrays says beside them: the class names, the checkpoint that they belong to, the settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from jaxzs.clip import Model
from jaxzs.errors import DataError


class Kept(Protocol):
    """Learned arrays and what is needed to use them on other images."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the classes."""

    @property
    def fingerprint(self) -> str:
        """Of the checkpoint whose features they score."""

    @property
    def settings(self) -> dict[str, Any]:
        """How they were learned, as JSON values."""


def description(kept: Kept, form: str) -> dict[str, Any]:
    """What is written beside the arrays. form: name and version of the format."""
    return {
        "format": form,
        "class_names": list(kept.class_names),
        "fingerprint": kept.fingerprint,
        "settings": kept.settings,
    }


def described(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `Kept` as they were written; KeyError, TypeError or ValueError for anything else."""
    return {
        "class_names": tuple(str(name) for name in values["class_names"]),
        "fingerprint": str(values["fingerprint"]),
        "settings": dict(values["settings"]),
    }


def check_checkpoint(path: str | Path, kept: Kept, model: Model) -> None:
    """`DataError` with another checkpoint, whose features mean something else even where their widths agree."""
    if kept.fingerprint != model.fingerprint:
        raise DataError(
            f"{path} was fitted with another checkpoint (fingerprint {kept.fingerprint[:12]}, {model.name} is "
            f"{model.fingerprint[:12]}); load that one"
        )
