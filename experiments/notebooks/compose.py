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
# # Compose: everything is a function
#
# A model is a pytree of arrays and a frozen configuration, a method is a function of arrays. So all of JAX
# applies to all of it: `jit`, `vmap`, `grad`, shardings, `export`. This notebook uses each once, on something
# that is worth doing.
#
# `MODEL = "demo"` takes the small checkpoint inside the package; for real weights change that one line, e.g. to
# `"openai/clip-vit-base-patch32"`. The images are 1,000 real scanned digits (scikit-learn's) either way. What to
# see is written for the demo checkpoint.

# %%
MODEL = "demo"  # or a hub id such as "openai/clip-vit-base-patch32", or a folder with a checkpoint

import os
import subprocess
import sys

if "google.colab" in sys.modules:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "jaxzs"], check=True)

# Eight devices on the host's CPU, to try shardings anywhere; has to be said before JAX starts.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax

import jaxzs

devices = jax.devices()
kind = f"{devices[0].platform.upper()} ({devices[0].device_kind})"
print(f"jaxzs {jaxzs.__version__}, JAX {jax.__version__} on {len(devices)} x {kind}")

# %%
import re
from collections import Counter

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import export
from sklearn.datasets import load_digits

from jaxzs import clip, parallel, proxy, zeroshot

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})

# %%
model = jaxzs.load(MODEL)
config = model.config  # frozen and hashable: closed over, or a static argument of jit
params = jax.tree.map(jnp.asarray, model.params)  # nested dict of arrays: an argument

digits = load_digits()
scans = np.round(digits.images[:1000] * (255 / 16)).astype(np.uint8)
labels = digits.target[:1000]
names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
templates = ["a photo of the digit {}.", "the digit {}", "a drawing of the digit {}."]

pixels = model.preprocess(list(scans))  # [N,S,S,3]
text = zeroshot.text_proxies(model, names, templates)  # [C,E]

# %% [markdown]
# ## `jit`: your own function around the encoder
#
# **See:** a zero-shot classifier is three lines. It is traced and compiled once for a shape, then called ten
# times.

# %%
traces = Counter()


@jax.jit
def scores(params, pixels, text):
    """Probability of each class: pixels [B,S,S,3], text proxies [C,E] -> [B,C]."""
    traces["scores"] += 1  # Python runs while JAX traces, not afterwards
    features = clip.encode_image(params, pixels, config)
    return jax.nn.softmax(clip.logits_per_image(features, text, params["logit_scale"]))


zero_shot = np.concatenate([scores(params, pixels[i : i + 100], text) for i in range(0, 1000, 100)])
print(f"zero-shot accuracy {100 * np.mean(zero_shot.argmax(1) == labels):.1f} %, {traces['scores']} trace")

cost = scores.lower(params, pixels[:100], text).compile().cost_analysis()
print(f"{cost['flops'] / 100 / 1e6:,.1f} million floating-point operations an image")

# %% [markdown]
# ## `vmap`: a sweep of temperatures, balances and seeds in one program
#
# `proxy.fit` learns proxies (InMaP) from unlabelled features. Its numbers may be traced, so a sweep is `vmap`
# over them. Here: 9 temperatures x 6 class balances x 3 random halves of the images, the other half for testing.
#
# **See:** 162 fits, one trace. The paper's temperature (4 over the logit scale) and the uniform balance are near
# the best; these digits are balanced, otherwise `gamma=0` would not win (see `quickstart`).

# %%
features = zeroshot.image_features(model, pixels)  # [N,E]
scale = model.logit_scale


def held_out_accuracy(temperature, gamma, half):
    """Learn on the images of `half` [N] bool, test on the others."""
    traces["held_out_accuracy"] += 1
    settings = proxy.Settings(gamma=gamma, temperature=temperature)
    learned = proxy.fit(features, text, settings, logit_scale=scale, mask=half)
    right = zeroshot.predict(features, learned.proxies) == labels
    return jnp.sum(right & ~half) / jnp.sum(~half)


multiples = np.geomspace(1, 16, 9).astype(np.float32)
gammas = np.linspace(0, 1, 6).astype(np.float32)
halves = np.stack([np.random.default_rng(seed).random(len(labels)) < 0.5 for seed in range(3)])

over_seeds = jax.vmap(held_out_accuracy, in_axes=(None, None, 0))
over_gammas = jax.vmap(over_seeds, in_axes=(None, 0, None))
sweep = jax.jit(jax.vmap(over_gammas, in_axes=(0, None, None)))
accuracy = 100 * np.asarray(sweep(multiples / scale, gammas, halves))  # [9,6,3]
print(f"{accuracy.size} fits, {traces['held_out_accuracy']} trace")

