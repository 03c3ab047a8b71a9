"""FPL, IFPL and GRIP: whole reference runs, resuming, several runs at once, and what is refused."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prompt_golden import MODALITIES, assert_near, checkpoint, load, nhwc, prompts_of

from jaxzs import clip, parallel
from jaxzs.errors import ConfigError, DataError, LabelError
from jaxzs.files import read_arrays, write_arrays
from jaxzs.prompt import modality, protocol, resuming, scoring, strategies, training
from jaxzs.prompt.prepare import Pool

# Whole runs: 80 to 116 steps in four trainings. An independent float32 implementation stays within 1.2e-4.
WHOLE_RUN = 5e-3


def prepared(name: str):
    """(task, frozen, pool of 72 images) of the reference images."""
    params, config = checkpoint()
    encode = lambda ids: clip.encode_text(params, jnp.asarray(ids, jnp.int32), config)  # noqa: E731
    template, ids = load("zeroshot"), load(f"loss_grad_{name}")["token_ids"]
    frozen = modality.Frozen(
        params, jnp.asarray(ids, jnp.int32), encode(template["token_ids"]), encode(template["pseudolabel_token_ids"])
    )
    data = load("images")
    images = MODALITIES[name].constant_images(params, nhwc(data["images"]), config)
    return modality.Task(MODALITIES[name], config), frozen, Pool(images, data["labels"])


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


@pytest.mark.slow
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
    task, frozen, pool = prepared(name)
    np.testing.assert_array_equal(pool.labels, golden["true_labels"])
    split = reference_split(golden, paradigm)
    epochs, iterations = int(golden["epochs"]), int(golden["n_iter"])
    optimisation = training.Optimisation(
        float(golden["lr"]), epochs, int(golden["warmup_epochs"]), 8, steps_per_chunk=16
    )
    k = int(golden["k_per_iter"][0])
    plan = strategies.Plan(strategy, k, iterations, reinit=reinit, optimisation=optimisation)
    assert protocol.schedule(strategy, split, k, iterations) == golden["k_per_iter"].tolist()
    first = {key: value[0] for key, value in golden.items() if key.startswith("start.")}
    records = []
    initial = jax.tree.map(lambda x: x[None], prompts_of(first, "start."))
    running = strategies.Running(initial=initial, order=reference_order(golden, split), on_record=records.append)
    fitted = strategies.fit(task, frozen, pool, [split], plan, running)
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
        logits = scoring.score(task, fitted.prompts, frozen, pool.images)[0]
        rows, pseudo = strategies.select_for(logits, split, k)
        np.testing.assert_array_equal(rows, golden["sel4_image"])
        np.testing.assert_array_equal(pseudo, golden["sel4_label"])


def small_plan(strategy="grip", **options) -> strategies.Plan:
    return strategies.Plan(
        strategy, 3, 2, optimisation=training.Optimisation(0.05, 4, 1, 8, steps_per_chunk=16), **options
    )


@pytest.mark.slow
def test_a_killed_fit_goes_on_where_it_was(tmp_path):
    task, frozen, pool = prepared("text")
    splits, plan = [protocol.ssl_split(pool.labels, 6)], small_plan(seeds=(1, 2))

    def fit(plan=plan, **running):
        return strategies.fit(task, frozen, pool, splits, plan, strategies.Running(**running), test=pool)

    whole = fit()
    for stop_after in (1, 2, 3):
        path, chunks = tmp_path / f"{stop_after}.safetensors", []

        def interrupt(progress, chunks=chunks, stop_after=stop_after):
            chunks.append(progress)
            if len(chunks) == stop_after:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit(resume=path, on_progress=interrupt)
        resumed = fit(resume=path, on_progress=chunks.append)
        assert len(chunks) == 4  # two iterations of two chunks, none twice
        jax.tree.map(np.testing.assert_array_equal, resumed.prompts, whole.prompts)
        jax.tree.map(np.testing.assert_array_equal, resumed.selections, whole.selections)
        assert [r.test for r in resumed.records] == [r.test for r in whole.records]
        assert [r.loss for r in resumed.records] == [r.loss for r in whole.records]
        assert [p.name for p in tmp_path.iterdir() if ".part" in p.name] == []
    finished = fit(resume=path)
    jax.tree.map(np.testing.assert_array_equal, finished.prompts, whole.prompts)
    with pytest.raises(DataError, match="not the state of this fit"):
        fit(small_plan("ifpl", seeds=(1, 2)), resume=path)
    # One number of one image, far behind the first: another pool.
    other = pool._replace(images=pool.images.at[-1, -1].add(0.5))
    with pytest.raises(DataError, match="not the state of this fit"):
        strategies.fit(task, frozen, other, splits, plan, strategies.Running(resume=path), test=pool)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match="damaged"):
        resuming.read_state(path, "")


def test_every_bit_of_a_state(tmp_path):
    """Only named errors or an equal state, whichever bit of the file is flipped."""
    prompts = {"p": jnp.ones((1, 1))}
    selections = [(np.array([0]), np.array([0]))]
    record = resuming.Record(1, [1], [1], [None], [0.5], None)
    state = resuming.FitState(1, np.ones((1, 1), np.float32), prompts, training.start(prompts), selections, [record])
    path, refused = tmp_path / "state.safetensors", 0
    resuming.write_state(path, "i", state)
    content = path.read_bytes()

    def same(found):
        return all(map(np.array_equal, jax.tree.leaves(found[:5]), jax.tree.leaves(state[:5])))

    assert same(resuming.read_state(path, "i", 1, state))
    with open(path, "r+b", buffering=0) as file:
        for place in range(8 * len(content)):
            byte = content[place // 8]
            for value in (byte ^ 1 << place % 8, byte):  # flipped, and back
                file.seek(place // 8)
                file.write(bytes([value]))
                if value != byte:
                    try:
                        found = resuming.read_state(path, "i", 1, state)
                    except DataError:
                        refused += 1
                    else:
                        assert same(found)
                        assert found.records == state.records
    assert refused > 7 * len(content)


@pytest.mark.parametrize(
    "edit",
    [
        {"iteration": "1"}, {"iteration": -1}, {"iteration": None}, {"records": 5}, {"records": [{}]},
        {"records": [[]]}, {"format": "jaxzs.fit/1"}, {"identity": "j"},
    ],
    ids=str,
)  # fmt: skip
def test_states_of_odd_content(tmp_path, edit):
    """With a checksum that fits, as of a hostile file."""
    prompts = {"p": jnp.ones((1, 1))}
    state = resuming.FitState(0, np.ones((1, 1), np.float32), prompts, training.start(prompts), [], [])
    path = tmp_path / "state.safetensors"
    resuming.write_state(path, "i", state._replace(selections=[(np.array([0]), np.array([0]))]))
    arrays, values = read_arrays(path, "")
    values.pop("sha256")
    write_arrays(path, arrays, {**values, **edit})
    with pytest.raises(DataError, match=r"not the state of this fit|damaged"):
        resuming.read_state(path, "i", 1, state)
    write_arrays(path, {**arrays, "prompts/p": np.ones((2, 3), np.float32)}, values)
    with pytest.raises(DataError, match="damaged"):
        resuming.read_state(path, "i", 1, state)


@pytest.mark.slow
def test_runs_of_different_seeds_and_splits_equal_those_alone():
    task, frozen, pool = prepared("text")
    splits = [protocol.trzsl_split(pool.labels, 6, seed) for seed in (500, 0)]
    plan = strategies.Plan("grip", iterations=2, optimisation=small_plan().optimisation, seeds=(3, 4))
    together = strategies.fit(task, frozen, pool, splits, plan, test=pool)
    assert together.records[0].test[0].harmonic_mean is not None
    for r in range(2):
        own_plan = dataclasses.replace(plan, seeds=(3 + r,))
        alone = strategies.fit(task, frozen, pool, [splits[r]], own_plan, test=pool)
        np.testing.assert_array_equal(alone.selections[0], together.selections[r])
        own = jax.tree.map(lambda x, r=r: x[r : r + 1], together.prompts)
        assert_near(own, alone.prompts, 1e-4)  # float32 over two trainings, summed in another order


@pytest.mark.slow
def test_a_mesh_changes_nothing():
    task, frozen, pool = prepared("text")
    arguments = task, frozen, pool, [protocol.ssl_split(pool.labels, 6)], small_plan("fpl")
    alone = strategies.fit(*arguments, test=pool)
    spread = strategies.fit(*arguments, strategies.Running(mesh=parallel.make_mesh()), test=pool)
    assert_near(spread.prompts, alone.prompts, 2e-5)
    assert spread.records[0].test == alone.records[0].test


@pytest.mark.slow
@pytest.mark.parametrize("reinit", ["official", "warm", "fresh"])
def test_where_iterations_start(reinit):
    task, _, pool = prepared("multi")
    plan = strategies.Plan(reinit=reinit, seeds=(5, 6))
    job = strategies._Job(task, None, pool, None, [], [], [5, 6], plan, strategies.Running())
    initial, last = strategies._draw(job, 0), strategies._draw(job, 9)
    found = strategies._restarted(job, 1, initial, last)
    kept = {"official": {"text", "visual"}, "warm": set(found), "fresh": set()}[reinit]
    for part in found:
        same = jax.tree.map(np.array_equal, found[part], last[part])
        # LayerNorms and zero biases are drawn alike, so look at the first leaf of a map or token
        leaf = same["kernel"] if isinstance(same, dict) and "kernel" in same else same
        if part != "block":
            assert leaf == (part in kept)


@pytest.mark.slow
def test_top_k_and_paper_balance_are_options():
    task, frozen, pool = prepared("text")
    plan = small_plan("fpl", selection="top_k", balance="paper")
    fitted = strategies.fit(task, frozen, pool._replace(labels=None), [protocol.ul_split(72, 6)], plan)
    rows, pseudo = fitted.selections[0]
    assert len(rows) == 18
    assert np.bincount(pseudo).tolist() == [3] * 6
    assert fitted.records[0].pseudolabel_accuracy == [None]  # no labels, no accuracy


@pytest.mark.slow
def test_labels_alone_never_look_at_unlabelled_images():
    task, frozen, pool = prepared("text")
    split = protocol.trzsl_split(pool.labels, 6)
    only_seen = pool._replace(labels=np.where(np.isin(pool.labels, split.seen), pool.labels, -1))
    plan = small_plan("labelled")
    fitted = strategies.fit(task, frozen, only_seen, [split], plan)
    spoiled = only_seen._replace(images=pool.images.at[split.unlabelled].set(jnp.nan))
    again = strategies.fit(task, frozen, spoiled, [split], plan)
    jax.tree.map(np.testing.assert_array_equal, fitted.prompts, again.prompts)


def test_a_step_of_a_fit_returns_another_state():
    """The state that goes in stays as it was, so that it may be kept, sent or gone back to."""
    task, frozen, pool = prepared("text")
    job = strategies._job(
        task, frozen, pool, [protocol.ssl_split(pool.labels, 6)], small_plan(), strategies.Running(), None
    )
    _, first = strategies._begun(job, job.running)
    second = strategies.advance(job, first)
    assert (len(first.losses), len(second.losses), first.records) == (0, 16, [])
    chex.assert_trees_all_equal(strategies.advance(job, first).train, second.train)


def test_what_is_refused():
    task, frozen, pool = prepared("text")
    images, labels = pool
    split = protocol.ssl_split(labels, 6)
    with pytest.raises(LabelError, match="lies outside"):
        strategies.fit(task, frozen, pool._replace(labels=None), [split], small_plan())  # labels of labelled rows
    with pytest.raises(DataError, match="K = 0: 60 unlabelled images in 20 iterations"):
        strategies.fit(task, frozen, pool, [split], strategies.Plan(iterations=20))
    with pytest.raises(DataError, match="2 splits and 3 seeds"):
        strategies.fit(task, frozen, pool, [split] * 2, strategies.Plan(seeds=(1, 2, 3)))
    with pytest.raises(DataError, match="needs a split"):
        strategies.fit(task, frozen, pool, [])
    with pytest.raises(DataError, match="different paradigms"):
        strategies.fit(task, frozen, pool, [split, protocol.ul_split(72, 6)])
    with pytest.raises(DataError, match=r"\(3,\) labels for 72 images"):
        strategies.fit(task, frozen, Pool(images, labels[:3]), [split])
    with pytest.raises(DataError, match="beyond the 20 images"):
        strategies.fit(task, frozen, Pool(images[:20], labels[:20]), [split])
    with pytest.raises(DataError, match="reinit is 'cold'"):
        strategies.Plan(reinit="cold")
    with pytest.raises(ConfigError, match=r"write prompt\.Pool"):
        strategies.fit(task, frozen, pool, [split], labels=labels)
    with pytest.raises(ConfigError, match=r"expected prompt\.Task"):
        strategies.fit(task.modality, frozen, images, [split])


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
