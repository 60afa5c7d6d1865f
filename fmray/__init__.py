"""fmray: multimodal pretraining, RLHF and serving on Ray; the same recipes in one process without it."""

__version__ = "0.1.0"
