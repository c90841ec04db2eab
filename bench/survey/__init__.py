"""Tiny models of every architecture of Transformers, and what quantization does to each."""
