"""Every kind of error, in the shape and with the status that each interface's clients know; the server goes on."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from served import Gate, Served, serving
from tiny_bundles import attention_bundle
from tiny_files import copied, sign

from edgellm_runtime import PrefixCache, StateError, load
from edgellm_runtime.batching.options import BatchOptions
from edgellm_runtime.state import array_file

KEY = "a-key-of-mine"
SAY = [{"role": "user", "content": "hello"}]
CHAT: dict[str, Any] = {"model": "tiny", "messages": SAY, "max_tokens": 2}
PLAIN: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 2}
INPUT: dict[str, Any] = {"model": "tiny", "input": "hello", "max_output_tokens": 2}
ROUTES = {"/v1/chat/completions": CHAT, "/v1/completions": PLAIN, "/v1/responses": INPUT, "/v1/messages": CHAT}
LONG = "hello " * 99
ODD = {"type": "json_schema", "json_schema": {"schema": {"type": "odd"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def bad_template(folder: Path, text: str) -> Path:
    made = copied(attention_bundle(), folder)
    (made / "chat_template.jinja").write_text(text)
    sign(made, "chat_template.jinja")
    return made


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("bad")
    looping = "{% for i in range(10**6) %}{% for j in range(10**6) %}{% endfor %}{% endfor %}"
    bundles = {
        "tiny": attention_bundle(), "refuses": bad_template(folder / "a", "{{ raise_exception('no such role') }}"),
        "fails": bad_template(folder / "b", "{{ 1 / 0 }}"), "loops": bad_template(folder / "c", looping),
    }  # fmt: skip
    with serving(bundles, api_keys=[KEY], max_body=4096) as found:
        yield found


def post(served: Served, route: str, body: Any, *, key: str = KEY, **kwargs: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} | kwargs.pop("headers", {})
    sent = {"content": body} if isinstance(body, bytes) else {"json": body}
    return httpx.post(f"{served.address}{route}", timeout=60, headers=headers, **sent, **kwargs)


def check_shape(found: httpx.Response, route: str, status: int, code: str | None) -> str:
    """The error's text, once its shape has been seen to."""
    said = found.json()
    if route.startswith("/v1/messages"):
        kinds = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error",
                 405: "invalid_request_error", 413: "request_too_large", 415: "invalid_request_error",
                 500: "api_error", 529: "overloaded_error"}  # fmt: skip
        assert (found.status_code, said["type"]) == (529 if status == 503 else status, "error"), said
        assert said["error"]["type"] == kinds[found.status_code]
        assert set(said["error"]) == {"type", "message"}
        assert said["request_id"] == found.headers["request-id"]
    else:
        assert found.status_code == status, said
        assert set(said["error"]) == {"message", "type", "param", "code"}
        assert said["error"]["type"] == ("server_error" if status >= 500 else "invalid_request_error")
        assert said["error"]["code"] == code
        assert found.headers["x-request-id"].startswith("req_")
    message: str = said["error"]["message"]
    assert message[0] == message[0].upper()
    assert "Traceback" not in found.text and str(Path.cwd()) not in found.text
    return message


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("change", "status", "code", "said"),
    [
        (b"{", 400, None, "no JSON"), (b"", 400, None, "no JSON"), (b'"a"', 400, None, "send a JSON object"),
        (b"[" * 3000, 400, None, "nested too deeply"), (b"x" * 5000, 413, "request_too_large", "larger than 4096"),
        ({"model": None}, 400, "missing_required_parameter", "'model'"),
        ({"model": "gpt"}, 404, "model_not_found", "does not exist; this server has tiny"),
        ({"tempreature": 1}, 400, "unknown_parameter", "Unrecognized request argument supplied: tempreature"),
        ({"temperature": "hot"}, 400, "invalid_value", "it must be a number from 0 to"),
        ({"temperature": 99}, 400, "invalid_value", "it must be a number from 0 to"),
        ({"top_p": -1}, 400, "invalid_value", "it must be a number from 0 to 1"),
        ({"stream": "yes"}, 400, "invalid_value", "it must be true or false"),
    ],
)  # fmt: skip
def test_what_any_route_refuses(
    served: Served, route: str, change: Any, status: int, code: str | None, said: str
) -> None:
    body = change if isinstance(change, bytes) else {**ROUTES[route], **change}
    found = post(served, route, body, headers={"content-type": "application/json"})
    assert said in check_shape(found, route, status, code)


