"""Checkpoints cross by file into transformers 5 (torch only, no Flax) and back."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxzs import clip
from jaxzs.clip.weights import fingerprint, read_checkpoint, write_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden/clip"
TRANSFORMERS = "5."
TOLERANCE = 2e-5  # float32 on both sides, features of order 1 to 5

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["quickgelu_legacy_eos", "gelu_first_eos", "odd_sizes"])
def test_written_checkpoints_load_without_a_missing_key(name, dtype, tmp_path):
    import torch
    from transformers import CLIPModel

    params, config = read_checkpoint(GOLDEN / name, dtype=jnp.dtype(dtype))
    write_checkpoint(tmp_path, params, config, format="safetensors")
    model, info = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == getattr(torch, dtype)

    texts = np.load(GOLDEN / name / "ref_text.npz")
    pixels = np.load(GOLDEN / name / "ref_image.npz")["pixel_values_nchw"]
    ids, mask = texts["hole_mask/input_ids"], texts["hole_mask/attention_mask"]
    model = model.float().eval()
    with torch.no_grad():
        image = model.get_image_features(torch.from_numpy(pixels)).pooler_output
        text = model.get_text_features(torch.from_numpy(ids).long(), torch.from_numpy(mask).long()).pooler_output
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    with jax.default_matmul_precision("highest"):
        our_image = clip.encode_image(params, pixels.transpose(0, 2, 3, 1), config)
        our_text = clip.encode_text(params, ids, config, mask)
    np.testing.assert_allclose(our_image, image.numpy(), rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(our_text, text.numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "80KB"}])
def test_what_transformers_saves_is_read(options, tmp_path):
    from transformers import CLIPModel

    source = GOLDEN / "variants/safetensors_torch"
    CLIPModel.from_pretrained(source).save_pretrained(tmp_path, **options)
    assert fingerprint(*read_checkpoint(tmp_path)) == fingerprint(*read_checkpoint(source))


@pytest.mark.parametrize("original_names", [True, False])
@pytest.mark.parametrize("tower", ["vision", "text"])
def test_towers_saved_alone_are_read(tower, original_names, tmp_path):
    import transformers

    source = GOLDEN / "variants/safetensors_torch"
    full, _ = read_checkpoint(source)
    kind = getattr(transformers, f"CLIP{tower.capitalize()}ModelWithProjection")
    kind.from_pretrained(source).save_pretrained(tmp_path, save_original_format=original_names)
    params, _ = read_checkpoint(tmp_path, towers=(tower,))
    jax.tree.map(np.testing.assert_array_equal, params, {name: full[name] for name in params})


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_what_a_bare_tower_lacks_is_named(tower, tmp_path):
    """CLIPVisionModel has no projection; without the tower's prefix its names differ from everybody else's."""
    import transformers

    from jaxzs.errors import CheckpointError

    kind = getattr(transformers, f"CLIP{tower.capitalize()}Model")
    bare = kind.from_pretrained(GOLDEN / "variants/safetensors_torch")
    bare.save_pretrained(tmp_path, save_original_format=False)
    projection = {"vision": "visual_projection", "text": "text_projection"}[tower]
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path, towers=(tower,))
    assert "1 missing, 0 of wrong shape or dtype, 0 unexpected" in str(caught.value)
    assert f"missing      {projection}.weight" in str(caught.value)
