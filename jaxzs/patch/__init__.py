"""Patch classification (TagCLIP, arXiv 2312.12828): tags and their places for images of any size."""

from jaxzs.patch.batching import Batching, prepare_image
from jaxzs.patch.grid import Grid, full_grid, grid_from_mask
from jaxzs.patch.images import ImageTags, tag_images
from jaxzs.patch.local import (
    LocalOutput,
    attention_votes,
    coarse_scores,
    default_attention_layers,
    default_votes,
    fuse_attention,
    local_tower,
)
from jaxzs.patch.refine import Refined, dual_masking
from jaxzs.patch.reidentify import Candidates, find_candidates, reidentify
from jaxzs.patch.tags import Tags, decide, fuse_scores, tag

__all__ = [
    "Batching",
    "Candidates",
    "Grid",
    "ImageTags",
    "LocalOutput",
    "Refined",
    "Tags",
    "attention_votes",
    "coarse_scores",
    "decide",
    "default_attention_layers",
    "default_votes",
    "dual_masking",
    "find_candidates",
    "full_grid",
    "fuse_attention",
    "fuse_scores",
    "grid_from_mask",
    "local_tower",
    "prepare_image",
    "reidentify",
    "tag",
    "tag_images",
]
