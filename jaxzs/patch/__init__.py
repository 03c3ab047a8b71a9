"""Patch classification (TagCLIP, arXiv 2312.12828): tags, places and masks for images of any size."""

from jaxzs.patch.batching import Batching, prepare_image
from jaxzs.patch.cam import CamOutput, CamTexts, class_activation_maps
from jaxzs.patch.crf import dense_crf
from jaxzs.patch.dense import dense_features, dense_scores
from jaxzs.patch.grid import Grid, full_grid, grid_from_mask
from jaxzs.patch.images import ImageTags, tag_images
from jaxzs.patch.learned import (
    Encoded,
    PatchClassifier,
    encoded_patches,
    learn_patch_classifier,
    tag_images_with,
    tag_with,
)
from jaxzs.patch.local import (
    LocalOutput,
    attention_votes,
    coarse_scores,
    default_attention_layers,
    default_votes,
    fuse_attention,
    local_tower,
)
from jaxzs.patch.masks import ImageMask, pixel_labels, score_maps, segment_images
from jaxzs.patch.refine import Refined, dual_masking
from jaxzs.patch.reidentify import Candidates, find_candidates, reidentify
from jaxzs.patch.segmentation import Segmentation, affinity, enlarge, label_map, segment
from jaxzs.patch.settings import CRF, Segmenting, Tagging, default_affinity_layers
from jaxzs.patch.tags import Tags, decide, fuse_scores, tag
from jaxzs.patch.texts import tag_texts
from jaxzs.patch.windows import Dense, DenseMask, segment_dense

__all__ = [
    "CRF",
    "Batching",
    "CamOutput",
    "CamTexts",
    "Candidates",
    "Dense",
    "DenseMask",
    "Encoded",
    "Grid",
    "ImageMask",
    "ImageTags",
    "LocalOutput",
    "PatchClassifier",
    "Refined",
    "Segmentation",
    "Segmenting",
    "Tagging",
    "Tags",
    "affinity",
    "attention_votes",
    "class_activation_maps",
    "coarse_scores",
    "decide",
    "default_affinity_layers",
    "default_attention_layers",
    "default_votes",
    "dense_crf",
    "dense_features",
    "dense_scores",
    "dual_masking",
    "encoded_patches",
    "enlarge",
    "find_candidates",
    "full_grid",
    "fuse_attention",
    "fuse_scores",
    "grid_from_mask",
    "label_map",
    "learn_patch_classifier",
    "local_tower",
    "pixel_labels",
    "prepare_image",
    "reidentify",
    "score_maps",
    "segment",
    "segment_dense",
    "segment_images",
    "tag",
    "tag_images",
    "tag_images_with",
    "tag_texts",
    "tag_with",
]
