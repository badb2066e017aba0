"""Ask a bundle through LangChain, LlamaIndex and llm's own program, as the examples do; prints a line for each.

    python scripts/clients_check.py BUNDLE langchain llamaindex
    python scripts/clients_check.py BUNDLE llm

Runs in an environment that has these clients (`make clients-check`): llm wants a later openai than LlamaIndex takes.
What an answer must be is asked of the bundle itself, through edgellm_runtime; one of random weights will do.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from edgellm_runtime import Model, load

_TOKENS = 24
_HERE = Path(sys.executable).parent


@contextmanager
def served(bundle: Path) -> Iterator[str]:
    """``edgellm serve`` as a process of its own; gives its address."""
    command = [str(_HERE / "edgellm"), "serve", f"model={bundle}", "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        seen: list[str] = []
        for line in server.stderr:
            seen.append(line)
            if "Serving at" in line:
                break
        else:
            raise SystemExit(f"edgellm serve ended:\n{''.join(seen)}")
        try:
            yield line.split()[-1]
        finally:
            server.terminate()
            server.stderr.read()


def langchain(model: Model, bundle: Path) -> str:
    """A streamed chain says what the model says; a form is kept."""
    from embedding import langchain_chat

    with served(bundle) as address:
        return _langchain(langchain_chat, model, f"{address}/v1")


def _langchain(langchain_chat: Any, model: Model, url: str) -> str:
    asked = langchain_chat.chat(url, "model", temperature=0, max_tokens=_TOKENS)
    pieces = list(langchain_chat.tell(asked, "a lighthouse"))
    messages = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me about a lighthouse."}
    ]  # fmt: skip
    assert "".join(pieces) == model.chat(messages, max_new_tokens=_TOKENS).text
    verdict = langchain_chat.judge(langchain_chat.chat(url, "model", temperature=0, max_tokens=200), "A tale.")
    assert 1 <= verdict.stars <= 5
    return f"{len(pieces)} pieces; {verdict!r}"


def llamaindex(model: Model, bundle: Path) -> str:
    """A streamed chat says what the model says; an answer comes from passages."""
    from embedding import llamaindex_chat

    with served(bundle) as address:
        return _llamaindex(llamaindex_chat, model, f"{address}/v1")


def _llamaindex(llamaindex_chat: Any, model: Model, url: str) -> str:
    from llama_index.core.base.llms.types import ChatMessage

    llm = llamaindex_chat.model(url, "model", 2048, temperature=0, max_tokens=_TOKENS)
    pieces = list(llamaindex_chat.converse(llm, [ChatMessage(role="user", content="hello")]))
    assert "".join(pieces) == model.chat([{"role": "user", "content": "hello"}], max_new_tokens=_TOKENS).text
    answer = llamaindex_chat.answer(llm, ["The sun is bright.", "The moon is pale."], "What is bright?")
    assert answer
    return f"{len(pieces)} pieces; {answer!r}"


def llm_program(model: Model, bundle: Path) -> str:
    """The plugin, found by its entry point, says what the model says, and goes on with a conversation."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "LLM_USER_PATH": folder}
        program = str(_HERE / "llm")

        def ask(*words: str) -> str:
            command = [program, *words]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
            )
            assert done.returncode == 0, f"{words}: {done.stderr}"
            return done.stdout

        assert '"llm-edgellm"' in ask("plugins")
        ask("edgellm", "add", str(bundle), "--name", "model")
        limit = ("-o", "max_tokens", str(_TOKENS))
        first = ask("-m", "edgellm/model", "hello", *limit)
        messages = [{"role": "user", "content": "hello"}]
        said = model.chat(messages, max_new_tokens=_TOKENS).text
        assert first.rstrip("\n") == said.rstrip("\n"), (first, said)
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "more"}]
        second = ask("-c", "more", *limit)
        assert second.rstrip("\n") == model.chat(messages, max_new_tokens=_TOKENS).text.rstrip("\n")
        schema = ask("-m", "edgellm/model", "somebody", "--schema", "sure bool", "-o", "max_tokens", "60")
        return f"two turns; {schema.strip()}"


CHECKS = {
    "langchain": ("langchain-openai", langchain), "llamaindex": ("llama-index-llms-openai-like", llamaindex),
    "llm": ("llm", llm_program),
}  # fmt: skip


def main() -> None:
    """Check each client."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("clients", nargs="+", choices=CHECKS)
    given = parser.parse_args()
    model = load(given.bundle, threads=1)
    for client in given.clients:
        package, check = CHECKS[client]
        print(f"{package} {importlib.metadata.version(package)}: {check(model, given.bundle)}", flush=True)


if __name__ == "__main__":
    main()
