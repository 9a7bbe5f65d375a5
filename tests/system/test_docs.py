"""What the pages in docs/ show works as it is shown: their examples run, in their order, against one real server."""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from hand_made_plans import put_plan
from running_server import RunningServer

from headrace.config import Settings
from headrace.repository.from_triton import IGNORED, REFUSED
from headrace.repository.model_config import ModelConfig, StepConfig, parse_config
from headrace.repository.pbtxt import parse_pbtxt
from headrace.repository.sequence_config import ControlConfig, SequenceConfig, StateConfig
from headrace_backends.optimize.accuracy import Errors
from headrace_backends.optimize.form import Form
from headrace_backends.optimize.plan_cache import PlanCache

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
EVERYTHING = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md", *PAGES]
SAMPLES = ("digits", "digits_prepare", "digits_read")  # of model_repository/, which the pages use
TIMEOUT_S = 300
SETTLED_S = 20  # for metrics to tell of what was just answered
ATTEMPTS = 3
OF_TIME = ("cache", "scheduling")  # pages whose examples show what comes first, or in less than a second


@dataclass(frozen=True)
class Block:
    """A code block of a page; ``shown`` is the output that the page prints below it, None where there is none."""

    page: str
    line: int
    language: str
    text: str
    shown: str | None = None
    shown_as: str = ""

    @property
    def where(self) -> str:
        return f"docs/{self.page}:{self.line}"

    @property
    def file(self) -> str:
        """The file that the block is to be saved as, by its first line."""
        found = re.match(r"# model_repository/(\S+)\n", self.text)
        return found[1] if found and self.language in ("python", "yaml", "pbtxt") else ""

    @property
    def flags(self) -> list[str] | None:
        """Of ``headrace serve``, where the block starts a server."""
        words = shlex.split(self.text.replace("\\\n", " "), comments=True)
        if self.language != "sh" or words[:2] != [".venv/bin/headrace", "serve"]:
            return None
        assert words[2] == "model_repository", f"{self.where} serves another folder"
        return words[3:]

    @property
    def is_program(self) -> bool:
        return self.language in ("python", "sh") and not self.file and self.flags is None

    @property
    def is_configuration(self) -> bool:
        return self.language in ("yaml", "pbtxt")


def read_blocks(page):
    """The page's code blocks; those that print what the one above puts out are joined with it."""
    found: list[Block] = []
    start, language, body = 0, "", []
    after_program = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if not line.lstrip().startswith("```"):
            if start:
                body.append(line)
            elif line.strip():
                after_program = False  # an output comes right below its program
            continue
        assert line.startswith("```"), f"{page.name}:{number}: a code block is indented"
        if not start:
            start, language, body = number, line[3:], []
            continue
        block = Block(page.name, start, language, "".join(f"{each}\n" for each in body))
        start = 0
        if after_program and language in ("text", "json"):
            found[-1] = dataclasses.replace(found[-1], shown=block.text, shown_as=language)
            after_program = False
        else:
            found.append(block)
            after_program = block.is_program
    assert not start, f"{page.name}:{start}: a code block has no end"
    return found


def all_blocks():
    return [block for page in PAGES for block in read_blocks(page)]


def server_flags(blocks, replaced):
    """The options of every server that the blocks start. One server has them all, so that none needs its own."""
    flags = [flag for block in blocks for flag in block.flags or ()]
    for shown, real in replaced.items():
        flags = [flag.replace(shown, real) for flag in flags]
    return flags


def make_workplace(folder, blocks):
    """A folder with the model repository that the pages speak of."""
    for name in SAMPLES:
        shutil.copytree(ROOT / "model_repository" / name, folder / "model_repository" / name)
    for block in blocks:
        if block.file:
            path = folder / "model_repository" / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
    return folder


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("docs"), all_blocks())


def plan_the_digits(folder):
    """The plan of docs/plans.md: the file as it is, on one thread."""
    model = folder / "model_repository" / "digits"
    session = onnxruntime.InferenceSession(model / "1" / "model.onnx")
    shape = [1, *session.get_inputs()[0].shape[1:]]
    inputs = [{session.get_inputs()[0].name: np.full(shape, value, np.float32)} for value in range(4)]
    names = [output.name for output in session.get_outputs()]
    answers = [dict(zip(names, session.run(names, one), strict=True)) for one in inputs]
    form = Form("onnxruntime", threads=1)
    errors = Errors(4, 0.0, 0.0)
    put_plan(
        *(PlanCache(folder / "headrace_plans"), model, None),
        replayed=(inputs, answers),
        backend="onnxruntime",
        signature=None,
        form=form,
        errors=errors,
        speedup=1.2,
    )


@pytest.fixture(scope="module")
def server(workplace):
    in_memory = [block for block in all_blocks() if block.flags and "--cache-redis" not in block.flags]
    flags = server_flags(in_memory, {"/tmp/": f"{workplace}/"})
    plan_the_digits(workplace)
    with RunningServer(
        workplace / "model_repository", *flags, env={"HEADRACE_PLAN_CACHE": f"{workplace}/headrace_plans"}
    ) as running:
        yield running


