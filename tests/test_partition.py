"""Shards tile the whole, and what the nodes hold put together is the model."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllama_dist.config import Arch, FloatType
from pyllama_dist.ops import Attention
from pyllama_dist.partition import BLOCK, cut, head_unit, max_nodes, partition
from pyllama_dist.program import weights

HEAD_DIMS = (8, 12, 16, 20, 32, 48, 64, 80, 96, 128)


@st.composite
def cuttings(draw):
    """The arguments of `partition`."""
    n_kv_heads, group = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    head_dim, block = draw(st.sampled_from(HEAD_DIMS)), draw(st.sampled_from((1, BLOCK)))
    n_heads = n_kv_heads * group
    return {
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_dim": head_dim,
        "ffn_dim": draw(st.integers(1, 600)),
        "vocab_size": draw(st.integers(1, 600)),
        "n_nodes": draw(st.integers(1, max_nodes(n_heads, head_dim, block))),
        "block": block,
    }


def assert_tiles(ranges, total, unit):
    """Without gap or overlap, in whole units, even to within one unit, the first ones larger."""
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert ranges[-1][1] == total
    assert all(stop % unit == 0 or stop == total for _, stop in ranges)
    units = [-(-(stop - start) // unit) for start, stop in ranges]
    assert units == sorted(units, reverse=True)
    assert units[0] - units[-1] <= 1


@given(st.integers(0, 5000), st.integers(1, 64), st.sampled_from((1, 2, 3, 32)))
def test_a_cut_tiles_the_whole(total, parts, unit):
    assert_tiles(cut(total, parts, unit), total, unit)


@given(cuttings())
def test_shares_tile_the_model(sizes):
    shards = partition(**sizes)
    unit = head_unit(sizes["head_dim"], sizes["block"])
    assert len(shards) == sizes["n_nodes"]
    assert_tiles([shard.heads for shard in shards], sizes["n_heads"], unit)
    assert_tiles([shard.ffn for shard in shards], sizes["ffn_dim"], BLOCK)
    assert_tiles([shard.vocab for shard in shards], sizes["vocab_size"], 1)


@given(cuttings())
def test_every_node_has_query_heads_and_just_the_key_heads_that_they_read(sizes):
    group = sizes["n_heads"] // sizes["n_kv_heads"]
    for shard in partition(**sizes):
        read = {head // group for head in range(*shard.heads)}
        assert read
        assert set(range(*shard.kv_heads)) == read


@given(st.sampled_from(HEAD_DIMS), st.sampled_from((1, BLOCK)))
def test_a_unit_is_the_fewest_heads_of_whole_blocks(head_dim, block):
    fewest = next(n for n in range(1, 33) if n * head_dim % block == 0)
    assert head_unit(head_dim, block) == fewest


@pytest.mark.parametrize("n_nodes", [0, -1, 9])
def test_more_nodes_than_units_of_heads_are_refused(n_nodes):
    sizes = {"n_heads": 16, "n_kv_heads": 4, "head_dim": 16, "ffn_dim": 96, "vocab_size": 101}
    assert max_nodes(16, 16) == 8
    with pytest.raises(ValueError, match="nodes"):
        partition(**sizes, n_nodes=n_nodes)


def parts_of(model, n_nodes):
    """By tensor, each node's part: rows, columns, bytes."""
    parts = {}
    for program in model.programs(n_nodes):
        for weight in weights(program):
            held = model.slice(weight.tensor, weight.rows, weight.cols)
            assert held.size == weight.nbytes
            parts.setdefault(weight.tensor, []).append((weight.rows, weight.cols, held))
    return parts


@pytest.mark.parametrize("weights_type", [FloatType.F32, FloatType.Q40, FloatType.Q80])
@pytest.mark.parametrize("n_nodes", range(1, 9))
def test_what_nodes_hold_put_together_is_the_model(tiny, weights_type, n_nodes):
    model = tiny(arch=Arch.GLM, weights=weights_type)
    parts = parts_of(model, n_nodes)
    names = {name for name in model.tensors if name != "embed_tokens.weight"}
    assert set(parts) == names
    for name, held in parts.items():
        whole = model.raw(name)
        arrays = [array for _, _, array in held]
        if "norm" in name:
            for array in arrays:
                np.testing.assert_array_equal(array, whole)
        elif "o_proj" in name or "down_proj" in name:
            np.testing.assert_array_equal(np.concatenate(arrays, axis=1), whole)
        elif "k_proj" in name or "v_proj" in name:  # parts overlap where a group is cut
            axis = 0 if name.endswith("weight") else 1
            spans = [(rows, cols)[axis] for rows, cols, _ in held]
            assert set().union(*(range(*span) for span in spans)) == set(
                range(whole.shape[0] if axis == 0 else whole.shape[1] // 4)
            )
        else:
            axis = 0 if name.endswith("weight") else 1
            np.testing.assert_array_equal(np.concatenate(arrays, axis=axis), whole)


@given(cuttings(), st.integers(0, 2**32 - 1))
def test_partial_sums_over_columns_add_up(sizes, seed):
    rng = np.random.default_rng(seed)
    for field in ("heads", "ffn"):
        ranges = [getattr(shard, field) for shard in partition(**sizes)]
        x = rng.integers(-9, 10, (3, ranges[-1][1])).astype(np.float64)
        matrix = rng.integers(-9, 10, (5, ranges[-1][1])).astype(np.float64)
        partial = [x[:, a:z] @ matrix[:, a:z].T for a, z in ranges]
        np.testing.assert_array_equal(sum(partial), x @ matrix.T)


@settings(max_examples=25)
@given(
    n_kv_heads=st.integers(1, 4),
    group=st.integers(1, 6),
    head_dim=st.sampled_from((8, 16, 32)),
    weights_type=st.sampled_from((FloatType.F32, FloatType.Q40)),
    data=st.data(),
)
def test_each_query_head_reads_the_key_head_of_its_group(
    tiny, n_kv_heads, group, head_dim, weights_type, data
):
    n_heads, block = n_kv_heads * group, weights_type.block
    if n_heads * head_dim % block:
        return  # no such file can be written
    n_nodes = data.draw(st.integers(1, max_nodes(n_heads, head_dim, block)))
    model = tiny(
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        rotary_dim=head_dim // 2,
        weights=weights_type,
    )
    heads_seen = []
    for program in model.programs(n_nodes):
        held = {w.tensor: w.rows for w in weights(program)}
        q, k = held["layers.0.self_attn.q_proj.weight"], held["layers.0.self_attn.k_proj.weight"]
        first_head, first_kv_head = q[0] // head_dim, k[0] // head_dim
        op = next(o for s in program.segments for o in s.ops if isinstance(o, Attention))
        for head in range((q[1] - q[0]) // head_dim):
            read = first_kv_head + (op.first + head) // op.group
            assert read == (first_head + head) // group
            assert k[0] <= read * head_dim < k[1]
            heads_seen.append(first_head + head)
    assert heads_seen == list(range(n_heads))
