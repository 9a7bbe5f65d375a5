"""The metrics that models' own code keeps, as a scrape shows them."""

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_classic

from headrace.core.custom_metric import CustomMetric
from headrace.metrics.custom import custom_text


def sample(name, kind="counter", value=1.0, buckets=(), count=0, **labels):
    return CustomMetric(name, f"what {name} is", kind, tuple(labels.items()), value, buckets, count)


def families(*samples, openmetrics=False):
    text = custom_text(samples, openmetrics)
    read = read_openmetrics(text + "# EOF\n") if openmetrics else read_classic(text)
    return {family.name: family for family in read}


def values(family):
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for one in family.samples}


@pytest.mark.parametrize("openmetrics", [False, True])
def test_counters_add_up_over_instances_and_gauges_are_the_last_told(openmetrics):
    found = families(
        sample("hits_total", value=2, model="a"),
        sample("hits_total", value=3, model="a"),
        sample("hits_total", value=5, model="b"),
        sample("depth", "gauge", 7),
        sample("depth", "gauge", 4),
        openmetrics=openmetrics,
    )
    assert values(found["hits"]) == {("hits_total", (("model", "a"),)): 5, ("hits_total", (("model", "b"),)): 5}
    assert values(found["depth"]) == {("depth", ()): 4}
    assert (found["hits"].type, found["depth"].type) == ("counter", "gauge")
    assert found["depth"].documentation == "what depth is"


@pytest.mark.parametrize("openmetrics", [False, True])
def test_a_counter_keeps_its_name_whatever_it_is(openmetrics):
    lines = custom_text([sample("hits", value=2.0)], openmetrics).splitlines()
    assert lines[-1] == "hits 2.0"
    assert families(sample("hits"), openmetrics=openmetrics)


@pytest.mark.parametrize("openmetrics", [False, True])
def test_histograms_add_up_bucket_by_bucket(openmetrics):
    one = sample("size", "histogram", 10.5, ((1.0, 2), (5.0, 3)), 4, model="a")
    other = sample("size", "histogram", 1.5, ((1.0, 1), (5.0, 1)), 1, model="a")
    found = families(one, other, openmetrics=openmetrics)["size"]
    assert found.type == "histogram"
    assert values(found) == {
        ("size_bucket", (("le", "1.0"), ("model", "a"))): 3,
        ("size_bucket", (("le", "5.0"), ("model", "a"))): 4,
        ("size_bucket", (("le", "+Inf"), ("model", "a"))): 5,
        ("size_sum", (("model", "a"),)): 12,
        ("size_count", (("model", "a"),)): 5,
    }


def test_of_histograms_with_other_buckets_only_those_of_both_are_shown():
    """A bucket that only one has would be lower than the one below it."""
    one = sample("size", "histogram", 9.0, ((1.0, 5), (2.0, 6), (8.0, 7)), 7)
    other = sample("size", "histogram", 9.0, ((2.0, 1), (4.0, 2), (8.0, 3)), 4)
    found = values(families(one, other)["size"])
    assert {labels[0][1]: value for (name, labels), value in found.items() if name == "size_bucket"} == {
        "2.0": 7,
        "8.0": 10,
        "+Inf": 11,
    }


def test_adding_up_does_not_change_what_the_instances_have_told():
    samples = [sample("size", "histogram", 1.0, ((1.0, 1),), 1) for _ in range(2)]
    assert custom_text(samples, False) == custom_text(samples, False)
    assert samples[0].buckets == ((1.0, 1),)


def test_of_a_name_with_two_kinds_the_first_counts():
    found = families(sample("x", "gauge", 1), sample("x", "counter", 5), sample("y", "gauge", 2))
    assert values(found["x"]) == {("x", ()): 1}
    assert found["x"].type == "gauge"
    assert values(found["y"]) == {("y", ()): 2}


@pytest.mark.parametrize("name", ["nv_inference_count", "headrace_up", "process_cpu_seconds", "python_info"])
def test_no_model_can_pass_for_the_server(name):
    assert custom_text([sample(name)], False) == ""


def test_descriptions_and_labels_may_hold_anything():
    odd = 'a "quoted" \\ back\nslash'
    text = custom_text([CustomMetric("x", odd, "gauge", (("k", odd),), 1.0)], False)
    (family,) = read_classic(text)
    assert family.documentation == odd
    assert family.samples[0].labels == {"k": odd}


def test_without_samples_there_is_nothing():
    assert custom_text([], True) == ""
