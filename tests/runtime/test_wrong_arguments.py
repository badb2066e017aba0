"""Every public method, every parameter, every kind of wrong value: refused in the runtime's own words, or right."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generation_fakes import FakeSession, fake_model
from task_models import spec_of
from task_models import tokenizer as task_tokenizer
from tiny_bundles import attention_bundle, hidden_bundle, recurrent_bundle

import edgellm_runtime
from edgellm_runtime import OptionError, RuntimeFault
from edgellm_runtime.batching.scheduler import Scheduler
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.generation.conversation import Conversation
from edgellm_runtime.generation.generate import OptionKeywords
from edgellm_runtime.generation.text_state import TextState
from edgellm_runtime.model import Model
from edgellm_runtime.session import Session
from edgellm_runtime.state import State
from edgellm_runtime.tasks.runner import TaskRunner
from edgellm_runtime.text.chat import ChatTemplate
from edgellm_runtime.text.tokenizer import Tokenizer


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


VALUES: dict[str, Any] = {
    "None": None, "True": True, "False": False, "0": 0, "1": 1, "-1": -1, "1.9": 1.9, "1.0": 1.0, "2**70": 2**70,
    "10**6000": 10**6000, "nan": math.nan, "inf": math.inf, "1j": 1j, "''": "", "'zz'": "zz", "'no'": "no",
    "'nul'": "a\0b", "b'ab'": b"ab", "[]": [], "[None]": [None], "['a', 1]": ["a", 1], "[1, 'a']": [1, "a"],
    "[[1], [1, 2]]": [[1], [1, 2]], "[1.9]": [1.9], "[True]": [True], "{}": {}, "{'a': 1}": {"a": 1}, "{1}": {1},
    "object": object(), "function": lambda *_: None, "type": int, "unprintable": Unprintable(), "generator": iter([]),
    "array(1.5)": np.array([1.5]), "array(3)": np.array(3), "array([])": np.array([]), "array(bool)": np.array([True]),
    "array(text)": np.array(["a"]), "array(object)": np.array([None]), "array(4 axes)": np.zeros((1, 1, 1, 1), int),
    "np.True_": np.True_, "np.float32": np.float32(0.5), "np.int64": np.int64(1), "10**9": 10**9,
    "surrogate": "\ud800",
}  # fmt: skip
TEXT = {"''", "'zz'", "'no'", "'nul'", "surrogate"}
WHOLE = {"0", "1", "np.int64", "array(3)"}
# What each kind of parameter may take without an error; it may refuse these too, when they are out of its range.
KINDS: dict[str, set[str]] = {
    "integer": WHOLE | {"2**70", "10**6000", "10**9"},
    "small integer": WHOLE,
    "number": {"0", "1", "1.9", "1.0", "-1", "np.float32", "np.int64"},
    "number or None": {"None", "0", "1", "1.9", "1.0", "np.float32", "np.int64", "10**9"},
    "flag": {"True", "False", "np.True_"},
    "text": TEXT,
    "text or None": TEXT | {"None"},
    "integer or None": WHOLE | {"2**70", "10**6000", "10**9", "None"},
    "seeds": WHOLE | {"2**70", "10**6000", "10**9", "None"},
    "small integer or None": WHOLE | {"None"},
    "prompt": TEXT | {"[]", "array(text)", "[[1], [1, 2]]"},
    "one prompt": TEXT,
    "stops": TEXT - {"''"} | {"[]", "array(text)", "array([])"},
    "functions": {"[]", "array([])"},
    "texts": TEXT | {"[]", "array(text)", "array([])"},
    "schema or None": {"None", "{}"},
    "texts or None": {"None", "array(text)"},
    "files or None": {"None"},
    "tokens": {"[]", "generator", "array([])"},
    "token or None": WHOLE | {"None"},
    "messages": set(),
    "history": {"[]", "array([])"},
    "objects or None": {"None", "[]", "array([])"},
    "variables or None": {"None", "{}", "{'a': 1}"},
    "lengths": {"1", "np.int64", "array(3)", "0", "[]"},
    "integers or None": {"None"},
    "array": set(),
    "rows": set(),
    "choice": set(),
    "choice or None": {"None"},
    "object": set(),
    "object or None": {"None"},
    "memory or None": {"None", "2**70", "10**6000", "10**9"},
    "memory": {"2**70", "10**6000", "10**9"},
    "path or None": {"None", "'zz'", "'no'"},
    "scored": {"[]", "array([])", "array(text)", "[[1], [1, 2]]"},
    "embedded": TEXT | {"[]", "array([])", "array(text)", "[[1], [1, 2]]"},
    "bias": {"{}", "None"},
    "ids": {"[]", "array([])"},
    "function or None": {"None", "function"},
    "path": {"'zz'", "'no'"},
    "specs": {"[]", "array([])"},
    "predicate": {"0", "1", "np.int64"},
    "row options or None": {"None"},
}  # fmt: skip
OPTIONS = {
    "max_new_tokens": "integer", "stop": "stops", "ignore_eos": "flag", "temperature": "number", "top_k": "integer",
    "top_p": "number", "min_p": "number", "repetition_penalty": "number", "seed": "seeds",
    "logits_processors": "functions", "presence_penalty": "number", "frequency_penalty": "number",
    "no_repeat_ngram": "integer", "logit_bias": "bias", "banned_tokens": "ids", "min_tokens": "small integer",
    "stop_tokens": "ids", "logprobs": "small integer or None", "skip_special_tokens": "flag", "echo": "flag",
    "draft": "object or None", "beams": "small integer", "length_penalty": "number", "shown_tokens": "ids",
    "progress": "function or None", "deadline": "number or None", "cancel": "object or None", "typical_p": "number",
    "penalty_window": "integer", "forced_tokens": "ids", "grammar": "object or None",
    "adapter": "choice or None",
}  # fmt: skip
TEMPLATE = {"tools": "objects or None", "documents": "objects or None", "template_variables": "variables or None"}
COUNTS = {"state": "object or None", "n": "small integer or None", "best_of": "small integer or None"}
ROWS = {"row_options": "row options or None"}
TASK = {"beams": "small integer", "check_script": "flag"}
INTERNAL = {
    "TextState.resumed",
    "TextState.extended",
    "TextState.check_for",
    "TextState.trail",
    "TextState.read",
    "State.first",
    "State.follow",
    "State.settle",
    "Session.shorten",
    "Model.text_tokens",
    "Session.adapted",
    "Session.padding",
}  # which other parts of the runtime call
BATCH = {"rows": "small integer", "queue": "small integer", "piece": "small integer or None", "exact": "flag",
         "state_bytes": "memory or None"}  # fmt: skip
# Each parameter of each public function and method, and a call that is right
TABLE: dict[str, dict[str, str]] = {
    "load": {"path": "path", "device": "choice", "threads": "small integer or None", "checksums": "flag",
             "isolate": "flag", "max_memory": "memory or None", "shrink_context": "flag",
             "prefix_cache": "object or None", "trusted_keys": "files or None", "kernels": "choice or None"},
    "PrefixCache": {"max_bytes": "memory", "directory": "path or None", "max_disk_bytes": "memory"},
    "open_session": {"bundle": "object", "device": "choice", "threads": "small integer or None",
                     "kernels": "choice or None"},
    "Model.generate": {"prompt": "prompt", **COUNTS, **ROWS, **OPTIONS},
    "Model.agenerate": {"prompt": "prompt", **COUNTS, **ROWS, **OPTIONS},
    "Model.stream": {"prompt": "one prompt", "state": "object or None", **OPTIONS},
    "Model.astream": {"prompt": "one prompt", "state": "object or None", **OPTIONS},
    "Model.read": {"prompt": "one prompt", "state": "object or None", "progress": "function or None"},
    "Model.grammar": {"json_schema": "schema or None", "regex": "text or None", "lark": "text or None",
                      "choices": "texts or None"},
    "Model.memory": {"context": "small integer or None", "rows": "integer"},
    "Model.scheduler": BATCH,
    "Scheduler.submit": {"prompt": "one prompt", "answers": "small integer", "wait": "flag",
                         "sink": "function or None", "prompt_logprobs": "integer or None", **OPTIONS},
    "Model.new_state": {},
    "Model.drafter": {},
    "Model.score": {"texts": "scored", "bos": "flag"},
    "Model.embed": {"texts": "embedded", "pooling": "choice", "normalize": "flag", "truncate": "flag"},
    "Model.aembed": {"texts": "embedded", "pooling": "choice", "normalize": "flag", "truncate": "flag"},
    "Model.load_state": {"path": "path"},
    "Model.load_conversation": {"path": "path"},
    "TextState.fork": {},
    "TextState.rewind": {"tokens": "small integer"},
    "TextState.save": {"path": "path"},
    "TextState.load": {"path": "path", "session": "object", "bundle": "object"},
    "Model.chat": {"messages": "messages", **TEMPLATE, **OPTIONS},
    "Model.stream_chat": {"messages": "messages", **TEMPLATE, **OPTIONS},
    "Model.conversation": {"system": "text or None", **TEMPLATE},
    "Model.translate": {"source": "texts"},
    "Model.answer": {"question": "texts", "context": "texts"},
    "Model.summarize": {"text": "texts"},
    "Model.label_roles": {"sentence": "texts", "predicate": "predicate"},
    "Conversation.say": {"text": "text", **OPTIONS},
    "Conversation.stream": {"text": "text", **OPTIONS},
    "Conversation.reset": {"system": "text or None"},
    "Conversation.fork": {},
    "Conversation.switch": {"adapter": "choice or None"},
    "Conversation.rewind": {"turns": "small integer"},
    "Conversation.edit": {"messages": "history"},
    "Conversation.save": {"path": "path"},
    "Conversation.restore": {"path": "path"},
    "Model.with_adapter": {"name": "choice or None"},
    "Session.with_adapter": {"name": "choice or None"},
    "Session.new_state": {"batch": "small integer", "capacity": "integer", "sources": "integers or None"},
    "Session.step": {"tokens": "array", "state": "object", "lengths": "integers or None", "logits": "choice",
                     "progress": "function or None"},
    "Session.step_hidden": {"tokens": "array", "state": "object", "lengths": "integers or None", "logits": "choice",
                            "progress": "function or None"},
    "Session.check_hidden": {},
    "Session.best": {"tokens": "array", "state": "object", "count": "small integer"},
    "State": {"specs": "specs", "batch": "small integer", "capacity": "small integer"},
    "State.read": {"name": "choice"},
    "State.reserve": {"slots": "small integer"},
    "State.swap": {},
    "State.fork": {"room": "small integer"},
    "State.take": {"rows": "rows"},
    "State.put": {"row": "small integer", "other": "object"},
    "State.rewind": {"lengths": "lengths"},
    "State.snapshot": {"row": "small integer or None"},
    "State.restore": {"snapshot": "object"},
    "State.save": {"path": "path", "about": "variables or None", "snapshots": "ids"},
    "State.load": {"path": "path", "specs": "specs", "threads": "integer"},
    "Tokenizer.encode": {"text": "text", "bos": "flag", "special": "flag"},
    "Tokenizer.to_json": {},
    "Tokenizer.special_spans": {"text": "text"},
    "Tokenizer.decode": {"tokens": "tokens", "after": "tokens", "skip_special": "flag"},
    "Tokenizer.stream": {"after": "tokens", "skip_special": "flag", "shown": "tokens"},
    "Tokenizer.check": {"tokens": "tokens"},
    "Tokenizer.token_id": {"name": "text"},
    "Tokenizer.token_text": {"token": "token or None"},
    "Tokenizer.token_bytes": {"token": "small integer"},
    "ChatTemplate.render": {"messages": "messages", "add_generation_prompt": "flag", **TEMPLATE},
    "ChatTemplate.encode": {"messages": "messages", "add_generation_prompt": "flag", **TEMPLATE},
    "TaskRunner.translate": {
        "source": "texts", "length_penalty": "number", "max_new_tokens": "integer or None", **TASK,
    },
    "TaskRunner.answer": {"question": "texts", "context": "texts", **TASK},
    "TaskRunner.summarize": {"text": "texts", "words": "small integer or None", **TASK},
    "TaskRunner.prompt": {"text": "text"},
    "TaskRunner.label_roles": {"sentence": "texts", "predicate": "predicate"},
    "TaskRunner.label_roles_batch": {"items": "specs"},
}  # fmt: skip


class LabellingSession(FakeSession):
    """Gives logits over labels."""

    def step(self, tokens, state, *, lengths=None, logits="last", progress=None):
        return np.zeros((*tokens.shape, 5), dtype=np.float32)


class Fixtures:
    """A right call of everything in the table; what it is called on is made anew each time."""

    def __init__(self, folder: Path) -> None:
        self.model = fake_model(folder, max_context=200)
        self.scheduler = self.model.scheduler()
        self.bundle = Bundle(attention_bundle())
        self.session = edgellm_runtime.open_session(self.bundle, threads=1)
        self.recurrent = edgellm_runtime.open_session(Bundle(recurrent_bundle()), threads=1)
        self.texts = edgellm_runtime.load(attention_bundle(), threads=1)
        self.hidden = edgellm_runtime.load(hidden_bundle(), threads=1)
        self.text_file = folder / "text.state"
        self.texts.read("hello").save(self.text_file)
        self.talk_file = folder / "talk.state"
        self.texts.conversation().save(self.talk_file)
        self.file = folder / "saved.state"
        self.state().save(self.file)
        (folder / "tasks").mkdir()
        model = fake_model(folder / "tasks", max_context=400, library=task_tokenizer())
        self.tasks = {
            task: TaskRunner(model.session, model.tokenizer, spec_of(task))
            for task in ("translation", "qa", "summarization")
        }
        labelling = LabellingSession(model.session.vocab_size, 400)
        self.tasks["srl"] = TaskRunner(labelling, model.tokenizer, spec_of("srl"))

    def state(self) -> State:
        state = self.session.new_state(1, 8)
        self.session.step(np.array([[3, 4, 5]]), state)
        return state

    def call(self, name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
        owner, _, method = name.partition(".")
        if owner == "PrefixCache":
            return edgellm_runtime.PrefixCache, {}
        if owner in ("load", "open_session"):
            given = {"path": attention_bundle()} if owner == "load" else {"bundle": self.bundle}
            return getattr(edgellm_runtime, owner), {**given, "threads": 1}
        if (owner, method) == ("Model", "score"):
            return self.texts.score, {"texts": ["hello"]}
        if (owner, method) in (("Model", "embed"), ("Model", "aembed")):
            return getattr(self.hidden, method), {"texts": "hello"}
        if owner == "Session" and method.endswith("hidden"):
            state = self.hidden.session.new_state(1, 8)
            right = {"tokens": [[1, 2]], "state": state} if method == "step_hidden" else {}
            return getattr(self.hidden.session, method), right
        loading = ("read", "new_state", "load_state", "memory", "load_conversation", "with_adapter")
        if owner == "Conversation" and method in ("save", "restore"):
            return getattr(self.texts.conversation(), method), {"path": self.talk_file}
        if owner == "TextState" or (owner == "Model" and method in loading):
            right = {
                "read": {"prompt": "hello"}, "load_state": {"path": self.text_file}, "rewind": {"tokens": 1},
                "save": {"path": self.text_file}, "with_adapter": {"name": None},
                "load_conversation": {"path": self.talk_file},
                "load": {"path": self.text_file, "session": self.texts.session, "bundle": self.texts.bundle},
            }.get(method, {})  # fmt: skip
            return getattr(self.texts if owner == "Model" else self.texts.read("hello"), method), right
        if owner == "Model":
            task = {"translate": "translation", "answer": "qa", "summarize": "summarization", "label_roles": "srl"}
            model = self.model
            if method in task:
                model = Model(self.model.session, self.model.tokenizer, self.model.bundle)
                model.__dict__["task"] = self.tasks[task[method]]
            return getattr(model, method), self.arguments(method)
        on = {
            "Conversation": self.model.conversation, "Session": lambda: self.session, "State": self.state,
            "Scheduler": lambda: self.scheduler,
            "Tokenizer": lambda: self.model.tokenizer, "ChatTemplate": lambda: self.model.chat_template,
            "TaskRunner": lambda: self.tasks[
                {"translate": "translation", "prompt": "translation", "answer": "qa", "summarize": "summarization"}.get(
                    method, "srl"
                )
            ],
        }[owner]()  # fmt: skip
        if not method:
            return State, {"specs": self.session.signature.state, "batch": 1, "capacity": 1}
        arguments = self.arguments(method)
        if owner == "Conversation" and method == "stream":
            arguments = {"text": "hello", "max_new_tokens": 1}
        if owner == "Conversation" and method == "rewind":
            arguments = {"turns": 0}
        if owner == "State" and method == "restore":
            arguments = {"snapshot": self.state().snapshot()}
        if owner == "Tokenizer" and method == "stream":
            arguments = {}
        if owner == "Tokenizer" and method == "encode":
            arguments = {"text": "hello"}
        if owner == "State" and method == "load":
            arguments = {"path": self.file, "specs": self.session.signature.state}
        return getattr(on, method), arguments

    def arguments(self, method: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": "hello"}]
        few = {"max_new_tokens": 1}
        return {
            "with_adapter": {"name": None}, "switch": {"adapter": None},
            "generate": {"prompt": "hello", **few}, "stream": {"prompt": "hello", **few},
            "agenerate": {"prompt": "hello", **few}, "astream": {"prompt": "hello", **few},
            "chat": {"messages": messages, **few}, "stream_chat": {"messages": messages, **few},
            "say": {"text": "hello", **few}, "translate": {"source": "the world"},
            "answer": {"question": "hello", "context": "the world"}, "summarize": {"text": "the world"},
            "prompt": {"text": "the world"},
            "label_roles": {"sentence": "the world", "predicate": 0}, "label_roles_batch": {"items": []},
            "step": {"tokens": [[1, 2]], "state": self.state()},
            "best": {"tokens": [[1]], "state": self.state(), "count": 1},
            "read": {"name": self.session.signature.state[0].name}, "reserve": {"slots": 4}, "take": {"rows": [0]},
            "put": {"row": 0, "other": self.state()}, "rewind": {"lengths": 2}, "save": {"path": self.file},
            "special_spans": {"text": "hello"}, "decode": {"tokens": [5]}, "check": {"tokens": [5]},
            "edit": {"messages": messages}, "grammar": {"choices": ["yes"]},
            "submit": {"prompt": "hello", **few}, "token_bytes": {"token": 5},
            "token_id": {"name": "<|im_end|>"}, "token_text": {"token": 5}, "render": {"messages": messages},
            "encode": {"messages": messages},
        }.get(method, {})  # fmt: skip


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fixtures]:
    found = Fixtures(tmp_path_factory.mktemp("surface"))
    with found.scheduler:
        yield found


def drained(result: Any) -> Any:
    if isinstance(result, Scheduler):
        return result.close()
    if inspect.isawaitable(result):
        return asyncio.run(awaited(result))
    if isinstance(result, AsyncIterator):
        return asyncio.run(collected(result))
    return list(result) if isinstance(result, Iterator) else result


async def awaited(result: Awaitable[Any]) -> Any:
    return await result


async def collected(chunks: AsyncIterator[Any]) -> list[Any]:
    return [chunk async for chunk in chunks]


def test_the_table_has_every_public_method_and_parameter() -> None:
    for cls in (Model, TextState, Conversation, Session, State, Tokenizer, ChatTemplate, TaskRunner):
        for name, method in inspect.getmembers(cls, callable):
            if name.startswith("_") or f"{cls.__name__}.{name}" in INTERNAL:
                continue
            parameters = set(inspect.signature(method).parameters) - {"self", "options", "storage"}
            if "Unpack[OptionKeywords]" in str(inspect.signature(method)):
                parameters |= OPTIONS.keys()
            assert parameters <= TABLE[f"{cls.__name__}.{name}"].keys(), f"{cls.__name__}.{name}"
    assert OPTIONS.keys() == OptionKeywords.__annotations__.keys()
    for name in ("load", "open_session"):
        assert inspect.signature(getattr(edgellm_runtime, name)).parameters.keys() == TABLE[name].keys()


@pytest.mark.parametrize("name", TABLE)
def test_a_wrong_value_is_refused_in_the_runtimes_own_words(
    fixtures: Fixtures, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a path that a test gives by mistake makes its file there
    function, right = fixtures.call(name)
    if name != "Session.best":  # which needs a device that chooses
        drained(function(**right))
    for parameter, kind in TABLE[name].items():
        for label, value in VALUES.items():
            if kind == "function or None" and label == "type":
                continue  # a function whose own error comes through
            function, right = fixtures.call(name)
            if parameter in ("temperature", "top_p"):
                right = {**right, "seed": 1}
            try:
                drained(function(**{**right, parameter: value}))
            except RuntimeFault as error:
                text = str(error)
                assert text and "\n" not in text and len(text) < 600, f"{name}({parameter}={label}): {text}"
            except Exception as error:
                pytest.fail(f"{name}({parameter}={label}): {type(error).__name__}: {error}")
            else:
                assert label in KINDS[kind], f"{name}({parameter}={label}) passes"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("Session.step", {"lengths": [1.9]}, "lengths is [1.9]; it must be whole numbers"),
        ("Session.step", {"logits": "zz"}, "logits is 'zz'; it must be one of last, all, none"),
        ("Session.step", {"lengths": [2**40]}, "lengths [1099511627776] for 1 rows of 2 tokens; each must be 1 to 2"),
        ("Session.new_state", {"batch": "2"}, "batch is '2'; it must be an integer from 1 to 2147483647"),
        ("State.rewind", {"lengths": 0.7}, "lengths is 0.7; it must be whole numbers"),
        ("State.take", {"rows": [True]}, "rows[0] is True; it must be an integer"),
        ("Model.generate", {"ignore_eos": "no"}, "ignore_eos is 'no'; it must be True or False"),
        ("Model.generate", {"prompt": b"hello"}, "the prompt is b'hello'; it must be a text or a list of token ids"),
        ("Model.generate", {"stop": b"x"}, "stop is b'x'; it must be a list of texts"),
        ("Model.generate", {"temperature": "1"}, "temperature is '1'; it must be a number at least 0"),
        ("Conversation.say", {"text": None}, "text is None; it must be a text"),
        ("Tokenizer.decode", {"tokens": "abc"}, "the tokens are 'abc'; they must be a list of token ids"),
        ("Tokenizer.encode", {"special": "yes"}, "special is 'yes'; it must be True or False"),
        ("Model.generate", {"max_new_token": 3}, "there is no option 'max_new_token'; did you mean max_new_tokens?"),
        ("Model.chat", {"zzz": 3}, "there is no option 'zzz'; there are adapter, "),
        ("load", {"path": ""}, "path is ''; it must be the path of a file or a folder"),
        ("load", {"checksums": 0}, "checksums is 0; it must be True or False"),
        ("load", {"threads": "2"}, "threads is '2'; it must be an integer"),
        ("TaskRunner.translate", {"beams": 1.0}, "beams is 1.0; it must be an integer from 1 to"),
    ],
)
def test_the_message_says_what_came_and_what_is_expected(
    fixtures: Fixtures, name: str, arguments: dict[str, Any], message: str
) -> None:
    function, right = fixtures.call(name)
    with pytest.raises(OptionError) as caught:
        drained(function(**{**right, **arguments}))
    assert str(caught.value).startswith(message)


def test_a_state_of_another_model_is_refused(fixtures: Fixtures) -> None:
    with pytest.raises(edgellm_runtime.StateError, match="the state is another model's; make one with"):
        fixtures.session.step([[1]], fixtures.recurrent.new_state())


def test_numbers_of_numpy_are_numbers(fixtures: Fixtures) -> None:
    plain = fixtures.model.generate("hello", max_new_tokens=3, temperature=0.5, top_k=4, seed=1)
    given = fixtures.model.generate(
        "hello", max_new_tokens=np.int32(3), temperature=np.float32(0.5), top_k=np.uint8(4), seed=np.int64(1),
        ignore_eos=np.False_,
    )  # fmt: skip
    assert given.tokens == plain.tokens
