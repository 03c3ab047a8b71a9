"""Checkpoints in and out: every storage format, one audit for all, named errors, exact round trips."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.serialization import msgpack_restore, msgpack_serialize
from safetensors.numpy import load_file, save_file

from jaxzs import clip
from jaxzs.clip import layout
from jaxzs.clip.params import abstract_params, flatten, unflatten
from jaxzs.clip.weights import FORMATS, WEIGHT_FILES, fingerprint, read_checkpoint, read_config, write_checkpoint
from jaxzs.errors import CheckpointError, ConfigError

GOLDEN = Path(__file__).parent / "golden/clip"
MODELS = ("quickgelu_legacy_eos", "gelu_first_eos", "odd_sizes")
EXACT = ("safetensors_torch", "safetensors_flax", "sharded_flax", "sharded_safetensors")


@pytest.fixture(scope="module")
def original():
    """The tree that all of variants/ hold, as flax itself reads it, and its configuration."""
    folder = GOLDEN / "gelu_first_eos"
    return msgpack_restore((folder / "flax_model.msgpack").read_bytes()), read_config(folder)


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of a small checkpoint in Flax's format, to be damaged."""
    return Path(shutil.copytree(GOLDEN / "gelu_first_eos", tmp_path / "checkpoint"))


def rewrite(folder: Path, change) -> None:
    """Replaces flax_model.msgpack by what `change` makes of its leaves by path, written by flax."""
    file = folder / "flax_model.msgpack"
    leaves = dict(flatten(msgpack_restore(file.read_bytes())))
    change(leaves)
    file.write_bytes(msgpack_serialize(unflatten(leaves)))


def to_torch(path: str, leaf: np.ndarray) -> np.ndarray:
    """Kernels as torch stores them: (out, in), (out, in, height, width)."""
    return leaf.transpose({2: (1, 0), 4: (3, 2, 0, 1)}[leaf.ndim]) if path.endswith("/kernel") else leaf


def as_safetensors(folder: Path, rename=lambda name: name, metadata=None) -> None:
    """Replaces the weights of a checkpoint by model.safetensors with torch names, changed by `rename`."""
    file = folder / "flax_model.msgpack"
    leaves = flatten(msgpack_restore(file.read_bytes()))
    tensors = {
        rename(layout.torch_name(path)): to_torch(path, leaf).copy(order="C")
        for path, leaf in leaves
        if rename(layout.torch_name(path)) is not None
    }
    save_file(tensors, folder / "model.safetensors", metadata)
    file.unlink()


# --- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_tree_is_that_of_the_configuration(name):
    params, config = read_checkpoint(GOLDEN / name)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, abstract_params(config))
    expected = msgpack_restore((GOLDEN / name / "flax_model.msgpack").read_bytes())
    chex.assert_trees_all_equal(params, expected)


@pytest.mark.parametrize("name", EXACT)
def test_every_format_gives_the_same_tree(name, original):
    params, config = read_checkpoint(GOLDEN / "variants" / name)
    chex.assert_trees_all_equal(params, original[0])
    assert config == original[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "bf16_safetensors", "fp16", "fp16_safetensors"])
def test_half_precision_storage(name, original):
    dtype = jnp.bfloat16 if name.startswith("bf16") else jnp.float16
    kept, config = read_checkpoint(GOLDEN / "variants" / name)
    chex.assert_trees_all_equal(kept, jax.tree.map(lambda leaf: leaf.astype(dtype), original[0]))
    upcast, _ = read_checkpoint(GOLDEN / "variants" / name, dtype=jnp.float32)
    reference = np.load(GOLDEN / "variants/ref_reduced.npz")
    images = np.load(GOLDEN / "gelu_first_eos/ref_image.npz")["pixel_values_nchw"]
    texts = np.load(GOLDEN / "gelu_first_eos/ref_text.npz")
    features = clip.encode_image(upcast, images.transpose(0, 2, 3, 1), config)
    kind = name.split("_")[0]
    # float32 against float32 of another implementation, values of order 1 to 5
    np.testing.assert_allclose(features, reference[f"{kind}/image_features"], atol=2e-5)
    features = clip.encode_text(upcast, texts["pad_eos_mask/input_ids"], config, texts["pad_eos_mask/attention_mask"])
    np.testing.assert_allclose(features, reference[f"{kind}/text_features"], atol=2e-5)


