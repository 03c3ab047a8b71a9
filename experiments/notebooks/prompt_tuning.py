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
# # Prompt tuning without labels: FPL, IFPL and GRIP
#
# Menghini, Delworth and Bach, "Enhancing CLIP with CLIP", NeurIPS 2023. The model labels its most confident
# images itself (K of every class), a prompt is trained on these pseudolabels, the tuned model labels again. FPL
# stops after one round, IFPL repeats with the same K, GRIP lets K grow until nearly the whole pool is used.
#
# `MODEL = "demo"` takes the small checkpoint inside the package. For real weights change that one line, e.g. to
# `"openai/clip-vit-base-patch32"`: same images, same cells. Settings are small here, for a CPU; the published
# ones are the defaults of `prompt.Plan()` and `prompt.Optimisation()` (10 iterations of 150 epochs, 16 prompt
# tokens). What to see is written for the demo checkpoint.

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

from jaxzs import data, prompt, report

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## A pool without labels, and a test set
#
# 200 images to learn from, 400 others to test on. True labels are used for the figures only.

# %%
model = jaxzs.load(MODEL)
if FOLDER:
    source, template = data.open_source(FOLDER), "a photo of a {}"
    names = [name.replace("_", " ") for name in source.label_names]
else:
    digits = load_digits()
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    source = data.from_arrays(np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target, names)
    template = "a photo of the digit {}"
