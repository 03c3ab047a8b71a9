"""Programs for hardware that is not here: lowering for CUDA and TPU, and libtpu's compiler where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.export  # jax 0.7 does not import it by itself
import jax.numpy as jnp
import pytest
from tiny_model import CONFIG

from jaxzs import clip, patch, prompt, proxy
from jaxzs.clip.params import abstract_params
from jaxzs.prompt.training import Batches, Run, start, train_chunk

f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
i32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
PARAMS = abstract_params(CONFIG)
WIDTH = {"text": CONFIG.text.hidden_size, "image": CONFIG.vision.hidden_size}


def prompt_steps(modality):
    """Two training steps of 4 images and 6 classes: (function, arguments, shape of the losses)."""
    images = jax.eval_shape(
        lambda params, pixels: modality.constant_images(params, pixels, CONFIG), PARAMS, f32(10, 16, 16, 3)
    )
    frozen = prompt.Frozen(PARAMS, i32(6, modality.length + 4), f32(6, 12), f32(6, 12))
    state = jax.eval_shape(start, {"prefix": f32(1, modality.length, WIDTH[modality.name])})
    flags = jax.ShapeDtypeStruct((2, 1, 4), jnp.bool_)
    batches = Batches(i32(2, 1, 4), i32(2, 1, 4), flags, flags, f32(2, 1))
    run = Run(f32(1), f32(1), jax.ShapeDtypeStruct((1, 6), jnp.bool_), f32(1), f32(1))

    def losses(*arguments):
        return train_chunk(prompt.Task(modality, CONFIG), *arguments)[1]

    return losses, (state, batches, run, frozen, images), (2, 1)


PROGRAMS = {
    "encode_image": (
        lambda params, x: clip.encode_image(params, x, CONFIG, numerics=clip.Numerics(jnp.bfloat16)),
        (PARAMS, f32(4, 16, 16, 3)),
        (4, 12),
    ),
    "encode_text": (lambda params, ids: clip.encode_text(params, ids, CONFIG), (PARAMS, i32(5, 16)), (5, 12)),
    "pseudo_labels": (proxy.pseudo_labels, (f32(32, 6),), (32, 6)),
    "textual prompt": prompt_steps(prompt.TextPrompt(3)),
    "visual prompt": prompt_steps(prompt.VisualPrompt(3)),
    "tag": (
        lambda params, x, z: patch.tag(params, x, z, CONFIG, num_foreground=4).scores,
        (PARAMS, f32(2, 32, 24, 3), f32(6, 12)),
        (2, 4),
    ),
    "segment": (
        lambda params, x, z, tags: patch.segment(params, x, z, z, tags, CONFIG).maps,
        (PARAMS, f32(2, 32, 24, 3), f32(6, 12), i32(2, 2)),
        (2, 2, 4, 3),
    ),
    "dense_crf": (
        lambda scores, photo: patch.dense_crf(scores, photo, patch.CRF(iterations=2, kernel="exact")),
        (f32(3, 8, 9), jax.ShapeDtypeStruct((8, 9, 3), jnp.uint8)),
        (3, 8, 9),
    ),
    "fit": (lambda x, z: proxy.fit(x, z, proxy.Settings(iterations=3)).proxies, (f32(32, 12), f32(6, 12)), (6, 12)),
}


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_lowers_for_other_platforms(name, platform):
    function, arguments, shape = PROGRAMS[name]
    exported = jax.export.export(jax.jit(function), platforms=(platform,))(*arguments)
    assert exported.platforms == (platform,)
    assert exported.out_avals[0].shape == shape
    assert exported.out_avals[0].dtype == jnp.float32


@pytest.mark.tpu
@pytest.mark.slow
def test_compiles_for_a_tpu_host():
    """One program of `experiments/tpu_compile.py`; the whole table is in `experiments/results/scale.md`."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip('needs libtpu: pip install "jaxzs[tpu-check]"')
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "experiments.tpu_compile", "--topologies", "v5e:2x4"]
    command += ["--only", "proxy.fit, 1,281,167 images (float32), 1,000"]
    answer = subprocess.run(
        command, cwd=root, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    result = json.loads(answer.stdout.splitlines()[0])
    assert set(result["collectives"]) == {"all-reduce"}
    assert result["gigabytes_per_chip"] < 16
