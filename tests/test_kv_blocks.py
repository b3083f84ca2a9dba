"""Bookkeeping of the KV cache's blocks: shared, cached, copied on write, rolled back."""

import pytest

from pyllama_dist.engine.blocks import BlockPool, BlockTable, Chain

SIZE = 4


def grown(pool: BlockPool, tokens: list[int]) -> Chain:
    """A chain of these tokens, computed."""
    chain = pool.match(tokens)
    assert pool.reserve(chain, len(tokens))
    pool.write(chain, tokens[chain.length :])
    pool.settle()
    return chain


def numbers(chain: Chain) -> list[int]:
    return [block.number for block in chain.blocks]


def test_a_chain_takes_the_blocks_that_its_positions_need():
    pool = BlockPool(5, SIZE)
    assert [len(grown(pool, [i] * n).blocks) for i, n in enumerate((1, 4, 5))] == [1, 1, 2]
    assert pool.available == 1


def test_what_a_chain_left_is_found_again():
    pool = BlockPool(4, SIZE)
    first = grown(pool, list(range(10)))
    blocks = numbers(first)
    pool.release(first)
    again = pool.match([*range(10), 77])
    assert (again.length, numbers(again)) == (10, blocks)
    assert pool.reserve(again, 12)
    assert pool.copies == []  # nobody else has the last one
    assert numbers(again) == blocks


def test_chains_that_begin_alike_share_whole_blocks():
    pool = BlockPool(8, SIZE)
    one, other = grown(pool, [*range(8), 50, 51]), grown(pool, [*range(8), 60])
    assert numbers(one)[:2] == numbers(other)[:2]
    assert numbers(one)[2] != numbers(other)[2]
    assert [block.references for block in one.blocks] == [2, 2, 1]


def test_whole_blocks_are_shared_in_the_step_that_computes_them_and_parts_are_not():
    pool = BlockPool(8, SIZE)
    tokens = list(range(7))
    chain = pool.match(tokens)
    assert pool.reserve(chain, 7)
    pool.write(chain, tokens)
    assert pool.match(tokens).length == 4
    pool.settle()
    assert pool.match(tokens).length == 7


def test_the_part_of_a_block_that_fits_is_copied():
    pool = BlockPool(8, SIZE)
    first = grown(pool, list(range(7)))
    chain = pool.match([0, 1, 2, 3, 4, 5, 60])
    assert chain.length == 6
    assert pool.reserve(chain, 7)
    assert pool.copies == [(numbers(first)[1], numbers(chain)[1])]
    assert numbers(first)[1] != numbers(chain)[1]
    pool.write(chain, [60])
    assert first.blocks[1].tokens == [4, 5, 6]
    assert chain.blocks[1].tokens == [4, 5, 60]


def test_without_room_for_a_copy_the_rest_of_a_cached_block_is_given_up():
    pool = BlockPool(1, SIZE)
    pool.release(grown(pool, [1, 2, 3]))
    chain = pool.match([1, 2, 7])
    assert chain.length == 2
    assert pool.reserve(chain, 3)
    assert pool.copies == []
    pool.write(chain, [7])
    assert chain.blocks[0].tokens == [1, 2, 7]


def test_without_room_for_a_copy_a_block_of_others_stays_as_it_is():
    pool = BlockPool(1, SIZE)
    grown(pool, [1, 2, 3])
    chain = pool.match([1, 2, 7])
    assert not pool.reserve(chain, 3)
    assert chain.blocks[0].tokens == [1, 2, 3]


def test_the_longest_unused_blocks_go_first_and_ends_before_beginnings():
    pool = BlockPool(4, SIZE)
    old, new = list(range(8)), list(range(100, 108))
    pool.release(grown(pool, old))
    pool.release(grown(pool, new))
    grown(pool, [55])
    assert pool.match(new).length == 8
    assert pool.match(old).length == 4


def test_a_fork_shares_all_blocks_until_one_of_both_writes():
    pool = BlockPool(8, SIZE)
    chain = grown(pool, list(range(6)))
    fork = pool.fork(chain)
    assert numbers(fork) == numbers(chain)
    assert pool.reserve(fork, 7)
    assert pool.copies == [(numbers(chain)[1], numbers(fork)[1])]
    pool.write(fork, [70])
    pool.settle()
    assert pool.reserve(chain, 7)
    assert pool.copies == []
    pool.write(chain, [80])
    assert [c.blocks[1].tokens for c in (chain, fork)] == [[4, 5, 80], [4, 5, 70]]


def test_rolling_back_frees_blocks_and_goes_on_from_there():
    pool = BlockPool(4, SIZE)
    chain = grown(pool, list(range(14)))
    assert pool.available == 0
    pool.truncate(chain, 6)
    assert pool.available == 2
    assert pool.reserve(chain, 8)
    pool.write(chain, [60, 61])
    pool.settle()
    assert [block.tokens for block in chain.blocks] == [[0, 1, 2, 3], [4, 5, 60, 61]]


def test_blocks_that_come_to_hold_the_same_become_one():
    pool = BlockPool(8, SIZE)
    one, other = grown(pool, [1, 2, 3]), grown(pool, [1, 2, 9])
    pool.release(other)
    other = pool.match([1, 2])
    for chain in (one, other):
        assert pool.reserve(chain, 4)
        pool.write(chain, [1, 2, 3, 4][chain.length :])
    pool.settle()
    assert numbers(one) == numbers(other)
    assert one.blocks[0].references == 2


def test_a_refusal_takes_nothing():
    pool = BlockPool(3, SIZE)
    chain = grown(pool, list(range(5)))
    assert not pool.reserve(chain, 13)
    assert (pool.available, len(chain.blocks)) == (1, 2)


def test_what_is_only_cached_can_be_forgotten():
    pool = BlockPool(4, SIZE)
    kept = grown(pool, [1, 2, 3, 4, 5])
    pool.release(grown(pool, [1, 2, 3, 4, 6]))
    pool.forget()
    assert {block.number for block in pool.blocks()} == set(numbers(kept))
    assert pool.available == 2


def test_a_long_chain_ends_without_a_deep_recursion():
    pool = BlockPool(5000, 1)
    pool.release(grown(pool, list(range(5000))))
    chain = pool.match([0])
    pool.truncate(chain, 0)
    assert pool.available == 5000
    pool.forget()
    assert not list(pool.blocks())


def test_nodes_are_told_what_changes_in_their_table():
    pool, table = BlockPool(8, SIZE), BlockTable(2)
    chain = grown(pool, list(range(6)))
    a, b = numbers(chain)
    assert list(table.changes(1, chain)) == [(1, 0, a), (1, 1, b)]
    assert pool.reserve(chain, 9)
    assert list(table.changes(1, chain)) == [(1, 2, numbers(chain)[2])]
    assert list(table.changes(1, chain)) == []
    pool.release(chain)
    again = pool.match(list(range(6)))
    assert list(table.changes(1, again)) == []  # the row still has them
    assert list(table.changes(0, pool.fork(again))) == [(0, 0, a), (0, 1, b)]


@pytest.mark.parametrize("n_blocks", [1, 2])
def test_a_chain_may_fill_the_whole_pool(n_blocks):
    pool = BlockPool(n_blocks, SIZE)
    for first in range(5):
        text = [first, *range(10, 9 + n_blocks * SIZE)]
        chain = grown(pool, text)
        assert chain.length == n_blocks * SIZE
        pool.release(chain)
    chain = grown(pool, [*text[:-1], 99])
    assert chain.length == n_blocks * SIZE
