"""Text to token ids: CLIP's lower-cased byte-level BPE, as HuggingFace's CLIPTokenizer does it.

Radford et al. 2021, section 2.4. Runs on the `tokenizers` library alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxzs.clip.files import read_json, read_text
from jaxzs.errors import CheckpointError, TextError

if TYPE_CHECKING:
    import tokenizers

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
DEFAULT_MAX_LENGTH = 77
# English contractions, letters, single digits, anything else: CLIP's split into words.
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Texts to ids, `tokenizer(texts)`: made by `Tokenizer.from_folder`. Holds no state between calls.

    `max_length` is the number of tokens the model can read, start and end token included.

    >>> tokenizer = jaxzs.load("demo").tokenizer
    >>> input_ids, attention_mask = tokenizer(["seven", "the digit seven"])
    >>> attention_mask.tolist()
    [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    >>> tokenizer.decode(input_ids[1])
    'the digit seven'
    """

    backend: tokenizers.Tokenizer
    max_length: int
    start_id: int
    end_id: int
    pad_id: int
    pad_left: bool = False
    cut_left: bool = False

    @classmethod
    def from_folder(
        cls, folder: str | Path, *, max_length: int | None = None, vocab_size: int | None = None
    ) -> Tokenizer:
        """From a model folder: `tokenizer.json`, else `vocab.json` with `merges.txt`.

        `tokenizer_config.json` and `special_tokens_map.json` give the special tokens, the padding and
        the longest text. `max_length` and `vocab_size`: of the model's text tower, which the tokenizer
        may not exceed. Raises `CheckpointError`, naming the file that is missing or malformed.
        """
        folder = Path(folder)
        settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the later one rules
            if (folder / name).is_file():
                settings.update(read_json(folder / name, CheckpointError))
        if (folder / "tokenizer.json").is_file():
            file = folder / "tokenizer.json"
            backend = _read_tokenizer_json(file)
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            file = folder / "vocab.json"
            backend = _read_vocab_and_merges(file, folder / "merges.txt", settings)
        else:
            raise CheckpointError(f"no tokenizer in {folder}: expected tokenizer.json, or vocab.json and merges.txt")
        return cls._from_backend(backend, settings, str(file), max_length, vocab_size)

    @classmethod
    def _from_backend(
        cls,
        backend: tokenizers.Tokenizer,
        settings: Mapping[str, Any],
        where: str,
        max_length: int | None,
        vocab_size: int | None,
    ) -> Tokenizer:
        from tokenizers.processors import RobertaProcessing

        # A tokenizer.json saved after use carries the padding and cutting of its last call.
        backend.no_padding()
        backend.no_truncation()
        start, end = _special(settings, "bos_token", START), _special(settings, "eos_token", END)
        pad = _special(settings, "pad_token", END)
        vocab = backend.get_vocab()
        if missing := [token for token in (start, end, pad) if token not in vocab]:
            raise CheckpointError(f"{where} has no token {', '.join(missing)}: not the tokenizer of a CLIP model")
        backend.post_processor = RobertaProcessing(
            (end, vocab[end]), (start, vocab[start]), trim_offsets=False, add_prefix_space=False
        )
        largest = max(vocab.values())
        if vocab_size is not None and largest >= vocab_size:
            raise CheckpointError(
                f"{where} gives ids up to {largest}, the model has {vocab_size} token embeddings: "
                "tokenizer and weights are not of the same model"
            )
        limit = max_length or DEFAULT_MAX_LENGTH
        stated = settings.get("model_max_length")
        if isinstance(stated, int) and 0 < stated < 2**31:  # HuggingFace writes 1e30 for "not known"
            limit = min(stated, max_length or stated)
        if limit < 3:
            raise CheckpointError(f"{where}: a text length of {limit} leaves no room for words")
        return cls(
            backend=backend,
            max_length=limit,
            start_id=vocab[start],
            end_id=vocab[end],
            pad_id=vocab[pad],
            pad_left=settings.get("padding_side") == "left",
            cut_left=settings.get("truncation_side") == "left",
        )

    def __call__(
        self, texts: str | Sequence[str], *, pad_to: int | None = None, truncate: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of texts: (input_ids [B, T] int32, attention_mask [B, T] int32, 0 on padding).

        `pad_to`: T; without it T is that of the longest text, which is cheapest and, the text tower
        being causal, gives equal features. `truncate`: cut texts that are too long, keeping the end
        token. Raises `TextError` for an empty text, one that is too long, and what is not a string.
        """
        listed = [texts] if isinstance(texts, str) else list(texts)
        if not listed:
            raise TextError("no texts were given")
        limit = self.max_length if pad_to is None else pad_to
        if not 3 <= limit <= self.max_length:
            raise TextError(f"pad_to must be 3 to {self.max_length} tokens, got {pad_to}")
        rows = []
        for index, text in enumerate(listed):
            row = self.encode(text)
            if len(row) <= 2:
                raise TextError(f"text {index} is empty: {text!r:.80}")
            if len(row) > limit and not truncate:
                raise TextError(
                    f"text {index} has {len(row)} tokens, at most {limit} fit (start and end token "
                    f"included): {text!r:.80}; shorten it or pass truncate=True"
                )
            rows.append(self._cut(row, limit))
        length = max(map(len, rows)) if pad_to is None else pad_to
        input_ids = np.full((len(rows), length), self.pad_id, np.int32)
        attention_mask = np.zeros((len(rows), length), np.int32)
        for index, row in enumerate(rows):
            place = slice(length - len(row), length) if self.pad_left else slice(0, len(row))
            input_ids[index, place] = row
            attention_mask[index, place] = 1
        return input_ids, attention_mask

    def _cut(self, row: list[int], limit: int) -> list[int]:
        if len(row) <= limit:
            return row
        words = row[1:-1]
        kept = words[len(words) - (limit - 2) :] if self.cut_left else words[: limit - 2]
        return [row[0], *kept, row[-1]]

    def encode(self, text: str) -> list[int]:
        """The ids of one text between start and end token, of any length, not padded."""
        return list(self._encode(text, special=True).ids)

    def word_tokens(self, text: str) -> list[tuple[str, list[int]]]:
        """The words of a text as the tokenizer splits it, each with its ids; no start or end token."""
        encoding = self._encode(text, special=False)
        words: list[tuple[int | None, list[int]]] = []
        for word, token in zip(encoding.word_ids, encoding.ids, strict=True):
            if words and words[-1][0] == word:
                words[-1][1].append(token)
            else:
                words.append((word, [token]))
        return [(self.decode(ids), ids) for _, ids in words]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, in lower case; start, end and padding tokens are left out."""
        numbers = [int(i) for i in ids]
        if bad := [i for i in numbers if i < 0 or self.backend.id_to_token(i) is None]:
            raise TextError(f"no such token ids: {bad[:5]}")
        text = self.backend.decode(numbers, skip_special_tokens=True)
        return str(text).replace(WORD_END, " ").strip()

    @property
    def fingerprint(self) -> str:
        """sha256 of the vocabulary, the rules and the lengths: equal for equal ids."""
        numbers = dataclasses.astuple(dataclasses.replace(self, backend=None))  # type: ignore[arg-type]
        return hashlib.sha256(f"{numbers}{self.backend.to_str()}".encode()).hexdigest()

    def _encode(self, text: str, special: bool) -> tokenizers.Encoding:
        if not isinstance(text, str):
            raise TextError(f"expected a string, got {type(text).__name__}: {text!r:.80}")
        try:
            text.encode()
        except UnicodeEncodeError as cause:  # lone surrogates
            raise TextError(f"not valid Unicode, it cannot be encoded: {text!r:.80}") from cause
        try:
            return self.backend.encode(text, add_special_tokens=special)
        except Exception as cause:  # e.g. a character missing in a vocabulary without unknown token
            raise TextError(f"the tokenizer cannot encode {text!r:.80}: {cause}") from cause


def _special(settings: Mapping[str, Any], key: str, default: str) -> str:
    """A special token as written in the settings: a string, or an object with `content`."""
    value = settings.get(key)
    value = value.get("content") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) else default


