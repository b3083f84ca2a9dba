"""The files of distributed-llama: models (`.m`) and tokenizers (`.t`)."""
