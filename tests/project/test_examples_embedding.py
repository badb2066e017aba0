"""The examples of edgellm inside a program: each does what its first lines say, with a tiny bundle."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_bundles import attention_bundle

from edgellm_runtime import Model, load

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(EXAMPLES))  # the examples are programs, not a package

from embedding import pool, script, service, terminal  # noqa: E402


@pytest.fixture(scope="module")
def model() -> Model:
    return load(attention_bundle(), threads=1)


def test_script_reads_its_text_once_and_never_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, states = tmp_path / "text.txt", tmp_path / "states"
    text.write_text("The sun rose over the hills.", encoding="utf-8")
    asked = [str(attention_bundle()), str(text), "Who?", "When?", "--states", str(states), "--max-new-tokens", "6"]
    script.main(asked)
    first = capsys.readouterr().out
    assert len(list(states.iterdir())) == 1
    monkeypatch.setattr(Model, "read", lambda *_: pytest.fail("the text is read again"))
    script.main(asked)
    assert capsys.readouterr().out == first
    assert first.splitlines()[::2] == ["Who?", "When?"]


def test_script_reads_anew_what_another_model_has_read(model: Model, tmp_path: Path) -> None:
    kept = script.read_once(model, "The sun", tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"another's")
    assert script.read_once(model, "The sun", tmp_path).tokens == kept.tokens
    assert model.load_state(path).tokens == kept.tokens


def test_script_answers_each_question_as_if_it_were_the_only_one(model: Model) -> None:
    state = model.read("The sun")
    several = [answer.tokens for answer in script.answers(model, state, ["Who?", "When?", "Who?"], 5)]
    alone = [next(script.answers(model, state, [question], 5)).tokens for question in ("Who?", "When?")]
    assert several == [*alone, alone[0]]


def test_pool_answers_in_order_what_each_prompt_gets_alone(model: Model) -> None:
    prompts = [f"line {i}" for i in range(9)]
    found = pool.answers(model, prompts, workers=3, cancel=threading.Event(), max_new_tokens=4)
    assert [answer.tokens for answer in found] == [model.generate(p, max_new_tokens=4).tokens for p in prompts]


def test_pool_takes_few_prompts_ahead_and_ends_with_its_reader(model: Model) -> None:
    taken, cancel = [], threading.Event()

    def prompts() -> Iterator[str]:
        for i in range(100):
            taken.append(i)
            yield f"line {i}"

    found = pool.answers(model, prompts(), workers=2, cancel=cancel, max_new_tokens=2)
    next(found)
    assert len(taken) == 4
    found.close()  # type: ignore[attr-defined]
    assert cancel.is_set()
    assert len(taken) == 4


def test_pool_prints_a_line_for_each_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\nthree\n", encoding="utf-8")
    pool.main([str(attention_bundle()), str(file), "--workers", "2", "--max-new-tokens", "3"])
    assert len(capsys.readouterr().out.splitlines()) == 3


async def ask(port: int, *requests: Any) -> list[dict[str, Any]]:
    """The lines that a client gets for its requests."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for request in requests:
        writer.write((request if isinstance(request, str) else json.dumps(request)).encode() + b"\n")
    writer.write_eof()
    lines = [json.loads(line) async for line in reader]
    writer.close()
    await writer.wait_closed()
    return lines


def test_service_answers_many_clients_at_once_with_what_each_gets_alone(model: Model) -> None:
    async def run() -> list[list[dict[str, Any]]]:
        made = service.Service(model, rows=3)
        port = await made.start("127.0.0.1", 0)
        found = await asyncio.gather(*(ask(port, {"prompt": f"client {i}", "max_new_tokens": 5}) for i in range(5)))
        await made.stop()
        return list(found)

    for i, lines in enumerate(asyncio.run(run())):
        alone = model.generate(f"client {i}", max_new_tokens=5)
        assert "".join(line["text"] for line in lines) == alone.text
        assert [line.get("finish_reason") for line in lines][-1] == alone.finish_reason


def test_service_tells_what_is_wrong_and_goes_on(model: Model) -> None:
    wrong = ["{", "[]", {"prompt": 3}, {"prompt": "a", "tokens": 3}, {"prompt": "a", "max_new_tokens": "b"},
             {"prompt": "far too long " * 100}]  # fmt: skip

    async def run() -> list[dict[str, Any]]:
        made = service.Service(model)
        found = await ask(await made.start("127.0.0.1", 0), *wrong, {"prompt": "a", "max_new_tokens": 1})
        await made.stop()
        return found

    *errors, last = asyncio.run(run())
    assert [list(line) for line in errors] == [["error"]] * len(wrong)
    assert "no JSON" in errors[0]["error"]
    assert "unknown options ['tokens']" in errors[3]["error"]
    assert last["finish_reason"] == "length"


