"""Token ids against transformers' CLIPTokenizer: a small vocabulary made here, and the published one."""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxzs.clip.config import TextConfig
from jaxzs.clip.texts import RULES
from jaxzs.clip.tokenizer import Tokenizer
from jaxzs.clip.tokenizer_files import END, START
from jaxzs.errors import CheckpointError, DependencyError, TextError

TOKENS = Path(__file__).parent / "golden" / "tokens"
MERGES = ["t h", "c a", "ca t</w>", "th e</w>", "p h", "o t", "ph ot", "phot o</w>", "Ã ©</w>"]
TEXTS = ["a photo of the cat.", "Don't café ISN'T 42!", "the\n the\t  CAT", "naïve 日本 🐈", "<|x|>"]


def write_small(folder: Path, **config: Any) -> Path:
    """vocab.json and merges.txt in CLIP's layout: bytes, bytes at a word's end, merges, specials."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [pair.replace(" ", "") for pair in MERGES] + [START, END, "<pad>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    settings = {"model_max_length": 16, "tokenizer_class": "CLIPTokenizer", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("tokenizer") / "small")


@pytest.fixture(scope="module")
def small(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


def reference(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("needs transformers 5")
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


# Parity


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
@example("It's <|endoftext|> or <|startoftext|>")
@example("\u00e9 \u0301 \ufb01 \u0130 \u2003 \x85 \x1c \x00 \ufeff")
def test_ids_of_any_text_equal_the_reference(text: str) -> None:
    tokenizer, expected = both()
    assert tokenizer.encode(text) == expected(text)["input_ids"]


@functools.cache
def both() -> tuple[Tokenizer, Any]:
    with tempfile.TemporaryDirectory() as made:
        folder = write_small(Path(made) / "small")
        return Tokenizer.from_folder(folder), reference(folder)


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("truncation_side", ["right", "left"])
@pytest.mark.parametrize("pad_token", [END, "<pad>"])
def test_padding_and_cutting_equal_the_reference(
    padding_side: str, truncation_side: str, pad_token: str, tmp_path: Path
) -> None:
    settings = {"truncation_side": truncation_side, "pad_token": pad_token}
    folder = write_small(tmp_path / "small", **settings, padding_side=padding_side)
    # The towers count positions from the left: padding is behind the text whatever the file says.
    tokenizer, expected = Tokenizer.from_folder(folder), reference(write_small(tmp_path / "right", **settings))
    texts = [*TEXTS, "the cat " * 20]
    for ours, theirs in (
        ({"truncate": True}, {"padding": True}),
        ({"truncate": True, "pad_to": 16}, {"padding": "max_length"}),
        ({"truncate": True, "pad_to": 7}, {"padding": "max_length", "max_length": 7}),
    ):
        ids, mask = tokenizer(texts, **ours)
        wanted = expected(texts, truncation=True, return_tensors="np", **theirs)
        np.testing.assert_array_equal(ids, wanted["input_ids"])
        np.testing.assert_array_equal(mask, wanted["attention_mask"])
        assert ids.dtype == mask.dtype == np.int32


def test_decoding_equals_the_reference(folder: Path, small: Tokenizer) -> None:
    expected = reference(folder)
    for text in TEXTS:
        ids = small.encode(text)
        assert small.decode(ids) == expected.decode(ids, skip_special_tokens=True)
    assert small.decode(np.array(small.encode("The  CAT"))) == "the cat"


def test_published_vocabulary_gives_the_published_ids(shared: Path, tmp_path: Path) -> None:
    golden = shared / "golden" / "tokenizer"
    cases = json.loads((golden / "cases.json").read_text(encoding="utf-8"))
    assert len(cases) == 230
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(golden / name, tmp_path)
    from_json, from_parts = Tokenizer.from_folder(golden), Tokenizer.from_folder(tmp_path)
    for tokenizer in (from_json, from_parts):
        for case in cases:
            assert tokenizer.encode(case["text"]) == case["hf_fast_ids"], case["text"]
    assert from_json.fingerprint == from_parts.fingerprint
    assert (from_json.max_length, from_json.start_id, from_json.pad_id) == (77, 49406, 49407)


# Loading


def test_both_file_layouts_give_the_same_ids(folder: Path, small: Tokenizer, tmp_path: Path) -> None:
    small.backend.save(str(tmp_path / "tokenizer.json"))
    shutil.copy(folder / "tokenizer_config.json", tmp_path)
    other = Tokenizer.from_folder(tmp_path)
    for ours, theirs in zip(small(TEXTS, truncate=True), other(TEXTS, truncate=True), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert other.fingerprint == small.fingerprint


def test_padding_and_cutting_saved_in_the_file_do_not_leak(small: Tokenizer, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend

    used = Backend.from_str(small.backend.to_str())
    used.enable_truncation(5)
    used.enable_padding(length=50)
    used.save(str(tmp_path / "tokenizer.json"))
    assert '"max_length":5' in (tmp_path / "tokenizer.json").read_text().replace(" ", "")
    fresh = Tokenizer.from_folder(tmp_path)
    text = "a photo of the cat"
    assert fresh.encode(text) == small.encode(text)
    assert len(small.encode(text)) > 5


def test_start_and_end_are_set_even_if_the_file_forgot_them(small: Tokenizer, tmp_path: Path) -> None:
    content = json.loads(small.backend.to_str())
    content["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.from_folder(tmp_path).encode("cat") == small.encode("cat")


@pytest.mark.parametrize(
    ("stated", "given_length", "expected"),
    [(16, None, 16), (16, 12, 12), (16, 77, 16), (10**30, 32, 32), (10**30, None, 77), (None, 9, 9)],
)
def test_longest_text(stated: Any, given_length: Any, expected: int, tmp_path: Path) -> None:
    folder = write_small(tmp_path / "small", model_max_length=stated)
    assert Tokenizer.from_folder(folder, max_length=given_length).max_length == expected


def test_special_tokens_in_every_form(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "small", pad_token={"content": "<pad>", "special": True})
    pad = Tokenizer.from_folder(folder).pad_id
    vocab = json.loads((folder / "vocab.json").read_text())
    assert pad == vocab["<pad>"]
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").write_text('{"pad_token": "<pad>"}')
    assert Tokenizer.from_folder(folder).pad_id == pad
    (folder / "special_tokens_map.json").unlink()
    assert Tokenizer.from_folder(folder).pad_id == vocab[END]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"", "empty"),
        ("tokenizer.json", b"{}", "not a CLIP tokenizer"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "BPE"}}', "not a CLIP tokenizer"),
        ("tokenizer.json", b"[" * 100_000, "not valid JSON"),
        ("tokenizer.json", b"\xff\xfe\x00", "not UTF-8"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        ("tokenizer.json", b'{"added_tokens": [{"id": 0, "content": ""}]}', "not an added token: '' with id 0"),
        ("vocab.json", b"[1, 2]", "expected a JSON object"),
        ("vocab.json", b'{"a": "b"}', "token 'a' has id 'b'"),
        ("vocab.json", b'{"a": -1}', "token 'a' has id -1"),
        ("vocab.json", b'{"a": true}', "token 'a' has id True"),
        ("vocab.json", b'{"a": 1}', r"has no token <\|startoftext\|>, <\|endoftext\|>"),
        ("merges.txt", b"#version: 0.2\nt h\nthree of them\n", "line 3: expected two tokens"),
        ("merges.txt", b"#version: 0.2\nnot there\n", "line 2: .* a token that is not in vocab.json"),
        ("tokenizer_config.json", b"{", "not valid JSON"),
        ("tokenizer_config.json", b'{"model_max_length": 2}', "leaves no room"),
        ("tokenizer_config.json", b'{"eos_token": "[SEP]"}', r"has no token \[SEP\]"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {}}}', "not an added token: None with id -1"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"9": {"content": "t"}}}', "id 9, its place .* is"),
        ("added_tokens.json", b'{"<new>": -1}', "not an added token: '<new>' with id -1"),
        ("added_tokens.json", b'{"<new>": 600}', "'<new>' is said to have id 600, its place in the vocabulary is 524"),
    ],
)
def test_malformed_files_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    folder = write_small(tmp_path / "small")
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_folder(folder)
    assert str(folder) in str(caught.value)


def test_absent_files_and_foreign_vocabularies_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer in .* vocab\.json with merges\.txt"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(CheckpointError, match="ids up to 523, the model has 500 token embeddings"):
        Tokenizer.from_folder(folder, vocab_size=500)
    assert Tokenizer.from_folder(folder, vocab_size=524).max_length == 16


def test_mutated_files_give_ids_or_a_named_error(small: Tokenizer, tmp_path: Path) -> None:
    content = small.backend.to_str().encode()
    rng = np.random.default_rng(0)
    failures = 0
    for number in range(150):
        data = bytearray(content)
        place = int(rng.integers(0, len(data)))
        if number % 3 == 0:
            del data[place:]
        elif number % 3 == 1:
            for _ in range(3):
                data[int(rng.integers(0, len(data)))] = int(rng.integers(32, 127))
        else:
            del data[place : place + int(rng.integers(1, 30))]
        (tmp_path / "tokenizer.json").write_bytes(bytes(data))
        try:
            ids, _ = Tokenizer.from_folder(tmp_path, vocab_size=524)(TEXTS, truncate=True)
        except (CheckpointError, TextError):
            failures += 1
        else:
            assert ids.min() >= 0
            assert ids.max() < 524
    assert 50 < failures <= 150


@pytest.mark.parametrize("layout", ["vocab.json", "tokenizer.json"])
@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_of_every_file_equal_the_reference(
    layout: str, where: str, small: Tokenizer, tmp_path: Path
) -> None:
    new = {"content": "<new>", "special": False, "normalized": False, "lstrip": False, "rstrip": False}
    decoder = {"added_tokens_decoder": {"524": new}} if where == "tokenizer_config.json" else {}
    folder = write_small(tmp_path / "small", **decoder)
    if not decoder:
        (folder / where).write_text('{"<new>": 524}')
    if layout == "tokenizer.json":
        small.backend.save(str(folder / layout))
        (folder / "vocab.json").unlink()
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode("a <new>cat")
    assert ids[2] == 524
    assert ids == reference(folder)("a <new>cat")["input_ids"]
    with pytest.raises(CheckpointError, match="ids up to 524, the model has 524 token embeddings"):
        Tokenizer.from_folder(folder, vocab_size=524)


def test_a_pad_token_that_is_a_word_is_one_in_a_text(folder: Path, small: Tokenizer, tmp_path: Path) -> None:
    # Stable Diffusion 2 and LAION pad with "!"; open_clip, which trained them, reads "!" in a text as the word.
    parts = write_small(tmp_path / "parts", pad_token="!")
    whole = write_small(tmp_path / "whole", pad_token="!")
    content = json.loads(small.backend.to_str())
    bang = content["model"]["vocab"]["!"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append({"id": bang, "content": "!", **flags, "special": True})
    (whole / "tokenizer.json").write_text(json.dumps(content))
    for made in (parts, whole):
        tokenizer = Tokenizer.from_folder(made)
        assert tokenizer.pad_id == bang
        assert tokenizer.encode("the cat!") == small.encode("the cat!")
        assert bang not in tokenizer.encode("the cat!")
    assert Tokenizer.from_folder(parts).fingerprint == Tokenizer.from_folder(whole).fingerprint
    # One that does not exist is no reason to refuse: padding is never read.
    absent = Tokenizer.from_folder(write_small(tmp_path / "absent", pad_token="[PAD]"))
    assert absent.pad_id == small.end_id


BOMB = {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "o"}, "content": "oo"}] * 9}
NESTED = functools.reduce(lambda inner, _: {"type": "Sequence", "normalizers": [inner]}, range(90), {"type": "NFC"})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        # These abort the process, or end in a panic at the first text.
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAA="}}, "wrong length"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAAAAAAAAAAAAAA"}}, "wrong length"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": 5}}, "cannot be read"),
        # These do not end, or fill the memory.
        ({"normalizer": BOMB}, "no more characters"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}}, "no more characters"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 1000}}, "more than 16 parts"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKD"}] * 3}}, "NFKD occurs twice"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 100}}, "more than one character"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(.*)*x"}, "behavior": "Removed"}}, "rule for words"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"String": ""}, "behavior": "Removed"}}, "rule for words"),
        ({"model": {"type": "WordPiece", "vocab": {"a": 0}, "max_input_chars_per_word": 10**9}}, "words too long"),
        # These give other ids each time, or are of other models.
        ({"pre_tokenizer": {"type": "UnicodeScripts"}}, "'UnicodeScripts' is none of"),
        ({"decoder": {"type": "CTC"}}, "'CTC' is none of"),
        ({"decoder": 5}, "decoder 5 is none of"),
        ({"normalizer": {"type": ["NFC"]}}, "is none of"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "'WordLevel' is none of"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 0.5}}, "other ids each time"),
        ({"model": None}, "no model"),
    ],
)
def test_parts_that_no_clip_has_are_refused(changed: dict, message: str, small: Tokenizer, tmp_path: Path) -> None:
    content = {**json.loads(small.backend.to_str()), **changed}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"not a CLIP tokenizer: .*{message}"):
        Tokenizer.from_folder(tmp_path)


def test_nesting_and_repeated_keys_are_named_or_harmless(small: Tokenizer, tmp_path: Path) -> None:
    content = {**json.loads(small.backend.to_str()), "normalizer": NESTED}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="not a CLIP tokenizer"):
        Tokenizer.from_folder(tmp_path)
    # What was audited is what is used, also where a key stands twice.
    lying = '{"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAA="}, '
    (tmp_path / "tokenizer.json").write_text(lying + small.backend.to_str()[1:])
    assert Tokenizer.from_folder(tmp_path).encode("Cat") == small.encode("cat")


def charsmap(units: dict[int, int], texts: bytes, size: int = 512) -> dict[str, str]:
    trie = np.zeros(size, "<u4")
    trie[list(units)] = list(units.values())
    table = (4 * size).to_bytes(4, "little") + trie.tobytes() + texts
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


def test_tables_of_replacements_are_followed_before_they_are_used(small: Tokenizer, tmp_path: Path) -> None:
    place = 256 ^ ord("Z")  # of the unit for "Z", whose value lies at place 5
    good = {0: 256 << 10, place: ord("Z") | 1 << 8 | (place ^ 5) << 10, 5: 1 << 31}
    content = json.loads(small.backend.to_str())
    steps = content["normalizer"]["normalizers"]

    def encode(table: dict[str, str]) -> list[int]:
        changed = {**content, "normalizer": {"type": "Sequence", "normalizers": [table, *steps]}}
        (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
        return Tokenizer.from_folder(tmp_path).encode("catZ")

    assert encode(charsmap({}, b"")) == small.encode("catz")
    assert encode(charsmap(good, b"the\0")) == small.encode("catthe")
    for units, texts, message in (
        ({0: 4096 << 10}, b"", "reaches outside"),
        ({**good, 5: 1 << 31 | 9}, b"the\0", "points behind"),
        ({**good, 5: 1 << 31 | 1}, "é\0".encode(), "into a character"),
        ({**good, 5: 1 << 31}, b"a" * 500 + b"\0", "too long"),
        ({**good, 5: 1 << 31}, b"\xff\0", "cannot be read"),
    ):
        with pytest.raises(CheckpointError, match=message):
            encode(charsmap(units, texts))
    steps.insert(0, charsmap({}, b""))
    with pytest.raises(CheckpointError, match="Precompiled occurs twice"):
        encode(charsmap({}, b""))


# Other families: ids of the libraries that own them (tests/golden/tokens/ids.json says which)


@functools.cache
def published() -> dict[str, Any]:
    return json.loads((TOKENS / "ids.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", ["siglip", "gemma"])
def test_siglip_ids_equal_those_of_transformers(family: str) -> None:
    texts, ids = (published()[family][key] for key in ("texts", "ids"))
    text = TextConfig(vocab_size=137 if family == "siglip" else 422, max_position_embeddings=16)
    tokenizer = Tokenizer.from_folder(TOKENS / family, max_length=16, vocab_size=text.vocab_size)
    assert tokenizer.fixed
    kept = [index for index, content in enumerate(texts) if content]
    made, mask = tokenizer([texts[index] for index in kept], truncate=True)
    np.testing.assert_array_equal(made, np.array(ids)[kept])
    assert (mask.sum(1) == [1 + list(row).index(1) for row in np.array(ids)[kept]]).all()
    assert tokenizer.start_id is None
    assert tokenizer.decode(tokenizer.encode("A photo of a Cat")) == "a photo of a cat"
    for empty in ("", " \n", "!!!" if family == "siglip" else "\t"):
        with pytest.raises(TextError, match="text 0 is empty"):
            tokenizer([empty])
    with pytest.raises(TextError, match=r"padded to 16 tokens, got pad_to=12"):
        tokenizer(["cat"], pad_to=12)


def test_siglip_words_are_those_of_its_rule() -> None:
    tokenizer = Tokenizer.from_folder(TOKENS / "siglip", max_length=16)
    words = tokenizer.word_tokens("It's a Cat")
    assert [word for word, _ in words] == ["its", "a", "cat"]
    assert [token for _, ids in words for token in ids] == tokenizer.encode("It's a Cat")[:-1]


def test_siglip_files_in_the_wild_are_the_same_rules(shared: Path) -> None:
    folder = shared / "golden" / "families" / "siglip" / "hf_siglip"  # with SentencePiece's table of replacements
    tokenizer = Tokenizer.from_folder(folder, max_length=16, vocab_size=137)
    for text, ids in zip(published()["siglip"]["texts"], published()["siglip"]["ids"], strict=True):
        if text:
            assert tokenizer([text], truncate=True)[0].tolist() == [ids], text
    assert tokenizer.encode("\uff41\uff42\u00b2 \ufb01") == tokenizer.encode("ab2 fi")  # NFKC


def changed_copy(family: str, folder: Path, **settings: Any) -> Path:
    shutil.copytree(TOKENS / family, folder)
    file = folder / "tokenizer_config.json"
    values = (json.loads(file.read_text()) if file.is_file() else {}) | settings
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return folder


@pytest.mark.parametrize("name", [None, "PreTrainedTokenizerFast", "TokenizersBackend"])
def test_siglip_2_is_known_without_the_name_of_its_class(name: str | None, tmp_path: Path) -> None:
    """As a CLIP's, its texts began with a <bos> that it never saw, and kept their capitals."""
    folder = changed_copy("gemma", tmp_path / "gemma", tokenizer_class=name)
    same = Tokenizer.from_folder(TOKENS / "gemma", max_length=16)
    np.testing.assert_array_equal(Tokenizer.from_folder(folder, max_length=16)(["A Cat"])[0], same(["A Cat"])[0])


