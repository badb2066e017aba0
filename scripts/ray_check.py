"""Try examples/ray_serve on a Ray cluster of two nodes in this machine: replicas, sessions, drain, kills, resuming.

    python scripts/ray_check.py --chat runs/tiny/chat --translator runs/tiny/translator --measure

Runs in an environment with `ray[serve,data]` (`make ray-check`). What an answer must be is asked of the bundles
themselves, through edgellm_runtime; ones of random weights will do. Prints a line for each thing that holds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples/ray_serve"))

import openai
import ray
from ray import serve
from ray.cluster_utils import Cluster
from serve_app import Arguments, build

from edgellm_runtime import Model, load

EXAMPLE = Path(__file__).parents[1] / "examples/ray_serve"
_SYSTEM = "You are a lighthouse keeper who answers in one short sentence, and never of the sea. "


@contextmanager
def cluster(cpus: int) -> Iterator[Cluster]:
    """Two nodes of so many cores, as Ray counts them."""
    os.environ["PYTHONPATH"] = str(EXAMPLE)  # the cluster's workers find the example there
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # else Ray would tell its makers of the cluster
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, "include_dashboard": False})
    found.add_node(num_cpus=cpus)
    ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield found
    finally:
        ray.shutdown()
        found.shutdown()


class Served:
    """The application on the cluster.

    Args:
        bundle: that it serves, as ``model``.
        threads: of a replica.
    """

    def __init__(self, bundle: Path, threads: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": self.port})
        self._arguments = Arguments(bundles=f"model={bundle}", threads=threads, drain=300)

    def deploy(self, replicas: int) -> None:
        """Run so many replicas, and wait until they are there and the others gone."""
        serve.run(build(self._arguments.model_copy(update={"replicas": replicas})))
        until(lambda: self.states() == {"RUNNING": replicas})

    def states(self) -> dict[str, int]:
        """How many replicas are in which state."""
        deployment = serve.status().applications["default"].deployments["Edgellm"]
        return {str(getattr(k, "value", k)): n for k, n in deployment.replica_states.items() if n}

    def client(self, session: str | None = None) -> openai.OpenAI:
        """OpenAI's own client, of a session."""
        headers = {} if session is None else {"x-session-id": session}
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", default_headers=headers, max_retries=0
        )

    def ask(self, session: str | None, messages: list[dict[str, str]], tokens: int = 8) -> tuple[Any, str]:
        """An answer, and the replica that made it."""
        raw = self.client(session).chat.completions.with_raw_response.create(
            model="model", messages=messages, max_tokens=tokens, temperature=0
        )
        return raw.parse(), raw.headers["x-replica"]

    def stream(self, session: str, tokens: int, began: threading.Event | None = None) -> tuple[str, int, str]:
        """A streamed answer of so many tokens: its text, how many tokens it had, and its replica."""
        asked = self.client(session).chat.completions.with_raw_response.create(
            model="model", messages=user("hello"), max_tokens=tokens, temperature=0, stream=True,
            stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
        )  # fmt: skip
        text, count = "", 0
        for chunk in asked.parse():
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            count = chunk.usage.completion_tokens if chunk.usage else count
            if began is not None and chunk.choices and chunk.choices[0].delta.content is not None:
                began.set()
        return text, count, asked.headers["x-replica"]

    def figure(self, session: str, name: str) -> int:
        """A figure of the replica that a session belongs to."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/metrics", headers={"x-session-id": session}
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=60) as answer:
            (line,) = [line for line in answer.read().decode().splitlines() if line.startswith(f"{name}{{")]
        return int(line.split()[-1])


def user(text: str) -> list[dict[str, str]]:
    """Messages of one user's."""
    return [{"role": "user", "content": text}]


