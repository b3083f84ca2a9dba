"""Generation for many users at once: sequences, a scheduler, the KV cache's blocks, one thread."""
