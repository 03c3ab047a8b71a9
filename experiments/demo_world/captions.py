"""What the demo world can say about its images: names, templates, captions, and which caption is true of which image.

An image and a caption are both described by *facts*, a row of booleans: which glyph, which shapes, which coloured
shapes, which background. A caption is true of an image when every fact it states is a fact of the image.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from jaxzs.data import template_set

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
GLYPHS = tuple("0123456789") + LETTERS
SHAPES = (
    "circle", "square", "triangle", "diamond", "star", "cross", "heart", "crescent", "arrow",
    "hexagon", "bolt", "ring",
)  # fmt: skip
COLOURS = {
    "red": (214, 32, 38),
    "green": (34, 150, 52),
    "blue": (36, 72, 214),
    "yellow": (246, 220, 40),
    "orange": (245, 132, 26),
    "purple": (130, 44, 170),
    "pink": (248, 140, 190),
    "brown": (120, 72, 32),
    "black": (14, 14, 14),
    "white": (248, 248, 248),
}
COLOUR_NAMES = tuple(COLOURS)
BACKGROUNDS = ("plain", "striped", "checkered", "dotted", "shaded", "noisy")

# How each kind of thing is called. The first name is the one that stands among the candidates of every batch.
GLYPH_NAMES = tuple((f"digit {word}", f"number {word}", word, f"digit {i}") for i, word in enumerate(DIGITS)) + tuple(
    (f"letter {c}", f"capital letter {c}") for c in LETTERS
)
BACKGROUND_NAMES = tuple(f"{kind} background" for kind in BACKGROUNDS)

# Glyphs that nobody can tell apart when they are written by hand: never negatives of each other.
AMBIGUOUS = (("0", "O"), ("1", "I"), ("2", "Z"), ("5", "S"))

TEMPLATES = template_set("tagclip85")  # CLIP's 80, the paper's seven among them, and five for scenes
PLAIN_TEMPLATES = ("{}", "a {}", "the {}", "a photo of a {}", "a photo of the {}", "an image of a {}")
DIGIT_TEMPLATES = (
    "a photo of the digit {}.", "the digit {}", "a photo of the number {}.", "the number {}",
    "a drawing of the digit {}.", "a low resolution photo of the digit {}.", "a black and white photo of the digit {}.",
)  # fmt: skip

_WORD = re.compile(r"[a-z]+|[0-9]|[^\sa-z0-9]+")


def words_of(text: str) -> list[str]:
    """Split a text as CLIP's tokenizer does before its byte pairs: lower-case words, single digits, punctuation.

    >>> words_of("A close-up photo of the digit 7.")
    ['a', 'close', '-', 'up', 'photo', 'of', 'the', 'digit', '7', '.']
    """
    return _WORD.findall(text.lower())


def vocabulary() -> list[str]:
    """Every word that any caption of the world can contain, sorted.

    >>> "photo" in vocabulary() and "cat" not in vocabulary()
    True
    """
    texts = [*TEMPLATES, *PLAIN_TEMPLATES, *DIGIT_TEMPLATES, *SHAPES, *COLOURS, *BACKGROUND_NAMES, *DIGITS]
    texts += [name for names in GLYPH_NAMES for name in names]
    texts += ["0 1 2 3 4 5 6 7 8 9", "a circle and a star, on a plain background."]
    return sorted({word for text in texts for word in words_of(text.replace("{}", " "))})


FILLER_WORDS = tuple(sorted({w for t in TEMPLATES for w in words_of(t.replace("{}", " ")) if w.isalpha()}))

# Facts: glyphs, shapes, shape-colour pairs, backgrounds.
_SHAPE0 = len(GLYPHS)
_PAIR0 = _SHAPE0 + len(SHAPES)
_BACKGROUND0 = _PAIR0 + len(SHAPES) * len(COLOURS)
NUM_FACTS = _BACKGROUND0 + len(BACKGROUNDS)


@dataclass(frozen=True)
class Content:
    """What is in an image, or what a caption states; indices into GLYPHS, (SHAPES, COLOUR_NAMES) and BACKGROUNDS."""

    glyph: int | None = None
    objects: tuple[tuple[int, int | None], ...] = field(default=())
    background: int | None = None


def facts(content: Content, *, ambiguous: bool = False) -> np.ndarray:
    """Facts of an image or a caption, bool [NUM_FACTS]; `ambiguous` adds the glyphs it could be taken for.

    >>> caption, image = Content(objects=((0, None),)), Content(objects=((0, 3), (4, 1)), background=2)
    >>> bool((facts(caption) <= facts(image)).all())
    True
    """
    row = np.zeros(NUM_FACTS, bool)
    if content.glyph is not None:
        row[content.glyph] = True
        if ambiguous:
            for pair in AMBIGUOUS:
                if GLYPHS[content.glyph] in pair:
                    row[[GLYPHS.index(g) for g in pair]] = True
    for shape, colour in content.objects:
        row[_SHAPE0 + shape] = True
        if colour is not None:
            row[_PAIR0 + shape * len(COLOURS) + colour] = True
    if content.background is not None:
        row[_BACKGROUND0 + content.background] = True
    return row


def phrase(content: Content, rng: np.random.Generator | None = None) -> str:
    """Noun phrase for a content, without the first article: "digit seven", "red circle and a blue star".

    Without a generator the first name of a glyph is used.
    """
    if content.glyph is not None:
        names = GLYPH_NAMES[content.glyph]
        i = 0 if rng is None or rng.random() < 0.5 else int(rng.integers(len(names)))
        text = names[i]
    elif content.objects:
        names = [SHAPES[s] if c is None else f"{COLOUR_NAMES[c]} {SHAPES[s]}" for s, c in content.objects]
        text = names[0] if len(names) == 1 else ", a ".join(names[:-1]) + f" and a {names[-1]}"
    elif content.background is not None:
        return BACKGROUND_NAMES[content.background]
    else:
        raise ValueError("an empty content has no phrase: give a glyph, objects or a background")
    if content.background is not None:
        text += f" on a {BACKGROUND_NAMES[content.background]}"
    return text


def caption(content: Content, rng: np.random.Generator, *, difficulty: float = 1.0, max_words: int = 30) -> str:
    """A random caption of at most `max_words` words: plain, or with one of the 85 templates.

    With growing difficulty more names other than the first one are used, and templates, up to half of the captions.
    """
    text = phrase(content, rng if rng.random() < difficulty else None)
    templates = TEMPLATES if rng.random() < 0.5 * difficulty else PLAIN_TEMPLATES
    filled = templates[int(rng.integers(len(templates)))].format(text)
    return filled if len(words_of(filled)) <= max_words else f"a {text}"


def stated(image: Content, rng: np.random.Generator) -> Content:
    """What an image's caption states: up to three objects in random order, often without colours or background."""
    if image.glyph is not None:
        return Content(glyph=image.glyph)
    if not image.objects:
        return Content(background=image.background)
    order = rng.permutation(len(image.objects))[:3]
    coloured = rng.random() < 0.7
    objects = tuple((image.objects[i][0], image.objects[i][1] if coloured else None) for i in order)
    return Content(objects=objects, background=image.background if rng.random() < 0.35 else None)


def attribute_swap(content: Content, rng: np.random.Generator) -> Content | None:
    """A hard negative: two colours exchanged, or one shape or colour replaced; None without objects."""
    objects = list(content.objects)
    if not objects:
        return None
    if len(objects) > 1 and rng.random() < 0.5:  # exchange the colours of two objects
        i, j = rng.choice(len(objects), 2, replace=False)
        (si, ci), (sj, cj) = objects[i], objects[j]
        objects[i], objects[j] = (si, cj), (sj, ci)
    else:
        i = int(rng.integers(len(objects)))
        shape, colour = objects[i]
        if colour is None or rng.random() < 0.5:
            shape = int(rng.integers(len(SHAPES)))
        else:
            colour = int(rng.integers(len(COLOURS)))
        objects[i] = (shape, colour)
    return Content(objects=tuple(objects), background=content.background)