def run(block, server, folder):
    """What the program prints when it is pasted, with the addresses of this server."""
    text = block.text
    for shown, real in (
        ("/tmp/", f"{folder}/"),  # first: the others may lie there
        ("localhost:8000", server.http),
        ("localhost:8001", server.grpc),
        ("localhost:8002", server.metrics),
        ("--time-limit 60", "--time-limit 15"),  # it finds less, and prints the same
        (".venv/bin/", f"{Path(sys.executable).parent}/"),
        ("/headrace_docs", f"/headrace_docs_{os.getpid()}"),  # the machine's, and so of everybody who runs this
    ):
        text = text.replace(shown, real)
    command = [sys.executable, "-W", "error", "-c", text] if block.language == "python" else ["bash", "-ec", text]
    environment = {**os.environ, "NO_COLOR": "1", "HEADRACE_PLAN_CACHE": f"{folder}/headrace_plans"}
    ended = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert ended.returncode == 0, f"{block.where} ended with {ended.returncode}:\n{ended.stdout}{ended.stderr}"
    assert not ended.stderr, f"{block.where} complains:\n{ended.stderr}"
    return ended.stdout


def run_until_settled(block, server, folder):
    """As ``run``, until what is scraped is what the page shows: a model's own metrics come behind its answers."""
    deadline = time.monotonic() + SETTLED_S
    while True:
        try:
            printed = run(block, server, folder)
            settled = agrees(block.shown, block.shown_as, printed)
        except AssertionError:  # as grep found nothing
            if time.monotonic() > deadline:
                raise
        else:
            if settled or time.monotonic() > deadline:
                return printed
        time.sleep(0.2)


def agrees(shown, shown_as, printed):
    """Whether a program has printed what the page shows; "..." there stands for anything."""
    if shown_as == "json":  # broken into lines for readers
        shown, printed = ("".join(text.split()) for text in (shown, printed))
    pattern = re.escape(shown.strip()).replace(re.escape("..."), ".*?")
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None


def run_page(page, server, folder):
    for block in read_blocks(page):
        if block.is_program:
            execute = run_until_settled if ":8002/metrics" in block.text else run
            printed = execute(block, server, folder)
            assert agrees(block.shown, block.shown_as, printed), f"{block.where} prints\n{printed}"


@pytest.fixture
def needs_curl():
    if shutil.which("curl") is None:
        pytest.skip("there is no curl on this machine")


@pytest.mark.usefixtures("needs_curl")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_works_as_it_is_shown(page, server, workplace, tmp_path):
    try:
        run_page(page, server, workplace)
    except AssertionError:
        if page.stem not in OF_TIME:
            raise
        for attempt in range(1, ATTEMPTS):  # a machine that is busy with something else answers in no order, and late
            try:
                again(page, tmp_path / str(attempt))
            except AssertionError:
                if attempt == ATTEMPTS - 1:
                    raise
            else:
                break


def again(page, tmp_path):
    """Run a page on a server of its own, which knows nothing of another time."""
    blocks = read_blocks(page)
    folder = make_workplace(tmp_path, blocks)
    in_memory = [block for block in blocks if block.flags and "--cache-redis" not in block.flags]
    with RunningServer(folder / "model_repository", *server_flags(in_memory, {"/tmp/": f"{folder}/"})) as own:
        run_page(page, own, folder)


@pytest.mark.usefixtures("needs_curl")
def test_the_cache_works_the_same_with_redis(tmp_path):
    redis = pytest.importorskip("redis", reason="redis is not installed")
    fakeredis = pytest.importorskip("fakeredis", reason="fakeredis, a Redis for tests, is not installed")
    page = ROOT / "docs" / "cache.md"
    blocks = read_blocks(page)
    folder = make_workplace(tmp_path, blocks)
    server = fakeredis.TcpFakeServer(("127.0.0.1", 0), server_type="redis")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        for database in range(ATTEMPTS):
            url = f"redis://127.0.0.1:{server.server_address[1]}/{database}"
            flags = server_flags(blocks, {"redis://localhost:6379/0": url})
            assert url in flags
            with RunningServer(folder / "model_repository", *flags) as running:
                try:
                    run_page(page, running, folder)
                except AssertionError as error:
                    # The server waits 50 ms for Redis, which a busy machine may take: then it says so. Or it is slow.
                    excused = "gives no answers" in running.output or "144.]] slow" in str(error)
                    if not excused or database == ATTEMPTS - 1:
                        raise
                    continue
            with redis.Redis.from_url(url) as client:
                assert client.dbsize() == 1
            return
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def test_every_model_of_the_pages_serves(server):
    models = {block.file.split("/")[0] for block in all_blocks() if block.file}
    assert models
    status, index = server.post("/v2/repository/index")
    assert status == 200
    states = {one["name"]: f"{one.get('state')} {one.get('reason')}" for one in index}
    assert {name: states[name] for name in models if states[name] != "READY "} == {}, server.output


