"""A server under wrong requests, wrong callers and clients that go away: it says what is wrong, and goes on."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from served import Gate, serving, until
from tiny_bundles import attention_bundle, copied, sign

from edgellm_runtime import OptionError
from edgellm_runtime.batching.options import BatchOptions
from edgellm_runtime.server.faults import ApiError
from edgellm_runtime.server.fields import Fields, json_object
from edgellm_runtime.server.limits import Limits
from edgellm_runtime.server.options import ServerOptions
from edgellm_runtime.state.memory_need import memory_need

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 8}
KEY = "a-key-of-mine"


def tiny() -> dict[str, Path]:
    return {"tiny": attention_bundle()}


def test_wrong_bodies_are_told_and_the_next_request_is_answered() -> None:
    with serving(tiny(), max_body=2048) as served:
        url = f"{served.address}/v1/chat/completions"

        def post(content: bytes, kind: str = "application/json") -> tuple[int, str]:
            found = httpx.post(url, content=content, headers={"content-type": kind})
            assert found.headers["x-request-id"].startswith("req_")
            return found.status_code, found.json()["error"]["message"]

        for content, status, message in (
            (b"{", 400, "no JSON"), (b"[1]", 400, "send a JSON object"), (b"", 400, "no JSON"),
            (b'{"model": NaN}', 400, "NaN is no JSON number"), (b"\xff", 400, "no JSON"),
            (b"[" * 1500, 400, "nested too deeply"), (b'{"a":' * 99 + b"1" + b"}" * 99, 400, "nested too deeply"),
            (b'{"messages": []}', 400, "'model'"), (b'{"model": "tiny"}', 400, "'messages'"),
            (b'{"model": "tiny", "messages": []}', 400, "at least one message"),
            (b'{"model": "tiny", "messages": ["x"]}', 400, "must be an object"),
            (b'{"model": "tiny", "messages": [{"role": "robot", "content": "x"}]}', 400, "must be one of"),
            (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, "surrogate"),
            (json.dumps({**CHAT, "user": "x" * 3000}).encode(), 413, "larger than 2048 bytes"),
        ):  # fmt: skip
            found = post(content)
            assert found[0] == status, found
            assert message in found[1]
        assert post(json.dumps(CHAT).encode(), "text/plain")[0] == 415
        chunked = httpx.post(url, content=iter([b" " * 1500] * 3), headers={"content-type": "application/json"})
        assert chunked.status_code == 413
        assert httpx.get(url).status_code == 405
        nowhere = httpx.get(f"{served.address}/v2/nothing")
        assert (nowhere.status_code, nowhere.json()["error"]["code"]) == (404, "unknown_url")
        assert served.post("/v1/chat/completions", CHAT).status_code == 200


def test_a_key_is_wanted_where_there_is_one() -> None:
    with serving(tiny(), api_keys=[KEY, "another-one"]) as served:

        def status(path: str, **headers: str) -> int:
            return httpx.get(f"{served.address}{path}", headers=headers).status_code

        assert status("/v1/models") == status("/metrics") == 401
        assert status("/v1/models", authorization="Bearer wrong-wrong") == 401
        assert status("/v1/models", authorization=f"Bearer {KEY}") == 200
        assert status("/v1/models", **{"x-api-key": "another-one"}) == 200
        assert status("/health") == 200
        refused = served.post("/v1/chat/completions", CHAT)
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert KEY not in refused.text


def test_foreign_pages_and_foreign_names_are_turned_away() -> None:
    with serving(tiny(), allow_origins=["https://mine.example"], allow_hosts=["box"]) as served:

        def status(**headers: str) -> int:
            return httpx.get(f"{served.address}/v1/models", headers=headers).status_code

        assert status(host="evil.example") == 403
        assert status(host="box:8000") == status(host="localhost:1") == status(host="[::1]:1") == 200
        assert status(origin="https://evil.example") == 403
        assert status(origin="https://mine.example") == status(origin=served.address) == 200


def test_no_server_is_open_to_others_by_accident() -> None:
    with pytest.raises(OptionError, match="--open"):
        ServerOptions(host="0.0.0.0")
    with pytest.raises(OptionError, match="at least 8"):
        ServerOptions(api_keys=["short"])
    assert ServerOptions(host="0.0.0.0", api_keys=[KEY]).host == ServerOptions(host="0.0.0.0", open_to_all=True).host


def test_a_caller_may_come_so_often() -> None:
    now = [0.0]
    limits = Limits(ServerOptions(rate=2), clock=lambda: now[0])
    limits._count("me")
    limits._count("me")
    limits._count("another")
    with pytest.raises(ApiError, match="try again in 30 s") as caught:
        limits._count("me")
    assert (caught.value.status, caught.value.retry_after) == (429, 30)
    now[0] = 30.0
    limits._count("me")
    with serving(tiny(), rate=1) as served:
        assert served.post("/v1/chat/completions", CHAT).status_code == 200
        again = served.post("/v1/chat/completions", CHAT)
        assert (again.status_code, again.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(again.headers["retry-after"]) > 0


def test_a_full_queue_says_come_again() -> None:
    with serving(tiny(), batch=BatchOptions(rows=1, queue=1)) as served:
        gate = Gate(served.model)
        found: list[int] = []

        def ask() -> None:
            found.append(served.post("/v1/chat/completions", CHAT).status_code)

        first = threading.Thread(target=ask)
        first.start()
        assert gate.reached.wait(60)
        second = threading.Thread(target=ask)
        second.start()
        until(lambda: served.model.scheduler.load.waiting == 1)
        refused = served.post("/v1/chat/completions", CHAT)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "overloaded"
        gate.open.set()
        first.join(60)
        second.join(60)
        assert found == [200, 200]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_request(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    with serving(tiny()) as served:
        gate, submit, told = Gate(served.model, free=1 if stream else 0), served.model.scheduler.submit, []

        def noted(*args: Any, **options: Any) -> Any:
            told.append(options["cancel"])
            return submit(*args, **options)

        served.model.scheduler.submit = noted  # type: ignore[method-assign]
        body = json.dumps({**CHAT, "max_tokens": 60, "stream": stream, "ignore_eos": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
        with socket.create_connection(("127.0.0.1", int(served.address.rsplit(":", 1)[1]))) as connection:
            connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + body)
            assert gate.reached.wait(60)
            assert not stream or connection.recv(15) == b"HTTP/1.1 200 OK"
        assert told[0].wait(60), "the server has not seen that its client went"
        gate.open.set()
        until(lambda: not served.model.scheduler.load.running)
        assert served.model.scheduler.load.counts["ended_cancelled"] == 1
        assert served.post("/v1/chat/completions", CHAT).status_code == 200


def test_a_stream_without_news_says_that_it_is_still_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgellm_runtime.server.call._SILENCE_S", 0.01)
    with serving(tiny()) as served:
        gate = Gate(served.model)
        body = {**CHAT, "stream": True}
        with httpx.stream("POST", f"{served.address}/v1/chat/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            before = next(line for line in lines if line.startswith(":"))
            gate.open.set()
            rest = [line for line in lines if line.startswith("data:")]
    assert before == ": still here"
    assert rest[-1] == "data: [DONE]"


def test_a_request_has_its_time() -> None:
    with serving(tiny(), timeout=1e-9) as served:
        found = served.post("/v1/chat/completions", CHAT)
        assert (found.status_code, found.json()["error"]["code"]) == (504, "timeout")
        assert found.headers["x-should-retry"] == "false"
        lines = served.post("/v1/chat/completions", {**CHAT, "stream": True}).text.split("\n\n")
        assert json.loads(lines[0].removeprefix("data: "))["error"]["code"] == "timeout"


def test_a_server_that_is_told_to_end_answers_what_runs_first() -> None:
    with serving(tiny()) as served:
        gate = Gate(served.model, free=2)
        body = {**CHAT, "stream": True, "max_tokens": 20, "ignore_eos": True}
        with httpx.stream("POST", f"{served.address}/v1/chat/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            assert gate.reached.wait(60)
            served.server.should_exit = True
            gate.open.set()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        served.thread.join(60)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{served.address}/health")


@pytest.mark.parametrize(
    ("template", "status", "said"),
    [
        ("{{ raise_exception('no such thing') }}", 400, "no such thing"),
        ("{{ 1 / 0 }}", 500, "the server's log says why"),
        ("{% for i in range(10**6) %}{% for j in range(10**6) %}{% endfor %}{% endfor %}", 500, "server's log"),
    ],
)
def test_a_template_that_fails_fails_its_request_only(
    tmp_path: Path, template: str, status: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    bad = copied(attention_bundle(), tmp_path / "bad")
    (bad / "chat_template.jinja").write_text(template)
    sign(bad, "chat_template.jinja")
    with serving({"bad": bad, **tiny()}) as served:
        found = served.post("/v1/chat/completions", {**CHAT, "model": "bad"})
        assert found.status_code == status
        assert said in found.json()["error"]["message"]
        assert str(tmp_path) not in found.text
        assert served.post("/v1/chat/completions", CHAT).status_code == 200


def test_figures_and_lines_tell_of_requests_and_not_of_their_contents(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "edgellm"), serving(tiny()) as served:
        served.post("/v1/chat/completions", {**CHAT, "user": "secret-user"})
        served.post("/v1/chat/completions", {**CHAT, "stream": True})
        served.post("/v1/chat/completions", {**CHAT, "model": "none"})
        text = httpx.get(f"{served.address}/metrics").text
    lines = [json.loads(record.message) for record in caplog.records if record.name == "edgellm.requests"]
    assert [line["status"] for line in lines] == [200, 200, 404, 200]
    assert lines[0]["tokens"] == lines[1]["tokens"] > 0
    assert "hello" not in caplog.text and "secret-user" not in caplog.text
    assert 'edgellm_requests_total{route="/v1/chat/completions",model="tiny",status="200"} 2' in text
    assert f'edgellm_tokens_total{{model="tiny"}} {2 * lines[0]["tokens"]}' in text
    for line in text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) \S+ .+|[a-z_]+\{([a-z]+="[^"]*",?)*\} [0-9.e+-]+', line), line


def test_contents_are_logged_where_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "edgellm"), serving(tiny(), log_contents=True) as served:
        answer = served.post("/v1/chat/completions", CHAT).json()["choices"][0]["message"]["content"]
    line = json.loads(caplog.records[0].message)
    assert (line["body"]["messages"], line["answers"]) == (CHAT["messages"], [answer])


def test_the_page_loads_nothing_and_only_its_own_script_runs() -> None:
    with serving(tiny(), api_keys=[KEY]) as served:
        found = httpx.get(served.address)
        assert httpx.get(served.address, headers={"host": "evil.example"}).status_code == 403
    assert found.status_code == 200
    policy = dict(rule.split(" ", 1) for rule in found.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        (part,) = re.findall(rf"<{tag}>(.*?)</{tag}>", found.text, re.DOTALL)
        assert policy[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
    assert not re.findall(r"https?://|innerHTML|insertAdjacentHTML|document\.write|\beval\b", found.text)
    assert len(found.content) < 40_000


def test_memory_is_shared_out_or_refused() -> None:
    from edgellm_runtime.bundle import Bundle
    from edgellm_runtime.server.host import open_host

    bundle = Bundle(attention_bundle(), checksums=False)
    need = memory_need(bundle.manifest, "cpu", 1)
    two = {"one": attention_bundle(), "two": attention_bundle()}
    with pytest.raises(OptionError, match="weights take"):
        open_host(two, BatchOptions(), max_memory=2 * need.weights)
    room = 2 * (need.weights + 2 * 64 * need.state_per_token)
    with pytest.raises(OptionError, match="prefix_cache is"):
        open_host(two, BatchOptions(), max_memory=room, prefix_cache=room)
    host = open_host(two, BatchOptions(), threads=1, max_memory=room, prefix_cache=0)
    try:
        assert [hosted.scheduler.context for hosted in host] == [64, 64]
    finally:
        host.close()


def test_the_beginning_of_a_prompt_is_read_once() -> None:
    with serving(tiny()) as served:
        prompt = {"model": "tiny", "prompt": [5] * 40, "max_tokens": 2, "temperature": 0}
        usage = [served.post("/v1/completions", prompt).json()["usage"] for _ in range(2)]
    assert [u["prompt_tokens_details"]["cached_tokens"] for u in usage] == [0, 32]
    assert [u["prompt_tokens"] for u in usage] == [40, 40]


def test_fields_are_read_or_told() -> None:
    fields = Fields(json_object(b'{"a": 1, "b": null, "c": {"d": true}}'))
    inner = fields.object("c")
    assert inner is not None
    assert inner.flag("d") is True
    assert fields.integer("a", 0, 9) == 1
    assert fields.text("b") is None
    fields.done()
    with pytest.raises(ApiError, match=r"'c\.d': True; it must be a string"):
        inner.text("d")


@pytest.mark.slow
def test_the_command_serves_and_ends_with_zero_on_sigterm() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "EDGELLM_API_KEY": KEY}
    command = [sys.executable, "-m", "edgellm", "serve", f"tiny={attention_bundle()}", "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(2)]
        assert lines[0] == "tiny: context 96 tokens\n"
        address = lines[1].removeprefix("Serving at ").strip()
        found = httpx.post(
            f"{address}/v1/chat/completions", json=CHAT, timeout=60, headers={"authorization": f"Bearer {KEY}"}
        )
        assert found.status_code == 200
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
    assert process.returncode == 0, rest
    assert json.loads(rest.splitlines()[0])["tokens"] == 8
