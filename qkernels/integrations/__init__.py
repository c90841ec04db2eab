"""Layers and models of other packages on the kernels of this one."""
