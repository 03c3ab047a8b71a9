"""Images to NaFlex patches, against transformers' Siglip2ImageProcessor."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxzs.clip.config import VisionConfig
from jaxzs.clip.naflex_images import PatchPreprocessor, grid_within
from jaxzs.errors import ConfigError, ImageError

TOWER = VisionConfig(image_size=32, patch_size=8)
FILE = {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 8, "max_num_patches": 16, "do_convert_rgb": None}


def written(folder: Path, **changed: Any) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps({**FILE, **changed}))
    return folder


def test_patches_of_photos_equal_those_of_transformers(shared: Path) -> None:
    golden = shared / "golden" / "families" / "siglip" / "hf_siglip2_naflex"
    preprocess = PatchPreprocessor.for_tower(golden, TOWER)
    photos = json.loads((golden / "case.json").read_text())["photos"]
    made = preprocess([Image.open(shared / "data" / name) for name in photos])
    with np.load(golden / "ref.npz") as stored:
        np.testing.assert_array_equal(made.shapes, stored["spatial_shapes"])
        np.testing.assert_array_equal(made.mask, stored["pixel_attention_mask"].astype(bool))
        np.testing.assert_array_equal(made.values, stored["patches"])


@given(height=st.integers(1, 300), width=st.integers(1, 300), most=st.sampled_from([4, 16, 100]))
def test_the_grid_is_that_of_transformers(height: int, width: int, most: int) -> None:
    module = pytest.importorskip("transformers.models.siglip2.image_processing_pil_siglip2", reason="transformers 5")
    expected = module.get_image_size_for_max_num_patches(height, width, 8, most)
    rows, columns = grid_within(height, width, 8, most)
    assert (rows * 8, columns * 8) == expected
    assert rows * columns <= most or 1 in (rows, columns)


def test_images_that_are_not_to_be_resized_are_refused(tmp_path: Path) -> None:
    """They were resized nevertheless, to other pixels than those of transformers."""
    with pytest.raises(ConfigError, match="do_resize is false"):
        PatchPreprocessor.for_tower(written(tmp_path, do_resize=False), TOWER)


def test_every_patch_lies_in_its_place(tmp_path: Path) -> None:
    preprocess = PatchPreprocessor.for_tower(written(tmp_path), TOWER)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)  # 4 x 4 patches: not resized
    made = preprocess([image, image[:16]])
    assert made.shapes[0].tolist() == [4, 4]
    assert made.mask.sum(1).tolist() == made.shapes.prod(1).tolist()
    assert made.mask[0].all()
    assert not made.values[~made.mask].any()
    levels = (image / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    # The levels are rounded in another order: two steps of float32 at 1.
    np.testing.assert_allclose(made.values[0, 6], levels[8:16, 16:24].reshape(-1), rtol=0, atol=2.4e-7)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    made = PatchPreprocessor.for_tower(written(tmp_path, image_mean=[0.4, 0.5, 0.6], resample=3), TOWER)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(made.to_json()))
    again = PatchPreprocessor.for_tower(tmp_path, TOWER)
    assert again == made
    assert again.fingerprint == made.fingerprint != PatchPreprocessor().fingerprint


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"patch_size": 16}, "makes patches of 16 pixels, .* takes 8"),
        ({"patch_size": "8"}, "patch_size is '8', expected a whole number"),
        ({"max_num_patches": 0}, "out of range"),
        ({"max_num_patches": 10**9}, "out of range"),
        ({"image_std": 0}, "positive"),
        ({"resample": "x"}, "resample is 'x'"),
    ],
)
def test_unfit_files_are_named(changed: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"preprocessor_config\.json: .*{message}"):
        PatchPreprocessor.for_tower(written(tmp_path, **changed), TOWER)


def test_absent_files_and_unfit_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither"):
        PatchPreprocessor.for_tower(tmp_path, TOWER)
    preprocess = PatchPreprocessor()
    with pytest.raises(ImageError, match="no images"):
        preprocess([])
    with pytest.raises(ImageError, match="too long and thin"):
        dataclasses.replace(preprocess, max_num_patches=20_000)(np.zeros((1, 20_000, 3), np.uint8))
