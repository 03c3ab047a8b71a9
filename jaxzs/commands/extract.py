"""`jaxzs extract IMAGES`: images to a feature store that every method reads."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxzs.commands import FINISHED
from jaxzs.commands.options import File, Flag, ModelOptions, OutputOptions, Text, check_numbers, check_output_folder
from jaxzs.commands.run import Run
from jaxzs.commands.terminal import counted

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
    """Table of labels (CSV or JSON) of a folder; by default labels.csv, labels.json or metadata.csv in it."""
    label_column: Text = None
    """Column of labels in the table, if it has a name of its own."""
    label_separator: Text = None
    """Between several labels of a cell, if not ; | or a comma."""
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
    from jaxzs import parallel, peers

    if options.distributed:
        parallel.initialize()  # before anything else asks jax
    run = Run(options)
    with (
        peers.ending_early(),
        run.measured(kept=lambda: f"{options.out} keeps all finished chunks, the same command goes on from there"),
    ):
        store = _extract(run)
    # Every process has written its part of the store; one of them tells.
    if not parallel.is_main_process():
        return FINISHED
    run.skip([reason for chunk in store.chunks() for reason in chunk.skipped])
    number = store.num_items - len(run.unusable)
    run.check_any(range(number), "read")
    record = _record(run, store, number)
    if os.access(store.path, os.W_OK):  # a finished store may lie where nobody can write
        run.write(record, store.path / "extract.json")
    else:
        run.notice(f"{store.path} cannot be written: no record of this run")
    options.say(f"{counted(number, 'image')} x {store.settings['embedding']} features ({options.dtype})")
    if store.label_names:
        listed = ", ".join(store.label_names[:8]) + ", ..." * (len(store.label_names) > 8)
        options.say(f"{counted(len(store.label_names), 'class', 'classes')}: {listed}")
    return run.finish(record, str(store.path))


def _extract(run: Run) -> FeatureStore:
    """The store, with the features of all images that can be read."""
    from jaxzs import features, parallel
    from jaxzs.data.opening import open_source

    options: ExtractOptions = run.options
    source = open_source(
        options.images,
        split=options.split,
        labels=options.label_table,
        label_column=options.label_column,
        label_separator=options.label_separator,
    )
    run.of_data(options.images, source.identity, len(source))
    run.pass_over(getattr(source, "passed_over", None))
    choices = features.Extraction(
        options.dtype,
        options.numerics,
        options.tokens,
        options.batch_size,
        options.chunk_size,
        options.threads,
        options.max_skipped,
    )
    progress = parallel.is_main_process() and not options.quiet
    # A store holds features of images only: without a text tower a checkpoint is whole enough.
    return features.extract(run.load_model(images_only=True), source, options.out, choices, progress=progress)


def _record(run: Run, store: FeatureStore, number: int) -> dict[str, Any]:
    from jaxzs.report import Results

    metrics = {"images": number, "skipped": len(run.unusable), "features": store.settings["embedding"]}
    return run.record(Results(metrics), store=str(store.path), class_names=list(store.label_names))
