"""Text to token ids, as the library that owns a checkpoint's layout gives them.

CLIP's lower-cased byte-level BPE (Radford et al. 2021, section 2.4), SigLIP's Unigram, Gemma's BPE, BERT's WordPiece,
on the `tokenizers` library.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxzs.clip import texts as text_rules
from jaxzs.clip.config import LEGACY_END, TextConfig
from jaxzs.clip.tokenizer_audit import Pipeline, rescued
from jaxzs.clip.tokenizer_files import (
    WORD_END,
    Style,
    add_tokens,
    build,
    has_tokenizer,
    packaged_pipeline,
    read_pipeline,
    read_settings,
    style_of,
)
from jaxzs.errors import CheckpointError, TextError

if TYPE_CHECKING:
    import tokenizers

DEFAULT_MAX_LENGTH = 77
LONGEST_TEXT = 100_000  # characters; nothing that a tower of 77 tokens could read
# reduction_mask chooses words of texts that are too long; here these are refused, or cut.
_OPEN_CLIP_OPTIONS = ("clean", "strip_sep_token", "reduction_mask")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Texts to ids, `tokenizer(texts)`: made by `Tokenizer.from_folder`. Holds no state between calls.

    max_length: the number of tokens that a text may have, start and end token included. context: the number that the
    model can read, to which texts can be padded. truncate: whether longer texts are cut, keeping the end token, instead
    of refused. Padding is behind the text whatever the files say: the towers count positions from the left.
    start_id: None where texts begin with their first word (SigLIP). clean: the rule of `jaxzs.clip.texts` for a text
    before it is split. fixed: texts are always padded to `context`, as a tower that is not causal reads the padding.

    >>> tokenizer = jaxzs.load("demo").tokenizer
    >>> input_ids, attention_mask = tokenizer(["seven", "the digit seven"])
    >>> attention_mask.tolist()
    [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    >>> tokenizer.decode(input_ids[1])
    'the digit seven'
    >>> import dataclasses
    >>> dataclasses.replace(tokenizer, truncate=True)(["the digit seven " * 20])[0].shape
    (1, 32)
    """

    backend: tokenizers.Tokenizer
    max_length: int
    context: int
    start_id: int | None
    end_id: int
    pad_id: int
    cut_left: bool = False
    truncate: bool = False
    clean: str = ""
    fixed: bool = False

    @classmethod
    def from_folder(
        cls, folder: str | Path, *, max_length: int | None = None, vocab_size: int | None = None
    ) -> Tokenizer:
        """From a model folder in HuggingFace's layout.

        `tokenizer.json`, `vocab.json` with `merges.txt`, `spiece.model` or `vocab.txt`.
        `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` give the kind, further tokens and the
        longest text. `max_length` and `vocab_size`: of the model's text tower, which the tokenizer may not exceed.
        Raises `CheckpointError`, naming the file that is missing or malformed.
        """
        folder = Path(folder)
        settings = read_settings(folder)
        style = style_of(folder, settings)
        if style.clean == "siglip" and settings.get("do_lower_case") is False:
            raise CheckpointError(f"{folder}: do_lower_case is false: only SigLIPs that read lower case are supported")
        file, pipeline = read_pipeline(folder, style)
        pipeline = add_tokens(folder, pipeline, settings, style)
        limit = _longest_text(settings.get("model_max_length"), max_length)
        made = cls._from_pipeline(file, pipeline, style, vocab_size, limit)
        return dataclasses.replace(
            made, context=max_length or limit, cut_left=settings.get("truncation_side") == "left"
        )

    @classmethod
    def from_open_clip(cls, folder: str | Path, text_cfg: Mapping[str, Any], text: TextConfig) -> Tokenizer:
        """As open_clip makes it from `text_cfg` of an `open_clip_config.json`: its rule for texts, its lengths.

        The files in the folder, else OpenAI's byte pairs, which this package brings. Raises `CheckpointError`.

        >>> tokenizer = clip.Tokenizer.from_open_clip(".", {}, clip.TextConfig())
        >>> tokenizer(["A photo of  a cat"])[0].tolist()
        [[49406, 320, 1125, 539, 320, 2368, 49407]]
        """
        folder, named = Path(folder), text_cfg.get("hf_tokenizer_name")
        options = text_cfg.get("tokenizer_kwargs") or {}
        where = folder / "open_clip_config.json"
        if not isinstance(options, Mapping):
            raise CheckpointError(f"{where}: tokenizer_kwargs is {options!r:.40}")
        rule = f"open_clip {options.get('clean', 'whitespace' if named else 'lower')}"
        # Without lower case open_clip's own byte pairs tell capitals apart; the pipeline of these files does not.
        if rule not in text_rules.RULES or (rule == "open_clip whitespace" and not named):
            raise CheckpointError(
                f"{where}: tokenizer_kwargs.clean is {rule[10:]!r:.40}, expected lower, "
                f"canonicalize{', whitespace' * bool(named)}"
            )
        if unknown := [key for key in options if key not in _OPEN_CLIP_OPTIONS]:
            known = ", ".join(_OPEN_CLIP_OPTIONS)
            raise CheckpointError(f"{where}: tokenizer_kwargs.{unknown[0]:.80} is not supported, only {known}")
        if mode := text_cfg.get("tokenizer_mode"):
            raise CheckpointError(f"{where}: tokenizer_mode {mode!r:.40} is not supported")
        settings = read_settings(folder)
        style = dataclasses.replace(style_of(folder, settings), clean=rule)
        if has_tokenizer(folder):
            file, pipeline = read_pipeline(folder, style)
        elif named:
            raise CheckpointError(
                f"{folder} has no tokenizer; open_clip_config.json names {named!r:.80}: put that one's files beside it"
            )
        else:
            file, pipeline = packaged_pipeline()
        pipeline = add_tokens(folder, pipeline, settings, style)
        made = cls._from_pipeline(file, pipeline, style, text.vocab_size, text.max_position_embeddings)
        if options.get("strip_sep_token"):  # CLIPA: 0 in its place
            return dataclasses.replace(made, end_id=0)
        return made if named else dataclasses.replace(made, pad_id=0)  # open_clip's own tokenizer fills with 0

    @classmethod
    def _from_pipeline(
        cls, file: Path, pipeline: Pipeline, style: Style, vocab_size: int | None, limit: int
    ) -> Tokenizer:
        backend = build(file, pipeline)
        vocab = backend.get_vocab()
        around = [token for token in (style.start, style.end) if token is not None]
        if missing := [token for token in around if token not in vocab]:
            raise CheckpointError(f"{file} has no token {', '.join(missing)}: not the tokenizer of a CLIP model")
        largest = max(vocab.values())
        if vocab_size is not None and largest >= vocab_size:
            raise CheckpointError(
                f"{file} gives ids up to {largest}, the model has {vocab_size} token embeddings: "
                "tokenizer and weights are not of the same model"
            )
        if limit < 3:  # start, one word, end
            raise CheckpointError(f"{file}: a text length of {limit} leaves no room for words")
        return cls(
            backend=backend,
            max_length=limit,
            context=limit,
            start_id=None if style.start is None else vocab[style.start],
            end_id=vocab[style.end],
            # Never read by a causal tower: any token will do where the stated one does not exist.
            pad_id=vocab.get(style.pad, vocab[style.end]),
            clean=style.clean,
            fixed=style.fixed,
        )

    @classmethod
    def for_tower(cls, folder: str | Path, text: TextConfig, open_clip: Mapping[str, Any] | None = None) -> Tokenizer:
        """The tokenizer in a folder, checked against the text tower that is to read its ids.

        open_clip: `text_cfg` of the `open_clip_config.json` where that layout is read, {} for OpenAI's own files.

        Raises `CheckpointError` too where the tower would pool a token that does not end a text: every text would then
        get the same feature, or that of a wrong place.

        >>> config = jaxzs.load("demo").config
        >>> clip.Tokenizer.for_tower(clip.find_checkpoint("demo"), config.text).end_id == config.text.eos_token_id
        True
        """
        if open_clip is not None:
            tokenizer = cls.from_open_clip(folder, open_clip, text)
        else:
            tokenizer = cls.from_folder(folder, max_length=text.max_position_embeddings, vocab_size=text.vocab_size)
        pooling, causal = getattr(text, "pooling", "end"), getattr(text, "causal", True)
        # Such a tower reads the padding: at another length it would see another text.
        tokenizer = dataclasses.replace(tokenizer, fixed=pooling == "last" or not causal)
        if tokenizer.fixed and _padding_side(read_settings(Path(folder))) == "left":
            raise CheckpointError(
                f"{folder}: tokenizer_config.json pads texts on the left (padding_side), and this text tower reads its "
                "padding: only padding behind the text is supported, which SigLIPs are trained with. Write right there "
                "if this one is, too"
            )
        if pooling == "last":
            return tokenizer
        # Every text would be pooled at its start, which knows nothing of the words behind it.
        if tokenizer.start_id == tokenizer.end_id:
            raise CheckpointError(f"{folder}: the tokenizer's start and end token are one, id {tokenizer.end_id}")
        legacy = pooling == "end" and text.eos_token_id == LEGACY_END != tokenizer.end_id
        if pooling == "highest" or legacy:
            # The highest id is pooled: padding must not be higher.
            return dataclasses.replace(tokenizer, pad_id=min(tokenizer.pad_id, tokenizer.end_id))
        if text.eos_token_id != tokenizer.end_id:
            raise CheckpointError(
                f"{folder}: config.json names {text.eos_token_id} as the end token (text_config, eos_token_id), the "
                f"tokenizer ends texts with {tokenizer.end_id}: the features of texts would be wrong. Correct the one "
                f"that is wrong; {LEGACY_END} in config.json stands for the highest id of a text"
            )
        return tokenizer

    def __call__(
        self, texts: str | Sequence[str], *, pad_to: int | None = None, truncate: bool | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of texts: (input_ids [B, T] int32, attention_mask [B, T] int32, 0 on padding).

        `pad_to`: T; without it T is that of the longest text, which is cheapest and, the text tower
        being causal, gives equal features. `truncate`: cut texts that are too long, keeping the end
        token; by default as the tokenizer's field says. Raises `TextError` for an empty text, one that is too long,
        and what is not a string.
        """
        listed = [texts] if isinstance(texts, str) else list(texts)
        if not listed:
            raise TextError("no texts were given")
        if self.fixed and pad_to not in (None, self.context):
            raise TextError(f"texts for this model are padded to {self.context} tokens, got pad_to={pad_to}")
        if pad_to is not None and not 3 <= pad_to <= self.context:
            raise TextError(f"pad_to must be 3 to {self.context} tokens, got {pad_to}")
        pad_to = self.context if self.fixed else pad_to
        limit = min(self.max_length, pad_to or self.max_length)
        truncate = self.truncate if truncate is None else truncate
        rows = [self._row(index, text, limit, truncate) for index, text in enumerate(listed)]
        length = max(map(len, rows)) if pad_to is None else pad_to
        input_ids = np.full((len(rows), length), self.pad_id, np.int32)  # [B,T]
        attention_mask = np.zeros((len(rows), length), np.int32)  # [B,T]
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = row
            attention_mask[index, : len(row)] = 1
        return input_ids, attention_mask

    def _row(self, index: int, text: str, limit: int, truncate: bool) -> list[int]:
        row = self.encode(text)
        if not text.strip() or len(row) <= 1 + (self.start_id is not None):
            raise TextError(f"text {index} is empty: {text!r:.80}")
        if len(row) > limit and not truncate:
            raise TextError(
                f"text {index} has {len(row)} tokens, at most {limit} fit (start and end token included): {text!r:.80}",
                python="shorten it, or have it cut: dataclasses.replace(model.tokenizer, truncate=True)",
                command="shorten it, or have it cut with --truncate",
            )
        return self._cut(row, limit)

    def _cut(self, row: list[int], limit: int) -> list[int]:
        if len(row) <= limit:
            return row
        first = int(self.start_id is not None)
        words, room = row[first:-1], limit - first - 1  # what stands around the words is kept
        return [*row[:first], *(words[len(words) - room :] if self.cut_left else words[:room]), row[-1]]

    def encode(self, text: str) -> list[int]:
        """The ids of one text between start and end token, of any length, not padded."""
        start = [] if self.start_id is None else [self.start_id]
        return [*start, *self._encode(text).ids, self.end_id]

    def word_tokens(self, text: str) -> list[tuple[str, list[int]]]:
        """The words of a text as the tokenizer splits it, each with its ids; no start or end token."""
        encoding = self._encode(text)
        words: list[tuple[int | None, list[int]]] = []
        for word, token in zip(encoding.word_ids, encoding.ids, strict=True):
            if words and words[-1][0] == word:  # another piece of the same word
                words[-1][1].append(token)
            else:
                words.append((word, [token]))
        return [(self.decode(ids), ids) for _, ids in words]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, in lower case; start, end and padding tokens are left out."""
        numbers = [int(i) for i in ids]
        if bad := [i for i in numbers if i < 0 or self.backend.id_to_token(i) is None]:
            raise TextError(f"no such token ids: {bad[:5]}")
        text = rescued(
            lambda: self.backend.decode(numbers, skip_special_tokens=True),
            TextError,
            f"the tokenizer cannot decode {numbers[:5]}",
        )
        return str(text).replace(WORD_END, " ").strip()

    @property
    def fingerprint(self) -> str:
        """sha256 of the vocabulary, the rules and the lengths: equal for equal ids."""
        numbers = dataclasses.astuple(dataclasses.replace(self, backend=None))  # type: ignore[arg-type]
        return hashlib.sha256(f"{numbers}{self.backend.to_str()}".encode()).hexdigest()

    def _encode(self, text: str) -> tokenizers.Encoding:
        if not isinstance(text, str):
            raise TextError(f"expected a string, got {type(text).__name__}: {text!r:.80}")
        if len(text) > LONGEST_TEXT:
            raise TextError(f"a text of {len(text):,} characters, at most {LONGEST_TEXT:,} are read: {text[:80]!r}")
        try:
            text.encode()
        except UnicodeEncodeError as cause:  # lone surrogates
            raise TextError(f"not valid Unicode, it cannot be encoded: {text!r:.80}") from cause
        text = text_rules.RULES[self.clean](text)
        # e.g. a character missing in a vocabulary without unknown token
        return rescued(
            lambda: self.backend.encode(text, add_special_tokens=False),
            TextError,
            f"the tokenizer cannot encode {text!r:.80}",
        )


def _padding_side(settings: Mapping[str, Any]) -> str:
    """As stated; of the one class whose library, transformers 5, knows another default, as there."""
    default = "left" if str(settings.get("tokenizer_class")).startswith("Siglip2") else "right"
    return str(settings.get("padding_side") or default)


def _longest_text(stated: Any, context: int | None) -> int:
    """Tokens of a text: as the files say, at most what the tower reads."""
    if isinstance(stated, int) and 0 < stated < 2**31:  # HuggingFace writes 1e30 for "not known"
        return min(stated, context or stated)
    return context or DEFAULT_MAX_LENGTH
