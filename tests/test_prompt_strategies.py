"""FPL, IFPL and GRIP: whole reference runs, resuming, several runs at once, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prompt_golden import MODALITIES, assert_near, checkpoint, load, nhwc, prompts_of

from jaxzs import clip, parallel
from jaxzs.errors import DataError, LabelError
from jaxzs.prompt import modality, protocol, resuming, strategies, training

# Whole runs: 80 to 116 steps in four trainings. An independent float32 implementation stays within 1.2e-4.
WHOLE_RUN = 5e-3


def prepared(name: str):
    """(modality, frozen, images [72,...], config, true labels) of the reference images."""
    params, config = checkpoint()
    encode = lambda ids: clip.encode_text(params, jnp.asarray(ids, jnp.int32), config)  # noqa: E731
    template, ids = load("zeroshot"), load(f"loss_grad_{name}")["token_ids"]
    frozen = modality.Frozen(
        params, jnp.asarray(ids, jnp.int32), encode(template["token_ids"]), encode(template["pseudolabel_token_ids"])
    )
    data = load("images")
    images = MODALITIES[name].constant_images(params, nhwc(data["images"]), config)
    return MODALITIES[name], frozen, images, config, data["labels"]


def reference_split(golden, paradigm: str) -> protocol.Split:
    seen = int(golden["seen_classes"]) if paradigm == "trzsl" else 6
    return protocol.Split(
        paradigm,
        6,
        golden["labeled_train"] if paradigm != "ul" else np.zeros(0, np.int64),
        golden["labeled_val"],
        golden["unlabeled"],
        np.arange(seen),
        np.arange(seen, 6) if paradigm == "trzsl" else np.arange(6),
    )


def reference_order(golden, split: protocol.Split):
    """The recorded order of images and labels, as positions in each iteration's training list."""
    epochs = int(golden["epochs"])
    sizes = np.split(golden["order_batch_sizes"], np.cumsum(golden["order_batches_per_epoch"])[:-1])
    ends = np.cumsum([own.sum() for own in sizes])

    def order(iteration, run, epoch, length):
        name = "clip_sel" if iteration == 0 else f"sel{iteration}"
        k = int(golden["k_per_iter"][iteration])
        rows, labels = protocol.split_pseudolabels(golden[f"{name}_image"], golden[f"{name}_label"], k)
        own = golden["true_labels"][split.labelled]
        listed = list(zip([*rows, *split.labelled], [*labels, *own], strict=True))
        end = ends[iteration * epochs + epoch]
        part = slice(end - length, end)
        seen = zip(golden["order_image"][part], golden["order_label"][part], strict=True)
        return np.array([listed.index(pair) for pair in seen])

    return order


