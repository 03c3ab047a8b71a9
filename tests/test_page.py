"""The results page: right numbers, names that stay names, a bounded size, and filters that work in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import pictures, run  # noqa: F401

from jaxzs import report
from jaxzs.errors import RecordError
from jaxzs.report import page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = (
    "</script><script>window.hacked=1</script>",
    '"><img src=x onerror=window.hacked=1>',
    "{{ 7 * 7 }}",
    "\u202egnp.\udce9",
)


def record_of(folder: Path, number: int = 6, names=("one", "two", "zero")) -> dict:
    """Images of one, two and zero in turn; the third of each three is said to be one."""
    rows = []
    for n in range(number):
        path = folder / f"{n}.png"
        Image.new("RGB", (80, 60), (40 * n % 255, 90, 120)).save(path)
        said = n % 3 if n % 3 < 2 else 0
        top = [{"label": names[said], "score": 0.9 - 0.1 * n}, {"label": names[2 - said], "score": 0.05}]
        rows.append({"path": str(path), **top[0], "top": top, "truth": names[n % 3]})
    settings = {"gamma": "auto", "evil": EVIL[0]}
    return {"command": "jaxzs classify photos", "class_names": list(names), "settings": settings, "results": rows}


def write(tmp_path, record, **more):
    written = report.write_page(tmp_path / "page.html", record, **more)
    return written, (tmp_path / "page.html").read_text()


def payload_of(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="payload">(.*?)</script>', text, re.S)[1])


def test_counts_truth_and_confusion(tmp_path):
    written, text = write(tmp_path, record_of(tmp_path))
    assert (written.images, written.pictures, written.bytes) == (6, 6, len(text.encode()))
    assert "right, of 6" in text
    assert "66.67 %" in text  # four of six
    assert 'aria-label="2 of zero said to be one"' in text
    classes = re.findall(r'data-class="\d">(\w+)</button></th><td class="n">(\d)</td>', text)
    assert classes == [("one", "4"), ("two", "2"), ("zero", "0")]
    items = payload_of(text)["items"]
    assert [item["p"][-5:] for item in items] == ["5.png", "2.png", "4.png", "3.png", "1.png", "0.png"]  # wrong first
    assert all(item["i"].startswith("data:image/jpeg;base64,") for item in items)


def test_what_recall_and_precision_are_of(tmp_path):
    """A class that was given to images without a truth has more images than its precision is of."""
    record = record_of(tmp_path)
    assert "whose true class is known" not in write(tmp_path, record)[1]
    del record["results"][0]["truth"]
    assert "Recall and precision are of the 5 images whose true class is known." in write(tmp_path, record)[1]


def test_settings_are_written_for_people(tmp_path):
    record = record_of(tmp_path)
    record["settings"] = {"templates": ["a {}.", "the {}."]}
    assert "<td>a {}., the {}.</td>" in write(tmp_path, record)[1]


def test_names_stay_names(tmp_path):
    record = record_of(tmp_path, names=EVIL[:3])
    record["results"][0]["path"] = EVIL[3]
    _, text = write(tmp_path, record)
    assert "<script>window.hacked" not in text
    assert "<img src=x" not in text
    assert "{{ 7 * 7 }}" in html.unescape(text)
    assert "\u202e" not in text
    assert "\\u202egnp.\\xe9" in json.dumps(payload_of(text), ensure_ascii=False).replace("\\\\", "\\")
    assert payload_of(text)["classes"] == list(EVIL[:3])


def test_heat_maps_and_masks(tmp_path):
    record = {"command": "jaxzs tag", "class_names": ["a", "b"], "results": []}
    Image.new("RGB", (80, 60)).save(tmp_path / "photo.png")
    record["results"] = [{"path": str(tmp_path / "photo.png"), "tags": [{"label": "b", "score": 0.7}]}]
    _, text = write(tmp_path, record, maps={str(tmp_path / "photo.png"): [("b", np.eye(3, 4, dtype=np.float32))]})
    [(label, layer)] = payload_of(text)["items"][0]["o"]
    assert label == "b"
    assert layer.startswith("data:image/png")
    mask = Image.fromarray(np.eye(60, 80, dtype=np.uint8) * 2, "P")
    mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    mask.save(tmp_path / "mask.png")
    covered = {"a": 0.0, "b": 0.0125}
    record["results"] = [
        {
            "path": str(tmp_path / "photo.png"),
            "mask": str(tmp_path / "mask.png"),
            "tags": list(covered),
            "covered": covered,
        }
    ]
    _, text = write(tmp_path, record)
    payload = payload_of(text)
    assert payload["colours"][:2] == ["#800000", "#008000"]
    assert payload["items"][0]["o"][0][0] == "mask"
    assert payload["items"][0]["l"] == [[1, 0.0125], [0, 0.0]]
    assert "mean part covered" in text


def test_size_is_bounded_and_said(tmp_path, monkeypatch):
    record = record_of(tmp_path, 8)
    record["results"][3]["path"] = str(tmp_path / "gone.png")
    one = len(payload_of(write(tmp_path, record)[1])["items"][0]["i"])
    monkeypatch.setattr(page, "MOST_BYTES", 3 * one + one // 2)
    written, text = write(tmp_path, record)
    assert (written.images, written.pictures) == (8, 3)
    assert "5 images have no picture here" in text
    assert len(payload_of(text)["items"]) == 8


def test_one_image_of_one_class(tmp_path):
    row = {"path": "gone.png", "tags": [{"label": "cat", "score": 0.9}]}
    _, text = write(tmp_path, {"command": "x", "class_names": ["cat"], "results": [row]})
    assert "<dt>image</dt><dd>1</dd>" in text
    assert "<dt>class</dt><dd>1</dd>" in text


def test_records_without_images_and_of_other_forms(tmp_path):
    figure = {"data": "digits", "method": "proxies", "figure": "accuracy", "value": 93.0}
    written, text = write(tmp_path, {"command": "x", "figures": [figure]})
    assert written.images == 0
    assert "93.00" in text
    assert 'id="grid"' not in text
    _, text = write(tmp_path, {"command": "x", "figures": [figure | {"passes": 0.0}, figure]})
    assert text.count('<td class="n">0</td>') == 1  # none were needed, and nobody counted: not the same
    assert "Skip to the images" not in text, "there is nothing to skip to"
    for rows in ([{}], [{"path": "a"}], [{"path": "a", "top": [{"label": "b"}]}], [3], [{"path": "a", "top": 3}]):
        with pytest.raises(RecordError, match="not those of a command"):
            write(tmp_path, {"command": "x", "results": rows})


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    _, text = write(tmp_path, record_of(tmp_path))
    assert "default-src 'none'" in text
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(""", text)


