"""Brings up a cluster: connect to the workers, plan who holds what, load; then take it down."""

from pyllama_dist.cluster.bring_up import open_root
from pyllama_dist.cluster.plan import Cluster, programs

__all__ = ["Cluster", "open_root", "programs"]
