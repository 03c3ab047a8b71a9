"""`jaxzs tune`: learn prompts from a few labels, from labels of other classes, or from none, and save them."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from jaxzs.commands.options import (
    LARGEST_SEED,
    ByPosition,
    File,
    Flag,
    LabelOptions,
    ModelOptions,
    Number,
    OutputOptions,
    Text,
    check_numbers,
    check_output_file,
    check_record_beside,
    left_out,
    shown_as,
)
from jaxzs.commands.run import Run, settings_of
from jaxzs.commands.terminal import counted
from jaxzs.errors import DataError, LabelError

if TYPE_CHECKING:
    import numpy as np

    from jaxzs.clip import Model
    from jaxzs.data import Source
    from jaxzs.prompt import Evaluation
    from jaxzs.prompt.modality import Frozen, Modality, Task
    from jaxzs.prompt.prepare import Pool
    from jaxzs.prompt.protocol import Split
    from jaxzs.prompt.resuming import Progress, Record
    from jaxzs.prompt.strategies import Fit, Plan
    from jaxzs.report import Results


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneOptions(OutputOptions, ModelOptions, LabelOptions):
    images: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """Images to learn from: a folder (one subfolder a class if labelled), an .npz file, or tfds:NAME."""
    labels: Text = None
    """Class names, separated by commas; by default the data's own. They are matched by what they say."""
    by_position: ByPosition = False
    split: Text = None
    """Part of the images: train, test[:50%], all[100:200], train+test."""
    test: Text = None
    """Labelled images to evaluate on after every iteration; by default none."""
    test_split: Text = None
    """Part of --test (or of IMAGES if only this is given), such as test; without --split the rest is learned from."""
    modality: Literal["text", "image", "joint"] = "text"
    """What is learned: a context before class names, tokens among image patches, or both."""
    paradigm: Literal["ssl", "trzsl", "ul"] = "ul"
    """ssl: a few labels of every class. trzsl: all labels of some classes, none of the others. ul: no labels."""
    strategy: Literal["labelled", "fpl", "ifpl", "grip"] = "grip"
    """labelled: no pseudolabels. fpl: once. ifpl: again and again. grip: again and again, more each time."""
    labels_per_class: int = 2
    """Labelled images of every class in ssl, 80 % of which are trained on."""
    split_seed: int = 500
    """Which classes are seen in trzsl; published: 500, 0, 200."""
    k: int = 16
    """Pseudolabels per class in fpl and ifpl."""
    iterations: int = 10
    """Trainings in ifpl and grip."""
    prompt_length: Number = None
    """Learned tokens; by default 16, and 4 and 4 in joint."""
    template: str = "a photo of a {}"
    """Sentence with {} for the class name, where no context is learned."""
    filled_template: Flag = False
    """Fill in the template for the first pseudolabels as well; the published code leaves its braces there."""
    balance: Literal["code", "paper"] = "code"
    """Weights of labels and pseudolabels, as in the published code or as in the paper."""
    reinit: Literal["official", "warm", "fresh"] = "official"
    """Where an iteration starts: as in the published code, where the last one ended, or anew."""
    selection: Literal["boards", "top_k"] = "boards"
    """Rule for pseudolabels: as in the published code, or the true top k of each class."""
    learning_rate: Annotated[float | None, left_out(float), shown_as("FLOAT")] = None
    """By default 0.1, and 0.01 in joint."""
    epochs: int = 150
    """Of each training."""
    batch_size: int = 16
    """Images of a step."""
    seeds: tuple[int, ...] = (1,)
    """Seeds of the initial prompts, trained together."""
    recompute: Flag = False
    """Keep no activations for the gradient: less memory, a third slower."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("prompt.safetensors")
    """Where the prompt goes; several seeds get -seedN before the suffix. The record lies beside it, as .json."""
    state: File = None
    """File for resuming an interrupted run; by default beside --out. Removed when the run is finished."""


def run(options: TuneOptions) -> int:
    """Tune, print a line an iteration, write prompts and record; returns 0."""
    _check(options)
    from jaxzs.prompt.files import describe

    run = Run(options)
    state = options.state or options.out.with_suffix(".state.safetensors")
    with run.measured(kept=lambda: _kept(state)):
        job = _prepare(run)
        # A test set that does not fit is told here, before hours of training.
        zero_shot = _zero_shot(job)
        if state.exists():
            run.notice(f"going on from {state}")
        with run.step(f"tuning on {counted(len(job.pool.images), 'image')}"):
            fitted = _fit(job, state)
    # Prompts, then the record, then the state goes: whatever stops the run, nothing that was trained is lost.
    _save(job, fitted)
    record = run.record(
        _results(job, fitted, zero_shot),
        modality=describe(job.task.modality),
        class_names=list(job.names),
        prompts=[str(_path_of(options, seed)) for seed in options.seeds],
    )
    run.write(record, options.out)
    # A state that stayed would end the next such run at once, and refuse one with other settings.
    state.unlink(missing_ok=True)
    return run.finish(record)


class _Job(NamedTuple):
    """What is learned, from what, tested on what."""

    run: Run
    model: Model
    task: Task
    names: tuple[str, ...]
    frozen: Frozen
    pool: Pool
    split: Split
    test: Pool | None

    @property
    def options(self) -> TuneOptions:
        return self.run.options


def _kept(state: Path) -> str:
    return f"{state} keeps the training, the same command goes on from there" if state.exists() else "nothing is kept"


def _prepare(run: Run) -> _Job:
    """Reads images and labels, and makes of the model and the classes what training reads."""
    from jaxzs import prompt
    from jaxzs.prompt.protocol import check_labels

    options: TuneOptions = run.options
    source, test_source = _sources(run)
    run.of_data(options.images, source.identity, len(source))
    names, places = _classes(run, source)
    model, modality = run.load_model(names), _modality(options)
    frozen = prompt.freeze(
        model,
        modality,
        names,
        template=options.template,
        literal_braces=not options.filled_template,  # as the released code selects first
        distinct=options.dataset is None,  # ImageNet has names twice
        numerics=options.numerics,
    )

    def read(part: Source, places: Sequence[int]) -> Pool:
        numerics, progress = options.numerics, not options.quiet
        pool = prompt.read_source(model, modality, part, numerics=numerics, progress=progress)
        return pool._replace(labels=_renumbered(pool.labels, places))

    pool, test = read(source, places), None
    if test_source is not None:
        test = read(test_source, _test_places(source, test_source, places))
        check_labels(test.labels, len(names))
    task = prompt.Task(modality, model.config, options.numerics)
    return _Job(run, model, task, names, frozen, pool, _split(options, pool.labels, len(names)), test)


def _fit(job: _Job, state: Path) -> Fit:
    from jaxzs import prompt

    options = job.options
    running = prompt.Running(
        resume=state,
        on_progress=None if options.quiet else _show_progress,
        on_record=lambda record: _show_record(options, record),
    )
    return prompt.fit(job.task, job.frozen, job.pool, [job.split], _plan(options), running, test=job.test)


def _check(options: TuneOptions) -> None:
    # Equal seeds would be one run twice, written to one file.
    if not options.seeds or len(set(options.seeds)) < len(options.seeds):
        raise DataError(f"--seeds are {options.seeds}, expected distinct numbers, at least one")
    if not all(0 <= seed <= LARGEST_SEED for seed in options.seeds):
        raise DataError(f"--seeds are {options.seeds}, expected numbers from 0 to {LARGEST_SEED}")
    check_numbers(options, "split_seed", least=0, most=LARGEST_SEED)
    check_output_file(options.out, ".safetensors")
    check_record_beside(options.out)
    check_output_file(options.state, ".safetensors", name="state")
    if options.paradigm == "ul" and options.strategy == "labelled":
        raise DataError("--paradigm ul has no labels to train on; use --strategy fpl, ifpl or grip")
    names = ("k", "iterations", "labels_per_class", "prompt_length", "epochs", "batch_size")
    check_numbers(options, *names)
    if options.learning_rate is not None and not 0 < options.learning_rate < float("inf"):
        raise DataError(f"--learning-rate is {options.learning_rate}, expected a number above 0")


class _ZeroShot(NamedTuple):
    """Of the test images without any prompt: their predicted classes [N], and how good these are."""

    predictions: np.ndarray
    result: Evaluation


def _zero_shot(job: _Job) -> _ZeroShot | None:
    """What is to be improved; None without test images."""
    import numpy as np

    from jaxzs import prompt

    if job.test is None:
        return None
    # The filled template: the braces of the released code are in the first pseudolabels only.
    logits = prompt.plain_logits(job.task, job.frozen.text_features, job.frozen, job.test.images)  # [N,C]
    predictions = np.asarray(logits.argmax(1))
    seen = job.split.seen if job.options.paradigm == "trzsl" else None
    found = _ZeroShot(predictions, prompt.evaluate(predictions, job.test.labels, seen))
    job.options.say(f"zero-shot: {_result(found.result)}")
    return found


def _save(job: _Job, fitted: Fit) -> None:
    """One prompt file a seed."""
    import jax
    import numpy as np

    from jaxzs import prompt

    options = job.options
    for r, seed in enumerate(options.seeds):
        path = _path_of(options, seed)
        own = jax.tree.map(lambda leaf, r=r: np.asarray(leaf)[r], fitted.prompts)  # leaves [R,...] -> [...]
        settings = {**settings_of(options), "seed": seed}
        tuned = prompt.TunedPrompt(job.task.modality, own, job.names, options.template, job.model.fingerprint, settings)
        prompt.save_prompt(path, tuned)
        options.say(f"prompt of seed {seed} written to {path}")


def _results(job: _Job, fitted: Fit, zero_shot: _ZeroShot | None) -> Results:
    """What `jaxzs report` makes tables and plots of."""
    from jaxzs import prompt
    from jaxzs.report import Results, curves

    options = job.options
    data = job.run.data["name"] if job.run.data else ""
    method, protocol = f"{options.modality} {options.strategy}", options.paradigm.upper()
    metrics = {
        "zero_shot": None if zero_shot is None else dataclasses.asdict(zero_shot.result),
        "iterations": [dataclasses.asdict(record) for record in fitted.records],
    }
    pseudolabels = curves.pseudolabels(data, method, fitted.records, protocol)
    if zero_shot is None or job.test is None:
        return Results(metrics, pseudolabels=pseudolabels)
    images, labels = job.test
    logits = prompt.score(job.task, fitted.prompts, job.frozen, images)  # [R,N,C]
    per_class = data, method, job.names, zero_shot.predictions, logits.argmax(2), labels, protocol
    return Results(
        metrics,
        figures=(
            curves.evaluated(data, "zero-shot", [zero_shot.result], protocol),
            curves.evaluated(data, method, fitted.records[-1].test or [], protocol),
        ),
        per_class=(curves.per_class(*per_class),),
        pseudolabels=pseudolabels,
    )


def _sources(run: Run) -> tuple[Source, Source | None]:
    """Images to learn from, and to test on. A part that is tested on is taken out of what is learned from."""
    from jaxzs.data import open_source

    options: TuneOptions = run.options
    source = open_source(options.images, split=options.split)
    run.pass_over(getattr(source, "passed_over", None))
    if options.test is None and options.test_split is None:
        return source, None
    test = open_source(options.test or options.images, split=options.test_split)
    # With only --test-split, the rest of the same images is learned from.
    if options.split is None and options.test_split is not None:
        source = _without(run, source, test)
    _tell_overlap(run, source, test)
    return source, test


def _without(run: Run, source: Source, test: Source) -> Source:
    """The images of a source that are not tested on."""
    from jaxzs.data import select

    tested = set(item_keys(test))
    kept = [number for number, key in enumerate(item_keys(source)) if key not in tested]
    if not kept:
        raise DataError(f"{run.options.images}: every image is a test image; give --split, or another --test")
    if len(kept) == len(source):
        return source
    left_out = counted(len(source) - len(kept), "test image")
    run.notice(f"learning from {counted(len(kept), 'image')}; {left_out} of {run.options.images} left out")
    return select(source, kept)


def _tell_overlap(run: Run, source: Source, test: Source) -> None:
    """Images in both: told where nothing is learned of their labels, refused where their labels are trained on."""
    tested = item_keys(test)
    both = len(set(tested) & set(item_keys(source)))
    if not both:
        return
    found = f"{both} of {counted(len(tested), 'test image')} are also among the images to learn from"
    # With the labels of test images trained on, an accuracy would mean nothing.
    if run.options.paradigm != "ul":
        raise DataError(f"{found}, with labels; give --split and --test-split, or another folder as --test")
    run.notice(f"note: {found}, without their labels (transductive)")


def item_keys(source: Source) -> list[Any]:
    """What tells the items of a source apart, equal for the same file or item of another source."""
    from jaxzs.data.folders import FolderSource
    from jaxzs.data.sources import Subset

    if isinstance(source, Subset):
        inner = item_keys(source.source)
        return [inner[int(number)] for number in source.indices]
    if isinstance(source, FolderSource):
        return [os.path.realpath(source.root / file) for file in source.files]  # one file, whatever the path to it
    return [(source.identity, number) for number in range(len(source))]


def _classes(run: Run, source: Source) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Class names, and the place among them of each label of the data; the pairing is told unless they are equal."""
    from jaxzs.data import match_names

    options: TuneOptions = run.options
    own, given, info = tuple(source.label_names), options.class_names(), options.dataset_info()
    if info is not None:  # it knows other names of its labels
        names = info.names_for(own) if own else info.class_names
        return tuple(names), tuple(range(len(names)))
    if given is None and not own:
        raise LabelError(f"{options.images} does not name its classes; give --labels, --labels-file or --dataset")
    if given is None or not own:  # nothing to pair: one of both lists is all there is
        names = own if given is None else given
        return names, tuple(range(len(names)))
    pairing = match_names(given, own, by_position=options.by_position)
    run.tell_pairing(pairing)
    return pairing.given, pairing.places


