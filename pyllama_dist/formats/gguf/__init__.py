"""A model in a GGUF file, seen as a checkpoint of Hugging Face."""