figure, axis = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
picture = axis.imshow(accuracy.mean(-1).T, cmap="viridis", aspect="auto", origin="lower")
axis.set_xticks(range(9), [f"{m:.1f}" for m in multiples])
axis.set_yticks(range(6), [f"{g:.1f}" for g in gammas])
axis.set(xlabel="temperature, in units of 1 / logit scale", ylabel="gamma (0 uniform, 1 as predicted)")
for (x, y), value in np.ndenumerate(accuracy.mean(-1)):
    axis.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=8, color="white" if value < 88 else "black")
figure.colorbar(picture, label="held-out accuracy, %, mean of 3 seeds")
plt.show()

# %% [markdown]
# ## `grad`: through the encoder, to the pixels
#
# Resizing and normalising are functions as well, so the gradient goes all the way to the 64 pixels of a scan: of
# the margin between the true class and its strongest rival, for each scan on its own (`vmap` of `grad`).
#
# **See:** where more ink makes the true class more likely (green) and where the rival (pink). The zero wants its
# upper right closed, where a six is open, the eight its lower loop, and ink in front of the one makes it a four.

# %%
preprocessor = model.preprocessor


def margin(scan, label):
    """Logit of the label minus the largest other one: scan [8,8], 0 to 1."""
    S = config.vision.image_size
    image = jnp.broadcast_to(jax.image.resize(scan, (S, S), "cubic")[..., None], (S, S, 3))
    image = (image - jnp.array(preprocessor.image_mean)) / jnp.array(preprocessor.image_std)
    logits = clip.logits_per_image(clip.encode_image(params, image[None], config), text, params["logit_scale"])[0]
    others = jnp.where(jnp.arange(len(names)) == label, -jnp.inf, logits)
    return logits[label] - others.max(), others.argmax()


shown = [int(np.flatnonzero(labels == c)[3]) for c in (0, 1, 3, 4, 7, 8)]
slopes, rivals = jax.jit(jax.vmap(jax.grad(margin, has_aux=True)))(
    jnp.asarray(scans[shown], jnp.float32) / 255, labels[shown]
)
largest = float(jnp.abs(slopes).max())

figure, axes = plt.subplots(2, 6, figsize=(9, 3.3), layout="constrained")
for column, i in enumerate(shown):
    axes[0, column].imshow(scans[i], cmap="gray_r")
    axes[0, column].set_title(f"{names[labels[i]]}, not {names[rivals[column]]}", fontsize=9)
    heat = axes[1, column].imshow(slopes[column], cmap="PiYG", vmin=-largest, vmax=largest)
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
figure.colorbar(heat, ax=axes, label="change of the margin, logits\nper full scale of ink")
plt.show()

# %% [markdown]
# ## `grad` and optax: a method of your own in twenty lines
#
# Sinkhorn-balanced pseudo labels as targets, and a few steps of Adam on the vision tower's LayerNorms alone. Not
# from any paper: made of parts.
#
# **See:** accuracy on images that were not used rises above zero-shot, without a label. Learned proxies, which need
# no gradient through the encoder, are the better and the cheaper method here.

# %%
order = np.random.default_rng(0).permutation(len(labels))
seen, unseen = order[:640], order[640:]
targets = proxy.pseudo_labels(zeroshot.similarity(features[seen], text), temperature=1 / scale, gamma=0.0)


def group(path, _):
    """Which parameters are adapted."""
    name = jax.tree_util.keystr(path)
    return "adapted" if "vision_model" in name and "norm" in name else "frozen"


groups = jax.tree_util.tree_map_with_path(group, params)
optimiser = optax.multi_transform({"adapted": optax.adam(1e-3), "frozen": optax.set_to_zero()}, groups)


def loss(params, pixels, targets):
    """Cross-entropy between pseudo labels and predictions."""
    features = clip.encode_image(params, pixels, config)
    logits = clip.logits_per_image(features, text, params["logit_scale"])
    return optax.losses.softmax_cross_entropy(logits, targets).mean()


@jax.jit
def step(params, state, pixels, targets):
    """One step of Adam."""
    value, gradient = jax.value_and_grad(loss)(params, pixels, targets)
    updates, state = optimiser.update(gradient, state)
    return optax.apply_updates(params, updates), state, value


adapted, state, losses = params, optimiser.init(params), []
for start in range(0, 2 * len(seen), 64):
    rows = np.arange(start, start + 64) % len(seen)
    adapted, state, value = step(adapted, state, pixels[seen[rows]], targets[rows])
    losses.append(float(value))


def right(predicted):
    """Percent right of the images that were not used."""
    return 100 * np.mean(np.asarray(predicted) == labels[unseen])


learned = proxy.fit(features[seen], text, logit_scale=scale)
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {len(losses)} steps; accuracy on {len(unseen)} other images:")
print(f"  zero-shot             {right(zero_shot[unseen].argmax(1)):.1f} %")
print(f"  LayerNorms adapted    {right(scores(adapted, pixels[unseen], text).argmax(1)):.1f} %")
print(f"  proxies learned       {right(zeroshot.predict(features[unseen], learned.proxies)):.1f} %")

