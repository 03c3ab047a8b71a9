"""CLIP's ModifiedResNet (arXiv 2103.00020, section 2.4) with BatchNorm folded into the convolutions.

Three differences from He et al.: a stem of three convolutions, strides that are a mean of 2x2 places before a
convolution of stride 1, and attention pooling in place of the last mean.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxzs.clip.config import ResNetConfig
from jaxzs.clip.layers import Array, Numerics, Params, dense


def feature_maps(
    params: Params, pixels: Array, vision: ResNetConfig, numerics: Numerics = Numerics()
) -> tuple[jax.Array, ...]:
    """The stem's output and that of each stage: pixels [B,H,W,3] -> 5 maps, the last [B,H/32,W/32,32 width].

    params: the tree under "vision_model".
    """
    stem = params["stem"]
    x = jax.nn.relu(convolve(stem["conv1"], pixels, numerics, stride=2))  # [B,H/2,W/2,width/2]
    x = jax.nn.relu(convolve(stem["conv2"], x, numerics))  # [B,H/2,W/2,width/2]
    maps = [halve(jax.nn.relu(convolve(stem["conv3"], x, numerics)))]  # [B,H/4,W/4,width]
    for stage, count in enumerate(vision.layers):
        x = maps[-1]
        for i in range(count):
            x = bottleneck(params["stages"][str(stage)][str(i)], x, numerics, halving=stage > 0 and i == 0)
        maps.append(x)
    return tuple(maps)


def bottleneck(params: Params, x: jax.Array, numerics: Numerics, *, halving: bool) -> jax.Array:
    """1x1, 3x3, 1x1 convolutions and a shortcut: [B,H,W,C] -> [B,H,W,4c], half as high and wide if `halving`."""
    y = jax.nn.relu(convolve(params["conv1"], x, numerics))  # [B,H,W,c]
    y = jax.nn.relu(convolve(params["conv2"], y, numerics))  # [B,H,W,c]; stride 1 even where the block halves
    y = convolve(params["conv3"], halve(y) if halving else y, numerics)  # [B,H,W,4c] or [B,H/2,W/2,4c]
    if "shortcut" in params:  # the first block of each stage; in stage 0 it only widens
        x = convolve(params["shortcut"], halve(x) if halving else x, numerics)
    return jax.nn.relu(x + y)


def convolve(params: Params, x: Array, numerics: Numerics, *, stride: int = 1) -> jax.Array:
    """Convolution padded by half its kernel, and bias: [B,H,W,C] -> [B,H/stride,W/stride,D] float32."""
    kernel, dtype = params["kernel"], numerics.compute_dtype or jnp.float32
    if kernel.shape[:2] == (1, 1) and stride == 1:  # a product over the channels, place by place
        return dense({"kernel": kernel[0, 0], "bias": params["bias"]}, jnp.asarray(x), numerics)
    half = kernel.shape[0] // 2  # 1 for 3x3, so that stride 1 keeps height and width
    y = jax.lax.conv_general_dilated(
        jnp.asarray(x, dtype),
        kernel.astype(dtype),
        (stride, stride),
        [(half, half)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=numerics.precision,
        preferred_element_type=jnp.float32,
    )
    return y + params["bias"].astype(jnp.float32)[None, None, None]  # [B,H/stride,W/stride,D]


def halve(x: jax.Array) -> jax.Array:
    """Mean of 2x2 places; an odd last row or column is left out, as torch's AvgPool2d does."""
    B, H, W, C = x.shape
    return x[:, : H // 2 * 2, : W // 2 * 2].reshape(B, H // 2, 2, W // 2, 2, C).mean((2, 4))  # [B,H/2,W/2,C]


def local_features(
    params: Params,
    pixels: Array,
    vision: ResNetConfig,
    numerics: Numerics = Numerics(),
    positions: jax.Array | None = None,
) -> jax.Array:
    """Every place as its own only key of the attention pool, in the shared space: pixels [B,H,W,3] -> [B,P,E].

    As MaskCLIP reads CLIP's ResNets (arXiv 2112.01071): without positions, or with those given, [P,D].
    params: the whole tree.
    """
    x = feature_maps(params["vision_model"], pixels, vision, numerics)[-1]  # [B,H/32,W/32,D]
    x = x.reshape(x.shape[0], -1, x.shape[-1])  # [B,P,D]
    x = x if positions is None else x + positions[None]  # [B,P,D]; row 0 of the table is the mean's, not given here
    # The pool's output projection, `c_proj` in OpenAI's files, is the visual projection of the tree.
    return dense(
        params["visual_projection"], dense(params["vision_model"]["attention_pool"]["v_proj"], x, numerics), numerics
    )
