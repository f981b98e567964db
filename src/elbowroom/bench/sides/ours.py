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
        self._held: list[list[int]] = []
        """Prefixes whose keys and values are cached."""

    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        """Read a prompt and choose one token, from the arrival of the request to the token."""
        started = time.perf_counter()
        (stream,) = self._start([prompt], 1)
        stream.wait()
        return {"tokens": len(prompt), "seconds": stream.times[0] - started}

    def top(self, prompt: list[int], num_tokens: int, count: int) -> dict[str, Any]:
        """Generate ``num_tokens``; return all but the last, and the ``count`` most likely tokens in its place.

        So the log-probabilities are those of a decode step that reads what earlier ones stored.
        """
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, logprobs=count)
        sample = self._llm.generate({"prompt_token_ids": prompt}, sampling)[0].outputs[0]
        assert sample.logprobs is not None
        top = sample.logprobs[-1].top
        ids, logprobs = [token for token, _ in top], [logprob for _, logprob in top]
        return {"token_ids": sample.token_ids[:-1], "ids": ids, "logprobs": logprobs}

    def fill(self, num_tokens: int, num_streams: int, seed: int) -> dict[str, Any]:
        """Replace what is cached by a prefix of ``num_tokens`` for each stream, with random keys and values."""
        self._llm.clear_cache()
        vocab = self._llm.engine.parts.config.vocab_size
        self._held = [[(stream + token) % vocab for token in range(num_tokens)] for stream in range(num_streams)]
        for prefix in self._held:
            fill_prefix(self._llm.engine, prefix, seed)
        return {}

    def extend(self, new_tokens: int) -> dict[str, Any]:
        """Decode behind every held prefix and one more token; count and time tokens while all streams decode.

        The time begins with the first token of the stream that starts last and ends with the stream that ends first.
        """
        streams = self._start([[*prefix, 1] for prefix in self._held], new_tokens)
        cached = [stream.wait().cached_tokens for stream in streams]
        if cached != [len(prefix) for prefix in self._held]:
            raise ValueError(f"of the held prefixes only {cached} tokens were used")
        begin, end = max(stream.times[0] for stream in streams), min(stream.times[-1] for stream in streams)
        if end <= begin:
            raise ValueError(f"{new_tokens} tokens are too few for {len(streams)} streams to decode side by side")
        tokens = sum(begin < at <= end for stream in streams for at in stream.times)
        return {"tokens": tokens, "seconds": end - begin}

    def _start(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Stream]:
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        streams = [Stream() for _ in prompts]
        submit = self._llm.engine.submit
        with ThreadPoolExecutor(len(prompts)) as clients:  # each waits for the engine's thread: all come in one gap
            list(clients.map(lambda prompt, stream: submit(prompt, sampling, stream), prompts, streams))
        return streams


def load(
    directory: str, memory: int, dtype: str, num_streams: int, prefix_cache: bool, kv: str | None = None
) -> dict[str, Callable[..., dict[str, Any]]]:
    """Load a model inside ``memory`` bytes with KV plan ``kv``; ``num_streams`` requests run at once."""
    llm = LLM(directory, memory, kv=kv, dtype=dtype, max_sequences=num_streams, prefix_cache=prefix_cache)
    side = Side(llm)
    return {
        "prefill": side.prefill,
        "top": side.top,
        "fill": side.fill,
        "extend": side.extend,
    }
