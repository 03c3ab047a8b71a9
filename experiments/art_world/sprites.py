"""Drawings of the same things by several artists, as small transparent pictures, read from public packages.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 @iconify-json/noto-v1@1.2.5 \
        @lobehub/fluent-emoji-3d@1.1.0
    python -m experiments.art_world.sprites *.tgz --out jaxzs-out/art/sprites.npz

Licences: Noto and the older Noto by Google, Apache-2.0; Twemoji by Twitter and others, CC-BY 4.0; Fluent by Microsoft,
MIT.
Needs cairosvg for the one set that comes as SVG.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.art_world.names import THINGS
from jaxzs.files import atomic_path

TRAINED = ("google", "twitter", "noto-v1")
UNSEEN = "fluent-3d"
SIZE = 64  # pixels a side; the drawing fills it but for a rim of two
_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 128 128">{}</svg>'
)


def fitted(image: Image.Image) -> np.ndarray:
    """A drawing cut to what is not transparent, enlarged or reduced to fill the square: uint8 [S,S,4]."""
    image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    scale = (SIZE - 4) / max(image.size)
    image = image.resize([max(1, round(scale * side)) for side in image.size], Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (SIZE, SIZE))
    square.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return np.asarray(square)


def _from_svg(body: str) -> Image.Image:
    import cairosvg

    return Image.open(io.BytesIO(cairosvg.svg2png(_SVG.format(body).encode(), output_width=2 * SIZE)))


class Package:
    """The files of a packed npm package, by their path in it."""

    def __init__(self, path: Path) -> None:
        self._tar = tarfile.open(path)  # noqa: SIM115 - for the life of the object
        self._members = {m.name.removeprefix("package/"): m for m in self._tar.getmembers()}

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def read(self, name: str) -> bytes:
        found = self._tar.extractfile(self._members[name])
        assert found is not None  # these packages hold files only
        return found.read()

    def image(self, name: str) -> Image.Image:
        return Image.open(io.BytesIO(self.read(name)))


def draw_all(google: Package, twitter: Package, noto: Package, fluent: Package) -> dict[str, np.ndarray]:
    """Each artist's drawings of THINGS, uint8 [C,S,S,4]; all transparent where the older Noto has none."""
    emoji = {e["short_name"]: e for e in json.loads(google.read("emoji.json"))}
    icons = json.loads(noto.read("icons.json"))["icons"]
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in (*TRAINED, UNSEEN)}
    for short in THINGS:
        entry = emoji[short]
        code = entry["unified"].lower()
        files = [f"assets/{c}.webp" for c in (code, code.replace("-fe0f", ""))]
        aliases = [a for a in (entry["name"].lower().replace(" ", "-"), short.replace("_", "-")) if a in icons]
        drawn["google"].append(fitted(google.image(f"img/google/64/{entry['image']}")))
        drawn["twitter"].append(fitted(twitter.image(f"img/twitter/64/{entry['image']}")))
        none = np.zeros((SIZE, SIZE, 4), np.uint8)
        drawn["noto-v1"].append(fitted(_from_svg(icons[aliases[0]]["body"])) if aliases else none)
        drawn[UNSEEN].append(fitted(fluent.image(next(f for f in files if f in fluent))))
    return {name: np.stack(images) for name, images in drawn.items()}


@cache
def load(path: str) -> dict[str, np.ndarray]:
    """Each artist's drawings, uint8 [C,S,S,4] in the order of THINGS, as `main` has written them."""
    with np.load(path) as stored:
        if tuple(stored["things"]) != tuple(THINGS):
            raise SystemExit(f"{path} holds other things than experiments/art_world/names.py: draw it again")
        return {name: stored[name] for name in (*TRAINED, UNSEEN)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, nargs=4, help="the four packed packages, in any order")
    parser.add_argument("--out", type=Path, default=Path("jaxzs-out/art/sprites.npz"))
    options = parser.parse_args()
    found = {}
    for part in ("datasource-google", "datasource-twitter", "noto-v1", "fluent-emoji-3d"):
        paths = [path for path in options.packages if part in path.name]
        if len(paths) != 1:
            parser.error(f"one of the packages must be {part}, got {[path.name for path in options.packages]}")
        found[part] = Package(paths[0])
    drawings = draw_all(*found.values())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(options.out) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, things=np.array(list(THINGS)), **drawings)
    older = int(drawings["noto-v1"].any((1, 2, 3)).sum())
    print(f"{options.out}: {len(THINGS)} things by {len(drawings)} artists, {older} of them by the older Noto")


if __name__ == "__main__":
    main()
