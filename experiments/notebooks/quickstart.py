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
# # Quickstart: CLIP on your own images, better without labels
#
# Load a checkpoint, classify zero-shot, learn **proxies** from the unlabelled images themselves (InMaP, Qian, Xu
# and Hu, NeurIPS 2023), and look at what changed.
#
# `MODEL = "demo"` is the small checkpoint inside the package: no download, a minute on a laptop. It was trained
# on rendered pictures only; the images here are 1,797 real scanned digits (UCI, they come with scikit-learn). For
# real weights change that one line, e.g. to `"openai/clip-vit-base-patch32"`: the same images go through the same
# cells, only larger. For images of your own name a folder as well, laid out as `class name/image.jpg`. What to
# see is written for the demo checkpoint.

# %%
MODEL = "demo"  # or a hub id such as "openai/clip-vit-base-patch32", or a folder with a checkpoint
FOLDER = ""  # your own images, class name/image.jpg; "" takes the scanned digits

import subprocess
import sys

if "google.colab" in sys.modules:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "jaxzs"], check=True)

import jax

import jaxzs

devices = jax.devices()
kind = f"{devices[0].platform.upper()} ({devices[0].device_kind})"
print(f"jaxzs {jaxzs.__version__}, JAX {jax.__version__} on {len(devices)} x {kind}")

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

from jaxzs import data, features, proxy, report, zeroshot

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## Load and encode
#
# A model is a parameter tree (HuggingFace's), a frozen configuration, a tokenizer and a preprocessor. `extract`
# encodes each image once, into a store on disk that a second run finds again.

# %%
model = jaxzs.load(MODEL)
vision = model.config.vision
num_params = sum(leaf.size for leaf in jax.tree.leaves(model.params))
print(f"{num_params / 1e6:.1f} M parameters, {vision.image_size} px images in {vision.patch_size} px patches")
print(f"logit scale {model.logit_scale:.1f}, features of {model.config.projection_dim} numbers")

# %%
if FOLDER:
    source = data.open_source(FOLDER)
    names = [name.replace("_", " ") for name in source.label_names]
    templates = data.template_set("imagenet7")
else:
    digits = load_digits()
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    source = data.from_arrays(np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target, names)
    templates = [
        "a photo of the digit {}.", "the digit {}", "a photo of the number {}.", "the number {}",
        "a drawing of the digit {}.", "a low resolution photo of the digit {}.",
        "a black and white photo of the digit {}.",
    ]  # fmt: skip

store = features.extract(model, source, Path(tempfile.gettempdir()) / "jaxzs-quickstart").arrays()
images, labels = store.features, store.labels  # [N,E], [N]
print(f"{len(images)} images of {len(names)} classes: {', '.join(names[:10])}")

# %% [markdown]
# ## Zero-shot
#
# One text proxy a class: the templates are filled with its name, encoded, normalised and averaged. An image gets
# the class whose text proxy is most similar. **See:** most digits are right, and the mistakes sit in a few
# classes.

# %%
text = zeroshot.text_proxies(model, names, templates)  # [C,E]
before = np.asarray(zeroshot.predict(images, text))


def accuracy(predicted):
    """Percent right; labels are used for nothing else in this notebook."""
    return 100 * float(np.mean(np.asarray(predicted) == labels))


print(f"zero-shot accuracy {accuracy(before):.1f} %")

# %% [markdown]
# ## Learn proxies
#
# A text proxy is not where the images of its class are: the two towers put their features in different parts of
# the sphere. InMaP makes soft labels with the text proxies, then learns one *vision* proxy a class from all the
# images. Soft labels are a plain softmax (`gamma=1`), or balanced over the classes by Sinkhorn iterations
# (`gamma=0`, the default of `proxy.fit`). The temperatures are the paper's 0.01 and 0.04, relative to the logit
# scale.
#
# **See:** accuracy on the very images that the proxies were learned from (transductive: many images, none
# labelled).

# %%
s = model.logit_scale
plain = proxy.fit(images, text, proxy.Settings(gamma=1.0), logit_scale=s)
sinkhorn = proxy.fit(images, text, proxy.Settings(gamma=0.0), logit_scale=s)
after = np.asarray(zeroshot.predict(images, sinkhorn.proxies))

rows = [
    ["text proxies (zero-shot)", accuracy(before)],
    ["learned, plain softmax", accuracy(zeroshot.predict(images, plain.proxies))],
    ["learned, Sinkhorn", accuracy(after)],
]
print(report.markdown_table(["proxies", "accuracy, %"], rows, digits=1))

# %% [markdown]
# ## What changed
#
# The margin of an image is its cosine to the proxy of its true class minus the largest cosine to another: below
# zero is a mistake.
#
# **See:** left, margins grow, and fewer images are left of zero. Right, the gain is not uniform: the poor classes
# gain most, some good ones lose a little.


# %%
def margins(proxies):
    """Cosine to the own proxy minus the best other one: [N]."""
    cosine = np.array(zeroshot.similarity(images, proxies))
    own = cosine[np.arange(len(labels)), labels]
    cosine[np.arange(len(labels)), labels] = -np.inf
    return own - cosine.max(1)


