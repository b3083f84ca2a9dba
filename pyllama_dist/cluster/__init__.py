"""Brings up a cluster: connect to the workers, plan who holds what, load; then take it down."""

from pyllama_dist.cluster.bring_up import open_root
from pyllama_dist.cluster.plan import MAX_SEQS, Cluster, programs

__all__ = ["MAX_SEQS", "Cluster", "open_root", "programs"]
