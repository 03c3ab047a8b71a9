"""The rendered world: deterministic, labelled truthfully, with texts that say what is in the images."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments import demo_world
from experiments.demo_world import batches, captions, ink, render, tokenizer
from experiments.demo_world.captions import Content
from jaxzs.clip import Tokenizer


@pytest.fixture(scope="module")
def vocab(tmp_path_factory) -> dict[str, int]:
    return tokenizer.write_tokenizer(tmp_path_factory.mktemp("tok"), captions.vocabulary(), context=32)


@pytest.mark.parametrize(
    "draw",
    [
        lambda seed: demo_world.digits(12, seed=seed)[0],
        lambda seed: demo_world.outline_shapes(12, seed=seed)[0],
        lambda seed: demo_world.corrupted("glyphs", 12, seed=seed)[0],
        lambda seed: demo_world.scenes(4, size=96, seed=seed).images,
    ],
)
def test_images_are_a_function_of_the_seed(draw):
    np.testing.assert_array_equal(draw(3), draw(3))
    assert (draw(3) != draw(4)).mean() > 0.5


def test_training_and_test_worlds_differ():
    assert (demo_world.digits(8)[0] != demo_world.digits(8, train=True)[0]).mean() > 0.5
    assert not set(ink.TRAIN_FONTS) & set(ink.TEST_FONTS)


def test_labels_are_balanced():
    for draw, classes in ((demo_world.digits, 10), (demo_world.shapes, 12), (demo_world.outline_shapes, 11)):
        images, labels = draw(classes * 2)
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(np.bincount(labels), np.full(classes, 2))


@pytest.mark.parametrize("font", [*ink.TRAIN_FONTS, *ink.TEST_FONTS])
def test_every_font_draws_every_glyph_differently(font):
    inks = [ink._font_glyph(font, glyph).resize((24, 24)) for glyph in captions.GLYPHS]
    inks = np.stack([np.asarray(ink, np.float32) for ink in inks]).reshape(36, -1)
    distance = np.abs(inks[:, None] - inks[None]).mean(-1)
    assert (distance + 1000 * np.eye(36)).min() > 4
    assert (inks.mean(1) > 20).all()


@pytest.mark.parametrize("glyph", captions.GLYPHS)
def test_strokes_have_ink_and_stay_inside(glyph):
    for seed in range(4):
        mask = ink.stroke_mask(glyph, 48, np.random.default_rng(seed))
        assert 0.01 < (mask > 127).mean() < 0.6
        border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        assert (border > 127).mean() < 0.5


def test_warp_moves_ink_but_keeps_it():
    rng = np.random.default_rng(0)
    masks = np.stack([ink.stroke_mask("8", 48, rng, 0.0)] * 2)
    warped = ink.warp(masks, rng, np.array([0.0, 2.0], np.float32))
    np.testing.assert_allclose(warped[0], masks[0], atol=1e-2)  # no displacement: only rounding at the border
    assert np.abs(warped[1] - masks[1]).mean() > 2
    assert 0.7 < warped[1].sum() / masks[1].sum() < 1.4


def test_masks_agree_with_tags_and_contents():
    found = demo_world.scenes(20, size=128, min_objects=3, max_objects=5)
    for tags, mask, content in zip(found.tags, found.masks, found.contents, strict=True):
        shapes = {shape for shape, _ in content.objects}
        assert set(np.flatnonzero(tags)) == shapes
        assert set(np.unique(mask)) <= {0} | {1 + s for s in shapes}
        assert len(set(np.unique(mask)) - {0}) == len(shapes)  # nothing is hidden


@pytest.mark.parametrize("size", [48, 96, 128])
def test_objects_have_their_colour(size):
    for seed in range(6):
        image, content, mask = render.scene(size, np.random.default_rng(seed), min_objects=1, max_objects=1)
        ((shape, colour),) = content.objects
        paint = np.median(image[mask == 1 + shape], axis=0)
        assert np.abs(paint - np.array(captions.COLOURS[captions.COLOUR_NAMES[colour]])).max() < 45


def test_a_caption_is_true_of_what_it_describes_only():
    image = Content(objects=((0, 3), (4, 1)), background=2)
    true = [Content(objects=((0, None),)), Content(objects=((4, 1),)), Content(background=2)]
    false = [Content(objects=((0, 1),)), Content(objects=((4, 3), (0, 1))), Content(glyph=3)]
    stated = np.stack([captions.facts(c) for c in true + false])
    assert batches._true_of([image], stated)[0].tolist() == [True] * 3 + [False] * 3


def test_attribute_swap_mostly_makes_a_false_caption():
    rng = np.random.default_rng(0)
    image = Content(objects=((0, 3), (4, 1)), background=2)
    swapped = [captions.attribute_swap(image, rng) for _ in range(50)]
    true = batches._true_of([image], np.stack([captions.facts(s) for s in swapped]))
    assert true.mean() < 0.2
    assert captions.attribute_swap(Content(glyph=1), rng) is None


@pytest.mark.parametrize("step", [0, 30, 60, 61, 62, 63, 64, 65, 66])
def test_batches(vocab, step):
    plan = batches.Plan(steps=100, batch=32, large_batch=8, filler_share=0.5, large_share=0.4)
    batch = batches.batch_at(plan, vocab, step)
    again = batches.batch_at(plan, vocab, step)
    for one, other in zip(batch, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not (batch.positive & batch.negative).any()
    assert not (batch.present & batch.absent).any()
    assert batch.positive.any(1).all()
    assert batch.negative.any(1).all()
    assert batch.present.any(1).all()
    given = batch.input_ids[:, 0] == vocab[tokenizer.START]
    assert not (batch.positive | batch.negative)[:, ~given].any()
    assert given[-len(batches.CANDIDATES) :].all()
    assert (batch.input_ids[:, -1] == vocab[tokenizer.END]).all()
    assert len(batch.input_ids) % 8 == 0


@pytest.mark.slow
def test_batches_from_another_process_are_the_same(vocab):
    plan = batches.Plan(steps=3, batch=8)
    stream = list(batches.rendered(plan, vocab, 1, workers=2))
    assert len(stream) == 2
    for step, (batch, seconds) in enumerate(stream, 1):
        assert seconds > 0
        for one, other in zip(batch, batches.batch_at(plan, vocab, step), strict=True):
            np.testing.assert_array_equal(one, other)


def test_every_word_is_one_token_and_unknown_words_fall_apart(vocab, tmp_path):
    tokenizer.write_tokenizer(tmp_path, captions.vocabulary(), context=32)
    written = Tokenizer.from_folder(tmp_path)
    for word in captions.vocabulary():
        assert written.encode(word) == [vocab[tokenizer.START], vocab[f"{word}</w>"], vocab[tokenizer.END]]
    assert len(written.encode("cat")) > 3
    assert vocab[tokenizer.END] == max(vocab.values()) == vocab[tokenizer.START] + 1
    rng = np.random.default_rng(0)
    for _ in range(50):
        text = captions.caption(Content(objects=((1, 2), (3, None)), background=4), rng)
        own = batches.tokens(captions.words_of(text), vocab, 32)
        assert written.encode(text) == own[: len(written.encode(text))].tolist()
    # The two files that older readers use give the same ids.
    (tmp_path / "tokenizer.json").unlink()
    older = Tokenizer.from_folder(tmp_path)
    assert older.encode("a photo of a cat.") == written.encode("a photo of a cat.")
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 32
