"""Distributed inference of GLM language models on clusters of CPUs, in pure Python."""

__version__ = "0.1.0"
