"""Tool calls: what each generation of models writes, read while it comes."""
