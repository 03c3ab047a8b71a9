"""Every layout and family against what its own library computed in float64, on the real files that it wrote.

The arrays were made by open_clip 3.3.0, OpenAI's model code, transformers 4.57.6 and open_clip's reading of big_vision.
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxzs import clip, parallel
from jaxzs.clip import open_clip, resnet
from jaxzs.clip.params import flatten
from jaxzs.clip.pooling import map_local
from jaxzs.clip.weights import read_config, towers_of
from jaxzs.errors import CheckpointError, ConfigError, ImageError, TextError

GOLDEN = Path(__file__).parent / "golden" / "families"
# Of the largest value: correct float32 differs from float64 by at most 1.1e-6; the smallest mistake, the tanh form of
# gelu for the exact one, by 1.2e-4.
RTOL = 5e-6
CASES = {
    "vit_gelu": "",
    "vit_customtext_bias": "",
    "vit_quickgelu_remainder_bin": "",
    "worldwide_eos": "",
    "clipa": "",
    "rn_quickgelu": "",
    "openai_vit": "model.pt",
    "openai_rn": "model.pt",
    "hf_siglip": "",
    "hf_siglip2_gemma": "",
    "hf_siglip2_naflex": "",
    "openclip_siglip": "",
    "openclip_siglip (big_vision)": "big_vision.npz",
}


@pytest.fixture(autouse=True)
def _small_timm_tower(monkeypatch):
    """The tower of one golden is smaller than any published one."""
    sizes = open_clip._timm_tower
    tiny = open_clip.siglip_tower(32, 119, 2, 4, 32, 8, "gelu")
    monkeypatch.setattr(
        open_clip, "_timm_tower", lambda name: tiny if name == "vit_tiny_shared_siglip" else sizes(name)
    )


@functools.cache
def _read(name: str):
    folder = GOLDEN / name.split()[0]
    return clip.read_checkpoint(folder / CASES[name])


@functools.cache
def reference(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name.split()[0] / "ref.npz") as file:
        return dict(file)


def images_of(name: str):
    ref = reference(name)
    if "patches" in ref:
        return clip.Patches(ref["patches"], ref["pixel_attention_mask"].astype(bool), ref["spatial_shapes"])
    return ref["pixel_values_nchw"].transpose(0, 2, 3, 1)


def assert_near(actual, expected, rtol: float = RTOL) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_features_and_logits(name):
    (params, config), ref = _read(name), reference(name)
    with jax.default_matmul_precision("highest"):
        images = clip.encode_image(params, images_of(name), config)
        texts = clip.encode_text(params, ref["input_ids"], config)
    assert_near(images, ref["image_features_f64"])
    assert_near(texts, ref["text_features_f64"])
    logits = clip.logits_per_image(images, texts, params["logit_scale"], params.get("logit_bias"))
    np.testing.assert_allclose(logits, ref["logits_per_image_f64"], rtol=0, atol=2e-5)
    if "sigmoid_loss_f64" in ref:
        count = min(logits.shape)
        loss = clip.sigmoid_loss(logits[:count, :count])
        np.testing.assert_allclose(loss, ref["sigmoid_loss_f64"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_gelu", "clipa", "hf_siglip", "hf_siglip2_naflex", "rn_quickgelu"])
def test_towers_with_their_intermediates(name):
    """Hidden states of every layer; and pooled, projected, is what the encoders give."""
    (params, config), ref = _read(name), reference(name)
    with jax.default_matmul_precision("highest"):
        image = jax.jit(clip.vision_tower, static_argnames="config")(params, images_of(name), config=config)
        text = jax.jit(clip.text_tower, static_argnames="config")(params, ref["input_ids"], config=config)
    for i in (1, 2):
        np.testing.assert_allclose(text.hidden[i], ref[f"text_hidden_{i}"], rtol=0, atol=1e-5)
    if isinstance(config.vision, clip.ResNetConfig):
        for stage in (1, 2, 3, 4):
            assert_near(image.hidden[stage], ref[f"vision_layer{stage}"].transpose(0, 2, 3, 1))
        assert_near(image.attention[0][:, :, 0], ref["pool_attention"])
    else:
        real = ref["pixel_attention_mask"].astype(bool) if "patches" in ref else np.ones(image.tokens.shape[:2], bool)
        for i in (1, 2):
            np.testing.assert_allclose(image.hidden[i][real], ref[f"vision_hidden_{i}"][real], rtol=0, atol=1e-5)
    assert_near(clip.model.project_image(params, image.pooled), ref["image_features_f64"])


@pytest.mark.slow
def test_local_maps():
    """Dense features of a ResNet with and without the pool's positions, and of SigLIP through its head."""
    (params, config), ref = _read("rn_quickgelu"), reference("rn_quickgelu")
    with jax.default_matmul_precision("highest"):
        plain = resnet.local_features(params, images_of("rn_quickgelu"), config.vision)
        assert_near(plain, ref["dense_no_positions"])
        table = params["vision_model"]["embeddings"]["position_embedding"]["embedding"]
        placed = resnet.local_features(params, images_of("rn_quickgelu"), config.vision, positions=table[1:])
        assert_near(placed, ref["dense_with_positions"][:, 1:])
        (params, config), ref = _read("hf_siglip"), reference("hf_siglip")
        local = map_local(
            params["vision_model"]["head"], jnp.asarray(ref["vision_post"]), config.vision, clip.Numerics()
        )
    assert_near(local, ref["local_map"])


