"""A fleet of devices that costs little: raw sockets, frames built beforehand, so that the generator does not bound what it
measures. It runs in a process of its own (`in_process`)."""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import re
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

T = TypeVar("T")
CHUNK = 64 * 1024
PATIENCE = 120.0


LEVELS = ("debug", "info", "info", "info", "notice", "warning", "error")


OF_COMMAND = (
    b'{"type":"started","seq":1,"command":%b}',
    b'{"type":"output","seq":2,"command":%b,"stream":"stdout","data":"Linux 6.1.0\\n"}',
    b'{"type":"result","seq":3,"command":%b,"status":"done","exit_code":0,"output_bytes":12}',
)


def client_frame(payload: bytes, opcode: int = 1) -> bytes:
    """A WebSocket frame of a client (RFC 6455, section 5.2), masked with a random key."""
    length, key = len(payload), os.urandom(4)
    if length < 126:
        head = bytes((0x80 | opcode, 0x80 | length))
    elif length < 65_536:
        head = bytes((0x80 | opcode, 0xFE)) + length.to_bytes(2, "big")
    else:
        head = bytes((0x80 | opcode, 0xFF)) + length.to_bytes(8, "big")
    mask = (key * (length // 4 + 1))[:length]
    masked = (int.from_bytes(payload, "big") ^ int.from_bytes(mask, "big")).to_bytes(length, "big")
    return head + key + masked


def telemetry_frame(seq: int, first_ts: int, samples: int, metrics: int) -> bytes:
    """A telemetry frame of `samples` moments of `metrics` metrics; every value differs."""
    values = [{f"metric-{m}": (seq * 31 + s * 7 + m) % 9973 / 8 for m in range(metrics)} for s in range(samples)]
    content = [{"ts": first_ts + s * 100, "values": values[s]} for s in range(samples)]
    return client_frame(json.dumps({"type": "telemetry", "seq": seq, "samples": content}, separators=(",", ":")).encode())


class Device:
    """One connected device: what it still has to send, and how far it is acknowledged."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.received = b""
        self.blob = memoryview(b"")
        self.acknowledged = 0
        self.waiting: deque[tuple[int, float]] = deque()

    def read_ack(self) -> None:
        """Take in what has come; the last complete ack counts, acks being cumulative."""
        data = self.received + self.socket.recv(CHUNK)
        if not data:
            raise ConnectionError("the server closed a connection")
        at = data.rfind(b'"ack","seq":')
        end = data.find(b"}", at)
        if at >= 0 and end > 0:
            self.acknowledged = int(data[at + 12 : end])
        self.received = data[-32:]


class Fleet:
    """Connected devices."""

    def __init__(self, host: str, port: int, tokens: list[str]) -> None:
        self.address = (host, port)
        self.devices: list[Device] = []
        self._connect(tokens)

    def _connect(self, tokens: list[str], at_once: int = 200) -> None:
        key = base64.b64encode(os.urandom(16)).decode()
        upgrade = (
            f"GET /device HTTP/1.1\r\nHost: {self.address[0]}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n"
        ).encode()
        todo, poll = deque(tokens), selectors.DefaultSelector()
        steps: dict[socket.socket, tuple[str, bytes]] = {}
        while todo or steps:
            while todo and len(steps) < at_once:
                connection = socket.create_connection(self.address, timeout=PATIENCE)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.sendall(upgrade)
                poll.register(connection, selectors.EVENT_READ)
                steps[connection] = (todo.popleft(), b"")
            for event, _ in poll.select(PATIENCE):
                connection = event.fileobj  # type: ignore[assignment]
                token, data = steps[connection]
                data += connection.recv(CHUNK)
                if b"101 " in data and data.endswith(b"\r\n\r\n"):
                    connection.sendall(client_frame(json.dumps({"type": "hello", "token": token}).encode()))
                    data = b""
                elif b'"welcome"' in data:
                    poll.unregister(connection)
                    del steps[connection]
                    connection.setblocking(False)
                    self.devices.append(Device(connection))
                    continue
                elif b'"error"' in data or not data:
                    raise ConnectionError(data.decode(errors="replace"))
                steps[connection] = (token, data)

    def send_all(self, blobs: list[bytes], last: int) -> float:
        """Send every device its frames as fast as the server takes them; seconds until the last is acknowledged."""
        poll = selectors.DefaultSelector()
        for device, blob in zip(self.devices, blobs, strict=True):
            device.blob, device.acknowledged = memoryview(blob), 0
            poll.register(device.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, device)
        left = len(self.devices)
        started = time.perf_counter()
        while left:
            events = poll.select(PATIENCE)
            if not events:
                raise TimeoutError("the server acknowledges nothing")
            for key, mask in events:
                device = key.data
                if mask & selectors.EVENT_READ:
                    device.read_ack()
                    if device.acknowledged >= last:
                        poll.unregister(device.socket)
                        left -= 1
                        continue
                if mask & selectors.EVENT_WRITE:
                    device.blob = device.blob[device.socket.send(device.blob[:CHUNK]) :]
                    if not device.blob:
                        poll.modify(device.socket, selectors.EVENT_READ, device)
        return time.perf_counter() - started

    def send_paced(self, frames: list[list[bytes]], rate: float, seconds: float) -> list[float]:
        """Send one frame after the other at a steady rate, device by device; seconds from each send to its ack."""
        poll = selectors.DefaultSelector()
        for device in self.devices:
            poll.register(device.socket, selectors.EVENT_READ, device)
        latencies: list[float] = []
        total, sent = int(rate * seconds), 0
        started = time.perf_counter()
        while len(latencies) < total:
            now = time.perf_counter()
            while sent < total and started + sent / rate <= now:
                turn, place = divmod(sent, len(self.devices))
                device = self.devices[place]
                device.waiting.append((turn + 1, time.perf_counter()))
                device.socket.send(frames[place][turn])
                sent += 1
            wait = max(0.0, started + sent / rate - time.perf_counter()) if sent < total else PATIENCE
            for key, _ in poll.select(wait):
                device = key.data
                device.read_ack()
                now = time.perf_counter()
                while device.waiting and device.waiting[0][0] <= device.acknowledged:
                    latencies.append(now - device.waiting.popleft()[1])
        return latencies

    def answer_configs(self) -> None:
        """Wait until every device has got a configuration, answered that it is applied, and been acknowledged."""
        poll = selectors.DefaultSelector()
        verdict = client_frame(b'{"type":"config_status","seq":1,"version":1,"status":"applied"}')
        for device in self.devices:
            poll.register(device.socket, selectors.EVENT_READ, device)
        left = len(self.devices)
        while left:
            events = poll.select(PATIENCE)
            if not events:
                raise TimeoutError("the server sends no configuration")
            for key, _ in events:
                data = key.data.socket.recv(CHUNK)
                if b'"config"' in data:
                    key.data.socket.send(verdict)
                if b'"ack"' in data:
                    left -= 1
                    poll.unregister(key.data.socket)

    def answer_commands(self) -> None:
        """Wait until every device has got a command, said that it began, what it wrote and that it is done, and been acknowledged."""
        poll, read = selectors.DefaultSelector(), dict.fromkeys(self.devices, b"")
        for device in self.devices:
            poll.register(device.socket, selectors.EVENT_READ, device)
        left = len(self.devices)
        while left:
            events = poll.select(PATIENCE)
            if not events:
                raise TimeoutError("the server sends no command")
            for key, _ in events:
                device = key.data
                read[device] += device.socket.recv(CHUNK)
                if found := re.search(rb'"type":"command","command":(\d+)', read[device]):
                    read[device] = b""
                    device.socket.send(b"".join(client_frame(frame % found[1]) for frame in OF_COMMAND))
                elif b'"seq":3' in read[device]:
                    left -= 1
                    poll.unregister(device.socket)

    def close(self) -> None:
        for device in self.devices:
            device.socket.close()


class Worker:
    """A function that runs in another process, and its answers."""

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self._process = context.Process(target=function, args=(other, *arguments), daemon=True)
        self._process.start()
        self.pid = self._process.pid or 0
        other.close()

    def receive(self) -> Any:
        if not self.pipe.poll(600):
            raise TimeoutError("the load generator does not answer")
        answer = self.pipe.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def send(self, value: object = None) -> None:
        self.pipe.send(value)

    def join(self) -> None:
        self._process.join(60)


def connect_and_wait(pipe: Connection, host: str, port: int, tokens: list[str]) -> None:
    """Answers the seconds that all connects took; then holds the connections until told to stop."""
    try:
        started = time.perf_counter()
        fleet = Fleet(host, port, tokens)
        pipe.send(time.perf_counter() - started)
        pipe.recv()
        fleet.close()
    except Exception as error:  # noqa: BLE001 - raised again where the answer is received
        pipe.send(error)


def send_at_full_speed(
    pipe: Connection, host: str, port: int, tokens: list[str], frames: int, samples: int, first_ts: int, metrics: int = 2
) -> None:
    """Answers when connected; told to go on, sends everything and answers the seconds until all is acknowledged."""
    try:
        blobs = [
            b"".join(telemetry_frame(n + 1, first_ts + n * samples * 100, samples, metrics) for n in range(frames)) for _ in tokens
        ]
        fleet = Fleet(host, port, tokens)
        pipe.send("ready")
        pipe.recv()
        pipe.send(fleet.send_all(blobs, frames))
        fleet.close()
    except Exception as error:  # noqa: BLE001 - raised again where the answer is received
        pipe.send(error)


def send_logs_at_full_speed(pipe: Connection, host: str, port: int, tokens: list[str], messages: list[list[str]], lines: int) -> None:
    """The same of lines of logs, so many in a frame; for each device its messages."""
    try:
        blobs = []
        for own in messages:
            frames = [own[at : at + lines] for at in range(0, len(own), lines)]
            told = [[{"level": LEVELS[len(message) % len(LEVELS)], "message": message} for message in frame] for frame in frames]
            contents = (json.dumps({"type": "log", "seq": seq, "entries": entries}) for seq, entries in enumerate(told, 1))
            blobs.append(b"".join(client_frame(content.encode()) for content in contents))
        fleet = Fleet(host, port, tokens)
        pipe.send("ready")
        pipe.recv()
        pipe.send(fleet.send_all(blobs, -(-len(messages[0]) // lines)))
        fleet.close()
    except Exception as error:  # noqa: BLE001 - raised again where the answer is received
        pipe.send(error)


def send_steadily(
    pipe: Connection, host: str, port: int, tokens: list[str], rate: float, seconds: float, first_ts: int, metrics: int = 2,
    samples: int = 1,
) -> None:
    """Answers the latencies of all frames."""
    try:
        turns = int(rate * seconds) // len(tokens) + 1
        frames = [[telemetry_frame(n + 1, first_ts + n * samples * 100, samples, metrics) for n in range(turns)] for _ in tokens]
        fleet = Fleet(host, port, tokens)
        pipe.send(fleet.send_paced(frames, rate, seconds))
        fleet.close()
    except Exception as error:  # noqa: BLE001 - raised again where the answer is received
        pipe.send(error)


def answer_commands(pipe: Connection, host: str, port: int, tokens: list[str]) -> None:
    """Answers when all are connected, and again when all have answered a command."""
    try:
        fleet = Fleet(host, port, tokens)
        pipe.send("ready")
        fleet.answer_commands()
        pipe.send("answered")
        pipe.recv()
        fleet.close()
    except Exception as error:  # noqa: BLE001 - raised again where the answer is received
        pipe.send(error)


def answer_configs(pipe: Connection, host: str, port: int, tokens: list[str]) -> None:
    """Answers when all are connected, and again when all have applied a configuration."""
    try:
        fleet = Fleet(host, port, tokens)
        pipe.send("ready")
        fleet.answer_configs()
        pipe.send("applied")
        pipe.recv()
        fleet.close()
    except Exception as error:  # noqa: BLE001 - raised again where the answer is received
        pipe.send(error)
