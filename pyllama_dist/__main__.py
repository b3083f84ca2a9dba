"""`python -m pyllama_dist`."""

from pyllama_dist.cli import main

main()
