"""``headrace optimize --apply``: have a running server take a plan that was made for one of its models."""

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from headrace.server_api import ApiError, ServerApi

SWAP_TIMEOUT_S = 600.0  # a form may take as long to load as a model may (--load-timeout)


class CannotApply(Exception):
    """The server does not serve by the plan; the message says why and what to do."""


def apply_plan(url: str, model: str, plan_cache: Path | None = None, headers: Sequence[str] = ()) -> list[str]:
    """Have the server at ``url`` look for a model's plan. Returns lines for people: what it serves now, and why.

    Where ``plan_cache`` is given, the server refuses unless its own is the same folder. ``headers`` are NAME=VALUE
    each, for a server that restricts its group model-repository.

    Raises:
        CannotApply: it is not reachable, has no such model, uses no plans, or has others.
    """
    body = {} if plan_cache is None else {"plan_cache": str(plan_cache.resolve())}
    try:
        server = ServerApi(url, headers, SWAP_TIMEOUT_S)
        answer = server.ask("POST", f"/v2/repository/models/{quote(model, safe='')}/plan", body)
    except ApiError as error:
        raise CannotApply(_explained(url, error)) from error
    versions = answer.get("versions", [])
    if not any(one["planned"] for one in versions):
        reasons = "; ".join(f"version {one['version']}: {one['why']}" for one in versions)
        raise CannotApply(
            f"the server at {url} serves model '{model}' as it was dropped in ({reasons}); "
            f"its plans are in {answer.get('plan_cache')}"
        )
    return [f"served now: {model} version {one['version']}: {one['form']} ({one['why']})" for one in versions]


def _explained(url: str, error: ApiError) -> str:
    if not error.status:
        return f"{error}; the plan is kept, and is used when the server loads the model next"
    if error.status in (404, 405) and "there is no POST" in str(error):
        return f"the server at {url} takes no plans: is it a Headrace server of this version?"
    return f"the server at {url} refuses: {error}"
