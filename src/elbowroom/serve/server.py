"""Server: an app on a socket, from the first byte to a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import uvicorn

from elbowroom.engine.async_llm import AsyncLLM
from elbowroom.errors import ElbowroomError
from elbowroom.serve.app import create_app
from elbowroom.serve.limits import ServerLimits
from elbowroom.serve.open_requests import OpenRequests
from elbowroom.serve.protocol import TimedProtocol
from elbowroom.units import format_bytes

_LAST_WORDS_S = 5.0
"""After the engines were closed, how long clients may take to read that."""
_HURRIED_WORDS_S = 1.0
"""The same after a second signal."""
_LOOK_S = 0.05


class AddressInUse(ElbowroomError):
    """The address cannot be listened on."""

    code = "address_in_use"


class Server:
    """Listens from construction on, answers while ``run`` runs; closes its engines at the end.

    Args:
        engines: name that clients use -> engine.
        host: address to listen on; loopback unless told otherwise.
        port: 0 takes a free one, see ``url``.
        limits: by default those of ``ServerLimits()``.
        announce: gets the one line that says where it listens; by default it is printed.

    Raises:
        AddressInUse: another program has the port, or the address is not one of this machine.
    """

    def __init__(
        self,
        engines: Mapping[str, AsyncLLM],
        host: str = "127.0.0.1",
        port: int = 8000,
        limits: ServerLimits | None = None,
        announce: Callable[[str], None] | None = None,
    ) -> None:
        self._engines, self._limits, self._announce = dict(engines), limits or ServerLimits(), announce or _print
        app = create_app(self._engines, self._limits)
        self._requests: OpenRequests = app.state.requests
        self._is_stopped = self._is_hurried = False
        self._socket = _listen(host, port)
        _drop_stalled(self._socket, self._limits.stall_timeout_s)
        self.host, self.port = self._socket.getsockname()[:2]
        config = uvicorn.Config(
            app,
            http=TimedProtocol,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=self._limits.idle_timeout_s,
            timeout_graceful_shutdown=int(_LAST_WORDS_S),
        )
        self._uvicorn = _Uvicorn(config)

    @property
    def url(self) -> str:
        """Where clients find it, without /v1."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def run(self) -> None:
        """Serve until SIGINT, SIGTERM or ``stop``; then drain, and close the engines."""
        try:
            asyncio.run(self._run())
        finally:
            self._socket.close()
            for llm in self._engines.values():
                llm.engine.close()

    def stop(self) -> None:
        """End ``run`` gracefully; may be called from any thread and returns at once."""
        self._is_stopped = True

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for name in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(name, self._on_signal)
        draining = asyncio.create_task(self._drain_when_stopped())
        self._announce(self._greeting())
        try:
            await self._uvicorn.serve(sockets=[self._socket])
        finally:
            draining.cancel()

    def _on_signal(self) -> None:
        """The first signal ends gracefully; after the second clients are only told, and the third waits for nobody."""
        if self._is_hurried:
            self._uvicorn.force_exit = self._uvicorn.should_exit = True
        self._is_hurried = self._is_stopped
        self._is_stopped = True

    async def _drain_when_stopped(self) -> None:
        """Once stopped, refuse what is new and finish what was accepted; clients of what takes too long are told."""
        while not self._is_stopped:
            await asyncio.sleep(_LOOK_S)
        self._requests.is_draining = True
        num_open = self._requests.num_open
        await self._until_none_is_open(self._limits.drain_timeout_s, lambda: self._is_hurried)
        num_left = self._requests.num_open
        if num_left:
            for llm in self._engines.values():
                await asyncio.to_thread(llm.engine.close)
            await self._until_none_is_open(_HURRIED_WORDS_S if self._is_hurried else _LAST_WORDS_S)
            self._uvicorn.force_exit |= self._is_hurried and self._requests.num_open > 0
        if num_open:
            self._announce(f"drained: {num_open - num_left} of {num_open} open requests ended, {num_left} were cut off")
        self._uvicorn.should_exit = True

    async def _until_none_is_open(self, timeout_s: float, or_else: Callable[[], bool] = lambda: False) -> None:
        deadline = time.monotonic() + timeout_s
        while self._requests.num_open and time.monotonic() < deadline and not or_else():
            await asyncio.sleep(_LOOK_S)

    def _greeting(self) -> str:
        served = ", ".join(
            f"{name} ({format_bytes(llm.engine.parts.memory.budget_bytes)})" for name, llm in self._engines.items()
        )
        return f"Elbowroom serves {served} at {self.url}/v1"


def serve(
    engines: Mapping[str, AsyncLLM], host: str = "127.0.0.1", port: int = 8000, limits: ServerLimits | None = None
) -> None:
    """Serve ``engines`` until SIGINT or SIGTERM, then close them; errors as in ``Server``."""
    Server(engines, host, port, limits).run()


class _Uvicorn(uvicorn.Server):
    """Leaves signals to Server; uvicorn would raise them again at the end and so spoil the exit code."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _print(line: str) -> None:
    print(line, flush=True)  # whoever started us may wait for it at the other end of a pipe


def _drop_stalled(listener: socket.socket, timeout_s: float) -> None:
    """Let the operating system close connections whose other end reads nothing; accepted ones inherit that."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout_s * 1000))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen(2048)
    except (OSError, OverflowError) as reason:
        made.close()
        why = f"cannot listen on port {port} of {host}: {reason}"
        if isinstance(reason, OSError) and reason.errno == errno.EADDRINUSE:
            why = f"port {port} of {host} is in use by another program"
        raise AddressInUse(why, "choose another one with port= (--port), or 0 for any free one") from reason
    return made
