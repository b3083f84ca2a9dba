"""Files: the `.m` model, Hugging Face checkpoints, and the way from one to the other."""
