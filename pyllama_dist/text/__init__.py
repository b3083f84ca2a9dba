"""Text in and out: the tokenizer, the chat template, and decoding token by token."""
