"""What the demo checkpoint can do: the tables of its model card.

Run from the repository's root; no image here was trained on, and no checkpoint chosen by these
figures (a short trial run's were seen before the final run's length, batch and learning rate were set):

    python -m experiments.evaluate_demo_clip --mnist FOLDER

Classification is transductive (proxies are learned on the very images that are classified, without labels),
with the temperatures 1/s and 4/s of the checkpoint's logit scale s. FOLDER holds MNIST test images as
FOLDER/0/*.png to FOLDER/9/*.png; without it MNIST is left out. Tagging is TagCLIP's, step by step.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments import demo_world
from experiments.demo_world.captions import (
    BACKGROUND_NAMES,
    DIGIT_TEMPLATES,
    DIGITS,
    GLYPH_NAMES,
    SHAPES,
)
from experiments.demo_world.card import write_card
from jaxzs import data, patch, proxy, zeroshot
from jaxzs.clip import Model, encode_image, load
from jaxzs.commands.demo import real_digits
from jaxzs.patch.metrics import f1, mean_average_precision
from jaxzs.report import markdown_table, write_record

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
            raise SystemExit(
                f"{folder / str(digit)} has no .png files; expected one folder a digit, 0 to 9"
            )
        images += [np.asarray(Image.open(file)) for file in files]
        labels += [digit] * len(files)
    return images, np.array(labels)


def classify(model: Model, features: Any, labels: np.ndarray, text: Any) -> list[float]:
    """Accuracy in % of each of METHODS."""
    s = model.logit_scale
    predictions = [zeroshot.predict(features, text)]
    for gamma in (1.0, 0.0):
        fitted = proxy.fit(features, text, label_temperature=1 / s, temperature=4 / s, gamma=gamma)
        predictions.append(zeroshot.predict(features, fitted.proxies))
    hits = [np.asarray(p) == labels for p in predictions]
    return [100 * float(h.mean()) for h in hits]


def imbalanced(labels: np.ndarray, ratio: int = 5, seed: int = 0) -> np.ndarray:
    """Indices that keep every image of the first half of the classes and one in `ratio` of the others."""
    rng = np.random.default_rng(seed)
    rare = labels >= (labels.max() + 1) // 2
    return np.flatnonzero(~rare | (rng.random(len(labels)) < 1 / ratio))


def classification_tables(
    model: Model, mnist_folder: Path | None, num: int
) -> dict[str, list[float]]:
    """Accuracy of the three methods on every set, by name."""
    digit_names = list(DIGITS)
    digits = zeroshot.text_proxies(model, digit_names, DIGIT_TEMPLATES)
    templates = data.template_set("tagclip85")
    shapes = zeroshot.text_proxies(model, list(SHAPES), templates)
    outlines = zeroshot.text_proxies(model, list(demo_world.OUTLINE_SHAPES), templates)
    glyphs = zeroshot.text_proxies(model, [names[0] for names in GLYPH_NAMES], templates)
    sets: dict[str, tuple[Any, np.ndarray, Any]] = {"load_digits (real)": (*real_digits(), digits)}
    if mnist_folder is not None:
        sets["MNIST test subset (real)"] = (*mnist(mnist_folder), digits)
    sets |= {
        "rendered digits, test fonts": (*demo_world.digits(num), digits),
        "rendered glyphs, test fonts": (*demo_world.glyphs(num), glyphs),
        "filled shapes": (*demo_world.shapes(num), shapes),
        "outline shapes (never trained)": (*demo_world.outline_shapes(num), outlines),
        "corrupted shapes": (*demo_world.corrupted("shapes", num), shapes),
        "corrupted glyphs": (*demo_world.corrupted("glyphs", num), glyphs),
    }
    rows = {}
    for name, (images, labels, text) in sets.items():
        features = zeroshot.image_features(model, model.preprocess(list(images)))
        rows[name] = classify(model, features, labels, text)
        if "real" in name:
            kept = imbalanced(labels)
            rows[f"{name}, imbalanced 5:1"] = classify(model, features[kept], labels[kept], text)
    return rows


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


def tagging_tables(
    model: Model, num: int, sizes: Sequence[int] = (48, 96, 128)
) -> dict[str, dict[str, list[float]]]:
    """mAP and F1 after each of STEPS, by size."""
    names = [*SHAPES, *BACKGROUND_NAMES]
    text = jnp.asarray(zeroshot.text_proxies(model, names, data.template_set("tagclip85")))
    table: dict[str, dict[str, list[float]]] = {"mAP": {}, "F1": {}}
    for size in sizes:
        least, most = (1, 3) if size == 48 else (3, 5)
        found = demo_world.scenes(num, size=size, min_objects=least, max_objects=most)
        name = f"{size} px, {least} to {most} objects"
        scores = tag_scores(model, found.images, text)
        table["mAP"][name] = [100 * mean_average_precision(s, found.tags) for s in scores]
        table["F1"][name] = [100 * f1(above_half(s), found.tags).f1 for s in scores]
    return table


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="'demo' or a folder")
    parser.add_argument(
        "--mnist", type=Path, default=None, help="folder with one subfolder a digit"
    )
    parser.add_argument("--num", type=int, default=1200, help="rendered images of each set")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--card", type=Path, default=None, help="checkpoint folder whose model card gets the tables"
    )
    options = parser.parse_args()
    model = load(options.model)
    classification = classification_tables(model, options.mnist, options.num)
    tagging = tagging_tables(model, options.num // 2)
    table = lambda head, columns, rows: (  # noqa: E731
        f"{head}\n\n" + markdown_table(columns, [[k, *v] for k, v in rows.items()], digits=1)
    )
    tables = [table("accuracy in %, transductive", ["images", *METHODS], classification)]
    tables += [table(f"tagging, {k} in %", ["scenes", *STEPS], rows) for k, rows in tagging.items()]
    text = "\n\n".join(tables)
    print(text)
    command = f"python -m experiments.evaluate_demo_clip --num {options.num}" + (
        " --mnist FOLDER" if options.mnist else ""
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "tables.md").write_text(f"`{command}`\n\n{text}\n")
    if options.card is not None:
        card = json.loads((options.card / "model_card.json").read_text())
        results = {"command": command, "classification": classification, "tagging": tagging}
        write_card(options.card, card["training"], results, f"`{command}`\n\n{text}")
    write_record(
        options.out / "evaluation.json",
        command=command,
        settings={
            "num": options.num,
            "templates": {"digits": DIGIT_TEMPLATES, "others": "tagclip85"},
            "protocol": "transductive",
        },
        metrics=json.loads(json.dumps({"classification": classification, "tagging": tagging})),
        fingerprint=model.fingerprint,
    )


if __name__ == "__main__":
    main()
