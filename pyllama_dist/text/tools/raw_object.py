"""Arguments that a model writes as a JSON object: they are passed on as they are spelled."""

from pyllama_dist.text.events import CallArguments
from pyllama_dist.text.incoming import Incoming
from pyllama_dist.text.tools.format import Arguments
from pyllama_dist.text.tools.json_text import ObjectEnd


def object_arguments(incoming: Incoming, index: int) -> Arguments:
    """Gives the object that comes, piece by piece; at the end whether it is whole."""
    end = ObjectEnd()
    while True:
        text = incoming.rest()
        size = end.find(text)
        if size is not None:
            incoming.put_back(len(text) - size)
        if shown := incoming.shown(text[:size]):
            yield CallArguments(index, shown)
        if size is not None:
            return not end.broken
        if incoming.ended:
            return False
        yield None