def test_interpolated_positions_of_siglip():
    """A table without a class row is resized whole."""
    (params, config), ref = _read("hf_siglip"), reference("hf_siglip")
    pixels = ref["interpolated_pixels_nchw"].transpose(0, 2, 3, 1)
    with jax.default_matmul_precision("highest"):
        features = clip.encode_image(params, pixels, config, interpolate_positions=True)
    assert_near(features, ref["interpolated_features"], 1e-5)  # the reference is float32 itself


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "vit_customtext_bias",
        "worldwide_eos",
        "clipa",
        "rn_quickgelu",
        "hf_siglip",
        "hf_siglip2_naflex",
        "openclip_siglip",
    ],
)
def test_mapped_over_parameters_and_sharded(name):
    """The same features of images and texts under vmap over two sets of parameters, on 8 devices, and fully sharded."""
    (params, config), ref, mesh = _read(name), reference(name), parallel.make_mesh()
    eight = lambda x: np.repeat(np.asarray(x)[:2], 4, axis=0)  # noqa: E731 # the first two rows, four times each
    images, ids = jax.tree.map(eight, images_of(name)), eight(ref["input_ids"])
    expected = [eight(ref[f"{what}_features_f64"]) for what in ("image", "text")]

    def encode(params, images, ids):
        return clip.encode_image(params, images, config), clip.encode_text(params, ids, config)

    with jax.default_matmul_precision("highest"):
        both = jax.vmap(encode, in_axes=(0, None, None))(
            jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params), images, ids
        )
        rows = jax.device_put((images, ids), jax.NamedSharding(mesh, jax.P(mesh.axis_names)))
        for placement in ("replicated", "fully_sharded"):
            found = encode(clip.place_parameters(params, config, mesh, placement), *rows)
            jax.tree.map(assert_near, list(found), expected)
    jax.tree.map(assert_near, [x[0] for x in both], expected)
    assert all(np.abs(x[1] - x[0]).max() > 0.1 for x in both)


@pytest.mark.parametrize("name", CASES)
def test_read_shard_by_shard(name):
    """Every layout is placed while it is read; every leaf of every family has a sharding."""
    params, config = _read(name)
    place = clip.placer(config, parallel.make_mesh(), "fully_sharded")
    sharded, _ = clip.read_checkpoint(GOLDEN / name.split()[0] / CASES[name], place=place)
    chex.assert_trees_all_equal(sharded, params)
    chex.assert_trees_all_equal_structs(
        clip.parameter_shardings(config, parallel.make_mesh()), clip.abstract_params(config)
    )


# What each wrong reading of the same file costs, from the specification: far more than the tolerance.
MISTAKES = {
    "tanh gelu for exact": ("vit_gelu", {"vision": {"hidden_act": "gelu_pytorch_tanh"}}, 1e-4),
    "class token for mean": ("clipa", {"vision": {"pooling": "class"}}, 0.1),
    "SigLIP with LayerNorm of CLIP": ("hf_siglip", {"vision": {"layer_norm_eps": 1e-5}}, 1e-4),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_configuration_is_seen(mistake):
    import dataclasses

    name, change, least = MISTAKES[mistake]
    params, config = _read(name)
    wrong = dataclasses.replace(config, vision=dataclasses.replace(config.vision, **change["vision"]))
    expected = reference(name)["image_features_f64"]
    assert np.abs(clip.encode_image(params, images_of(name), wrong) - expected).max() > least * np.abs(expected).max()


def test_a_siglip_text_must_not_be_cut():
    (params, config), ref = _read("hf_siglip"), reference("hf_siglip")
    with pytest.raises(TextError, match="reads the last of exactly 16"):
        clip.encode_text(params, ref["input_ids"][:, :12], config)


def test_pixels_where_patches_are_wanted_and_the_reverse():
    params, config = _read("hf_siglip2_naflex")
    with pytest.raises(ImageError, match=r"this tower takes clip\.Patches"):
        clip.encode_image(params, np.zeros((1, 32, 32, 3), np.float32), config)
    with pytest.raises(ImageError, match="takes an array of pixels"):
        clip.encode_image(*_read("vit_gelu")[:1], images_of("hf_siglip2_naflex"), _read("vit_gelu")[1])


# --- writing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["flax", "safetensors", "safetensors-flax", "open_clip"])
@pytest.mark.parametrize("name", CASES)
def test_round_trip(name, format, tmp_path):
    """Every tree through every layout that can hold it, bit for bit; a ResNet's BatchNorm within its rounding."""
    params, config = _read(name)
    if format == "open_clip" and getattr(config.vision, "pooling", "") == "map":
        with pytest.raises(ConfigError, match="SigLIP is written for transformers"):
            clip.write_checkpoint(tmp_path, params, config, format)
        return
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    clip.write_checkpoint(tmp_path, params, config, format)
    again, read = clip.read_checkpoint(tmp_path)
    if format == "open_clip" and isinstance(config.vision, clip.ResNetConfig):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), again, params)
    else:
        chex.assert_trees_all_equal(again, params)
    assert read.vision == config.vision
    if format != "open_clip":
        assert clip.fingerprint(again, read) == clip.fingerprint(params, config)


