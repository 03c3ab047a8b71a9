"""Training: the reference trajectories, one trace for growing lists, several runs at once, several devices."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prompt_golden import MODALITIES, assert_near, checkpoint, load, nhwc, prompts_of

from jaxzs import clip, parallel
from jaxzs.errors import ConfigError, DataError
from jaxzs.prompt import modality, scoring, training

# 21 steps of SGD with momentum on a loss of scale 20: an independent float32 implementation stays within 3.4e-6,
# and a perturbation of 1e-6 of the initial prompts moves losses by up to 3e-4.
TRAJECTORY = 5e-4


def problem(name: str, paradigm: str):
    """(training, prompts [1,...], golden) of a trajectory file."""
    params, config = checkpoint()
    golden = load(f"trajectory_{name}_{paradigm}")
    prompt = MODALITIES[name]
    data = load("images")
    ids = load(f"loss_grad_{name}")["token_ids"]
    frozen = modality.Frozen(params, jnp.asarray(ids, jnp.int32), *2 * [template_features(params, config)])
    images = prompt.constant_images(params, nhwc(data["images"]), config)
    rows = np.unique(golden["orders"])
    labels = golden["labels"][rows]
    seen = int(golden["n_seen_classes"])
    unlabelled = golden["is_unlabeled"]
    second = {
        "sup": np.zeros(len(labels), bool),
        "supseen": np.zeros(len(labels), bool),
        "ssl": unlabelled,
        "trzsl": labels >= seen,
        "ul": np.ones(len(labels), bool),
    }[paradigm]
    items = training.Items(rows, labels, second)
    balance = float(golden["balance"])
    weights = {"ssl": (balance, 1.0), "trzsl": (1.0, balance), "ul": (0.0, 1.0)}.get(paradigm, (1.0, 0.0))
    mask = np.arange(6) < (seen if paradigm == "supseen" else 6)
    run = runs_of([weights], mask)
    optimisation = training.Optimisation(
        float(golden["lr"]),
        int(golden["epochs"]),
        int(golden["warmup_epochs"]),
        8,
        float(golden["momentum"]),
        float(golden["weight_decay"]),
        steps_per_chunk=3,
    )
    prompts = jax.tree.map(lambda x: x[None], prompts_of(golden, "init."))
    task = modality.Task(prompt, config)
    order = given_order(golden)
    return training.Training(task, [items], run, frozen, images, optimisation, order), prompts, golden


def template_features(params, config):
    return clip.encode_text(params, jnp.asarray(load("zeroshot")["token_ids"], jnp.int32), config)


def runs_of(weights, class_mask) -> training.Run:
    masks = np.tile(np.asarray(class_mask)[None], (len(weights), 1))
    return training.runs(weights, masks, training.Optimisation())


def given_order(golden):
    rows = np.unique(golden["orders"])
    return lambda run, epoch, length: np.searchsorted(rows, golden["orders"][epoch].reshape(-1))


CASES = [(n, p) for n in ("text", "image") for p in ("sup", "supseen", "ssl", "trzsl", "ul")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "paradigm"), [*CASES, ("multi", "ssl"), ("multi", "trzsl")])
def test_trajectory(name, paradigm):
    given, prompts, golden = problem(name, paradigm)
    state, losses = training.start(prompts), np.zeros((0, 1))
    for epoch in range(7):  # of three steps each, as are the chunks
        state, own = training.advance(given, state, 3 * epoch)
        losses = np.concatenate([losses, own])
        for own, theirs in (("prefix", "prefix"), ("text", "coop_embeddings"), ("visual", "vpt_embeddings")):
            if own in prompts:
                expected = golden[f"epochs.{theirs}"][epoch]
                assert_near(state.prompts[own][0], expected.reshape(prompts[own][0].shape), TRAJECTORY)
    assert len(losses) == training.total_steps(given)
    assert_near(losses[:, 0], golden["losses"], TRAJECTORY)
    assert_near(jax.tree.map(lambda x: x[0], state.prompts), prompts_of(golden, "final."), TRAJECTORY)


def short(name: str, runs: int = 1, **changes):
    """Two epochs of a small problem, for properties that need no reference: (training, prompts)."""
    given, _, _ = problem(name, "ssl")
    optimisation = training.Optimisation(0.05, 2, 0, 8, steps_per_chunk=4, **changes)
    task = given.task
    prompts = jax.vmap(lambda key: task.modality.init(key, task.config))(jax.random.split(jax.random.key(0), runs))
    run = runs_of([(2.0 + r, 1.0) for r in range(runs)], np.ones(6, bool))
    order = training.shuffled(0)
    return given._replace(items=given.items * runs, run=run, optimisation=optimisation, order=order), prompts


def take(tree, r: int):
    return jax.tree.map(lambda x: x[r : r + 1], tree)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text", "multi"])
def test_runs_together_equal_runs_alone(name):
    given, prompts = short(name, 3)
    items = given.items
    shorter = [items[0], training.Items(*(x[:9] for x in items[1])), items[2]]  # 3, 2 and 3 batches
    together, losses = training.train(given._replace(items=shorter), prompts)
    for r in range(3):
        alone, own = training.train(given._replace(items=[shorter[r]], run=take(given.run, r)), take(prompts, r))
        # float32 rounding over six steps, summed in another order
        assert_near(take(together.prompts, r), alone.prompts, 2e-5)
        np.testing.assert_allclose(losses[losses[:, r] != 0, r], own[:, 0], rtol=2e-5)


@pytest.mark.slow
def test_learning_rates_differ_between_runs():
    given, prompts = short("text", 2)
    same = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), (prompts, given.run))
    optimisation = training.Optimisation((0.05, 0.0), 2, 0, 8, steps_per_chunk=4)
    state, _ = training.train(given._replace(run=same[1], optimisation=optimisation), same[0])
    np.testing.assert_array_equal(state.prompts["prefix"][1], prompts["prefix"][0])  # rate 0
    assert not np.allclose(state.prompts["prefix"][0], prompts["prefix"][0], atol=1e-4)


def test_growing_lists_share_one_program(monkeypatch):
    given, prompts = short("text")
    counted = jax.jit(chex.assert_max_traces(training.train_chunk.__wrapped__, n=1))
    monkeypatch.setattr(training, "train_chunk", counted)
    for n in (5, 12, 17, 24):
        training.train(given._replace(items=[training.Items(*(x[:n] for x in given.items[0]))]), prompts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["image", "multi"])
def test_data_parallel_equals_one_device(name):
    given, prompts = short(name)
    alone, losses = training.train(given, prompts)
    mesh = parallel.make_mesh()
    spread, again = training.train(given._replace(mesh=mesh), prompts)
    assert_near(spread.prompts, alone.prompts, 2e-5)
    np.testing.assert_allclose(again, losses, rtol=2e-5)
    with pytest.raises(DataError, match="batch_size 7 is not a multiple of the 8 devices"):
        training.train(given._replace(optimisation=training.Optimisation(batch_size=7), mesh=mesh), prompts)


def test_interrupted_training_continues_exactly():
    given, prompts = short("text")
    given = given._replace(optimisation=training.Optimisation(0.05, 4, 1, 8, steps_per_chunk=4))
    whole, losses = training.train(given, prompts)
    states = [training.start(prompts)]
    for done in (0, 4):
        states.append(training.advance(given, states[-1], done)[0])
    resumed, rest_losses = training.advance(given, states[-1], 8)
    chex.assert_trees_all_equal(resumed, whole)
    np.testing.assert_array_equal(losses[8:], rest_losses)


def test_divergence_names_the_step_and_keeps_the_last_good_state():
    given, prompts = short("text")
    prompts = {"prefix": prompts["prefix"].at[0, 0, 0].set(jnp.nan)}
    with pytest.raises(training.DivergedError, match="run 0 is nan at step 0 of epoch 0") as error:
        training.train(given, prompts)
    assert error.value.step == 0
    np.testing.assert_array_equal(error.value.state.prompts["prefix"], prompts["prefix"])


@pytest.mark.slow
def test_scores_of_several_runs_in_batches():
    given, prompts = short("multi", 2)
    task, frozen, images = given.task, given.frozen, given.images
    whole = scoring.score(task, prompts, frozen, images[:20])
    batched = scoring.score(task, prompts, frozen, images[:20], batch_size=8)
    assert whole.shape == (2, 20, 6)
    np.testing.assert_allclose(batched, whole, rtol=1e-5, atol=1e-5)
    first = modality.class_logits(task, jax.tree.map(lambda x: x[1], prompts), frozen, images[:2])
    np.testing.assert_allclose(whole[1, :2], first, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "at least 1"),
        ({"batch_size": 2.5}, "whole numbers"),
        ({"epochs": 3}, "less than epochs 3"),
        ({"learning_rate": -0.1}, "learning_rate is"),
        ({"learning_rate": (0.1, float("nan"))}, "learning_rate is"),
        ({"learning_rate": float("inf")}, "learning_rate is"),
        ({"momentum": 1.0}, "below 1"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
    ],
)
def test_unfit_settings(settings, message):
    with pytest.raises(DataError, match=message):
        training.Optimisation(**settings)


def test_unfit_trainings():
    given, prompts = short("text")
    with pytest.raises(DataError, match="training list is empty"):
        training.train(given._replace(items=[training.Items(*(x[:0] for x in given.items[0]))]), prompts)
    with pytest.raises(ConfigError, match=r"expected prompt\.Task"):
        training.train(given._replace(task=given.task.modality), prompts)
