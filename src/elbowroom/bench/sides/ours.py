"""Elbowroom as a side: its public engine interface and nothing else, but for the prepared cache of ``long``."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from elbowroom.bench.filled_cache import fill_prefix
from elbowroom.engine.llm import LLM
from elbowroom.engine.output import OutputDelta, RequestOutput
from elbowroom.engine.sampling_params import SamplingParams


class Stream:
    """Notes when each token of one request arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.output: RequestOutput | None = None
        self.error: Exception | None = None
        self._ended = threading.Event()

    def __call__(self, delta: OutputDelta, output: RequestOutput) -> None:
        """Take a delta, on the engine's thread."""
        self.times += [time.perf_counter()] * len(delta.token_ids)
        if delta.error is not None or output.finished:
            self.output, self.error = output, delta.error
            self._ended.set()

    def wait(self) -> RequestOutput:
        """Return the whole output; what the request ended with is raised."""
        self._ended.wait()
        if self.error is not None:
            raise self.error
        assert self.output is not None
        return self.output


class Side:
    """Commands on one loaded model."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._filled: list[int] = []

    def decode(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """Generate ``new_tokens`` for all prompts at once; count and time tokens while all of them decode.

        The time begins with the first token of the last prompt to be read and ends with the end of the first stream.
        """
        streams = self._start(prompts, new_tokens)
        outputs = [stream.wait() for stream in streams]
        begin, end = max(stream.times[0] for stream in streams), min(stream.times[-1] for stream in streams)
        if end <= begin:
            raise ValueError(f"{new_tokens} tokens are too few for {len(prompts)} streams to decode side by side")
        tokens = sum(begin < at <= end for stream in streams for at in stream.times)
        return {
            "tokens": tokens,
            "seconds": end - begin,
            "token_ids": [output.outputs[0].token_ids for output in outputs],
        }

    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        """Read a prompt and choose one token, from the arrival of the request to the token."""
        started = time.perf_counter()
        (stream,) = self._start([prompt], 1)
        stream.wait()
        return {"tokens": len(prompt), "seconds": stream.times[0] - started}

    def top(self, prompt: list[int], count: int) -> dict[str, Any]:
        """Return the ``count`` most likely tokens behind ``prompt`` and their log-probabilities."""
        sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=count)
        output = self._llm.generate({"prompt_token_ids": prompt}, sampling)[0]
        logprobs = output.outputs[0].logprobs
        assert logprobs is not None
        return {"ids": [token for token, _ in logprobs[0].top], "logprobs": [value for _, value in logprobs[0].top]}

    def fill(self, num_tokens: int, seed: int) -> dict[str, Any]:
        """Replace what is cached by a prefix of ``num_tokens`` with random keys and values."""
        self._llm.clear_cache()
        self._filled = [token % self._llm.engine.parts.config.vocab_size for token in range(num_tokens)]
        fill_prefix(self._llm.engine, self._filled, seed)
        return {"kv_bytes": self._llm.engine.kv_report().live_bytes}

    def extend(self, new_tokens: int) -> dict[str, Any]:
        """Generate behind the filled prefix and one more token."""
        (stream,) = self._start([[*self._filled, 1]], new_tokens)
        output = stream.wait()
        if output.cached_tokens != len(self._filled):
            raise ValueError(f"{output.cached_tokens} of {len(self._filled)} prepared tokens were used")
        return {"tokens": new_tokens - 1, "seconds": stream.times[-1] - stream.times[0]}

    def _start(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Stream]:
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        streams = [Stream() for _ in prompts]
        submit = self._llm.engine.submit
        with ThreadPoolExecutor(len(prompts)) as clients:  # each waits for the engine's thread: all come in one gap
            list(clients.map(lambda prompt, stream: submit(prompt, sampling, stream), prompts, streams))
        return streams


def load(
    directory: str, memory: int, dtype: str, num_streams: int, prefix_cache: bool
) -> dict[str, Callable[..., dict[str, Any]]]:
    """Load a model inside ``memory`` bytes; ``num_streams`` requests run at once."""
    llm = LLM(directory, memory, dtype=dtype, max_sequences=num_streams, prefix_cache=prefix_cache)
    side = Side(llm)
    return {
        "decode": side.decode,
        "prefill": side.prefill,
        "top": side.top,
        "fill": side.fill,
        "extend": side.extend,
    }
