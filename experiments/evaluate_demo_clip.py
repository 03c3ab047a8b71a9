"""What the demo checkpoint can do: the tables of its model card.

Run from the repository's root; no image here was trained on, and no checkpoint chosen by these
figures (a short trial run's were seen before the final run's length, batch and learning rate were set):

    python -m experiments.evaluate_demo_clip --mnist FOLDER

Classification is transductive (proxies are learned on the very images that are classified, without labels),
with the temperatures 1/s and 4/s of the checkpoint's logit scale s. FOLDER holds MNIST test images as
FOLDER/0/*.png to FOLDER/9/*.png; without it MNIST is left out. Tagging is TagCLIP's, step by step.
With --skip-existing, sets that the record holds already are not computed again.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments import demo_world
from experiments.demo_world.captions import BACKGROUND_NAMES, DIGIT_TEMPLATES, DIGITS, GLYPH_NAMES, SHAPES
from experiments.demo_world.card import write_card
from jaxzs import data, patch, proxy, zeroshot
from jaxzs.clip import Model, encode_image, load
from jaxzs.patch.metrics import f1, mean_average_precision
from jaxzs.report import Figure, Results, Sweep, data_entry, markdown_table

RESULTS = Path(__file__).parent / "results" / "demo_clip"
METHODS = ("zero-shot", "proxies, plain", "proxies, Sinkhorn")
STEPS = ("global", "patch max", "+ attention", "+ CWR")


# --- classification -----------------------------------------------------------------------------------


def mnist(folder: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """Images of FOLDER/0 ... FOLDER/9."""
    from PIL import Image

    images, labels = [], []
    for digit in range(10):
        files = sorted((folder / str(digit)).glob("*.png"))
        if not files:
            raise SystemExit(f"{folder / str(digit)} has no .png files; expected one folder a digit, 0 to 9")
        images += [np.asarray(Image.open(file)) for file in files]
        labels += [digit] * len(files)
    return images, np.array(labels)


def classify(model: Model, features: Any, labels: np.ndarray, text: Any) -> list[float]:
    """Accuracy in % of each of METHODS."""
    s = model.logit_scale
    predictions = [zeroshot.predict(features, text)]
    for gamma in (1.0, 0.0):
        fitted = proxy.fit(features, text, proxy.Settings(gamma=gamma), logit_scale=s)
        predictions.append(zeroshot.predict(features, fitted.proxies))
    hits = [np.asarray(p) == labels for p in predictions]
    return [100 * float(h.mean()) for h in hits]


def imbalanced(labels: np.ndarray, ratio: int = 5, seed: int = 0) -> np.ndarray:
    """Indices that keep every image of the first half of the classes and one in `ratio` of the others."""
    rng = np.random.default_rng(seed)
    rare = labels >= (labels.max() + 1) // 2
    return np.flatnonzero(~rare | (rng.random(len(labels)) < 1 / ratio))


class Classification(NamedTuple):
    """Images, their labels, class names and templates."""

    images: Any
    labels: np.ndarray
    class_names: Sequence[str]
    templates: Sequence[str]


def classification_sets(mnist_folder: Path | None, num: int) -> dict[str, Classification]:
    """Every set to classify, by name."""
    digits = list(DIGITS), DIGIT_TEMPLATES
    templates = data.template_set("tagclip85")
    shapes, outlines = (list(SHAPES), templates), (list(demo_world.OUTLINE_SHAPES), templates)
    glyphs = [names[0] for names in GLYPH_NAMES], templates
    sets = {"load_digits (real)": Classification(*data.samples.digits(), *digits)}
    if mnist_folder is not None:
        sets["MNIST test subset (real)"] = Classification(*mnist(mnist_folder), *digits)
    return sets | {
        "rendered digits, test fonts": Classification(*demo_world.digits(num), *digits),
        "rendered glyphs, test fonts": Classification(*demo_world.glyphs(num), *glyphs),
        "filled shapes": Classification(*demo_world.shapes(num), *shapes),
        "outline shapes (never trained)": Classification(*demo_world.outline_shapes(num), *outlines),
        "corrupted shapes": Classification(*demo_world.corrupted("shapes", num), *shapes),
        "corrupted glyphs": Classification(*demo_world.corrupted("glyphs", num), *glyphs),
    }


def classified(model: Model, name: str, given: Classification) -> Results:
    """Accuracy of the three methods on one set; on real images also with classes out of balance."""
    text = zeroshot.text_proxies(model, given.class_names, given.templates)
    features = zeroshot.image_features(model, model.preprocess(list(given.images)))
    rows = {name: classify(model, features, given.labels, text)}
    if "real" in name:
        kept = imbalanced(given.labels)
        few = classify(model, features[kept], given.labels[kept], text)
        rows[f"{name}, imbalanced 5:1"] = few
    return Results(
        rows,
        tuple(
            Figure(of, method, "accuracy", value, "transductive")
            for of, values in rows.items()
            for method, value in zip(METHODS, values, strict=True)
        ),
    )


def identity_of(images: Any, labels: np.ndarray) -> str:
    """Hash of images, which may differ in size, and their labels."""
    digest = hashlib.sha256(np.ascontiguousarray(labels))
    for image in images:
        digest.update(np.ascontiguousarray(image))
    return digest.hexdigest()


# --- tagging ------------------------------------------------------------------------------------------


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def above_half(scores: np.ndarray) -> np.ndarray:
    """Tags [N,F] bool: scores above the middle of their image's range."""
    return scores > (scores.min(1, keepdims=True) + scores.max(1, keepdims=True)) / 2


