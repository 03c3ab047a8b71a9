"""The best label without labels, and never a worse one: heads fitted to unlabelled images, to few labels, to streams.

Read `heads.py` (what every method returns), `discriminant.py` (anchored GDA, few labels), `gaussian.py` and `graph.py`
(StatA, TransCLIP), `choice.py` (the rule), `online.py` (streams), `files.py`.
`images.py` says how a method sees its images.
"""

from jaxzs.adapt import online
from jaxzs.adapt.calibration import calibrate, expected_calibration_error, reliability
from jaxzs.adapt.choice import Adapted, Choice, choose, fit, probabilities
from jaxzs.adapt.discriminant import anchored_gda, few_shot, gda, gda_em
from jaxzs.adapt.files import KeptHead, load_head, save_head
from jaxzs.adapt.gaussian import stata, transclip
from jaxzs.adapt.graph import Graph, nearest_neighbours
from jaxzs.adapt.heads import GaussianHead, Head, num_classes, scores, text_head
from jaxzs.adapt.images import Shots
from jaxzs.adapt.online import onzeta, tda
from jaxzs.adapt.propagation import zlap
from jaxzs.adapt.vision import proxies

__all__ = [
    "Adapted",
    "Choice",
    "GaussianHead",
    "Graph",
    "Head",
    "KeptHead",
    "Shots",
    "anchored_gda",
    "calibrate",
    "choose",
    "expected_calibration_error",
    "few_shot",
    "fit",
    "gda",
    "gda_em",
    "load_head",
    "nearest_neighbours",
    "num_classes",
    "online",
    "onzeta",
    "probabilities",
    "proxies",
    "reliability",
    "save_head",
    "scores",
    "stata",
    "tda",
    "text_head",
    "transclip",
    "zlap",
]