@pytest.mark.parametrize(
    ("file", "strategy", "reinit"),
    [
        ("text_ssl_fpl", "fpl", "warm"),
        ("text_ssl_iterative", "ifpl", "warm"),
        ("text_ssl_grip", "grip", "official"),  # a textual prompt goes on from where it ended
        ("text_trzsl_grip", "grip", "warm"),
        ("text_ul_grip", "grip", "warm"),
        ("image_ssl_grip", "grip", "warm"),
        ("image_ssl_gripreset", "grip", "official"),
        ("multi_ssl_fpl", "fpl", "official"),
    ],
)
def test_reference_run(file, strategy, reinit):
    golden = load(f"e2e_{file}")
    name, paradigm, _ = file.split("_")
    prompt, frozen, images, config, labels = prepared(name)
    np.testing.assert_array_equal(labels, golden["true_labels"])
    split = reference_split(golden, paradigm)
    epochs, iterations = int(golden["epochs"]), int(golden["n_iter"])
    optimisation = training.Optimisation(
        float(golden["lr"]), epochs, int(golden["warmup_epochs"]), 8, steps_per_chunk=16
    )
    k = int(golden["k_per_iter"][0])
    plan = strategies.Plan(strategy, k, iterations, reinit=reinit, optimisation=optimisation)
    assert protocol.schedule(strategy, split, k, iterations) == golden["k_per_iter"].tolist()
    first = {key: value[0] for key, value in golden.items() if key.startswith("start.")}
    starts, records = [], []
    fitted = strategies.fit(
        prompt,
        frozen,
        images,
        [split],
        config,
        plan,
        labels=labels,
        initial=jax.tree.map(lambda x: x[None], prompts_of(first, "start.")),
        order=reference_order(golden, split),
        on_record=records.append,
        on_progress=starts.append,
    )
    assert_near(jax.tree.map(lambda x: x[0], fitted.prompts), prompts_of(golden, "end."), WHOLE_RUN)
    per_iteration = np.split(golden["losses"], np.cumsum(golden["order_batches_per_epoch"])[:-1])
    for i, record in enumerate(records):
        last_epoch = per_iteration[(i + 1) * epochs - 1]
        assert record.loss[0] == pytest.approx(last_epoch.mean(), rel=WHOLE_RUN)
        assert record.k == [golden["k_per_iter"][i]]
    name = "clip_sel" if iterations == 1 else f"sel{iterations - 1}"
    np.testing.assert_array_equal(fitted.selections[0][0], golden[f"{name}_image"])
    np.testing.assert_array_equal(fitted.selections[0][1], golden[f"{name}_label"])
    if iterations > 1:  # the selection that the original makes at the end, and does not use
        n, c = len(split.unlabelled), len(split.candidates)
        k = k if strategy == "ifpl" else min(5 * (n // 4) // c, n // c)
        logits = training.score(prompt, fitted.prompts, frozen, images, config)[0]
        rows, pseudo = strategies.select_for(logits, split, k)
        np.testing.assert_array_equal(rows, golden["sel4_image"])
        np.testing.assert_array_equal(pseudo, golden["sel4_label"])


def small_plan(strategy="grip", **options) -> strategies.Plan:
    return strategies.Plan(
        strategy, 3, 2, optimisation=training.Optimisation(0.05, 4, 1, 8, steps_per_chunk=16), **options
    )


def test_a_killed_fit_goes_on_where_it_was(tmp_path):
    prompt, frozen, images, config, labels = prepared("text")
    splits = [protocol.ssl_split(labels, 6)]
    settings = {"labels": labels, "seeds": (1, 2), "test": (images, labels)}
    whole = strategies.fit(prompt, frozen, images, splits, config, small_plan(), **settings)
    for stop_after in (1, 2, 3):
        path, chunks = tmp_path / f"{stop_after}.safetensors", []

        def interrupt(progress, chunks=chunks, stop_after=stop_after):
            chunks.append(progress)
            if len(chunks) == stop_after:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            strategies.fit(
                prompt, frozen, images, splits, config, small_plan(), resume=path, on_progress=interrupt, **settings
            )
        resumed = strategies.fit(
            prompt, frozen, images, splits, config, small_plan(), resume=path, on_progress=chunks.append, **settings
        )
        assert len(chunks) == 4  # two iterations of two chunks, none twice
        jax.tree.map(np.testing.assert_array_equal, resumed.prompts, whole.prompts)
        jax.tree.map(np.testing.assert_array_equal, resumed.selections, whole.selections)
        assert [r.test for r in resumed.records] == [r.test for r in whole.records]
        assert [r.loss for r in resumed.records] == [r.loss for r in whole.records]
        assert [p.name for p in tmp_path.iterdir() if ".part" in p.name] == []
    finished = strategies.fit(prompt, frozen, images, splits, config, small_plan(), resume=path, **settings)
    jax.tree.map(np.testing.assert_array_equal, finished.prompts, whole.prompts)
    with pytest.raises(DataError, match="not the state of this fit"):
        strategies.fit(prompt, frozen, images, splits, config, small_plan("ifpl"), resume=path, **settings)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match="damaged"):
        resuming.read_state(path, "")


def test_runs_of_different_seeds_and_splits_equal_those_alone():
    prompt, frozen, images, config, labels = prepared("text")
    splits = [protocol.trzsl_split(labels, 6, seed) for seed in (500, 0)]
    plan = strategies.Plan("grip", iterations=2, optimisation=small_plan().optimisation)
    together = strategies.fit(
        prompt, frozen, images, splits, config, plan, labels=labels, seeds=(3, 4), test=(images, labels)
    )
    assert together.records[0].test[0].harmonic_mean is not None
    for r in range(2):
        alone = strategies.fit(
            prompt, frozen, images, [splits[r]], config, plan, labels=labels, seeds=[3 + r], test=(images, labels)
        )
        np.testing.assert_array_equal(alone.selections[0], together.selections[r])
        own = jax.tree.map(lambda x, r=r: x[r : r + 1], together.prompts)
        assert_near(own, alone.prompts, 1e-4)  # float32 over two trainings, summed in another order


def test_a_mesh_changes_nothing():
    prompt, frozen, images, config, labels = prepared("text")
    arguments = prompt, frozen, images, [protocol.ssl_split(labels, 6)], config, small_plan("fpl")
    alone = strategies.fit(*arguments, labels=labels, test=(images, labels))
    spread = strategies.fit(*arguments, labels=labels, test=(images, labels), mesh=parallel.make_mesh())
    assert_near(spread.prompts, alone.prompts, 2e-5)
    assert spread.records[0].test == alone.records[0].test


@pytest.mark.parametrize("reinit", ["official", "warm", "fresh"])
def test_where_iterations_start(reinit):
    prompt, _, _, config, _ = prepared("multi")
    job = strategies._Job(
        prompt, None, None, [], [], None, [5, 6], config, strategies.Plan(reinit=reinit), clip.Numerics(), None
    )
    initial, last = strategies._draw(job, 0), strategies._draw(job, 9)
    found = strategies._restarted(job, 1, initial, last)
    kept = {"official": {"text", "visual"}, "warm": set(found), "fresh": set()}[reinit]
    for part in found:
        same = jax.tree.map(np.array_equal, found[part], last[part])
        # LayerNorms and zero biases are drawn alike, so look at the first leaf of a map or token
        leaf = same["kernel"] if isinstance(same, dict) and "kernel" in same else same
        if part != "block":
            assert leaf == (part in kept)


def test_top_k_and_paper_balance_are_options():
    prompt, frozen, images, config, _ = prepared("text")
    plan = small_plan("fpl", selection="top_k", balance="paper")
    fitted = strategies.fit(prompt, frozen, images, [protocol.ul_split(72, 6)], config, plan)
    rows, pseudo = fitted.selections[0]
    assert len(rows) == 18
    assert np.bincount(pseudo).tolist() == [3] * 6
    assert fitted.records[0].pseudolabel_accuracy == [None]  # no labels, no accuracy


def test_labels_alone_never_look_at_unlabelled_images():
    prompt, frozen, images, config, labels = prepared("text")
    split = protocol.trzsl_split(labels, 6)
    only_seen = np.where(np.isin(labels, split.seen), labels, -1)
    plan = small_plan("labelled")
    fitted = strategies.fit(prompt, frozen, images, [split], config, plan, labels=only_seen)
    spoiled = images.at[split.unlabelled].set(jnp.nan)
    again = strategies.fit(prompt, frozen, spoiled, [split], config, plan, labels=only_seen)
    jax.tree.map(np.testing.assert_array_equal, fitted.prompts, again.prompts)


def test_what_is_refused():
    prompt, frozen, images, config, labels = prepared("text")
    split = protocol.ssl_split(labels, 6)
    arguments = prompt, frozen, images
    with pytest.raises(LabelError, match="lies outside"):
        strategies.fit(*arguments, [split], config, small_plan())  # labels of labelled rows not given
    with pytest.raises(DataError, match="K = 0: 60 unlabelled images in 20 iterations"):
        strategies.fit(*arguments, [split], config, strategies.Plan(iterations=20), labels=labels)
    with pytest.raises(DataError, match="2 splits and 3 seeds"):
        strategies.fit(*arguments, [split] * 2, config, labels=labels, seeds=(1, 2, 3))
    with pytest.raises(DataError, match="needs a split"):
        strategies.fit(*arguments, [], config, labels=labels)
    with pytest.raises(DataError, match="different paradigms"):
        strategies.fit(*arguments, [split, protocol.ul_split(72, 6)], config, labels=labels)
    with pytest.raises(DataError, match=r"\(3,\) labels for 72 images"):
        strategies.fit(*arguments, [split], config, labels=labels[:3])
    with pytest.raises(DataError, match="beyond the 20 images"):
        strategies.fit(prompt, frozen, images[:20], [split], config, labels=labels[:20])
    with pytest.raises(DataError, match="reinit is 'cold'"):
        strategies.Plan(reinit="cold")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("ssl", "fpl", "text", 160, 1280), (8, 1)),
        (("ssl", "ifpl", "text", 160, 1280), (1 / 8, 1)),
        (("ssl", "grip", "joint", 160, 1280), (1 / 8, 1)),
        (("ssl", "fpl", "joint", 160, 640), (2, 1)),
        (("trzsl", "fpl", "image", 400, 100), (1, 4)),
        (("trzsl", "fpl", "joint", 400, 100), (1, 2)),
        (("trzsl", "grip", "joint", 400, 100), (1, 4)),
        (("ul", "grip", "text", 0, 100), (0, 1)),
        (("ssl", "labelled", "text", 160, 0), (1, 0)),
        (("ssl", "grip", "text", 160, 1280, "paper"), (8, 1)),
        (("trzsl", "fpl", "joint", 400, 100, "paper"), (1, 4)),
    ],
)
def test_balance_weights(arguments, expected):
    assert strategies.balance_weights(*arguments) == pytest.approx(expected)


def test_balance_of_nothing():
    with pytest.raises(DataError, match="no image was pseudolabelled"):
        strategies.balance_weights("ssl", "fpl", "text", 10, 0)
    with pytest.raises(DataError, match="needs labelled images"):
        strategies.balance_weights("ssl", "fpl", "text", 0, 10)
    with pytest.raises(DataError, match="paradigm is 'self'"):
        strategies.balance_weights("self", "fpl", "text", 1, 10)
