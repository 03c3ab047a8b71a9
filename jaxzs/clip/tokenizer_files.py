"""Tokenizer files on disk to one audited pipeline of the `tokenizers` library.

transformers reads what is in other formats: SentencePiece's protobuf, BERT's word list. Its AutoTokenizer is not asked:
it takes a pad token such as "!" inside a text for padding, appends a `<mask>` beyond Gemma's vocabulary, leaves out
SigLIP 2's lower-casing, reads SigLIP 1 only with sentencepiece installed, hands hostile tables to code that aborts, and
takes a second or more to import.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import gzip
import importlib.resources
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxzs.clip.files import read_bytes, read_json, read_text
from jaxzs.clip.tokenizer_audit import WORDS, Pipeline, audit, is_id, is_piece, is_token, no_clip, rescued
from jaxzs.errors import CheckpointError

if TYPE_CHECKING:
    import tokenizers

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
# In a `tokenizer_config.json` of `clip.save`, where transformers must read something else to give the same ids.
OWN_CLASS, OWN_PADDING = "jaxzs_class", "jaxzs_padding"
_WHOLE = ("tokenizer.json", "spiece.model", "vocab.txt")  # each of them is a tokenizer


def read_settings(folder: Path) -> dict[str, Any]:
    """`special_tokens_map.json` and `tokenizer_config.json` as one mapping; the later file rules."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings.update(read_json(folder / name, CheckpointError))
    return settings


def special(settings: Mapping[str, Any], key: str, default: str) -> str:
    """A special token as written in the settings: a string, or an object with `content`."""
    value = settings.get(key)
    value = value.get("content") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) else default


@dataclasses.dataclass(frozen=True)
class Style:
    """What the class of a tokenizer adds to its pipeline: the tokens around a text, and what is done to it before.

    start is None where texts begin with their first word. clean: a key of `jaxzs.clip.texts.RULES`. fixed: texts are
    padded to the full length, which the tower reads.
    """

    start: str | None = START
    end: str = END
    unknown: str = END
    pad: str = END
    clean: str = ""
    fixed: bool = False

    def stated(self, settings: Mapping[str, Any]) -> Style:
        """With the tokens that the settings name in their place."""
        start, end = ("cls_token", "sep_token") if self.start == "[CLS]" else ("bos_token", "eos_token")
        return dataclasses.replace(
            self,
            start=None if self.start is None else special(settings, start, self.start),
            end=special(settings, end, self.end),
            unknown=special(settings, "unk_token", self.unknown),
            pad=special(settings, OWN_PADDING, special(settings, "pad_token", self.pad)),
        )


_SIGLIP = Style(None, "</s>", "<unk>", "</s>", "siglip", fixed=True)  # padded with the end token
_GEMMA = Style(None, "<eos>", "<unk>", "<pad>", "lower", fixed=True)  # Gemma's class would put <bos> first
_XLM = Style("<s>", "</s>", "<unk>", "<pad>")
_STYLES = {
    "CLIP": Style(),
    "Siglip": _SIGLIP,
    "T5": _SIGLIP,  # what open_clip's conversions of SigLIP 1 call it
    "Siglip2": _GEMMA,
    "Gemma": _GEMMA,
    "Bert": Style("[CLS]", "[SEP]", "[UNK]", "[PAD]", fixed=True),  # CLIPA's
    "XLMRoberta": _XLM,  # MetaCLIP 2's
}


def style_of(folder: Path, settings: Mapping[str, Any]) -> Style:
    """By the class that `tokenizer_config.json` names, else by the files."""
    stated = settings.get(OWN_CLASS) or settings.get("tokenizer_class") or ""
    name = str(stated).removesuffix("Fast").removesuffix("Tokenizer")
    present = {file for file in ("spiece.model", "vocab.txt", "merges.txt") if (folder / file).is_file()}
    # bert-base-uncased's settings name no class; CLIP's byte pairs come without a list of words.
    kind = "Siglip" if "spiece.model" in present else "Bert" if present == {"vocab.txt"} else "CLIP"
    if special(settings, "eos_token", "") == _GEMMA.end:  # as CLIP's, SigLIP 2 would read a <bos> that it never saw
        kind = "Gemma"
    return _STYLES.get(name, _STYLES[kind]).stated(settings)


def read_pipeline(folder: Path, style: Style) -> tuple[Path, Pipeline]:
    """The file that rules and its pipeline as `tokenizer.json` writes it, not yet audited."""
    whole, spiece = folder / "tokenizer.json", folder / "spiece.model"
    if spiece.is_file() and (
        style.clean == "siglip" or not whole.is_file()
    ):  # as SiglipTokenizer, which has no fast one
        return spiece, _read_sentencepiece(spiece)
    if whole.is_file():
        return whole, read_json(whole, CheckpointError)
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if vocab.is_file() and merges.is_file():
        return vocab, _read_vocab_and_merges(vocab, merges, style)
    if (folder / "vocab.txt").is_file():
        return folder / "vocab.txt", _read_word_list(folder / "vocab.txt")
    raise CheckpointError(
        f"no tokenizer in {folder}: expected vocab.json with merges.txt, or one of {', '.join(_WHOLE)}"
    )


