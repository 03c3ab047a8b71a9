"""Finding image files, by content where the suffix says nothing, and telling what was passed over."""

from __future__ import annotations

import collections
import dataclasses
import glob
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxzs.data.images import is_image_file
from jaxzs.errors import DataError

# Taken as images by name; what cannot be decoded after all is then told as unreadable.
SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm",
))  # fmt: skip
# Never images, so that their contents are not looked at.
_OTHER_SUFFIXES = frozenset((
    ".txt", ".md", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".html", ".htm", ".pdf", ".py", ".ipynb",
    ".log", ".npy", ".npz", ".mat", ".pkl", ".pt", ".safetensors", ".parquet", ".h5", ".zip", ".tar", ".gz", ".mp4",
    ".mov",
))  # fmt: skip
# What operating systems, archives and servers leave in folders of pictures: thumbnails and copies.
_SYSTEM_FOLDERS = frozenset(
    ("@eadir", "__macosx", "lost+found", "$recycle.bin", "#recycle", "system volume information")
)
_SYSTEM_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini"))
# Of `open_folder`, the first that is there; Hugging Face's folders have the last two.
LABEL_TABLES = ("labels.csv", "labels.tsv", "labels.json", "metadata.csv", "metadata.jsonl")
_CLEAR_LAYOUT = 4  # images of one layout for each image at another depth, for the others to be strays
_SHOWN = 5  # names in a notice


@dataclasses.dataclass(frozen=True)
class PassedOver:
    """What lies in folders of images and was not taken; nothing of it is an error by itself.

    suffixes: number of files by suffix ("" for none) that are no images that can be decoded here. system_folders: of
    thumbnails and the like. empty_folders: without images. strays: images at another depth than all others, so that
    they have no class. unlisted: images that a table of labels does not list. unlabelled: images that it lists
    without a label. unreadable_folders: with the reason; whatever they hold is missing. respelled: labels that are read
    as others, which differ in capitals, blanks or "_" only.

    >>> passed = data.search_images("photos").passed_over
    >>> passed.notices(), passed.record()
    ([], {})
    """

    suffixes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    system_folders: tuple[str, ...] = ()
    empty_folders: tuple[str, ...] = ()
    strays: tuple[str, ...] = ()
    unlisted: int = 0
    unlabelled: int = 0
    unreadable_folders: tuple[str, ...] = ()
    respelled: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def notices(self) -> list[str]:
        """A line for each kind, to be printed."""
        by_suffix = sorted(self.suffixes.items(), key=lambda item: (-item[1], item[0]))  # the most frequent first
        suffixes = [f"{suffix or 'no suffix'} {count}" for suffix, count in by_suffix]
        others = _count(sum(self.suffixes.values()), "file")
        strays = _count(len(self.strays), "image")
        lines = [
            (self.suffixes, f"passed over {others} that cannot be read as images: {_some(suffixes)}"),
            (self.system_folders, f"passed over system folders: {_some(self.system_folders)}"),
            (self.empty_folders, f"folders without images: {_some(self.empty_folders)}"),
            (self.strays, f"{strays} not in a class folder as the others are: {_some(self.strays)}"),
            (self.unlisted, f"{_count(self.unlisted, 'image')} not listed in the table of labels, left out"),
            (self.unlabelled, f"{_count(self.unlabelled, 'image')} listed without a label"),
            (self.respelled, f"labels read as one: {_some([f'{a} -> {b}' for a, b in self.respelled.items()])}"),
            (self.unreadable_folders, f"cannot read, all that they hold is missing: {_some(self.unreadable_folders)}"),
        ]
        return [line for seen, line in lines if seen]

    def record(self) -> dict[str, Any]:
        """The same for a JSON record: what there is of it, names of folders and images in full."""
        values = dataclasses.asdict(self)
        values["suffixes"] = {suffix or "none": count for suffix, count in sorted(self.suffixes.items())}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items() if value}


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown}, ... ({len(names):,} in all)" if len(names) > _SHOWN else shown


class Found(NamedTuple):
    """Image files, sorted, each once, and what was passed over."""

    paths: list[Path]
    passed_over: PassedOver


def find_images(sources: str | Path | Iterable[str | Path]) -> list[Path]:
    """Paths of the images in folders (with all below them), files and globs: sorted, each once.

    What `search_images` finds, without what it passes over. Raises `DataError` when a source does not exist or there
    is no image at all.

    >>> paths = data.find_images("photos")
    >>> len(paths), paths[0].as_posix()
    (30, 'photos/one/0.png')
    >>> data.find_images("no/such/folder")
    Traceback (most recent call last):
    jaxzs.errors.DataError: no such file or folder: no/such/folder; name folders, image files or globs
    """
    return search_images(sources).paths


