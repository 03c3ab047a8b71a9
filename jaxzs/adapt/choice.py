"""One rule for a folder of images: which method, and which class marginal.

1. The class marginal gamma whose labels the closed form predicts best on images that it was not fitted on.
2. With fewer than two images a class there is nothing to compare: gamma = 1.
3. gamma < 1 says that the text names too few classes too often: the closed form on Sinkhorn's labels. gamma = 1 says
   that the classes are as unequal as the text sees them: discriminant analysis anchored to the text.

Measured against the methods alone by `experiments/adapt_features.py`; see the guide.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxzs.adapt.calibration import matching_text
from jaxzs.adapt.discriminant import Numbers, anchored_rounds, rounds_of
from jaxzs.adapt.gaussian import as_numbers, passes_with_graph, stata, stata_rounds, transclip
from jaxzs.adapt.heads import AnyHead, GaussianHead, Head, fitting, linear, scaled, scores_of, text_head
from jaxzs.adapt.images import Images, Shots, check_shots, number, over_images
from jaxzs.errors import ConfigError
from jaxzs.proxy import checks
from jaxzs.proxy.closed_form import LabelSums, closed_form, precondition
from jaxzs.proxy.gamma import GAMMAS, best_gamma, compared, random_splits
from jaxzs.proxy.rows import Counted, Reduce, normalize
from jaxzs.proxy.settings import PAPER_LOGIT_SCALE, VISION_OVER_TEXT, Checked, Settings, in_float32
from jaxzs.proxy.sinkhorn import Task
from jaxzs.proxy.solvers import solve
from jaxzs.proxy.sweeps import Recomputed

Method = Literal["auto", "proxy", "closed_form", "gda", "stata", "transclip", "zero-shot"]


class Choice(NamedTuple):
    """What the rule chose, and how sure it was.

    gamma: [] float32, one of `proxy.GAMMAS`. votes: [5] int32, how many splits of the images prefer each of them; all 0
    where there are too few images to ask. `method` is "closed_form" for gamma below 1, else "gda" (`anchored_gda`).

    >>> choice = adapt.Choice(jnp.float32(1.0), jnp.array([0, 0, 1, 1, 6]))
    >>> choice.method
    'gda'
    """

    gamma: jax.Array
    votes: jax.Array

    @property
    def method(self) -> Method:
        return "closed_form" if float(self.gamma) < 1 else "gda"

    @property
    def reason(self) -> str:
        """The choice in one line, for a reader."""
        votes, gamma = np.asarray(self.votes), float(self.gamma)
        if votes.sum() == 0:
            return "fewer than two images a class: anchored to the text"
        what = "anchored to the text" if gamma == 1 else f"closed form, class balance {gamma:g}"
        return f"{what}: the best of {len(GAMMAS)} balances on held-out images in {votes[GAMMAS.index(gamma)]} of " + (
            f"{votes.sum()} splits"
        )


class Adapted(NamedTuple):
    """A head and how it came about.

    head: with calibrated scores. choice: of the rule; None where the method was named. scale: [] what the scores were
    multiplied by. passes: [] float32, how often the features of all images were read to find it: every sum over them is
    one, those that choose and calibrate included, the check before and the scores after not. None: nobody counted.

    >>> x = jnp.array([[1.0, 0.1], [0.9, -0.1], [0.1, 1.0], [0.0, 0.8]])
    >>> adapted = adapt.fit(x, jnp.array([[1.0, 0.9], [0.9, 1.0]]))
    >>> adapt.scores(adapted.head, x).argmax(-1).tolist()
    [0, 0, 1, 1]
    """

    head: AnyHead
    choice: Choice | None
    scale: jax.Array
    passes: jax.Array | None = None


def chosen(reduce: Reduce, text: jax.Array, settings: Checked, _: Any = ()) -> tuple[Choice, LabelSums]:
    """The rule's choice, from sums over the images alone, and the label sums of all images with its gamma."""
    num_images, num_classes = reduce.num_images, text.shape[0]
    found = compared(Task(reduce, num_images, num_classes, text), settings)
    # Of 40 images of 60 classes the closed form of such a choice fell to 55 %, the text has 95.
    enough = num_images >= 2 * num_classes
    best = jnp.where(enough, best_gamma(found.losses), len(GAMMAS) - 1)
    of_splits = jax.nn.one_hot(jnp.argmin(found.losses, axis=-1), len(GAMMAS), dtype=jnp.int32)  # [S,G]
    votes = jnp.where(enough, jnp.sum(of_splits, axis=0), 0)
    _, sums = found.of_gamma(best)
    return Choice(jnp.array(GAMMAS, jnp.float32)[best], votes), sums


