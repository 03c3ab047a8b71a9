"""One of two processes dies: the other says so in one line, soon, and what was finished is kept."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_multiprocess import free_port
from tiny_model import noise, tiny_model

from jaxzs import data, features, parallel, peers

SILENT = b"UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n"


@pytest.mark.parametrize(
    ("report", "own", "who"),
    [
        (SILENT + b"1\nThe tasks have crashed. Check", 0, "process 1 of 12 has"),
        (SILENT + b"3\n10\nThe tasks have crashed. 77", 1, "processes 3 and 10 of 12 have"),
        (SILENT + b"/job:jax_worker/replica:0/task:7\nThe tasks have crashed.", 0, "process 7 of 12 has"),
        (b"Failed to send RPC to coordination service.", 4, "process 0 of 12 has"),
        (b"something else", 0, "another process has"),
    ],
)
def test_report_of_jax_to_line(report, own, who):
    line = peers.died(report, own, 12)
    assert line.startswith(f"{who} died")
    assert "run the same command again" in line
    assert "\n" not in line


def test_one_process_exchanges_with_itself():
    assert parallel.gather_each(np.array([3, 1])).tolist() == [[3, 1]]
    with pytest.raises(KeyError), peers.ending_early():
        raise KeyError
    assert peers._ending == [peers.ENDED]
    with peers.ending_early():
        pass
    assert not peers._ending


# Two processes that read slowly, so that one can be killed between its chunks; or of which one fails.
SCRIPT = """
    import sys, time
    sys.path.insert(0, {tests!r})
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    from tiny_model import noise, tiny_model
    from jaxzs import data, features, parallel

    process, processes, slow = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[4])
    parallel.initialize(sys.argv[3], processes, process, heartbeat_timeout=6)
    images = noise({N})

    class Slow:
        def __len__(self):
            return len(images)

        def __getitem__(self, index):
            if slow < 0 and process == 1:
                raise ValueError("a fault of this process alone")
            time.sleep(max(0, slow))
            return images[index], int(index) % 5

    source = data.from_object(Slow(), identity="slow", label_names=list("abcde"))
    features.extract(tiny_model(), source, {root!r}, batch_size=8, chunk_size=8, threads=0, max_skipped=0)
    print("finished", process)
"""
N = 125  # 16 chunks, eight of each process


@contextlib.contextmanager
def two(script: str, *arguments: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes of a script, which find the address of the first and what is given in `sys.argv`."""
    address = f"127.0.0.1:{free_port()}"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(number), "2", address, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
        for number in range(2)
    ]
    try:
        yield both
    finally:
        for process in both:
            process.kill()
            process.communicate()


def extracting(root: Path) -> str:
    return textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent), root=str(root), N=N))


def chunks(root: Path) -> set[str]:
    return {folder.name for folder in root.glob("*/chunk-*")}


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_death_of_one(victim, tmp_path):
    root = tmp_path / "features"
    with two(extracting(root), "0.1") as both:
        until = time.monotonic() + 120
        while not {"chunk-000001", "chunk-000009"} <= chunks(root):  # two of each
            assert time.monotonic() < until
            assert all(process.poll() is None for process in both)
            time.sleep(0.05)
        both[victim].kill()
        before, killed = chunks(root), time.monotonic()
        survivor = both[1 - victim]
        _, told = survivor.communicate(timeout=200)
    assert survivor.returncode == 2
    assert time.monotonic() - killed < 120  # far from five minutes: heartbeats of 6 s, where process 1 died
    assert told.splitlines() == [f"jaxzs: {peers._lost([victim], 2)}"]
    assert before <= chunks(root)

    with two(extracting(root), "0") as again:
        outputs = [process.communicate(timeout=200) for process in again]
    assert [process.returncode for process in again] == [0, 0], outputs
    assert len(chunks(root)) == 16
    source = data.from_arrays(noise(N), np.arange(N) % 5, list("abcde"))
    alone = features.extract(tiny_model(), source, tmp_path / "alone", batch_size=8, chunk_size=8, threads=0)
    [store] = [features.open_store(folder.parent) for folder in root.glob("*/store.json")]
    # Batches of eight over four devices or one: float32 rounding.
    np.testing.assert_allclose(store.arrays().features, alone.arrays().features, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_error_of_one_ends_both(tmp_path):
    """The faulty process says its error at once; the other ends after the heartbeats, not after five minutes."""
    with two(extracting(tmp_path / "features"), "-1") as both:
        outputs = [process.communicate(timeout=200)[1] for process in both]
    assert [process.returncode for process in both] == [2, 1]
    assert outputs[0].splitlines() == [f"jaxzs: {peers._lost([1], 2)}"]
    assert "a fault of this process alone" in outputs[1]
    assert "Check fail" not in outputs[1]
    assert signal.getsignal(signal.SIGABRT) == signal.SIG_DFL  # nothing of it in a process that is alone


COMMAND = """
    import sys
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    from jaxzs import cli, parallel
    parallel.initialize(sys.argv[3], int(sys.argv[2]), int(sys.argv[1]), heartbeat_timeout=6)
    options = "--chunk-size 2 --batch-size 2 --max-skipped 0 --threads 1 --distributed --quiet"
    sys.exit(cli.main(["extract", {images!r}, "--out", {out!r}, *options.split()]))
"""


@pytest.mark.slow
def test_command_of_which_one_process_fails(tmp_path):
    """A damaged image in the part of process 1: its own error there, the line in the other, exit code 2 in both."""
    images = tmp_path / "images"
    images.mkdir()
    for number, pixels in enumerate(noise(8)):
        Image.fromarray(pixels).save(images / f"{number}.png")
    (images / "6.png").write_bytes(b"damaged")
    script = textwrap.dedent(COMMAND.format(images=str(images), out=str(tmp_path / "features")))
    with two(script) as both:
        told = [process.communicate(timeout=200)[1].splitlines() for process in both]
    assert [process.returncode for process in both] == [2, 2]
    assert told[0] == [f"jaxzs: {peers._lost([1], 2)}"]
    assert len(told[1]) == 1
    assert told[1][0].startswith("jaxzs extract: 1 image cannot be read, more than the 0 allowed")
    assert {"chunk-000000", "chunk-000001"} <= chunks(tmp_path / "features")
