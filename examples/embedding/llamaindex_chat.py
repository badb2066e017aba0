"""LlamaIndex against a server of edgellm's: a chat that goes on, and an answer from passages of a text.

edgellm serve smollm2=runs/smollm2-int8
pip install 'llama-index-llms-openai-like<1'
python examples/embedding/llamaindex_chat.py http://127.0.0.1:8000/v1 smollm2 notes.txt "Who wrote them?"
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llama_index.core import get_response_synthesizer
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.llms.openai_like import OpenAILike

__all__ = ["answer", "converse", "main", "model"]


def model(base_url: str, name: str, context: int, **options: Any) -> OpenAILike:
    """LlamaIndex' model over ``/v1/chat/completions``.

    Args:
        base_url: the server's, with ``/v1``.
        name: the model's there.
        context: tokens that it takes; LlamaIndex cuts passages to it.
        **options: LlamaIndex' own, such as ``temperature`` and ``max_tokens``.
    """
    return OpenAILike(
        api_base=base_url, model=name, api_key="none", is_chat_model=True, context_window=context, max_retries=0,
        **options,
    )  # fmt: skip


def converse(llm: OpenAILike, messages: Sequence[ChatMessage]) -> Iterator[str]:
    """The assistant's next message, piece by piece."""
    yield from (piece.delta or "" for piece in llm.stream_chat(messages))


def answer(llm: OpenAILike, passages: Sequence[str], question: str) -> str:
    """An answer from passages, which are put together into as few prompts as the context allows."""
    nodes = [NodeWithScore(node=TextNode(text=passage)) for passage in passages]
    return str(get_response_synthesizer(llm=llm, response_mode="compact").synthesize(question, nodes=nodes))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Ask a server of edgellm's through LlamaIndex.")
    parser.add_argument("base_url")
    parser.add_argument("model")
    parser.add_argument("text", type=Path, help="file whose paragraphs are the passages")
    parser.add_argument("question")
    parser.add_argument("--context", type=int, default=2048)
    given = parser.parse_args(arguments)

    llm = model(given.base_url, given.model, given.context, temperature=0, max_tokens=60)
    passages = [part for part in given.text.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    first = answer(llm, passages, given.question)
    print(first)
    messages = [
        ChatMessage(role="user", content=given.question), ChatMessage(role="assistant", content=first),
        ChatMessage(role="user", content="Say it in other words."),
    ]  # fmt: skip
    for piece in converse(llm, messages):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
