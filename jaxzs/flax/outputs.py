"""What the models return: values by attribute, by name and by place, as transformers' `ModelOutput` has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax


class ModelOutput:
    """Entries that are None count neither in the tuple nor among the names. A pytree."""

    def keys(self) -> tuple[str, ...]:
        """Names of the entries that are there."""
        return tuple(f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None)  # type: ignore[arg-type]

    def values(self) -> tuple[Any, ...]:
        """The entries that are there."""
        return tuple(getattr(self, name) for name in self.keys())

    def items(self) -> tuple[tuple[str, Any], ...]:
        """Names and entries."""
        return tuple(zip(self.keys(), self.values(), strict=True))

    def to_tuple(self) -> tuple[Any, ...]:
        """The entries as a tuple; an output within is a tuple, too."""
        return tuple(own.to_tuple() if isinstance(own, ModelOutput) else own for own in self.values())

    def replace(self, **changes: Any) -> Any:
        """A copy with other entries."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def __getitem__(self, key: str | int | slice) -> Any:
        return dict(self.items())[key] if isinstance(key, str) else self.to_tuple()[key]  # by name, else by place

    def __iter__(self) -> Iterator[str]:
        # Names, as of a mapping: transformers' outputs are ordered dicts.
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlaxBaseModelOutputWithPooling(ModelOutput):
    """Of one tower. last_hidden_state [B,T,D], pooler_output [B,D]; on request L+1 hidden_states [B,T,D] and L
    attentions [B,H,T,T]."""

    last_hidden_state: Any = None
    pooler_output: Any = None
    hidden_states: Any = None
    attentions: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlaxCLIPTextModelOutput(ModelOutput):
    """Of the text tower with projection. text_embeds [B,E], not normalised; the rest as of one tower."""

    text_embeds: Any = None
    last_hidden_state: Any = None
    hidden_states: Any = None
    attentions: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlaxCLIPOutput(ModelOutput):
    """Of both towers. logits_per_image [B,C], logits_per_text [C,B]; text_embeds [C,E] and image_embeds [B,E],
    L2-normalised; and the outputs of the towers."""

    logits_per_image: Any = None
    logits_per_text: Any = None
    text_embeds: Any = None
    image_embeds: Any = None
    text_model_output: Any = None
    vision_model_output: Any = None
