"""Measures what a model does on a cluster: tokens per second, and what they are spent on."""
