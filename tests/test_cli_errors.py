"""Every command with many kinds of wrong input: what it says, its exit code, and that it leaves no files behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import jaxzs
from jaxzs import clip, prompt
from jaxzs.cli import COMMANDS, main

DEMO = Path(jaxzs.__file__).parent / "assets" / "demo"
NAMES = "--labels circle,square"
FEW = "--labels circle,square --by-position --iterations 2"

# What any command that takes images must refuse: arguments after the command, and parts of the message.
IMAGES = [("nowhere", ["nowhere", "folder"]), ("empty", ["no images in empty", ".png"])]
MODEL = [
    ("--model ./nowhere", ["./nowhere", "no such file or folder", "Give the path"]),
    ("--model unweighted", ["unweighted", "no weights", "model.safetensors", "holds config.json"]),
    ("--model cut", ["cut/flax_model.msgpack", "truncated", "5000", "Download it again"]),
    ("--model other", ["other/config.json", "model_type", "expected 'clip'"]),
]
CLASSES = [
    ("--labels circle,circle", ["--labels 'circle,circle'", "more than once: circle"]),
    ("--labels circle,,square", ["--labels", "number 1 is empty"]),
    ("--labels circle,zebra", ["never seen", "zebra", "--force", "use a real CLIP"]),
    ("--labels-file none.txt", ["none.txt", "No such file", "one class name a line"]),
    ("--labels-file wrong.json", ["wrong.json", "expected a JSON list", '["cat", "dog"]']),
    ("--labels-file cut.json", ["cut.json", "not valid JSON"]),
    ("--labels-file blank.txt", ["blank.txt", "no class names", "one a line"]),
    ("--labels-file table/labels.csv", ["labels.csv is a table", "one class name a line"]),
    ("--labels-file twice.txt", ["twice.txt", "more than once: circle"]),
    ("--labels-file photos/dark/0.png", ["0.png", "not a text file"]),
    ("--dataset voc2013", ["'voc2013'", "voc2012", "write a JSON file"]),
    (f"{NAMES} --dataset mnist", ["--labels and --dataset", "only one of"]),
]
OPTIONS = [
    ("--batch-size 0", ["--batch-size is 0", "at least 1"]),
    ("--batch-size many", ["--batch-size", "'many'", "INT"]),
    ("--modle demo", ["--modle", "Perhaps you meant", "--model"]),
]


def after(before: str, cases: list, more: str = "") -> list:
    return [(" ".join(filter(None, (before, given, more))), parts) for given, parts in cases]


def before(cases: list, more: str) -> list:
    return [(f"{given} {more}", parts) for given, parts in cases]


CASES = {
    "classify": [
        *before(IMAGES, NAMES),
        *after("photos", MODEL, NAMES),
        *after("photos", CLASSES),
        *after("photos", OPTIONS, NAMES),
        (NAMES, ["no images given", "name a folder"]),
        (f"nowhere/*.png {NAMES}", ["no images in nowhere/*.png"]),
        (f"photos/dark {NAMES} --method best", ["'best'", "--method", "zero-shot"]),
        ("photos/dark", ["what are the classes", "--labels a,b,c"]),
        ("photos --labels dark,heart --force", ["1 of 2 labels", "'bright', 'dark'", "FOLDER/*/*.jpg"]),
        ("photos --labels circle", ["one class only", "at least two"]),
        (f"note.txt {NAMES}", ["none of the 1 images", "note.txt", "JPEG, PNG"]),
        (f"damaged {NAMES}", ["none of the 2 images", "damaged/cut.png", "damaged"]),
        (f"photos {NAMES} --gamma 2", ["--gamma is '2'", "0 to 1, or auto"]),
        (f"photos {NAMES} --gamma much", ["--gamma is 'much'", "0 to 1, or auto"]),
        (f"photos {NAMES} --top 0", ["--top is 0", "at least 1"]),
        (f"photos {NAMES} --gamma 0 --method gda", ["--gamma is of --method proxy, not of gda"]),
        (f"photos {NAMES} --seed 1.5", ["--seed", "'1.5'", "INT"]),
        (f"photos {NAMES} --seed {2**70}", [f"--seed is {2**70}", "0 to 4294967295"]),
        (f"photos {NAMES} --templates hole", ["template 'hole'", "'{}' exactly once"]),
        (f"photos {NAMES} --out x.txt", ["--out x.txt", ".csv or .json"]),
        (f"photos {NAMES} --out photos", ["--out photos is a folder", "photos/results.csv"]),
        (f"photos {NAMES} --out note.txt/x.csv", ["note.txt is a file", "name another"]),
        (f"photos {NAMES} --out wrong.csv", ["--out wrong.csv", "would replace wrong.json", "remove"]),
        (f"photos {NAMES} --store note.txt", ["--store note.txt is a file", "name another"]),
        (f"photos {NAMES} --out", ["--out"]),
        (f"photos {NAMES} --prompt none.safetensors", ["none.safetensors", "No such file"]),
        (f"photos {NAMES} --prompt note.txt", ["note.txt", "not a safetensors", "jaxzs tune"]),
        (f"photos {NAMES} --prompt weights.safetensors", ["weights", "no prompt", "jaxzs tune"]),
        (
            f"photos {NAMES} --prompt narrow.safetensors",
            ["narrow.safetensors", "does not fit", "expected", "checkpoint it was tuned with"],
        ),
        (f"photos {NAMES} --prompt p --templates x", ["--prompt replaces --templates", "leave"]),
    ],
    "tag": [
        *before(IMAGES, NAMES),
        *after("photos", MODEL, NAMES),
        *after("photos", CLASSES),
        *after("photos", OPTIONS, NAMES),
        ("photos", ["what may be tagged", "--labels a,b,c"]),
        (NAMES, ["no images given"]),
        (f"damaged {NAMES}", ["none of the 2 images", "damaged/cut.png", "damaged"]),
        (f"photos {NAMES} --threshold 50", ["--threshold is 50.0", "0 to 1"]),
        (f"photos {NAMES} --threshold nan", ["--threshold is nan", "0 to 1"]),
        (f"photos {NAMES} --background circle", ["more than once among classes and background"]),
        (f"photos {NAMES} --background sky,,", ["--background 'sky,,'", "number 1 is empty"]),
        (f"photos {NAMES} --max-patches 2", ["--max-patches is 2", "at least 4"]),
        (f"photos {NAMES} --scales 0", ["--scales", "above 0"]),
        (f"photos {NAMES} --offsets 9", ["--offsets is 9", "1 to 8"]),
        (f"photos {NAMES} --learn --offsets 2", ["--learn", "leave", "--offsets out"]),
        (f"photos {NAMES} --templates hole", ["template 'hole'", "exactly once"]),
        (f"photos {NAMES} --out x.txt", ["--out x.txt", ".csv or .json"]),
        (f"photos {NAMES} --out photos", ["--out photos is a folder"]),
        (f"photos {NAMES} --out wrong.csv", ["--out wrong.csv", "would replace wrong.json"]),
        (f"photos {NAMES} --overlay note.txt", ["--overlay note.txt is a file", "folder"]),
    ],
    "segment": [
        *before(IMAGES, NAMES),
        *after("photos", MODEL, NAMES),
        *after("photos", CLASSES),
        *after("photos", OPTIONS, NAMES),
        ("photos", ["what may be tagged"]),
        (f"photos {NAMES} --out note.txt", ["--out note.txt is a file", "expected a folder"]),
        (f"photos {NAMES} --out note.txt/x", ["note.txt is a file", "name another"]),
        (f"photos {NAMES} --tags none.json", ["none.json", "No such file", "jaxzs tag"]),
        (f"photos {NAMES} --tags note.txt", ["note.txt", "jaxzs tag"]),
        (f"photos {NAMES} --tags wrong.json", ["wrong.json is not a file that", "jaxzs tag"]),
        (f"photos {NAMES} --tags tags.json", ["tags.json has no tags for photos/bright/0.png"]),
        (f"photos {NAMES} --tags cats.json", ["cats.json", "'cat'", "not among --labels"]),
        (f"photos {NAMES} --box-threshold 2", ["--box-threshold is 2.0", "0 to 1"]),
        (f"photos {NAMES} --crf --crf-stride 0", ["--crf-stride is 0", "at least 1"]),
        (f"photos {NAMES} --maps best", ["'best'", "--maps", "cam"]),
        (f"photos {NAMES} --maps dense --offsets 2", ["--maps dense", "leave --offsets out"]),
    ],
    "extract": [
        *IMAGES,
        *after("photos", MODEL),
        *after("photos", OPTIONS),
        ("", ["IMAGES", "A folder"]),
        ("note.txt", ["no images at note.txt", "expected a folder"]),
        ("mixed", ["mixed", "different depths", "class/image", "labels.csv"]),
        ("table", ["table/labels.csv", "found the columns a, b", "--label-column"]),
        ("photos --label-table none.csv", ["none.csv", "No such file"]),
        ("photos --label-table wrong.json", ["wrong.json", "'dark' is not there"]),
        ("photos --split train", ["no split train", "all"]),
        ("photos --split all[:0]", ["no images"]),
        ("tfds:nothing", ["tfds:nothing", "which split", "train[:50%]"]),
        ("photos --out note.txt", ["--out note.txt is a file", "expected a folder"]),
        ("photos --dtype int8", ["'int8'", "--dtype", "float16"]),
        ("photos --threads 0", ["--threads is 0", "at least 1"]),
        ("photos --max-skipped -1", ["--max-skipped is -1", "at least 0"]),
    ],
    "tune": [
        *before(IMAGES, FEW),
        *after("photos", MODEL, FEW),
        *after("photos --by-position", CLASSES),
        *after("photos", OPTIONS, FEW),
        ("", ["IMAGES", "learn from"]),
        ("damaged", ["damaged does not name its classes", "--labels"]),
        (f"damaged {FEW}", ["damaged/cut.png", "needs every image"]),
        ("photos --labels circle,square", ["2 of 2 labels", "'circle', 'square'", "'bright', 'dark'", "--by-position"]),
        ("photos --labels dark,heart", ["1 of 2 labels", "'dark', 'heart'", "'bright', 'dark'", "--by-position"]),
        ("photos --labels circle,square,heart --by-position", ["3 class names for 2 labels", "'bright', 'dark'"]),
        ("photos --test photos --paradigm ssl", ["6 of 6 test images are also among", "--test-split"]),
        ("photos --test-split all", ["photos: every image is a test image", "--split"]),
        ("photos --dataset mnist", ["'bright'", "'mnist'", "jaxzs datasets mnist"]),
        (f"photos {FEW} --k 0", ["--k is 0", "at least 1"]),
        (f"photos {FEW} --seeds 1 1", ["--seeds are (1, 1)", "distinct"]),
        (f"photos {FEW} --seeds 1 {2**70}", [str(2**70), "from 0 to 4294967295"]),
        (f"photos {FEW} --split-seed -1", ["--split-seed is -1", "0 to 4294967295"]),
        (f"photos {FEW} --epochs 0", ["--epochs is 0", "at least 1"]),
        (f"photos {FEW} --learning-rate -1", ["--learning-rate is -1.0", "above 0"]),
        (f"photos {FEW} --template hole", ["template 'hole'", "exactly once"]),
        (f"photos {FEW} --prompt-length 99", ["prompt of 99", "takes 32", "Shorten"]),
        (f"photos {FEW} --iterations 99", ["K = 0", "6 unlabelled", "fewer iterations"]),
        (f"photos {FEW} --paradigm ssl --labels-per-class 9", ["class 0 has 3 images", "9"]),
        (f"photos {FEW} --strategy labelled", ["no labels to train on", "fpl, ifpl or grip"]),
        (f"photos {FEW} --strategy best", ["'best'", "--strategy", "grip"]),
        (f"photos {FEW} --test nowhere", ["no images at nowhere"]),
        (f"photos {FEW} --out x.npz", ["--out x.npz", ".safetensors"]),
        (f"photos {FEW} --out note.txt/x.safetensors", ["note.txt is a file", "name another"]),
        (f"photos {FEW} --out wrong.safetensors", ["would replace wrong.json", "name another"]),
        (f"photos {FEW} --state weights.safetensors", ["weights", "not the state", "remove it"]),
    ],
    "evaluate": [
        ("", ["no data given", "--data NAME=FOLDER"]),
        ("--data photos", ["--data 'photos'", "NAME=PLACE"]),
        ("--data a=nowhere", ["there is no nowhere"]),
        ("--data a=photos --method best", ["--method 'best'", "zero-shot"]),
        ("--data a=photos --seeds 0", ["--seeds is 0", "at least 1"]),
        ("--data a=photos --out note.txt", ["--out note.txt is a file"]),
    ],
    "convert": [
        ("", ["MODEL", "FOLDER"]),
        ("./nowhere out", ["./nowhere", "Give the path"]),
        ("demo out --format best", ["'best'", "--format", "safetensors"]),
    ],
    "demo": [
        ("--out note.txt", ["--out note.txt is a file", "expected a folder"]),
        ("--out note.txt/x", ["note.txt is a file", "name another"]),
        ("photos", ["Unrecognized options: photos"]),
        ("--outt x", ["--outt", "Perhaps you meant", "--out"]),
    ],
    "datasets": [
        ("voc2013", ["'voc2013'", "voc2012", "write a JSON file"]),
        ("none.json", ["none.json", "No such file"]),
        ("wrong.json", ["wrong.json", "has 'dark'", "class_names"]),
        ("cut.json", ["cut.json", "not valid JSON"]),
        ("mnist dtd", ["Unrecognized options: dtd"]),
    ],
    "report": [
        ("", ["no records given", "name .json files"]),
        ("nowhere", ["no such file or folder: nowhere"]),
        ("nowhere/*.json", ["no such file or folder: nowhere/*.json"]),
        ("empty", ["no record of a run among 0 .json files of empty", "Records are"]),
        ("note.txt", ["note.txt is not valid JSON"]),
        ("wrong.json", ["wrong.json is not the record of a run", "lacks command"]),
        ("cut.json", ["cut.json is not valid JSON, or is cut off"]),
        ("later.json", ["later.json is of schema 99", "update jaxzs"]),
        ("good.json --out note.txt", ["--out note.txt is a file", "expected a folder"]),
        ("good.json --outt x", ["--outt", "Perhaps you meant", "--out"]),
    ],
    "app": [("--port 70000", ["--port is 70000", "65535"]), ("--prot 7860", ["--prot", "Perhaps you meant", "--port"])],
    "bench": [
        ("best", ["'best'", "image"]),
        ("image --model ./nowhere", ["./nowhere", "Give the path"]),
        ("image --rounds 0", ["--rounds is 0", "at least 1"]),
        ("image --batch-size 0", ["--batch-size is 0", "at least 1"]),
        ("image --shape ViT-X", ["'ViT-X'", "--shape", "ViT-B/32"]),
        ("image --out x.txt", ["--out x.txt", ".json"]),
    ],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """A folder with good images, and everything wrong that the cases name."""
    folder = tmp_path_factory.mktemp("errors")
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("bright", 180)):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(low, low + 70, (40, 36, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{number}.png")
    image = (folder / "photos" / "dark" / "0.png").read_bytes()
    files: dict[str, bytes | str] = {
        "note.txt": "hello",
        "damaged/cut.png": image[:60],
        "damaged/text.jpg": "hello",
        "mixed/a/0.png": image,
        "mixed/x/y/z/0.png": image,
        "table/0.png": image,
        "table/labels.csv": "a,b\n0.png,cat\n",
        "wrong.json": '{"dark": 1}',
        "cut.json": '["dark"',
        "blank.txt": "\n\n",
        "twice.txt": "circle\ncircle\n",
        "tags.json": json.dumps({"results": [{"path": "9.png", "tags": []}]}),
        "cats.json": json.dumps({"results": [{"path": "0.png", "tags": [{"label": "cat"}]}]}),
        "later.json": '{"schema": 99}',
        "good.json": '{"command": "c", "settings": {}, "metrics": {}, "seconds": {}}',
        "unweighted/config.json": "{}",
        "other/config.json": '{"text_config": 3}',
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "empty").mkdir()
    shutil.copytree(DEMO, folder / "cut")
    (folder / "other" / "flax_model.msgpack").write_bytes((DEMO / "flax_model.msgpack").read_bytes())
    weights = folder / "cut" / "flax_model.msgpack"
    weights.write_bytes(weights.read_bytes()[:5000])
    narrow = clip.load(tiny_checkpoint)
    modality = prompt.TextPrompt(4)
    prompts = modality.init(jax.random.key(0), narrow.config)
    tuned = prompt.TunedPrompt(modality, prompts, ("a", "b"), "a {}", narrow.fingerprint)
    prompt.save_prompt(folder / "narrow.safetensors", tuned)
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3, np.float32)}, folder / "weights.safetensors")
    return folder


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each case starts in that folder and must leave it as it was; the demo checkpoint is read once."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("JAXZS_CACHE", str(place.parent / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    listed = sorted(path.relative_to(place) for path in place.rglob("*"))
    yield
    left = [path for path in place.rglob("*") if path.relative_to(place) not in listed]
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    assert [str(path) for path in left if path.name != "masks"] == []


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output, and what was said on standard error without boxes and line breaks."""
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, out, " ".join(re.sub(r"[─│╭╮╰╯|]", " ", err).split())


