"""`jaxzs bench`: how fast this machine runs each part of the library, compile time apart from steady state."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from jaxzs.commands.options import File, ModelOptions, OutputOptions, check_numbers, check_output_file, one_of, shown_as
from jaxzs.commands.run import Run
from jaxzs.errors import ConfigError, DataError

if TYPE_CHECKING:
    from jaxzs.clip import CLIPConfig

Part = Literal["image", "text", "proxy", "prompt", "tag"]
PARTS: tuple[Part, ...] = ("image", "text", "proxy", "prompt", "tag")
Shape = Literal[
    "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336", "RN50", "SigLIP-B/16", "SigLIP-So400m/14@384"
]  # fmt: skip

_TEXT_LENGTH = 16  # tokens of a usual prompt, start and end included
_PROMPT_CLASSES, _PROMPT_BATCH, _PROMPT_STEPS = 50, 16, 4
_TAG_FOREGROUND, _TAG_NAMES = 20, 45  # as for VOC
_PAYS = 1.1  # below, what bfloat16 gains in products is lost in the conversions around them


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptions(ModelOptions, OutputOptions):
    parts: Annotated[tuple[Part, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PARTS")] = PARTS
    """What to measure: image (encoder), text (encoder), proxy (a whole fit), prompt (textual tuning), tag (TagCLIP)."""
    shape: Annotated[Shape | None, one_of(Shape), shown_as()] = None
    """Random weights of this published shape instead of a model: speed does not depend on the weights."""
    batch_size: int = 32
    """Images or texts encoded at once; images tagged at once."""
    images: int = 10_000
    """Images that proxies are learned from."""
    classes: int = 100
    """Classes that proxies are learned for."""
    rounds: int = 5
    """Repetitions after the first; the median is reported."""
    out: File = None
    """Write the record to this .json file."""


class _Measured(NamedTuple):
    """A call that runs the part once, and how many `unit`s that is."""

    call: Callable[[], Any]
    units: int
    unit: str


class _Model(NamedTuple):
    """What is measured: parameters, configuration, and the name to report."""

    params: Any
    config: CLIPConfig
    name: str


def run(options: BenchOptions) -> int:
    """Measure, print, and write the record; returns 0."""
    _check(options)
    from tqdm import tqdm

    from jaxzs.report import Results

    run = Run(options)
    model = _model(run)
    timed: dict[str, Any] = {}
    with tqdm(_parts(options, model.config), unit="part", desc="measure", disable=options.no_progress) as parts:
        for part in parts:
            parts.set_postfix_str(part)
            timed[part] = _time(_MEASURED[part](model, options), options.rounds)
    # Seconds of one call of each part, not of all its rounds.
    run.seconds = {when: sum(of[when] for of in timed.values()) for when in ("compile", "run")}
    gain = _bfloat16_gain(options.rounds)
    record = run.record(Results(timed), device_memory=_device_memory(), bfloat16_gain=gain)
    run.write(record, options.out)
    return run.finish(record, _table(model.name, record))


def _check(options: BenchOptions) -> None:
    check_numbers(options, "batch_size", "images", "rounds")
    check_numbers(options, "classes", least=2)
    if options.shape is not None and options.model != "demo":
        raise DataError("give only one of --model and --shape (random weights)")
    check_output_file(options.out, ".json")


def _parts(options: BenchOptions, config: CLIPConfig) -> list[Part]:
    """What is measured, each once; ResNets and NaFlex have no tags."""
    from jaxzs.patch.tags import check_tower

    left_out = set()
    if "tag" in options.parts:
        try:
            check_tower(config)
        except ConfigError as error:
            left_out = {"tag"}
            options.notice(f"tag is left out: {error}")
    return [part for part in dict.fromkeys(options.parts) if part not in left_out]


def _model(run: Run) -> _Model:
    import jax

    from jaxzs import clip

    shape = run.options.shape
    if shape is None:
        loaded = run.load_model()
        return _Model(loaded.params, loaded.config, loaded.name)
    config = clip.ARCHITECTURES[shape]
    params = clip.random_params(jax.random.key(0), config)
    return _Model(params, config, f"{shape}, random weights")


# --- the parts --------------------------------------------------------------------------------------


def _image(model: _Model, options: BenchOptions) -> _Measured:
    from jaxzs import clip

    pixels = _images(model.config, options.batch_size)
    encode = functools.partial(clip.encode_image, model.params, pixels, model.config, numerics=options.numerics)
    return _Measured(encode, options.batch_size, "image")


def _text(model: _Model, options: BenchOptions) -> _Measured:
    from jaxzs import clip

    ids = _token_ids(model.config, options.batch_size)  # [B,T]
    encode = functools.partial(clip.encode_text, model.params, ids, model.config, numerics=options.numerics)
    return _Measured(encode, options.batch_size, "text")


def _proxy(model: _Model, options: BenchOptions) -> _Measured:
    """Features scattered around their classes' proxies, as a real data set's are."""
    import jax.numpy as jnp

    from jaxzs import proxy
    from jaxzs.clip import normalize

    text = normalize(_normal((options.classes, model.config.projection_dim)))  # [C,E]
    of_class = jnp.arange(options.images) % options.classes  # [N]
    spread = normalize(_normal((options.images, model.config.projection_dim), seed=1))  # [N,E]
    # A cosine of about 0.45 with the own proxy.
    features = normalize(text[of_class] + 2.0 * spread)  # [N,E]
    return _Measured(functools.partial(proxy.fit, features, text), options.images, "image")


def _prompt(model: _Model, options: BenchOptions) -> _Measured:
    """Textual tuning: images encoded once before, gradients through the text tower."""
    import jax.numpy as jnp
    import numpy as np

    from jaxzs import prompt

    config = model.config
    modality = prompt.TextPrompt(min(16, config.text.max_position_embeddings - 6))  # beside a name of 6 tokens
    bare = np.asarray(_token_ids(config, _PROMPT_CLASSES, length=6))  # [C,6]
    template = _normal((_PROMPT_CLASSES, config.projection_dim))  # [C,E]
    ids = jnp.asarray(prompt.placeholder_ids(bare, modality.length, config.text))
    frozen = prompt.Frozen(model.params, ids, template, template)
    images = _normal((_PROMPT_STEPS * _PROMPT_BATCH, config.projection_dim), seed=1)  # [N,E], encoded already
    labels = np.arange(len(images)) % _PROMPT_CLASSES
    # One epoch of one chunk: exactly the steps that are counted.
    optimisation = prompt.Optimisation(
        epochs=1, warmup_epochs=0, batch_size=_PROMPT_BATCH, steps_per_chunk=_PROMPT_STEPS
    )
    rows, none = np.arange(len(images)), np.arange(0)
    classes = np.arange(_PROMPT_CLASSES)
    split = prompt.Split("ssl", _PROMPT_CLASSES, rows, none, none, classes, classes)
    plan = prompt.Plan("labelled", optimisation=optimisation)
    tune = functools.partial(
        prompt.fit, prompt.Task(modality, config, options.numerics), frozen, prompt.Pool(images, labels), [split], plan
    )
    return _Measured(lambda: tune().prompts, _PROMPT_STEPS, "step")  # waiting for them waits for the training


def _tag(model: _Model, options: BenchOptions) -> _Measured:
    from jaxzs import clip, patch

    pixels = _images(model.config, options.batch_size)
    texts = _normal((_TAG_NAMES, model.config.projection_dim), seed=1)  # [C,E], background names included
    tag = functools.partial(
        patch.tag,
        model.params,
        pixels,
        texts,
        model.config,
        num_foreground=_TAG_FOREGROUND,
        numerics=clip.Numerics(options.compute_dtype),
    )
    return _Measured(lambda: tag().scores, options.batch_size, "image")


_MEASURED: dict[Part, Callable[[_Model, BenchOptions], _Measured]] = {
    "image": _image,
    "text": _text,
    "proxy": _proxy,
    "prompt": _prompt,
    "tag": _tag,
}


# --- inputs, clock, table ---------------------------------------------------------------------------


def _normal(shape: tuple[int, ...], seed: int = 0) -> Any:
    import jax

    return jax.random.normal(jax.random.key(seed), shape)


def _images(config: CLIPConfig, count: int) -> Any:
    """Pixels [count,S,S,3]; of NaFlex `Patches` of as many squares, as large as its positions were learned on."""
    import numpy as np

    from jaxzs import clip

    vision = config.vision
    if isinstance(vision, clip.VisionConfig) and vision.variable:
        values = _normal((count, vision.num_patches, vision.patch_size**2 * vision.num_channels))  # [B,N,p*p*3]
        return clip.Patches(values, np.ones(values.shape[:2], bool), np.full((count, 2), vision.grid, np.int32))
    return _normal((count, vision.image_size, vision.image_size, vision.num_channels))


def _token_ids(config: CLIPConfig, count: int, length: int = _TEXT_LENGTH) -> Any:
    """Random texts of one length, the end token last: [count,length] int32; SigLIP's, padded, [count,64]."""
    import numpy as np

    text = config.text
    length = min(length, text.max_position_embeddings)
    if text.pooling == "last":
        ids = np.ones((count, text.max_position_embeddings), np.int32)  # 1 ends a text, and pads it
        ids[:, : length - 1] = np.random.default_rng(0).integers(2, text.vocab_size, (count, length - 1))
        return ids
    # Below the end token, which the first published configurations find as the largest id.
    highest = max(2, min(text.vocab_size, text.eos_token_id) - 2)
    ids = np.random.default_rng(0).integers(1, highest, (count, length)).astype(np.int32)
    ids[:, -1] = text.eos_token_id if text.eos_token_id != 2 else text.vocab_size - 1  # 2 stands there by mistake
    return ids


