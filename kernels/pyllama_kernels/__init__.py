"""Kernels: block formats, the NumPy reference of every kernel, and what Numba compiles."""