@pytest.mark.parametrize(
    ("command", "arguments", "parts"),
    [
        pytest.param(command, arguments, parts, id=f"{command} {arguments}")
        for command, cases in CASES.items()
        for arguments, parts in cases
    ],
)
def test_wrong_input_is_explained(command, arguments, parts, capsys):
    code, out, err = run(capsys, command, *arguments.split())
    assert code == 2
    assert out == ""
    assert f"jaxzs {command}" in err
    for part in parts:
        assert part in err
    assert "Traceback" not in err
    assert "jax." not in err.replace("jaxzs.", "")


def test_every_command_is_tried():
    assert CASES.keys() == COMMANDS.keys()
    for command in ("classify", "tag", "segment", "extract", "tune"):
        assert len(CASES[command]) >= 12


def test_wrong_commands_are_answered_with_a_close_one(capsys):
    assert run(capsys, "clasify") == (
        2,
        "",
        f"jaxzs: no command 'clasify'; did you mean 'classify'? one of {', '.join(COMMANDS)}",
    )
    assert "one of demo" in run(capsys, "x")[2]


def test_interruptions_say_what_is_kept(capsys, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxzs.commands.classify.encode_files", interrupt)
    code, _, err = run(capsys, "classify", "photos", *NAMES.split())
    assert code == 130
    assert err == "jaxzs classify: interrupted; nothing is kept"
    monkeypatch.setattr("jaxzs.features.extract", interrupt)
    code, _, err = run(capsys, "extract", "photos")
    assert code == 130
    assert "interrupted; features keeps all finished chunks, the same command goes on" in err


def test_a_full_disk_and_too_little_memory_are_one_line(capsys, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "features/x")

    def large(*_: object, **__: object) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory allocating 8589934592 bytes")

    monkeypatch.setattr("jaxzs.features.extract", full)
    code, _, err = run(capsys, "extract", "photos")
    assert (code, err) == (2, "jaxzs extract: features/x: No space left on device")
    monkeypatch.setattr("jaxzs.features.extract", large)
    code, _, err = run(capsys, "extract", "photos")
    assert code == 2
    assert "out of memory; take a smaller --batch-size" in err


def test_a_defect_of_the_program_is_not_hidden(monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("jaxzs.features.extract", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["extract", "photos"])
