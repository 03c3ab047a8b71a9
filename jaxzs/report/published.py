"""Published numbers, kept as data with their sources, and which of them a measured one may stand beside."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from jaxzs.report.results import Figure


@dataclasses.dataclass(frozen=True)
class Published:
    """A number of a paper. paper, table: where it stands. model: last part of the checkpoint's name on the hub.

    images: of the test set, where the source tells.
    """

    figure: Figure
    paper: str
    table: str
    model: str
    images: int | None = None


@functools.cache
def all_published() -> tuple[Published, ...]:
    """Every published number of the package.

    >>> sorted({one.figure.data for one in all_published()})[:2]
    ['ade20k', 'cityscapes']
    """
    text = (resources.files("jaxzs") / "assets" / "published.json").read_text(encoding="utf-8")
    kept = json.loads(text)
    numbers = []
    for row in kept["figures"]:
        own = dict(row)
        source, images = kept["sources"][own.pop("source")], own.pop("images", None)
        numbers.append(Published(Figure(**own), **source, images=images))
    return tuple(numbers)


def published_beside(
    figure: Figure, model: Mapping[str, Any] | None, data: Mapping[str, Any] | None
) -> Published | None:
    """The published number of the same data set, method, kind and protocol, with the same checkpoint; else None.

    model, data: of the record. A checkpoint is the same when its name on the hub, or its folder's name, ends alike
    ("openai/clip-vit-base-patch32"); a test set where its number of images is the published one, if that is known.
    """
    # The last part of a hub id, or of a folder of either system.
    name = str((model or {}).get("name", "")).replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    images = (data or {}).get("images")
    for one in all_published():
        # All but the number itself.
        same = dataclasses.replace(figure, value=one.figure.value, deviation=one.figure.deviation, passes=None)
        if same == one.figure and one.model == name and one.images in (None, images):
            return one
    return None


def published_values(data: str) -> dict[tuple[str, str, str], float]:
    """All published numbers of a data set by (method, figure, protocol), in percent, whatever the model.

    >>> published_values("imagenet")["proxies", "accuracy", "transductive"]
    80.21
    """
    own = [one.figure for one in all_published() if one.figure.data == data]
    return {(figure.method, figure.figure, figure.protocol): figure.value for figure in own}
