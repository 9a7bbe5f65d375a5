"""What deploy/ says about the server is true: metrics, labels, paths, ports, times and files."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from headrace.core.statistics import Statistics
from headrace.metrics import FAILURE_REASONS, Metrics, ModelSample, ServerSample, WorkerSample

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}
HEALTH = {"/v2/health/live", "/v2/health/ready"}
YAML_FILES = sorted([*DEPLOY.rglob("*.yaml"), *DEPLOY.rglob("*.yml")])

# Prometheus adds these to every series that it scrapes.
TARGET_LABELS = {"job", "instance"}


def load(path):
    return yaml.safe_load(path.read_text())


def exposed() -> dict[str, set[str]]:
    """The labels of every series name that a scrape in the classic format shows."""
    models = [ModelSample("m", "1", Statistics(), 0, 0, True, 1, 1)]
    workers = [WorkerSample("w", 1, 1, 1.0, 1, 0)]
    body = Metrics(lambda: models, lambda: workers, lambda: ServerSample(0, 0, 1.0, True)).render("")[0].decode()
    # Names from the text itself: the parser puts _total behind the counters that have none.
    names = {re.match(r"\w+", line)[0] for line in body.splitlines() if not line.startswith("#")}
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(body):
        for sample in family.samples:
            name = sample.name if sample.name in names else sample.name.removesuffix("_total")
            labels.setdefault(name, set()).update(sample.labels)
    assert labels.keys() == names
    return labels | {"up": set()}


EXPOSED = exposed()

# Words of PromQL that stand where a metric could.
KEYWORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}
GROUPING = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*\{([^}]*)\}")
MATCHER = re.compile(r'\s*(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"\s*')


def metrics_in(expression: str) -> set[str]:
    """Every identifier of a PromQL expression that is neither a function, a keyword, a label nor a duration."""
    rest = GROUPING.sub(" ", expression)
    rest = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", rest)
    words = re.findall(r"(?<![\w.$])([a-zA-Z_:][\w:]*)\s*(\(?)", rest)
    return {word for word, call in words if not call and word.lower() not in KEYWORDS}


def matchers_in(expression: str) -> list[tuple[str, str, str]]:
    """(metric, label, value) of every label matcher."""
    found = []
    for metric, inside in SELECTOR.findall(expression):
        for part in inside.split(","):
            match = MATCHER.fullmatch(part)
            assert match, f"cannot read {part!r} in {expression}"
            found.append((metric, match[1], match[3]))
    return found


def grouped_in(expression: str) -> set[str]:
    return {label.strip() for _, inside in GROUPING.findall(expression) for label in inside.split(",") if label.strip()}


def alert_rules():
    return [rule for group in load(DEPLOY / "prometheus" / "alerts.yml")["groups"] for rule in group["rules"]]


def dashboard():
    return json.loads((DEPLOY / "grafana" / "headrace.json").read_text())


def queries() -> list[tuple[str, str]]:
    """Where and what: each PromQL expression of the alerts and the dashboard."""
    found = [(rule["alert"], rule["expr"]) for rule in alert_rules()]
    for panel in dashboard()["panels"]:
        found += [(panel["title"], target["expr"]) for target in panel.get("targets", ())]
    return found


QUERIES = [pytest.param(expression, id=f"{index} {where}") for index, (where, expression) in enumerate(queries())]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ('sum by (le, model) (rate(a_bucket{b="c", d=~"e|f"}[5m]))', {"a_bucket"}),
        ("a / on (x) group_left (y) b > bool 1e3 and c offset 5m", {"a", "b", "c"}),
        ("histogram_quantile(0.99, sum(rate(h_bucket[$__rate_interval])) by (le))", {"h_bucket"}),
        ("1 - up == 0", {"up"}),
    ],
)
def test_reader_of_expressions(expression, expected):
    assert metrics_in(expression) == expected


@pytest.mark.parametrize("expression", QUERIES)
def test_queries_name_only_what_the_server_exposes(expression):
    names = metrics_in(expression)
    assert names
    assert names <= EXPOSED.keys()


@pytest.mark.parametrize("expression", QUERIES)
def test_queries_use_only_labels_that_their_metrics_have(expression):
    for metric, label, value in matchers_in(expression):
        assert label in EXPOSED[metric] | TARGET_LABELS, metric
        if label == "reason":
            assert set(value.split("|")) <= set(FAILURE_REASONS)
    for metric in metrics_in(expression):
        assert grouped_in(expression) <= EXPOSED[metric] | TARGET_LABELS, metric


@pytest.mark.parametrize("expression", QUERIES)
def test_queries_take_quantiles_of_buckets_and_rates_of_counters(expression):
    assert expression.count("(") == expression.count(")")
    for metric in re.findall(r"\b(?:rate|increase)\((\w+)", expression):
        assert metric in COUNTING, f"{metric} does not only grow"
    if "histogram_quantile" in expression:
        assert "le" in grouped_in(expression)
        assert all(metric.endswith("_bucket") for metric in metrics_in(expression))


def counting():
    body = Metrics(list, list, lambda: ServerSample(0, 0, 1.0, True)).render("")[0].decode()
    names = set()
    for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", body, re.MULTILINE):
        if kind == "counter":
            names.add(name)
        elif kind == "histogram":
            names |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"}
    return names


COUNTING = counting()


def test_alerts_cover_what_can_go_wrong():
    rules = {rule["alert"]: rule for rule in alert_rules()}
    assert len(rules) == len(alert_rules())
    used = {metric for rule in rules.values() for metric in metrics_in(rule["expr"])}
    assert used >= {
        "up",
        "headrace_server_ready",
        "headrace_model_ready",
        "headrace_worker_restarts_total",
        "nv_inference_request_failure",
        "headrace_request_duration_seconds_bucket",
    }
    for rule in rules.values():
        assert re.fullmatch(r"\d+[smh]", rule["for"])
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"].keys() == {"summary", "description"}


@pytest.mark.parametrize("rule", [pytest.param(rule, id=rule["alert"]) for rule in alert_rules()])
def test_alert_messages_use_labels_that_survive_the_expression(rule):
    grouped = grouped_in(rule["expr"]) - {"le"}
    kept = grouped or set.union(TARGET_LABELS, *(EXPOSED[metric] for metric in metrics_in(rule["expr"])))
    used = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
    assert used
    assert used <= kept


def test_alerts_look_for_the_job_that_is_scraped():
    config = load(DEPLOY / "prometheus" / "prometheus.yml")
    [job] = config["scrape_configs"]
    matched = {value for rule in alert_rules() for _, label, value in matchers_in(rule["expr"]) if label == "job"}
    assert matched == {job["job_name"]}
    assert job["metrics_path"] == "/metrics"
    services = load(DEPLOY / "compose" / "compose.yaml")["services"]
    for target in job["static_configs"][0]["targets"]:
        host, port = target.split(":")
        assert host in services
        assert int(port) == PORTS["metrics"]


def test_dashboard_panels_have_their_own_place_and_an_explanation():
    taken = set()
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"]
            assert panel["targets"]


def test_dashboard_variables_exist_and_are_all_used():
    variables = {variable["name"]: variable for variable in dashboard()["templating"]["list"]}
    text = json.dumps(dashboard()["panels"])
    assert set(re.findall(r"\$\{?([a-z]+)\}?", text)) == variables.keys()
    for variable in variables.values():
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()
            assert label in EXPOSED[metric] | TARGET_LABELS


def test_grafana_is_given_a_source_and_the_dashboard():
    compose = load(DEPLOY / "compose" / "compose.yaml")["services"]
    provisioning = DEPLOY / "grafana" / "provisioning"
    [source] = load(provisioning / "datasources" / "prometheus.yaml")["datasources"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert f"127.0.0.1:{port}:{port}" in compose[host]["ports"]
    [provider] = load(provisioning / "dashboards" / "headrace.yaml")["providers"]
    folder = provider["options"]["path"]
    mounts = [volume.split(":")[1] for volume in compose["grafana"]["volumes"]]
    assert f"{folder}/headrace.json" in mounts
    assert compose["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] in mounts
    [chosen] = [v["current"]["value"] for v in dashboard()["templating"]["list"] if v["name"] == "datasource"]
    assert chosen == source["uid"]


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.relative_to(DEPLOY).as_posix())
def test_every_yaml_file_parses(path):
    documents = list(yaml.safe_load_all(path.read_text()))
    assert documents
    assert all(isinstance(document, dict) for document in documents)


def test_compose_mounts_what_exists():
    path = DEPLOY / "compose" / "compose.yaml"
    compose = load(path)
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (path.parent / source).exists(), volume
                assert volume.endswith(":ro")
            else:
                assert source in compose["volumes"]
        for published in service["ports"]:
            assert published.startswith("127.0.0.1:"), "nothing here asks a client who it is"


def test_prometheus_finds_its_rules_in_the_container():
    volumes = load(DEPLOY / "compose" / "compose.yaml")["services"]["prometheus"]["volumes"]
    mounted = {volume.split(":")[1] for volume in volumes}
    assert set(load(DEPLOY / "prometheus" / "prometheus.yml")["rule_files"]) <= mounted
    assert "/etc/prometheus/prometheus.yml" in mounted


def drain_seconds(arguments):
    return int(arguments[arguments.index("--drain-timeout") + 1])


def test_compose_runs_the_server_of_the_checkout():
    path = DEPLOY / "compose" / "compose.yaml"
    service = load(path)["services"]["headrace"]
    context = (path.parent / service["build"]["context"]).resolve()
    assert context == ROOT
    assert (context / service["build"]["dockerfile"]).is_file()
    assert {int(published.rpartition(":")[2]) for published in service["ports"]} == set(PORTS.values())
    assert service["volumes"][0].split(":")[1] == service["command"][0]
    check_arguments(service["command"])
    assert int(service["stop_grace_period"].removesuffix("s")) > drain_seconds(service["command"])


FLAGS = {"--host", "--http-port", "--grpc-port", "--metrics-port", "--drain-timeout", "--model-control", "--log-format"}


def check_arguments(arguments):
    repository, *flags = arguments
    assert repository == "/models"
    assert set(flags[::2]) <= FLAGS
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    assert given["--host"] == "0.0.0.0"
    assert given.get("--log-format", "text") in {"text", "json"}


def dockerfile():
    """(instruction, rest) of each step, continued lines joined and comments left out."""
    text = (DEPLOY / "container" / "Dockerfile").read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def final_stage():
    steps = dockerfile()
    start = max(index for index, (instruction, _) in enumerate(steps) if instruction == "FROM")
    return steps[start:]


def test_dockerfile_copies_what_exists_and_what_is_sent():
    sent = (DEPLOY / "container" / "Dockerfile.dockerignore").read_text().splitlines()
    stages = {rest.split()[-1] for instruction, rest in dockerfile() if instruction == "FROM" and " AS " in rest}
    copied = set()
    for instruction, rest in dockerfile():
        if instruction != "COPY":
            continue
        *sources, _ = shlex.split(rest)
        if sources[0].startswith("--from="):
            assert sources[0].removeprefix("--from=") in stages
            continue
        for source in sources:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in sent
            copied.add(source)
    assert {line[1:] for line in sent if line.startswith("!")} == copied
    # What the wheel is built from, or it is built without it.
    build = (ROOT / "pyproject.toml").read_text()
    packages = re.search(r"wheel\]\s*packages = \[(.*)\]", build)[1]
    for package in re.findall(r'"([^"]+)"', packages):
        assert package.split("/")[0] in copied
    assert "README.md" in copied  # pyproject.toml names it


def test_dockerfile_runs_the_server_without_root():
    steps = final_stage()
    one = {name: rest for name, rest in steps if name != "RUN"}
    assert one["FROM"].startswith("python:3.12-slim")
    user, _, group = one["USER"].partition(":")
    assert user.isdigit()
    assert int(user) > 0
    assert int(group) > 0
    assert any(name == "RUN" and f"--uid {user} " in rest for name, rest in steps)
    assert {int(port) for port in one["EXPOSE"].split()} == set(PORTS.values())
    assert one["STOPSIGNAL"] == "SIGTERM"
    assert json.loads(one["ENTRYPOINT"]) == ["headrace", "serve"]
    check_arguments(json.loads(one["CMD"]))
    assert one["VOLUME"] == json.loads(one["CMD"])[0]


def health_check_program():
    [rest] = [rest for name, rest in final_stage() if name == "HEALTHCHECK"]
    interpreter, option, program = json.loads(rest.split("CMD", 1)[1])
    assert (interpreter, option) == ("python", "-c")
    return program


class Opener:
    """Stands in for the network: notes the address and answers, or raises as urllib does for a status of 400."""

    def __init__(self, trouble=None):
        self.opened = []
        self._trouble = trouble

    def open(self, url, timeout):
        assert timeout < 5, "longer than Docker waits"
        self.opened.append(url)
        if self._trouble:
            raise self._trouble


@pytest.mark.parametrize(("port", "expected"), [(None, 8000), ("9000", 9000)])
def test_health_check_asks_for_readiness(monkeypatch, port, expected):
    opener = Opener()
    monkeypatch.setattr("urllib.request.build_opener", lambda *handlers: opener)
    if port:
        monkeypatch.setenv("HEADRACE_HTTP_PORT", port)
    else:
        monkeypatch.delenv("HEADRACE_HTTP_PORT", raising=False)
    exec(health_check_program(), {})
    assert opener.opened == [f"http://127.0.0.1:{expected}/v2/health/ready"]


def test_health_check_fails_when_the_server_does_not_answer(monkeypatch):
    monkeypatch.setattr("urllib.request.build_opener", lambda *handlers: Opener(OSError("refused")))
    with pytest.raises(OSError, match="refused"):
        exec(health_check_program(), {})


def pod():
    return load(KUBERNETES / "deployment.yaml")["spec"]["template"]["spec"]


def container():
    [only] = pod()["containers"]
    return only


@pytest.mark.parametrize("name", ["startupProbe", "livenessProbe", "readinessProbe"])
def test_probes_point_at_real_paths_and_ports(name):
    probe = container()[name]
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert ports[probe["httpGet"]["port"]] == PORTS["http"]
    assert probe["httpGet"]["path"] == ("/v2/health/ready" if name == "readinessProbe" else "/v2/health/live")
    assert probe["timeoutSeconds"] <= probe["periodSeconds"]


def test_pod_has_time_to_drain():
    prestop = container()["lifecycle"]["preStop"]["exec"]["command"]
    assert prestop[0] == "sleep"
    assert pod()["terminationGracePeriodSeconds"] > int(prestop[1]) + drain_seconds(container()["args"])


def test_pod_ports_and_service_ports_are_the_servers():
    assert {port["name"]: port["containerPort"] for port in container()["ports"]} == PORTS
    service = load(KUBERNETES / "service.yaml")["spec"]["ports"]
    assert {port["name"]: port["port"] for port in service} == PORTS
    assert all(port["targetPort"] == port["name"] for port in service)
    [endpoint] = load(KUBERNETES / "servicemonitor.yaml")["spec"]["endpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("metrics", "/metrics")
    annotations = load(KUBERNETES / "deployment.yaml")["spec"]["template"]["metadata"]["annotations"]
    assert int(annotations["prometheus.io/port"]) == PORTS["metrics"]


def test_pod_runs_without_root_on_a_read_only_root():
    [user] = {pod()["securityContext"]["runAsUser"], pod()["securityContext"]["runAsGroup"]}
    assert f"{user}:{user}" == dict(final_stage())["USER"]
    assert pod()["securityContext"]["runAsNonRoot"] is True
    own = container()["securityContext"]
    assert own["readOnlyRootFilesystem"] is True
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    mounts = {mount["mountPath"]: mount for mount in container()["volumeMounts"]}
    assert not mounts["/tmp"].get("readOnly")
    assert mounts["/models"]["readOnly"] is True
    assert {mount["name"] for mount in mounts.values()} == {volume["name"] for volume in pod()["volumes"]}
    # A Service called headrace would put HEADRACE_PORT=tcp://... among the server's own settings.
    assert pod()["enableServiceLinks"] is False


def test_pod_arguments_and_limits():
    check_arguments(container()["args"])
    assert container()["args"][0] in {mount["mountPath"] for mount in container()["volumeMounts"]}
    assert container()["resources"]["limits"].keys() == {"cpu", "memory"}
    assert container()["resources"]["requests"].keys() == {"cpu", "memory"}


def test_kubernetes_objects_find_each_other():
    objects = {path.stem: load(path) for path in KUBERNETES.glob("*.yaml")}
    labels = objects["deployment"]["spec"]["template"]["metadata"]["labels"]
    assert objects["deployment"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert objects["service"]["spec"]["selector"].items() <= labels.items()
    assert objects["poddisruptionbudget"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    monitored = objects["servicemonitor"]["spec"]["selector"]["matchLabels"]
    assert monitored.items() <= objects["service"]["metadata"]["labels"].items()
    target = objects["horizontalpodautoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", objects["deployment"]["metadata"]["name"])
    claims = {volume["persistentVolumeClaim"]["claimName"] for volume in pod()["volumes"] if "emptyDir" not in volume}
    assert claims == {objects["models"]["metadata"]["name"]}
    assert objects["kustomization"]["namespace"] == objects["namespace"]["metadata"]["name"]


def test_kustomization_lists_every_file_but_the_optional():
    text = (KUBERNETES / "kustomization.yaml").read_text()
    listed = yaml.safe_load(text)["resources"]
    optional = re.findall(r"# - (\S+\.yaml)", text)
    assert {*listed, *optional, "kustomization.yaml"} == {path.name for path in KUBERNETES.iterdir()}


def test_readme_tells_of_every_file_and_no_other():
    text = (DEPLOY / "README.md").read_text()
    named = {ROOT / path for path in re.findall(r"deploy/[\w./-]+\w", text)}
    named |= {DEPLOY / path for path in re.findall(r"`((?:prometheus|grafana)/[^`]+)`", text)}
    assert len(named) >= 5
    for path in named:
        assert path.exists(), path
    for path in KUBERNETES.glob("*.yaml"):
        assert f"`{path.name}`" in text or path.name == "kustomization.yaml"
    assert set(re.findall(r"/v2/health/\w+", text)) == HEALTH
