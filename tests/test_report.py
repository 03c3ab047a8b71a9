"""Records, sweeps that go on, published numbers, and `jaxzs report`."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxzs import proxy
from jaxzs.cli import main
from jaxzs.errors import DataError, RecordError
from jaxzs.report import (
    Confusion,
    Convergence,
    Figure,
    PerClass,
    Pseudolabels,
    Results,
    Sweep,
    data_entry,
    markdown_table,
    measured,
    plot_robin_hood,
    read_record,
    robin_hood,
    write_csv,
    write_record,
)
from jaxzs.report.curves import convergence
from jaxzs.report.plots import plot_confusion, plot_figures, plot_per_class
from jaxzs.report.published import all_published, published_beside, published_values
from jaxzs.report.summary import _told_apart, rows_of
from jaxzs.report.sweep import identity

EVERYTHING = Results(
    {"images": 4},
    (
        Figure("eurosat", "zero-shot", "accuracy", 40.0, "UL"),
        Figure("eurosat", "text grip", "accuracy", 60.0, "UL", 1.5),
    ),
    (PerClass("eurosat", "text grip", ("river", "sea"), (20.0, 60.0), (70.0, 50.0), "UL"),),
    (
        Convergence("eurosat", "fast", (1.0, 2.0, 3.0), (0.9, 0.5, 0.4), None, "plain"),
        Convergence("eurosat", "reference", (0.0, 1.0, 2.0), (1.0, 0.8, 0.7), None, "plain"),
    ),
    (
        Pseudolabels("eurosat", "text grip", (10.0, 20.0), (90.0, 80.0), "UL"),
        Pseudolabels("eurosat", "text fpl", (16.0,), (85.0,), "UL"),
    ),
)


class Checkpoint:
    """What a record asks of a model."""

    name = "openai/clip-vit-base-patch32"
    fingerprint = "f" * 64


def write(path: Path, results: Results = EVERYTHING, **more):
    settings = {"seed": 0, "folder": Path("a"), "pair": (1, 2)}
    return write_record(path, command="c", settings=settings, results=results, **more)


# --- records ----------------------------------------------------------------------------------------


def test_a_record_is_read_as_it_was_written(tmp_path):
    written = write(
        tmp_path / "r.json", model=Checkpoint(), data=data_entry("eurosat", "d" * 64, 5), seconds={"run": 2.0}
    )
    record = read_record(tmp_path / "r.json")
    assert record.raw == written
    assert record.results == EVERYTHING
    assert record.schema == 1
    assert record.settings == {"seed": 0, "folder": "a", "pair": [1, 2]}
    assert record.model == {"name": Checkpoint.name, "fingerprint": Checkpoint.fingerprint}
    assert record.data == {"name": "eurosat", "fingerprint": "d" * 64, "images": 5}
    for name in ("versions", "device", "backend", "num_devices", "date"):
        assert record.raw[name]
    assert "git_revision" in record.raw


def test_numbers_that_are_not_finite_lose_no_record(tmp_path):
    results = Results({"f1": float("nan")}, (Figure("d", "m", "F1", float("nan")),))
    write(tmp_path / "r.json", results)
    record = read_record(tmp_path / "r.json")
    assert record.results == Results({"f1": None})


def test_records_of_before_the_schema_are_read_without_what_they_lack(tmp_path):
    old = {"command": "c", "settings": {}, "metrics": {"mAP": 0.5}, "seconds": {}, "model": "x"}
    (tmp_path / "old.json").write_text(json.dumps(old))
    record = read_record(tmp_path / "old.json")
    assert (record.schema, record.model, record.results.figures) == (0, None, ())
    assert record.results.metrics == {"mAP": 0.5}


def spoil(change):
    def changed(raw: dict) -> str:
        change(raw)
        return json.dumps(raw)

    return changed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda raw: json.dumps(raw)[:-40], "not valid JSON, or is cut off"),
        (lambda raw: "[1, 2]", "holds no JSON object"),
        (lambda raw: "[" * 100_000, "not valid JSON"),
        (spoil(lambda raw: raw.pop("metrics")), "lacks metrics"),
        (spoil(lambda raw: raw.update(schema=2)), "is of schema 2, this version of jaxzs knows up"),
        (spoil(lambda raw: raw.update(schema="1")), "schema is '1', expected 1"),
        (spoil(lambda raw: raw.update(settings=[])), "settings is list, expected dict"),
        (spoil(lambda raw: raw.update(model="demo")), "model is str, expected dict or null"),
        (spoil(lambda raw: raw.update(figures={})), "figures is dict, expected a list"),
        (spoil(lambda raw: raw["figures"].append(3)), r"figures\[2\] is 3, expected an object"),
        (
            spoil(lambda raw: raw["figures"][0].update(value="40")),
            r"figures\[0\].value is '40', expected a finite number",
        ),
        (spoil(lambda raw: raw["figures"][1].pop("data")), r"figures\[1\] lacks 'data'"),
        (spoil(lambda raw: raw["figures"][1].update(unit="%")), r"has 'unit', expected only data"),
        (spoil(lambda raw: raw["per_class"][0]["classes"].append("x")), r"per_class\[0\]: its lists differ in length"),
        (
            spoil(lambda raw: raw["convergence"][0].update(passes=[1, None, 2])),
            r"passes\[1\] is None, expected a finite number",
        ),
        (spoil(lambda raw: raw.update(cells={"a": {}})), r"cells\['a'\] lacks its identity"),
    ],
)
def test_a_damaged_record_is_named_with_the_entry(content, message, tmp_path):
    raw = write(tmp_path / "r.json")
    (tmp_path / "r.json").write_text(content(raw))
    with pytest.raises(RecordError, match=message) as caught:
        read_record(tmp_path / "r.json")
    assert str(tmp_path / "r.json") in str(caught.value)


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    with pytest.raises(RecordError, match="differ in length"):
        write(tmp_path / "r.json", Results({}, per_class=(PerClass("d", "m", ("a",), (), ()),)))
    assert not list(tmp_path.iterdir())
    with pytest.raises(RecordError, match="cannot read"):
        read_record(tmp_path / "none.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        write(tmp_path / "file" / "r.json")


def test_compiling_is_measured_apart_and_once():
    @jax.jit
    def inner(x):
        return jnp.sin(x) + 1

    @jax.jit
    def outer(x):
        for _ in range(20):
            x = inner(x) * 2
        return x

    around = time.perf_counter()
    with measured() as seconds:
        start = time.perf_counter()
        jax.block_until_ready(outer(jnp.ones(3)))
        time.sleep(0.05)
        within = time.perf_counter() - start
    around = time.perf_counter() - around
    assert seconds["compile"] > 0
    assert seconds["run"] >= 0.049  # rounded to milliseconds
    assert within - 0.002 < seconds["compile"] + seconds["run"] < around + 0.002
    with measured() as again:
        jax.block_until_ready(outer(jnp.ones(3)))
    assert again["compile"] < seconds["compile"] / 2
    with pytest.raises(KeyError), measured() as failed:
        raise KeyError
    assert failed["run"] >= 0


# --- sweeps -----------------------------------------------------------------------------------------


class Counted:
    """A computation that counts how often it is done."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, key: str):
        def compute() -> Results:
            self.calls.append(key)
            return Results({"key": key}, (Figure("d", key, "accuracy", float(len(key))),))

        return compute


