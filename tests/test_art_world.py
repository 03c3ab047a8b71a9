"""The art world: what is composed of drawings, and what is said of it. Drawings here are discs of many colours."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from experiments.art_world import batches, scenes, sprites
from experiments.art_world import tests as test_images
from experiments.art_world.names import EVERYDAY, NAMES, THINGS
from experiments.demo_world.captions import words_of
from experiments.demo_world.tokenizer import byte_pairs


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """A file as `sprites` writes it: a disc of its own colour for each thing; one artist left some out."""
    y, x = np.mgrid[: sprites.SIZE, : sprites.SIZE] - sprites.SIZE / 2
    disc = (np.hypot(x, y) < sprites.SIZE / 2 - 3).astype(np.uint8)  # [S,S]
    colours = np.random.default_rng(0).integers(0, 256, (len(THINGS), 3)).astype(np.uint8)
    drawn = np.concatenate(
        [
            disc[None, ..., None] * colours[:, None, None],
            np.broadcast_to(255 * disc[None, ..., None], (len(THINGS), *disc.shape, 1)),
        ],
        axis=-1,
    )  # [C,S,S,4]
    some = drawn.copy()
    some[::3] = 0
    path = tmp_path_factory.mktemp("art") / "sprites.npz"
    artists = {"google": drawn, "twitter": drawn, "noto-v1": some, sprites.UNSEEN: drawn}
    np.savez_compressed(path, things=np.array(list(THINGS)), **artists)
    return str(path)


def test_every_word_of_every_caption_is_known():
    known = set(batches.vocabulary())
    rng = np.random.default_rng(0)
    for _ in range(300):
        things = rng.choice(len(NAMES), int(rng.integers(1, 5)), replace=False).tolist()
        assert set(words_of(batches.caption(things, rng, 1.0, 18))) <= known
    assert len(set(NAMES)) == len(NAMES) == len(THINGS)
    assert tuple(EVERYDAY) == tuple(THINGS)[: len(EVERYDAY)]


@pytest.mark.parametrize(("first", "side"), [(0, 48), (70, 48), (70, 96)])
def test_a_batch_says_what_is_in_its_images(drawings, first, side):
    vocab, _ = byte_pairs(batches.vocabulary())
    plan = batches.Plan(sprites=drawings, steps=100, batch=12, large_batch=4)
    made = ((step, batches.batch_at(plan, vocab, step)) for step in range(first, 100))
    step, found = next((step, batch) for step, batch in made if batch.pixels.shape[1] == side)
    assert all((a == b).all() for a, b in zip(found, batches.batch_at(plan, vocab, step), strict=True))
    B, N = len(found.pixels), len(NAMES)
    assert found.positive.shape == (B, B + N)
    assert found.positive[np.arange(B), np.arange(B)].all()  # its own caption
    assert not (found.positive & found.negative).any()
    assert (found.present == ~found.absent).all()
    names = found.positive[:, B:]
    assert (names.sum(1) <= 1).all()
    assert not (names & ~found.present).any()
    if step == 0:  # easy: one thing each, which its name says
        assert (names == found.present).all()
    if side == 96:  # scenes: no name says all
        assert (found.present.sum(1) >= 2).all()
        assert not names.any()
    assert found.input_ids.max() < len(vocab)


def test_batches_of_both_sizes_come(drawings):
    vocab, _ = byte_pairs(batches.vocabulary())
    plan = batches.Plan(sprites=drawings, steps=100, batch=4, large_batch=4)
    sides = {batches.batch_at(plan, vocab, step).pixels.shape[1] for step in range(60, 80)}
    assert sides == {48, 96}


def test_scenes_show_their_things_where_the_masks_are(drawings):
    artists = test_images.unseen(drawings)
    found = test_images.scenes(artists, 6)
    colours = sprites.load(drawings)[sprites.UNSEEN][:, 32, 32, :3]
    for image, mask, tags in zip(found.images, found.masks, found.tags, strict=True):
        assert set(np.unique(mask)) - {0} <= set(np.flatnonzero(tags) + 1)
        for thing in np.flatnonzero(tags):
            inside = image[mask == thing + 1]
            # Flat discs with soft rims: the middle of what is covered has the drawing's own colour.
            assert np.abs(np.median(inside, axis=0) - colours[thing]).max() <= 3
    assert found.names == tuple(EVERYDAY.values())


def test_a_thing_that_an_artist_left_out_is_drawn_by_another(drawings):
    stored = sprites.load(drawings)
    artists = scenes.Artists([stored["noto-v1"], stored["google"]])
    rng = np.random.default_rng(0)
    for thing in (0, 3, 6):  # which the first has not drawn
        image, _ = scenes.single(artists, thing, 48, rng, 0.0)
        assert np.abs(image[24, 24] - stored["google"][thing, 32, 32, :3] / 255).max() < 0.02


def test_things_grow_harder(drawings):
    artists = test_images.unseen(drawings)
    easy, labels = test_images.things(artists, 1, hardness=0.0)
    hard, _ = test_images.things(artists, 1, hardness=1.0)
    assert labels.tolist() == list(range(len(EVERYDAY)))
    corners = lambda images: images[:, [0, 0, -1, -1], [0, -1, 0, -1]].astype(float).std()  # noqa: E731
    assert corners(easy) < 5 < corners(hard)


def test_drawings_of_other_things_are_refused(tmp_path, drawings):
    with np.load(drawings) as stored:
        other = {**stored, "things": stored["things"][::-1]}
    np.savez_compressed(tmp_path / "other.npz", **other)
    with pytest.raises(SystemExit, match="draw it again"):
        sprites.load(str(tmp_path / "other.npz"))


def test_drawings_are_cut_and_enlarged():
    image = Image.new("RGBA", (100, 100))
    image.paste((255, 0, 0, 255), (10, 20, 40, 35))  # 30 x 15
    fitted = sprites.fitted(image)
    covered = np.argwhere(fitted[..., 3] > 128)
    assert covered.min(0).tolist() == [17, 2]
    assert covered.max(0).tolist() == [46, 61]


def test_packages_are_read_as_they_are_packed(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), (1, 2, 3, 255)).save(buffer, "PNG")
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as packed:
        member = tarfile.TarInfo("package/img/one.png")
        member.size = buffer.tell()
        buffer.seek(0)
        packed.addfile(member, buffer)
    package = sprites.Package(tmp_path / "a.tgz")
    assert "img/one.png" in package
    assert np.asarray(package.image("img/one.png"))[0, 0].tolist() == [1, 2, 3, 255]
