"""Image sources."""

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
    "ImageBatch",
    "class_from_subfolder",
    "find_images",
    "load_images",
    "open_image",
]