def _read_tokenizer_json(file: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend

    content = read_text(file, CheckpointError)
    return _or_malformed(file, lambda: Backend.from_str(content))


def _read_vocab_and_merges(vocab_file: Path, merges_file: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The `tokenizers` pipeline that HuggingFace builds for CLIP from the two older files."""
    vocab = read_json(vocab_file, CheckpointError)
    for token, number in vocab.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**31:
            raise CheckpointError(f"{vocab_file}: token {token!r:.40} has id {number!r:.40}")
    merges = _read_merges(merges_file)
    specials = [
        _special(settings, key, default)
        for key, default in (("bos_token", START), ("eos_token", END), ("unk_token", END))
    ]
    if missing := [token for token in specials if token not in vocab]:
        raise CheckpointError(f"{vocab_file} has no token {', '.join(missing)}")

    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    model = _or_malformed(
        merges_file,
        lambda: models.BPE(
            vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix=WORD_END, unk_token=specials[2]
        ),
    )
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in dict.fromkeys(specials)])
    return backend


def _read_merges(file: Path) -> list[tuple[str, str]]:
    merges = []
    # Only "\n" ends a line: some tokens hold what Python's splitlines takes for a line end.
    for number, line in enumerate(read_text(file, CheckpointError).split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line or line.startswith("#version"):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise CheckpointError(f"{file}, line {number}: expected two tokens, found {line!r:.80}")
        merges.append((pair[0], pair[1]))
    return merges


def _or_malformed(file: Path, build: Any) -> Any:
    """What `build()` returns; a failure inside the tokenizers library becomes a `CheckpointError`."""
    try:
        return build()
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as cause:  # a panic in Rust derives from BaseException
        raise CheckpointError(f"{file} is not a CLIP tokenizer: {cause!s:.200}") from cause
