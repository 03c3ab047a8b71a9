"""`jaxzs app`: a page in the browser that labels, tags and segments the images that are dropped into it.

Each button runs a command in a folder of this server: what the command refuses, measures and writes is what the page
shows. How the page looks is in `jaxzs.commands.app_page`.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import html
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jaxzs.commands import FINISHED, classify, segment, tag
from jaxzs.commands.options import Flag, Images, ModelOptions, Number, OutputOptions, Text, check_numbers
from jaxzs.commands.patches import picture_names
from jaxzs.commands.run import command_line
from jaxzs.commands.terminal import counted
from jaxzs.errors import CheckpointError, DataError, DependencyError, LabelError

if TYPE_CHECKING:
    from jaxzs.clip import Model

_MOST_SHOWN = 16 * 2**20  # bytes of a results page inside of this page; a larger one is a file to open
_MOST_PICTURES = 24  # images that get a large picture each: one takes a third of a second
_TOLD = 5  # classes told for each image
_HEAD = "head.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AppOptions(OutputOptions, ModelOptions):
    images: Images = ()
    """Folders, files or globs that are used where nothing is dropped into the page."""
    labels: Text = None
    """Class names, separated by commas."""
    port: Number = None
    """Of the page's address on this machine; by default the first free one from 7860."""
    share: Flag = False
    """Give the page a public address, too, through Gradio's servers; then it has no checkpoint but --model's."""
    browse: Flag = False
    """Open the page in the browser."""


def run(options: AppOptions) -> int:
    """Serve the page on this machine until Ctrl-C; returns 0."""
    check_numbers(options, "port", most=65535)
    page = opened(options)
    options.say(f"the page is at {page.local_url} (on this machine alone); Ctrl-C ends it")
    if page.share_url:
        options.say(f"and at {page.share_url}, for everyone who has this address")
    elif options.share:
        options.notice("note: there is no public address, Gradio's servers could not be reached")
    options.print_record({"command": command_line(options), "address": page.local_url, "public": page.share_url})
    page.block_thread()
    return FINISHED


