"""Image sources, feature extraction's input side, and the class names and templates of public data sets."""

from jaxzs.data.datasets import (
    DatasetInfo,
    dataset_info,
    dataset_names,
    seen_unseen_split,
    template_set,
    template_set_names,
)
from jaxzs.data.images import (
    SUFFIXES,
    ImageBatch,
    class_from_subfolder,
    find_images,
    load_images,
    open_image,
)

__all__ = [
    "SUFFIXES",
    "DatasetInfo",
    "ImageBatch",
    "class_from_subfolder",
    "dataset_info",
    "dataset_names",
    "find_images",
    "load_images",
    "open_image",
    "seen_unseen_split",
    "template_set",
    "template_set_names",
]
