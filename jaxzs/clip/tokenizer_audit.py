"""The audit of a tokenizer's pipeline before the `tokenizers` library sees it: a file from outside is not believed."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from jaxzs.errors import CheckpointError, JaxzsError

Pipeline = dict[str, Any]
_T = TypeVar("_T")

_PLAIN_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# English contractions, letters, single digits, anything else: CLIP's split into words.
WORDS = rf"<\|startoftext\|>|<\|endoftext\|>|{_PLAIN_WORDS}"

# What the tokenizers of CLIP, SigLIP, Gemma, BERT and XLM are made of. Everything else is refused: other parts can take
# exponential time, and some abort the process on a table that lies.
_PARTS = {
    "normalizer": {
        "BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend", "Replace",
        "Strip", "StripAccents",
    },
    "pre_tokenizer": {"BertPreTokenizer", "ByteLevel", "Metaspace", "Split", "Whitespace", "WhitespaceSplit"},
    "decoder": {"BPEDecoder", "ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"},
    "model": {"BPE", "Unigram", "WordPiece"},
}  # fmt: skip
_NESTED = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
_MOST_PARTS = 16
_REPEATED = {"Replace", "Split", "Strip"}  # the others once: a table or bytes in a row multiply the text each time
_MOST_TOKENS = 2_000_000  # XLM-V, MetaCLIP 2's, has 901,629
_MOST_ADDED = 10_000
_LONGEST_TOKEN = 1_000  # characters
# One character, or one class of characters, at most repeated: such an expression takes linear time.
_LINEAR = re.compile(r"(\\s|\[(?:[^\[\]\\]|\\.)+\]|[^\\\[\](){}*+?|.^$])(\+|\{\d,?\})?", re.DOTALL)
_LONGEST_REPLACEMENT = 64  # bytes; the longest one of Unicode's NFKC has 33


def rescued(call: Callable[[], _T], error: type[JaxzsError], what: str) -> _T:
    """What `call()` returns; a failure inside the tokenizers library becomes an `error` that begins with `what`."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as cause:  # a panic in Rust derives from BaseException
        raise error(f"{what}: {cause!s:.200}") from cause


def no_clip(file: Path) -> str:
    """The beginning of every complaint about a file's content."""
    return f"{file} is not a CLIP tokenizer"


def audit(file: Path, pipeline: Pipeline) -> None:
    """Raise `CheckpointError` for a part that no tokenizer of these models has, or that could run away."""

    def refuse(what: str) -> NoReturn:
        raise CheckpointError(f"{no_clip(file)}: {what}")

    for kind, allowed in _PARTS.items():
        parts = list(_parts(pipeline.get(kind), _NESTED.get(kind, "")))
        if len(parts) > _MOST_PARTS:
            refuse(f"{kind} has more than {_MOST_PARTS} parts")
        met: set[str] = set()
        for part in parts:
            name = part.get("type") if isinstance(part, Mapping) else part
            if not (isinstance(name, str) and name in allowed):
                refuse(f"{kind} {name!r:.80} is none of {', '.join(sorted(allowed))}")
            if name in met - _REPEATED:
                refuse(f"{kind} {name} occurs twice")
            met.add(name)
            check = _model_fault if kind == "model" else _FAULTS.get(name, _no_fault)
            if (fault := check(part)) is not None:
                refuse(f"{kind} {name}: {fault}")
    if not isinstance(pipeline.get("model"), Mapping):
        refuse("it has no model")
    if len(pipeline["added_tokens"]) > _MOST_ADDED:
        refuse(f"it has more than {_MOST_ADDED:,} added tokens")


def _parts(value: Any, nested: str) -> Iterator[Any]:
    """The parts of a pipeline step, out of Sequences in Sequences; stops after one too many."""
    waiting, count = [value] if value is not None else [], 0
    while waiting and count <= _MOST_PARTS:
        part = waiting.pop(0)
        if isinstance(part, Mapping) and part.get("type") == "Sequence" and isinstance(part.get(nested), list):
            waiting = [*part[nested][: _MOST_PARTS + 1], *waiting]
            count += not part[nested]  # an empty Sequence counts too, or nesting would not end
        else:
            count += 1
            yield part


def _no_fault(part: Any) -> None:
    return None


