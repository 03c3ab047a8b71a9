"""A tokenizer in CLIP's format for a small vocabulary: every word of the world is one token.

Unknown words fall apart into pieces, down to single bytes, as with CLIP's own. The start and end tokens have the two
highest ids.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

from jaxzs.clip.tokenizer_audit import WORDS
from jaxzs.clip.tokenizer_files import END, START


def byte_alphabet() -> list[str]:
    """A printable character for each byte, in the order of CLIP's first 256 tokens (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def merge(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of one word: apply the earliest known merge until none is left."""
    pieces = list(pieces)
    while len(pieces) > 1:
        pairs = list(itertools.pairwise(pieces))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        merged, i = [], 0
        while i < len(pieces):
            if tuple(pieces[i : i + 2]) == best:
                merged.append(pieces[i] + pieces[i + 1])
                i += 2
            else:
                merged.append(pieces[i])
                i += 1
        pieces = merged
    return pieces


def byte_pairs(words: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges) in which each of `words` (ASCII, lower case) is a single token.

    A later merge never disturbs an earlier word, because encoding always applies the earliest merge first.

    >>> vocab, merges = byte_pairs(["red", "ring"])
    >>> "ring</w>" in vocab
    True
    """
    merges: list[tuple[str, str]] = []
    ranks: dict[tuple[str, str], int] = {}
    alphabet = byte_alphabet()
    tokens = alphabet + [c + "</w>" for c in alphabet]
    known = set(tokens)
    for word in words:
        pieces = merge([*word[:-1], word[-1] + "</w>"], ranks)
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            ranks[pair] = len(merges)
            merges.append(pair)
            if pair[0] + pair[1] not in known:
                tokens.append(pair[0] + pair[1])
                known.add(tokens[-1])
            pieces = [pair[0] + pair[1], *pieces[2:]]
    tokens += [START, END]
    return {token: i for i, token in enumerate(tokens)}, merges


def write_tokenizer(folder: str | Path, words: Iterable[str], *, context: int) -> dict[str, int]:
    """Write vocab.json, merges.txt, tokenizer.json and tokenizer_config.json; returns the vocabulary."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = byte_pairs(words)
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = [{"id": vocab[t], "content": t, **plain, "special": True} for t in (START, END)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": True}
    normalizers = [
        {"type": "NFC"},
        {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "},
        {"type": "Lowercase"},
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [END, vocab[END]],
            "cls": [START, vocab[START]],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": END,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }
    settings = {
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
        "model_max_length": context,
        "tokenizer_class": "CLIPTokenizer",
    }
    merges_text = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    write = lambda name, text: (folder / name).write_text(text, encoding="utf-8")  # noqa: E731
    write("tokenizer.json", json.dumps(tokenizer, ensure_ascii=False, indent=1))
    write("vocab.json", json.dumps(vocab, ensure_ascii=False))
    write("merges.txt", merges_text)
    write("tokenizer_config.json", json.dumps(settings, indent=1))
    return vocab
