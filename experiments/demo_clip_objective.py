"""The training objective of the demo checkpoint: contrastive with several positives, and a patch-level term.

Contrastive as CLIP's (Radford et al. 2021, arXiv 2103.00020), but captions repeat in a batch and may be true of
several images: each text is a positive of an image, a negative, or true without being its own, and then does not count.
The patch-level term uses the last block in TagCLIP's value-only form (arXiv 2312.12828, section 3).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.demo_world.batches import Batch
from jaxzs.clip import CLIPConfig, VisionConfig, encode_text, normalize
from jaxzs.clip.layers import block, dense, layer_norm
from jaxzs.clip.model import position_table, vision_embeddings
from jaxzs.patch.local import keep_values

LARGER = 2  # the interpolated position table has this many times as many rows and columns


def image_outputs(
    params: Any, pixels: jax.Array, config: CLIPConfig, positions: jax.Array | None, local: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Image features [B,E] and, if `local`, patch features [B,P,E] of the value-only last block; both normalised."""
    tree, vision = params["vision_model"], config.vision
    x = vision_embeddings(tree, pixels, vision, positions)
    x = layer_norm(tree["pre_layrnorm"], x, vision.layer_norm_eps)
    layers = tree["encoder"]["layers"]
    for layer in range(vision.num_hidden_layers - 1):
        x, _ = block(layers[str(layer)], x, vision)
    last = layers[str(vision.num_hidden_layers - 1)]

    def project(tokens: jax.Array) -> jax.Array:
        tokens = layer_norm(tree["post_layernorm"], tokens, vision.layer_norm_eps)
        return normalize(dense(params["visual_projection"], tokens))

    image = project(block(last, x, vision)[0][:, 0])
    return image, project(block(last, x, vision, attend=keep_values)[0][:, 1:]) if local else None


def window_positions(params: Any, vision: VisionConfig, corner: jax.Array) -> jax.Array:
    """The native table where corner[0] < 0, else a window of the native size of the enlarged one: [1+P,D].

    corner: [2] int32, first row and column of the window.
    """
    rows, columns = vision.grid
    native = position_table(params, vision, (rows, columns))
    larger = position_table(params, vision, (LARGER * rows, LARGER * columns), "bilinear")
    field = larger[1:].reshape(LARGER * rows, LARGER * columns, -1)
    start = jnp.maximum(corner, 0)
    zero = jnp.zeros((), start.dtype)
    window = jax.lax.dynamic_slice(field, (start[0], start[1], zero), (rows, columns, field.shape[-1]))
    window = jnp.concatenate([native[:1], window.reshape(rows * columns, -1)])
    return jnp.where(corner[0] < 0, native, window)


def multi_positive_loss(logits: jax.Array, positive: jax.Array, negative: jax.Array) -> jax.Array:
    """Cross-entropy of each positive against all negatives of its row; mean over the positives, then over the rows.

    logits [R,C]; positive, negative [R,C] bool. Entries that are neither do not count, nor do rows without a positive.
    """
    against = jax.nn.logsumexp(jnp.where(negative, logits, -jnp.inf), axis=1, keepdims=True)
    against = jnp.maximum(against, -1e4)  # a row without negatives
    each = jax.nn.softplus(against - logits)
    count = positive.sum(1, dtype=jnp.float32)
    of_row = jnp.where(positive, each, 0.0).sum(1) / jnp.maximum(count, 1.0)
    return of_row.sum() / jnp.maximum((count > 0).sum(dtype=jnp.float32), 1.0)


def losses(
    params: Any, batch: Batch, corner: jax.Array, config: CLIPConfig, local_weight: float, local: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The training loss and its parts. batch: pixels already normalised float32."""
    vision = config.vision
    size = batch.pixels.shape[1] // vision.patch_size
    if (size, size) != vision.grid:
        positions = position_table(params["vision_model"], vision, (size, size), "bilinear")
    else:
        positions = window_positions(params["vision_model"], vision, corner) if local else None
    images, patches = image_outputs(params, batch.pixels, config, positions, local)
    texts = normalize(encode_text(params, batch.input_ids, config))
    scale = jnp.exp(params["logit_scale"])
    logits = scale * images @ texts.T  # [B,U]
    of_images = multi_positive_loss(logits, batch.positive, batch.negative)
    of_texts = multi_positive_loss(logits.T, batch.positive.T, batch.negative.T)
    parts = {"contrastive": (of_images + of_texts) / 2, "scale": scale}
    loss = parts["contrastive"]
    first_name = len(texts) - batch.present.shape[1]
    if local:
        similar = scale * jnp.einsum("bpe,ne->bpn", patches, texts[first_name:])
        pooled = jax.nn.logsumexp(similar, axis=1) - np.float32(np.log(similar.shape[1]))  # [B,N]
        parts["local"] = multi_positive_loss(pooled, batch.present, batch.absent)
        loss = loss + local_weight * parts["local"]
    best_negative = jnp.where(batch.negative, logits, -jnp.inf).max(1, keepdims=True)
    own_first = (batch.positive & (logits >= best_negative)).any(1)
    parts["accuracy"] = own_first.mean(dtype=jnp.float32)
    named = batch.positive[:, first_name:]  # [B,N]; all False where no single name says what there is
    found = logits[:, first_name:].argmax(1, keepdims=True)
    hits = jnp.take_along_axis(named, found, axis=1).sum(dtype=jnp.float32)
    parts["name"] = hits / jnp.maximum(named.sum(dtype=jnp.float32), 1.0)
    parts["loss"] = loss
    return loss, parts
