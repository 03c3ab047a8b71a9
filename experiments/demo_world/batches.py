"""Training batches: images, captions as token ids, and which caption belongs to which image.

Batch number k of a run is a pure function of (plan, k): however many processes render, and wherever a run is resumed,
the same batches come. Text rows are, in this order, the distinct captions of the images, hard negatives, and one
caption for each name in CANDIDATES.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import queue
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.demo_world import captions
from experiments.demo_world.captions import BACKGROUNDS, DIGITS, GLYPHS, LETTERS, SHAPES, Content
from experiments.demo_world.render import damage, glyph_image, scene
from jaxzs.clip.tokenizer_files import END, START

# Every thing that has a name: glyphs, shapes, backgrounds. They are among the texts of every batch.
CANDIDATES = (
    *(Content(glyph=i) for i in range(len(GLYPHS))),
    *(Content(objects=((i, None),)) for i in range(len(SHAPES))),
    *(Content(background=i) for i in range(len(BACKGROUNDS))),
)


_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Plan(NamedTuple):
    """What a run renders. Steps count from 0; all numbers that a batch depends on are here.

    steps: of the whole run. ramp: share of the steps over which difficulty grows to 1. local_from: share after which
    the patch-level part begins, with larger images in `large_share` of its steps. filler_share: of batches with filler
    words before the captions, which have `long` tokens; the others have `short`.
    """

    seed: int = 0
    steps: int = 9000
    batch: int = 64
    size: int = 48
    large_batch: int = 16
    large_size: int = 96
    ramp: float = 0.35
    local_from: float = 0.55
    large_share: float = 0.2
    filler_share: float = 0.2
    short: int = 20
    long: int = 32
    digit_share: float = 0.40
    letter_share: float = 0.14
    hard_share: float = 0.4


class Batch(NamedTuple):
    """One training batch; B images, U texts, N candidate names (the last N texts).

    pixels: uint8 [B, S, S, 3]. input_ids: int32 [U, T], all padding for texts that are not there. positive, negative:
    bool [B, U], whether a text belongs to an image or is untrue of it; neither where it is true of it but not its own.
    present, absent: bool [B, N], likewise for the names, everything true being present.
    """

    pixels: np.ndarray
    input_ids: np.ndarray
    positive: np.ndarray
    negative: np.ndarray
    present: np.ndarray
    absent: np.ndarray


def is_local(plan: Any, step: int) -> bool:
    """Whether the patch-level part of the training has begun."""
    return step >= round(plan.local_from * plan.steps)


def batch_at(plan: Plan, vocab: Mapping[str, int], step: int) -> Batch:
    """Batch number `step` of a plan, the same whoever renders it."""
    rng = np.random.default_rng([1, plan.seed, 7, step])
    difficulty = min(1.0, step / max(1.0, plan.ramp * plan.steps))
    large = is_local(plan, step) and rng.random() < plan.large_share
    filler = not large and rng.random() < plan.filler_share
    num, size = (plan.large_batch, plan.large_size) if large else (plan.batch, plan.size)
    images, contents = [], []
    for _ in range(num):
        image, content = _image(plan, rng, size, difficulty, large)
        images.append(image)
        contents.append(content)
    capacity = num + round(plan.hard_share * num) - (num + round(plan.hard_share * num) + len(CANDIDATES)) % 8
    texts, positive, facts = _texts(plan, rng, contents, capacity, difficulty)
    true = _true_of(contents, facts)
    length = plan.long if filler else plan.short
    words = int(rng.integers(1, 17)) if filler else 0
    ids = np.full((capacity + len(CANDIDATES), length), vocab[END], np.int32)
    for row, text in enumerate(texts):
        if text is not None:
            ids[row] = tokens(with_filler(text, words, length - 2, rng), vocab, length)
    given = np.array([text is not None for text in texts])
    negative = ~true & ~positive & given[None, :]
    present, absent = true[:, -len(CANDIDATES) :].copy(), negative[:, -len(CANDIDATES) :]
    present[:, : len(GLYPHS)] &= positive[:, -len(CANDIDATES) :][:, : len(GLYPHS)]  # not the ambiguous ones
    return Batch(np.stack(images), ids, positive, negative, present, absent)


def _image(
    plan: Plan, rng: np.random.Generator, size: int, difficulty: float, large: bool
) -> tuple[np.ndarray, Content]:
    """One damaged training image and its content; large images are scenes of many objects, but for a few glyphs."""
    own = difficulty * rng.uniform(0.35, 1.0)
    kind = rng.random()
    if kind < (0.1 if large else plan.digit_share):
        image, content = glyph_image(int(rng.integers(len(DIGITS))), size, rng, own)
    elif kind < (0.15 if large else plan.digit_share + plan.letter_share):
        image, content = glyph_image(len(DIGITS) + int(rng.integers(len(LETTERS))), size, rng, own)
    else:
        most = 5 if large else 1 + int(rng.random() < difficulty) + int(rng.random() < difficulty)
        least = 0 if rng.random() < 0.08 else 1
        image, content, _ = scene(size, rng, min_objects=least, max_objects=most if least else 0, difficulty=own)
    return damage(image, rng, own), content


def _texts(
    plan: Plan, rng: np.random.Generator, contents: list[Content], capacity: int, difficulty: float
) -> tuple[list[str | None], np.ndarray, np.ndarray]:
    """All texts of a batch, which belong to which image, bool [B, U], and the facts they state, bool [U, F]."""
    say = functools.partial(captions.caption, rng=rng, difficulty=difficulty, max_words=plan.short - 2)
    rows: dict[str, int] = {}
    statements: list[Content | None] = []
    own = np.zeros(len(contents), np.int64)
    for i, content in enumerate(contents):
        statement = captions.stated(content, rng)
        text = say(statement)
        if text not in rows:
            rows[text] = len(rows)
            statements.append(statement)
        own[i] = rows[text]
    for content in contents:
        if len(rows) >= capacity:
            break
        swapped = captions.attribute_swap(captions.stated(content, rng), rng)
        if swapped is not None and rng.random() < 2 * plan.hard_share:
            text = say(swapped)
            if text not in rows:
                rows[text] = len(rows)
                statements.append(swapped)
    texts: list[str | None] = list(rows)
    texts += [None] * (capacity - len(texts))
    statements += [None] * (capacity - len(statements))
    texts += [say(name) for name in CANDIDATES]
    facts = np.stack([
        np.zeros(captions.NUM_FACTS, bool) if s is None else captions.facts(s) for s in [*statements, *CANDIDATES]
    ])  # fmt: skip
    positive = np.zeros((len(contents), len(texts)), bool)
    positive[np.arange(len(contents)), own] = True
    for i, content in enumerate(contents):
        if (name := _single_name(content)) is not None:
            positive[i, capacity + name] = True
    return texts, positive, facts


def _single_name(content: Content) -> int | None:
    """The candidate that says all there is in an image: its glyph, its only shape, its bare background."""
    if content.glyph is not None:
        return content.glyph
    if not content.objects:
        return len(GLYPHS) + len(SHAPES) + content.background
    return len(GLYPHS) + content.objects[0][0] if len(content.objects) == 1 else None


def _true_of(contents: list[Content], facts: np.ndarray) -> np.ndarray:
    """Which statement (facts, bool [U, F]) is true of which image, bool [B, U]."""
    images = np.stack([captions.facts(c, ambiguous=True) for c in contents])
    return (~images).astype(np.float32) @ facts.T.astype(np.float32) == 0


def with_filler(text: str, words: int, room: int, rng: np.random.Generator) -> list[str]:
    """Words of a text after `words` random ones, as many as there is room for."""
    own = captions.words_of(text)
    count = max(0, min(words, room - len(own)))
    return [captions.FILLER_WORDS[i] for i in rng.integers(len(captions.FILLER_WORDS), size=count)] + own


def tokens(words: list[str], vocab: Mapping[str, int], length: int) -> np.ndarray:
    """Token ids of known words between start and end token, padded with the end token: int32 [length]."""
    ids = np.full(length, vocab[END], np.int32)
    ids[0] = vocab[START]
    ids[1 : 1 + len(words)] = [vocab[f"{word}</w>"] for word in words]
    return ids


def rendered(
    plan: Any,
    vocab: Mapping[str, int],
    first: int,
    *,
    make: Callable[..., Batch] = batch_at,
    workers: int = 1,
    depth: int = 12,
) -> Iterator[tuple[Batch, float]]:
    """Batches first, first + 1, ... of a plan with the CPU seconds each took, rendered ahead in other processes.

    make: (plan, vocab, step) -> the batch of that step; a function of a module, so that another process finds it.
    """
    context = multiprocessing.get_context("spawn")
    queues = [context.Queue(maxsize=max(1, depth // workers)) for _ in range(workers)]
    processes = [
        context.Process(
            target=_produce, args=(make, plan, dict(vocab), first + i, workers, q, os.getpid()), daemon=True
        )
        for i, q in enumerate(queues)
    ]
    # One thread a process: the products here are small, and threads that wait for work steal the cores.
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    for process in processes:
        process.start()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    try:
        for step in range(first, plan.steps):
            source = (step - first) % workers
            while True:
                try:
                    batch, seconds = queues[source].get(timeout=10)
                    break
                except queue.Empty:
                    if not processes[source].is_alive():
                        raise RuntimeError(f"the process that renders batch {step} has died") from None
            yield Batch(*batch), seconds
    finally:
        for process in processes:
            process.terminate()


def _produce(
    make: Callable[..., Batch], plan: Any, vocab: dict[str, int], first: int, stride: int, out, parent: int
) -> None:
    for step in range(first, plan.steps, stride):
        start = time.process_time()
        batch = tuple(make(plan, vocab, step))
        item = batch, time.process_time() - start
        while True:
            try:
                out.put(item, timeout=5)
                break
            except queue.Full:
                if os.getppid() != parent:  # the run was killed
                    return