def test_dtype_is_cast_leaf_by_leaf(checkpoint):
    params, _ = read_checkpoint(checkpoint, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    rewrite(checkpoint, lambda leaves: leaves.update(logit_scale=np.ones(())))
    params, _ = read_checkpoint(checkpoint)
    assert params["logit_scale"].dtype == jnp.float32


def test_values_that_float16_cannot_hold_are_named(checkpoint):
    def change(leaves):
        leaves["visual_projection/kernel"] = leaves["visual_projection/kernel"] + np.float32(1e6)

    rewrite(checkpoint, change)
    read_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match=r"after casting to float16:\n  visual_projection/kernel"):
        read_checkpoint(checkpoint, dtype=jnp.float16)


@pytest.mark.parametrize("source", ["gelu_first_eos", "variants/safetensors_torch"])
def test_one_tower_of_a_full_checkpoint(source, original):
    vision, config = read_checkpoint(GOLDEN / source, towers=("vision",))
    assert set(vision) == {"vision_model", "visual_projection"}
    text, _ = read_checkpoint(GOLDEN / source, towers=("text",))
    assert set(text) == {"text_model", "text_projection"}
    chex.assert_trees_all_equal({**vision, **text, "logit_scale": 0}, {**original[0], "logit_scale": 0})
    assert config == original[1]


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_checkpoints_of_one_tower(tower, original, tmp_path):
    folder = GOLDEN / f"variants/{tower}_only"
    params, config = read_checkpoint(folder, towers=(tower,))
    chex.assert_trees_all_equal(params, {name: original[0][name] for name in params})
    assert getattr(config, tower).hidden_act == "gelu"
    assert config.projection_dim == original[1].projection_dim
    with pytest.raises(ConfigError, match=rf"pass towers=\('{tower}',\)"):
        read_checkpoint(folder)

    # the tower's own name left out, as a bare CLIPVisionModel may be saved
    copy = Path(shutil.copytree(folder, tmp_path / "bare"))
    tensors = load_file(copy / "model.safetensors")
    bare = {name.removeprefix(f"{tower}_model."): value for name, value in tensors.items()}
    assert bare.keys() != tensors.keys()
    save_file(bare, copy / "model.safetensors")
    chex.assert_trees_all_equal(read_checkpoint(copy, towers=(tower,))[0], params)


def test_prefix_and_absent_metadata(checkpoint, original):
    as_safetensors(checkpoint, lambda name: "clip." + name)
    chex.assert_trees_all_equal(read_checkpoint(checkpoint)[0], original[0])


def test_names_decide_over_metadata(checkpoint, original):
    """Square kernels look alike in both layouts; metadata that lies must not transpose them."""
    as_safetensors(checkpoint, metadata={"format": "flax"})
    chex.assert_trees_all_equal(read_checkpoint(checkpoint)[0], original[0])


def test_position_ids_are_known_and_ignored(checkpoint, original):
    def change(leaves):
        leaves["text_model/embeddings/position_ids"] = np.arange(16)
        leaves["vision_model/embeddings/position_ids"] = np.arange(17)

    rewrite(checkpoint, change)
    chex.assert_trees_all_equal(read_checkpoint(checkpoint)[0], original[0])


