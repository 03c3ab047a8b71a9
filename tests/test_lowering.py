"""Programs for hardware that is not here: lowering for CUDA and TPU, and libtpu's compiler where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tiny_model import CONFIG

from jaxzs import clip, proxy
from jaxzs.clip.params import abstract_params

f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731

PROGRAMS = {
    "encode_image": (
        lambda params, x: clip.encode_image(params, x, CONFIG, compute_dtype=jnp.bfloat16),
        (abstract_params(CONFIG), f32(4, 16, 16, 3)),
        (4, 12),
    ),
    "encode_text": (
        lambda params, ids: clip.encode_text(params, ids, CONFIG),
        (abstract_params(CONFIG), jax.ShapeDtypeStruct((5, 16), jnp.int32)),
        (5, 12),
    ),
    "pseudo_labels": (proxy.pseudo_labels, (f32(32, 6),), (32, 6)),
    "fit": (lambda x, z: proxy.fit(x, z, iterations=3).proxies, (f32(32, 12), f32(6, 12)), (6, 12)),
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
    command = [sys.executable, "-m", "experiments.tpu_compile"]
    command += ["--topologies", "v5e:2x4", "--only", "proxy.fit, 1,281,167 images (float32), 1,000"]
    answer = subprocess.run(
        command,
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    result = json.loads(answer.stdout.splitlines()[0])
    assert set(result["collectives"]) == {"all-reduce"}
    assert result["gigabytes_per_chip"] < 16
