"""Which node's CPUs a worker is kept to, on machines that nobody has."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.workers.numa import Node, assign, parse_cpus, read_nodes

TWO = [Node(0, frozenset(range(8))), Node(1, frozenset(range(8, 16)))]


def test_on_one_node_nothing_is_decided():
    assert assign(1, [], {}) is None
    assert assign(1, TWO[:1], {}) is None


def test_workers_are_spread_by_their_threads():
    assert assign(4, TWO, {}) == TWO[0]
    assert assign(4, TWO, {0: 4}) == TWO[1]
    assert assign(2, TWO, {0: 4, 1: 8}) == TWO[0]


def test_one_that_fits_no_node_runs_anywhere():
    assert assign(8, TWO, {}) == TWO[0]
    assert assign(9, TWO, {}) is None


def test_a_node_of_which_little_may_be_used_gets_little():
    nodes = [Node(0, frozenset({0})), Node(1, frozenset(range(4, 10)))]
    assert assign(2, nodes, {1: 100}) == nodes[1]
    assert assign(1, nodes, {}) == nodes[1]
    assert assign(1, nodes, {1: 6}) == nodes[0]


@given(st.lists(st.integers(1, 8), max_size=60))
def test_no_node_is_loaded_much_above_another(workers):
    assigned: Counter[int] = Counter()
    for threads in workers:
        node = assign(threads, TWO, assigned)
        assert node is not None
        assigned[node.number] += threads
    assert abs(assigned[0] - assigned[1]) <= 8


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-3,8\n", {0, 1, 2, 3, 8}), ("5", {5}), ("", set()), ("0,2,4-5", {0, 2, 4, 5})]
)
def test_lists_of_the_kernel(text, cpus):
    assert parse_cpus(text) == cpus


def test_the_nodes_of_a_machine(tmp_path):
    for number, cpus in ((0, "0-3"), (1, "4-7"), (10, "8-9"), (2, "")):
        (tmp_path / f"node{number}").mkdir()
        (tmp_path / f"node{number}/cpulist").write_text(f"{cpus}\n")
    (tmp_path / "node3").mkdir()
    (tmp_path / "possible").write_text("0-10")
    assert read_nodes(tmp_path, {1, 2, 5, 8, 9}) == [
        Node(0, frozenset({1, 2})),
        Node(1, frozenset({5})),
        Node(10, frozenset({8, 9})),
    ]
    assert read_nodes(tmp_path, {0}) == [Node(0, frozenset({0}))]
    assert read_nodes(tmp_path / "none") == []
