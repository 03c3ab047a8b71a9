"""Mesh, rules and placement on eight host devices: the same numbers as on one, and no needless communication."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxzs
from jaxzs import clip, parallel, proxy
from jaxzs.clip.params import abstract_params, flatten, random_params
from jaxzs.clip.weights import read_config
from jaxzs.errors import ConfigError, DataError

CONFIG = clip.CLIPConfig(
    text=clip.TextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=64,
        max_position_embeddings=16,
        eos_token_id=63,
    ),
    vision=clip.VisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=8
    ),
    projection_dim=24,
)
PLACEMENTS = ("replicated", "fully_sharded", "tensor", "tensor_fully_sharded")


@pytest.fixture(scope="module")
def params():
    return random_params(jax.random.key(0), CONFIG)


@pytest.fixture(scope="module")
def problem():
    """Clustered features [N,E], text proxies [C,E]; 1003 rows are no multiple of eight."""
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(16, 24))
    classes = rng.integers(0, 16, size=1003)
    x = centres[classes] + 4 * rng.normal(size=(1003, 24))  # classes overlap, as in real data
    z = centres + 0.5 * rng.normal(size=(16, 24))
    unit = lambda a: (a / np.linalg.norm(a, axis=1, keepdims=True)).astype(np.float32)  # noqa: E731
    return unit(x), unit(z)


# --- rules ------------------------------------------------------------------------------------------------


def test_mesh_axes_are_auto():
    mesh = parallel.make_mesh(model=2)
    assert dict(mesh.shape) == {"data": 4, "model": 2}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert parallel.make_mesh(data=2, model=1, devices=jax.devices()[:2]).shape["data"] == 2


@pytest.mark.parametrize("sizes", [{"model": 3}, {"data": 3}, {"data": 4, "model": 4}])
def test_meshes_that_do_not_fit(sizes):
    with pytest.raises(ConfigError, match="devices"):
        parallel.make_mesh(**sizes)


def test_axes_that_cannot_be_split_stay_whole():
    mesh = parallel.make_mesh(model=2)
    spec = lambda axes, shape: parallel.partition_spec(axes, shape, mesh)  # noqa: E731
    assert spec(("images", "classes"), (8, 10)) == P("data", "model")
    assert spec(("images", "classes"), (6, 9)) == P(None, None)
    assert spec(("images", "images"), (8, 8)) == P("data", None)
    assert spec((None, "patches"), (8, 8)) == P(None, None)
    with pytest.raises(ConfigError, match="axis names"):
        spec(("images",), (8, 8))


def test_every_parameter_has_its_axes():
    axes = dict(flatten(clip.parameter_axes(CONFIG)))
    for path, leaf in flatten(abstract_params(CONFIG)):
        assert len(axes[path]) == len(leaf.shape), path
    layer = "vision_model/encoder/layers/0"
    assert axes[f"{layer}/self_attn/q_proj/kernel"] == ("width", "heads")
    assert axes[f"{layer}/self_attn/out_proj/bias"] == ("width",)
    assert axes[f"{layer}/mlp/fc2/kernel"] == ("mlp", "width")
    assert axes["text_model/embeddings/token_embedding/embedding"] == ("vocabulary", "width")
    assert axes["logit_scale"] == ()


def test_heads_are_never_cut():
    """Four heads of 12: eight devices along "model" divide the width 48, but not the heads."""
    mesh = parallel.make_mesh(model=8)
    tree = clip.parameter_shardings(CONFIG, mesh, "tensor")["vision_model"]["encoder"]["layers"]
    assert tree["0"]["self_attn"]["q_proj"]["kernel"].spec == P(None, None)
    assert tree["0"]["mlp"]["fc1"]["kernel"].spec == P(None, "model")
    with pytest.raises(ConfigError, match="replicated"):
        clip.parameter_shardings(CONFIG, mesh, "zero3")


# --- parameters ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placing_keeps_values(params, placement):
    mesh = parallel.make_mesh(model=2)
    placed = clip.place_parameters(params, CONFIG, mesh, placement)
    chex.assert_trees_all_equal(placed, params)
    size = sum(leaf.addressable_data(0).nbytes for _, leaf in flatten(placed))
    whole = sum(leaf.nbytes for _, leaf in flatten(params))
    most = {"replicated": 1.0, "fully_sharded": 0.3, "tensor": 0.7, "tensor_fully_sharded": 0.2}
    assert size <= most[placement] * whole


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_encoders_give_the_same_features(params, placement):
    mesh = parallel.make_mesh(model=2)
    placed = clip.place_parameters(params, CONFIG, mesh, placement)
    pixels = np.random.default_rng(0).normal(size=(16, 32, 32, 3)).astype(np.float32)
    ids = np.concatenate([np.arange(60).reshape(12, 5), np.full((12, 1), 63)], 1).astype(np.int32)

    sharded, _ = parallel.shard_rows(pixels, mesh)
    image = clip.encode_image(placed, sharded, CONFIG)
    assert image.sharding.spec[0] == "data"
    # float32 sums in another order: 1e-5 of the largest feature
    alone = np.asarray(clip.encode_image(params, pixels, CONFIG))
    np.testing.assert_allclose(np.asarray(image), alone, rtol=0, atol=1e-5 * np.abs(alone).max())
    alone = np.asarray(clip.encode_text(params, ids, CONFIG))
    text = clip.encode_text(placed, ids, CONFIG)
    np.testing.assert_allclose(np.asarray(text), alone, rtol=0, atol=1e-5 * np.abs(alone).max())


def test_a_checkpoint_is_placed_while_it_is_read(params, tmp_path):
    """Leaf by leaf, in slices: nothing asks for the whole of a split leaf at once."""
    clip.write_checkpoint(tmp_path / "model", params, CONFIG)
    mesh = parallel.make_mesh(model=2)
    asked = []

    class Watched:
        def __init__(self, array):
            self.array, self.shape = array, array.shape

        def __getitem__(self, index):
            asked.append((self.shape, self.array[index].shape))
            return self.array[index]

    place = clip.placer(CONFIG, mesh, "tensor_fully_sharded")
    read, _ = clip.read_checkpoint(tmp_path / "model", place=lambda path, array: place(path, Watched(array)))
    chex.assert_trees_all_equal(read, params)
    largest = max(np.prod(got) for shape, got in asked if len(shape) == 2)
    assert largest <= 24 * 48  # [patches + 1, width / 4] and [width / 4, mlp / 2] at most


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_loaded_onto_a_mesh_in_one_line(tiny_checkpoint, placement):
    mesh = parallel.make_mesh(model=2)
    model, alone = (jaxzs.load(tiny_checkpoint, mesh=mesh, placement=placement), jaxzs.load(tiny_checkpoint))
    chex.assert_trees_all_equal(model.params, alone.params)
    asked = clip.parameter_shardings(model.config, mesh, placement)
    assert jax.tree.map(lambda leaf: leaf.sharding, model.params) == asked
    assert model.fingerprint == alone.fingerprint
    pixels = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype(np.float32)
    features = clip.encode_image(model.params, pixels, model.config)
    expected = np.asarray(clip.encode_image(alone.params, pixels, alone.config))
    np.testing.assert_allclose(np.asarray(features), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_unknown_placement(tiny_checkpoint):
    with pytest.raises(ConfigError, match="expected replicated"):
        jaxzs.load(tiny_checkpoint, mesh=parallel.make_mesh(), placement="sharded")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's own figures")
def test_no_second_copy_while_loading(tiny_checkpoint, tmp_path, monkeypatch):
    """Anonymous memory grows by the leaves read so far and the one in hand, not by a second copy of all."""
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (tmp_path / "model" / "flax_model.msgpack").unlink()
    tower = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    old = read_config(tiny_checkpoint)
    config = dataclasses.replace(
        old, text=dataclasses.replace(old.text, **tower), vision=dataclasses.replace(old.vision, **tower)
    )
    params = jax.tree.map(lambda x: np.full(x.shape, 0.5, x.dtype), abstract_params(config))
    clip.write_checkpoint(tmp_path / "model", params, config)
    sizes = [leaf.nbytes for _, leaf in flatten(params)]
    assert sum(sizes) > 50e6
    del params
    made, grown = clip.placer, []

    def anonymous() -> int:
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    def watched(*args):
        place = made(*args)

        def one(path, leaf):
            leaf = jax.block_until_ready(place(path, leaf))
            grown.append(anonymous() - before)
            return leaf

        return one

    monkeypatch.setattr(sys.modules["jaxzs.clip.load"], "placer", watched)
    before = anonymous()
    model = jaxzs.load(tmp_path / "model", mesh=parallel.make_mesh(), placement="fully_sharded")
    assert len(grown) == len(sizes)
    # what was read so far, the leaf in hand, and 20 MB for the allocator
    most = np.cumsum(sizes) + max(sizes) + 20e6
    assert (np.array(grown) <= most).all()
    assert model.params["logit_scale"] == 0.5


# --- rows -----------------------------------------------------------------------------------------------------


def test_padding():
    x = np.arange(6.0, dtype=np.float32).reshape(3, 2)
    padded, mask = parallel.pad_rows(x, 4)
    assert mask.tolist() == [True, True, True, False]
    assert padded[3].tolist() == [0, 0]
    assert parallel.padded_length(0, 8) == 8
    assert parallel.padded_length(8, 8) == 8
    with pytest.raises(DataError, match="do not fit"):
        parallel.pad_rows(x, 2)


def test_shard_rows_and_back():
    mesh = parallel.make_mesh()
    x = np.arange(22.0, dtype=np.float32).reshape(11, 2)
    rows, mask = parallel.shard_rows(x, mesh)
    assert rows.shape == (16, 2)
    assert rows.sharding.spec == P("data", None)
    assert rows.addressable_data(0).shape == (2, 2)
    np.testing.assert_array_equal(parallel.gather(rows)[np.asarray(mask)], x)
    assert int(mask.sum()) == 11


def test_rows_of_one_process():
    mesh = parallel.make_mesh()
    assert parallel.process_rows(11, mesh) == (0, 16, 16)
    x = np.ones((11, 2), np.float32)
    rows, mask = parallel.rows_of_processes(x, 11, mesh)
    assert rows.shape == (16, 2)
    assert int(mask.sum()) == 11
    with pytest.raises(DataError, match="its part of 12"):
        parallel.rows_of_processes(x, 12, mesh)


def test_initialize_wants_all_or_nothing():
    with pytest.raises(ConfigError, match="all of"):
        parallel.initialize("127.0.0.1:1234")
    assert parallel.is_main_process()
    parallel.barrier("alone")


# --- methods: one device against eight -----------------------------------------------------------------------


def collectives(text: str) -> list[tuple[str, int]]:
    """Kind and bytes of every collective of a compiled program."""
    bytes_of = {"f32": 4, "s32": 4, "pred": 1, "bf16": 2, "u32": 4}
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = []
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
        size = 0
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            numbers = [int(n) for n in dims.split(",") if n]
            size += bytes_of[dtype] * int(np.prod(numbers, dtype=np.int64))
        found.append((kind, size))
    return found


def test_collectives_are_found_in_text():
    text = "%a = (f32[3,4]{1,0}, f32[]) all-reduce(%b), x\n%c = f32[8]{0} all-gather-start(%d)"
    assert collectives(text) == [("all-reduce", 52), ("all-gather", 32)]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1), (4, 2)])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_pseudo_labels_sharded(problem, shape, gamma):
    x, z = problem
    mesh = parallel.make_mesh(data=shape[0], model=shape[1])
    similarity = x @ z.T
    alone = proxy.pseudo_labels(similarity, gamma=gamma)
    rows, mask = parallel.shard_rows(similarity, mesh)
    classes = jax.device_put(rows, parallel.sharding(mesh, ("images", "classes"), rows.shape))
    labels = proxy.pseudo_labels(classes, gamma=gamma, mask=mask)
    np.testing.assert_allclose(parallel.gather(labels)[:1003], np.asarray(alone), rtol=1e-5, atol=1e-7)


def check_equal(result, alone):
    """Unit vectors within 1e-5 (measured 5e-7). The objective is a difference of sums of order 20: 1e-5 absolute."""
    difference = np.abs(parallel.gather(result.proxies) - np.asarray(alone.proxies)).max()
    assert difference <= 1e-5
    np.testing.assert_allclose(result.objective, alone.objective, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1), (4, 2)])
@pytest.mark.parametrize(("solver", "iterations"), [("fast", 30), ("reference", 50)])
def test_proxies_sharded(problem, shape, solver, iterations):
    """Any number of steps: which of them are kept must not depend on rounding."""
    x, z = problem
    mesh = parallel.make_mesh(data=shape[0], model=shape[1])
    labels = np.asarray(proxy.pseudo_labels(x @ z.T))
    alone = proxy.learn_proxies(x, z, labels, solver=solver, iterations=iterations)
    rows, mask = parallel.shard_rows(x, mesh)
    soft, _ = parallel.shard_rows(labels, mesh)
    classes = jax.device_put(z, parallel.sharding(mesh, ("classes", None), z.shape))
    result = proxy.learn_proxies(rows, classes, soft, solver=solver, iterations=iterations, mask=mask)
    check_equal(result, alone)


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [1, 5, 10, 15, 30, 47])
def test_whole_method_sharded(problem, iterations):
    x, z = problem
    alone = proxy.fit(x, z, proxy.Settings(iterations=iterations))
    rows, mask = parallel.shard_rows(x, parallel.make_mesh())
    result = proxy.fit(rows, z, proxy.Settings(iterations=iterations), mask=mask)
    check_equal(result, alone)


@pytest.mark.slow
def test_few_images_sharded():
    """Flat valleys: the gradient is small beside the two sums it is the difference of. Measured 1e-5, not 5e-7."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(40, 32)).astype(np.float32)
    x = (z[rng.integers(0, 40, 200)] + 2 * rng.normal(size=(200, 32))).astype(np.float32)
    alone = proxy.fit(x, z, proxy.Settings(iterations=30))
    rows, mask = parallel.shard_rows(x, parallel.make_mesh())
    result = proxy.fit(rows, z, proxy.Settings(iterations=30), mask=mask)
    np.testing.assert_allclose(np.asarray(result.proxies), np.asarray(alone.proxies), atol=2e-5)


