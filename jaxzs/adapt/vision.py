"""InMaP's vision proxies as a head (arXiv 2310.19752)."""

from __future__ import annotations

import jax
from jax.typing import ArrayLike

from jaxzs import proxy
from jaxzs.adapt.heads import Head, text_head
from jaxzs.proxy.settings import DEFAULTS, PAPER_LOGIT_SCALE, Settings, in_float32


def proxies(
    image_features: ArrayLike,
    text_proxies: ArrayLike,
    settings: Settings = DEFAULTS,
    *,
    logit_scale: ArrayLike = PAPER_LOGIT_SCALE,
    mask: ArrayLike | None = None,
    key: jax.Array | None = None,
) -> Head:
    """`proxy.fit` as a head: softmax(scores) are the probabilities of the vision proxies, arXiv 2310.19752, equation 4.

    Arguments and errors as `proxy.fit`. Returns `Head`.

    >>> x = jnp.array([[1.0, 0.1], [0.9, -0.1], [0.1, 1.0], [0.0, 0.8]])
    >>> head = adapt.proxies(x, jnp.array([[1.0, 0.9], [0.9, 1.0]]))
    >>> adapt.scores(head, x).argmax(-1).tolist()
    [0, 0, 1, 1]
    """
    found = proxy.fit(image_features, text_proxies, settings, logit_scale=logit_scale, mask=mask, key=key)
    # tau_i, at which the proxies were learned, and not the tau_t of the text.
    return text_head(found.proxies, temperature=in_float32(settings, logit_scale).temperature)
