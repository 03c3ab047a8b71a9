"""The way back for code that called transformers' Flax CLIP, which transformers 5 no longer has.

    from jaxzs.flax import FlaxCLIPModel        # was: from transformers import FlaxCLIPModel
    model = FlaxCLIPModel.from_pretrained("openai/clip-vit-base-patch32")
    outputs = model(input_ids=ids, pixel_values=pixels)     # NCHW, as there
    outputs.logits_per_image

Classes, signatures, parameter trees and outputs are those of transformers 4.57.6. Beside them a module for
`flax.linen` (`jaxzs.flax.linen.CLIP`) and one for `flax.nnx` (`jaxzs.flax.nnx.CLIP`), for people who compose modules.
All of it is a thin coat around the pure functions of `jaxzs.clip`.
"""

from jaxzs.flax.models import FlaxCLIPModel, FlaxCLIPTextModel, FlaxCLIPTextModelWithProjection, FlaxCLIPVisionModel
from jaxzs.flax.outputs import FlaxBaseModelOutputWithPooling, FlaxCLIPOutput, FlaxCLIPTextModelOutput

__all__ = [
    "FlaxBaseModelOutputWithPooling",
    "FlaxCLIPModel",
    "FlaxCLIPOutput",
    "FlaxCLIPTextModel",
    "FlaxCLIPTextModelOutput",
    "FlaxCLIPTextModelWithProjection",
    "FlaxCLIPVisionModel",
]