def has_tokenizer(folder: Path) -> bool:
    """Whether `read_pipeline` finds something to read."""
    return any((folder / name).is_file() for name in (*_WHOLE, "vocab.json"))


def build(file: Path, pipeline: Pipeline) -> tokenizers.Tokenizer:
    """The pipeline of `add_tokens`, audited, as a tokenizer of the library.

    Raises `CheckpointError` naming what does not belong to a tokenizer of these models.
    """
    from tokenizers import Tokenizer

    audit(file, pipeline)
    # Padding, cutting and the tokens around a text are this package's own; a file saved after use has those of its
    # last call.
    pipeline = {**pipeline, "truncation": None, "padding": None, "post_processor": None}
    # Written anew from what was audited: the file itself may hold a key twice, and readers differ in which they take.
    backend = rescued(
        lambda: Tokenizer.from_str(json.dumps(pipeline, ensure_ascii=False)), CheckpointError, no_clip(file)
    )
    for token in pipeline["added_tokens"]:
        if (number := backend.token_to_id(token["content"])) != token["id"]:
            raise CheckpointError(
                f"{file.parent}: the added token {token['content']!r:.80} is said to have id {token['id']}, "
                f"its place in the vocabulary is {number}"
            )
    return backend


# --- files of other formats -------------------------------------------------------------------------------------------


def _read_sentencepiece(file: Path) -> Pipeline:
    """SigLIP 1's Unigram model; the pieces in the order of their ids, as log probabilities."""
    content = read_bytes(file, CheckpointError)
    with _quiet_transformers():
        from transformers.convert_slow_tokenizer import import_protobuf

        model = rescued(lambda: import_protobuf().ModelProto.FromString(content), CheckpointError, no_clip(file))
    if model.trainer_spec.model_type != model.trainer_spec.UNIGRAM:
        raise CheckpointError(f"{no_clip(file)}: a SentencePiece model of another kind than Unigram")
    # SentencePiece's remove_extra_whitespaces: blanks at the ends go, runs of blanks become one.
    steps: list[dict[str, Any]] = [
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    ]
    if charsmap := model.normalizer_spec.precompiled_charsmap:
        # Before those two, as it makes blanks of other white space.
        steps.insert(0, {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
    # A blank belongs to the word behind it, and the first word gets one too: the pieces are "▁a", "▁photo".
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": metaspace,
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": model.trainer_spec.unk_id,
            "vocab": [[piece.piece, piece.score] for piece in model.pieces],
            "byte_fallback": model.trainer_spec.byte_fallback,
        },
    }


def _read_word_list(file: Path) -> Pipeline:
    """BERT's WordPiece (CLIPA), as transformers builds it from `vocab.txt` and its settings."""
    read_text(file, CheckpointError)  # what is no text at all is named here
    with _quiet_transformers():
        from transformers import BertTokenizerFast

        made = rescued(
            lambda: BertTokenizerFast.from_pretrained(str(file.parent), local_files_only=True),
            CheckpointError,
            no_clip(file),
        )
    return dict(json.loads(made.backend_tokenizer.to_str()))


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its notices that torch is missing and that ids are not those of its default configuration."""
    before = os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS")
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    try:
        from transformers.utils import logging

        level = logging.get_verbosity()
        logging.set_verbosity_error()
        yield
        logging.set_verbosity(level)
    finally:
        os.environ.pop("TRANSFORMERS_NO_ADVISORY_WARNINGS")
        if before is not None:
            os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = before


# --- the older files of CLIP ------------------------------------------------------------------------------------------


def packaged_pipeline() -> tuple[Path, Pipeline]:
    """OpenAI's own byte pairs, for checkpoints that bring no tokenizer; their ids are fixed by their order."""
    file = Path(str(importlib.resources.files("jaxzs") / "assets" / "bpe" / "merges.txt.gz"))
    merges = [(left, right) for left, right in map(str.split, gzip.decompress(file.read_bytes()).decode().splitlines())]
    # GPT-2's order of the bytes: those that print stand for themselves and come first.
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [*map(chr, printing), *(chr(256 + n) for n in range(256 - len(printing)))]
    # 256 letters, each again as the end of a word, 48,894 merges, start and end: OpenAI's 49,408 ids.
    tokens = [*letters, *(letter + WORD_END for letter in letters), *map("".join, merges), START, END]
    return file, clip_pipeline({token: number for number, token in enumerate(tokens)}, merges)


