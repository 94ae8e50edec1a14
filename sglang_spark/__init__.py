"""Channel-pruned KV cache for SGLang: SparK (arXiv 2508.15212) behind ``--kv-compress spark``."""

__version__ = "0.2.0"
