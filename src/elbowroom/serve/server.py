"""Server: an app on a socket, from the first byte to a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping

import uvicorn

from elbowroom.engine.async_llm import AsyncLLM
from elbowroom.errors import ElbowroomError
from elbowroom.serve.app import create_app
from elbowroom.serve.limits import ServerLimits
from elbowroom.units import format_bytes

_LAST_WORDS_S = 5.0
"""After the engines were closed, how long clients may take to read that."""


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
        self._socket = _listen(host, port)
        self.host, self.port = self._socket.getsockname()[:2]
        config = uvicorn.Config(
            create_app(self._engines, self._limits),
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=int(self._limits.grace_s + _LAST_WORDS_S),
        )
        self._uvicorn = _Uvicorn(config)

    @property
    def url(self) -> str:
        """Where clients find it, without /v1."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def run(self) -> None:
        """Serve until SIGINT, SIGTERM or ``stop``; then finish what runs, within ``grace_s``, and close the engines."""
        try:
            asyncio.run(self._run())
        finally:
            self._socket.close()
            for llm in self._engines.values():
                llm.engine.close()

    def stop(self) -> None:
        """End ``run`` gracefully; may be called from any thread and returns at once."""
        self._uvicorn.should_exit = True

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for name in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(name, self._on_signal)
        ending = asyncio.create_task(self._end_after_grace())
        self._announce(self._greeting())
        try:
            await self._uvicorn.serve(sockets=[self._socket])
        finally:
            ending.cancel()

    def _on_signal(self) -> None:
        """The first signal ends gracefully, the second at once."""
        self._uvicorn.force_exit = self._uvicorn.should_exit
        self._uvicorn.should_exit = True

    async def _end_after_grace(self) -> None:
        """Once stopped, wait for the grace period and close the engines: their clients are told, and go."""
        while not self._uvicorn.should_exit:
            await asyncio.sleep(0.1)
        await asyncio.sleep(self._limits.grace_s)
        for llm in self._engines.values():
            await asyncio.to_thread(llm.engine.close)

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
