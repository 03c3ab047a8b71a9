"""Prompt tuning with pseudolabels: three modalities, three paradigms, FPL, IFPL and GRIP (arXiv 2306.01669).

modality = prompt.TextPrompt()
frozen = prompt.freeze(model, modality, class_names)
pool = prompt.Pool(prompt.constant_images(modality, model.params, pixels, model.config))
split = prompt.ul_split(len(pixels), len(class_names))
tuned = prompt.fit(prompt.Task(modality, model.config), frozen, pool, [split], prompt.Plan("grip"))
"""

import importlib
from typing import Any

from jaxzs.prompt.evaluation import Evaluation, evaluate
from jaxzs.prompt.files import TunedPrompt, load_prompt, save_prompt
from jaxzs.prompt.inference import PromptedEncoders, image_logits, nearest_tokens, prompted_encoders
from jaxzs.prompt.joint import JointPrompt, joint_prefixes
from jaxzs.prompt.modality import Frozen, Modality, Task, class_logits
from jaxzs.prompt.objective import balance_weights, loss
from jaxzs.prompt.prepare import Pool, constant_images, freeze, read_source
from jaxzs.prompt.protocol import Split, growing_schedule, ssl_split, trzsl_split, ul_split
from jaxzs.prompt.resuming import Progress, Record
from jaxzs.prompt.scoring import plain_logits, score
from jaxzs.prompt.selection import select_pseudolabels, select_top_k
from jaxzs.prompt.strategies import Fit, Plan, Running, fit
from jaxzs.prompt.text import TextPrompt, placeholder_ids, text_features
from jaxzs.prompt.training import DivergedError, Optimisation, Training, train
from jaxzs.prompt.visual import VisualPrompt, image_features


def __getattr__(name: str) -> Any:
    """`RobinHood` and its functions live in `jaxzs.report` now; the old spelling still finds them."""
    if name in ("RobinHood", "plot_robin_hood", "robin_hood"):
        return getattr(importlib.import_module("jaxzs.report"), name)
    if name == "classify":  # it gave logits: to classify is to give labels, as `jaxzs.classify` does
        raise AttributeError("prompt.classify is prompt.image_logits now")
    raise AttributeError(f"module 'jaxzs.prompt' has no attribute {name!r}")


__all__ = [
    "DivergedError",
    "Evaluation",
    "Fit",
    "Frozen",
    "JointPrompt",
    "Modality",
    "Optimisation",
    "Plan",
    "Pool",
    "Progress",
    "PromptedEncoders",
    "Record",
    "Running",
    "Split",
    "Task",
    "TextPrompt",
    "Training",
    "TunedPrompt",
    "VisualPrompt",
    "balance_weights",
    "class_logits",
    "constant_images",
    "evaluate",
    "fit",
    "freeze",
    "growing_schedule",
    "image_features",
    "image_logits",
    "joint_prefixes",
    "load_prompt",
    "loss",
    "nearest_tokens",
    "placeholder_ids",
    "plain_logits",
    "prompted_encoders",
    "read_source",
    "save_prompt",
    "score",
    "select_pseudolabels",
    "select_top_k",
    "ssl_split",
    "text_features",
    "train",
    "trzsl_split",
    "ul_split",
]