# --- in a browser ---------------------------------------------------------------------------------------------------

PROBE = """
<script>
const told = [];
const set = (id, value) => {
  const field = document.getElementById(id);
  field.value = value;
  for (const kind of ["input", "change"]) field.dispatchEvent(new Event(kind, { bubbles: true }));
  told.push([id, value, document.getElementById("count").textContent, document.querySelectorAll(".card").length]);
};
set("text", "3.PNG"); set("text", "");
set("class", "0"); set("class", "");
set("true", "2"); set("true", "");
set("answer", "wrong"); set("answer", "");
set("low", "0.75"); set("low", "0"); set("high", "0.5"); set("high", "1");
set("order", "most");
told.push(document.querySelector(".card").getAttribute("aria-label"));
document.querySelector(".card").click();
told.push([document.getElementById("detail").open, document.getElementById("d-place").textContent]);
document.getElementById("detail").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
told.push(document.getElementById("d-place").textContent);
document.getElementById("d-close").click();
told.push(String(window.hacked));
document.querySelector('[data-true="2"][data-class="0"]').click();
setTimeout(() => {
  told.push(document.getElementById("count").textContent);
  document.body.innerHTML = "";
  document.body.append(Object.assign(document.createElement("pre"), { id: "told", textContent: JSON.stringify(told) }));
}, 200);
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_filters_in_a_browser(tmp_path):
    record = record_of(tmp_path)
    record["results"][1]["path"] = f"{tmp_path}/{EVIL[1]}"
    write(tmp_path, record)
    probed = tmp_path / "probed.html"
    probed.write_text((tmp_path / "page.html").read_text().replace("</body>", PROBE + "</body>"))
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--virtual-time-budget=4000",
    ]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", probed.as_uri()]
    done = subprocess.run([CHROMIUM, *options], capture_output=True, text=True, timeout=300, check=False)
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    told = json.loads(html.unescape(re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.S)[1]))
    counts = {(step[0], step[1]): step[2:] for step in told if isinstance(step, list) and len(step) == 4}
    assert counts["text", "3.PNG"] == ["1 of 6 images", 1]
    assert counts["class", "0"] == ["4 of 6 images", 4]
    assert counts["true", "2"] == ["2 of 6 images", 2]
    assert counts["answer", "wrong"] == ["2 of 6 images", 2]
    assert counts["low", "0.75"] == ["2 of 6 images", 2]
    assert counts["high", "0.5"] == ["2 of 6 images", 2]
    assert counts["order", "most"] == ["6 images", 6]
    assert told[13] == f"{tmp_path.name}/0.png: one, 0.900, right"
    assert told[14:] == [[True, "1 of 6"], "2 of 6", "undefined", "2 of 6 images"]


# --- from the commands ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_classify_tag_and_report_write_pages(pictures, tiny_checkpoint, tmp_path, capsys):  # noqa: F811
    model = ["--model", tiny_checkpoint, "--labels", "dark,bright"]
    out = ["--out", tmp_path / "run.json", "--html", tmp_path / "classify.html"]
    code, printed, _ = run(capsys, "classify", pictures, *model, *out)
    assert code == 0
    assert "page of 24 images" in printed
    payload = payload_of((tmp_path / "classify.html").read_text())
    assert {item["t"] for item in payload["items"]} == {0, 1}  # the truth of the folders
    code, printed, _ = run(
        capsys, "report", tmp_path / "run.json", "--out", tmp_path / "report", "--html", tmp_path / "r.html"
    )
    assert code == 0
    assert len(payload_of((tmp_path / "r.html").read_text())["items"]) == 24
    folder = ["tag", pictures / "dark", *model, "--batch-size", 12, "--html", tmp_path / "tag.html"]
    assert run(capsys, *folder)[0] == 0
    items = payload_of((tmp_path / "tag.html").read_text())["items"]
    assert all([label for label, _ in item["o"]] == [payload["classes"][c] for c, _ in item["l"]] for item in items)
    assert run(capsys, "classify", pictures, *model, "--html", tmp_path / "page.txt")[0] == 2
