"""`jaxzs tune`: learn prompts from a few labels, from labels of other classes, or from none, and save them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxzs.commands import FINISHED
from jaxzs.commands.options import (
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
    command_line,
    kept_when_interrupted,
    load_model,
    settings_of,
    shown_as,
)
from jaxzs.errors import DataError, LabelError

if TYPE_CHECKING:
    import jax
    import numpy as np

    from jaxzs.clip import Model
    from jaxzs.data import Source
    from jaxzs.prompt.modality import Frozen, Modality
    from jaxzs.prompt.protocol import Split
    from jaxzs.prompt.resuming import Progress, Record
    from jaxzs.prompt.strategies import Fit, Plan
    from jaxzs.report import Results


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneOptions(OutputOptions, ModelOptions, LabelOptions):
    images: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """Images to learn from: a folder (one subfolder a class if labelled), an .npz file, or tfds:NAME."""
    labels: Text = None
    """Class names, separated by commas, in the order of the data's labels; by default the data's own."""
    split: Text = None
    """Part of the images: train, test[:50%], all[100:200], train+test."""
    test: Text = None
    """Labelled images to evaluate on after every iteration; by default none."""
    test_split: Text = None
    """Part of --test (or of IMAGES when only this is given), such as test."""
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
    learning_rate: Annotated[float | None, shown_as("FLOAT")] = None
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
    from jaxzs import data, prompt
    from jaxzs.clip import Numerics
    from jaxzs.report import measured

    with measured() as seconds:
        source = data.open_source(options.images, split=options.split)
        test_source = _test_source(options)
        names = _class_names(options, source)
        model = load_model(options, names, force=options.force)
        modality, plan = _modality(options), _plan(options)
        numerics = Numerics(options.compute_dtype)
        frozen = prompt.freeze(
            model,
            modality,
            names,
            template=options.template,
            literal_braces=not options.filled_template,
            compute_dtype=numerics.compute_dtype,
        )
        images, labels = prompt.read_source(model, modality, source, numerics=numerics, progress=not options.quiet)
        split = _split(options, labels, len(names))
        test = None
        if test_source is not None:
            test = prompt.read_source(model, modality, test_source, numerics=numerics, progress=not options.quiet)
            test = test[0], _in_order_of(test[1], test_source, source, names)
        before = _zero_shot(options, model, modality, frozen, test, numerics)
        zero_shot = None
        if test is not None:
            zero_shot = prompt.evaluate(before, test[1], _seen(options, split))
            options.say(f"zero-shot: {_result(zero_shot)}")
        state = options.state or options.out.with_suffix(".state.safetensors")
        if state.exists():
            options.notice(f"going on from {state}")
        with kept_when_interrupted(
            lambda: (
                f"{state} keeps the training, the same command goes on from there"
                if state.exists()
                else "nothing is kept"
            )
        ):
            fitted = prompt.fit(
                modality,
                frozen,
                images,
                [split],
                model.config,
                plan,
                labels=labels,
                seeds=options.seeds,
                test=test,
                numerics=numerics,
                resume=state,
                on_progress=None if options.quiet else _show_progress,
                on_record=lambda record: _show_record(options, record),
            )
    _save(options, model, modality, names, fitted)
    after = None
    if test is not None:
        logits = prompt.score(modality, fitted.prompts, frozen, test[0], model.config, numerics=numerics)
        after = logits.argmax(2)
    results = _results(options, names, fitted, zero_shot, before, after, test and test[1])
    _write_record(options, model, modality, names, source, results, seconds)
    state.unlink(missing_ok=True)
    return FINISHED


def _check(options: TuneOptions) -> None:
    if not options.seeds or len(set(options.seeds)) < len(options.seeds):
        raise DataError(f"--seeds are {options.seeds}, expected distinct numbers, at least one")
    check_output_file(options.out, ".safetensors")
    check_record_beside(options.out)
    check_output_file(options.state, ".safetensors", name="state")
    if options.paradigm == "ul" and options.strategy == "labelled":
        raise DataError("--paradigm ul has no labels to train on; use --strategy fpl, ifpl or grip")
    names = ("k", "iterations", "labels_per_class", "prompt_length", "epochs", "batch_size")
    check_numbers(options, *names)
    if options.learning_rate is not None and not 0 < options.learning_rate < float("inf"):
        raise DataError(f"--learning-rate is {options.learning_rate}, expected a number above 0")


def _zero_shot(
    options: TuneOptions,
    model: Model,
    modality: Modality,
    frozen: Frozen,
    test: tuple[jax.Array, np.ndarray] | None,
    numerics: Any,
) -> Any:
    """Predicted classes [N] of the test images without any prompt."""
    from jaxzs import prompt

    if test is None:
        return None
    logits = prompt.plain_logits(modality, frozen.text_features, frozen, test[0], model.config, numerics=numerics)
    return logits.argmax(1)


def _seen(options: TuneOptions, split: Split) -> np.ndarray | None:
    return split.seen if options.paradigm == "trzsl" else None


def _save(options: TuneOptions, model: Model, modality: Modality, names: Sequence[str], fitted: Fit) -> None:
    """One prompt file a seed."""
    import jax
    import numpy as np

    from jaxzs import prompt

    for r, seed in enumerate(options.seeds):
        path = _path_of(options, seed)
        own = jax.tree.map(lambda leaf, r=r: np.asarray(leaf)[r], fitted.prompts)
        settings = {**settings_of(options), "seed": seed}
        tuned = prompt.TunedPrompt(modality, own, tuple(names), options.template, model.fingerprint, settings)
        prompt.save_prompt(path, tuned)
        options.say(f"prompt of seed {seed} written to {path}")


def _results(
    options: TuneOptions, names: Sequence[str], fitted: Fit, zero_shot: Any, before: Any, after: Any, labels: Any
) -> Results:
    """What `jaxzs report` makes tables and plots of."""
    from jaxzs.report import Results, curves

    data = options.dataset or Path(options.images).name
    method, protocol = f"{options.modality} {options.strategy}", options.paradigm.upper()
    metrics = {
        "zero_shot": None if zero_shot is None else dataclasses.asdict(zero_shot),
        "iterations": [dataclasses.asdict(record) for record in fitted.records],
    }
    pseudolabels = curves.pseudolabels(data, method, fitted.records, protocol)
    if zero_shot is None:
        return Results(metrics, pseudolabels=pseudolabels)
    test = fitted.records[-1].test or []
    return Results(
        metrics,
        figures=(
            curves.evaluated(data, "zero-shot", [zero_shot], protocol),
            curves.evaluated(data, method, test, protocol),
        ),
        per_class=(curves.per_class(data, method, names, before, after, labels, protocol),),
        pseudolabels=pseudolabels,
    )


def _write_record(
    options: TuneOptions,
    model: Model,
    modality: Modality,
    names: Sequence[str],
    source: Source,
    results: Results,
    seconds: dict[str, float],
) -> None:
    from jaxzs.prompt.files import describe
    from jaxzs.report import data_entry, write_record

    name = options.dataset or Path(options.images).name
    record = write_record(
        options.out.with_suffix(".json"),
        command=command_line("tune", options),
        settings=settings_of(options),
        results=results,
        model=model,
        data=data_entry(name, source.identity, len(source)),
        seconds=seconds,
        modality=describe(modality),
        class_names=list(names),
        prompts=[str(_path_of(options, seed)) for seed in options.seeds],
    )
    options.print_record(record)


def _test_source(options: TuneOptions) -> Source | None:
    from jaxzs.data import open_source

    if options.test is None and options.test_split is None:
        return None
    return open_source(options.test or options.images, split=options.test_split)


def _class_names(options: TuneOptions, source: Source) -> list[str]:
    """As given, of a known data set in the order of the data's labels, or the data's own."""
    own = source.label_names
    given, info = options.class_names(), options.dataset_info()
    if info is not None:
        return list(info.names_for(own) if own else info.class_names)
    if given is not None:
        if own and len(own) != len(given):
            raise LabelError(
                f"{len(given)} class names are given, the data have {len(own)} classes: {', '.join(own[:8])}"
            )
        return list(given)
    if not own:
        raise LabelError(f"{options.images} does not name its classes; give --labels, --labels-file or --dataset")
    return list(own)


def _in_order_of(labels: np.ndarray, test: Source, source: Source, names: Sequence[str]) -> np.ndarray:
    """Test labels renumbered to the classes of the training data, which may list them in another order."""
    import numpy as np

    from jaxzs.prompt.protocol import check_labels

    if source.label_names and test.label_names and test.label_names != source.label_names:
        unknown = sorted(set(test.label_names) - set(source.label_names))
        if unknown:
            raise LabelError(f"test classes that the training data do not have: {', '.join(unknown[:8])}")
        places = np.array([source.label_names.index(name) for name in test.label_names])
        labels = np.where(labels < 0, labels, places[labels])
    return check_labels(labels, len(names))


def _split(options: TuneOptions, labels: np.ndarray, num_classes: int) -> Split:
    from jaxzs import prompt

    if options.paradigm == "ul":
        known = (labels >= 0).all() and len(set(labels.tolist())) == num_classes
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
    if sys.stderr.isatty() and not options.quiet:
        print(file=sys.stderr)
    parts = [f"iteration {record.iteration}", f"loss {_mean(record.loss):.4f}"]
    if record.num_pseudolabels[0]:
        parts.insert(1, f"K {record.k[0]}, {record.num_pseudolabels[0]} pseudolabels")
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
