"""The trainer's end of the daemon's channel: nothing that the loop does waits for the daemon.

One thread receives and queues, so a stop is seen at the next border of a micro-batch. One thread
sends from a queue, so a daemon that is slow for a moment costs no training; progress is limited in
rate and dropped when the queue is long.
"""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from peer.ipc import Channel, ChannelClosed, Message

PROGRESS_INTERVAL_SECONDS = 0.2
_MAX_QUEUED_PROGRESS = 32
_FLUSH_SECONDS = 2.0


class DaemonLink:
    """Queues in both directions."""

    def __init__(self, channel: Channel, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._channel = channel
        self._clock = clock
        self._incoming: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._outgoing: queue.SimpleQueue[tuple[str, dict[str, Any]] | None] = queue.SimpleQueue()
        self._next_progress_seconds = 0.0
        self._receiver = threading.Thread(target=self._receive, name="receiver", daemon=True)
        self._sender = threading.Thread(target=self._send, name="sender", daemon=True)
        self._receiver.start()
        self._sender.start()

    def send(self, kind: str, **fields: Any) -> None:
        """Queue a message; order is kept."""
        self._outgoing.put((kind, fields))

    def send_progress(self, **fields: Any) -> None:
        """Queue a `progress` message unless one was sent a moment ago."""
        now_seconds = self._clock()
        if (
            now_seconds < self._next_progress_seconds
            or self._outgoing.qsize() > _MAX_QUEUED_PROGRESS
        ):
            return
        self._next_progress_seconds = now_seconds + PROGRESS_INTERVAL_SECONDS
        self.send("progress", **fields)

    def receive(self, *, wait_seconds: float = 0.0) -> list[Message]:
        """Messages that have come; waits up to `wait_seconds` for the first.

        A closed channel is a message "closed".
        """
        messages: list[Message] = []
        try:
            if wait_seconds > 0.0:
                messages.append(self._incoming.get(timeout=wait_seconds))
            while True:
                messages.append(self._incoming.get_nowait())
        except queue.Empty:
            return messages

    def close(self) -> None:
        """Send what is queued, then close."""
        self._outgoing.put(None)
        self._sender.join(_FLUSH_SECONDS)
        self._channel.close()

    def _receive(self) -> None:
        try:
            while True:
                self._incoming.put(self._channel.receive())
        except ChannelClosed:
            self._incoming.put({"kind": "closed"})

    def _send(self) -> None:
        try:
            while (item := self._outgoing.get()) is not None:
                kind, fields = item
                self._channel.send(kind, **fields)
        except ChannelClosed:
            self._incoming.put({"kind": "closed"})
