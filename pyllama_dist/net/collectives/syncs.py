"""The exchanges that sum nothing: one round, between the root and all workers."""

from collections.abc import Iterator

from pyllama_dist.net.collectives.schedule import Action, Part, Round, others
from pyllama_dist.program import SyncKind


def schedule(kind: SyncKind, node: int, n_nodes: int, rows: int) -> Iterator[Action]:
    """One node's part: from the root to all workers (broadcast), or from them to it (gather)."""
    match kind:
        case SyncKind.WITH_ROOT:
            root = (Part(0, 0, rows),)
            if node:
                yield Round({}, {0: root})
            else:
                yield Round(dict.fromkeys(others(0, n_nodes), root), {})
        case SyncKind.NODE_SLICES_EXCEPT_ROOT:
            if node:
                yield Round({0: (Part(node, 0, rows),)}, {})
            else:
                yield Round({}, {i: (Part(i, 0, rows),) for i in others(0, n_nodes)})
