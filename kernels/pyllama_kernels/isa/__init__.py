"""One file for each instruction set: how it multiplies bytes, and the kernel made of it."""
