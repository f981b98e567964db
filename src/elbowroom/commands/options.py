"""Options that several commands share, so that they read alike everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Option(
        metavar="DIR", help="Hugging Face model directory; without it, the built-in model.", show_default=False
    ),
]
Memory = Annotated[
    str,
    typer.Option(
        metavar="AMOUNT", help="Memory budget: 512MiB, 6GiB, or 80% (of what is available now).", show_default=True
    ),
]
KV = Annotated[
    str,
    typer.Option(
        metavar="PLAN", help='How keys and values are kept: plain, int8, kivi, "snapkv(512)|int8", "quest(1024)|int8".'
    ),
]
Relief = Annotated[
    str | None,
    typer.Option(
        metavar="PLAN",
        help="KV plan that running sequences go over to when memory is short, before any is computed again.",
        show_default=False,
    ),
]
Store = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="Where keys and values lie: paged, static (all pages at the start) or contiguous (plain)."
    ),
]
Dtype = Annotated[
    str, typer.Option(metavar="TYPE", help="Weights and KV cache: float32, bfloat16, float16; auto: the checkpoint's.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Progress = Annotated[
    bool | None,
    typer.Option(
        "--progress/--no-progress", help="Show progress on stderr; by default if it is a terminal.", show_default=False
    ),
]
