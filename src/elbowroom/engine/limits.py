"""What a request may ask for: its place in the context, and in the memory of the KV cache when it runs alone."""

from __future__ import annotations

from elbowroom.engine.accounting import KVPricing
from elbowroom.engine.types import Request
from elbowroom.errors import ContextTooLong, RequestError, RequestTooLarge
from elbowroom.units import format_bytes


def max_new_tokens(request: Request, max_positions: int, pricing: KVPricing, capacity_bytes: int) -> int:
    """Return the most tokens that ``request`` may generate.

    Args:
        request: prompt and ``max_tokens``.
        max_positions: the model's context.
        pricing: what sequences cost.
        capacity_bytes: bytes that the KV store may hold.

    Raises:
        RequestError: the prompt is empty.
        ContextTooLong: prompt and max_tokens exceed the context.
        RequestTooLarge: it could not run even alone in the KV budget.
    """
    prompt, asked = len(request.prompt_token_ids), request.sampling.max_tokens
    if prompt == 0:
        raise RequestError("the prompt is empty", "give at least one token")
    wanted = 1 if asked is None else asked
    if prompt + wanted > max_positions:
        raise ContextTooLong(
            f"{prompt} prompt tokens and {wanted} new ones exceed the context of {max_positions}",
            f"lower max_tokens to {max_positions - prompt}, or shorten the prompt"
            if prompt < max_positions
            else f"shorten the prompt to {max_positions - 1} tokens or fewer",
        )
    room = pricing.largest(capacity_bytes, prompt)
    need = max(pricing.peak_bytes(prompt, ()), pricing.generation_bytes(prompt, prompt + wanted))
    need += pricing.transient_bytes
    if need > capacity_bytes:
        choice = f", enough for {room} tokens in all"
        if pricing.chooses:
            choice = "; while the plan chooses what stays, that is held twice"
        raise RequestTooLarge(
            f"{prompt} prompt tokens and {wanted} new ones need {format_bytes(need)} of KV cache; "
            f"{format_bytes(capacity_bytes)} are there{choice}",
            "raise memory= (--memory), lower max_tokens, or choose a smaller kv= format such as plain(bf16)",
        )
    return max(min(max_positions, room) - prompt, wanted) if asked is None else asked
