"""The server's routes, as an ASGI application: each request is checked, answered in its interface's form, and noted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from edgellm_runtime.server.answering import note
from edgellm_runtime.server.anthropic_messages import count_tokens, messages
from edgellm_runtime.server.call import Call, EventStream, Handler, JsonText
from edgellm_runtime.server.faults import ApiError, Dialect, body_of, error_of, headers_of, status_of
from edgellm_runtime.server.fields import Fields, json_object
from edgellm_runtime.server.host import Host
from edgellm_runtime.server.journal import Journal
from edgellm_runtime.server.limits import Limits, read_body
from edgellm_runtime.server.openai_chat import chat
from edgellm_runtime.server.openai_completions import completions
from edgellm_runtime.server.openai_embeddings import Turns, embeddings
from edgellm_runtime.server.openai_models import list_models, show_model
from edgellm_runtime.server.openai_responses import responses
from edgellm_runtime.server.options import ServerOptions
from edgellm_runtime.server.page import page
from edgellm_runtime.server.tokenizing import detokenize, tokenize, tokenizer_info

__all__ = ["application"]

_ID: dict[Dialect, str] = {"openai": "x-request-id", "anthropic": "request-id"}  # the header with a request's name
_POSTS: tuple[tuple[str, Dialect, Handler], ...] = (
    ("/v1/chat/completions", "openai", chat),
    ("/v1/completions", "openai", completions),
    ("/v1/responses", "openai", responses),
    ("/v1/embeddings", "openai", embeddings),
    ("/v1/messages", "anthropic", messages),
    ("/v1/messages/count_tokens", "anthropic", count_tokens),
    ("/tokenize", "openai", tokenize),
    ("/detokenize", "openai", detokenize),
)


def application(host: Host, options: ServerOptions) -> Starlette:
    """The application.

    Args:
        host: the models; their schedulers are closed with it.
        options: who may ask for how much.
    """
    routes = [
        *(Route(path, _endpoint(path, dialect, handler), methods=["POST"]) for path, dialect, handler in _POSTS),
        Route("/v1/models", _endpoint("/v1/models", None, list_models), methods=["GET"]),
        Route("/v1/models/{model:path}", _endpoint("/v1/models/{model}", None, show_model), methods=["GET"]),
        Route("/tokenizer_info", _endpoint("/tokenizer_info", None, tokenizer_info), methods=["GET"]),
        Route("/", page, methods=["GET"]),
        Route("/health", _health, methods=["GET"]),
        Route("/metrics", _endpoint("/metrics", None, _metrics), methods=["GET"]),
    ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        host.close()

    origins = list(options.allow_origins)
    cors = Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    app = Starlette(
        routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _not_found},
        middleware=[cors] if origins else [],
    )  # fmt: skip
    app.state.host, app.state.options, app.state.turns = host, options, Turns()
    app.state.limits, app.state.journal = Limits(options), Journal(host, contents=options.log_contents)
    return app


def _endpoint(route: str, dialect: Dialect | None, handler: Handler) -> Any:
    """A route's function: checks, body, answer, error, note."""

    async def answer(request: Request) -> Response:
        state = request.app.state
        spoken: Dialect = dialect or ("anthropic" if "anthropic-version" in request.headers else "openai")
        call = Call(request, spoken, state.host, state.options, route)
        try:
            state.limits.check(request)
            if request.method == "POST":
                call.fields = Fields(json_object(await read_body(request, state.options.max_body)))
            response = await handler(call)
        except Exception as error:
            call.leave()
            note(call, error)
            response = _error(call, error_of(error))
        response.headers[_ID[spoken]] = call.id
        if not isinstance(response, EventStream):
            call.status = response.status_code
            state.journal.end(call)
        return response

    return answer


def _error(call: Call, error: ApiError) -> Response:
    return JsonText(
        body_of(error, call.dialect, call.id), status_code=status_of(error, call.dialect), headers=headers_of(error)
    )


async def _not_found(request: Request, error: Exception) -> Response:
    """What no route answers, or not in that way."""
    assert isinstance(error, HTTPException)
    path, status = request.url.path, error.status_code
    anthropic = "anthropic-version" in request.headers or path.startswith("/v1/messages")
    call = Call(request, "anthropic" if anthropic else "openai", request.app.state.host, request.app.state.options, "")
    if status == 405:
        said = ApiError(f"{request.method} is not allowed here; see the documentation.", 405, code="method_not_allowed")
    else:
        said = ApiError(f"Invalid URL ({request.method} {path[:200]})", status, code="unknown_url")
    response = _error(call, said)
    response.headers[_ID[call.dialect]] = call.id
    return response


async def _health(request: Request) -> Response:
    """Whether models answer; says nothing else, and wants no key."""
    alive = all(hosted.scheduler.alive for hosted in request.app.state.host)
    return JsonText({"status": "ok" if alive else "failed"}, status_code=200 if alive else 503)


async def _metrics(call: Call) -> Response:
    journal: Journal = call.request.app.state.journal
    return PlainTextResponse(journal.metrics(), media_type="text/plain; version=0.0.4")
