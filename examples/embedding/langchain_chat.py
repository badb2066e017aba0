"""LangChain against a server of edgellm's: a chain of prompt, model and parser, streamed, and an answer of a form.

edgellm serve smollm2=runs/smollm2-int8
pip install 'langchain-openai>=1,<2'
python examples/embedding/langchain_chat.py http://127.0.0.1:8000/v1 smollm2 "a lighthouse"
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

__all__ = ["Verdict", "chat", "judge", "main", "tell"]


class Verdict(BaseModel):
    """What is made of a text."""

    good: bool = Field(description="whether it is worth reading")
    stars: int = Field(ge=1, le=5)


def chat(base_url: str, model: str, **options: Any) -> ChatOpenAI:
    """LangChain's model over ``/v1/chat/completions``.

    Args:
        base_url: the server's, with ``/v1``.
        model: its name there.
        **options: LangChain's own, such as ``temperature``, ``seed`` and ``max_tokens``.
    """
    return ChatOpenAI(base_url=base_url, model=model, api_key="none", max_retries=0, **options)


def tell(model: ChatOpenAI, subject: str) -> Iterator[str]:
    """A short text about something, piece by piece."""
    prompt = ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", "Tell me about {subject}.")])
    yield from (prompt | model | StrOutputParser()).stream({"subject": subject})


def judge(model: ChatOpenAI, text: str) -> Verdict:
    """A verdict on a text; the server holds the answer to the form by a grammar."""
    found = model.with_structured_output(Verdict, method="json_schema").invoke(f"Judge this text: {text}")
    assert isinstance(found, Verdict)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Ask a server of edgellm's through LangChain.")
    parser.add_argument("base_url")
    parser.add_argument("model")
    parser.add_argument("subject")
    given = parser.parse_args(arguments)

    model = chat(given.base_url, given.model, temperature=0, max_tokens=60)
    said = ""
    for piece in tell(model, given.subject):
        print(piece, end="", flush=True)
        said += piece
    print(f"\n{judge(model, said)!r}")


if __name__ == "__main__":
    main()
