"""``elbowroom serve``: an OpenAI-compatible server whose models stay inside one memory budget."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elbowroom.commands.options import KV, Admission, Dtype, Memory, Progress, Relief, Store
from elbowroom.errors import BudgetTooSmall, RequestError

if TYPE_CHECKING:
    from elbowroom.engine.async_llm import AsyncLLM

FIXED_BYTES = 32 * 2**20
"""What each of several models gets before the rest is divided in proportion to their weights."""


def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR",
            help="Model directory and the name that clients use; repeatable. Without it, the built-in model.",
            show_default=False,
        ),
    ] = None,
    memory: Memory = "80%",
    kv: KV = "plain",
    kv_choice: Annotated[
        list[str] | None,
        typer.Option(metavar="PLAN", help='Plan that a request may ask for by "kv"; repeatable.', show_default=False),
    ] = None,
    kv_relief: Relief = None,
    kv_store: Store = "paged",
    dtype: Dtype = "auto",
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    max_sequences: Annotated[
        int, typer.Option(metavar="N", min=1, help="Most sequences of a model that run at once.")
    ] = 64,
    max_requests: Annotated[
        int, typer.Option(metavar="N", min=1, help="Most requests that are open at once; more get 429.")
    ] = 512,
    max_queue: Annotated[
        int, typer.Option(metavar="N", min=1, help="Most requests of a model that wait to begin; more get 429.")
    ] = 256,
    max_queue_per_tenant: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="The same of each tenant, times its weight.", show_default=False),
    ] = None,
    queue_timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0, help="Longest wait to begin; longer gets 503.", show_default=False),
    ] = None,
    request_timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0, help="Longest time for a request; longer gets 504.", show_default=False),
    ] = None,
    allow_priority: Annotated[
        bool, typer.Option("--allow-priority", help='Let requests set "priority" (lower runs first) and "deadline_s".')
    ] = False,
    allow_admission: Annotated[
        bool, typer.Option("--allow-admission", help='Let requests set "admission", the policy that lets them begin.')
    ] = False,
    prefix_cache: Annotated[
        bool, typer.Option("--prefix-cache/--no-prefix-cache", help="Keep prefixes that later requests may share.")
    ] = True,
    thinking_marks: Annotated[
        str | None,
        typer.Option(
            metavar="BEGIN,END",
            help='Between which models think, e.g. "<think>,</think>", or none; by default found in their tokenizers.',
            show_default=False,
        ),
    ] = None,
    admission: Admission = "greedy",
    order: Annotated[
        str, typer.Option(metavar="POLICY", help="Who is served first: priority, fcfs, fair (by tenant), slo.")
    ] = "priority",
    slo_ttft: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="With --order slo: from arrival until the first token is due; 10 by default.",
            show_default=False,
        ),
    ] = None,
    slo_tpot: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="With --order slo: from one token until the next is due; 0.5 by default.",
            show_default=False,
        ),
    ] = None,
    preemption: Annotated[
        str | None,
        typer.Option(
            metavar="POLICY",
            help="What becomes of sequences that have to go: recompute, swap, or auto, the default with --swap.",
            show_default=False,
        ),
    ] = None,
    swap: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Directory on disk where sequences are saved that have to go.", show_default=False
        ),
    ] = None,
    swap_limit: Annotated[
        str, typer.Option(metavar="AMOUNT", help="Most bytes that are saved there, for each model.")
    ] = "4GiB",
    drain_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="How long accepted requests may go on after Ctrl-C.")
    ] = 10.0,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", envvar="ELBOWROOM_API_KEY", help="Key that clients must send.", show_default=False),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Further keys, in lines KEY TENANT [WEIGHT].", show_default=False),
    ] = None,
    tenant_header: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Header that names the tenant, set by your proxy.", show_default=False),
    ] = None,
    debug_routes: Annotated[
        bool, typer.Option("--debug-routes", help="Offer POST /debug/reset, which empties caches and checks the books.")
    ] = False,
    progress: Progress = None,
) -> None:
    """Serve models over HTTP, as the OpenAI API does.

    All models share the memory budget. Ctrl-C or SIGTERM ends the server once accepted requests have ended; a
    second one ends it at once.
    """
    from elbowroom.engine.scheduling import Scheduling
    from elbowroom.models.directory import model_path, read_ahead
    from elbowroom.serve.preload import preload

    directories = read_models(model or [])
    for directory in directories.values():
        read_ahead(model_path(directory))  # the address is checked first, so a missing model is no error yet
    preload()
    from elbowroom.serve import Server, ServerLimits
    from elbowroom.serve.tenants import Tenants

    limits = ServerLimits(
        max_open_requests=max_requests,
        max_queue=max_queue,
        max_queue_per_tenant=max_queue_per_tenant,
        queue_timeout_s=queue_timeout,
        request_timeout_s=request_timeout,
        drain_timeout_s=drain_timeout,
        api_key=api_key,
        api_key_file=api_key_file,
        tenant_header=tenant_header,
        allow_priority=allow_priority,
        allow_admission=allow_admission,
        debug_routes=debug_routes,
    )
    tenants = Tenants(api_key, api_key_file, tenant_header)  # keys that cannot be read are named at once
    scheduling = Scheduling(
        admission=admission,
        order=order,
        tenant_weights=tenants.weights,
        slo_ttft_s=slo_ttft,
        slo_tpot_s=slo_tpot,
        preemption=preemption,
        swap_directory=swap,
        swap_limit=swap_limit,
    )
    check_address(host, port)
    shares = share_memory(directories, memory, dtype)
    options = {
        "kv": kv,
        "kv_choices": kv_choice or (),
        "kv_relief": kv_relief,
        "kv_store": kv_store,
        "dtype": dtype,
        "max_sequences": max_sequences,
        "prefix_cache": prefix_cache,
        "thinking_marks": thinking_marks,
        "scheduling": scheduling,
    }
    engines: dict[str, AsyncLLM] = {}
    try:
        for name, directory in directories.items():
            engines[name] = _load(name, directory, shares[name], progress, **options)
        server = Server(engines, host, port, limits, announce=typer.echo)
    except BaseException:
        for llm in engines.values():
            llm.engine.close()
        raise
    server.run()


def read_models(options: Sequence[str]) -> dict[str, str | None]:
    """Return name -> directory (None: the built-in model) of what ``--model`` was given.

    Raises:
        RequestError: a name is empty or taken twice.
    """
    models: dict[str, str | None] = {}
    for option in options:
        name, equals, directory = option.partition("=")
        if not equals or Path(option).is_dir():
            name, directory = Path(option).resolve().name, option
        if not name or not directory:
            raise RequestError(f"--model {option!r} lacks a name or a directory", "write --model NAME=DIR")
        if name in models:
            raise RequestError(f"two models are called {name!r}", "write --model NAME=DIR with different names")
        models[name] = directory
    return models or {"builtin": None}


def share_memory(directories: Mapping[str, str | None], memory: str, dtype: str) -> dict[str, int]:
    """Return the bytes of each model: a fixed part, and the rest in proportion to its weights.

    Raises:
        BudgetTooSmall: not even the fixed parts fit.
        RequestError: ``dtype`` is unknown.
    """
    import torch

    from elbowroom.memory.meter import available_bytes
    from elbowroom.models.directory import find_model
    from elbowroom.models.hf_config import check_dtype, choose_dtype, read_config
    from elbowroom.models.loader import weights_bytes
    from elbowroom.units import format_bytes, parse_bytes

    check_dtype(dtype)
    budget = parse_bytes(memory, available_bytes())
    if len(directories) == 1:
        return dict.fromkeys(directories, budget)
    weights = {}
    for name, each in directories.items():
        directory = find_model(each)
        weights[name] = weights_bytes(read_config(directory), getattr(torch, choose_dtype(dtype, directory)))
    rest = budget - FIXED_BYTES * len(weights)
    if rest < sum(weights.values()):
        minimum = budget - rest + sum(weights.values())
        raise BudgetTooSmall(
            f"{len(weights)} models need at least {format_bytes(minimum)}, the budget is {format_bytes(budget)}",
            minimum,
            f"set --memory to at least {-(-minimum // 2**20)}MiB, or serve fewer models",
        )
    return {name: FIXED_BYTES + rest * each // sum(weights.values()) for name, each in weights.items()}


def check_address(host: str, port: int) -> None:
    """Find out before any model is loaded whether the address can be listened on.

    Raises:
        AddressInUse: it cannot.
    """
    from elbowroom.serve.server import AddressInUse

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as reason:
            hint = "choose another one with --port, or 0 for any free one"
            raise AddressInUse(f"cannot listen on {host}:{port}: {reason.strerror or reason}", hint) from reason


def _load(
    name: str,
    directory: str | None,
    memory_bytes: int,
    progress: bool | None,
    **options: Any,
) -> AsyncLLM:
    from elbowroom.commands.terminal import progress_bar, wants_progress
    from elbowroom.engine.async_llm import AsyncLLM
    from elbowroom.engine.build import build_engine

    with progress_bar(f"loading {name}", wants_progress(progress), in_bytes=True) as bar:
        engine = build_engine(directory, memory_bytes, progress=bar, **options)
    return AsyncLLM(engine)
