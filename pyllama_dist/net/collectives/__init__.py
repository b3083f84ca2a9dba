"""The exchanges of a step: what travels when, as schedules, and how they are carried out.

To write another all-reduce: a file like `direct.py`, with a pure `schedule` and its `cost` as a
formula; a line in `ALGORITHMS` of `choose.py`. Then `--collective` takes its name, and the tests
run it on simulated nodes.
"""

from pyllama_dist.net.collectives.choose import ALGORITHMS, AUTO, make_schedule
from pyllama_dist.net.collectives.exchange import Exchange
from pyllama_dist.net.collectives.schedule import Cost, Part, Reduce, Round, Schedule

__all__ = [
    "ALGORITHMS",
    "AUTO",
    "Cost",
    "Exchange",
    "Part",
    "Reduce",
    "Round",
    "Schedule",
    "make_schedule",
]
