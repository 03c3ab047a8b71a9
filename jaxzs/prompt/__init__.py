"""Prompt tuning with pseudolabels: three modalities, three paradigms, FPL, IFPL and GRIP (arXiv 2306.01669)."""