def test_texts_that_a_siglip_would_read_otherwise_are_refused(tmp_path: Path) -> None:
    reads_padding = TextConfig(vocab_size=422, max_position_embeddings=16, pooling="last", causal=False)
    for family in ("gemma", "siglip"):
        left = changed_copy(family, tmp_path / family, padding_side="left")
        with pytest.raises(CheckpointError, match="pads texts on the left"):
            Tokenizer.for_tower(left, reads_padding)
    unsaid = changed_copy("gemma", tmp_path / "unsaid", padding_side=None, tokenizer_class="Siglip2Tokenizer")
    with pytest.raises(CheckpointError, match="pads texts on the left"):  # the default of that class
        Tokenizer.for_tower(unsaid, reads_padding)
    cased = changed_copy("siglip", tmp_path / "cased", do_lower_case=False)
    with pytest.raises(CheckpointError, match="do_lower_case is false"):
        Tokenizer.from_folder(cased)


def test_open_clip_canonicalizes_for_siglip() -> None:
    pytest.importorskip("ftfy")
    config = {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP2", "tokenizer_kwargs": {"clean": "canonicalize"}}
    text = TextConfig(vocab_size=422, max_position_embeddings=16)
    tokenizer = Tokenizer.from_open_clip(TOKENS / "gemma", config, text)
    pairs = zip(published()["gemma"]["texts"], published()["gemma"]["ids_canonicalized"], strict=True)
    for content, ids in pairs:
        if content:
            assert tokenizer([content], truncate=True)[0].tolist() == [ids], content


def test_packaged_byte_pairs_give_the_ids_of_open_clip(tmp_path: Path) -> None:
    pytest.importorskip("ftfy")
    tokenizer = Tokenizer.for_tower(tmp_path, TextConfig(), open_clip={})
    simple = published()["simple"]
    for content, ids in zip(simple["texts"], simple["simple_77"], strict=True):
        if content:
            assert tokenizer([content], truncate=True)[0].tolist() == [ids], content
    assert tokenizer(["cat"], pad_to=77)[0][0].tolist() == [49406, 2368, 49407] + [0] * 74
    assert (tokenizer.start_id, tokenizer.end_id, tokenizer.context) == (49406, 49407, 77)


def test_packaged_byte_pairs_are_the_published_ones(shared: Path, tmp_path: Path) -> None:
    packaged = Tokenizer.for_tower(tmp_path, TextConfig(), open_clip={})
    assert packaged.backend.to_str() == Tokenizer.from_folder(shared / "golden" / "tokenizer").backend.to_str()


@pytest.mark.parametrize("rule", ["lower", "whitespace", "canonicalize"])
def test_texts_are_cleaned_as_open_clip_does(rule: str) -> None:
    pytest.importorskip("ftfy")
    simple = published()["simple"]
    assert [RULES[f"open_clip {rule}"](text) for text in simple["texts"]] == simple[rule]


def test_plain_texts_need_no_ftfy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert RULES["open_clip lower"]("A  Cat") == "a cat"
    for text in ("caf\u00e9", "Tom &amp; Jerry", "a\tcat"):
        with pytest.raises(DependencyError, match="pip install ftfy"):
            RULES["open_clip lower"](text)


def test_clipa_reads_words_of_bert_and_ends_with_zero(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "##s", "photo", "of", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    config = {"hf_tokenizer_name": "bert-base-uncased", "tokenizer_kwargs": {"strip_sep_token": True}}
    text = TextConfig(vocab_size=11, max_position_embeddings=10)
    tokenizer = Tokenizer.from_open_clip(tmp_path, config, text)
    assert tokenizer(["A photo of cats."])[0].tolist() == [[2, 5, 8, 9, 6, 7, 10, 0, 0, 0]]
    assert tokenizer(["a cat " * 9], truncate=True)[0].tolist() == [[2, 5, 6, 5, 6, 5, 6, 5, 6, 0]]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hf_tokenizer_name": "facebook/xlm-v-base"}, "names 'facebook/xlm-v-base': put that one's files beside it"),
        ({"tokenizer_kwargs": {"clean": "dirty"}}, "tokenizer_kwargs.clean is 'dirty'"),
        ({"tokenizer_kwargs": 5}, "tokenizer_kwargs is 5"),
        # open_clip's own byte pairs would then tell capitals apart: other ids without a word.
        ({"tokenizer_kwargs": {"clean": "whitespace"}}, "clean is 'whitespace', expected lower, canonicalize$"),
        ({"tokenizer_kwargs": {"additional_special_tokens": ["<x>"]}}, "additional_special_tokens is not supported"),
        ({"tokenizer_mode": "clips"}, "tokenizer_mode 'clips' is not supported"),
    ],
)
def test_unfit_open_clip_configurations_are_named(config: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_open_clip(tmp_path, config, TextConfig())


def test_packaged_byte_pairs_are_not_those_of_any_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="ids up to 49407, the model has 600 token embeddings"):
        Tokenizer.from_open_clip(tmp_path, {}, TextConfig(vocab_size=600))
    with pytest.raises(CheckpointError, match="no tokenizer in"):  # HuggingFace's layout brings its own
        Tokenizer.for_tower(tmp_path, TextConfig())


