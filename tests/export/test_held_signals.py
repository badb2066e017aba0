"""While PyTorch traces, a request to end waits; the third does not."""

from __future__ import annotations

import signal
import threading

import pytest

from edgellm_exporters.graph.held_signals import held_signals


@pytest.fixture(autouse=True)
def _like_the_command_line() -> object:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


def asked_within(number: signal.Signals, times: int) -> list[int]:
    """How often the block had gone on after each request."""
    went = list[int]()

    def block() -> None:
        with held_signals():
            for i in range(times):
                signal.raise_signal(number)
                went.append(i)

    with pytest.raises(KeyboardInterrupt):
        block()
    assert signal.getsignal(number) is signal.default_int_handler
    return went


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("times", [1, 2])
def test_a_request_to_end_comes_after_the_block(number: signal.Signals, times: int) -> None:
    assert asked_within(number, times) == list(range(times))


def test_the_third_request_comes_at_once() -> None:
    assert asked_within(signal.SIGTERM, 3) == [0, 1]


def test_a_request_outlives_a_failure_in_the_block() -> None:
    def block() -> None:
        with held_signals():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("what the block itself had to say")

    with pytest.raises(KeyboardInterrupt):
        block()


def test_a_block_that_nobody_wants_to_end_changes_nothing() -> None:
    with pytest.raises(ValueError, match="own"), held_signals():
        raise ValueError("its own")
    with held_signals():
        pass


def test_what_is_ignored_stays_ignored_and_other_threads_are_left_alone() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with held_signals():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    found = list[object]()

    def elsewhere() -> None:
        with held_signals():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
