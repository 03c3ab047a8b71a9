"""Proxy learning (InMaP): vision proxies for zero-shot classification, from unlabelled images.

Source: Qian, Xu, Hu, "Intra-Modal Proxy Learning for Zero-Shot Visual Categorization with CLIP", NeurIPS 2023,
arXiv 2310.19752. Read `settings.py` (what can be chosen), `sinkhorn.py` (pseudo labels),
`closed_form.py`, `solvers.py`; `gamma.py` chooses the class marginal; `rows.py` and `sweeps.py` say how sums over the
images are taken; `fit.py` puts it together.
"""

from jaxzs.proxy.files import LearnedProxies, load_proxies, save_proxies
from jaxzs.proxy.fit import fit, learn_proxies
from jaxzs.proxy.gamma import GAMMAS
from jaxzs.proxy.labels import choose_gamma, pseudo_labels, sinkhorn_potentials
from jaxzs.proxy.settings import Settings
from jaxzs.proxy.sinkhorn import round_labels
from jaxzs.proxy.solvers import ProxyResult
from jaxzs.proxy.streaming import fit_chunks

__all__ = [
    "GAMMAS",
    "LearnedProxies",
    "ProxyResult",
    "Settings",
    "choose_gamma",
    "fit",
    "fit_chunks",
    "learn_proxies",
    "load_proxies",
    "pseudo_labels",
    "round_labels",
    "save_proxies",
    "sinkhorn_potentials",
]