def sweep(path, counted, keys=("a", "bb"), notices=None, cell_settings=None, **changes):
    options = {"settings": {"seed": 0}, "data": data_entry("d", "1" * 64, 3)} | changes
    notices = [] if notices is None else notices
    own = Sweep(path, command="c", skip_existing=True, notify=notices.append, **options)
    found = {key: own.cell(key, counted(key), settings=cell_settings) for key in keys}
    own.finish()
    return found


def test_equal_cells_are_kept_and_others_computed(tmp_path):
    path, counted = tmp_path / "sweep.json", Counted()
    first = sweep(path, counted)
    assert counted.calls == ["a", "bb"]
    notices: list[str] = []
    assert sweep(path, counted, keys=("a", "bb", "ccc"), notices=notices)["bb"] == first["bb"]
    assert counted.calls == ["a", "bb", "ccc"]
    assert notices == [f"a: kept from {path}", f"bb: kept from {path}"]
    assert [one.method for one in read_record(path).results.figures] == ["a", "bb", "ccc"]


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"seed": 1}},
        {"settings": {"seed": 0, "more": None}},
        {"data": data_entry("d", "2" * 64, 3)},
        {"model": Checkpoint()},
        {"cell_settings": {"k": 16}},
    ],
)
def test_any_difference_is_computed_again(change, tmp_path):
    path, counted, notices = tmp_path / "sweep.json", Counted(), []
    sweep(path, counted)
    sweep(path, counted, keys=("a",), notices=notices, **change)
    assert counted.calls == ["a", "bb", "a"]
    assert "computed anew" in notices[0]
    kept = {"a", "bb"} if "cell_settings" in change else {"a"}
    assert read_record(path).cells.keys() == kept  # nothing of another sweep stays in the record


