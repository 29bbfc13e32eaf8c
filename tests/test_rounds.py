"""The event loop serves some sockets in a round, and none is left out."""

from __future__ import annotations

import asyncio
import select
import selectors
import socket
from contextlib import ExitStack

import pytest

import iiot

pytestmark = pytest.mark.skipif(not hasattr(select, "epoll"), reason="there is no epoll here")


def test_all_that_are_ready_come_in_turn_though_nobody_serves_them() -> None:
    with ExitStack() as stack:
        watching = stack.enter_context(iiot.FewAtATime(4))
        for number in range(10):
            near, far = socket.socketpair()
            stack.enter_context(near)
            stack.enter_context(far)
            watching.register(near, selectors.EVENT_READ, number)
            far.send(b"x")
        rounds = [[(key.data, events) for key, events in watching.select(0)] for _ in range(5)]
    assert all(len(each) == 4 for each in rounds)
    assert {number for each in rounds for number, _ in each} == set(range(10))
    assert {events for each in rounds for _, events in each} == {selectors.EVENT_READ}


def test_what_is_asked_for_is_told_and_a_broken_one_to_whoever_waits() -> None:
    near, far = socket.socketpair()
    with iiot.FewAtATime(4) as watching, near:
        watching.register(near, selectors.EVENT_READ)
        assert watching.select(0) == []
        assert watching.select(0.001) == []
        watching.modify(near, selectors.EVENT_READ | selectors.EVENT_WRITE)
        ((_, events),) = watching.select(0)
        assert events == selectors.EVENT_WRITE
        watching.modify(near, selectors.EVENT_READ)
        far.close()
        ((_, events),) = watching.select(0)
        assert events == selectors.EVENT_READ
        watching.unregister(near)
        assert watching.select(0) == []


def test_a_closed_one_leaves_no_descriptor() -> None:
    before = socket.socket()
    first = before.fileno()
    before.close()
    iiot.FewAtATime(4).close()
    with socket.socket() as after:
        assert after.fileno() == first


def test_the_server_s_loop_has_it() -> None:
    loop = iiot.event_loop()
    assert isinstance(loop._selector, iiot.FewAtATime)  # type: ignore[attr-defined]
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        assert runner.run(asyncio.sleep(0, 5)) == 5