def test_damaged_sentencepiece_files_are_named(tmp_path: Path) -> None:
    content = (TOKENS / "siglip" / "spiece.model").read_bytes()
    rng = np.random.default_rng(0)
    named = 0
    for number in range(60):
        data = bytearray(content)
        place = int(rng.integers(0, len(data)))
        if number % 2:
            data[place] ^= 1 << int(rng.integers(0, 8))
        else:
            del data[place:]
        (tmp_path / "spiece.model").write_bytes(bytes(data))
        try:
            Tokenizer.from_folder(tmp_path, max_length=16, vocab_size=137)(["a photo", "é 日本"], truncate=True)
        except (CheckpointError, TextError):
            named += 1
    assert 20 < named <= 60


# The tower


def tower(**changed: Any) -> TextConfig:
    return dataclasses.replace(TextConfig(vocab_size=524, max_position_embeddings=40, eos_token_id=522), **changed)


def test_tokenizer_and_tower_must_end_texts_alike(folder: Path, tmp_path: Path) -> None:
    assert Tokenizer.for_tower(folder, tower()).end_id == 522
    with pytest.raises(CheckpointError, match=r"config\.json names 521 as the end token .* ends texts with 522"):
        Tokenizer.for_tower(folder, tower(eos_token_id=521))
    same = write_small(tmp_path / "same", bos_token=END)
    with pytest.raises(CheckpointError, match="start and end token are one, id 522"):
        Tokenizer.for_tower(same, tower())
    # The first configurations: the highest id is pooled, which padding must not be.
    padded = write_small(tmp_path / "padded", pad_token="<pad>")
    assert Tokenizer.for_tower(padded, tower()).pad_id == 523
    assert Tokenizer.for_tower(padded, tower(eos_token_id=2)).pad_id == 522