@pytest.mark.parametrize("block", all_blocks(), ids=lambda block: f"{block.page}:{block.line}")
def test_a_block_is_covered(block):
    """Each is a file, a server's start, a program with its output, or a part of a configuration that can be read."""
    if block.file or block.flags is not None:
        return
    if block.is_program:
        assert block.shown is not None, f"{block.where} is a program, and what it prints is not shown below it"
    elif block.language == "yaml":
        parse_config(block.text)
    elif block.language == "pbtxt":
        parse_pbtxt(block.text, "example")
    else:
        assert not block.language, f"{block.where}: a {block.language} block that nothing runs or reads"


def test_no_file_is_shown_twice():
    files = [block.file for block in all_blocks() if block.file]
    assert sorted(set(files)) == sorted(files)


def test_the_sample_ensemble_is_the_one_that_is_shown():
    (shown,) = [block.text for block in all_blocks() if block.file == "digits_read/config.yaml"]
    assert parse_config(shown) == parse_config((ROOT / "model_repository/digits_read/config.yaml").read_text())


@pytest.mark.parametrize(
    ("section", "sections"),
    [("sequence", (SequenceConfig, ControlConfig, StateConfig)), ("ensemble", (StepConfig,))],
)
def test_every_key_of_a_section_is_shown(section, sections):
    text = "\n".join(block.text for block in all_blocks() if block.language == "yaml" and section in block.text)
    keys = {key for one in sections for key in one.model_fields}
    assert {key for key in keys if not re.search(rf"\b{key}:", text)} == set()
    assert section in ModelConfig.model_fields


def test_the_two_forms_of_a_configuration_say_the_same():
    blocks = read_blocks(ROOT / "docs" / "triton.md")
    (pbtxt,) = [block.text for block in blocks if block.language == "pbtxt"]
    (yaml,) = [block.text for block in blocks if block.language == "yaml"]
    assert parse_pbtxt(pbtxt, "example").model_dump() == parse_config(yaml).model_dump()


def test_every_key_of_config_pbtxt_that_is_not_taken_is_told():
    page = (ROOT / "docs" / "triton.md").read_text()
    keys = {key.rpartition(".")[2] for key in (*REFUSED, *IGNORED)}
    assert {key for key in keys if f"`{key}`" not in page} == set()


def test_every_metric_is_listed_once(server):
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=60) as response:
        families = re.findall(r"^# TYPE (\S+)", response.read().decode(), re.MULTILINE)
    listed = re.findall(r"^\| `((?:nv|headrace)_\w+)`", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    of_gpus = set(re.findall(r"^\| `(nv_\w+)`", (ROOT / "docs/gpu.md").read_text(), re.MULTILINE))
    ours = {name for name in families if name.startswith(("nv_", "headrace_"))} - of_gpus
    assert sorted(listed) == sorted(ours)


def test_every_option_is_listed_once():
    listed = re.findall(r"^\| `(--[a-z-]+)`", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    options = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Settings)} - {"--repository"}
    assert sorted(listed) == sorted(options)


def test_architecture_has_one_line_for_each_change():
    text = (ROOT / "ARCHITECTURE.md").read_text().partition("## Where to change what")[2]
    changes = re.findall(r"^\| (.*?) \|", text, re.MULTILINE)
    assert len(changes) > 50
    assert sorted({one for one in changes if changes.count(one) > 1}) == ["to change"]


def test_the_readme_links_to_every_page():
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES if f"(docs/{page.name})" not in readme] == []


def test_the_files_that_architecture_names_exist():
    named = set(re.findall(r"`([\w/]+\.py)", (ROOT / "ARCHITECTURE.md").read_text()))
    files = [f"/{path.relative_to(ROOT)}" for part in ("server", "backends") for path in (ROOT / part).rglob("*.py")]
    assert named
    assert {name for name in named if not any(file.endswith(f"/{name}") for file in files)} == set()


@pytest.mark.parametrize("document", EVERYTHING, ids=lambda document: document.stem)
def test_options_and_links_lead_somewhere(document):
    text = document.read_text()
    options = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Settings)}
    of_other_commands = {"--help", "--json", "--output", "--parameter", "--input", "--url"}
    of_other_commands |= {"--shape", "--rows", "--seconds", "--warmup", "--timeout", "--plot"}
    of_other_commands |= {"--max-seconds", "--max-concurrency", "--requests", "--header"}
    of_other_commands |= {"--time-limit", "--apply", "--calibration", "--budget", "--allow", "--exhaustive", "--device"}
    of_other_commands |= {"--max-seconds", "--max-concurrency", "--requests", "--header", "--apply"}
    assert set(re.findall(r"`(--[a-z-]+)", text)) - options - of_other_commands == set()
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if not leads_somewhere(document, link)] == []


def leads_somewhere(document, link):
    path, _, anchor = link.partition("#")
    target = document.parent / path if path else document
    if not anchor:
        return target.exists()
    headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
    return anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
