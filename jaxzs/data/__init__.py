"""Image sources, batches of preprocessed images, and the class names and templates of public data sets."""

from jaxzs.data.batches import Batch, batches, shard
from jaxzs.data.datasets import (
    DatasetInfo,
    dataset_info,
    dataset_names,
    seen_unseen_split,
    template_set,
    template_set_names,
)
from jaxzs.data.folders import open_files, open_folder
from jaxzs.data.images import SUFFIXES, ImageBatch, class_from_subfolder, find_images, load_images, open_image
from jaxzs.data.opening import open_source
from jaxzs.data.prepared import open_tfds
from jaxzs.data.sources import Item, Source, from_arrays, from_object, open_npz, select, take_split

__all__ = [
    "SUFFIXES",
    "Batch",
    "DatasetInfo",
    "ImageBatch",
    "Item",
    "Source",
    "batches",
    "class_from_subfolder",
    "dataset_info",
    "dataset_names",
    "find_images",
    "from_arrays",
    "from_object",
    "load_images",
    "open_files",
    "open_folder",
    "open_image",
    "open_npz",
    "open_source",
    "open_tfds",
    "seen_unseen_split",
    "select",
    "shard",
    "take_split",
    "template_set",
    "template_set_names",
]