def test_a_limit_below_that_of_the_tower_only_limits_texts(folder: Path) -> None:
    tokenizer = Tokenizer.for_tower(folder, tower())
    assert (tokenizer.max_length, tokenizer.context) == (16, 40)
    assert tokenizer(["the cat"], pad_to=40)[0].shape == (1, 40)
    assert tokenizer(["the cat " * 20], pad_to=40, truncate=True)[1].sum() == 16
    with pytest.raises(TextError, match="at most 16 fit"):
        tokenizer(["the cat " * 20], pad_to=40)


# Calling


def test_texts_to_ids(small: Tokenizer) -> None:
    ids, mask = small(["the cat", "cat"])
    assert ids.shape == (2, 4)
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert ids[:, 0].tolist() == [small.start_id] * 2
    assert ids[1, 2:].tolist() == [small.end_id, small.pad_id]
    np.testing.assert_array_equal(small("the cat")[0], ids[:1])  # one text alone
    assert small(["cat"], pad_to=16)[0].shape == (1, 16)


def test_words_and_their_tokens(small: Tokenizer) -> None:
    words = small.word_tokens("The photo isn't 42, café")
    assert [word for word, _ in words] == ["the", "photo", "isn", "'t", "4", "2", ",", "café"]
    assert [token for _, ids in words for token in ids] == small.encode("The photo isn't 42, café")[1:-1]
    assert len(dict(words)["photo"]) == 1


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "no texts"),
        (["cat", ""], {}, "text 1 is empty"),
        ("  \n", {}, "text 0 is empty"),
        (["cat", "the cat " * 20], {}, r"text 1 has 42 tokens, at most 16 fit .*'the cat the"),
        (["the photo of the cat"], {"pad_to": 5}, "tokens, at most 5 fit"),
        (["cat"], {"pad_to": 17}, "pad_to must be 3 to 16"),
        (["cat"], {"pad_to": 0}, "pad_to must be 3 to 16"),
        ([b"cat"], {}, "expected a string, got bytes"),
        ([None], {}, "expected a string, got NoneType"),
        (["\ud800"], {}, "not valid Unicode"),
        (["a" * 100_001], {"truncate": True}, "100,001 characters, at most 100,000"),
    ],
)
def test_unfit_texts_are_named(small: Tokenizer, texts: Any, options: Any, message: str) -> None:
    with pytest.raises(TextError, match=message):
        small(texts, **options)


def test_cutting_is_asked_for_once_or_each_time(small: Tokenizer) -> None:
    cutting = dataclasses.replace(small, truncate=True)
    np.testing.assert_array_equal(cutting(["the cat " * 20])[0], small(["the cat " * 20], truncate=True)[0])
    with pytest.raises(TextError, match="at most 16 fit") as caught:
        cutting(["the cat " * 20], truncate=False)
    assert "truncate=True" in str(caught.value)
    assert "truncate=True" not in caught.value.shown(on_command_line=True)


def test_a_panic_inside_the_library_is_a_named_error(small: Tokenizer) -> None:
    class Panic(BaseException):
        pass

    class Backend:
        def encode(self, *_: Any, **__: Any) -> None:
            raise Panic("index out of bounds")

    with pytest.raises(TextError, match="cannot encode 'cat': index out of bounds"):
        dataclasses.replace(small, backend=Backend()).encode("cat")  # type: ignore[arg-type]


def test_unknown_ids_are_named(small: Tokenizer) -> None:
    with pytest.raises(TextError, match=r"no such token ids: \[99999, -1\]"):
        small.decode([small.start_id, 99999, -1])
