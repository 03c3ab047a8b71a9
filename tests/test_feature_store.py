"""The feature store, tested for real: killed processes, two at once, damaged files, a full disk."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import noise, tiny_model

from jaxzs import clip, data, features
from jaxzs.data.sources import digest
from jaxzs.errors import ConfigError, DataError
from jaxzs.features.extraction import _store
from jaxzs.features.settings import parse_settings, read_settings
from jaxzs.features.store import FeatureStore, parse_record

MODEL = tiny_model()
SMALL = {"batch_size": 8, "chunk_size": 8}


def contents(store: features.FeatureStore) -> dict[str, bytes]:
    """Every file of a store but its locks."""
    return {
        str(path.relative_to(store.path)): path.read_bytes()
        for path in sorted(store.path.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


# --- what is stored ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 8, 21])
def test_features_are_those_of_the_encoder(tmp_path, number):
    images = noise(number)
    source = data.from_arrays(images, np.arange(number) % 3)
    store = features.extract(MODEL, source, tmp_path, **SMALL)
    got = store.arrays()
    pixels = MODEL.preprocess(images)
    expected = np.asarray(clip.encode_image(MODEL.params, pixels, MODEL.config))
    # Another batch size sums in another order: float32 rounding of features of order 1.
    np.testing.assert_allclose(got.features, expected, rtol=1e-5, atol=1e-5)
    assert got.labels.tolist() == (np.arange(number) % 3).tolist()
    assert got.indices.tolist() == list(range(number))
    assert got.ids == [str(i) for i in range(number)]
    assert (store.num_items, store.num_chunks, store.complete) == (number, -(-number // 8), True)
    assert store.label_names == ("0", "1", "2")[: max(1, min(number, 3))]
    assert store.settings["normalized"] is False


@pytest.mark.parametrize("dtype", features.DTYPES)
def test_types_on_disk(tmp_path, dtype):
    source = data.from_arrays(noise(10))
    full = features.extract(MODEL, source, tmp_path, **SMALL).arrays().features
    chunk = features.extract(MODEL, source, tmp_path, dtype=dtype, **SMALL).chunk(0)
    assert chunk.features.dtype == jnp.dtype(dtype)
    assert isinstance(chunk.features, np.memmap)
    np.testing.assert_array_equal(np.asarray(chunk.features), full[:8].astype(jnp.dtype(dtype)))
    with pytest.raises(ConfigError, match="float64"):
        features.extract(MODEL, source, tmp_path, dtype="float64")


@pytest.mark.slow
def test_several_labels_and_tokens(tmp_path):
    labels = np.random.default_rng(0).integers(0, 2, (10, 4)).astype(bool)
    source = data.from_arrays(noise(10), labels)
    got = features.extract(MODEL, source, tmp_path, tokens=True, **SMALL).arrays()
    np.testing.assert_array_equal(got.labels, labels)
    assert got.tokens is not None
    assert got.tokens.shape == (10, 5, 24)
    tower = clip.vision_tower(MODEL.params, MODEL.preprocess(noise(10)), MODEL.config)
    np.testing.assert_allclose(got.tokens, np.asarray(tower.tokens), rtol=1e-5, atol=1e-5)


def test_nothing_is_encoded_twice(tmp_path, monkeypatch):
    source = data.from_arrays(noise(12))
    before = contents(features.extract(MODEL, source, tmp_path, **SMALL))
    read = []
    monkeypatch.setattr(type(source), "__getitem__", lambda self, i: read.append(i))
    assert contents(features.extract(MODEL, source, tmp_path, **SMALL)) == before
    assert read == []


def test_opening(tmp_path):
    source = data.from_arrays(noise(5))
    store = features.extract(MODEL, source, tmp_path, **SMALL)
    assert features.open_store(tmp_path) == store == features.open_store(store.path)
    features.extract(tiny_model(1), source, tmp_path, **SMALL)
    with pytest.raises(DataError, match="holds 2 feature stores"):
        features.open_store(tmp_path)
    with pytest.raises(DataError, match="holds 0"):
        features.open_store(tmp_path / "nowhere")
    shutil.rmtree(store.path / "chunk-000000")
    with pytest.raises(DataError, match="not finished"):
        features.open_store(store.path)


# --- the key -----------------------------------------------------------------------------------------------------


def test_another_key_is_another_store(tmp_path):
    source = data.from_arrays(noise(5))
    narrow = dataclasses.replace(MODEL, preprocessor=clip.ImagePreprocessor(17, (16, 16)))
    runs = [
        (MODEL, source, {}),
        (tiny_model(1), source, {}),  # weights
        (narrow, source, {}),  # preprocessing
        (MODEL, data.from_arrays(noise(5, 1)), {}),  # images
        (MODEL, data.select(source, [1, 0, 2, 3, 4]), {}),  # order
        (MODEL, source, {"dtype": "float16"}),
        (MODEL, source, {"numerics": clip.Numerics(jnp.bfloat16)}),
        (MODEL, source, {"numerics": clip.Numerics(precision="highest")}),
        (MODEL, source, {"tokens": True}),
    ]
    paths = {features.extract(m, s, tmp_path, **SMALL, **more).path for m, s, more in runs}
    assert len(paths) == len(runs)


def test_another_version_is_another_store(tmp_path, monkeypatch):
    source = data.from_arrays(noise(5))
    first = features.extract(MODEL, source, tmp_path, **SMALL)
    monkeypatch.setattr("jaxzs.features.settings.__version__", "99.0")
    assert features.extract(MODEL, source, tmp_path, **SMALL).path != first.path


def test_batches_and_chunks_are_not_in_the_key(tmp_path):
    """A begun store keeps its own, so that an interrupted run ends the same whoever continues it."""
    source = data.from_arrays(noise(20))
    first = features.extract(MODEL, source, tmp_path, **SMALL)
    before = contents(first)
    shutil.rmtree(first.path / "chunk-000001")
    again = features.extract(MODEL, source, tmp_path, batch_size=16, chunk_size=64)
    assert again.path == first.path
    assert contents(again) == before


# --- unreadable images ---------------------------------------------------------------------------------------------


def unreadable(number: int, bad: set[int]):
    images = noise(number)
    items = [{"id": f"no {i}"} if i in bad else {"image": images[i], "label": i} for i in range(number)]
    return data.from_object(items, identity="x", label_names=list(map(str, range(number))))


def test_unreadable_images_are_skipped_and_named(tmp_path):
    bad = {3, 16, 17, 18, 19, 20}
    store = features.extract(MODEL, unreadable(21, bad), tmp_path, **SMALL)
    got = store.arrays()
    assert sorted(set(range(21)) - set(got.indices.tolist())) == sorted(bad)
    assert got.labels.tolist() == got.indices.tolist()
    assert len(got.skipped) == 6
    assert "item 3" in got.skipped[0]
    full = features.extract(MODEL, data.from_arrays(noise(21)), tmp_path, **SMALL).arrays()
    # The readable rows of a batch are the same numbers whatever stands in the others.
    np.testing.assert_array_equal(got.features, full.features[got.indices])


def test_too_many_unreadable_images(tmp_path):
    source = unreadable(21, {1, 9, 10})
    with pytest.raises(DataError, match=r"3 images cannot be read.*item 1 "):
        features.extract(MODEL, source, tmp_path, max_skipped=2, **SMALL)
    # What was complete is kept, and a higher limit continues from there.
    assert len(list(tmp_path.glob("*/chunk-*"))) == 1
    with pytest.raises(DataError, match=r"3 images cannot be read.*item 1 "):
        features.extract(MODEL, source, tmp_path, max_skipped=2, **SMALL)  # two in this run
    assert len(features.extract(MODEL, source, tmp_path, max_skipped=3, **SMALL).arrays().ids) == 18
    with pytest.raises(DataError, match="3 images cannot be read"):
        features.extract(MODEL, source, tmp_path, max_skipped=2, **SMALL)


def test_features_that_are_not_finite(tmp_path):
    huge = dataclasses.replace(MODEL, params={**MODEL.params})
    kernel = MODEL.params["visual_projection"]["kernel"]
    huge.params["visual_projection"] = {"kernel": kernel * np.float32(1e7)}
    with pytest.raises(DataError, match=r"not finite.*float16"):
        features.extract(huge, data.from_arrays(noise(5)), tmp_path, dtype="float16", **SMALL)


# --- damage ------------------------------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["features.npy", "labels.npy", "chunk.json"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "gone", "empty"])
def test_damaged_chunks_are_found_and_recomputed(tmp_path, name, how):
    source = data.from_arrays(noise(20), np.arange(20))
    store = features.extract(MODEL, source, tmp_path, **SMALL)
    before = contents(store)
    path = store.path / "chunk-000001" / name
    if how == "flipped":
        flip_a_bit(path)
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    elif how == "gone":
        path.unlink()
    else:
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"chunk 1 of the feature store.*extract the features again"):
        store.chunk(1)
    store.chunk(0)
    assert contents(features.extract(MODEL, source, tmp_path, **SMALL)) == before


def flips(content: bytes):
    """The content with one bit flipped, for every bit."""
    for place in range(8 * len(content)):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << (place % 8)
        yield bytes(changed)


def test_every_bit_of_the_settings(tmp_path):
    """Only named errors or equal settings, whichever bit of store.json is flipped."""
    store = features.extract(MODEL, data.from_arrays(noise(3), np.arange(3)), tmp_path, **SMALL)
    path, refused = store.path / "store.json", 0
    content = path.read_bytes()
    assert parse_settings(content, path) == store.settings
    for changed in flips(content):
        try:
            assert parse_settings(changed, path) == store.settings
        except DataError:
            refused += 1
    assert refused > 7 * len(content)  # what is left are blanks between values


def test_every_bit_of_a_chunk(tmp_path):
    store = features.extract(MODEL, data.from_arrays(noise(1), np.arange(1)), tmp_path, **SMALL)
    whole, refused = store.chunk(0), 0
    folder = store.folder(0)
    record = (folder / "chunk.json").read_bytes()
    for changed in flips(record):
        try:
            assert parse_record(changed, range(1)) == parse_record(record, range(1))
        except ValueError:  # which `chunk` names
            refused += 1
    assert refused > 7 * len(record)
    for name in ("features.npy", "labels.npy"):
        content = (folder / name).read_bytes()
        for changed in list(flips(content))[::7]:  # writing takes the time
            (folder / name).write_bytes(changed)
            with pytest.raises(DataError, match=r"chunk 0 .*checksum"):
                store.chunk(0)
        (folder / name).write_bytes(content)
    for found, expected in zip(store.chunk(0), whole, strict=True):
        np.testing.assert_array_equal(found, expected)


EDITS = [
    {"chunk_size": 8}, {"chunk_size": 32}, {"chunk_size": 10**9}, {"chunk_size": 0}, {"chunk_size": -16},
    {"chunk_size": "16"}, {"num_items": 18}, {"num_items": 10**9}, {"num_items": 0}, {"num_items": 20.0},
    {"batch_size": 0}, {"batch_size": True}, {"dtype": "float16"}, {"dtype": "object"}, {"dtype": None},
    {"tokens": True}, {"label_names": ["x"]}, {"label_names": None}, {"jaxzs": "9.9"}, {"format": 1}, {"format": 2},
    {"format": "jaxzs.features/3"}, {"weights": "0" * 64}, {"embedding": 3}, {"multi_label": True},
    {"normalized": True},
]  # fmt: skip


@pytest.mark.parametrize("again", [False, True], ids=["edited", "and its checksum made anew"])
def test_edited_settings_are_never_believed(tmp_path, again):
    source = data.from_arrays(noise(20), np.arange(20) % 2)
    store = features.extract(MODEL, source, tmp_path, batch_size=8, chunk_size=16)
    path, whole = store.path / "store.json", store.arrays()
    for edit in EDITS:
        edited = {**store.settings, **edit}
        checksum = digest(edited if again else store.settings)
        path.write_text(json.dumps({**edited, "sha256_of_this": checksum}))
        # With a checksum made anew, as by somebody with intent, what can be told from the rest is still refused.
        harmless = again and edit.keys() & {"label_names", "normalized"} and edit != {"label_names": None}
        for use in (
            (lambda: features.open_store(tmp_path), lambda: FeatureStore(store.path, read_settings(path)))
            if not harmless
            else ()
        ):
            with pytest.raises(DataError, match=r"store\.json|missing or damaged|not finished"):
                use().arrays()
    path.write_text(json.dumps({**store.settings, "sha256_of_this": digest(store.settings)}))
    np.testing.assert_array_equal(features.open_store(tmp_path).arrays().features, whole.features)


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", '"x"', "[" * 100_000, b"\xff\xfe", "{"])
def test_settings_of_another_kind(tmp_path, content):
    store = features.extract(MODEL, data.from_arrays(noise(3)), tmp_path, **SMALL)
    (store.path / "store.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=r"store\.json"):
        features.open_store(store.path)
    with pytest.raises(DataError, match=r"store\.json.*extract the features again"):
        features.extract(MODEL, data.from_arrays(noise(3)), tmp_path, **SMALL)


def test_a_store_of_the_earlier_format_says_what_to_do(tmp_path):
    store = features.extract(MODEL, data.from_arrays(noise(3)), tmp_path, **SMALL)
    earlier = {**store.settings, "format": 1, "jaxzs": "0.1"}
    (store.path / "store.json").write_text(json.dumps(earlier))
    with pytest.raises(DataError, match=r"format 1.*extract the features again.*version that wrote it \(0.1\)"):
        features.open_store(store.path)


def test_chunks_in_the_place_of_others(tmp_path):
    """Folders that were exchanged or copied are whole by their checksums, and not what belongs there."""
    source = data.from_arrays(noise(30), np.arange(30))
    store = features.extract(MODEL, source, tmp_path, **SMALL)
    before = contents(store)
    first, second = store.folder(0), store.folder(1)
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    for number in (0, 1):
        with pytest.raises(DataError, match=f"its items are not those from {8 * number}"):
            store.chunk(number, verify=False)
    assert contents(features.extract(MODEL, source, tmp_path, **SMALL)) == before
    shutil.rmtree(second)
    shutil.copytree(first, second)
    with pytest.raises(DataError, match="its items are not those from 8"):
        store.arrays()
    assert contents(features.extract(MODEL, source, tmp_path, **SMALL)) == before


@pytest.mark.parametrize(
    "edit",
    [
        {"sha256": {}}, {"sha256": []}, {"sha256": {"../../store.json": "0"}}, {"indices": None}, {"indices": ["a"]},
        {"indices": [10**30, 1, 2]}, {"indices": [2, 1, 0]}, {"indices": [0, 0, 1]}, {"indices": [0, True, 2]},
        {"ids": None}, {"ids": [1, 2, 3]}, {"ids": ["0"]}, {"skipped": 5}, {"skipped": ["one too many"]},
    ],
    ids=str,
)  # fmt: skip
def test_chunk_records_of_odd_content(tmp_path, edit):
    """With a checksum that fits, as of a hostile file."""
    store = features.extract(MODEL, data.from_arrays(noise(3)), tmp_path, **SMALL)
    path = store.path / "chunk-000000" / "chunk.json"
    record = json.loads(path.read_text())
    record.pop("sha256_of_this")
    record |= edit
    path.write_text(json.dumps({**record, "sha256_of_this": digest(record)}))
    with pytest.raises(DataError, match=r"chunk 0 of the feature store .* damaged"):
        store.chunk(0)


def test_every_pass_reads_what_the_checksums_cover(tmp_path):
    store = features.extract(MODEL, data.from_arrays(noise(20)), tmp_path, **SMALL)
    assert [len(part) for part in store.features()] == [8, 8, 4]
    flip_a_bit(store.path / "chunk-000002" / "features.npy")
    with pytest.raises(DataError, match=r"chunk 2 .*checksum"):
        list(store.features())


# --- the folder --------------------------------------------------------------------------------------------------


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    source = data.from_arrays(noise(3))
    store = features.extract(MODEL, source, tmp_path, **SMALL)
    lock, precious = store.path / "part-0-of-1.lock", tmp_path / "precious"
    precious.write_text("precious")
    lock.unlink()
    lock.symlink_to(precious)
    with pytest.raises(DataError, match=r"cannot open the lock .*part-0-of-1\.lock.*remove it"):
        features.extract(MODEL, source, tmp_path, **SMALL)
    assert precious.read_text() == "precious"
    lock.unlink()
    lock.write_text("left by an earlier run")
    features.extract(MODEL, source, tmp_path, **SMALL)
    assert lock.read_text() == "left by an earlier run"


def test_a_finished_store_in_a_place_that_is_only_read(tmp_path, monkeypatch):
    """As on a read-only file system, where no lock can be made. (Permissions alone do not stop every user.)"""
    source = data.from_arrays(noise(10))
    store = features.extract(MODEL, source, tmp_path, **SMALL)
    open_file = os.open

    def refuse(path, flags, *rest, **more):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return open_file(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    assert features.extract(MODEL, source, tmp_path, **SMALL) == store
    shutil.rmtree(store.folder(1))
    with pytest.raises(DataError, match=r"cannot write chunk 1 .*Read-only file system"):
        features.extract(MODEL, source, tmp_path, **SMALL)


def test_starts_together_agree_on_the_settings(tmp_path):
    """Of many that begin a store at once with chunks of their own, all use those of one."""
    source = data.from_arrays(noise(20))

    def begin(size: int) -> int:
        store = _store(MODEL, source, tmp_path / str(begin.round), features.Extraction(batch_size=8, chunk_size=size))
        return store.settings["chunk_size"]

    with ThreadPoolExecutor(8) as pool:
        for begin.round in range(20):
            assert len(set(pool.map(begin, range(8, 72, 8)))) == 1
    assert not list(tmp_path.glob("*/*/.store.*"))


def test_the_bar_counts_images(tmp_path, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total, **_):
            self.total, self.shown = total, 0
            bars.append(self)

        def update(self, number):
            self.shown += number

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda *_: None  # noqa: E731

    monkeypatch.setattr("tqdm.tqdm", Bar)
    features.extract(MODEL, unreadable(21, {3}), tmp_path, **SMALL)
    assert [(bar.total, bar.shown) for bar in bars] == [(21, 21)]


def test_old_keywords_name_the_new_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"write numerics=clip\.Numerics"):
        features.extract(MODEL, data.from_arrays(noise(3)), tmp_path, compute_dtype=jnp.bfloat16)
    for name in ("batch_size", "chunk_size"):
        with pytest.raises(ConfigError, match=f"{name} is 0, expected a whole number of at least 1"):
            features.Extraction(**{name: 0})
    with pytest.raises(ConfigError, match=r"threads is 2\.5"):
        features.Extraction(threads=2.5)


# --- processes -----------------------------------------------------------------------------------------------------

SCRIPT = """
    import sys, time
    sys.path.insert(0, {tests!r})
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    import numpy as np
    from tiny_model import noise, tiny_model
    from jaxzs import data, features

    images = noise(160)

    class Slow:
        def __len__(self):
            return len(images)

        def __getitem__(self, index):
            time.sleep({delay})
            return images[index], index

    source = data.from_object(Slow(), identity="slow", label_names=list(map(str, range(160))))
    print("ready", flush=True)
    try:
        features.extract(tiny_model(), source, {root!r}, batch_size=8, chunk_size=8, threads=1)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
        sys.exit(3)