def search_images(sources: str | Path | Iterable[str | Path]) -> Found:
    """The images in folders (with all below them), files and globs, and what was passed over.

    In folders and globs, hidden files and folders of thumbnails are passed over, and files that are no images: by
    their suffix, or by their content where the suffix is not known. A file named in full is always taken, and so is a
    link to nothing: it is then an image that cannot be read. Links are followed, loops are not. Raises `DataError` when
    a source does not exist or there is no image at all.

    >>> found = data.search_images("photos")
    >>> len(found.paths), found.passed_over.suffixes
    (30, {})
    """
    listed = [sources] if isinstance(sources, (str, Path)) else list(sources)
    search = _Search()
    for source in listed:
        search.look(source)
    if not search.found:
        seen = "; ".join(search.passed_over().notices())
        raise DataError(
            f"no images in {', '.join(map(str, listed)) or 'an empty list'}: looked for files ending in "
            f"{' '.join(sorted(SUFFIXES))}, and for others that hold an image" + f" ({seen})" * bool(seen)
        )
    return Found(sorted(search.found), search.passed_over())


class _Search:
    """The state of one search."""

    def __init__(self) -> None:
        self.found: set[Path] = set()  # sources may overlap
        self.others: set[Path] = set()  # files that are no images
        self.visited: set[tuple[int, int]] = set()
        self.system: list[str] = []
        self.empty: list[str] = []
        self.unreadable: dict[str, str] = {}

    def look(self, source: str | Path) -> None:
        if source == "":  # as of a variable that is not set; to Path it is the current folder
            raise DataError("an empty text names no images: name folders, image files or globs, or . for this folder")
        path = Path(source).expanduser()
        if os.path.isdir(path):
            self.walk(path)
        # Named in full: taken whatever it is, also a link to nothing. Reading it will tell.
        elif os.path.lexists(path):
            self.found.add(path)
        # After what exists: the name of a folder may hold "[" and "*".
        elif glob.has_magic(str(path)):
            for match in map(Path, glob.glob(str(path), recursive=True)):
                if os.path.isdir(match):
                    self.walk(match)
                else:
                    self.take(match)
        else:
            raise DataError(f"no such file or folder: {source}; name folders, image files or globs")

    def walk(self, root: Path) -> None:
        # os.walk passes over what it cannot list, without `onerror` silently.
        for here, folders, files in os.walk(root, followlinks=True, onerror=self.tell):
            if self.seen(here):  # a link back up, a second link to it, or a second source
                folders.clear()
                continue
            self.system += [os.path.join(here, name) for name in folders if name.lower() in _SYSTEM_FOLDERS]
            # In place: os.walk goes down into what is left of the list.
            folders[:] = sorted(f for f in folders if not f.startswith(".") and f.lower() not in _SYSTEM_FOLDERS)
            taken = [self.take(Path(here, name)) for name in files]
            if not any(taken) and not folders:
                self.empty.append(here)

    def seen(self, folder: str) -> bool:
        try:
            status = os.stat(folder)
        except OSError as error:  # gone since it was listed
            self.tell(error)
            return True
        # The folder itself, by however many paths it is reached.
        known = (status.st_dev, status.st_ino) in self.visited
        self.visited.add((status.st_dev, status.st_ino))
        return known

    def take(self, path: Path) -> bool:
        """Whether a file is an image to be taken."""
        name, suffix = path.name.lower(), path.suffix.lower()
        if name.startswith(".") or name in _SYSTEM_FILES or name in LABEL_TABLES:
            return False
        # Opened only where the name says nothing: in large folders every opening costs.
        image = suffix in SUFFIXES or (suffix not in _OTHER_SUFFIXES and is_image_file(path))
        (self.found if image else self.others).add(path)
        return image

    def tell(self, error: OSError) -> None:
        self.unreadable[str(error.filename)] = error.strerror or str(error)

    def passed_over(self) -> PassedOver:
        # A file that is no image by its suffix counts as found where another source names it in full.
        suffixes = collections.Counter(path.suffix.lower() for path in self.others - self.found)
        return PassedOver(
            suffixes=dict(suffixes),
            system_folders=tuple(sorted(self.system)),
            empty_folders=tuple(sorted(set(self.empty) - set(self.unreadable))),
            unreadable_folders=tuple(f"{folder} ({why})" for folder, why in sorted(self.unreadable.items())),
        )


# --- classes by subfolder ---------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How images lie in a folder. depth: parts of a path below it, 2 for class/image, 3 for split/class/image."""

    depth: int
    strays: list[Path]  # at other depths


def layout_of(below: Sequence[Path]) -> Layout | None:
    """The one depth at which images lie, up to a few strays; None where they lie at several.

    below: paths relative to the folder.
    """
    depths = collections.Counter(len(path.parts) for path in below)
    depth, images = max(depths.items(), key=lambda item: item[1], default=(1, 0))
    strays = [path for path in below if len(path.parts) != depth]
    return None if _CLEAR_LAYOUT * len(strays) > images else Layout(depth, strays)


def subfolders(paths: Sequence[Path], root: str | Path) -> list[str | None] | None:
    """The class folder of each image where a folder is laid out as root/class/image; otherwise None.

    None too when all images lie in one subfolder, which then says nothing about classes. Strays have no class.
    """
    root = Path(root)
    if not all(path.is_relative_to(root) for path in paths):  # root was a file or a glob
        return None
    below = [path.relative_to(root) for path in paths]
    layout = layout_of(below)
    if layout is None or layout.depth != 2:
        return None
    names = [path.parts[0] if len(path.parts) == 2 else None for path in below]
    return names if len(set(names) - {None}) > 1 else None