def until(true: Callable[[], bool], seconds: float = 180) -> None:
    """Look again and again until it is so."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise SystemExit("it never was so")
        time.sleep(0.2)


def check_streams(served: Served, model: Model) -> str:
    """A stream comes in pieces, and has what the model says alone."""
    text, count, _ = served.stream("a", 32)
    assert text == model.chat(user("hello"), max_new_tokens=32, ignore_eos=True).text
    return f"a stream of {count} tokens has the text of the model alone"


def check_sessions(served: Served) -> str:
    """A session stays with its replica, whose states its turns go on from; requests of none are spread."""
    homes: dict[str, set[str]] = {}
    cached = asked = 0
    for turn in range(3):
        for session in map(str, range(8)):
            history = [{"role": "system", "content": _SYSTEM + session}, *user("hello")]
            for i in range(turn):
                history += [{"role": "assistant", "content": f"no {i}"}, *user(f"more {i}")]
            found, replica = served.ask(session, history)
            homes.setdefault(session, set()).add(replica)
            if turn:
                assert found.usage.prompt_tokens_details.cached_tokens > 0
                cached += found.usage.prompt_tokens_details.cached_tokens
                asked += found.usage.prompt_tokens
    assert all(len(replicas) == 1 for replicas in homes.values()), homes
    used = {replica for replicas in homes.values() for replica in replicas}
    spread = {served.ask(None, user("hello"), 1)[1] for _ in range(24)}
    assert len(used) == len(spread) == 2, (used, spread)
    return f"8 sessions of 3 turns: one replica each, 2 in all; {cached} of {asked} prompt tokens were not read again"


def check_leaving(served: Served) -> str:
    """An answer whose client goes away is not made to its end."""
    before = served.figure("a", "edgellm_tokens_total")
    asked = served.client("a").chat.completions.create(
        model="model", messages=user("hello"), max_tokens=3500, temperature=0, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    with asked:
        next(iter(asked))
    until(lambda: served.figure("a", "edgellm_running") == 0)
    made = served.figure("a", "edgellm_tokens_total") - before
    assert made < 3500
    return f"a client left a stream of 3500 tokens; {made} of them were made"


def check_drain(served: Served) -> str:
    """One of two replicas goes while both answer: both answers end whole, and the next ones come."""
    served.stream("rate", 64)
    began = time.perf_counter()
    served.stream("rate", 64)
    tokens = min(max(int(64 * 6 / (time.perf_counter() - began)), 64), 3500)
    events = [threading.Event() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(served.stream, str(i), tokens, event) for i, event in enumerate(events)]
        assert all(event.wait(120) for event in events)
        running = sum(not stream.done() for stream in streams)
        served.deploy(1)
        found = [stream.result() for stream in streams]
    assert running == 8, f"only {running} of 8 streams still ran; they must outlast the beginning of the drain"
    assert [count for _, count, _ in found] == [tokens] * 8
    assert len({text for text, _, _ in found}) == 1
    assert len({replica for _, _, replica in found}) == 2
    served.ask("0", user("hello"), 1)
    return f"8 streams of {tokens} tokens on 2 replicas ended whole while one of these was taken away"


def check_death(served: Served) -> str:
    """A replica that is killed is replaced; its sessions are answered meanwhile."""
    home = served.ask("0", user("hello"), 1)[1]
    ray.kill(ray.get_actor(f"SERVE_REPLICA::default#Edgellm#{home}", namespace="serve"))
    began, other, failed = time.perf_counter(), home, 0
    while other == home:
        try:
            other = served.ask("0", user("hello"), 1)[1]
        except openai.APIError:
            failed += 1
            time.sleep(0.1)
    seconds = time.perf_counter() - began
    until(lambda: served.states() == {"RUNNING": 2})
    return (
        f"after a kill a session was answered elsewhere in {seconds:.1f} s ({failed} requests failed), and 2 run again"
    )


def lines_of(count: int) -> list[str]:
    """Lines to translate, some of which cannot be."""
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "the",
        "dog",
        "saw",
        "the",
        "bird",
        "in",
        "our",
        "old",
        "tree",
    ]
    lines = [" ".join(words[i % 7 : i % 7 + 3 + i % 9]) + f" {i % 4}" for i in range(count)]
    lines[3], lines[5] = "", "the old house " * 60
    return lines


class Translation:
    """Runs of examples/ray_serve/translate.py.

    Args:
        bundle: a translator's.
        lines: of the file.
        folder: for all.
        address: the cluster's.
    """

    def __init__(self, bundle: Path, lines: list[str], folder: Path, address: str) -> None:
        self._words = [
            str(bundle),
            str(folder / "lines.txt"),
            str(folder / "out"),
            "--address",
            address,
            "--beams",
            "1",
        ]
        self.out = folder / "out"
        (folder / "lines.txt").write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    @contextmanager
    def begun(self, replicas: int, block: int) -> Iterator[subprocess.Popen[str]]:
        """A driver that runs, and its standard output."""
        command = [sys.executable, str(EXAMPLE / "translate.py"), *self._words]
        command += ["--replicas", str(replicas), "--block", str(block)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as driver:
            yield driver

    def parts(self) -> dict[str, tuple[int, int]]:
        """Which parts there are, and when each was written, as which file."""
        found = {}
        for path in self.out.glob("parts/*.jsonl"):
            with suppress(FileNotFoundError):
                found[path.name] = (path.stat().st_mtime_ns, path.stat().st_ino)
        return found


def wait_for(driver: subprocess.Popen[str], blocks: int) -> None:
    """Read a driver's output until so many blocks are done."""
    assert driver.stdout is not None
    seen = 0
    for line in driver.stdout:
        seen += line.startswith("block ")
        if seen == blocks:
            return
    raise SystemExit("the driver ended too early")