def test_leaves_are_placed_one_by_one(data_mesh, original):
    """`place` sees each leaf once, as a read-only view into the file, and decides where it goes."""
    split = jax.sharding.NamedSharding(data_mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(data_mesh, jax.sharding.PartitionSpec())
    seen = []

    def place(path, array):
        assert type(array) is np.ndarray
        assert not array.flags.writeable
        assert not array.flags.owndata
        seen.append(path)
        return jax.device_put(array, split if array.ndim and array.shape[0] % 8 == 0 else whole)

    params, config = read_checkpoint(GOLDEN / "variants/safetensors_torch", place=place)
    assert seen == [path for path, _ in flatten(abstract_params(config))]
    assert params["text_model"]["encoder"]["layers"]["0"]["mlp"]["fc1"]["kernel"].sharding == split
    chex.assert_trees_all_equal(params, original[0])


def test_parameters_outlive_their_file(checkpoint, original):
    params, _ = read_checkpoint(checkpoint)
    file = checkpoint / "flax_model.msgpack"
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    chex.assert_trees_all_equal(params, original[0])


def test_order_of_preference(checkpoint, original):
    rewrite(checkpoint, lambda leaves: leaves.update(logit_scale=np.zeros((), np.float32)))
    assert float(read_checkpoint(checkpoint)[0]["logit_scale"]) == 0
    shutil.copy(GOLDEN / "variants/safetensors_torch/model.safetensors", checkpoint)
    assert read_checkpoint(checkpoint)[0]["logit_scale"] == original[0]["logit_scale"]
    by_name, _ = read_checkpoint(checkpoint / "flax_model.msgpack")
    assert float(by_name["logit_scale"]) == 0


def test_content_decides_over_the_file_name(checkpoint, original):
    (checkpoint / "flax_model.msgpack").rename(checkpoint / "model.safetensors")
    chex.assert_trees_all_equal(read_checkpoint(checkpoint)[0], original[0])


# --- the audit -----------------------------------------------------------------------------------------------------


def test_audit_lists_everything_at_once(checkpoint):
    def change(leaves):
        del leaves["text_model/final_layer_norm/scale"]
        del leaves["logit_scale"]
        leaves["text_projection/kernel"] = leaves["text_projection/kernel"].T.copy()
        leaves["visual_projection/kernel"] = leaves["visual_projection/kernel"].astype(np.int32)
        leaves["vision_model/extra/bias"] = np.zeros(3, np.float32)

    rewrite(checkpoint, change)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(checkpoint)
    message = str(caught.value)
    assert "2 missing, 2 of wrong shape or dtype, 1 unexpected" in message
    assert message.split("\n")[1:] == [
        "  missing      logit_scale ()",
        "  missing      text_model/final_layer_norm/scale (32,)",
        "  wrong shape  text_projection/kernel is (24, 32), expected (32, 24)",
        "  wrong dtype  visual_projection/kernel is int32, expected one of "
        "['float64', 'float32', 'float16', 'bfloat16']",
        "  unexpected   vision_model/extra/bias (3,)",
    ]


def test_audit_of_torch_names_speaks_of_the_file(checkpoint):
    def rename(name):
        if name == "logit_scale":
            return None
        return "lm_head.weight" if name == "text_projection.weight" else name

    as_safetensors(checkpoint, rename)
    values = json.loads((checkpoint / "config.json").read_text())
    values["vision_config"]["num_hidden_layers"] = 3
    values["text_config"]["vocab_size"] = 70
    (checkpoint / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(checkpoint)
    message = str(caught.value)
    assert "18 missing, 1 of wrong shape or dtype, 1 unexpected" in message
    assert "missing      text_projection.weight (24, 32)" in message
    assert "missing      vision_model.encoder.layers.2.mlp.fc1.weight (56, 40)" in message
    assert "token_embedding.weight is (64, 32), expected (70, 32)" in message
    assert "unexpected   lm_head.weight (24, 32)" in message


def test_not_finite_leaves_are_named(checkpoint):
    def change(leaves):
        for name, value in (("text_projection/kernel", np.nan), ("visual_projection/kernel", np.inf)):
            leaves[name] = leaves[name].copy()
            leaves[name][1, 2] = value

    rewrite(checkpoint, change)
    with pytest.raises(CheckpointError, match=r"2 leaves hold NaN.*\n.*text_proj.*\n.*visual_proj"):
        read_checkpoint(checkpoint)


# --- damaged and foreign files -------------------------------------------------------------------------------------


def damage_stand_in(content: bytes):
    return lambda folder: (folder / "flax_model.msgpack").write_bytes(content)


def damage_resize(file: str, by: int):
    def damage(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[:by] if by < 0 else content + b"\0" * by)

    return damage


def safetensors_then(damage):
    def both(folder: Path) -> None:
        as_safetensors(folder)
        damage(folder)

    return both


def damage_config(**changes):
    def damage(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(values))

    return damage


def huge_header(folder: Path) -> None:
    (folder / "flax_model.msgpack").rename(folder / "model.safetensors")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**31) + b'{"a":1}')