def _replace_fault(part: Mapping[str, Any]) -> str | None:
    """A replacement may not grow a text, or a few dozen of them fill the memory."""
    pattern, content = part.get("pattern"), part.get("content")
    if not isinstance(pattern, Mapping) or len(pattern) != 1 or not isinstance(content, str):
        return "pattern and content expected"
    [(kind, text)] = pattern.items()
    if kind == "String" and isinstance(text, str) and len(text) > 0 and len(content) <= len(text):
        return None
    if kind == "Regex" and isinstance(text, str) and _LINEAR.fullmatch(text) and len(content) <= 1:
        return None
    return f"{text!r:.80} by {content!r:.40} is not a replacement of characters by no more characters"


def _split_fault(part: Mapping[str, Any]) -> str | None:
    pattern = part.get("pattern")
    if isinstance(pattern, Mapping) and len(pattern) == 1:
        [(kind, text)] = pattern.items()
        # Known expressions letter for letter: others may backtrack, and take exponential time on a short text.
        if (kind == "Regex" and text in (WORDS, _PLAIN_WORDS)) or (kind == "String" and isinstance(text, str) and text):
            return None
    return f"{pattern!r:.120} is not CLIP's rule for words"


def _prepend_fault(part: Mapping[str, Any]) -> str | None:
    text = part.get("prepend")
    return None if isinstance(text, str) and len(text) <= 1 else "more than one character"


def _model_fault(part: Mapping[str, Any]) -> str | None:
    vocab = part.get("vocab")
    if not isinstance(vocab, (dict, list)) or not 0 < len(vocab) <= _MOST_TOKENS:
        return f"a vocabulary of 1 to {_MOST_TOKENS:,} tokens expected"
    if part.get("dropout"):
        return "dropout would give other ids each time"
    longest = part.get("max_input_chars_per_word", 100)
    return None if isinstance(longest, int) and longest <= _LONGEST_TOKEN else "words too long"


def _precompiled_fault(part: Mapping[str, Any]) -> str | None:
    """SentencePiece's table of replacements: a length, a double-array trie of uint32, zero-ended UTF-8 texts.

    The library follows it without checks, so every step that the trie can take must stay inside (Aoe 1989; the units
    are those of darts-clone), and every leaf must point to the start of a short text.
    """
    try:
        table = base64.b64decode(part["precompiled_charsmap"], validate=True)
        size = int.from_bytes(table[:4], "little")
        if not table or size % 1024 or not 0 < size <= len(table) - 4:  # a block has 256 units of 4 bytes
            return "its table has a wrong length"
        texts = table[4 + size :]
        texts.decode("utf-8")
    except (KeyError, TypeError, ValueError) as cause:
        return f"its table cannot be read ({cause!s:.80})"
    units = np.frombuffer(table, "<u4", size // 4, offset=4)
    leaf = units >> 31 == 1  # the unit holds a value and has no children
    offsets = (units >> 10) << ((units & 0x200) >> 6)  # darts-clone: bit 9 shifts far offsets by 8 more
    # Blocks have 256 units: a place inside the array stays there whatever byte is read next.
    if (((np.arange(len(units), dtype=np.uint32) ^ offsets) >= len(units)) & ~leaf).any():
        return "its trie reaches outside"
    starts = units[leaf] & 0x7FFFFFFF  # where in the texts each replacement begins
    if len(starts) and starts.max() >= len(texts):
        return "its trie points behind the texts"
    bytes_ = np.frombuffer(texts, np.uint8)
    if len(starts) and ((bytes_[starts] & 0xC0) == 0x80).any():  # a continuation byte of UTF-8
        return "its trie points into a character"
    ends = np.flatnonzero(bytes_ == 0)  # every text is ended by a zero
    if len(bytes_) and (not len(ends) or np.diff(ends, prepend=-1, append=len(bytes_)).max() > _LONGEST_REPLACEMENT):
        return "its texts are too long"
    return None


_FAULTS: dict[str, Callable[[Any], str | None]] = {
    "Replace": _replace_fault,
    "Split": _split_fault,
    "Prepend": _prepend_fault,
    "Precompiled": _precompiled_fault,
}


def is_token(value: Any) -> bool:
    """Whether an entry of added_tokens has a text, not too long, and an id."""
    text = value.get("content") if isinstance(value, Mapping) else None
    return isinstance(text, str) and 0 < len(text) <= _LONGEST_TOKEN and is_id(value.get("id"))


def is_piece(value: Any) -> bool:
    """Whether an entry of a Unigram vocabulary is a text with a number."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def is_id(value: Any) -> bool:
    """Whether a value can be a token's id."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31  # True is an int in Python