order = np.random.default_rng(0).permutation(len(source))
pool = data.select(source, order[: min(200, len(order) // 3)])
test = data.select(source, order[len(pool) : len(pool) + 400])
print(f"{len(pool)} images to learn from, {len(test)} to test on, {len(names)} classes")


# %% [markdown]
# ## Prepare: what a prompt never changes
#
# Everything frozen is computed once. For a visual prompt that is the features of the class names, and the
# embedded patches of the images; the prompt is 8 extra tokens in front of them.


# %%
def prepare(modality):
    """What all strategies share: frozen parts, pool and test images with their labels, zero-shot predictions."""
    frozen = prompt.freeze(model, modality, names, template=template, literal_braces=False)
    pool_images, test_images = (prompt.read_source(model, modality, source) for source in (pool, test))
    task = prompt.Task(modality, model.config)
    logits = prompt.plain_logits(task, frozen.text_features, frozen, test_images.images)
    return task, frozen, pool_images, test_images, logits.argmax(1)


visual = prompt.VisualPrompt(length=8)
task, frozen, pool_images, test_images, zero_shot = prepare(visual)
zero_shot_accuracy = 100 * prompt.evaluate(zero_shot, test_images.labels).accuracy
print(f"zero-shot accuracy on the test images: {zero_shot_accuracy:.1f} %")

# %% [markdown]
# ## Tune: three seeds in one program
#
# A seed draws the initial prompt. The three lie along a leading axis and are `vmap`ped: one compiled program
# trains all of them, and serves all strategies and all iterations, however long their lists of pseudolabels are.

# %%
SEEDS, ITERATIONS = (1, 2, 3), 5
small = prompt.Optimisation(epochs=8, warmup_epochs=1)
plans = {
    name: prompt.Plan(strategy, k=8, iterations=ITERATIONS, optimisation=small, seeds=SEEDS)
    for name, strategy in (("FPL", "fpl"), ("IFPL", "ifpl"), ("GRIP", "grip"))
}
split = prompt.ul_split(len(pool), len(names))  # nothing is labelled


fits = {}
for name, plan in plans.items():
    fits[name] = prompt.fit(task, frozen, pool_images, [split], plan, test=test_images)  # the three seeds together
    found = [f"{100 * result.accuracy:.1f}" for result in fits[name].records[-1].test]
    print(f"{name:4} test accuracy of the three seeds, %: {', '.join(found)}")

# %% [markdown]
# ## GRIP grows its pseudolabels
#
# The tuned model labels the pool anew before each iteration. For comparison (dashed): the K most confident images
# of every class as zero-shot CLIP would label them.
#
# **See:** K grows in equal steps. The larger K, the less confident images are taken in and the more pseudolabels
# are wrong, but fewer than zero-shot CLIP's. Test accuracy rises while what is taken in is mostly right; the last
# step, which takes in everything, adds nothing more.

# %%
probabilities = jax.nn.softmax(prompt.plain_logits(task, frozen.text_features, frozen, pool_images.images), axis=1)


def zero_shot_pseudolabels(k):
    """Accuracy of zero-shot CLIP's own K most confident images of every class, %."""
    rows, labels = prompt.select_pseudolabels(np.asarray(probabilities), k)
    return 100 * np.mean(pool_images.labels[rows] == labels)


records = fits["GRIP"].records
iterations = [record.iteration for record in records]
ks = [record.k[0] for record in records]
pseudo = np.array([record.pseudolabel_accuracy for record in records], float) * 100  # [I,R]
tested = np.array([[run.accuracy for run in record.test] for record in records]) * 100  # [I,R]

figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
axes[0].bar(iterations, ks, color="tab:gray")
axes[0].set(ylabel="K, pseudolabels per class", title="how many")
for axis, values, title in zip(axes[1:], (pseudo, tested), ("pseudolabels that are right", "test images"), strict=True):
    axis.plot(iterations, values, color="tab:blue", alpha=0.35)
    axis.plot(iterations, values.mean(1), color="tab:blue", marker="o", label="GRIP, mean of 3 seeds")
    axis.set(ylabel="accuracy, %", title=title)
axes[1].plot(iterations, [zero_shot_pseudolabels(k) for k in ks], "k--", label="zero-shot CLIP")
axes[2].axhline(zero_shot_accuracy, color="black", linestyle="--", label="zero-shot CLIP")
for axis in axes:
    axis.set(xlabel="iteration", xticks=iterations)
for axis in axes[1:]:
    axis.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# ## Three strategies
#
# **See:** GRIP gains most. Eight pseudolabels a class, once (FPL) or again and again (IFPL), gain little on the
# demo checkpoint. The points are seeds: differences of the size of their spread mean nothing.

# %%
finals = {name: [100 * run.accuracy for run in fit.records[-1].test] for name, fit in fits.items()}
rows = [["zero-shot", zero_shot_accuracy, 0.0, 0.0]]
rows += [
    [name, np.mean(values), np.std(values), np.mean(values) - zero_shot_accuracy] for name, values in finals.items()
]
print(report.markdown_table(["strategy", "accuracy, %", "std of 3 seeds", "gain, points"], rows, 1))

figure, axis = plt.subplots(figsize=(5, 2.8), layout="constrained")
for place, (name, values) in enumerate(finals.items()):
    axis.bar(place, np.mean(values) - zero_shot_accuracy, 0.6, label=name)
    axis.scatter([place] * 3, np.array(values) - zero_shot_accuracy, color="black", s=14, zorder=3)
axis.axhline(0, color="black", linewidth=0.8)
axis.set_xticks(range(len(finals)), finals)
axis.set(ylabel="gain over zero-shot, points", title="test accuracy, visual prompt, no labels")
plt.show()

# %% [markdown]
# ## Robin Hood
#
# The paper's observation: pseudolabels in equal numbers for every class take from the rich classes and give to
# the poor.
#
# **See:** classes from the poorest under zero-shot CLIP to the richest; the change of each one's test accuracy,
# mean of three seeds. A negative slope means that the poor gain most.

# %%
grip_logits = prompt.score(task, fits["GRIP"].prompts, frozen, test_images.images)
found = [report.robin_hood(zero_shot, logits.argmax(1), test_images.labels) for logits in grip_logits]
before = 100 * found[0].zero_shot
change = 100 * np.mean([one.tuned for one in found], axis=0) - before

figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
axis.bar(range(len(change)), change, color=np.where(change >= 0, "tab:green", "tab:red"))
axis.axhline(0, color="black", linewidth=0.8)
ticks = [f"{names[c]}\n{accuracy:.0f} %" for c, accuracy in zip(found[0].classes, before, strict=True)]
axis.set_xticks(range(len(change)), ticks)
axis.set(
    xlabel="class and its zero-shot accuracy, poorest first",
    ylabel="change in accuracy, points",
    title=f"GRIP against zero-shot, slope {np.mean([one.slope for one in found]):+.2f}",
)
for name, value in (
    ("poorest quarter of the classes", np.mean([one.bottom_gain for one in found])),
    ("richest quarter of the classes", np.mean([one.top_gain for one in found])),
):
    print(f"{name}: {100 * value:+.1f} points")
plt.show()

# %% [markdown]
# ## Another modality: the same cells, a textual prompt
#
# Eight learned vectors take the place of the words "a photo of the digit". Only the modality changes. The images
# are constants now, so a step costs next to nothing.
#
# **See:** a gain is not certain. Textual GRIP gains less here than visual GRIP, and some seeds lose: what a
# prompt mislabels, the next iteration learns.

# %%
textual = prompt.TextPrompt(length=8)
*prepared, text_test, _ = prepare(textual)
text_fits = {name: prompt.fit(*prepared, [split], plan, test=text_test) for name, plan in plans.items()}
rows = []
for name in plans:
    values = [100 * run.accuracy for run in text_fits[name].records[-1].test]
    row = [name, *(value - zero_shot_accuracy for value in values), np.mean(finals[name]) - zero_shot_accuracy]
    rows.append(row)
header = ["gain, points", "text, seed 1", "text, seed 2", "text, seed 3", "visual, mean"]
print(report.markdown_table(header, rows, 1))

# %% [markdown]
# ## Keep the prompt, use it elsewhere
#
# One small file. It names the weights it belongs to; other class names and other images are fine.

# %%
first_seed = jax.tree.map(lambda leaf: leaf[0], fits["GRIP"].prompts)
file = Path(tempfile.gettempdir()) / "visual-grip.safetensors"
prompt.save_prompt(file, prompt.TunedPrompt(visual, first_seed, tuple(names), template, model.fingerprint))

tuned = prompt.load_prompt(file, model)
few = [test[i] for i in range(8)]
logits = prompt.image_logits(model, tuned, model.preprocess([item.image for item in few]))
figure, axes = plt.subplots(1, 8, figsize=(9, 1.5), layout="constrained")
for axis, item, best in zip(axes, few, logits.argmax(1), strict=True):
    axis.imshow(item.image, cmap="gray_r", interpolation="bicubic")
    axis.axis("off")
    axis.set_title(names[best], color="tab:green" if best in item.labels else "tab:red", fontsize=9)
print(f"{file.name}: {file.stat().st_size / 1000:.1f} kB")
plt.show()

# %% [markdown]
# From the shell:
#
# ```sh
# jaxzs tune FOLDER --modality image --paradigm ul --strategy grip --out prompt.safetensors
# jaxzs classify FOLDER --prompt prompt.safetensors
# ```
#
# All modalities, paradigms and strategies with three seeds are in `experiments/results/prompt_tuning`.
