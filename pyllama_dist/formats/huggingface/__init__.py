"""Checkpoints of Hugging Face: fetching them, their tensors, the text files beside them."""
