"""`jaxzs extract` (images to a feature store) and `jaxzs datasets` (class names and templates of the package)."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

FINISHED, INCOMPLETE = 0, 1
_SHOWN = 10  # unreadable images named on the terminal; the store names all


@dataclasses.dataclass(frozen=True)
class ExtractOptions:
    images: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """A folder (class/image, split/class/image, or with labels.csv), an .npz file with "images", the folder of a
    prepared tensorflow-datasets data set, or tfds:NAME."""
    out: Path = Path("features")
    """Folder of feature stores; this one is OUT/KEY, the key standing for model, preprocessing and images."""
    split: str | None = None
    """Part of the images: train, test[:50%], all[100:200], train+test."""
    labels: Path | None = None
    """Table of labels (CSV or JSON) of a folder; by default labels.csv or labels.json in it."""
    model: str = "demo"
    """The embedded demo checkpoint, a folder, or a hub id such as openai/clip-vit-base-patch32."""
    revision: str | None = None
    """Commit, branch or tag of a hub id."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the features on disk."""
    bfloat16: bool = False
    """Encode with bfloat16 products: about twice as fast, features equal to three digits."""
    tokens: bool = False
    """Store the tokens of all patches, too."""
    batch_size: int = 64
    """Images encoded at once, over all devices of this process."""
    chunk_size: int = 1024
    """Images to a file: at most so many are lost when the run is killed."""
    threads: int = 2
    """That decode and preprocess."""
    max_skipped: int = 100
    """Unreadable images before the run stops."""
    distributed: bool = False
    """Run as one of several processes (TPU pod, SLURM, Open MPI): each encodes its part into the same store."""


def run_extract(options: ExtractOptions) -> int:
    """Encode images into a feature store, or continue one. Returns the exit code: 1 when some were unreadable."""
    from jaxzs import parallel

    if options.distributed:
        parallel.initialize()
    import jax.numpy as jnp

    from jaxzs import features
    from jaxzs.clip import load
    from jaxzs.data.opening import open_source

    source = open_source(options.images, split=options.split, labels=options.labels)
    store = features.extract(
        load(options.model, revision=options.revision),
        source,
        options.out,
        dtype=options.dtype,
        compute_dtype=jnp.bfloat16 if options.bfloat16 else None,
        tokens=options.tokens,
        batch_size=options.batch_size,
        chunk_size=options.chunk_size,
        threads=options.threads,
        max_skipped=options.max_skipped,
        progress=parallel.is_main_process(),
    )
    if not parallel.is_main_process():
        return FINISHED
    skipped = [reason for chunk in store.chunks() for reason in chunk.skipped]
    print(
        f"{store.num_items - len(skipped)} images x {store.settings['embedding']} features ({options.dtype})"
    )
    if store.label_names:
        print(
            f"{len(store.label_names)} classes: {', '.join(store.label_names[:8])}"
            + ", ..." * (len(store.label_names) > 8)
        )
    print(store.path)
    for reason in skipped[:_SHOWN]:
        print(f"skipped: {reason}", file=sys.stderr)
    if len(skipped) > _SHOWN:
        print(
            f"skipped: {len(skipped) - _SHOWN} more, named in {store.path}/*/chunk.json",
            file=sys.stderr,
        )
    return INCOMPLETE if skipped else FINISHED


@dataclasses.dataclass(frozen=True)
class DatasetsOptions:
    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = None
    """A data set of the package, or the path of your own JSON file: show its class names, templates and sources."""


def run_datasets(options: DatasetsOptions) -> int:
    """List the data sets whose class names and templates are in the package, or show one of them."""
    from jaxzs.data.datasets import dataset_info, dataset_names
    from jaxzs.report import markdown_table

    if options.name is None:
        listed = [dataset_info(name) for name in dataset_names()]
        rows = [(d.name, d.title, d.num_classes, len(d.templates)) for d in listed]
        print(markdown_table(["name", "data set", "classes", "templates"], rows))
        print(
            "\n`jaxzs datasets NAME` shows one. For your own write a JSON file with class_names and "
            "templates, and give its path wherever a name is taken."
        )
        return FINISHED
    info = dataset_info(options.name)
    print(
        f"{info.title}: {info.num_classes} classes"
        + (", several per image" if info.multi_label else "")
    )
    for of, source in info.source.items():
        where = source.get("repository") or source.get("package")
        print(
            f"{of} from {where} {source['path']}"
            + (f" at {source['commit'][:12]}" if "commit" in source else "")
        )
    print(f"SHA-256 of all lists: {info.digest}\n")
    print(
        markdown_table(
            ["class name", "label in the data"],
            list(zip(info.class_names, info.labels, strict=True)),
        )
    )
    if info.background_names:
        print(f"\nbackground: {', '.join(info.background_names)}")
    print("\ntemplates:")
    print("\n".join(f"  {template}" for template in info.templates))
    return FINISHED