def test_names_and_times_do_not_make_a_difference(tmp_path):
    path, counted = tmp_path / "sweep.json", Counted()
    sweep(path, counted)
    sweep(path, counted, data=data_entry("other name", "1" * 64, 3))
    assert counted.calls == ["a", "bb"]
    assert identity({"a": (1,), "b": 2}, None, None) == identity({"b": 2, "a": [1]}, None, None)


def test_a_cut_off_record_is_said_and_begun_anew(tmp_path):
    path, counted, notices = tmp_path / "sweep.json", Counted(), []
    sweep(path, counted)
    path.write_text(path.read_text()[:-100])
    sweep(path, counted, notices=notices)
    assert counted.calls == ["a", "bb"] * 2
    assert "cut off" in notices[0]
    assert "nothing of it is kept" in notices[0]


def test_a_record_without_cells_is_said(tmp_path):
    path, counted, notices = tmp_path / "sweep.json", Counted(), []
    write(path)
    sweep(path, counted, notices=notices)
    assert "has no cells" in notices[0]
    assert len(counted.calls) == 2


def test_finished_cells_outlive_an_interruption(tmp_path):
    path, counted = tmp_path / "sweep.json", Counted()

    def interrupted():
        raise KeyboardInterrupt

    own = Sweep(path, command="c", settings={"seed": 0}, data=data_entry("d", "1" * 64, 3))
    own.cell("a", counted("a"))
    with pytest.raises(KeyboardInterrupt):
        own.cell("bb", interrupted)
    assert read_record(path).cells.keys() == {"a"}
    sweep(path, counted)
    assert counted.calls == ["a", "bb"]


def test_without_the_option_nothing_is_kept(tmp_path):
    path, counted = tmp_path / "sweep.json", Counted()
    for _ in range(2):
        Sweep(path, command="c", settings={}).cell("a", counted("a"))
    assert counted.calls == ["a", "a"]


# --- published numbers --------------------------------------------------------------------------------


def test_published_numbers_have_sources_and_stand_once():
    numbers = all_published()
    assert len(numbers) == len({(one.figure.__class__, *_key(one.figure)) for one in numbers})
    assert all(one.paper and one.table and 0 < one.figure.value <= 100 for one in numbers)
    assert published_values("eurosat")["text grip", "accuracy", "UL"] == 57.2
    assert published_values("voc2007") == {("TagCLIP", "mAP", ""): 92.8}


def _key(figure):
    return figure.data, figure.method, figure.figure, figure.protocol


