"""The pictures of the documentation that come from commands: tags and masks of a drawn scene, and a results page.

    python -m experiments.doc_pictures --out docs/pictures

The picture of `jaxzs app` is a screenshot of its tests:

    JAXZS_SCREENSHOTS=screenshots python -m pytest tests/test_browser.py -k tags
    python -m experiments.doc_pictures --app screenshots/app-tags.png

Needs Debian's chromium for the page; prints the commands that it runs.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

from jaxzs import cli
from jaxzs.data import samples
from jaxzs.errors import DependencyError

LABELS = "red square,blue circle,green triangle,yellow star"
WIDTH = 1100  # pixels
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def command(*words: str | Path) -> None:
    """Run a jaxzs command, and say which."""
    typed = [str(word) for word in words]
    print(shlex.join(["jaxzs", *typed]), flush=True)
    if cli.main([*typed, "--quiet"]) != 0:
        raise SystemExit(1)


def write_scene(file: Path) -> None:
    """The scene of docs/guides/tags.md."""
    scene = Image.new("RGB", (96, 96), (90, 90, 90))
    draw = ImageDraw.Draw(scene)
    draw.rectangle((10, 14, 46, 50), fill=(210, 40, 40))
    draw.ellipse((50, 46, 86, 82), fill=(40, 70, 210))
    scene.save(file)


def write_digits(folder: Path) -> None:
    """400 scanned digits in one folder a class."""
    images, labels = samples.digits()
    for number, (image, label) in enumerate(zip(images[:400], labels[:400], strict=True)):
        place = folder / NAMES[label] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place)


def photograph(page: Path, picture: Path, folder: Path) -> None:
    """A screenshot of a page. Raises `DependencyError`."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise DependencyError("no chromium here: apt-get install chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-quic", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    flags += [f"--user-data-dir={folder}", "--window-size=1280,1180", f"--screenshot={picture}"]
    subprocess.run([chromium, *flags, page.as_uri()], check=True, capture_output=True)


def small(source: Path, picture: Path) -> None:
    """In 256 colours, and no wider than a page of the documentation needs."""
    with Image.open(source) as image:
        image = image.convert("RGB")
        image.thumbnail((WIDTH, 10_000), Image.Resampling.LANCZOS)
        image.quantize(256, dither=Image.Dither.NONE).save(picture, optimize=True)
    print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    parser.add_argument("--app", type=Path, help="a screenshot; then nothing else is made")
    arguments = parser.parse_args()
    out, app = arguments.out, arguments.app
    out.mkdir(parents=True, exist_ok=True)
    if app is not None:
        small(app, out / "app.png")
        return
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        scene = folder / "scene.png"
        write_scene(scene)
        command("tag", scene, "--labels", LABELS, "--overlay", folder / "tags")
        command("segment", scene, "--labels", LABELS, "--maps", "scores", "--crf", "--out", folder / "masks")
        write_digits(folder / "digits")
        page = folder / "run.html"
        command(
            "classify", folder / "digits", "--templates", "the digit {}", "--out", folder / "run.json", "--html", page
        )
        photograph(page, folder / "page.png", folder / "profile")
        small(folder / "tags" / scene.name, out / "tags.png")
        small(folder / "masks" / "overlays" / scene.name, out / "masks.png")
        small(folder / "page.png", out / "page.png")


if __name__ == "__main__":
    main()