"""


def start(root: Path, delay: float = 0.0, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    script = SCRIPT.format(tests=str(Path(__file__).parent), root=str(root), delay=delay)
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    return out


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed")
    finish(start(root))
    return contents(features.open_store(root))


def wait_for_chunks(root: Path, number: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 200
    while len(list(root.glob("*/chunk-*"))) < number:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_and_continued(tmp_path, undisturbed):
    """SIGKILL four times at different places; the end is bit-identical to an undisturbed run."""
    for more in (1, 4, 9, 13):
        process = start(tmp_path, delay=0.01)
        wait_for_chunks(tmp_path, more, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.communicate()
        kept = {p: p.stat().st_ino for p in tmp_path.glob("*/chunk-*/features.npy")}
        assert more <= len(kept) < 20
    finish(start(tmp_path))
    assert contents(features.open_store(tmp_path)) == undisturbed
    # Complete chunks were not written again.
    assert all(path.stat().st_ino == number for path, number in kept.items())
    assert not list(tmp_path.glob("*/.chunk-*"))


@pytest.mark.slow
def test_two_processes_on_one_store(tmp_path, undisturbed):
    both = [start(tmp_path, delay=0.002) for _ in range(2)]
    for process in both:
        finish(process)
    assert contents(features.open_store(tmp_path)) == undisturbed


@pytest.mark.slow
def test_two_processes_without_locks(tmp_path, undisturbed):
    """Where locks do not work (some network file systems) both compute; the renames keep the store whole."""
    code = "import fcntl; fcntl.flock = lambda *a: None\n"
    script = textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent), root=str(tmp_path), delay=0.0))
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code + script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
        for _ in range(2)
    ]
    outcomes = [process.communicate(timeout=300) for process in both]
    # One may find its unfinished chunk swept away by the other and stop; it says so, and nothing is corrupt.
    assert {process.returncode for process in both} <= {0, 3}, outcomes
    finish(start(tmp_path))
    assert contents(features.open_store(tmp_path)) == undisturbed


@pytest.mark.slow
def test_full_disk(tmp_path, undisturbed):
    """A file system of 64 KiB that fills up for real: a clear error, nothing lost, continued with more room."""
    shell = "mkdir -p {0} && mount -t tmpfs -o size={1}k tmpfs {0}"
    disk = tmp_path / "disk"
    saved = tmp_path / "saved"
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            ["unshare", "-rm", "sh", "-c", shell.format(disk, 64)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("mounting a file system of our own is not allowed here")
    inside = shell.format(disk, 64) + f' && ("$@"; code=$?; cp -r {disk} {saved}; exit $code)'
    process = start(disk, prefix=("unshare", "-rm", "sh", "-c", inside, "sh"))
    out = finish(process, code=3)
    assert "No space left on device" in out
    assert "Nothing that was there is lost" in out
    complete = list(saved.glob("*/chunk-*"))
    assert 0 < len(complete) < 20
    assert not list(saved.glob("*/.chunk-*"))
    for folder in complete:
        names = {path.name for path in folder.iterdir()}
        assert names == {"features.npy", "labels.npy", "chunk.json"}
        assert json.loads((folder / "chunk.json").read_text())["ids"]
    finish(start(saved))
    assert contents(features.open_store(saved)) == undisturbed
