"""The engine: scheduler, executors, sampling, and the Python interfaces LLM and AsyncLLM."""