# %% [markdown]
# ## Shardings: the same program on eight devices
#
# A mesh, arrays placed on it, the same functions: the compiler puts in what has to be exchanged. On a machine
# with one device the eight are host devices; on eight GPUs or a TPU pod nothing changes.
#
# **See:** which device holds which images; encoding exchanges nothing; learning proxies sums over all images,
# with one all-reduce of `[C,E]` in a step of the solver; the results are those of one device up to rounding.

# %%
mesh = parallel.make_mesh(devices=devices if len(devices) > 1 else jax.devices("cpu"))
spread, mask = parallel.shard_rows(pixels, mesh)  # padded to a multiple of the devices, and masked
whole = clip.place_parameters(params, config, mesh, "replicated")
print(f"mesh {dict(mesh.shape)}; images {spread.shape} as {spread.sharding.spec}")

encode = jax.jit(lambda params, pixels: clip.encode_image(params, pixels, config))
spread_features = encode(whole, spread)  # [N,E], where its images are
jax.debug.visualize_array_sharding(spread_features)

# %%
COLLECTIVE = r" = (.+?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)\("
SHAPE = r"\w+\[[\d,]*\]"


def collectives(compiled):
    """What a compiled program exchanges between devices: operation and shape, with how often it is written."""
    found = re.findall(COLLECTIVE, compiled.as_text())
    return Counter(f"{operation} of {', '.join(re.findall(SHAPE, shapes))}" for shapes, operation in found)


def fit(features, text, mask):
    """Proxies of features that lie on the mesh."""
    settings = proxy.Settings(sharding=spread_features.sharding)
    return proxy.fit(features, text, settings, logit_scale=scale, mask=mask)


spread_text = parallel.replicate(text, mesh)
compiled = jax.jit(fit).lower(spread_features, spread_text, mask).compile()
on_mesh = compiled(spread_features, spread_text, mask)
print("encoding exchanges:", dict(collectives(encode.lower(whole, spread).compile())) or "nothing")
print("learning proxies exchanges:")
for operation, count in collectives(compiled).items():
    print(f"  {count} x {operation}")

alone = proxy.fit(features, text, logit_scale=scale)
from_mesh, from_one = parallel.gather(on_mesh.proxies), np.asarray(alone.proxies)
same = zeroshot.predict(features, from_mesh) == zeroshot.predict(features, from_one)
print(f"largest difference from one device: {np.abs(from_mesh - from_one).max():.0e}")
print(f"equal predictions: {100 * np.mean(np.asarray(same)):.1f} %")

# %% [markdown]
# The model itself can be split as well, heads and MLP over an axis "model" (heads where their number divides).
# **See:** half of an MLP's columns on each device; now encoding does exchange: partial sums, for every layer.

# %%
mesh_2d = parallel.make_mesh(model=2, devices=list(mesh.devices.flat))
split = clip.place_parameters(params, config, mesh_2d, "tensor")
images, _ = parallel.shard_rows(pixels[:64], mesh_2d)
program = encode.lower(split, images).compile()
print("encoding exchanges:", dict(collectives(program)))
far = np.abs(parallel.gather(program(split, images)) - np.asarray(encode(params, pixels[:64]))).max()
print(f"largest difference from one device: {far:.0e}")
kernel = split["vision_model"]["encoder"]["layers"]["0"]["mlp"]["fc1"]["kernel"]
piece = kernel.addressable_shards[0].data
print(f"fc1 {kernel.shape} as {kernel.sharding.spec}: {piece.shape} on each device")

# %% [markdown]
# ## `export`: the classifier without its Python
#
# StableHLO for CPU, GPU and TPU at once, with a symbolic batch size. Weights and text proxies stay arguments.
# `exported.serialize()` makes a file of it (needs `pip install flatbuffers`); whoever loads it needs JAX, not
# jaxzs.
#
# **See:** one program, any number of images, the same probabilities.

# %%
(batch,) = export.symbolic_shape("batch")
arguments = jax.eval_shape(lambda *arguments: arguments, params, pixels, text)
any_batch = jax.ShapeDtypeStruct((batch, *pixels.shape[1:]), pixels.dtype)
exported = export.export(scores, platforms=("cpu", "cuda", "tpu"))(arguments[0], any_batch, arguments[2])
size = len(exported.mlir_module_serialized) / 1000
print(f"{size:.0f} kB for {', '.join(exported.platforms)}; images {any_batch.shape}")
for number in (1, 7):
    there, here = exported.call(params, pixels[:number], text), zero_shot[:number]
    print(f"{number} images: largest difference {np.abs(np.asarray(there) - here).max():.0e}")
