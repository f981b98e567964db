"""The protocol of sides, with scripts that behave, fail, die, hang and babble."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from elbowroom.bench.side import SIDES, Side, our_environment, rival_environment
from elbowroom.errors import ElbowroomError

GOOD = """
    import os
    def load(factor):
        print("a library prints")
        def fail():
            raise ValueError("as asked")
        return {
            "times": lambda value: {"value": factor * value},
            "fail": fail,
            "die": lambda: os._exit(3),
            "modules": lambda: {"elbowroom": any(name.startswith("elbowroom") for name in __import__("sys").modules)},
            "setting": lambda: {"value": os.environ.get("OMP_WAIT_POLICY")},
        }
"""


@pytest.fixture
def start(tmp_path: Path):
    """Return a function that starts a side from its source; all sides end with the test."""
    sides: list[Side] = []

    def run(source: str, **options) -> Side:
        script = tmp_path / f"side{len(sides)}.py"
        script.write_text(textwrap.dedent(source))
        sides.append(Side(script, rival_environment(1), **options))
        return sides[-1]

    yield run
    for side in sides:
        side.close()


def test_a_side_is_loaded_once_and_answers_in_order(start):
    side = start(GOOD)
    assert side.ask("load", factor=3)["commands"] == ["die", "fail", "modules", "setting", "times"]
    assert [side.ask("times", value=value)["value"] for value in (1, 2)] == [3, 6]


def test_a_rival_gets_neither_our_package_nor_our_settings(start, monkeypatch):
    """OpenMP's wait policy, which our package sets, would slow a rival down."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    side = start(GOOD)
    side.ask("load", factor=1)
    assert side.ask("modules") == {"elbowroom": False}
    assert side.ask("setting") == {"value": None}
    assert our_environment(2)["OMP_WAIT_POLICY"] == "PASSIVE"


def test_no_rival_script_imports_the_package():
    for script in SIDES.glob("*.py"):
        imports = [line for line in script.read_text().splitlines() if line.lstrip().startswith(("import ", "from "))]
        ours = any("elbowroom" in line for line in imports)
        assert ours == (script.name == "ours.py"), script.name


def test_a_failed_request_names_the_error_and_the_next_one_is_served(start):
    side = start(GOOD)
    side.ask("load", factor=1)
    with pytest.raises(ElbowroomError, match="ValueError: as asked"):
        side.ask("fail")
    assert side.ask("times", value=5) == {"value": 5}


def test_a_side_that_dies_says_its_last_words(start):
    side = start(GOOD)
    side.ask("load", factor=1)
    with pytest.raises(ElbowroomError, match="ended with code 3"):
        side.ask("die")
    with pytest.raises(ElbowroomError, match="ended with code 3"):
        side.ask("times", value=1)


def test_a_script_that_cannot_start_shows_why(start):
    side = start("raise OSError('no such disk')")
    with pytest.raises(ElbowroomError, match="no such disk"):
        side.ask("load")


def test_a_missing_package_is_named_with_the_fix(start):
    side = start("def load():\n    import no_such_rival")
    with pytest.raises(ElbowroomError, match="no_such_rival is not installed") as caught:
        side.ask("load")
    assert caught.value.hint == "`make bench` installs it"


@pytest.mark.parametrize("line", ["garbage", "[1]", '{"neither": 1}', '"text"', "3", "null"])
def test_what_is_not_of_the_protocol_is_shown(start, tmp_path, line):
    babbler = tmp_path / "babbler.py"
    babbler.write_text(f"input()\nprint({line!r}, flush=True)\ninput()")
    side = start("", program=babbler)
    with pytest.raises(ElbowroomError, match="not of the protocol"):
        side.ask("load")


def test_a_side_that_hangs_is_stopped(start):
    side = start("import time\ndef load():\n    time.sleep(60)", timeout_s=0.3)
    with pytest.raises(ElbowroomError, match=r"no answer within 0.3 s"):
        side.ask("load")


def test_an_idle_side_uses_no_cpu_and_one_that_does_is_found(start):
    quiet, busy = (
        start(GOOD),
        start("""
        import threading
        def spin():
            while True:
                pass
        def load(factor):
            threading.Thread(target=spin, daemon=True).start()
            return {"times": lambda value: {"value": value}}
    """),
    )
    for side in (quiet, busy):
        side.ask("load", factor=1)
    time.sleep(0.4)
    for side in (quiet, busy):
        side.ask("times", value=1)
    assert quiet.idle_cpu_s <= 0.02
    assert busy.idle_cpu_s > 0.05


def test_a_side_ends_with_its_benchmark(start):
    side = start(GOOD)
    side.ask("load", factor=1)
    side.close()
    assert side._process.returncode == 0


def test_a_side_in_the_middle_of_its_work_ends_with_its_benchmark(start):
    side = start("import time\ndef load():\n    return {'work': lambda: time.sleep(60)}")
    side.ask("load")
    side.send("work")
    started = time.monotonic()
    side.close()
    assert time.monotonic() - started < 3.0


def test_a_side_leaves_when_its_benchmark_is_killed(tmp_path: Path):
    """Its stdin ends with the parent, however that went."""
    script = tmp_path / "side.py"
    script.write_text(textwrap.dedent(GOOD))
    parent = f"""
        import time
        from pathlib import Path
        from elbowroom.bench.side import Side, rival_environment
        side = Side(Path({str(script)!r}), rival_environment(1))
        side.ask("load", factor=1)
        print(side._process.pid, flush=True)
        time.sleep(60)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(parent)], stdout=subprocess.PIPE, text=True
    ) as process:
        pid = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 5.0
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the side is still there"
        time.sleep(0.02)
