"""Class names and templates: exact content, attachment by label name and never by index."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pytest

from jaxzs.data.datasets import (
    dataset_info,
    dataset_names,
    seen_unseen_split,
    template_set,
    template_set_names,
    template_source,
)
from jaxzs.errors import DataError, LabelError

# Number of classes, of templates, and SHA-256 of all lists. Compared with the source files when they were taken over:
# openai/CLIP data/prompts.md character by character at seven offsets through its 69,893 characters.
PINNED = {
    "ade20k": (150, 80, "67402a66ec7c47816450643d8365726227882d64f0b6934fca192a5796fd81c6"),
    "caltech101": (102, 34, "4eb84d7bc66c9ae2d683019f7e76ce6d20f3a565b83bad0da78a18aeff8b6bb6"),
    "cifar10": (10, 18, "b892b1e555aeae03f1a61eaf50193c0f59b812ef4437741ee6f3a7bb7beb5bd0"),
    "cifar100": (100, 18, "833dff85f87388baebe5202886420e8e8fa3bd9e7a1d40fb1cf140b409935612"),
    "cityscapes": (19, 80, "1bc695816096cd05d7a14b422c71b0a38f675f4c8f9dd4bfa8d94413454828c3"),
    "coco2014": (80, 85, "7c9efe16873bc7c61b411db43d4a99612331e3bdfe3b08e14ed3f48a4282e725"),
    "coco2017": (80, 85, "7c9efe16873bc7c61b411db43d4a99612331e3bdfe3b08e14ed3f48a4282e725"),
    "coco_object": (80, 80, "f603fbab5fa23706efaeed52637cbf4dfe67084eee9f496d1a8178f627c2e24d"),
    "coco_stuff": (171, 85, "1e9a3a461d3fa2f6a50c37108d970bf473fd86958918f76cdce98026eddf6335"),
    "coco_stuff27": (27, 85, "dcbe9c60f656551cf9f85f5adb98a03c196d4fb06d788240c8eff2aa7ea51100"),
    "dtd": (47, 8, "8dddb9beee8356137081e5b61751e2cd18a89f35890587d3159ef61dcf9bb3e2"),
    "eurosat": (10, 3, "53f99a8ee306bf8b4177b8787f97ae957b95b1961648f3439b33c47dadea4ade"),
    "fgvc_aircraft": (100, 2, "e946ca56dd045bb78a954b2a2f92a924ff6abb7d6e110536783d5e5d05845372"),
    "flowers102": (102, 1, "76044d4957b104f8538766876bc79de43c1a5637ccead86de7138c3ec841ec01"),
    "food101": (101, 1, "606a2bada2c23cc141f5079fe6bdd9a9de6a0652b1c29620b75c153e8dbb43f9"),
    "imagenet": (1000, 7, "ec18e58b739124a96cdfe2fd5991eeff1f284a613f5d16f3087499ab99082cd8"),
    "mnist": (10, 1, "cc4692345cb94b2b4e0cfc3952d6ea00fb29ce1696b013cb5edf992e90a02b22"),
    "oxford_pets": (37, 1, "e1397da09f3d96f475a4cba987b99e9d02c3052a0df0216e7e7de35205f0f0a5"),
    "pascal_context": (59, 80, "17c41925d423e275b7f693eb5a857690396e36f3f2cf8cd94aad1bffe6c81a1d"),
    "resisc45": (45, 18, "6cc967bfd3385e5a27cd852f83594ba17b5d1d565478dcbf67c75262c26786f3"),
    "stanford_cars": (196, 8, "0e36b529d5365e5b10f819ca5c2b72a5114deeb601073593d4f8121fd99a13d2"),
    "sun397": (397, 2, "472cecee1a08900caf36e5241d566202b595bc6fc87806d0c40dcaa09f83c404"),
    "ucf101": (101, 48, "9059f50b59c3cf60480355f5ae64e9103b0e32112234104fc9c8340509cda398"),
    "voc2007": (20, 85, "8e4e359fc5a3b8ba84d1a0a712d071504c4720a3ae27c5e93cc20ce167f5a0a3"),
    "voc2012": (20, 85, "8e4e359fc5a3b8ba84d1a0a712d071504c4720a3ae27c5e93cc20ce167f5a0a3"),
    "voc21": (20, 80, "43c788b6a3ea1fcca3c3f42aec53c446785ca0327a9e6787863faf26177fa575"),
}


def test_every_data_set_is_pinned():
    assert dataset_names() == sorted(PINNED)


@pytest.mark.parametrize("name", sorted(PINNED))
def test_lists_have_not_changed(name):
    info = dataset_info(name)
    assert (info.num_classes, len(info.templates), info.digest) == PINNED[name]
    assert len(set(info.templates)) == len(info.templates)


@pytest.mark.parametrize("name", sorted(PINNED))
def test_every_list_names_its_source(name):
    info = dataset_info(name)
    assert {"class_names", "templates"} <= set(info.source)
    for of, source in info.source.items():
        assert source["path"], of
        if "repository" in source:
            assert len(source["commit"]) == 40, of
        else:
            assert any(character.isdigit() for character in source["package"]), of


def test_template_sets():
    counts = {name: len(template_set(name)) for name in template_set_names()}
    assert counts == {"simple": 1, "imagenet7": 7, "imagenet80": 80, "tagclip85": 85}
    assert set(template_set("imagenet7")) < set(template_set("imagenet80"))
    assert set(template_set("imagenet80")) < set(template_set("tagclip85"))
    assert all(template_source(name)["path"] for name in template_set_names())
    with pytest.raises(LabelError, match="imagenet7"):
        template_set("imagenet_7")


@pytest.mark.parametrize("name", sorted(PINNED))
def test_permuted_labels_get_their_own_names(name):
    """The classic silent loss: the data numbers its classes otherwise than the list does."""
    info = dataset_info(name)
    order = np.random.default_rng(0).permutation(info.num_classes)
    names = info.names_for([info.labels[i] for i in order])
    assert names == tuple(info.class_names[i] for i in order)


def test_spellings_of_labels():
    pets = dataset_info("oxford_pets")
    assert pets.names_for(["Egyptian_Mau", "american-bulldog", "PUG"]) == ("Egyptian Mau", "american bulldog", "pug")
    assert dataset_info("voc2012").names_for(["potted plant", "tv/monitor"]) == ("pottedplant", "tvmonitor")
    assert dataset_info("eurosat").names_for(["SeaLake", "AnnualCrop"]) == ("lake or sea", "annual crop land")
    assert dataset_info("coco2017").names_for(["airplane", "dining table"]) == ("aeroplane", "diningtable")


def test_imagenet_is_attached_by_synset():
    """Two pairs of ImageNet classes share a name in the published list; synsets tell them apart."""
    imagenet = dataset_info("imagenet")
    assert imagenet.labels[0] == "n01440764"
    assert imagenet.class_names[0] == "tench"
    assert imagenet.names_for(["n02123045", "n01443537"]) == ("tabby cat", "goldfish")
    assert imagenet.names_for(["n03773504", "n04008634"]) == ("missile", "missile")
    assert imagenet.names_for(["tench"]) == ("tench",)
    with pytest.raises(LabelError, match="missile"):
        imagenet.names_for(["missile"])


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("sun397", "image_classification/sun397_labels.txt"),
        ("food101", "image_classification/food-101_classes.txt"),
        ("ucf101", "video/ucf101_labels.txt"),
        ("caltech101", "image_classification/caltech101_labels.txt"),
        ("imagenet", "datasets/imagenet2012/labels.txt"),
    ],
)
def test_labels_of_tensorflow_datasets_are_known(name, path):
    """An independent list of the same labels, in another order."""
    tfds = pytest.importorskip("tensorflow_datasets")
    file = Path(tfds.__file__).parent / path
    if not file.is_file():
        pytest.skip(f"this release of tensorflow-datasets has no {path}")
    labels = file.read_text().split()
    assert len(dataset_info(name).names_for(labels)) == PINNED[name][0]


def test_labels_of_another_data_set_are_refused():
    with pytest.raises(LabelError, match=r"2 of 2 labels.*'cat'"):
        dataset_info("mnist").names_for(["cat", "dog"])
    with pytest.raises(LabelError, match="second time"):
        dataset_info("mnist").names_for(["1", "1"])
    with pytest.raises(LabelError, match="cifar100"):
        dataset_info("cifar1000")


def test_official_numbers():
    """COCO numbers its 80 classes 1 to 90 with gaps, COCO-Stuff its 171 within 0 to 181."""
    coco, stuff = dataset_info("coco2017"), dataset_info("coco_stuff")
    assert coco.label_ids is not None
    assert stuff.label_ids is not None
    numbers = dict(zip(coco.class_names, coco.label_ids, strict=True))
    assert (numbers["person"], numbers["stop sign"], numbers["toothbrush"]) == (1, 13, 90)
    assert dict(zip(stuff.class_names, stuff.label_ids, strict=True))["wood"] == 181
    groups = dataset_info("coco_stuff27").groups
    assert groups is not None
    assert sorted(sum(groups, ())) == list(range(182))


def test_other_published_names():
    voc = dataset_info("voc2012")
    renamed = voc.renamed("clip_es")
    assert renamed.class_names[14] == "person with clothes,people,human"
    assert renamed.labels == voc.labels
    assert len(voc.background_names) == 25
    assert len(dataset_info("coco2014").background_names) == 23
    with pytest.raises(LabelError, match="clip_es"):
        voc.renamed("clipes")


def test_digest_depends_on_names_and_their_order():
    info = dataset_info("cifar10")
    turned = dataclasses.replace(info, class_names=info.class_names[::-1])
    assert turned.digest != info.digest


def test_seen_unseen_split_of_the_paper():
    """First names of split 500, and of split 0, in the released data/data_splits/RESICS45.json."""
    names = dataset_info("resisc45").class_names
    seen, unseen = seen_unseen_split(45, seed=500)
    assert [names[i] for i in seen[:4]] == ["beach", "palace", "roundabout", "railway station"]
    assert (len(seen), len(unseen)) == (27, 18)
    assert sorted([*seen, *unseen]) == list(range(45))
    seen, _ = seen_unseen_split(45, seed=0)
    assert [names[i] for i in seen[:3]] == ["railway station", "snowberg", "palace"]
    with pytest.raises(LabelError, match="two classes"):
        seen_unseen_split(1, seed=0)


def test_a_data_set_of_the_user(tmp_path):
    path = tmp_path / "birds.json"
    path.write_text(json.dumps({"class_names": ["blue jay", "crow"], "templates": "imagenet7"}))
    info = dataset_info(path)
    assert (info.name, info.class_names) == ("birds", ("blue jay", "crow"))
    assert info.templates == template_set("imagenet7")
    assert info.names_for(["Crow", "Blue_Jay"]) == ("crow", "blue jay")
    assert dataset_info(str(path)) == info


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object"),
        ('{"class_names": []}', "non-empty"),
        ('{"class_names": ["a", 3]}', r"class_names\[1\] is 3, expected a text"),
        ('{"class_names": ["a"], "templates": ["a photo"]}', "need one"),
        ('{"class_names": ["a", "b"], "labels": ["x"]}', "1 labels for 2"),
        ('{"class_names": ["a", "A"]}', "more than once"),
        ('{"class_names": ["a"], "aliases": {"x": "y"}}', "aliases"),
        ('{"class_name": ["a"]}', "has .class_name., expected only"),
    ],
)
def test_unfit_files_are_named(tmp_path, content, message):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as error:
        dataset_info(path)
    assert "mine.json" in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="absent"):
        dataset_info(tmp_path / "absent.json")


@pytest.mark.parametrize(
    "key", ["background_names", "label_ids", "groups", "aliases", "variants", "source", "name", "multi_label"]
)
@pytest.mark.parametrize("value", [5, "text", [None], [["a"]], {"a": 1}, {"a": {"b": []}}])
def test_fields_of_the_wrong_type_are_named(tmp_path, key, value):
    if (key, value) == ("name", "text"):
        return
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"class_names": ["a"], key: value}))
    with pytest.raises(DataError, match=key):
        dataset_info(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"class_names": ["a", "b"], "label_ids": [3, 3]}', "label_ids occur more than once: 3"),
        ('{"class_names": ["a", "b"], "groups": [[1, 2], [2]]}', "groups occur more than once: 2"),
        ('{"class_names": ["a"], "background_names": [" "]}', "background_names holds ' '"),
        ('{"class_names": ["\\ud800"]}', "no valid text"),
        ('{"class_names": ["a"], "class_names": ["b"]}', "'class_names' is there twice"),
        ('{"class_names": ["a"], "templates": "imagenet99"}', "no set of templates"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_unfit_contents_are_named(tmp_path, content, message):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises((DataError, LabelError), match=message):
        dataset_info(path)


@pytest.mark.parametrize("name", sorted(PINNED))
def test_names_for_reports_are_distinct(name):
    info = dataset_info(name)
    assert len(set(info.distinct_names)) == info.num_classes


@pytest.mark.slow
def test_many_classes_take_no_long_time(tmp_path):
    path = tmp_path / "mine.json"
    names = [f"class {number}" for number in range(100_000)]
    path.write_text(json.dumps({"class_names": names}))
    started = time.perf_counter()
    info = dataset_info(path)
    assert info.names_for(names[::-1]) == tuple(names[::-1])
    assert time.perf_counter() - started < 60  # 1.5 s; quadratic work was minutes
