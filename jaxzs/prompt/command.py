"""`jaxzs tune`: learn prompts from a few labels, from labels of other classes, or from none, and save them."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxzs.errors import DataError, LabelError

if TYPE_CHECKING:
    import numpy as np

    from jaxzs.data import Source
    from jaxzs.prompt.modality import Modality
    from jaxzs.prompt.protocol import Split
    from jaxzs.prompt.resuming import Progress, Record
    from jaxzs.prompt.strategies import Plan


@dataclasses.dataclass(frozen=True)
class TuneOptions:
    data: str
    """Images to learn from: a folder (one subfolder a class if labelled), an .npz file, or tfds:NAME."""
    split: str | None = None
    """Part of --data, such as train or train[:80%]."""
    test: str | None = None
    """Labelled images to evaluate on after every iteration; by default none."""
    test_split: str | None = None
    """Part of --test (or of --data when only this is given), such as test."""
    labels: str | None = None
    """Class names, separated by commas, in the order of the data's labels; by default the data's own."""
    dataset: str | None = None
    """Class names of a known data set; `jaxzs datasets` lists them."""
    model: str = "demo"
    """The embedded demo checkpoint, a folder, or a hub id such as openai/clip-vit-base-patch32."""
    revision: str | None = None
    """Commit, branch or tag of a hub id."""
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
    prompt_length: int | None = None
    """Learned tokens; by default 16, and 4 and 4 in joint."""
    template: str = "a photo of a {}"
    """Sentence with {} for the class name, where no context is learned."""
    filled_template: bool = False
    """Fill in the template for the first pseudolabels as well; the published code leaves its braces there."""
    balance: Literal["code", "paper"] = "code"
    """Weights of labels and pseudolabels, as in the published code or as in the paper."""
    reinit: Literal["official", "warm", "fresh"] = "official"
    """Where an iteration starts: as in the published code, where the last one ended, or anew."""
    selection: Literal["boards", "top_k"] = "boards"
    """Rule for pseudolabels: as in the published code, or the true top k of each class."""
    learning_rate: float | None = None
    """By default 0.1, and 0.01 in joint."""
    epochs: int = 150
    """Of each training."""
    batch_size: int = 16
    """Images of a step."""
    seeds: tuple[int, ...] = (1,)
    """Seeds of the initial prompts, trained together."""
    bfloat16: bool = False
    """Products of the towers in bfloat16: faster on accelerators, results equal to two digits."""
    recompute: bool = False
    """Keep no activations for the gradient: less memory, a third slower."""
    out: Path = Path("prompt.safetensors")
    """Where the prompt goes; several seeds get -seedN before the suffix. The report lies beside it, as .json."""
    state: Path | None = None
    """File for resuming an interrupted run; by default beside --out. Removed when the run is finished."""
    force: bool = False
    """Use class names that the demo checkpoint has never seen."""


def run(options: TuneOptions) -> int:
    """Tune, print a line an iteration, write prompts and report; returns 0."""
    _check(options)
    import jax
    import numpy as np

    from jaxzs import data, prompt
    from jaxzs.clip import Numerics, load
    from jaxzs.files import write_json
    from jaxzs.prompt.files import describe

    source = data.open_source(options.data, split=options.split)
    test_source = _test_source(options)
    names = _class_names(options, source)
    model = load(options.model, revision=options.revision)
    if not options.force:
        model.check_words(names)
    modality, plan = _modality(options), _plan(options)
    numerics = Numerics(_dtype(options))
    frozen = prompt.freeze(
        model,
        modality,
        names,
        template=options.template,
        literal_braces=not options.filled_template,
        compute_dtype=numerics.compute_dtype,
    )
    images, labels = prompt.read_source(model, modality, source, numerics=numerics)
    split = _split(options, labels, len(names))
    test = None
    if test_source is not None:
        test = prompt.read_source(model, modality, test_source, numerics=numerics)
        test = test[0], _in_order_of(test[1], test_source, source, names)
        plain = prompt.plain_logits(
            modality, frozen.text_features, frozen, test[0], model.config, numerics=numerics
        )
        seen = split.seen if options.paradigm == "trzsl" else None
        zero_shot = prompt.evaluate(plain.argmax(1), test[1], seen)
        print(f"zero-shot: {_result(zero_shot)}")
    state = options.state or options.out.with_suffix(".state.safetensors")
    if state.exists():
        print(f"going on from {state}", file=sys.stderr)
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
        on_progress=_show_progress,
        on_record=_show_record,
    )
    settings = _settings(options)
    for r, seed in enumerate(options.seeds):
        path = _path_of(options, seed)
        own = jax.tree.map(lambda leaf, r=r: np.asarray(leaf)[r], fitted.prompts)
        tuned = prompt.TunedPrompt(
            modality,
            own,
            tuple(names),
            options.template,
            model.fingerprint,
            {**settings, "seed": seed},
        )
        prompt.save_prompt(path, tuned)
        print(f"prompt of seed {seed} written to {path}")
    report: dict[str, Any] = {
        "modality": describe(modality),
        "settings": settings,
        "fingerprint": model.fingerprint,
        "class_names": list(names),
        "images": len(images),
        "zero_shot": None if test is None else dataclasses.asdict(zero_shot),
        "iterations": [dataclasses.asdict(record) for record in fitted.records],
    }
    write_json(options.out.with_suffix(".json"), report)
    state.unlink(missing_ok=True)
    return 0


def _check(options: TuneOptions) -> None:
    if options.labels is not None and options.dataset is not None:
        raise LabelError("give only one of --labels and --dataset")
    if not options.seeds or len(set(options.seeds)) < len(options.seeds):
        raise DataError("--seeds must be distinct numbers")
    if options.out.suffix != ".safetensors":
        raise DataError(f"--out {options.out}: the name must end in .safetensors")
    if options.paradigm == "ul" and options.strategy == "labelled":
        raise DataError("--paradigm ul has no labels to train on; use --strategy fpl, ifpl or grip")
    for name in ("k", "iterations", "labels_per_class"):
        if getattr(options, name) < 1:
            raise DataError(f"--{name.replace('_', '-')} must be at least 1")
    if options.prompt_length is not None and options.prompt_length < 1:
        raise DataError("--prompt-length must be at least 1")


def _test_source(options: TuneOptions) -> Source | None:
    from jaxzs.data import open_source

    if options.test is None and options.test_split is None:
        return None
    return open_source(options.test or options.data, split=options.test_split)


def _class_names(options: TuneOptions, source: Source) -> list[str]:
    """As given, of a known data set in the order of the data's labels, or the data's own."""
    own = source.label_names
    if options.labels is not None:
        names = [name.strip() for name in options.labels.split(",")]
        if own and len(own) != len(names):
            raise LabelError(
                f"{len(names)} names in --labels, the data have {len(own)} classes: {', '.join(own[:8])}"
            )
        return names
    if options.dataset is not None:
        from jaxzs.data import dataset_info

        info = dataset_info(options.dataset)
        return list(info.names_for(own) if own else info.class_names)
    if not own:
        raise LabelError(f"{options.data} does not name its classes; give --labels or --dataset")
    return list(own)


def _in_order_of(
    labels: np.ndarray, test: Source, source: Source, names: Sequence[str]
) -> np.ndarray:
    """Test labels renumbered to the classes of the training data, which may list them in another order."""
    import numpy as np

    from jaxzs.prompt.protocol import check_labels

    if source.label_names and test.label_names and test.label_names != source.label_names:
        unknown = sorted(set(test.label_names) - set(source.label_names))
        if unknown:
            raise LabelError(
                f"test classes that the training data do not have: {', '.join(unknown[:8])}"
            )
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
        options.learning_rate,
        options.epochs,
        min(5, options.epochs - 1),
        options.batch_size,
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


def _dtype(options: TuneOptions) -> Any:
    import jax.numpy as jnp

    return jnp.bfloat16 if options.bfloat16 else None


def _settings(options: TuneOptions) -> dict[str, Any]:
    """The options as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(options), default=str))


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


def _show_record(record: Record) -> None:
    if sys.stderr.isatty():
        print(file=sys.stderr)
    parts = [f"iteration {record.iteration}", f"loss {_mean(record.loss):.4f}"]
    if record.num_pseudolabels[0]:
        parts.insert(1, f"K {record.k[0]}, {record.num_pseudolabels[0]} pseudolabels")
    known = [accuracy for accuracy in record.pseudolabel_accuracy if accuracy is not None]
    if known:
        parts.append(f"pseudolabels {100 * _mean(known):.1f} % right")
    if record.test is not None:
        parts.append("test " + " / ".join(_result(test) for test in record.test))
    print(", ".join(parts))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _result(result: Any) -> str:
    if result.harmonic_mean is None:
        return f"{100 * result.accuracy:.1f} %"
    return (
        f"harmonic mean {100 * result.harmonic_mean:.1f} % (seen {100 * result.seen:.1f}, "
        f"unseen {100 * result.unseen:.1f})"
    )