@pytest.mark.parametrize(
    ("model", "images", "figure", "value"),
    [
        ("openai/clip-vit-base-patch32", 5, ("eurosat", "text grip", "accuracy", 1.0, "UL"), 57.2),
        ("weights/clip-vit-base-patch32/", 5, ("eurosat", "text grip", "accuracy", 1.0, "UL"), 57.2),
        ("openai/clip-vit-base-patch16", 5, ("eurosat", "text grip", "accuracy", 1.0, "UL"), None),
        ("demo", 5, ("eurosat", "text grip", "accuracy", 1.0, "UL"), None),
        ("openai/clip-vit-base-patch32", 5, ("eurosat", "text grip", "harmonic mean", 1.0, "UL"), None),
        ("openai/clip-vit-base-patch16", 4952, ("voc2007", "TagCLIP", "mAP", 90.0), 92.8),
        ("openai/clip-vit-base-patch16", 100, ("voc2007", "TagCLIP", "mAP", 90.0), None),
    ],
)
def test_published_numbers_stand_beside_the_same_thing_only(model, images, figure, value):
    found = published_beside(Figure(*figure, passes=3.0), {"name": model}, {"name": figure[0], "images": images})
    assert (found and found.figure.value) == value


# --- curves -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_curves_of_the_solvers():
    rng = np.random.default_rng(0)
    x, z = rng.normal(size=(60, 8)).astype(np.float32), rng.normal(size=(4, 8)).astype(np.float32)
    for solver, first in (("reference", 0.0), ("fast", 1.0)):
        iterations = 100 if solver == "reference" else None
        result = proxy.fit(x, z, proxy.Settings(solver=solver, iterations=iterations))
        curve = convergence("d", solver, result, "plain")
        assert curve.passes[0] == first
        assert curve.passes[-1] == pytest.approx(float(result.passes), abs=0.01)
        assert curve.objective[0] == result.objective[0]
        assert curve.objective[-1] == result.objective[-1]
        assert len(curve.passes) == len(curve.objective) <= 60
        assert list(curve.passes) == sorted(set(curve.passes))


# --- the command --------------------------------------------------------------------------------------


@pytest.fixture
def records(tmp_path):
    folder = tmp_path / "results"
    data = data_entry("eurosat", "d" * 64, 5)
    write(folder / "a.json", model=Checkpoint(), data=data, seconds={"compile": 1.0, "run": 2.0})
    few = Results({}, (Figure("dtd", "zero-shot", "accuracy", 30.0),))
    write(folder / "deep" / "b.json", few)
    return folder


def test_report_writes_tables_and_plots(records, tmp_path, capsys):
    out = tmp_path / "report"
    assert main(["report", str(records), "--out", str(out)]) == 0
    printed, _ = capsys.readouterr()
    text = (out / "report.md").read_text()
    assert text in printed
    assert "| method    | accuracy, UL | accuracy, UL (published) |" in text
    assert "| text grip | 60.0 ± 1.5   | 57.2                     |" in text
    assert "arXiv 2306.01669" in text
    assert "2 records, 3 numbers, 4 plots" in printed
    rows = list(csv.DictReader((out / "figures.csv").read_text().splitlines()))
    assert [row["data"] for row in rows] == ["dtd", "eurosat", "eurosat"]
    assert rows[2]["published_percent"] == "57.2"
    assert rows[0]["published_percent"] == rows[0]["deviation"] == ""
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert pictures == [
        "eurosat-accuracy-by-method.png",
        "eurosat-change-per-class-text-grip-ul.png",
        "eurosat-convergence-of-proxies.png",
        "eurosat-k-against-pseudolabel-accuracy.png",
    ]
    for name in pictures:
        assert f"]({name})" in text
        with Image.open(out / name) as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 20  # something is drawn


def test_report_is_the_same_for_the_same_records(records, tmp_path):
    for name in ("one", "two"):
        assert main(["report", str(records), "--out", str(tmp_path / name), "--quiet"]) == 0
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_report_as_json_is_all_there_is_on_standard_output(records, tmp_path, capsys):
    assert main(["report", str(records / "*.json"), "--out", str(tmp_path / "r"), "--json"]) == 0
    printed, _ = capsys.readouterr()
    value = json.loads(printed)
    assert value["records"] == [str(records / "a.json")]
    assert value["figures"][1]["published_percent"] == 57.2
    assert all(Path(name).is_file() for name in value["written"])


