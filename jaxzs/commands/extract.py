"""`jaxzs extract IMAGES`: images to a feature store that every method reads."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxzs.commands import FINISHED, INCOMPLETE
from jaxzs.commands.options import (
    File,
    Flag,
    ModelOptions,
    OutputOptions,
    Text,
    check_numbers,
    check_output_folder,
    command_line,
    kept_when_interrupted,
    load_model,
    name_unusable,
    settings_of,
)
from jaxzs.errors import DataError

if TYPE_CHECKING:
    from jaxzs.features import FeatureStore


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractOptions(OutputOptions, ModelOptions):
    images: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """A folder (class/image, split/class/image, or with labels.csv), .npz file, prepared tfds folder, or tfds:NAME."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("features")
    """Folder of feature stores; this one is OUT/KEY, the key standing for model, preprocessing and images."""
    split: Text = None
    """Part of the images: train, test[:50%], all[100:200], train+test."""
    label_table: File = None
    """Table of labels (CSV or JSON) of a folder; by default labels.csv or labels.json in it."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the features on disk."""
    tokens: Flag = False
    """Store the tokens of all patches, too."""
    batch_size: int = 32
    """Images encoded at once, over all devices of this process."""
    chunk_size: int = 1024
    """Images to a file: at most so many are lost when the run is killed."""
    threads: int = 2
    """That decode and preprocess."""
    max_skipped: int = 100
    """Unreadable images in the store before it stops."""
    distributed: Flag = False
    """Run as one of several processes (TPU pod, SLURM, Open MPI): each encodes its part into the same store."""


def run(options: ExtractOptions) -> int:
    """Encode images into a feature store, or continue one. Returns the exit code: 1 when some were unreadable."""
    check_numbers(options, "batch_size", "chunk_size", "threads")
    check_numbers(options, "max_skipped", least=0)
    if not any(options.out.glob("*/store.json")):  # a finished store is used where it cannot be written, too
        check_output_folder(options.out)
    from jaxzs import parallel

    if options.distributed:
        parallel.initialize()

    from jaxzs import features
    from jaxzs.clip import Numerics
    from jaxzs.data.opening import open_source
    from jaxzs.report import measured

    with measured() as seconds:
        source = open_source(options.images, split=options.split, labels=options.label_table)
        model = load_model(options)
        with kept_when_interrupted(
            lambda: f"{options.out} keeps all finished chunks, the same command goes on from there"
        ):
            store = features.extract(
                model,
                source,
                options.out,
                features.Extraction(
                    options.dtype,
                    Numerics(options.compute_dtype),
                    options.tokens,
                    options.batch_size,
                    options.chunk_size,
                    options.threads,
                    options.max_skipped,
                ),
                progress=parallel.is_main_process() and not options.quiet,
            )
    if not parallel.is_main_process():
        return FINISHED
    skipped = [reason for chunk in store.chunks() for reason in chunk.skipped]
    number = store.num_items - len(skipped)
    if not number:
        raise DataError(f"none of the {len(skipped)} images could be read; the first: {skipped[0]}")
    options.say(f"{number} images x {store.settings['embedding']} features ({options.dtype})")
    if store.label_names:
        listed = ", ".join(store.label_names[:8]) + ", ..." * (len(store.label_names) > 8)
        options.say(f"{len(store.label_names)} classes: {listed}")
    options.say(str(store.path))
    options.print_record(_write_record(options, model, store, source.identity, skipped, seconds))
    name_unusable(skipped, store.num_items)
    return INCOMPLETE if skipped else FINISHED


def _write_record(
    options: ExtractOptions,
    model: Any,
    store: FeatureStore,
    identity: str,
    skipped: list[str],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The record of the run, in the store: extract.json."""
    from jaxzs.report import data_entry, write_record

    path: Path | None = store.path / "extract.json"
    if not os.access(store.path, os.W_OK):
        options.notice(f"{store.path} cannot be written: no record of this run")
        path = None
    return write_record(
        path,
        command=command_line("extract", options),
        settings=settings_of(options),
        metrics={
            "images": store.num_items - len(skipped),
            "skipped": len(skipped),
            "features": store.settings["embedding"],
        },
        model=model,
        data=data_entry(Path(options.images).name, identity, store.num_items),
        seconds=seconds,
        store=str(store.path),
        class_names=list(store.label_names),
        unreadable=skipped,
    )