def test_transformers_reads_the_siglip_that_is_written(tmp_path):
    transformers = pytest.importorskip("transformers")
    params, config = _read("hf_siglip")
    clip.write_checkpoint(tmp_path, params, config, "safetensors")
    read = transformers.SiglipConfig.from_pretrained(tmp_path)
    assert read.vision_config.image_size == config.vision.image_size
    assert read.text_config.projection_size == config.projection_dim


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("vit_gelu", "clip"), ("openai_vit", "clip"), ("worldwide_eos", "metaclip_2"), ("hf_siglip", "siglip"),
        ("hf_siglip2_naflex", "siglip2"), ("rn_quickgelu", "jaxzs_clip"), ("vit_customtext_bias", "jaxzs_clip"),
    ],
)  # fmt: skip
def test_what_transformers_computes_alike_is_written_under_its_name(name, kind, tmp_path):
    """A CLIP of OpenAI's or open_clip's was written as a kind that no version of transformers knows; NaFlex too."""
    params, config = _read(name)
    clip.write_checkpoint(tmp_path, params, config, "safetensors")
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == kind
    assert {written[f"{tower}_config"]["model_type"] for tower in ("text", "vision")} == {
        f"{kind}_text_model", f"{kind}_vision_model"
    }  # fmt: skip
    if kind == "clip":  # its rule for this end token is the highest id
        assert written["text_config"]["eos_token_id"] == 2
    if kind == "siglip2":
        assert written["vision_config"]["num_patches"] == config.vision.num_patches
    assert read_config(tmp_path) == config


@pytest.mark.parametrize("name", ["hf_siglip", "hf_siglip2_naflex"])
@pytest.mark.parametrize("tower", ["text", "vision"])
def test_a_siglip_of_one_tower(name, tower, tmp_path):
    """Of any width: only 768, the width of a tower that is not there, was read."""
    params, config = _read(name)
    clip.write_checkpoint(tmp_path, params, config, "safetensors")
    values = json.loads((tmp_path / "config.json").read_text())[f"{tower}_config"]
    values.pop("projection_dim", None)  # a file of SigLIP has none
    (tmp_path / "config.json").write_text(json.dumps(values))
    alone, read = clip.read_checkpoint(tmp_path, towers=(tower,))
    assert getattr(read, tower) == getattr(config, tower)
    assert read.projection_dim == config.projection_dim
    chex.assert_trees_all_equal(alone, {key: leaf for key, leaf in params.items() if key.startswith(tower)})


# --- what is refused, by name --------------------------------------------------------------------------------------


def _open_clip_folder(folder: Path, vision: dict, text: dict | None = None, **top) -> Path:
    values = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text or {}, **top}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": values}))
    shutil.copy(GOLDEN / "vit_gelu" / "open_clip_model.safetensors", folder)
    return folder


