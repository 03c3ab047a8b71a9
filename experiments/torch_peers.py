"""What importing torch's libraries takes on a machine without CUDA."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any


def importable_torchvision() -> Any:
    """Lets PyPI's torchvision be imported beside a torch without CUDA, for as long as what is returned is held.

    Its compiled half cannot be loaded there. open_clip and transformers want only its transforms, which are pure
    Python; but the import fails all the same, for two operators of detection that only the compiled half declares.
    They are declared here, and never called.
    """
    if (found := importlib.util.find_spec("torchvision")) is None:
        return None
    import torch

    declared = torch.library.Library("torchvision", "FRAGMENT")
    try:
        torch.ops.load_library(Path(str(found.origin)).parent / "_C.so")
    except OSError:
        for name in ("nms", "qnms"):
            declared.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    return declared
