"""transformers' continuous batching on the first requests of a load: the measured process of the rival.

``python -m elbowroom.bench.batch_rival '{"prompts": [...], "num_blocks": ..., "new_tokens": ...}'``
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

import torch

from elbowroom.models.directory import find_model

PAGE_TOKENS = 64


def main() -> None:
    """Print the seconds that ``generate_batch`` takes."""
    spec: dict[str, Any] = json.loads(sys.stdin.read())
    transformers = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        find_model(None), attn_implementation="sdpa", dtype=torch.float32
    )
    settings = transformers.ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=spec["num_blocks"],
        max_batch_tokens=512,
        max_memory_percent=0.5,
        use_cuda_graph=False,
        use_async_batching=False,
        auto_switch_to_flash=False,
    )
    greedy = transformers.GenerationConfig(
        max_new_tokens=spec["new_tokens"], do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    started = time.perf_counter()
    outputs = model.generate_batch(
        spec["prompts"], generation_config=greedy, continuous_batching_config=settings, warmup=False
    )
    seconds = time.perf_counter() - started
    errors = [str(each.error) for each in outputs.values() if each.error]
    json.dump({"seconds": seconds, "num_answers": len(outputs), "errors": errors[:1]}, sys.stdout)


if __name__ == "__main__":
    main()
