"""The native thread pool under sanitizers, and how many threads it gets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.native import build_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="cgroups and these sanitizers are those of Linux")


@pytest.mark.parametrize("sanitize", ["thread", "address,undefined"])
def test_the_pool_has_no_race_and_loses_no_item(sanitize: str, tmp_path: Path) -> None:
    """Several callers, nested jobs, exceptions, growing scratch, workers that fall asleep, a fork."""
    program = build_program("pool_stress", ["pool", "cpus"], tmp_path, sanitize)

    run = subprocess.run([str(program)], check=False, capture_output=True, text=True, timeout=300)

    assert (run.returncode, run.stdout, run.stderr) == (0, "done\n", "")


@pytest.fixture(scope="module")
def quota_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_program("quota_cpus", ["cpus"], tmp_path_factory.mktemp("quota"))


V1_TEAM = {"team/cpu.cfs_quota_us": "150000", "team/cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("cgroup", "files", "cpus"),
    [
        ("0::/\n", {}, "inf"),
        ("0::/\n", {"cpu.max": "max 100000"}, "inf"),
        ("0::/\n", {"cpu.max": "150000 100000"}, "1.5"),
        ("0::/a/b\n", {"a/b/cpu.max": "200000 100000"}, "2"),
        ("0::/a/b\n", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "200000 100000"}, "0.5"),
        ("0::/a/b\n", {"a/cpu.max": "max 100000", "a/b/cpu.max": "300000 100000", "other/cpu.max": "1 100"}, "3"),
        ("0::/host/path\n", {"cpu.max": "400000 100000"}, "4"),
        ("0::/../elsewhere\n", {"cpu.max": "400000 100000"}, "4"),
        ("4:memory:/m\n1:cpu,cpuacct:/team/x\n0::/\n", {f"cpu/{k}": v for k, v in V1_TEAM.items()}, "1.5"),
        ("2:cpuacct,cpu:/team\n", {f"cpu,cpuacct/{k}": v for k, v in V1_TEAM.items()}, "1.5"),
        ("3:cpuset:/team\n", {f"cpu/{k}": v for k, v in V1_TEAM.items()}, "inf"),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "inf"),
        ("1:cpu:/\n0::/u\n", {"unified/u/cpu.max": "100000 100000"}, "1"),
        ("nonsense\n1:cpu\n0::relative\n", {}, "inf"),
    ],
)
def test_the_least_quota_of_a_cgroup_and_its_ancestors_counts(
    quota_program: Path, cgroup: str, files: dict[str, str], cpus: str, tmp_path: Path
) -> None:
    for name, text in (
        {f"sys/fs/cgroup/{name}": text for name, text in files.items()} | {"proc/self/cgroup": cgroup}
    ).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    shown = subprocess.run([str(quota_program), str(tmp_path)], capture_output=True, text=True, check=True)

    assert shown.stdout.strip() == cpus
