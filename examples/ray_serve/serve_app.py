"""Replicas of edgellm's server under Ray Serve; a session's requests go to the replica that holds its states.

    serve run --app-dir examples/ray_serve serve_app:build bundles=smollm2=/models/smollm2-int8 replicas=2 threads=2

Each replica has the routes of ``edgellm serve`` and a prefix cache of its own. Clients send ``x-session-id``; Ray Serve
hashes it onto a ring of replicas, so that a conversation's turns meet the state that its earlier turns left, and few
sessions move when replicas come and go.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field
from ray import serve
from ray.serve.config import RequestRouterConfig

from edgellm_runtime.batching.options import BatchOptions
from edgellm_runtime.server.app import application
from edgellm_runtime.server.host import open_host
from edgellm_runtime.server.options import ServerOptions
from edgellm_runtime.server.run import log_to_stderr

__all__ = ["Arguments", "Edgellm", "build"]

_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


class Arguments(BaseModel):
    """What ``serve run`` is told."""

    bundles: str = Field(description="NAME=PATH, several with commas; every node has them at these paths")
    replicas: int = Field(default=2, ge=1)
    threads: int = Field(default=1, ge=1, description="of a replica, and the cores that Ray keeps for it")
    rows: int = Field(default=8, ge=1, description="answers of a bundle that a replica makes at once")
    queue: int = Field(default=64, ge=1, description="requests of a bundle that may wait in a replica")
    drain: float = Field(default=30.0, gt=0, description="seconds that a replica has to end its answers")
    prefix_cache: int = Field(default=256 << 20, ge=0, description="bytes of states that a replica keeps")
    api_key: str = Field(default="", description="that callers must send; none: anyone may call who reaches Ray Serve")


@serve.deployment(health_check_period_s=5, health_check_timeout_s=10)
@serve.ingress()
class Edgellm:
    """One replica: bundles, and the server's routes over them.

    Args:
        arguments: of the application.
    """

    def __init__(self, arguments: Arguments) -> None:
        log_to_stderr()  # a line of JSON for each request, in Ray's logs
        # Ray Serve's proxy is whoever calls, by the name that its callers know; so no name is turned away here.
        keys = (arguments.api_key,) if arguments.api_key else ()
        batch = BatchOptions(rows=arguments.rows, queue=arguments.queue)
        self._options = ServerOptions(
            host="0.0.0.0", api_keys=keys, open_to_all=not keys, batch=batch, drain=arguments.drain
        )
        named = dict(one.split("=", 1) for one in arguments.bundles.split(","))
        bundles = {name: Path(path) for name, path in named.items()}
        self._host = open_host(bundles, batch, threads=arguments.threads, prefix_cache=arguments.prefix_cache)

    def __serve_build_asgi_app__(self) -> Any:
        """The routes, each of whose answers says which replica made it."""
        app, name = application(self._host, self._options), serve.get_replica_context().replica_tag.encode()

        async def named(scope: Any, receive: Any, send: Any) -> None:
            async def sent(message: Any) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message.get("headers", ()), (b"x-replica", name)]
                await send(message)

            await app(scope, receive, sent)

        return named

    def check_health(self) -> None:
        """Ray Serve asks again and again, and replaces a replica that raises.

        Raises:
            RuntimeError: a model answers no more.
        """
        if failed := [hosted.name for hosted in self._host if not hosted.scheduler.alive]:
            raise RuntimeError(f"{', '.join(failed)} takes no requests any more")


def build(arguments: Arguments) -> serve.Application:
    """The application, for ``serve run`` and configuration files."""
    return Edgellm.options(
        num_replicas=arguments.replicas,
        ray_actor_options={"num_cpus": arguments.threads},
        # As many as the replica itself takes: a session's request that finds its own full goes to the next on the ring.
        max_ongoing_requests=arguments.rows + arguments.queue,
        graceful_shutdown_wait_loop_s=1.0,
        graceful_shutdown_timeout_s=arguments.drain + 5,
        request_router_config=RequestRouterConfig(
            request_router_class=_ROUTER, request_router_kwargs={"num_fallback_replicas": 2}
        ),
    ).bind(arguments.model_copy(update={"replicas": 1}))  # so that another number of them is no other version