shares = [[100 * np.mean(p[labels == c] == c) for c in range(len(names))] for p in (before, after)]
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2), width_ratios=(1, 1.6), layout="constrained")
for proxies, share, name, offset in zip(
    (text, sinkhorn.proxies), shares, ("zero-shot", "learned proxies"), (-0.2, 0.2), strict=True
):
    left.hist(margins(proxies), bins=np.linspace(-0.6, 1.0, 61), alpha=0.6, label=name)
    right.bar(np.arange(len(names)) + offset, share, 0.38, label=name)
left.axvline(0, color="black", linewidth=0.8)
left.set(xlabel="margin (difference of cosines)", ylabel="images")
left.legend(frameon=False)
right.set_xticks(range(len(names)), names, rotation=30)
right.set(xlabel="class", ylabel="accuracy, %", ylim=(0, 118))
right.legend(ncols=2, loc="upper center", frameon=False)
plt.show()

# %% [markdown]
# **See:** a sample of the images whose label changed, with their labels before and after. Green: now right. Red:
# now wrong. Grey: wrong both times.

# %%
changed = np.flatnonzero(before != after)
gained, lost = (before != labels) & (after == labels), (before == labels) & (after != labels)
print(f"{len(changed)} labels changed: {gained.sum()} now right, {lost.sum()} now wrong, the rest wrong twice")

shown = np.random.default_rng(0).permutation(changed)[:36]
figure, axes = plt.subplots(3, 12, figsize=(11, 3.6), layout="constrained")
for axis in axes.flat:
    axis.axis("off")
for axis, i in zip(axes.flat, shown, strict=False):
    axis.imshow(source[i].image, cmap="gray_r", interpolation="bicubic")
    colour = "tab:green" if gained[i] else "tab:red" if lost[i] else "tab:gray"
    axis.set_title(f"{names[before[i]]}\n\N{RIGHTWARDS ARROW} {names[after[i]]}", color=colour, fontsize=8)
plt.show()

# %% [markdown]
# ## Images that were not there
#
# Proxies are vectors like any others: learn them on one half of the images, classify the other half.
#
# **See:** the gain holds on images that the proxies have never seen.

# %%
order = np.random.default_rng(0).permutation(len(images))
first, second = order[: len(order) // 2], order[len(order) // 2 :]
learned = proxy.fit(images[first], text, logit_scale=s).proxies
for name, proxies in (("zero-shot", text), ("proxies of the first half", learned)):
    hits = np.asarray(zeroshot.predict(images[second], proxies)) == labels[second]
    print(f"second half, {name}: {100 * hits.mean():.1f} %")

# %% [markdown]
# ## Where it hurts
#
# `gamma=0` assumes that every class has the same number of images. Take most of half the classes away and that is
# wrong. `gamma="auto"` chooses the balance without labels: it is the default of `jaxzs classify`, whose folders
# may hold anything.
#
# **See:** with classes out of balance ten to one the uniform marginal costs far more than proxies gain; "auto"
# notices.

# %%
rare = labels >= len(names) / 2
unbalanced = np.flatnonzero(~rare | (np.random.default_rng(0).random(len(labels)) < 0.1))
rows = [["zero-shot", 100 * np.mean(before[unbalanced] == labels[unbalanced])]]
for gamma in (1.0, 0.0, "auto"):
    key = jax.random.key(0) if gamma == "auto" else None
    fitted = proxy.fit(images[unbalanced], text, proxy.Settings(gamma=gamma), logit_scale=s, key=key)
    hits = np.asarray(zeroshot.predict(images[unbalanced], fitted.proxies)) == labels[unbalanced]
    rows.append([f"learned, gamma={gamma}", 100 * hits.mean()])
print(f"{len(unbalanced)} images, classes out of balance 10 to 1")
print(report.markdown_table(["proxies", "accuracy, %"], rows, digits=1))

# %% [markdown]
# ## Save and load
#
# Proxies are a small array; the file says what their classes are called, and which weights they belong to.

# %%
file = Path(tempfile.gettempdir()) / "proxies.safetensors"
learned = proxy.LearnedProxies(sinkhorn.proxies, tuple(names), model.fingerprint)
proxy.save_proxies(file, learned)

kept = proxy.load_proxies(file, model)  # refuses those of another checkpoint
image = zeroshot.image_features(model, model.preprocess(source[0].image))
label = int(zeroshot.predict(image, kept.proxies)[0])
print(f"image 0: {kept.class_names[label]}, truly {names[labels[0]]}")
print(f"{file.stat().st_size / 1000:.1f} kB")

# %% [markdown]
# ## On a page
#
# `jaxzs app` opens a page in the browser that does this with images dropped into it, and tags and masks. On Colab
# the page appears below this cell, for you alone; elsewhere start it in a terminal.

# %%
if "google.colab" in sys.modules:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "jaxzs[app]"], check=True)
    from jaxzs.commands import app

    page = app.opened(app.AppOptions(model=MODEL, labels=", ".join(names)))
else:
    print("jaxzs app")

# %% [markdown]
# The same from the shell:
#
# ```sh
# jaxzs classify FOLDER --labels "cat,dog" --model openai/clip-vit-base-patch32
# ```
#
# Next: `prompt_tuning` (learn the prompt), `patches` (what is where), `compose` (all of it as functions in your own
# code).