def tag_scores(model: Model, images: np.ndarray, text: Any, *, batch: int = 50) -> list[np.ndarray]:
    """Scores [N,12] after each of STEPS."""
    normal = model.preprocessor
    mean, deviation = (np.array(x, np.float32) for x in (normal.image_mean, normal.image_std))
    parts: list[list[np.ndarray]] = [[], [], [], []]
    F = len(SHAPES)
    for start in range(0, len(images), batch):
        pixels = (images[start : start + batch].astype(np.float32) / 255 - mean) / deviation
        features = encode_image(model.params, pixels, model.config, interpolate_positions=True)
        similar = np.asarray(zeroshot.similarity(features, text)) * model.logit_scale
        parts[0].append(softmax(similar)[:, :F])
        tags = patch.tag(model.params, pixels, text, model.config, num_foreground=F)
        parts[1].append(np.asarray(tags.coarse)[:, :, :F].max(1))
        parts[2].append(np.asarray(tags.refined)[:, :, :F].max(1))
        parts[3].append(np.asarray(tags.scores))
    return [np.concatenate(p) for p in parts]


def tagged(model: Model, name: str, found: demo_world.Scenes) -> Results:
    """mAP and F1 after each of STEPS on some scenes."""
    names = [*SHAPES, *BACKGROUND_NAMES]
    text = jnp.asarray(zeroshot.text_proxies(model, names, data.template_set("tagclip85")))
    scores = tag_scores(model, found.images, text)
    rows = {
        "mAP": [100 * mean_average_precision(s, found.tags) for s in scores],
        "F1": [100 * f1(above_half(s), found.tags).f1 for s in scores],
    }
    return Results(
        rows,
        tuple(
            Figure(name, step, kind, value)
            for kind, values in rows.items()
            for step, value in zip(STEPS, values, strict=True)
        ),
    )


def scene_sets(num: int, sizes: Sequence[int] = (48, 96, 128)) -> dict[str, demo_world.Scenes]:
    """Scenes to tag, by name."""
    sets = {}
    for size in sizes:
        least, most = (1, 3) if size == 48 else (3, 5)
        name = f"{size} px, {least} to {most} objects"
        sets[name] = demo_world.scenes(num, size=size, min_objects=least, max_objects=most)
    return sets


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="'demo' or a folder")
    parser.add_argument("--mnist", type=Path, default=None, help="folder with one subfolder a digit")
    parser.add_argument("--num", type=int, default=1200, help="rendered images of each set")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--card", type=Path, default=None, help="checkpoint folder whose model card gets the tables")
    parser.add_argument("--skip-existing", action="store_true", help="keep sets of the record")
    options = parser.parse_args()
    model = load(options.model)
    command = f"python -m experiments.evaluate_demo_clip --num {options.num}" + (
        " --mnist FOLDER" if options.mnist else ""
    )
    sweep = Sweep(
        options.out / "evaluation.json",
        command=command,
        settings={"templates": {"digits": DIGIT_TEMPLATES, "others": "tagclip85"}, "protocol": "transductive"},
        model=model,
        skip_existing=options.skip_existing,
    )
    classification: dict[str, list[float]] = {}
    for name, given in classification_sets(options.mnist, options.num).items():
        entry = data_entry(name, identity_of(given.images, given.labels), len(given.labels))
        compute = functools.partial(classified, model, name, given)
        classification |= sweep.cell(name, compute, data=entry).metrics
    tagging: dict[str, dict[str, list[float]]] = {"mAP": {}, "F1": {}}
    for name, found in scene_sets(options.num // 2).items():
        entry = data_entry(name, identity_of(found.images, found.tags), len(found.tags))
        compute = functools.partial(tagged, model, name, found)
        for kind, values in sweep.cell(name, compute, data=entry).metrics.items():
            tagging[kind][name] = values
    sweep.finish(Results({"classification": classification, "tagging": tagging}))
    table = lambda head, columns, rows: (  # noqa: E731
        f"{head}\n\n" + markdown_table(columns, [[k, *v] for k, v in rows.items()], digits=1)
    )
    tables = [table("accuracy in %, transductive", ["images", *METHODS], classification)]
    tables += [table(f"tagging, {k} in %", ["scenes", *STEPS], rows) for k, rows in tagging.items()]
    text = "\n\n".join(tables)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "tables.md").write_text(f"`{command}`\n\n{text}\n")
    if options.card is not None:
        card = json.loads((options.card / "model_card.json").read_text())
        results = {"command": command, "classification": classification, "tagging": tagging}
        write_card(options.card, card["training"], results, f"`{command}`\n\n{text}")


if __name__ == "__main__":
    main()
