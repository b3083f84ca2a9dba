"""Norms and routers find the same numbers on CPUs of different width, so nodes choose alike."""

import os
import subprocess
import sys

import pytest

from pyllama_kernels.cpu import features, host

# What a router's scores depend on, of a length that leaves a rest.
_SCORES = """
import hashlib
import numpy as np
from pyllama_kernels import ops

rng = np.random.default_rng(7)
x, weight = (rng.standard_normal((9, 2 * 1024 + 37)).astype("f4") for _ in range(2))
y, scores = np.empty_like(x), np.empty((9, 9), np.float32)
ops.rms_norm(x, weight[0], 1e-5, y)
ops.matmul_f32(y, weight, np.zeros(0, np.float32), scores)
print(hashlib.sha256(y.tobytes() + scores.tobytes()).hexdigest())
"""


def scores(folder, **environment: str) -> bytes:
    changed = {"PYLLAMA_DIST_CACHE_DIR": str(folder), "PYLLAMA_KERNELS": ""} | environment
    command = [sys.executable, "-c", _SCORES]
    return subprocess.run(command, env=os.environ | changed, check=True, capture_output=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(
    host().machine != "x86_64" or not {"avx512f", "fma"} <= set(features()),
    reason="needs a CPU that is wider than a Haswell",
)
def test_a_haswell_finds_the_same_scores(tmp_path):
    mine = scores(tmp_path)
    assert scores(tmp_path, NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="") == mine
