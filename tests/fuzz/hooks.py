"""What schemathesis cannot know: names that exist. Loaded by it, see `tests.fuzz.product`."""

import random
from typing import Any

import schemathesis

MODEL = "smollm2"
USUAL = frozenset(
    {"model", "messages", "prompt", "input", "stream", "n", "stop", "tools", "tool_choice", "echo"}
    | {"response_format", "logprobs", "top_logprobs", "stream_options", "text", "store"}
)
LIMITS = {"messages": "max_tokens", "prompt": "max_tokens", "input": "max_output_tokens"}

chance = random.Random(0)


@schemathesis.hook
def map_body(_context: Any, body: Any) -> Any:
    """Name the model that is there, in most bodies; leave out what is seldom used, in half."""
    if not isinstance(body, dict) or "model" not in body or chance.random() < 0.2:
        return body
    if chance.random() < 0.5:
        body = {name: value for name, value in body.items() if name in USUAL}
        limits = {limit for field, limit in LIMITS.items() if field in body}
        body |= dict.fromkeys(limits, chance.choice([1, 2, 16]))
    return body | {"model": MODEL}


@schemathesis.hook
def map_path_parameters(_context: Any, parameters: Any) -> Any:
    """Name the function that is there, in half of the paths."""
    if parameters and "name" in parameters and chance.random() < 0.5:
        parameters["name"] = MODEL
    return parameters


@schemathesis.hook
def filter_case(_context: Any, case: Any) -> bool:
    """Leave that function as it is, and follow no log, which never ends."""
    if (case.query or {}).get("follow") not in (None, False, "false"):
        return False
    is_function = (case.path_parameters or {}).get("name") == MODEL
    return not (is_function and case.operation.method.upper() in {"PUT", "DELETE"})
