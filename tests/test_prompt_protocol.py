"""Selection, schedules, splits and partitions: exactly the draws and the lists of the original code."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_golden import load

from jaxzs.data import seen_unseen_split
from jaxzs.errors import DataError, LabelError
from jaxzs.prompt import protocol
from jaxzs.prompt.selection import ALL_IMAGES, select_pseudolabels, select_top_k


@pytest.mark.parametrize("case", ["easy", "collide", "fewer", "ties", "ascending", "descending"])
def test_boards(case):
    golden = load("pseudolabels")
    probabilities = golden[f"{case}_probs"]
    for k in golden[f"{case}_ks"].tolist():
        images, labels = select_pseudolabels(probabilities, k)
        np.testing.assert_array_equal(images, golden[f"{case}_k{k}_image"])
        np.testing.assert_array_equal(labels, golden[f"{case}_k{k}_label"])


def literal_boards(probabilities: np.ndarray, k: int) -> tuple[list[int], list[int]]:
    """The rule as the specification writes it, with lists and tuples only."""
    boards: list[list[tuple[float, int]]] = [[] for _ in probabilities[0]]

    def offer(c, p, image):
        if len(boards[c]) < k:
            boards[c].append((p, image))
        elif boards[c][-1][0] < p:
            boards[c] = sorted([*boards[c], (p, image)], reverse=True)[:k]
        else:
            return False
        return True

    for image, row in enumerate(probabilities):
        top = int(row.argmax())
        if not offer(top, row[top], image):
            for c in sorted(range(len(row)), key=lambda c: (row[c], c), reverse=True):
                if c != top:
                    offer(c, row[c], image)
    entries = [(image, c) for c, board in enumerate(boards) for _, image in board]
    return [image for image, _ in entries], [c for _, c in entries]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 60),
    c=st.integers(1, 6),
    k=st.integers(1, 12),
    levels=st.integers(2, 9),
)
def test_boards_follow_the_rule_word_by_word(seed, n, c, k, levels):
    # few levels: many ties
    probabilities = np.random.default_rng(seed).integers(0, levels, (n, c)).astype(np.float32) / levels
    images, labels = select_pseudolabels(probabilities, k)
    assert (images.tolist(), labels.tolist()) == literal_boards(probabilities, k)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 6))
def test_padding_is_never_selected(seed, k):
    rng = np.random.default_rng(seed)
    probabilities, mask = rng.random((20, 3), np.float32), rng.random(20) < 0.7
    mask[:2] = True
    for select in (select_pseudolabels, select_top_k):
        images, labels = select(probabilities, k, mask)
        rows, kept = select(probabilities[mask], k)
        np.testing.assert_array_equal(images, np.flatnonzero(mask)[rows])
        np.testing.assert_array_equal(labels, kept)


def test_true_top_k_does_not_depend_on_the_order():
    probabilities = np.random.default_rng(3).random((40, 5), np.float32)
    order = np.random.default_rng(4).permutation(40)
    images, labels = select_top_k(probabilities, 7)
    shuffled, again = select_top_k(probabilities[order], 7)
    np.testing.assert_array_equal(images, order[shuffled])
    np.testing.assert_array_equal(labels, again)
    for c in range(5):
        np.testing.assert_array_equal(images[labels == c], np.argsort(-probabilities[:, c])[:7])


def test_all_images_are_taken_under_their_best_class():
    probabilities = load("pseudolabels")["collide_probs"]
    images, labels = select_pseudolabels(probabilities, ALL_IMAGES)
    np.testing.assert_array_equal(images, np.arange(80))
    np.testing.assert_array_equal(labels, probabilities.argmax(1))


@pytest.mark.parametrize(
    ("probabilities", "k", "message"),
    [
        (np.ones((4, 2)), 0, "K is 0: the unlabelled pool is too small"),
        (np.ones((0, 2)), 1, "no unlabelled images"),
        (np.ones(4), 1, r"expected \[N,C\]"),
        (np.full((4, 2), np.nan), 1, "not finite"),
    ],
)
def test_unfit_probabilities(probabilities, k, message):
    for select in (select_pseudolabels, select_top_k):
        with pytest.raises(DataError, match=message):
            select(probabilities, k)


def test_growing_schedules():
    golden = load("protocol")
    for n, c, step, ks in zip(*(golden[f"sched_{x}"] for x in ("n", "c", "step", "k")), strict=True):
        iterations = 100 // int(step)
        assert protocol.growing_schedule(int(n), int(c), iterations) == ks[:iterations].tolist()


@settings(deadline=None)
@given(n=st.integers(1, 5000), c=st.integers(1, 120), i=st.integers(1, 20))
def test_growing_schedule_never_shrinks_nor_exceeds_the_pool(n, c, i):
    ks = protocol.growing_schedule(n, c, i)
    assert ks == sorted(ks)
    assert ks[-1] * c <= n


def test_partitions_and_splits():
    golden = load("protocol")
    for n in (7, 12, 32, 94, 163, 720):
        train, validation = protocol.partition(n)
        np.testing.assert_array_equal(train, golden[f"part_{n}"])
        assert sorted([*train, *validation]) == list(range(n))
    for c in (10, 45, 47, 100, 102):
        for seed in protocol.SPLIT_SEEDS:
            seen, unseen = seen_unseen_split(c, seed)
            np.testing.assert_array_equal(seen, golden[f"split_c{c}_s{seed}"])
            assert sorted([*seen, *unseen]) == list(range(c))
    chosen = protocol.few_labels(golden["few_labels"], 6)
    np.testing.assert_array_equal(chosen.reshape(6, 2), golden["few_choice"])
    np.testing.assert_allclose(protocol.epoch_learning_rates(0.1), golden["lr_150"], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("paradigm", ["ssl", "trzsl", "ul"])
def test_every_image_has_one_place_in_a_split(paradigm):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(6), 12))
    split = {
        "ssl": lambda: protocol.ssl_split(labels, 6),
        "trzsl": lambda: protocol.trzsl_split(labels, 6, seen=range(4)),
        "ul": lambda: protocol.ul_split(72, 6, labels),
    }[paradigm]()
    rows = np.concatenate([split.labelled, split.validation, split.unlabelled])
    np.testing.assert_array_equal(np.sort(rows), np.arange(72))
    assert len(split.labelled) == {"ssl": 9, "trzsl": 38, "ul": 0}[paradigm]
    if paradigm == "trzsl":
        assert set(labels[split.unlabelled]) == set(split.candidates) == {4, 5}


def test_unlabelled_order_of_ul_is_the_original_one_when_labels_are_there():
    labels = np.repeat(np.arange(10), 3)
    split = protocol.ul_split(30, 10, labels)
    assert sorted(split.unlabelled) == list(range(30))
    unseen = [1, 6, 7, 8]  # of split 500
    assert labels[split.unlabelled[:12]].tolist() == np.repeat(unseen, 3).tolist()
    np.testing.assert_array_equal(protocol.ul_split(30, 10).unlabelled, np.arange(30))


def test_unfit_labels_and_splits():
    labels = np.array([0, 0, 1, 1, 2])
    with pytest.raises(LabelError, match="class 2 has 1 images"):
        protocol.ssl_split(labels, 3)
    with pytest.raises(LabelError, match=r"label 2 of image 4 lies outside 0..1 \(1 such"):
        protocol.ssl_split(labels, 2)
    with pytest.raises(LabelError, match="class 3 has no image"):
        protocol.trzsl_split(labels, 4)
    with pytest.raises(LabelError, match="expected integers"):
        protocol.ssl_split(labels.astype(np.float32), 3)
    with pytest.raises(LabelError, match="cannot split 1 classes"):
        protocol.trzsl_split(labels * 0, 1)
    with pytest.raises(DataError, match="some but not all"):
        protocol.trzsl_split(labels, 3, seen=[0, 1, 2])
    split = protocol.ssl_split(np.array([0, 0, 0, 1, 1, 1]), 2)
    with pytest.raises(DataError, match="GRIP starts with K = 0: 2 unlabelled"):
        protocol.schedule("grip", split)
    with pytest.raises(DataError, match="no labels to train on"):
        protocol.schedule("labelled", protocol.ul_split(9, 3))
    with pytest.raises(DataError, match="less than epochs"):
        protocol.epoch_learning_rates(0.1, 5, 5)


def test_schedules_of_the_strategies():
    split = protocol.ssl_split(np.arange(60) % 3, 3)
    assert protocol.schedule("labelled", split) == [0]
    assert protocol.schedule("fpl", split) == [16]
    assert protocol.schedule("ifpl", split, 4, 3) == [4, 4, 4]
    assert protocol.schedule("grip", split, num_iterations=3) == [6, 12, 18]


def test_few_pseudolabels_are_all_used_and_many_are_split():
    images, labels = np.arange(30), np.arange(30) % 3
    np.testing.assert_array_equal(protocol.split_pseudolabels(images, labels, 9)[0], images)
    kept, _ = protocol.split_pseudolabels(images, labels, 10)
    np.testing.assert_array_equal(kept, protocol.partition(30)[0])
    assert len(kept) == 24
