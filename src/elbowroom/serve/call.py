"""Call: a body that was read and checked, ready to be generated; what HTTP routes and batch files have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.serve.callers import Caller
from elbowroom.serve.context import ServerContext
from elbowroom.serve.generation import Generation
from elbowroom.serve.reply import Reply
from elbowroom.serve.requests import GenerationRequest
from elbowroom.serve.served import ServedModel


@dataclass(frozen=True, slots=True)
class Call:
    """Who generates what, from which prompts, and how the answer is written."""

    body: GenerationRequest
    model: ServedModel
    sampling: SamplingParams
    encode: Callable[[], list[list[int]]]
    """Returns the token ids of its prompts; may take a while."""
    write: Callable[[Generation], Reply]
    """Returns the writer of its answer."""

    def generation(self, context: ServerContext, prompts: list[list[int]], caller: Caller | None = None) -> Generation:
        """Return what is to be generated for ``prompts``; errors as in ``Generation``."""
        return Generation(self.model, prompts, self.sampling, context.metrics, self.body.kv, caller)