@pytest.mark.slow
def test_report_names_what_it_skips(records, tmp_path, capsys):
    (records / "cut.json").write_text('{"command": ')
    (records / "log.json").write_text("[1]")
    arguments = ["report", "--out", str(tmp_path / "r")]
    assert main([*arguments, str(records)]) == 0  # found by looking around
    err = capsys.readouterr().err
    assert "2 files are not used:" in err
    assert "cut.json is not valid JSON" in err
    assert "log.json is not the record of a run" in err
    assert main([*arguments, str(records / "a.json"), str(records / "cut.json")]) == 1  # named
    assert main([*arguments, str(records / "cut.json")]) == 2
    assert "no record of a run among 1 .json files" in capsys.readouterr().err


def test_an_error_is_not_drawn_among_accuracies(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("jaxzs.report.plots.plot_figures", lambda path, figures, published: drawn.append(figures))
    measured = [Figure("d", method, name, 50.0) for method in ("a", "b") for name in ("accuracy", "ECE")]
    write(tmp_path / "a.json", Results({}, tuple(measured)))
    assert main(["report", str(tmp_path / "a.json"), "--out", str(tmp_path / "r")]) == 0
    assert [[one.figure for one in figures] for figures in drawn] == [["accuracy", "accuracy"]]


def test_a_change_of_nothing_has_a_scale_of_points(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr("jaxzs.report.plots._save", lambda figure, path: kept.append(figure.axes[0].get_ylim()))
    plot_per_class(tmp_path / "a.png", PerClass("d", "m", ("a", "b"), (50.0, 60.0), (50.0, 60.0)))
    assert kept == [(-1, 1)]


def test_report_knows_stored_features(records, capsys, tmp_path):
    """`jaxzs evaluate` keeps them in its folder of results."""
    chunk = records / "features" / "0123" / "chunk-000000"
    chunk.mkdir(parents=True)
    (chunk / "chunk.json").write_text("{}")
    (chunk.parent / "store.json").write_text("{}")
    assert main(["report", str(records), "--out", str(tmp_path / "r")]) == 0
    assert "not used" not in capsys.readouterr().err


def test_report_does_not_read_its_own_folder(records, capsys):
    (records / "report").mkdir()
    (records / "report" / "x.json").write_text("[]")
    assert main(["report", str(records), "--out", str(records / "report")]) == 0
    assert "not used" not in capsys.readouterr().err


def test_the_example_of_the_page_runs(tmp_path, monkeypatch, capsys):
    """docs/reports.md: the experiment of your own, twice."""
    page = (Path(__file__).parents[1] / "docs" / "reports.md").read_text(encoding="utf-8")
    example = page.split("```python\n")[-1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        exec(example, {})
    assert len(read_record("sweep.json").results.figures) == 3
    assert capsys.readouterr().err.count("kept from sweep.json") == 3


ONE_EACH = ("patch_demo.json", "segment_demo.json", "demo_clip/evaluation.json")


def test_the_records_of_the_repository_are_read():
    folder = Path(__file__).parents[1] / "experiments" / "results"
    records = [read_record(folder / name) for name in ONE_EACH]
    records += [read_record(path) for path in (folder / "prompt_tuning").glob("*[!h].json")]
    assert len(records) == 6
    for record in records:
        assert record.schema == 1
        assert record.results.figures
        assert record.model["name"] in ("demo", "art")


def test_one_method_of_two_records_is_told_apart(tmp_path, capsys):
    for name, value in (("a", 30.0), ("b", 40.0)):
        figures = (Figure("dtd", "zero-shot", "accuracy", value), Figure("dtd", name, "F1", value))
        write(tmp_path / f"{name}.json", Results({}, figures))
    records = [read_record(tmp_path / f"{name}.json") for name in "ab"]
    measured_ones, _ = _told_apart(rows_of(records))
    assert [one.method for one in measured_ones] == ["zero-shot (a)", "a", "zero-shot (b)", "b"]
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "r")]) == 0
    assert f"| zero-shot |       | {tmp_path / 'a.json'} | 30.0" in capsys.readouterr().out