def opened(options: AppOptions) -> Any:
    """The page, served until it is closed or the process ends; in a notebook it is shown below the cell."""
    check_gradio()
    from jaxzs.commands.app_page import launched

    folder = Path(tempfile.mkdtemp(prefix="jaxzs-app-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return launched(Desk(options, folder))


def check_gradio() -> None:
    """Raise `DependencyError` where Gradio is absent."""
    # Before it is imported: else it reports to its makers that it runs, and asks them for its newest version.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise DependencyError(f"the page needs Gradio ({error}): pip install 'jaxzs[app]'") from error


# --- what the buttons run -------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """The fields that all buttons share. files: where the server has put what was dropped."""

    model: str
    files: Sequence[str]
    labels: str
    templates: str = ""


class Shown(NamedTuple):
    """What the page shows of a run. page, told: HTML, names escaped. pictures: (file, caption). files: to download."""

    page: str
    pictures: list[tuple[str, str]]
    files: list[str]
    told: str


class Desk:
    """Runs commands for the page, each in a new folder inside of `folder`."""

    def __init__(self, options: AppOptions, folder: Path) -> None:
        self.options, self.folder = options, folder
        _checkpoint(options.model, options.revision)  # what is wrong with it is told before there is a page

    def classify(self, asked: Asked, method: Literal["zero-shot", "auto"], head: str | None = None) -> Shown:
        """Labels by the text, by what suits these images, or by a head that was learned from others."""
        if head is not None:
            return self._run(classify.run, ClassifyOptions, asked, proxies=Path(head), top=_TOLD)
        return self._run(classify.run, ClassifyOptions, asked, **_texts(asked), method=method, top=_TOLD)

    def learn(self, asked: Asked) -> tuple[Shown, str | None]:
        """Labels by what suits these images, and the head that was learned from them; None where none was."""
        shown = self._run(classify.run, ClassifyOptions, asked, **_texts(asked), save=Path(_HEAD), top=_TOLD)
        return shown, next((file for file in shown.files if Path(file).name == _HEAD), None)

    def tag(self, asked: Asked, background: str, threshold: float) -> Shown:
        """Every class that is seen, with boxes and heat maps."""
        # The results page has small maps of all images.
        overlay = Path("pictures") if len(asked.files) <= _MOST_PICTURES else None
        texts = _texts(asked) | {"background": _names(background)}
        return self._run(tag.run, TagOptions, asked, **texts, threshold=threshold, overlay=overlay)

    def segment(self, asked: Asked, background: str, maps: Literal["cam", "scores", "dense"], crf: bool) -> Shown:
        """A label for every pixel."""
        texts = _texts(asked) | {"background": _names(background)}
        return self._run(segment.run, SegmentOptions, asked, **texts, out=Path("masks"), maps=maps, crf=crf)

    def _run(self, run: Callable[[Any], int], kind: Callable[..., Any], asked: Asked, **chosen: Any) -> Shown:
        """Run a command in a new folder, where the relative paths of `chosen` go, too; what it has written."""
        own = self.options
        if own.share and asked.model != own.model:
            raise CheckpointError(f"this page is shared, and has one checkpoint alone: {own.model}")
        if not asked.files and not own.images:
            raise DataError("there are no images yet: drop some into the page")
        if asked.files and not asked.labels.strip() and "proxies" not in chosen:
            raise LabelError("what are the classes? Type their names, separated by commas")
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        chosen = {"out": Path("results.csv"), "html": Path("results.html")} | chosen
        options = kind(
            images=(str(_together(asked.files, folder / "images")),) if asked.files else own.images,
            model=asked.model,
            revision=own.revision if asked.model == own.model else None,
            bfloat16=own.bfloat16,
            no_cache=own.no_cache,
            quiet=True,
            # A path that is absolute already stays what it is.
            **{name: folder / value if isinstance(value, Path) else value for name, value in chosen.items()},
        )
        run(options)
        return self._shown(folder, options)

    def _shown(self, folder: Path, options: Any) -> Shown:
        from jaxzs.report import read_record

        masks = options.out if options.out.is_dir() else None
        record = read_record(folder / "results.json" if masks is None else masks / "masks.json").raw
        if masks is not None:
            shutil.make_archive(str(masks), "zip", masks)
        drawn = (folder / "pictures" if masks is None else masks / "overlays").glob("*.png")
        pictures = sorted(drawn, key=lambda picture: picture.stem)
        told = [self.plain(line) for line in (*record.get("notices", ()), *record["unreadable"])]
        return Shown(
            _framed((folder / "results.html").read_text(encoding="utf-8")),
            [(str(picture), picture.stem) for picture in pictures[:_MOST_PICTURES]],
            [str(file) for file in sorted(folder.iterdir()) if file.is_file()],
            _told(counted(len(record["results"]), "image"), told, self.plain(command_line(options))),
        )

    def plain(self, text: str) -> str:
        """A message without the folders of this server, which mean nothing to the one who reads it."""
        return re.sub(rf"{re.escape(str(self.folder))}/[^/\s]+/", "", text)


class _OfPage:
    """Options of a command that the page runs: nothing is printed, and the checkpoint stays in memory."""

    model: str
    revision: str | None

    def say(self, text: str = "") -> None:
        """Nothing: the page shows what is written."""

    def load(self, towers: Sequence[Literal["text", "vision"]]) -> Model:
        """As the command would load it; the page needs both towers in any case."""
        return _checkpoint(self.model, self.revision)


# Of the names of the commands' own: records say by it which command has written them.
class ClassifyOptions(_OfPage, classify.ClassifyOptions):
    """`jaxzs classify`, run by the page."""


class TagOptions(_OfPage, tag.TagOptions):
    """`jaxzs tag`, run by the page."""


class SegmentOptions(_OfPage, segment.SegmentOptions):
    """`jaxzs segment`, run by the page."""


@functools.lru_cache(maxsize=1)
def _checkpoint(name: str, revision: str | None) -> Model:
    """The checkpoint that was used last stays in memory."""
    from jaxzs.clip import load

    return load(name, revision=revision)


def _texts(asked: Asked) -> dict[str, Any]:
    sentences = tuple(line.strip() for line in asked.templates.splitlines() if line.strip())
    return {"labels": _names(asked.labels), "templates": sentences}


def _names(typed: str) -> str | None:
    """Names separated by commas or lines, as the commands take them."""
    names = [name.strip() for name in re.split(r"[,\n]", typed) if name.strip()]
    return ", ".join(names) or None


def _together(files: Sequence[str], folder: Path) -> Path:
    """The dropped files in one folder, numbered where several have one name."""
    paths = [Path(file) for file in files]
    for path, place in picture_names(paths, folder).items():
        place.with_suffix(path.suffix).symlink_to(path.absolute())
    return folder


def _framed(page: str) -> str:
    """A results page as HTML that can stand in another page: its script runs, and reaches nothing outside."""
    if len(page) > _MOST_SHOWN:
        return "<p>There are too many pictures to be shown here: open the file results.html.</p>"
    return f'<iframe title="Results" sandbox="allow-scripts" srcdoc="{html.escape(page)}"></iframe>'


def _told(what: str, lines: Sequence[str], command: str) -> str:
    """What was done, what a user should know, and the same from a shell."""
    listed = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    listed = f"<ul>{listed}</ul>" if listed else ""
    return f"<p>{html.escape(what)}</p>{listed}<p>The same from a shell:</p><pre>{html.escape(command)}</pre>"
