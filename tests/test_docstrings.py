"""Every public name has an example in its docstring, and every example gives the output that it shows.

Examples see what `import jax, numpy as np, jaxzs`, `import jax.numpy as jnp` and `from jaxzs import clip, data, ...`
bind; those of public names see nothing else of the module they stand in, so that they can be copied as they are. They
run in a folder of their own, with `photos/`: ten real scanned digits of each of the classes one, two and zero.
"""

from __future__ import annotations

import doctest
import importlib
import io
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxzs

PACKAGES = (
    "adapt",
    "classification",
    "clip",
    "data",
    "features",
    "flax",
    "metrics",
    "parallel",
    "patch",
    "prompt",
    "proxy",
    "report",
    "zeroshot",
)
# Types that are only ever returned: the example is that of the function that returns them.
RESULTS = {
    "classification.Classification": "classification.classify_features",
    "clip.TowerOutput": "clip.vision_tower",
    "data.Batch": "data.batches",
    "data.FolderSource": "data.open_folder",
    "data.Found": "data.search_images",
    "data.Pairing": "data.match_names",
    "features.Chunk": "features.FeatureStore",
    "flax.FlaxBaseModelOutputWithPooling": "flax.FlaxCLIPVisionModel",
    "flax.FlaxCLIPOutput": "flax.FlaxCLIPModel",
    "flax.FlaxCLIPTextModelOutput": "flax.FlaxCLIPTextModelWithProjection",
    "patch.CamOutput": "patch.class_activation_maps",
    "patch.Candidates": "patch.find_candidates",
    "patch.DenseMask": "patch.segment_dense",
    "patch.Encoded": "patch.encoded_patches",
    "patch.ImageMask": "patch.segment_images",
    "patch.ImageTags": "patch.tag_images",
    "patch.LocalOutput": "patch.local_tower",
    "patch.Refined": "patch.dual_masking",
    "patch.Segmentation": "patch.segment",
    "patch.Tags": "patch.tag",
    "prompt.Evaluation": "prompt.evaluate",
    "prompt.Fit": "prompt.fit",
    "prompt.Frozen": "prompt.freeze",
    "prompt.Progress": "prompt.fit",
    "prompt.PromptedEncoders": "prompt.prompted_encoders",
    "prompt.Record": "prompt.fit",
    "report.RobinHood": "report.robin_hood",
    "prompt.Split": "prompt.ul_split",
    "prompt.Training": "prompt.train",
    "proxy.ProxyResult": "proxy.learn_proxies",
    "report.Record": "report.read_record",
    "report.Written": "report.write_page",
}
# Names without an example, and why.
WITHOUT = {
    "data.open_tfds": "needs a data set that TensorFlow has prepared",
    "prompt.DivergedError": "an error, raised when a training fails",
    "prompt.Modality": "a protocol, shown by TextPrompt, VisualPrompt and JointPrompt",
}
# Examples that compile for seconds: run with the slow tests.
_SLOW = """
    adapt.calibration.calibrate adapt.choice.Adapted adapt.choice.choose adapt.choice.probabilities
    adapt.online.onzeta adapt.online.stata adapt.online.stream adapt.online.tda adapt.vision.proxies
    classification.classify classification.encode_source clip.params.random_params flax.models.FlaxCLIPModel
    patch.cam.class_activation_maps patch.crf.dense_crf patch.images.tag_images patch.learned.encoded_patches
    patch.learned.learn_patch_classifier patch.learned.tag_images_with patch.masks.segment_images
    patch.reidentify.reidentify patch.segmentation.segment patch.tags.tag prompt.inference.image_logits
    prompt.inference.prompted_encoders prompt.modality.class_logits prompt.scoring.score prompt.strategies.fit
    proxy.fit.fit proxy.fit.learn_proxies proxy.labels.choose_gamma proxy.streaming.fit_chunks
    patch.masks.score_maps prompt.training.train flax.models.FlaxCLIPTextModel
    report.robin_hood.plot_robin_hood zeroshot.text_proxies
"""
SLOW = frozenset(_SLOW.split())
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def public_names(package: str) -> dict[str, Any]:
    """What a package offers: its `__all__`, or what a module defines without a leading underscore."""
    module = importlib.import_module(f"jaxzs.{package}")
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return {name: getattr(module, name) for name in names}


def _modules() -> Iterator[Any]:
    yield jaxzs
    for found in pkgutil.walk_packages(jaxzs.__path__, "jaxzs."):
        if not found.name.endswith("__main__"):  # importing it runs the command
            yield importlib.import_module(found.name)


def _examples() -> Iterator[Any]:
    finder = doctest.DocTestFinder()
    public = {_home(value) for package in PACKAGES for value in public_names(package).values()}
    for module in _modules():
        for test in finder.find(module):
            name = test.name.removeprefix(f"{module.__name__}.").split(".")[0]
            if f"{module.__name__}.{name}" in public:
                test.globs = {}
            if any(doctest.SKIP not in one.options for one in test.examples):
                slow = test.name.removeprefix("jaxzs.") in SLOW
                yield pytest.param(test, id=test.name, marks=[pytest.mark.slow] if slow else [])


def _home(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"


@pytest.fixture(scope="module")
def demo() -> Any:
    return jaxzs.load("demo")


@pytest.fixture
def namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digit_photos: Path, demo: Any) -> dict[str, Any]:
    """The names that examples may use; they run in a folder that they may write to, and share one demo model."""
    (tmp_path / "photos").symlink_to(digit_photos, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    load = jaxzs.clip.load
    monkeypatch.setattr(jaxzs.clip, "load", lambda name="demo": demo if name == "demo" else load(name))
    packages = {name: importlib.import_module(f"jaxzs.{name}") for name in PACKAGES}
    return {"jax": jax, "jnp": jnp, "np": np, "jaxzs": jaxzs, **packages}


@pytest.mark.parametrize("example", list(_examples()))
def test_example(example: doctest.DocTest, namespace: dict[str, Any]) -> None:
    example.globs = {**example.globs, **namespace}
    told = io.StringIO()
    result = doctest.DocTestRunner(verbose=False, optionflags=OPTIONS).run(example, out=told.write)
    assert result.failed == 0, told.getvalue()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_an_example(package: str) -> None:
    missing = []
    for name, value in public_names(package).items():
        path = f"{package}.{name}"
        if not callable(value) or path in WITHOUT:  # a constant has no docstring
            continue
        if path in RESULTS:
            owner, _, function = RESULTS[path].partition(".")
            value = public_names(owner)[function]
        examples = doctest.DocTestParser().get_examples(value.__doc__ or "")
        if all(doctest.SKIP in example.options for example in examples):
            missing.append(path)
    assert not missing, f"no example in the docstring of {', '.join(missing)}"


def test_exceptions_are_public_names() -> None:
    for path in (*RESULTS, *WITHOUT):
        package, _, name = path.partition(".")
        assert name in public_names(package), path