@pytest.mark.slow
def test_an_experiment_skips_what_it_has(tmp_path, monkeypatch, capsys):
    """proxy_features: two files, of which one changes between the runs."""
    from experiments import proxy_features

    rng = np.random.default_rng(0)

    def features(name: str) -> None:
        np.savez(
            tmp_path / f"{name}.npz",
            image_features=rng.normal(size=(40, 8)).astype(np.float32),
            text_features=rng.normal(size=(3, 8)).astype(np.float32),
            labels=rng.integers(0, 3, 40),
        )

    monkeypatch.setattr(proxy_features, "LABELS", {"plain": 1.0})
    monkeypatch.setattr(proxy_features, "SOLVERS", ("closed_form", "fast"))
    arguments = ["proxy_features", "--features", str(tmp_path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*arguments, "--repeats", "1", "--skip-existing"])
    for name in ("one", "two"):
        features(name)
    proxy_features.main()
    first = read_record(tmp_path / "out" / "proxy_features.json")
    features("two")
    capsys.readouterr()
    proxy_features.main()
    notices = capsys.readouterr().err
    assert notices.count("kept from") == 3
    assert notices.count("with other settings or data; computed anew") == 3
    second = read_record(tmp_path / "out" / "proxy_features.json")
    assert first.cells["one, plain, fast"] == second.cells["one, plain, fast"]
    assert first.cells["two, plain, fast"] != second.cells["two, plain, fast"]
    assert [curve.data for curve in second.results.convergence] == ["one", "two"]


def test_robin_hood_tells_giving_from_taking(tmp_path):
    labels = np.repeat(np.arange(4), 10)
    poor = np.where(np.arange(40) % 10 < 2 * (labels + 1), labels, (labels + 1) % 4)  # 20, 40, 60, 80 %
    giving = np.where(np.arange(40) % 10 < 7, labels, (labels + 1) % 4)  # 70 % everywhere
    found = robin_hood(poor, giving, labels)
    assert found.classes.tolist() == [0, 1, 2, 3]
    assert found.bottom_gain == pytest.approx(0.5)
    assert found.top_gain == pytest.approx(-0.1)
    assert found.slope == pytest.approx(-1)
    assert found.deviation_tuned == pytest.approx(0)
    taking = robin_hood(giving, poor, labels)
    assert taking.deviation_tuned > taking.deviation_zero_shot
    plot_robin_hood(found, "abcd", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    with pytest.raises(DataError, match="two classes"):
        robin_hood(np.zeros(3), np.zeros(3), np.zeros(3))


def test_a_cell_is_no_formula_and_a_name_is_what_it_was(tmp_path):
    names = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "a=1", "caf\udce9.png"]
    write_csv(tmp_path / "t.csv", ["=name", "number"], [[name, -1.5] for name in names])
    with open(tmp_path / "t.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        header, *rows = list(csv.reader(file))
    assert header == ["'=name", "number"]
    assert [row[0] for row in rows] == [f"'{name}" for name in names[:6]] + names[6:]
    assert {row[1] for row in rows} == {"-1.5"}, "numbers are numbers"


def test_a_name_cannot_leave_its_cell():
    table = markdown_table(["name"], [["a|b"], ["one\ntwo"]]).splitlines()
    assert len(table) == 4
    assert "a\\|b" in table[2]
    assert "one two" in table[3]


def test_names_in_plots_are_no_formulas(tmp_path):
    """A class named like a formula that is none ended the report."""
    names = ("$\\frac{$", "$x$")
    plot_per_class(tmp_path / "classes.png", PerClass(names[0], "m", names, (60.0, 90.0), (80.0, 90.0)))
    plot_confusion(tmp_path / "confusion.png", Confusion("d", names[0], names, names, (8, 2)))
    plot_figures(tmp_path / "figures.png", [Figure("d", names[0], "accuracy", 83.1, protocol=names[0])])
