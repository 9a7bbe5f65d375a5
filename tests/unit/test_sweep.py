"""How often a queue without room looks for requests that nobody waits for."""

from headrace.batching.sweep import INTERVAL_NS, Sweep

START_NS = 10**12


def test_at_first_at_once_and_then_once_in_a_while():
    sweep = Sweep()
    times_ns = [START_NS + number * INTERVAL_NS // 4 for number in range(13)]
    assert [number for number, now_ns in enumerate(times_ns) if sweep.due(now_ns)] == [0, 5, 10]


def test_being_asked_often_does_not_put_it_off():
    sweep = Sweep()
    assert sweep.due(START_NS)
    assert not any(sweep.due(START_NS + more_ns) for more_ns in range(0, INTERVAL_NS + 1, INTERVAL_NS // 100))
    assert sweep.due(START_NS + INTERVAL_NS + 1)
