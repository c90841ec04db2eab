"""Kernel rows, a file for each backend."""
