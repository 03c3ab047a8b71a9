# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Patches: what is in a picture, and where
#
# TagCLIP (Lin et al., AAAI 2024) reads CLIP's patches instead of its class token, so that a scene gets all its
# tags, and each tag a place. Nothing is trained.
#
# `MODEL = "demo"` takes the small checkpoint inside the package and rendered scenes of coloured shapes. For real
# weights change that one line, e.g. to `"openai/clip-vit-base-patch16"`: then the pictures are two photographs
# (they come with scikit-learn) under everyday names. The tables need pictures with known truth and take rendered
# scenes either way. What to see is written for the demo checkpoint.

# %%
MODEL = "demo"  # or a hub id such as "openai/clip-vit-base-patch16", or a folder with a checkpoint

import shutil
import subprocess
import sys
from pathlib import Path

places = [Path.cwd(), *Path.cwd().parents]
if "google.colab" in sys.modules:
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "install", "-q", "jaxzs"], check=True)
    # The scenes are rendered by what lies beside the package in its source distribution.
    subprocess.run([*pip, "download", "-q", "--no-deps", "--no-binary=jaxzs", "jaxzs"], check=True)
    for archive in Path().glob("jaxzs-*.tar.gz"):
        shutil.unpack_archive(archive)
    places += Path().glob("jaxzs-*/")

import jax

import jaxzs

devices = jax.devices()
kind = f"{devices[0].platform.upper()} ({devices[0].device_kind})"
print(f"jaxzs {jaxzs.__version__}, JAX {jax.__version__} on {len(devices)} x {kind}")

# %%
# The scenes are rendered by experiments/demo_world of the repository, which is not part of the installed package.
repository = next((place for place in places if (place / "experiments" / "demo_world").is_dir()), None)
if repository is None:
    raise SystemExit("Start this notebook inside of a checkout of the jaxzs repository.")
sys.path.insert(0, str(repository))

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from experiments.demo_world import scenes
from experiments.demo_world.captions import BACKGROUND_NAMES, SHAPES
from jaxzs import patch, report
from jaxzs.clip import encode_image
from jaxzs.patch.local import class_probabilities
from jaxzs.patch.metrics import segmentation_report, tag_report
from jaxzs.patch.overlay import draw_overlay, voc_palette

plt.rcParams["figure.dpi"] = 80

# %% [markdown]
# ## Pictures and names
#
# The foreground names can become tags. The background names only compete: a patch of sky should be something
# other than the least unlikely tag.

# %%
model = jaxzs.load(MODEL)
if MODEL == "demo":
    world = scenes(4, size=96, min_objects=3, max_objects=5)
    pictures, truth = list(world.images), world.tags
    names, background = list(SHAPES), list(BACKGROUND_NAMES)
else:
    pictures = load_sample_images().images
    names = ["pagoda", "tree", "flower", "leaf", "person", "dog", "cat", "horse", "car", "bicycle"]
    background = ["sky", "lake", "haze", "ground", "wall"]
    contents = [{"pagoda", "tree"}, {"flower", "leaf"}]
    truth = np.array([[name in content for name in names] for content in contents])


def listed(chosen):
    """Names of the chosen classes."""
    return ", ".join(names[c] for c in chosen)


figure, axes = plt.subplots(1, len(pictures), figsize=(11, 3), layout="constrained")
for axis, picture, there in zip(axes, pictures, truth, strict=True):
    axis.imshow(picture)
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel(listed(np.flatnonzero(there)), fontsize=8)
plt.show()

# %% [markdown]
# ## Tags
#
# One call for pictures of any sizes. **See:** most tags are right, some are missing or wrong: this is a small
# model, and scenes are twice as large as anything it was trained on.

# %%
texts = patch.tag_texts(model, names, background)  # [C,E], mean of 85 templates


def tag(images, texts, num_foreground):
    """`ImageTags` of every image, in order."""
    found = patch.tag_images(model, images, texts, num_foreground=num_foreground)
    return sorted(found, key=lambda tagged: tagged.number)


found = tag(pictures, texts, len(names))
rows = []
for tagged, there in zip(found, truth, strict=True):
    order = np.argsort(-tagged.scores)
    right, wrong = tagged.tags & there, tagged.tags & ~there
    missing = there & ~tagged.tags
    rows.append([tagged.number, *(listed(c for c in order if kind[c]) for kind in (right, wrong, missing))])
print(report.markdown_table(["picture", "right", "wrong", "missing"], rows))

# %% [markdown]
# ## Tags with their places
#
# **See:** on the photo a box for every tag, then where each tag scores high, yellow where most. The number is the
# score from 0 to 1; the "second look" is the probability of the tag when its box is cut out and encoded again.
# First the picture that went best, then the one that went worst: there several names share the same places.

# %%
quality = [
    (tagged.tags & there).sum() - (tagged.tags ^ there).sum() for tagged, there in zip(found, truth, strict=True)
]
best, worst = int(np.argmax(quality)), int(np.argmin(quality))


def overlay(number):
    """Boxes and heat maps of one picture."""
    figure = draw_overlay(Image.fromarray(pictures[number]), found[number], names)
    figure.set_dpi(60)
    return figure


overlay(best)

# %%
overlay(worst)

# %% [markdown]
# ## Before and after refinement
#
# Coarse scores are a softmax over the names for each patch on its own. Dual-masking attention refinement (DMAR)
# averages them over patches that attend to each other.
#
# **See:** objects fill up, which is where the gain below comes from; and what attends to each other blends, so
# that each shape now shows a little in the other's map. Scores fall as a whole (the attention weights sum to less
# than one); tags depend on their range alone.