@pytest.mark.parametrize(
    ("vision", "text", "top", "named"),
    [
        ({"attentional_pool": True}, {}, {}, "CoCa"),
        ({}, {}, {"multimodal_cfg": {}}, "CoCa"),
        ({}, {"embed_cls": True}, {}, "CoCa"),
        ({"timm_model_name": "convnext_base"}, {}, {}, "convnext_base"),
        ({"timm_model_name": "eva02_base_patch16_clip_224"}, {}, {}, "eva02_base"),
        ({"timm_model_name": "fastvit_mci0"}, {}, {}, "fastvit_mci0"),
        ({}, {"hf_model_name": "roberta-base"}, {}, "roberta-base"),
        ({"ls_init_value": 1e-4}, {}, {}, "layer scale"),
        ({"qk_norm": True}, {}, {}, "blocks have qk_norm"),
        ({}, {"scale_fc": True, "scale_heads": True}, {}, "blocks have scale_heads, scale_fc"),
        ({"image_size": [224, 336]}, {}, {}, "not square"),
        ({"pool_type": "last"}, {}, {}, "image pooling is 'last'"),
        ({}, {"pool_type": "first"}, {}, "text pooling is 'first'"),
        ({"layers": "12"}, {}, {}, "vision_cfg.layers is '12'"),
        ({"width": -1}, {}, {}, "hidden_size is -1"),
        ({"head_width": 0}, {}, {}, "num_attention_heads"),
    ],
)
def test_architectures_that_are_not_here_are_named(vision, text, top, named, tmp_path):
    folder = _open_clip_folder(tmp_path, vision, text, **top)
    with pytest.raises(ConfigError, match=named) as caught:
        clip.read_checkpoint(folder)
    assert "open_clip_config.json" in str(caught.value)


def test_a_misfit_of_an_open_clip_file_is_one_error(tmp_path):
    """The same audit for every layout: what is missing, of wrong shape and unexpected, in stored names."""
    values = json.loads((GOLDEN / "vit_gelu" / "open_clip_config.json").read_text())["model_cfg"]
    folder = _open_clip_folder(tmp_path, {**values["vision_cfg"], "layers": 1, "patch_size": 4}, values["text_cfg"])
    with pytest.raises(CheckpointError) as caught:
        clip.read_checkpoint(folder)
    message = str(caught.value)
    assert "wrong shape  visual.conv1.weight is (32, 3, 8, 8), expected (32, 3, 4, 4)" in message
    assert "unexpected   visual.transformer.resblocks.1.attn.in_proj_weight (96, 32)" in message
    assert "missing" in message


def test_timm_folders_and_single_files(tmp_path):
    """timm's config.json and image tower beside are not taken; a .pt or .npz alone in a folder is."""
    assert (GOLDEN / "rn_quickgelu" / "config.json").is_file()
    assert isinstance(_read("rn_quickgelu")[1].vision, clip.ResNetConfig)
    for name, file in (("openai_vit", "model.pt"), ("openclip_siglip", "big_vision.npz")):
        (tmp_path / name).mkdir()
        shutil.copy(GOLDEN / name / file, tmp_path / name / f"other{Path(file).suffix}")
        params, _ = clip.read_checkpoint(tmp_path / name)
        assert "vision_model" in params
    assert towers_of(GOLDEN / "vit_gelu") == ("text", "vision")


def test_blocks_stacked_by_a_scan(tmp_path):
    """big_vision's larger models are trained in a scan over the layers, and stored so."""
    with np.load(GOLDEN / "openclip_siglip" / "big_vision.npz") as file:
        stored = dict(file)
    stacked = {name: leaf for name, leaf in stored.items() if "encoderblock_" not in name}
    for name in stored:
        if "encoderblock_0" in name:
            layers = [stored[name.replace("block_0", f"block_{i}")] for i in (0, 1)]
            stacked[name.replace("encoderblock_0", "encoderblock")] = np.stack(layers)
    np.savez(tmp_path / "scanned.npz", **stacked)
    params, config = clip.read_checkpoint(tmp_path / "scanned.npz")
    chex.assert_trees_all_equal(params, _read("openclip_siglip (big_vision)")[0])
    assert config.vision.hidden_act == "gelu_pytorch_tanh"  # no configuration beside it says otherwise


def test_a_projection_at_null_is_a_projection(tmp_path):
    """In open_clip only "none" leaves it out."""
    values = json.loads((GOLDEN / "vit_gelu" / "open_clip_config.json").read_text())["model_cfg"]
    text = values["text_cfg"] | {"proj_type": None}
    folder = _open_clip_folder(tmp_path, values["vision_cfg"], text, embed_dim=values["embed_dim"])
    assert read_config(folder) == read_config(GOLDEN / "vit_gelu")


def test_towers_of_open_clip_alone():
    params, _ = clip.read_checkpoint(GOLDEN / "vit_gelu", towers=("vision",))
    assert sorted(params) == ["vision_model", "visual_projection"]
    chex.assert_trees_all_equal(params["vision_model"], _read("vit_gelu")[0]["vision_model"])


@pytest.mark.slow
def test_random_parameters_of_every_family():
    """Finite, of the tree that is asked for, and encodable."""
    for name in ("rn_quickgelu", "hf_siglip"):
        config = _read(name)[1]
        params = clip.random_params(jax.random.key(0), config)
        assert [path for path, _ in flatten(params)] == [path for path, _ in flatten(clip.abstract_params(config))]
        assert np.isfinite(clip.encode_image(params, images_of(name), config)).all()
