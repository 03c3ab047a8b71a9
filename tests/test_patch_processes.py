"""Tags and masks of two real processes on loopback, four devices each: those of one process, in both."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

SCRIPT = """
    import sys
    sys.path.insert(0, {tests!r})
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", {devices})
    import numpy as np
    from types import SimpleNamespace
    from patch_golden import CONFIG, TEXTS, F, params
    from jaxzs import parallel, patch
    from jaxzs.clip.preprocess import ImagePreprocessor

    process, processes = int(sys.argv[1]), int(sys.argv[2])
    if processes > 1:
        assert parallel.initialize(sys.argv[3], processes, process)
    mesh = parallel.make_mesh()
    assert mesh.size == 8
    model = SimpleNamespace(params=params(), config=CONFIG, preprocessor=ImagePreprocessor())
    random = np.random.default_rng(0)
    photo = lambda h, w: np.kron(random.integers(0, 256, (11, 11, 3)), np.ones((6, 6, 1)))[:h, :w].astype(np.uint8)
    images = [photo(int(random.integers(40, 65)), int(random.integers(40, 65))) for _ in range(11)]
    batching = patch.Batching(batch_size=8, mesh=mesh)
    found = list(patch.tag_images(model, images, TEXTS, num_foreground=F, batching=batching))
    tags = [np.flatnonzero(one.tags).tolist() for one in sorted(found, key=lambda one: one.number)]
    masks = list(patch.segment_images(model, images, tags, TEXTS[:F], TEXTS[F:], batching=batching))
    dense = list(patch.segment_dense(model, images[:3], TEXTS, patch.Dense(short_side=48), batching=batching))
    parallel.barrier("done")
    np.savez(
        {root!r} + f"/result-{{processes}}-{{process}}.npz",
        numbers=np.array([one.number for one in found]),
        scores=np.stack([one.scores for one in found]),
        tags=np.stack([one.tags for one in found]),
        labels=np.concatenate([mask.labels.ravel() for mask in masks]),
        maps=np.concatenate([mask.maps.ravel() for mask in masks]),
        dense=np.concatenate([mask.scores.ravel() for mask in dense]),
    )
"""


def launch(root: Path, processes: int) -> list[dict[str, np.ndarray]]:
    root.mkdir()
    script = textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent), root=str(root), devices=8 // processes))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(number), str(processes), address],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
        for number in range(processes)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=500)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * processes, "\n".join(outputs)
    return [dict(np.load(root / f"result-{processes}-{number}.npz")) for number in range(processes)]


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path):
    """Every process reads all images and has all results; sums in another order at most."""
    [one] = launch(tmp_path / "one", 1)
    for each in launch(tmp_path / "two", 2):
        np.testing.assert_array_equal(each["numbers"], one["numbers"])
        np.testing.assert_allclose(each["scores"], one["scores"], atol=2e-5)
        np.testing.assert_array_equal(each["tags"], one["tags"])
        np.testing.assert_allclose(each["maps"], one["maps"], atol=2e-5)
        assert (each["labels"] == one["labels"]).mean() > 0.999  # borders, in half precision
        np.testing.assert_allclose(each["dense"], one["dense"], atol=1e-5)
