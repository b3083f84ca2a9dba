"""The ops of which models are made. One class for each says everything about it: see `program.Op`.

A kernel lies under the name of the op's entry in `pyllama_kernels.entries`, its reference
implementation in `pyllama_kernels.reference`.
"""

from pyllama_dist.ops.attention import Attention, Select, Store
from pyllama_dist.ops.elementwise import Add, Concat, Gather, SiluMul
from pyllama_dist.ops.experts import (
    Combine,
    Dispatch,
    ExpertMatmul,
    ExpertWeight,
    QuantizeExperts,
    Route,
)
from pyllama_dist.ops.matmul import Matmul
from pyllama_dist.ops.norms import LayerNorm, RmsNorm
from pyllama_dist.ops.quantize import Quantize
from pyllama_dist.ops.rope import Rope

__all__ = [
    "Add",
    "Attention",
    "Combine",
    "Concat",
    "Dispatch",
    "ExpertMatmul",
    "ExpertWeight",
    "Gather",
    "LayerNorm",
    "Matmul",
    "Quantize",
    "QuantizeExperts",
    "RmsNorm",
    "Rope",
    "Route",
    "Select",
    "SiluMul",
    "Store",
]