def _time(measured: _Measured, rounds: int) -> dict[str, Any]:
    """Seconds of compiling (the first call, less a usual one), of a call (median), and the rate."""
    import jax

    seconds = []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        jax.block_until_ready(measured.call())  # jax returns before the work is done
        seconds.append(time.perf_counter() - start)
    usual = statistics.median(seconds[1:])  # without the first call, which compiles
    return {
        "unit": measured.unit,
        "per_second": measured.units / usual,
        "run": usual,
        "compile": max(0.0, seconds[0] - usual),  # a noisy clock gives no less than nothing
    }


def _bfloat16_gain(rounds: int) -> float:
    """How many times faster a product of 1024 x 1024 is with operands in bfloat16 instead of float32, in turn."""
    import jax
    import jax.numpy as jnp

    from jaxzs import clip

    product = jax.jit(lambda numerics, a, b: numerics.matmul(a, b))
    kinds, operands = (clip.Numerics(), clip.Numerics(jnp.bfloat16)), (_normal((1024, 1024)),) * 2
    gains = []
    for round_ in range(1 + rounds):
        seconds = []
        for numerics in kinds:
            start = time.perf_counter()
            jax.block_until_ready(product(numerics, *operands))
            seconds.append(time.perf_counter() - start)
        gains += [seconds[0] / seconds[1]] if round_ else []  # the first round compiles
    return statistics.median(gains)


