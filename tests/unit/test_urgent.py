"""Requests in the order of their deadlines."""

from hypothesis import given
from hypothesis import strategies as st
from unit.test_backlog import Waiting

from headrace.batching.urgent import Urgent


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 9), st.integers(0, 4)),
            st.tuples(st.just("pop")),
            st.tuples(st.just("put back")),
        )
    ),
    st.integers(0, 10),
)
def test_the_most_pressing_goes_first_and_of_equals_the_first_comer(events, asked_ns):
    urgent, inside, last = Urgent(), [], None
    for name, *values in events:
        if name == "add":
            one = Waiting(values[1], rank_ns=values[0])
            urgent.add(one)
            inside.append(one)
        elif name == "pop" and inside:
            wanted = min(inside, key=lambda one: (one.rank_ns, one.number))
            assert (urgent.first, urgent.rank_ns) == (wanted, wanted.rank_ns)
            last = urgent.pop()
            assert last is wanted
            inside.remove(last)
        elif name == "put back" and last is not None:
            urgent.put_back(last)  # it has a smaller number than all that came later
            inside.append(last)
            last = None
        assert len(urgent) == len(inside)
        assert set(map(id, urgent)) == set(map(id, inside))
        assert urgent.rows_before(asked_ns) == sum(one.rows or 1 for one in inside if one.rank_ns <= asked_ns)