# %%
tagged = found[best]
shown = [c for c in np.argsort(-tagged.scores) if tagged.tags[c] or truth[best][c]][:4]
height, width = tagged.size
figure, axes = plt.subplots(
    2, 1 + len(shown), figsize=(2.3 * (1 + len(shown)), 4.4), squeeze=False, layout="constrained"
)
for row, (scores, title) in enumerate(((tagged.coarse, "coarse"), (tagged.refined, "refined"))):
    axes[row, 0].imshow(pictures[best])
    axes[row, 0].set_ylabel(title)
    highest = scores[..., shown].max()
    for axis, c in zip(axes[row, 1:], shown, strict=True):
        heat = axis.imshow(scores[..., c], cmap="inferno", vmin=0, vmax=highest, extent=(0, width, height, 0))
        axis.set_title(names[c])
    figure.colorbar(heat, ax=axes[row], label="score, 0 to 1")
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## What each step adds
#
# The paper's ablation, on 48 scenes twice as large as the checkpoint's images. Scores of a name: the class token
# of the whole scene; the best patch; after DMAR; after the second look (class-wise re-identification, CWR).
#
# **See:** on the demo checkpoint patches beat the class token and DMAR adds most. CWR, which helps in the paper,
# lowers mAP here: crops of a few pixels hold less than the patches did.

# %%
size = 2 * model.config.vision.image_size
world = scenes(48, size=size, min_objects=3, max_objects=5, seed=1)
shape_texts = patch.tag_texts(model, SHAPES, BACKGROUND_NAMES)
F = len(SHAPES)


def class_token_scores(images):
    """Probability of each shape from the class token of the whole scene, at its own size: [N,F]."""
    pixels = model.preprocessor.normalize(images)
    features = [
        encode_image(model.params, pixels[i : i + 16], model.config, interpolate_positions=True)
        for i in range(0, len(pixels), 16)
    ]
    probabilities = class_probabilities(np.concatenate(features), shape_texts, model.params["logit_scale"])
    return np.asarray(probabilities)[:, :F]


tagged_scenes = tag(world.images, shape_texts, F)
steps = {
    "class token": class_token_scores(world.images),
    "coarse": np.stack([one.coarse[..., :F].max((0, 1)) for one in tagged_scenes]),
    "+ DMAR": np.stack([one.refined[..., :F].max((0, 1)) for one in tagged_scenes]),
    "+ CWR": np.stack([one.scores for one in tagged_scenes]),
}
rows = []
for name, scores in steps.items():
    lowest, highest = scores.min(1, keepdims=True), scores.max(1, keepdims=True)
    tags = scores > (lowest + highest) / 2  # the paper's rule: above half of the range
    figures = tag_report(scores, tags, world.tags, SHAPES)
    rows.append([name, 100 * figures["mAP"], 100 * figures["f1_overall"]["f1"], figures["tags_per_image"]])
print(f"{len(world.images)} scenes, {size} px, {world.tags.sum(1).mean():.1f} true tags a scene")
print(report.markdown_table(["scores", "mAP, %", "F1, %", "tags a scene"], rows, 1))

# %% [markdown]
# ## Masks
#
# From tags to a label for every pixel, in two ways. The paper's: class activation maps by gradients (CLIP-ES),
# spread along the attention. Or the refined patch scores themselves. Both are sharpened by a dense CRF, which
# follows the colours.
#
# **See:** the demo checkpoint's patches were trained, so its patch scores are the better maps, by far. Published
# CLIPs, whose patches were not, gain from CLIP-ES. The true tags are given here, so that only the masks are
# compared.

# %%
few = world.images[:12]
true_tags = [np.flatnonzero(row) for row in world.tags[:12]]
sharpened = patch.Segmenting(crf=patch.CRF(stride=max(1, round(size / 48))))  # every second row and column at 96 px
activation = patch.segment_images(model, few, true_tags, shape_texts[:F], shape_texts[F:], sharpened)
activation = [one.labels for one in sorted(activation, key=lambda one: one.number)]
scored = [
    patch.pixel_labels(image, patch.score_maps(one, tags), tags, sharpened)
    for image, one, tags in zip(few, tagged_scenes, true_tags, strict=False)
]
labels = ["background", *SHAPES]
rows = []
for name, masks in (("CLIP-ES + CRF", activation), ("patch scores + CRF", scored)):
    figures = segmentation_report(masks, world.masks[:12], labels)
    rows.append([name, 100 * figures["mIoU"], 100 * figures["pixel_accuracy"]])
print(report.markdown_table(["masks of 12 scenes", "mIoU, %", "pixels right, %"], rows, 1))

# %%
palette = voc_palette()
columns = {"scene": few, "CLIP-ES + CRF": activation, "patch scores + CRF": scored, "truth": world.masks}
figure, axes = plt.subplots(4, 4, figsize=(8, 8.2), layout="constrained")
for row in range(4):
    for axis, (title, content) in zip(axes[row], columns.items(), strict=True):
        axis.imshow(content[row] if title == "scene" else palette[content[row]])
        axis.set(xticks=[], yticks=[], title=title if row == 0 else "")
    axes[row, 0].set_xlabel(", ".join(SHAPES[c] for c in true_tags[row]), fontsize=8)
plt.show()

# %% [markdown]
# From the shell:
#
# ```sh
# jaxzs tag FOLDER --dataset voc2012 --overlay tags/ --model openai/clip-vit-base-patch16
# jaxzs segment FOLDER --dataset voc2012 --crf --out masks/ --model openai/clip-vit-base-patch16
# ```
#
# The full ablations with 300 scenes of each size are in `experiments/results/patch_demo.md` and `segment_demo.md`.
