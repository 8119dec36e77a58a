"""aligndistil: token-level alignment of language models (AlignDistil, arXiv 2503.02832, and its baselines)."""

__version__ = "0.1.0"