def test_service_that_stops_answers_what_runs(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, goes_on = threading.Event(), threading.Event()
    step = model.session.step

    def waiting(*args: Any, **kwargs: Any) -> Any:
        reached.set()
        assert goes_on.wait(60)
        return step(*args, **kwargs)

    monkeypatch.setattr(model.session, "step", waiting)

    async def run() -> list[dict[str, Any]]:
        made = service.Service(model)
        port = await made.start("127.0.0.1", 0)
        client = asyncio.create_task(ask(port, *[{"prompt": "a", "max_new_tokens": 4, "seed": 1}] * 2))
        await asyncio.to_thread(reached.wait, 60)
        stopping = asyncio.create_task(made.stop())
        await asyncio.sleep(0)  # it has told everybody
        goes_on.set()
        await stopping
        assert made._server is not None
        assert not made._server.is_serving()
        return await client

    found = asyncio.run(run())
    assert [line.get("finish_reason") for line in found if "finish_reason" in line] == ["length"]


def test_service_makes_no_more_of_an_answer_whose_client_has_gone(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_step, step = threading.Semaphore(3), model.session.step

    def waiting(*args: Any, **kwargs: Any) -> Any:
        assert may_step.acquire(timeout=60)
        return step(*args, **kwargs)

    monkeypatch.setattr(model.session, "step", waiting)

    async def run() -> dict[str, int]:
        made = service.Service(model)
        port = await made.start("127.0.0.1", 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b'{"prompt": "a", "max_new_tokens": 90}\n')
        await reader.readline()
        writer.transport.abort()
        counts = made._scheduler.load.counts
        while not ended(counts):  # a token, and time for the service to find that nobody takes it
            tokens = counts["tokens"]
            may_step.release()
            while not ended(counts := made._scheduler.load.counts) and counts["tokens"] == tokens:
                await asyncio.sleep(0.001)
        await made.stop()
        return counts

    def ended(counts: dict[str, int]) -> bool:
        return any(name.startswith("ended_") for name in counts)

    counts = asyncio.run(run())
    assert counts["ended_cancelled"] == 1
    assert counts["tokens"] < 90


def test_service_as_a_process_answers_and_ends_at_sigterm() -> None:
    command = [sys.executable, str(EXAMPLES / "embedding/service.py"), str(attention_bundle()), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(":")[2])
        (*_, last) = asyncio.run(ask(port, {"prompt": "hello", "max_new_tokens": 3}))
        process.terminate()
        assert process.wait(60) == 0
    assert last["finish_reason"] == "length"


def test_terminal_as_a_process_takes_lines_from_a_pipe() -> None:
    command = [
        sys.executable,
        str(EXAMPLES / "embedding/terminal.py"),
        str(attention_bundle()),
        "--max-new-tokens",
        "2",
    ]
    lines = "hello\n/fork other\n/branches\n"
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("/fork NAME")
    assert "* other: <Conversation: 1 turns" in done.stdout


def test_terminal_forks_rewinds_edits_and_corrects(model: Model, tmp_path: Path) -> None:
    out = io.StringIO()
    shown = terminal.Terminal(model, out, max_new_tokens=3)
    for line in ("hi", "/fork other", "more", "/go main", "/edit 1 ho"):
        assert shown.enter(line)
    assert {name: [m["content"] for m in talk.messages if m["role"] == "user"]
            for name, talk in shown.branches.items()} == {"main": ["ho"], "other": ["hi", "more"]}  # fmt: skip
    alone = model.conversation()
    assert shown.conversation.messages[1]["content"] == alone.say("ho", max_new_tokens=3).text
    shown.enter("/correct No.")
    assert shown.conversation.messages[-1] == {"role": "assistant", "content": "No."}
    shown.enter("/again")
    assert shown.conversation.messages == alone.messages
    shown.enter(f"/save {tmp_path / 'talk'}")
    shown.enter("/rewind")
    assert shown.conversation.messages == []
    shown.enter(f"/load {tmp_path / 'talk'}")
    assert shown.conversation.messages == alone.messages
    assert not shown.enter("/exit")


def test_terminal_says_what_is_wrong_and_changes_nothing(model: Model) -> None:
    out = io.StringIO()
    shown = terminal.Terminal(model, out, max_new_tokens=2)
    shown.enter("hi")
    before = shown.conversation.messages
    wrong = ["/rewind 2", "/rewind x", "/edit 2 ho", "/edit 1", "/go nowhere", "/fork main", "/load nowhere", "/what"]
    for line in (*wrong, "/correct", "", "/branches", "long " * 200, "/edit 1 " + "long " * 200):
        assert shown.enter(line)
    assert shown.conversation.messages == before
    assert {"no branch 'nowhere'", "/edit N TEXT, with N from 1 to 1"} <= {
        sentence for line in out.getvalue().splitlines() for sentence in (line, line.split(";")[0])
    }
