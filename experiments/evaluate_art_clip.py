"""What the checkpoint "art" can do on drawings by an artist that it never saw: the tables of its model card.

Run from the repository's root, with the drawings that `experiments.art_world.sprites` has read:

    python -m experiments.evaluate_art_clip --sprites jaxzs-out/art/sprites.npz

No image here was trained on, and nothing was chosen by these figures. Classification is transductive: a method sees the
very images that are classified, and no label. Prompts: `python -m experiments.prompt_tuning --data art --model art`.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.art_world import sprites
from experiments.art_world.card import write_card
from experiments.art_world.names import EVERYDAY, NAMES
from experiments.art_world.scenes import Artists
from experiments.art_world.tests import scenes, things, unseen
from experiments.demo_world import Scenes
from experiments.patch_demo import FOUR_ORIGINS, ablation, tag_all
from experiments.patch_demo import figures as tag_figures
from jaxzs import load
from jaxzs.clip import Model
from jaxzs.commands.demo import classify, label_maps
from jaxzs.patch import CRF, Batching, Dense, Segmenting, Tagging, segment_dense, tag_texts
from jaxzs.patch.metrics import segmentation_report
from jaxzs.report import Figure, Results, markdown_table, write_record

RESULTS = Path(__file__).parent / "results" / "art_clip"
# The best of a few on scenes by the artists seen; the checkpoint's patches speak through residual and MLP.
DENSE = Dense(attention="v", reduced=False, short_side=96, threshold=0.5)
SHARPENED = {"": Segmenting(), " + CRF": Segmenting(crf=CRF())}
Table = dict[str, dict[str, float]]  # row -> column -> %


def classification(model: Model, artists: dict[str, Artists], each: int) -> Table:
    """The hundred everyday things and all things, on white and on any ground, by artists seen and unseen."""
    rows = {}
    for who, artist in artists.items():
        for ground, hardness in (("on white", 0.0), ("on any ground", 1.0)):
            for classes in (len(EVERYDAY), len(NAMES)):
                given = things(artist, each, classes=classes, hardness=hardness)
                templates = model.card["templates"]["plain"]
                found = classify(model, *given, NAMES[:classes], templates)
                rows[f"{classes} things, {who}, {ground}"] = found.accuracy
    return rows


def settings_of(model: Model) -> Tagging:
    """As the card says."""
    return Tagging(relative_threshold=model.card["tagging"]["relative_threshold"])


def tagging(model: Model, world: Scenes) -> Table:
    """mAP of the classes that occur, and F1, after each step of TagCLIP."""
    seen = world.tags.any(0)
    occurring = world._replace(tags=world.tags[:, seen], names=tuple(np.array(world.names)[seen]))
    texts, settings = tag_texts(model, occurring.names), settings_of(model)
    rows = ablation(model, occurring, texts, settings)
    found = tag_all(model, occurring, texts, settings=settings, batching=FOUR_ORIGINS)
    scores, tags = (np.stack([getattr(tagged, key) for tagged in found]) for key in ("scores", "tags"))
    rows["+ 2 x 2 origins"] = tag_figures(scores, tags, occurring)
    return {step: {"mAP": 100 * row["mAP"], "F1": 100 * row["f1_overall"]["f1"]} for step, row in rows.items()}


def segmentation(model: Model, world: Scenes) -> Table:
    """mIoU of patch scores and of dense features, with and without a CRF."""
    texts = tag_texts(model, world.names)
    names = ["background", *world.names]
    rows: Table = {}
    for looks, batching in (("", Batching(batch_size=16)), (", 2 x 2 origins", FOUR_ORIGINS)):
        found = tag_all(model, world, texts, settings=settings_of(model), batching=batching)
        kinds = {"tags found": np.stack([tagged.tags for tagged in found]), "true tags": world.tags}
        for (kind, tags), (how, settings) in itertools.product(kinds.items(), SHARPENED.items()):
            labels = label_maps(world.images, tags, found, settings)
            report = segmentation_report(labels, world.masks, names)
            rows[f"patch scores{looks}, {kind}{how}"] = {"mIoU": 100 * report["mIoU"]}
    dense = segment_dense(model, [Image.fromarray(image) for image in world.images], texts, DENSE)
    labels = [mask.labels for mask in sorted(dense, key=lambda mask: mask.number)]
    rows["dense features, no tags"] = {"mIoU": 100 * segmentation_report(np.stack(labels), world.masks, names)["mIoU"]}
    return rows


def as_table(head: str, rows: Table) -> str:
    """Rows in one-decimal percent under a title."""
    columns = list(next(iter(rows.values())))
    return f"{head}\n\n" + markdown_table(["", *columns], [[n, *row.values()] for n, row in rows.items()], digits=1)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="art", help="'art' or a folder")
    parser.add_argument("--sprites", default="jaxzs-out/art/sprites.npz")
    parser.add_argument("--each", type=int, default=12, help="images of each thing")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--card", type=Path, default=None, help="checkpoint folder whose model card gets the tables")
    options = parser.parse_args()
    model, drawings = load(options.model), sprites.load(options.sprites)
    artist = unseen(options.sprites)
    world = scenes(artist, options.scenes)
    seen = Artists([drawings[name] for name in sprites.TRAINED])
    tables = {
        "accuracy in %, transductive": classification(
            model, {"unseen artist": artist, "artists seen": seen}, options.each
        ),
        f"tags of {options.scenes} scenes of 3 to 5 things by the unseen artist, in %": tagging(model, world),
        "masks of the same scenes, in %": segmentation(model, world),
    }
    command = f"python -m experiments.evaluate_art_clip --each {options.each} --scenes {options.scenes}"
    figures = [
        Figure(title, row, column, value)
        for title, rows in tables.items()
        for row, values in rows.items()
        for column, value in values.items()
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    write_record(
        options.out / "evaluation.json",
        command=command,
        settings={"each": options.each, "scenes": options.scenes},
        results=Results(tables, tuple(figures)),
        model=model,
    )
    text = "\n\n".join(as_table(title, rows) for title, rows in tables.items())
    print(text)
    (options.out / "tables.md").write_text(f"`{command}`\n\n{text}\n", encoding="utf-8")
    if options.card is not None:
        card = json.loads((options.card / "model_card.json").read_text(encoding="utf-8"))
        write_card(options.card, card["training"], tables, f"`{command}`\n\n{text}")


if __name__ == "__main__":
    main()
