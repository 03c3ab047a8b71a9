"""Image sources, batches of preprocessed images, and the class names and templates of public data sets."""

from jaxzs.data import samples
from jaxzs.data.batches import Batch, batches, shard
from jaxzs.data.datasets import (
    DatasetInfo,
    dataset_info,
    dataset_names,
    seen_unseen_split,
    template_set,
    template_set_names,
)
from jaxzs.data.finding import SUFFIXES, Found, PassedOver, find_images, search_images
from jaxzs.data.folders import FolderSource, open_files, open_folder, open_images
from jaxzs.data.images import open_image
from jaxzs.data.names import Pairing, common_spellings, match_names, match_places, name_key, order_names
from jaxzs.data.opening import open_source
from jaxzs.data.prepared import open_tfds
from jaxzs.data.sources import Item, Source, from_arrays, from_object, open_npz, select, take_split

__all__ = [
    "SUFFIXES",
    "Batch",
    "DatasetInfo",
    "FolderSource",
    "Found",
    "Item",
    "Pairing",
    "PassedOver",
    "Source",
    "batches",
    "common_spellings",
    "dataset_info",
    "dataset_names",
    "find_images",
    "from_arrays",
    "from_object",
    "match_names",
    "match_places",
    "name_key",
    "open_files",
    "open_folder",
    "open_image",
    "open_images",
    "open_npz",
    "open_source",
    "open_tfds",
    "order_names",
    "samples",
    "search_images",
    "seen_unseen_split",
    "select",
    "shard",
    "take_split",
    "template_set",
    "template_set_names",
]
