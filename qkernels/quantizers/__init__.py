"""Quantization methods, a module each, and the driver that takes them through a model."""
