"""Training batches of the art world, in the form that the demo checkpoint's training takes them.

Batch number k is a pure function of (plan, k). Text rows are the captions of the images, then one of each name.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import numpy as np

from experiments.art_world import scenes, sprites
from experiments.art_world.names import NAMES
from experiments.demo_world.batches import Batch, is_local, tokens, with_filler
from experiments.demo_world.captions import PLAIN_TEMPLATES, TEMPLATES, words_of


class Plan(NamedTuple):
    """What a run composes; shares and numbers as in the demo world's plan.

    scene_share: of the small images that hold several things once they are as hard as they get.
    """

    sprites: str = "jaxzs-out/art/sprites.npz"
    seed: int = 0
    steps: int = 7000
    batch: int = 128
    size: int = 48
    large_batch: int = 32
    large_size: int = 96
    ramp: float = 0.45
    local_from: float = 0.5
    large_share: float = 0.25
    scene_share: float = 0.3
    filler_share: float = 0.2
    short: int = 20
    long: int = 32


def vocabulary() -> list[str]:
    """Every word that a caption can contain, sorted.

    >>> {"cat", "photo"} <= set(vocabulary())
    True
    """
    texts = [*TEMPLATES, *PLAIN_TEMPLATES, *NAMES, "a cat, a dog and a cow."]
    return sorted({word for text in texts for word in words_of(text.replace("{}", " "))})


@cache
def trained_artists(path: str) -> scenes.Artists:
    """The artists whose drawings are trained on."""
    drawings = sprites.load(path)
    return scenes.Artists([drawings[name] for name in sprites.TRAINED])


def caption(things: list[int], rng: np.random.Generator, difficulty: float, max_words: int) -> str:
    """A caption that names up to three things: plain, or with growing difficulty in one of the 85 templates."""
    names = [NAMES[i] for i in things[:3]]
    phrase = names[0] if len(names) == 1 else ", a ".join(names[:-1]) + f" and a {names[-1]}"
    templates = TEMPLATES if rng.random() < 0.5 * difficulty else PLAIN_TEMPLATES
    filled = templates[int(rng.integers(len(templates)))].format(phrase)
    return filled if len(words_of(filled)) <= max_words else f"a {phrase}"


def batch_at(plan: Plan, vocab: Mapping[str, int], step: int) -> Batch:
    """Batch number `step` of a plan, the same whoever composes it."""
    rng = np.random.default_rng([3, plan.seed, step])
    artists = trained_artists(plan.sprites)
    difficulty = min(1.0, step / max(1.0, plan.ramp * plan.steps))
    large = is_local(plan, step) and rng.random() < plan.large_share
    filler = not large and rng.random() < plan.filler_share
    num, side = (plan.large_batch, plan.large_size) if large else (plan.batch, plan.size)
    images, stated, there = [], [], []
    for _ in range(num):
        if large or rng.random() < plan.scene_share * difficulty:
            least, most, widths = (3, 6, (0.25, 0.5)) if large else (2, 4, (0.35, 0.6))
            things = rng.choice(len(NAMES), int(rng.integers(least, most)), replace=False).tolist()
            image, found, _ = scenes.scene(artists, things, side, rng, widths)
            own = found
        else:
            own = [int(rng.integers(len(NAMES)))]
            image, found = scenes.single(artists, own[0], side, rng, difficulty)
        images.append(np.round(255 * image).astype(np.uint8))
        stated.append(own)
        there.append(found)
    say = lambda things: caption(things, rng, difficulty, plan.short - 2)  # noqa: E731
    texts = [say(own) for own in stated] + [say([i]) for i in range(len(NAMES))]
    length = plan.long if filler else plan.short
    words = int(rng.integers(1, 17)) if filler else 0
    ids = np.stack([tokens(with_filler(text, words, length - 2, rng), vocab, length) for text in texts])
    return Batch(np.stack(images), ids, *_belonging(stated, there))


def _belonging(stated: list[list[int]], there: list[list[int]]) -> tuple[np.ndarray, ...]:
    """What `Batch` says of captions and names: positive, negative [B,B+N], present, absent [B,N], all bool."""
    in_image = np.zeros((len(there), len(NAMES)), bool)
    in_text = np.zeros((len(stated), len(NAMES)), bool)
    for i, (own, things) in enumerate(zip(stated, there, strict=True)):
        in_text[i, own[:3]] = True
        in_image[i, things] = True
    said = np.concatenate([in_text, np.eye(len(NAMES), dtype=bool)])  # [B+N,N]
    true = (~in_image).astype(np.float32) @ said.T.astype(np.float32) == 0
    # Its own text belongs to an image, and so does every text that says the same.
    same = (in_text.astype(np.float32) @ (~said).T.astype(np.float32) == 0) & (
        (~in_text).astype(np.float32) @ said.T.astype(np.float32) == 0
    )
    return same, ~true & ~same, in_image, ~in_image
