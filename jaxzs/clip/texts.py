"""What is done to a text before it is split into tokens, by the rule of the library that owns a checkpoint's layout."""

from __future__ import annotations

import html
import string
from collections.abc import Callable

from jaxzs.errors import DependencyError

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)  # of ASCII alone, in both libraries


def lower(text: str) -> str:
    """SigLIP 2 was trained on lower-cased texts.

    >>> lower("A Cat!")
    'a cat!'
    """
    return text.lower()


def siglip(text: str) -> str:
    """transformers' SiglipTokenizer: lower case, no ASCII punctuation, single blanks.

    >>> siglip("It's  a snow_man.")
    'its a snowman'
    """
    return " ".join(text.lower().replace("▁", " ").translate(_NO_PUNCTUATION).split())  # SentencePiece's blank


def open_clip_whitespace(text: str) -> str:
    """open_clip's rule for other libraries' tokenizers: broken Unicode and HTML mended, single blanks.

    >>> open_clip_whitespace(" Tom  and Jerry")
    'Tom and Jerry'
    """
    return " ".join(html.unescape(html.unescape(_mended(text))).split())  # twice, as OpenAI's `basic_clean`


def open_clip_lower(text: str) -> str:
    """OpenAI's rule for CLIP's byte pairs: as above, and lower case.

    >>> open_clip_lower("Tom  and Jerry")
    'tom and jerry'
    """
    return open_clip_whitespace(text).lower()


def open_clip_canonicalize(text: str) -> str:
    """open_clip's rule for SigLIP: also without punctuation, but "_" parts words.

    >>> open_clip_canonicalize("It's a snow_man.")
    'its a snow man'
    """
    plain = open_clip_whitespace(text).replace("_", " ").translate(_NO_PUNCTUATION)
    return " ".join(plain.lower().split())


def _mended(text: str) -> str:
    """ftfy's repair of mangled encodings, curly quotes and the like; it changes nothing in plain ASCII."""
    if text.isascii() and text.isprintable() and "&" not in text:  # ftfy unescapes HTML too
        return text
    try:
        import ftfy
    except ImportError as cause:
        raise DependencyError(
            f"open_clip mends texts such as {text!r:.40} with ftfy, which is not installed: pip install ftfy"
        ) from cause
    return str(ftfy.fix_text(text))


# By the names of a tokenizer's `clean`; open_clip's are those of its own configurations.
RULES: dict[str, Callable[[str], str]] = {
    "": str,  # CLIP's own pipeline lowers, and mends white space
    "lower": lower,
    "siglip": siglip,
    "open_clip lower": open_clip_lower,
    "open_clip whitespace": open_clip_whitespace,
    "open_clip canonicalize": open_clip_canonicalize,
}