@pytest.mark.slow
def test_no_collective_grows_with_the_images():
    """Per solver pass one all-reduce of C x E, the others O(C), whatever N is; nothing is ever gathered."""
    mesh, C, E = parallel.make_mesh(), 6, 24

    def communication(num_images):
        shape = (num_images, E)
        rows = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=parallel.sharding(mesh, ("images", None), shape))
        z = jax.ShapeDtypeStruct((C, E), jnp.float32)
        settings = proxy.Settings(iterations=8, sharding=rows.sharding)
        run = jax.jit(lambda x, z: proxy.fit(x, z, settings).proxies)
        return collectives(run.lower(rows, z).compile().as_text())

    found = sorted(communication(128))
    assert sorted(communication(4096)) == found
    assert {kind for kind, _ in found} == {"all-reduce"}
    # Q^T X at the start and once more in the loop over steps, P^T X, and X^T X; some versions of the compiler send the
    # smaller sums of the same time along with them, others each alone
    large = sum(size for _, size in found if size >= 4 * C * E)
    assert 0 <= large - 4 * (3 * C * E + E * E) <= 4 * (2 + C)
    assert max(size for _, size in found) <= 4 * (C * E + E * E + C)


def test_compiled_once_for_all_data_sets(params):
    mesh = parallel.make_mesh()
    placed = clip.place_parameters(params, CONFIG, mesh)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def encode(params, pixels):
        return clip.encode_image(params, pixels, CONFIG)

    for count in (3, 5, 8):
        pixels = np.ones((count, 32, 32, 3), np.float32)
        batch, _ = parallel.shard_rows(pixels, mesh)
        encode(placed, batch)