@pytest.mark.parametrize(
    ("route", "change", "code", "said"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}, "context_length_exceeded", "96"),
        ("/v1/completions", {"prompt": LONG}, "context_length_exceeded", "context holds 96"),
        ("/v1/responses", {"input": LONG}, "context_length_exceeded", "context holds 96"),
        ("/v1/messages", {"messages": [{"role": "user", "content": LONG}]}, None, "context holds 96"),
        ("/v1/chat/completions", {"messages": []}, "invalid_value", "at least one message"),
        ("/v1/responses", {"input": []}, "invalid_value", "a string or a list of items"),
        ("/v1/completions", {"prompt": []}, "invalid_value", "must be a string, token ids or a list"),
        ("/v1/completions", {"prompt": [10**6]}, None, "outside the model's vocabulary"),
        ("/v1/messages", {"max_tokens": None}, "missing_required_parameter", "'max_tokens'"),
        ("/v1/messages", {"max_tokens": 0}, "invalid_value", "an integer from 1"),
        ("/v1/messages", {"messages": [{"role": "system", "content": "a"}]}, "invalid_value", "one of user, assistant"),
        ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, None, "tool_result"),
        ("/v1/messages", {"tools": [{"type": "web_search_20250305", "name": "s"}]}, None, "no tools of its own"),
        ("/v1/messages", {"tool_choice": {"type": "any"}}, None, "'tool_choice' needs 'tools'"),
        ("/v1/messages", {"thinking": {"type": "loud"}}, None, "one of enabled, disabled, adaptive"),
        ("/v1/chat/completions", {"tools": [TOOL]}, "unsupported_parameter", "whose chat template does not mention"),
        ("/v1/chat/completions", {"tool_choice": "required"}, None, "'tool_choice' needs 'tools'"),
        ("/v1/chat/completions", {"audio": {}}, "unsupported_parameter", "'audio' is not supported"),
        ("/v1/chat/completions", {"response_format": ODD}, None, "odd"),
        ("/v1/responses", {"text": {"format": {"type": "json_schema", "schema": {"type": 3}}}}, None, "schema"),
        ("/v1/responses", {"previous_response_id": "resp_1"}, "unsupported_parameter", "previous_response_id"),
        ("/v1/responses", {"input": [{"type": "file_search_call"}]}, "unsupported_content", "takes messages"),
        ("/v1/responses", {"tools": [{"type": "web_search"}]}, None, "must be of type function"),
        ("/v1/completions", {"suffix": "x"}, "unsupported_parameter", "'suffix' is not supported"),
        ("/v1/completions", {"echo": True, "logprobs": 1, "stream": True}, "unsupported_parameter", "in a stream"),
        ("/v1/chat/completions", {"model": "refuses"}, None, "no such role"),
        ("/v1/messages", {"model": "refuses"}, None, "no such role"),
    ],
)  # fmt: skip
def test_what_a_route_refuses(served: Served, route: str, change: Any, code: str | None, said: str) -> None:
    assert said in check_shape(post(served, route, {**ROUTES[route], **change}), route, 400, code)


@pytest.mark.parametrize("route", [route for route in ROUTES if route != "/v1/completions"])
@pytest.mark.parametrize("model", ["fails", "loops"])
def test_a_template_that_fails_is_the_servers_affair(served: Served, route: str, model: str) -> None:
    found = post(served, route, {**ROUTES[route], "model": model})
    assert "the server's log says why" in check_shape(found, route, 500, "model_failed")
    assert post(served, route, ROUTES[route]).status_code == 200


@pytest.mark.parametrize("route", ROUTES)
def test_callers_types_and_methods_are_checked(served: Served, route: str) -> None:
    wrong = post(served, route, ROUTES[route], key="not-a-key")
    assert "Incorrect API key" in check_shape(wrong, route, 401, "invalid_api_key")
    text = post(served, route, b"{}", headers={"content-type": "text/plain"})
    assert "send it as application/json" in check_shape(text, route, 415, None)
    headers = {"authorization": f"Bearer {KEY}"}
    check_shape(httpx.get(f"{served.address}{route}", headers=headers), route, 405, "method_not_allowed")
    check_shape(post(served, f"{route}/nowhere", {}), route, 404, "unknown_url")


@pytest.mark.parametrize("route", ROUTES)
def test_a_full_queue_is_told(route: str) -> None:
    with serving({"tiny": attention_bundle()}, batch=BatchOptions(rows=1, queue=1)) as served:
        gate = Gate(served.model)
        tickets = [served.model.scheduler.submit("hello", max_new_tokens=9, ignore_eos=True)]
        assert gate.reached.wait(60)
        tickets.append(served.model.scheduler.submit("hello", max_new_tokens=2))
        found = post(served, route, ROUTES[route])
        assert "try again later" in check_shape(found, route, 503, "overloaded")
        assert (found.headers["retry-after"], found.headers["x-should-retry"]) == ("1", "true")
        gate.open.set()
        assert [len(ticket.results()) for ticket in tickets] == [1, 1]


def test_a_full_disk_ends_no_request_and_leaves_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(attention_bundle(), threads=1, prefix_cache=PrefixCache(1 << 20, directory=tmp_path / "cache"))
    saved = model.read("the user said hello")
    saved.save(tmp_path / "state")
    before = (tmp_path / "state").read_bytes()
    alone = model.generate("the world", max_new_tokens=4)

    def full(file: Any, *_: Any, **__: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez", full)
    monkeypatch.setattr(array_file, "_write", full)
    with pytest.raises(StateError, match="No space left on device"):
        model.generate("and", state=saved, max_new_tokens=40).state.save(tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "state"]
    assert model.load_state(tmp_path / "state").tokens == saved.tokens
    with model.scheduler() as scheduler:
        answers = scheduler.submit(list(range(5, 60)), max_new_tokens=4).results()
        assert len(answers) == 1 and scheduler.alive
    assert model.generate("the world", max_new_tokens=4).tokens == alone.tokens
    assert not list((tmp_path / "cache").iterdir())