def choose(
    image_features: Images,
    text_proxies: ArrayLike,
    *,
    key: jax.Array | None = None,
    temperature: ArrayLike = 0.01,
    mask: ArrayLike | None = None,
) -> Choice:
    """Which method suits these images, without labels. Not published.

    Args:
      image_features: X [N,E], any float type; L2-normalised here. Or a function that gives chunks for every pass.
      text_proxies: Z [C,E], any float type; L2-normalised here.
      key: of the random splits of the images; by default always the same ones.
      temperature: > 0 of the text; 1/s for a checkpoint of logit scale s.
      mask: [N] bool, False for padding.

    Returns:
      `Choice`.

    Raises:
      DataError: shapes that do not fit, values that are not finite, rows of zeros.
      ConfigError: options out of range.

    >>> choice = adapt.choose(jnp.tile(jnp.eye(4), (8, 1)), jnp.eye(4))
    >>> choice.method, float(choice.gamma)
    ('closed_form', 0.0)
    """
    settings = _settings(temperature, "auto")
    folds = partial(random_splits, key)
    choice: Choice = over_images(chosen, image_features, text_proxies, settings, mask=mask, folds=folds)[0]
    return choice


def fit(
    image_features: Images,
    text_proxies: ArrayLike,
    *,
    method: Method = "auto",
    temperature: ArrayLike = 0.01,
    key: jax.Array | None = None,
    shots: Shots | None = None,
    mask: ArrayLike | None = None,
) -> Adapted:
    """A head for these images by the method that suits them, its scores calibrated.

    Args:
      image_features: X [N,E], any float type; L2-normalised here. Or a function that gives chunks for every pass
        ("transclip" excepted).
      text_proxies: Z [C,E], any float type; L2-normalised here.
      method: "auto" chooses between "closed_form" and "gda" (`choose`); "proxy" is InMaP with gamma chosen, "stata",
        "transclip" as the functions, by blocks and without graph for chunks, "zero-shot" the text as it is.
      temperature: > 0 of the text; 1/s for a checkpoint of logit scale s, four times as much for vision proxies.
      key: of the random splits of the images; by default always the same ones.
      shots: images with labels beside, for "auto" and "gda": `anchored_gda` with them.
      mask: [N] bool, False for padding.

    Returns:
      `Adapted`.

    Raises:
      DataError: shapes that do not fit, values that are not finite, rows of zeros.
      ConfigError: options out of range, shots for a method that takes none.

    >>> x = jnp.array([[1.0, 0.1], [0.9, -0.1], [0.1, 1.0], [0.0, 0.8]])
    >>> adapted = adapt.fit(x, jnp.array([[1.0, 0.9], [0.9, 1.0]]), method="gda")
    >>> adapt.scores(adapted.head, x).argmax(-1).tolist()
    [0, 0, 1, 1]
    """
    if method not in get_args(Method):
        raise ConfigError(f"method is {method!r}; expected one of {', '.join(get_args(Method))}")
    check_takes_shots(method, shots)
    own = _temperature(temperature)
    if method == "zero-shot":
        if not callable(image_features):  # not needed, but wrong ones would be found out by nobody
            checks.features_and_proxies(image_features, text_proxies, mask)
        return Adapted(text_head(text_proxies, temperature=own), None, jnp.float32(1), jnp.float32(0))
    if method == "transclip" or (method == "stata" and not callable(image_features)):
        return _with_graph(method, image_features, text_proxies, own, mask)
    # With labels there is nothing to choose: "gda" takes them, the closed form does not.
    if shots is not None:
        method = "gda"
        dim = np.shape(text_proxies)
        shots = check_shots(shots, *dim) if len(dim) == 2 else shots  # type: ignore[assignment]
    # The solver of the vision proxies; gamma is chosen by the closed form in any case.
    settings = _settings(own, "fast" if method == "proxy" else "closed_form")
    folds = partial(random_splits, key) if method in ("auto", "proxy", "closed_form") else None
    numbers = own, settings, shots
    found: Adapted = over_images(calibrated, image_features, text_proxies, numbers, method, mask=mask, folds=folds)
    return found if method == "auto" else found._replace(choice=None)


def check_takes_shots(method: str, shots: Shots | None) -> None:
    """`ConfigError` for shots beside a method that would ignore them."""
    if shots is not None and method not in ("auto", "gda"):
        raise ConfigError(f"method {method!r} takes no shots", python='method="gda"', command="--method gda")


