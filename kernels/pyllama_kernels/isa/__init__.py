"""One file for each instruction set: its dot products of bytes, and the kernel built from them."""