def _device_memory() -> dict[str, int] | None:
    """Peak and limit of the first device's memory in bytes, where it tells them (GPU and TPU do)."""
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    names = [name for name in ("peak_bytes_in_use", "bytes_limit") if name in stats]
    return {name: int(stats[name]) for name in names} or None


def _where(record: dict[str, Any]) -> str:
    """Devices; of a CPU, whose kind jax does not tell, the processor."""
    on_cpu = record["backend"] == "cpu"
    return record["processor"] if on_cpu else f"{record['num_devices']} x {record['device']}"


def _table(name: str, record: dict[str, Any]) -> str:
    from jaxzs.report import markdown_table

    settings, measured = record["settings"], record["metrics"]
    products = "bfloat16" if settings["bfloat16"] else "float32"
    what = {
        "image": f"encode images, {settings['batch_size']} at once",
        "text": f"encode texts, {settings['batch_size']} at once",
        "proxy": f"learn proxies, {settings['images']} images, {settings['classes']} classes",
        "prompt": f"tune a textual prompt, {_PROMPT_CLASSES} classes, batch {_PROMPT_BATCH}",
        "tag": f"tag images, {settings['batch_size']} at once, {_TAG_NAMES} names",
    }
    rows = [
        [what[part], float(of["per_second"]), f"{of['unit']}s/s", of["run"], of["compile"]]
        for part, of in measured.items()
    ]
    lines = [
        f"{name}; {products} products; {_where(record)}; jax {record['versions']['jax']}",
        markdown_table(["part", "rate", "unit", "run, s", "compile, s"], rows),
    ]
    gain = record["bfloat16_gain"]
    verdict = "pays" if gain > _PAYS else "does not pay"
    lines.append(f"a product with bfloat16 operands is {gain:.2g} x as fast as in float32 here: --bfloat16 {verdict}")
    memory = record["device_memory"]
    if memory and "peak_bytes_in_use" in memory:
        lines.append(f"peak device memory: {memory['peak_bytes_in_use'] / 2**30:.2f} GiB")
    return "\n".join(lines)