def probabilities(adapted: Adapted, image_features: ArrayLike) -> jax.Array:
    """Calibrated probabilities [N,C] of the images that were fitted: of StatA and TransCLIP with their neighbours.

    image_features: those of `fit`, [N,E]; rows of padding get anything. Raises `DataError` for shapes that do not fit.

    >>> x = jnp.array([[1.0, 0.1], [0.9, -0.1], [0.1, 1.0], [0.0, 0.8]])
    >>> adapted = adapt.fit(x, jnp.array([[1.0, 0.9], [0.9, 1.0]]), method="stata")
    >>> adapt.probabilities(adapted, x).argmax(-1).tolist()
    [0, 0, 1, 1]
    """
    head = adapted.head
    if isinstance(head, GaussianHead) and head.posterior is not None:
        # Its logarithm stands for scores, and is scaled as they are. Some entries are 0, those of padding all.
        return jax.nn.softmax(jnp.log(jnp.maximum(head.posterior, 1e-37)) * adapted.scale, axis=-1)
    return jax.nn.softmax(scores_of(head, normalize(fitting(head, image_features))), axis=-1)


def calibrated(reduce: Reduce, text: jax.Array, numbers: tuple[jax.Array, Checked, Any], method: Method) -> Adapted:
    """The head of a method that needs sums alone, its scores as sure as the text's on the same images."""
    counted = Counted(reduce)
    head, choice = by_rule(counted, text, numbers, method)
    scale = matching_text(counted, text, numbers[0], head)
    return Adapted(scaled(head, scale), choice, scale, counted.passes)


def by_rule(
    reduce: Reduce, text: jax.Array, numbers: tuple[jax.Array, Checked, Any], method: Method
) -> tuple[AnyHead, Choice | None]:
    """The head of a method by blocks, or of the one that the rule chooses."""
    temperature, settings, shots = numbers
    if method == "stata":
        return stata_rounds(reduce, text, as_numbers(temperature)), None
    # The defaults of `anchored_gda`: 10 rounds instead of 5 change nothing measurable.
    anchoring = Numbers(temperature, jnp.float32(1), jnp.float32(1)), jnp.int32(5), shots
    if method == "gda":
        return anchored_rounds(reduce, text, anchoring), None
    choice, sums = chosen(reduce, text, settings)
    vision = partial(_vision, reduce, sums, text, settings)
    anchored = partial(rounds_of, reduce, text, anchoring, (sums.gram, sums.total, sums.num_images))
    if method in ("proxy", "closed_form"):
        return vision(), choice
    # Below 1 the text names too few classes too often (see above); at 1 absent classes must keep their text.
    return reduce.loops.cond(choice.gamma < 1, vision, anchored), choice


def _vision(reduce: Reduce, sums: LabelSums, text: jax.Array, settings: Checked) -> Head:
    """Vision proxies of `proxy.fit` as a head, from the sums of the labels."""
    if settings.solver == "closed_form":  # without the pass that would tell its objective
        proxies = closed_form(sums, precondition(sums, settings.ridge))  # [C,E]
    else:
        proxies = solve(Recomputed(reduce, settings), sums, text, settings).proxies
    return linear(proxies, settings.temperature)


def _with_graph(
    method: Method, image_features: Images, text_proxies: ArrayLike, temperature: jax.Array, mask: ArrayLike | None
) -> Adapted:
    """StatA or TransCLIP, which need all images at once, calibrated by passes of its own."""
    if callable(image_features):
        raise ConfigError('"transclip" needs all features in memory; for chunks use "auto" or "stata"')
    transduced = stata if method == "stata" else transclip
    head = transduced(
        image_features, text_proxies, temperature=temperature, mask=mask
    )  # 3 neighbours, as in the papers
    # Scores come from the parameters alone; the posterior [N,C] would be copied along.
    numbers = temperature, head._replace(posterior=None)
    scale, passes = over_images(_scale_of, image_features, text_proxies, numbers, mask=mask)
    passes = passes + passes_with_graph(np.shape(image_features)[0])
    return Adapted(scaled(head, scale), None, scale, passes)


def _scale_of(
    reduce: Reduce, text: jax.Array, numbers: tuple[jax.Array, AnyHead], _: Any = ()
) -> tuple[jax.Array, jax.Array]:
    """`matching_text`, and its passes."""
    counted = Counted(reduce)
    return matching_text(counted, text, *numbers), counted.passes


def _temperature(value: ArrayLike) -> jax.Array:
    """A checked temperature of the text, of which float32 also holds that of the vision proxies."""
    return number(value, "temperature", high=checks.LARGEST / VISION_OVER_TEXT)


def _settings(temperature: ArrayLike, solver: Any) -> Checked:
    own = _temperature(temperature)
    solver = "closed_form" if solver == "auto" else solver
    # tau_i = 4 tau_t: similarities among images are larger than those of images and texts.
    return in_float32(
        Settings(label_temperature=own, temperature=VISION_OVER_TEXT * own, solver=solver), PAPER_LOGIT_SCALE
    )