def _test_places(source: Source, test: Source, places: Sequence[int]) -> tuple[int, ...]:
    """The class of each label of the test data, which may list them in another order."""
    from jaxzs.data import match_names

    if not (source.label_names and test.label_names):  # numbers that name nothing are taken as they are
        return tuple(places)
    pairing = match_names(source.label_names, test.label_names)
    return tuple(places[place] for place in pairing.places)


def _renumbered(labels: np.ndarray, places: Sequence[int]) -> np.ndarray:
    """Labels as places among the class names: [N] of the data -> [N]; -1 stays."""
    import numpy as np

    # What lies outside stays as it is, for the check that names the image.
    if not len(places) or labels.max(initial=-1) >= len(places):
        return labels
    return np.where(labels < 0, labels, np.asarray(places)[labels])  # [N]


def _split(options: TuneOptions, labels: np.ndarray, num_classes: int) -> Split:
    from jaxzs import prompt

    if options.paradigm == "ul":
        known = (labels >= 0).all() and len(set(labels.tolist())) == num_classes
        # Labels give the scan order of the released code; without them it is that of the files.
        return prompt.ul_split(len(labels), num_classes, labels if known else None)
    if options.paradigm == "ssl":
        return prompt.ssl_split(labels, num_classes, options.labels_per_class)
    return prompt.trzsl_split(labels, num_classes, options.split_seed)