def shards_then(change):
    def damage(folder: Path) -> None:
        (folder / "flax_model.msgpack").unlink()
        shutil.copytree(GOLDEN / "variants/sharded_flax", folder, dirs_exist_ok=True)
        index = folder / "flax_model.msgpack.index.json"
        values = json.loads(index.read_text())
        change(folder, values)
        index.write_text(json.dumps(values))

    return damage


def outside(folder: Path, values: dict) -> None:
    shutil.copy(folder / "flax_model-00001-of-00003.msgpack", folder.parent / "elsewhere.msgpack")
    values["weight_map"]["logit_scale"] = "../elsewhere.msgpack"


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 605247071\n"
DAMAGES = {
    "git-lfs": (damage_stand_in(LFS), "git-lfs pointer.*git lfs pull"),
    "html": (damage_stand_in(b"<!DOCTYPE html>\n<html>"), "HTML page"),
    "empty": (damage_stand_in(b""), "empty"),
    "text": (damage_stand_in(b"hello, hello, hello"), "not a weight file"),
    "old pickle": (damage_stand_in(b"\x80\x02}q\x00."), "pickles are never executed"),
    "truncated": (damage_resize("flax_model.msgpack", -100), "truncated"),
    "trailing": (damage_resize("flax_model.msgpack", 7), "damaged Flax msgpack.*extra data"),
    "truncated safetensors": (safetensors_then(damage_resize("model.safetensors", -9)), "truncated"),
    "trailing safetensors": (safetensors_then(damage_resize("model.safetensors", 3)), "3 bytes after"),
    "huge header": (huge_header, "header claims 2147483648 bytes, the file has 15"),
    "no weights": (lambda folder: (folder / "flax_model.msgpack").unlink(), "no weights.*ref_image"),
    "wrong architecture": (damage_config(model_type="blip"), "'blip', expected 'clip'"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
    "config is lfs": (lambda folder: (folder / "config.json").write_bytes(LFS), "config.json.*git-lfs"),
    "config is not JSON": (damage_resize("config.json", -20), "config.json is not valid JSON"),
    "missing shard": (
        shards_then(lambda folder, _: (folder / "flax_model-00002-of-00003.msgpack").unlink()),
        "1 of 3 shards are missing: flax_model-00002-of-00003.msgpack",
    ),
    "outside": (shards_then(outside), r"'../elsewhere.msgpack'; shards must lie in the same folder"),
    "repeated leaf": (
        shards_then(
            lambda folder, values: (
                shutil.copy(folder / "flax_model-00001-of-00003.msgpack", folder / "again"),
                values["weight_map"].update(logit_scale="again"),
            )
        ),
        "lies in more than one shard",
    ),
    "not an index": (shards_then(lambda _, values: values.update(weight_map=3)), "not an index"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named(kind, checkpoint):
    damage, message = DAMAGES[kind]
    damage(checkpoint)
    with pytest.raises((CheckpointError, ConfigError), match=f"(?s){message}") as caught:
        read_checkpoint(checkpoint)
    assert str(checkpoint) in str(caught.value)


def test_absent_folder(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such file or folder"):
        read_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("towers", [(), "vision", ("audio",)])
def test_unknown_towers(towers):
    with pytest.raises(CheckpointError, match="towers must be"):
        read_checkpoint(GOLDEN / "odd_sizes", towers=towers)


def test_torch_files_need_no_torch(monkeypatch, original):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    chex.assert_trees_all_equal(read_checkpoint(GOLDEN / "variants/torch_bin")[0], original[0])


# --- writing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("format", [format for format in FORMATS if format != "open_clip"])  # see test_families.py
def test_round_trip(format, dtype, original, tmp_path):
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), original[0])
    file = write_checkpoint(tmp_path, params, original[1], format=format)
    again, config = read_checkpoint(tmp_path)
    chex.assert_trees_all_equal(again, params)
    chex.assert_trees_all_equal_dtypes(again, params)
    assert config == original[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["config.json", file.name])


def test_flax_itself_reads_what_is_written(original, tmp_path):
    file = write_checkpoint(tmp_path, original[0], original[1], format="flax")
    chex.assert_trees_all_equal(msgpack_restore(file.read_bytes()), original[0])


@pytest.mark.parametrize(
    ("format", "reference"), [("safetensors", "safetensors_torch"), ("safetensors-flax", "safetensors_flax")]
)
def test_the_same_tensors_as_transformers_writes(format, reference, original, tmp_path):
    written = load_file(write_checkpoint(tmp_path, original[0], original[1], format=format))
    expected = load_file(GOLDEN / "variants" / reference / "model.safetensors")
    chex.assert_trees_all_equal(written, expected)


def test_writing_what_does_not_fit_is_refused(original, tmp_path):
    params = {name: leaf for name, leaf in original[0].items() if name != "logit_scale"}
    with pytest.raises(CheckpointError, match="missing      logit_scale"):
        write_checkpoint(tmp_path / "new", params, original[1])
    with pytest.raises(CheckpointError, match="format must be one of"):
        write_checkpoint(tmp_path / "new", original[0], original[1], format="pickle")
    assert not (tmp_path / "new").exists()


def test_writing_behind_preferred_weights_is_refused(original, tmp_path):
    write_checkpoint(tmp_path, *original, format="safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors, which would be read instead"):
        write_checkpoint(tmp_path, *original, format="flax")
    write_checkpoint(tmp_path, *original, format="safetensors")  # replacing is fine


def test_a_failed_write_leaves_the_old_file(original, tmp_path):
    class Lost:
        shape, dtype, size = (), np.dtype(np.float32), 1

        def __array__(self, *args, **kwargs):
            raise RuntimeError("device lost")

    file = write_checkpoint(tmp_path, *original)
    before = file.read_bytes()
    # the last leaf of the tree, so that nearly everything has been written when it fails
    with pytest.raises(RuntimeError, match="device lost"):
        write_checkpoint(tmp_path, {**original[0], "logit_scale": Lost()}, original[1])
    assert file.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


# --- identity ------------------------------------------------------------------------------------------------------


def test_fingerprint_depends_on_the_values_alone(original, data_mesh):
    params, config = original
    expected = fingerprint(params, config)
    assert len(expected) == 64
    for name in EXACT:
        assert fingerprint(*read_checkpoint(GOLDEN / "variants" / name)) == expected
    everywhere = jax.sharding.NamedSharding(data_mesh, jax.sharding.PartitionSpec())
    assert fingerprint(jax.device_put(params, everywhere), config) == expected
    reordered = {name: params[name] for name in reversed(params)}
    assert fingerprint(reordered, config) == expected


def test_fingerprint_sees_every_change(original):
    params, config = original
    prints = {fingerprint(params, config)}
    nudged = params["logit_scale"] + np.float32(1e-6)
    prints.add(fingerprint({**params, "logit_scale": nudged}, config))
    half = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params)
    prints.add(fingerprint(half, config))
    prints.add(fingerprint(jax.tree.map(lambda leaf: leaf.astype(np.float32), half), config))
    flat = dict(flatten(params))
    kernel = flat["text_projection/kernel"]
    prints.add(fingerprint(unflatten({**flat, "text_projection/kernel": kernel[::-1]}), config))
    values = config.to_hf()
    values["text_config"]["eos_token_id"] = 52
    prints.add(fingerprint(params, type(config).from_hf(values)))
    assert len(prints) == 6


def test_public_names():
    assert clip.read_checkpoint is read_checkpoint
    assert clip.write_checkpoint is write_checkpoint
    assert os.path.basename(WEIGHT_FILES[0]) == "model.safetensors"


# --- what strangers' files have been seen to hold -------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "clip_model.", "module.model."])
def test_one_prefix_before_every_name_is_stripped(prefix, checkpoint, original):
    """As DistributedDataParallel, torch.compile and wrapping modules leave behind."""
    as_safetensors(checkpoint, lambda name: prefix + name)
    chex.assert_trees_all_equal(read_checkpoint(checkpoint)[0], original[0])


def test_one_prefix_of_flax_is_stripped(checkpoint, original):
    rewrite(checkpoint, lambda leaves: leaves.update({f"params/{name}": leaves.pop(name) for name in [*leaves]}))
    chex.assert_trees_all_equal(read_checkpoint(checkpoint)[0], original[0])


def test_what_stands_beside_the_prefix_is_listed_alone(checkpoint):
    """A classifier trained on top: one line about it, none about the CLIP inside."""
    as_safetensors(checkpoint, lambda name: "classifier.weight" if name == "logit_scale" else "clip." + name)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(checkpoint)
    assert str(caught.value).splitlines()[1:] == ["  missing      logit_scale ()", "  unexpected   classifier.weight"]


def test_names_of_another_architecture_are_one_line(checkpoint):
    as_safetensors(checkpoint, lambda name: "x" + name.replace("_", "-").replace("e", "\x1b[2J"))
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(checkpoint)
    assert len(str(caught.value).splitlines()) == 3
    assert "\x1b" not in str(caught.value)  # nothing in a file steers the terminal


def test_a_number_stored_as_one_element(checkpoint, original):
    rewrite(checkpoint, lambda leaves: leaves.update(logit_scale=leaves["logit_scale"].reshape(1)))
    chex.assert_trees_all_equal(read_checkpoint(checkpoint)[0], original[0])
    rewrite(checkpoint, lambda leaves: leaves.update(logit_scale=leaves["logit_scale"].reshape(1, 1)))
    with pytest.raises(CheckpointError, match=r"logit_scale is \(1, 1\), expected \(\)"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("value", [20.0, 89.0, 100.0, 800.0, -800.0])
def test_a_scale_that_no_clip_has(value, checkpoint):
    rewrite(checkpoint, lambda leaves: leaves.update(logit_scale=np.float32(value) + np.zeros((), np.float32)))
    with pytest.raises(CheckpointError, match=r"logit_scale is .*store its logarithm"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("value", [3e38, -3e38, np.nan, np.inf])
def test_weights_that_no_product_survives(value, checkpoint):
    def change(leaves):
        leaves["visual_projection/kernel"] = np.full_like(leaves["visual_projection/kernel"], value)

    rewrite(checkpoint, change)
    with pytest.raises(CheckpointError, match=r"(?s)1 leaves hold NaN or infinite .*visual_projection"):
        read_checkpoint(checkpoint)


def test_a_file_that_the_system_calls_empty(checkpoint):
    (checkpoint / "flax_model.msgpack").unlink()
    (checkpoint / "flax_model.msgpack").symlink_to("/proc/self/status")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(checkpoint)
