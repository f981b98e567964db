"""Evaluation tasks by name."""

from elbowroom.evals.tasks.base import Task
from elbowroom.registry import Registry

_HERE = "elbowroom.evals.tasks"
TASKS: Registry[Task] = Registry(
    "task",
    {
        "retrieval": f"{_HERE}.trained:RETRIEVAL",
        "chat": f"{_HERE}.trained:CHAT",
        "follow_ups": f"{_HERE}.trained:FOLLOW_UPS",
        "first_seen": f"{_HERE}.trained:FIRST_SEEN",
        "chains": f"{_HERE}.trained:CHAINS",
        "many_shot": f"{_HERE}.trained:MANY_SHOT",
        "niah_single_1": f"{_HERE}.niah:SINGLE_1",
        "niah_single_2": f"{_HERE}.niah:SINGLE_2",
        "niah_single_3": f"{_HERE}.niah:SINGLE_3",
        "niah_multikey_1": f"{_HERE}.niah:MULTIKEY_1",
        "niah_multikey_2": f"{_HERE}.niah:MULTIKEY_2",
        "niah_multikey_3": f"{_HERE}.niah:MULTIKEY_3",
        "niah_multivalue": f"{_HERE}.niah:MULTIVALUE",
        "niah_multiquery": f"{_HERE}.niah:MULTIQUERY",
        "vt": f"{_HERE}.vt:VT",
        "cwe": f"{_HERE}.cwe:CWE",
        "fwe": f"{_HERE}.fwe:FWE",
        "kv": f"{_HERE}.kv:KV",
        "prefix_suffix": f"{_HERE}.prefix_suffix:PREFIX_SUFFIX",
        "mf": f"{_HERE}.mf:MF",
        "repoqa": f"{_HERE}.repoqa:REPOQA",
        "repoqa_and_kv": f"{_HERE}.repoqa_and_kv:REPOQA_AND_KV",
    },
)

__all__ = ["TASKS", "Task"]