def _modality(options: TuneOptions) -> Modality:
    from jaxzs.prompt.files import MODALITIES

    chosen: dict[str, Any] = {"recompute": options.recompute}
    if options.prompt_length is not None:
        chosen["length"] = options.prompt_length
    return MODALITIES[options.modality](**chosen)


def _plan(options: TuneOptions) -> Plan:
    from jaxzs import prompt

    # 5 epochs of warm-up, as published; fewer in a training that is shorter.
    optimisation = prompt.Optimisation(
        options.learning_rate, options.epochs, min(5, options.epochs - 1), options.batch_size
    )
    return prompt.Plan(
        options.strategy,
        options.k,
        options.iterations,
        options.balance,
        options.reinit,
        options.selection,
        optimisation=optimisation,
        seeds=options.seeds,
    )


def _path_of(options: TuneOptions, seed: int) -> Path:
    if len(options.seeds) == 1:
        return options.out
    return options.out.with_stem(f"{options.out.stem}-seed{seed}")


def _show_progress(progress: Progress) -> None:
    if not sys.stderr.isatty():
        return
    left = "" if progress.remaining is None else f", {progress.remaining:.0f} s left"
    print(
        f"\riteration {progress.iteration}/{progress.iterations} step {progress.step}/{progress.steps} "
        f"loss {progress.loss:.4f}{left}   ",
        end="",
        file=sys.stderr,
    )


def _show_record(options: TuneOptions, record: Record) -> None:
    if sys.stderr.isatty() and not options.quiet:  # the last step stays on the line above
        print(file=sys.stderr)
    parts = [f"iteration {record.iteration}", f"loss {_mean(record.loss):.4f}"]
    if number := record.num_pseudolabels[0]:
        parts.insert(1, f"K {record.k[0]}, {counted(number, 'pseudolabel')}")
    known = [accuracy for accuracy in record.pseudolabel_accuracy if accuracy is not None]
    if known:
        parts.append(f"pseudolabels {100 * _mean(known):.1f} % right")
    if record.test is not None:
        parts.append("test " + " / ".join(_result(test) for test in record.test))
    options.say(", ".join(parts))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _result(result: Any) -> str:
    if result.harmonic_mean is None:
        return f"{100 * result.accuracy:.1f} %"
    return (
        f"harmonic mean {100 * result.harmonic_mean:.1f} % (seen {100 * result.seen:.1f}, "
        f"unseen {100 * result.unseen:.1f})"
    )
