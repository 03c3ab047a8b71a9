"""Data sets of tensorflow-datasets, prepared as ArrayRecord: read without TensorFlow."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxzs.data.sources import Item, ObjectSource, digest, places_of
from jaxzs.errors import DataError, DependencyError, ImageError


def open_tfds(name_or_folder: str | Path, split: str, *, data_dir: str | Path | None = None) -> ObjectSource:
    """A data set of tensorflow-datasets that was prepared as ArrayRecord; TensorFlow is not needed.

    name_or_folder: e.g. "oxford_flowers102", or the folder of a prepared version (with dataset_info.json).
    split: "train", "test[:50%]", "train+validation". Raises `DataError` when it is not prepared, or not as ArrayRecord.

    >>> source = data.open_tfds("oxford_flowers102", "test[:50%]")  # doctest: +SKIP
    """
    import tensorflow_datasets as tfds

    try:
        if (Path(name_or_folder) / "dataset_info.json").is_file():
            builder = tfds.builder_from_directory(str(name_or_folder))
        else:
            # By default tfds looks for TFRecord, which TensorFlow alone reads.
            builder = tfds.builder(str(name_or_folder), data_dir=data_dir, file_format="array_record")
        items = builder.as_data_source(split=split)
    except ModuleNotFoundError as error:
        raise DependencyError(
            f'tensorflow-datasets cannot open {name_or_folder} without {error.name}: pip install "jaxzs[prepare]"'
        ) from error
    except Exception as error:  # tfds raises many kinds, most with a page of text
        raise DataError(
            f"cannot read the tensorflow-datasets {name_or_folder} split {split!r}: "
            f"{(str(error).strip() or type(error).__name__).splitlines()[0]}. It must be prepared as "
            'ArrayRecord: pip install "jaxzs[prepare]", then tfds.builder(NAME, file_format='
            '"array_record").download_and_prepare()'
        ) from error
    features = builder.info.features
    if "image" not in features:
        raise DataError(f"{builder.info.full_name} has no feature 'image', only {', '.join(features)}")
    label = dict(features.items()).get("label")
    names = tuple(getattr(label, "names", None) or ())
    # Name and version stay the same when a data set is prepared anew from other files; sizes rarely do.
    shards = [[path.name, path.stat().st_size] for path in sorted(Path(builder.data_dir).glob("*array_record*"))]
    identity = digest("tfds", builder.info.full_name, split, shards)
    named = _TfdsItems(items, builder.info.full_name)
    return ObjectSource(named, names, False, identity)


@dataclasses.dataclass(frozen=True, eq=False)
class _TfdsItems:
    """Records of a data source by number, with names that a report can quote."""

    items: Any
    name: str

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        try:
            record = self.items[index]
        except Exception as error:  # decoders raise almost anything on damaged data
            raise ImageError(f"{self.name} record {index} cannot be decoded: {error}") from error
        keys = ("id", "file_name", "image/filename", "filename")  # as data sets call it
        name = next((record[key] for key in keys if key in record), index)
        name = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
        return Item(record["image"], places_of(record.get("label")), name)
