"""`jaxzs datasets`: class names and templates of the package, or of a JSON file."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from jaxzs.commands import FINISHED
from jaxzs.commands.options import OutputOptions, left_out, shown_as


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetsOptions(OutputOptions):
    name: Annotated[str | None, tyro.conf.Positional, left_out(str), shown_as("NAME")] = None
    """A data set of the package, or the path of your own JSON file: show its class names, templates and sources."""


def run(options: DatasetsOptions) -> int:
    """List the data sets whose class names and templates are in the package, or show one of them."""
    from jaxzs.data.datasets import dataset_info, dataset_names
    from jaxzs.report import markdown_table

    if options.name is None:
        listed = [dataset_info(name) for name in dataset_names()]
        rows = [(d.name, d.title, d.num_classes, len(d.templates)) for d in listed]
        header = ("name", "title", "classes", "templates")
        options.print_record({"datasets": [dict(zip(header, row, strict=True)) for row in rows]})
        options.say(markdown_table(["name", "data set", "classes", "templates"], rows))
        options.say(
            "\n`jaxzs datasets NAME` shows one. For your own write a JSON file with class_names and "
            "templates, and give its path wherever a name is taken."
        )
        return FINISHED
    info = dataset_info(options.name)
    options.print_record({**dataclasses.asdict(info), "digest": info.digest})
    options.say(f"{info.title}: {info.num_classes} classes" + (", several per image" if info.multi_label else ""))
    for of, source in info.source.items():  # names and templates may come from different places
        where = source.get("repository") or source.get("package")
        commit = f" at {source['commit'][:12]}" if "commit" in source else ""
        options.say(f"{of} from {where} {source['path']}{commit}")
    options.say(f"SHA-256 of all lists: {info.digest}\n")
    pairs = list(zip(info.class_names, info.labels, strict=True))
    options.say(markdown_table(["class name", "label in the data"], pairs))
    if info.background_names:
        options.say(f"\nbackground: {', '.join(info.background_names)}")
    options.say("\ntemplates:")
    options.say("\n".join(f"  {template}" for template in info.templates))
    return FINISHED