def check_translation(found: Cluster, node: Any, bundle: Path, folder: Path) -> str:
    """Killed and started again, it does only what was not done, through the loss of a node; order and count hold."""
    lines = lines_of(600)
    work = Translation(bundle, lines, folder, found.address)
    with work.begun(2, 10) as driver:
        wait_for(driver, 6)
        driver.send_signal(signal.SIGKILL)
    before: dict[str, tuple[int, int]] = {}
    while (now := work.parts()) != before:  # what the replicas still wrote before Ray ended them
        before = now
        time.sleep(3)
    assert 6 <= len(before) < 60, len(before)
    with work.begun(2, 10) as driver:
        wait_for(driver, 2)
        found.remove_node(node)
        assert driver.stdout is not None
        driver.stdout.read()
        assert driver.wait(300) == 0
    after = work.parts()
    assert len(after) == 60
    assert {name: after[name] for name in before} == before, "a block that was done was done again"
    model = load(bundle, threads=1)
    wanted = [
        "" if not line or len(line) > 400 else " ".join(model.translate(line, beams=1).text.split()) for line in lines
    ]
    assert (work.out / "translations.txt").read_text(encoding="utf-8").split("\n")[:-1] == wanted
    (refused,) = (work.out / "refused.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(refused)["line"] == 6
    return (
        f"600 lines in 60 blocks: killed after {len(before)}, which were not done again; the rest was done, through "
        "the loss of a node; each line's translation is the model's alone, in order"
    )


def measure_serving(served: Served, tokens: int = 48) -> str:
    """Tokens a second of 16 clients, of 1 and of 2 replicas."""
    rates = []
    for replicas in (1, 2):
        served.deploy(replicas)
        for session in map(str, range(16)):
            served.ask(session, user("hello"), 1)  # every replica has been asked
        began = time.perf_counter()
        with ThreadPoolExecutor(16) as pool:
            counts = [count for _, count, _ in pool.map(lambda i: served.stream(f"m{i}", tokens), range(16))]
        rates.append(sum(counts) / (time.perf_counter() - began))
    return f"16 clients, {tokens} tokens each: 1 replica {rates[0]:.0f} tokens/s, 2 replicas {rates[1]:.0f}"


def measure_translation(bundle: Path, folder: Path, address: str, count: int) -> str:
    """Lines a second of 1 and of 2 replicas, from the first block that was done to the last."""
    rates, block = [], min(max(count // 40, 1), 1000)
    for replicas in (1, 2):
        (folder / str(replicas)).mkdir(parents=True)
        work = Translation(bundle, lines_of(count), folder / str(replicas), address)
        with work.begun(replicas, block) as driver:
            wait_for(driver, 1)
            began = time.perf_counter()
            wait_for(driver, -(-count // block) - 1)
            rates.append((count - block) / (time.perf_counter() - began))
            assert driver.stdout is not None
            driver.stdout.read()
            assert driver.wait(60) == 0
    return f"{count:,} lines: 1 replica {rates[0]:.0f} lines/s, 2 replicas {rates[1]:.0f}"


def main() -> None:
    """Check, and measure if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chat", type=Path, required=True)
    parser.add_argument("--translator", type=Path, required=True)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--lines", type=int, default=4000, help="that are translated when measuring")
    given = parser.parse_args()
    chat, translator = given.chat.resolve(), given.translator.resolve()
    model = load(chat, threads=1)

    with cluster(cpus=1) as found, tempfile.TemporaryDirectory() as scratch:
        served = Served(chat, threads=1)
        served.deploy(2)
        print(check_streams(served, model), flush=True)
        for check in (check_sessions, check_leaving, check_drain):
            print(check(served), flush=True)
        served.deploy(2)
        print(check_death(served), flush=True)
        if given.measure:
            print(measure_serving(served), flush=True)
        serve.shutdown()
        if given.measure:
            print(measure_translation(translator, Path(scratch), found.address, given.lines), flush=True)
        (node,) = [node for node in found.list_all_nodes() if node is not found.head_node]
        print(check_translation(found, node, translator, Path(scratch)), flush=True)


if __name__ == "__main__":
    main()