def _read_vocab_and_merges(vocab_file: Path, merges_file: Path, style: Style) -> Pipeline:
    """The pipeline that HuggingFace builds for CLIP from the two older files."""
    vocab = read_json(vocab_file, CheckpointError)
    for token, number in vocab.items():
        if not is_id(number):
            raise CheckpointError(f"{vocab_file}: token {token!r:.40} has id {number!r:.40}")
    needed = dict.fromkeys(token for token in (style.start, style.end, style.unknown) if token is not None)
    if missing := [token for token in needed if token not in vocab]:
        raise CheckpointError(f"{vocab_file} has no token {', '.join(missing)}")
    merges = _read_merges(merges_file, vocab)
    return clip_pipeline(vocab, merges, style.unknown)


def clip_pipeline(vocab: Mapping[str, int], merges: list[tuple[str, str]], unknown: str = END) -> Pipeline:
    """CLIP's lower-cased byte-level BPE (Radford et al. 2021, section 2.4) as `tokenizer.json` writes it."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                # Inverted: what matches is a word, what lies between is removed.
                {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": True},
                byte_level,
            ],
        },
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": WORD_END,  # GPT-2 marks the beginning of words instead
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": dict(vocab),
            "merges": [list(pair) for pair in merges],
        },
    }


def _read_merges(file: Path, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = []
    # Only "\n" ends a line: some tokens hold what Python's splitlines takes for a line end.
    for number, line in enumerate(read_text(file, CheckpointError).split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line or line.startswith("#version"):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise CheckpointError(f"{file}, line {number}: expected two tokens, found {line!r:.80}")
        if not {*pair, "".join(pair)} <= vocab.keys():
            raise CheckpointError(
                f"{file}, line {number}: {line!r:.80} takes or makes a token that is not in vocab.json"
            )
        merges.append((pair[0], pair[1]))
    return merges


# --- added tokens -----------------------------------------------------------------------------------------------------


def add_tokens(folder: Path, pipeline: Pipeline, settings: Mapping[str, Any], style: Style) -> Pipeline:
    """The pipeline with the added tokens of every file that may hold some, in the order of their ids.

    A pad token that is a word of the vocabulary is left out: Stable Diffusion 2 and LAION pad with "!".
    """
    model = pipeline.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocab, list):  # Unigram: pieces in the order of their ids
        vocab = {piece[0]: number for number, piece in enumerate(vocab) if is_piece(piece)}
    vocab = vocab if isinstance(vocab, Mapping) else {}
    word = style.pad + WORD_END in vocab
    specials = [style.start, style.end, style.unknown, *([] if word else [style.pad])]
    listed = [*_own_tokens(folder, pipeline), *_decoder_tokens(folder, settings), *_json_tokens(folder)]
    listed += [_added(token, vocab[token]) for token in specials if token in vocab and is_id(vocab[token])]
    merged: dict[str, dict[str, Any]] = {}
    for token in listed:
        first = merged.setdefault(token["content"], token)  # the file listed first rules the flags
        if first["id"] != token["id"]:
            raise CheckpointError(
                f"{folder}: the added token {token['content']!r:.80} has id {first['id']} in one file and "
                f"{token['id']} in another"
            )
    if word:
        merged.pop(style.pad, None)
    return {**pipeline, "added_tokens": sorted(merged.values(), key=lambda token: token["id"])}


def _added(content: Any, number: Any, **flags: Any) -> dict[str, Any]:
    token = {"id": number, "content": content}
    for flag in ("single_word", "lstrip", "rstrip", "normalized"):
        token[flag] = flags.get(flag, False)
    return {**token, "special": flags.get("special", True)}


def _own_tokens(folder: Path, pipeline: Pipeline) -> list[dict[str, Any]]:
    """Of `tokenizer.json` itself."""
    listed = pipeline.get("added_tokens") or []
    if not isinstance(listed, list):
        raise CheckpointError(f"{folder / 'tokenizer.json'}: added_tokens is not a list")
    return [_checked(folder / "tokenizer.json", token) for token in listed]


def _decoder_tokens(folder: Path, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Of `tokenizer_config.json`: {"added_tokens_decoder": {"49408": {"content": ...}}}."""
    decoder = settings.get("added_tokens_decoder")
    for number, token in decoder.items() if isinstance(decoder, Mapping) else ():
        flags = dict(token) if isinstance(token, Mapping) else {}
        content, place = flags.pop("content", None), int(number) if number.isdecimal() and len(number) < 10 else -1
        yield _checked(folder / "tokenizer_config.json", _added(content, place, **flags))


def _json_tokens(folder: Path) -> Iterator[dict[str, Any]]:
    """Of `added_tokens.json`: {"<word>": 49408}."""
    file = folder / "added_tokens.json"
    for content, number in (read_json(file, CheckpointError) if file.is_file() else {}).items():
        yield _checked(file, _added(content, number, special=False, normalized=True))  # as transformers adds words


def _checked(file: Path, token: Any) -> dict[str, Any]:
    if not is_token(token):
        content, number = (token.get(key) if isinstance(token, Mapping) else token for key in ("content", "id"))
        raise CheckpointError(f"{file}: not an added token: {content!r:.80} with id {number!r:.40}")
    return token
