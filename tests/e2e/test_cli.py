"""The command line with the built-in model: answers, JSON, budgets that hold, and every kind of bad input."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.cli import COMMAND, refused

from elbowroom.commands import invoke
from elbowroom.models.directory import BUILTIN
from elbowroom.units import parse_bytes

pytestmark = pytest.mark.skipif(not (BUILTIN / "config.json").is_file(), reason="the built-in model is not there")

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "examples" / "workshop.txt"
BUDGET = "64MiB"


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    """Run a command that must succeed and print exactly one JSON object."""
    assert invoke([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def copy_model(folder: Path) -> Path:
    return Path(shutil.copytree(BUILTIN, folder / "model"))


def test_a_run_reports_text_bytes_and_speeds(capsys):
    result = run_json(capsys, "run", "--raw", "--memory", BUDGET, "--max-tokens", "5", "import ")
    assert len(result["text"]) > 0
    assert result["generated_tokens"] == 5
    assert result["finish_reason"] == "length"
    assert result["budget_bytes"] == parse_bytes(BUDGET)
    assert result["baseline_bytes"] > 0
    owners = result["ledger"]
    assert owners["weights"]["host"]["current_bytes"] > 0
    assert owners["kv"]["host"]["peak_bytes"] > 0
    assert sum(tiers["host"]["current_bytes"] for tiers in owners.values()) <= result["budget_bytes"]
    assert result["ledger_peak_bytes"] <= result["budget_bytes"]
    assert result["ttft_s"] > 0
    assert result["imports_s"] >= 0
    load = result["load"]
    assert load["file_bytes"] > 0
    assert 0 < load["open_s"] + load["read_s"] + load["convert_s"] <= load["total_s"]
    assert result["prefill_tokens_per_s"] > 0
    assert result["decode_tokens_per_s"] > 0


def test_several_questions_get_the_answers_that_each_gets_alone(capsys):
    questions = ["What is the code of yqrxpu?", "What is the code of usqizm?"]
    common = ("run", "--memory", BUDGET, "--max-tokens", "16", "--file", str(DOCUMENT))
    together = run_json(capsys, *common, *questions)
    alone = [run_json(capsys, *common, question) for question in questions]
    assert together["texts"] == [result["text"] for result in alone]
    assert together["prompt_tokens"] < sum(result["prompt_tokens"] for result in alone) * 0.6
    assert together["text"] == "\n".join(together["texts"])


def test_a_seed_repeats_a_sampling(capsys):
    common = ("run", "--raw", "--memory", BUDGET, "--max-tokens", "12", "--temperature", "1.5", "def ")
    texts = [run_json(capsys, *common, "--seed", seed)["text"] for seed in ("7", "7", "8")]
    assert texts[0] == texts[1] != texts[2]


def test_the_table_names_budget_owners_and_speeds(capsys):
    assert invoke(["run", "--raw", "--memory", BUDGET, "--max-tokens", "3", "import "]) == 0
    text = capsys.readouterr().out
    for word in ("weights", "kv", "workspace", "runtime", "all owners", "budget", "64.0 MiB", "process over baseline"):
        assert word in text
    assert "tokens/s" in text
    assert "of weights loaded in" in text


def test_progress_goes_to_stderr(capsys):
    assert invoke(["run", "--raw", "--memory", BUDGET, "--max-tokens", "2", "--progress", "--json", "import "]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["generated_tokens"] == 2
    assert "loading" in captured.err


def test_the_operating_system_confirms_the_budget(capsys):
    """Peak RSS of a fresh process, minus ``doctor --baseline`` of another, stays inside the budget."""
    baseline = json.loads(subprocess.check_output([*COMMAND, "doctor", "--baseline", "--json"]))["baseline_bytes"]
    arguments = ["run", "--memory", BUDGET, "--file", str(DOCUMENT), "--json", "What is the code of usqizm?", "Why?"]
    # A child's ru_maxrss begins with its parent's, so a small process stands between this one and the measured one.
    judge = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    lines = subprocess.check_output([sys.executable, "-c", judge, *COMMAND, *arguments], text=True).splitlines()
    result, peak = json.loads(lines[0]), int(lines[1]) * 1024
    budget = parse_bytes(BUDGET)
    allowed = budget + max(budget * 0.02, 8 * 2**20)
    assert result["baseline_bytes"] <= baseline + 2**20  # doctor imports the server too
    assert peak - result["baseline_bytes"] <= allowed
    assert result["peak_over_baseline_bytes"] <= allowed


def test_a_run_imports_no_more_than_it_needs():
    """No server, no terminal library and, for a plain prompt, no templates; pydantic is what typer itself imports."""
    script = (
        "import sys; from elbowroom.commands import invoke; code = invoke(sys.argv[1:]); "
        "sys.stderr.write(' '.join({name.partition('.')[0] for name in sys.modules})); sys.exit(code)"
    )
    arguments = ["run", "--raw", "--json", "--no-progress", "--memory", BUDGET, "--max-tokens", "1", "import "]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    imported = set(done.stderr.split())
    assert {"torch", "tokenizers", "typer"} <= imported
    heavy = {"fastapi", "starlette", "uvicorn", "prometheus_client", "rich", "jinja2", "transformers"}
    assert not imported & heavy


def test_the_baseline_is_one_number(capsys):
    text = subprocess.check_output([*COMMAND, "doctor", "--baseline"], text=True)
    assert 50 * 2**20 < int(text) < 2**30


def test_doctor_tells_what_is_there(capsys):
    assert invoke(["doctor"]) == 0
    assert "kernel backend" in capsys.readouterr().out
    facts = run_json(capsys, "doctor")
    assert facts["builtin_model"] is True
    assert facts["cores"] >= 1
    assert facts["available_memory_bytes"] > 0


def test_retrieval_counts_exact_answers_inside_the_budget(capsys):
    result = run_json(
        capsys, "eval", "retrieval", "--length", "256", "--keys", "2", "--num-queries", "6", "--memory", BUDGET
    )
    assert result["num_queries"] == 6
    assert result["accuracy"] == result["num_correct"] / 6
    assert result["interval"][0] <= result["accuracy"] <= result["interval"][1]
    assert sum(part["num_queries"] for part in result["by_depth"]) == 6
    assert result["max_tokens"] <= 256
    assert result["ledger"]["tasks"]["host"]["current_bytes"] > 0
    assert result["ledger_peak_bytes"] <= result["budget_bytes"]


def test_retrieval_is_repeatable(capsys):
    common = ("eval", "retrieval", "--length", "256", "--keys", "2", "--num-queries", "4", "--memory", BUDGET)
    first, second, other = (run_json(capsys, *common, "--seed", seed) for seed in ("3", "3", "4"))
    assert first["by_depth"] == second["by_depth"]
    assert first["by_depth"] != other["by_depth"]


def test_a_run_of_tasks_goes_on_from_what_a_crash_left(capsys, tmp_path):
    common = ("eval", "run", "--tasks", "retrieval,mf", "--length", "512", "--keys", "2", "--num-queries", "4")
    common += ("--memory", BUDGET, "--controls", "--out", str(tmp_path / "run"))
    first = run_json(capsys, *common)
    assert first["tasks"]["retrieval"]["accuracy"] == 1.0
    assert first["tasks"]["mf"]["num_queries"] == 4
    assert all(part["oracle"] == 1.0 and part["num_differing"] == 0 for part in first["controls"].values())
    samples = tmp_path / "run" / "samples.jsonl"
    samples.write_bytes(samples.read_bytes()[:-300])
    assert run_json(capsys, *common)["tasks"] == first["tasks"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["tasks"] == first["tasks"]
    assert "kv was 'plain', is 'int8'" in refused(capsys, [*common, "--kv", "int8"], 2)


@pytest.mark.parametrize("history", ["gold", "own"])
def test_questions_may_follow_each_other_in_one_session(capsys, history):
    common = ("eval", "run", "--tasks", "retrieval,chat,chains,many_shot", "--length", "512", "--keys", "3")
    common += ("--num-queries", "6", "--mode", "multi_turn", "--history", history, "--memory", BUDGET)
    result = run_json(capsys, *common)
    for task in result["tasks"].values():
        assert task["num_queries"] == 6
        assert len(task["by_turn"]) == 3
        assert task["accuracy"] >= 5 / 6
        assert task["max_tokens"] <= 512


def test_the_list_of_tasks_is_what_runs(capsys):
    listed = run_json(capsys, "eval", "list")
    assert listed["retrieval"]["mode"] == "multi_request"
    assert "kv" in listed


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "x", "--memory", "10MiB"], 3, "--memory"),
        (["run", "x", "--memory", "lots"], 2, "lots"),
        (["run", "x", "--memory", "0"], 2, "below one byte"),
        (["run", "x", "--memory", "120%"], 2, "120%"),
        (["run", "x", "--memory", BUDGET, "--dtype", "int3"], 2, "float32, bfloat16, float16"),
        (["run", "x", "--memory", BUDGET, "--kv", "zip(9)"], 2, "choose one of: bfp"),
        (["run", "x", "--memory", BUDGET, "--kv", "plain(int1)"], 2, "bf16"),
        (["run", "x", "--memory", BUDGET, "--max-tokens", "100000"], 2, "context of 4096"),
        (["run", "x" * 40_000, "--memory", BUDGET], 2, "context of 4096"),
        (["run", "x", "--model", "/nowhere"], 4, "/nowhere"),
        (["serve", "--port", "0", "--memory", "10MiB"], 3, "--memory"),
        (["eval", "retrieval", "--length", "8192", "--memory", BUDGET], 2, "--length 4096"),
        (["eval", "retrieval", "--length", "40", "--keys", "9", "--memory", BUDGET], 2, "--keys"),
        (["eval", "run", "--tasks", "vt", "--length", "64", "--memory", BUDGET], 2, "--length"),
    ],
)
def test_impossible_requests_name_the_remedy(capsys, arguments, code, words):
    assert words in refused(capsys, arguments, code)


def test_the_smallest_budget_that_is_named_works(capsys):
    text = refused(capsys, ["run", "x", "--memory", "1MiB"], 3)
    minimum = text.rpartition("at least ")[2].partition(",")[0]
    assert invoke(["run", "x", "--memory", minimum, "--max-tokens", "2"]) == 0


def test_a_truncated_checkpoint_is_refused(capsys, tmp_path):
    model = copy_model(tmp_path)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    assert "model.safetensors" in refused(capsys, ["run", "x", "--memory", BUDGET, "--model", str(model)], 4)


def test_a_corrupt_checkpoint_is_refused(capsys, tmp_path):
    model = copy_model(tmp_path)
    (model / "model.safetensors").write_bytes(b"\xff" * 4096)
    assert "model.safetensors" in refused(capsys, ["run", "x", "--memory", BUDGET, "--model", str(model)], 4)


def test_a_broken_config_is_refused(capsys, tmp_path):
    model = copy_model(tmp_path)
    (model / "config.json").write_text("{")
    assert "config.json" in refused(capsys, ["run", "x", "--memory", BUDGET, "--model", str(model)], 4)


def test_a_model_without_a_tokenizer_says_so(capsys, tmp_path):
    model = copy_model(tmp_path)
    (model / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused(capsys, ["run", "x", "--memory", BUDGET, "--model", str(model)], 4)


def test_a_model_without_a_template_is_run_raw_unless_chat_is_asked_for(capsys, tmp_path):
    model = copy_model(tmp_path)
    (model / "tokenizer_config.json").unlink()
    common = ("run", "x", "--memory", BUDGET, "--max-tokens", "2", "--model", str(model))
    assert run_json(capsys, *common)["generated_tokens"] == 2
    assert "template" in refused(capsys, [*common, "--chat"], 4)


def test_a_server_says_where_it_is_and_ends_on_ctrl_c():
    arguments = ["serve", "--port", "0", "--memory", BUDGET, "--drain-timeout", "1"]
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    greeting = process.stdout.readline()
    assert "builtin (64.0 MiB) at http://127.0.0.1:" in greeting
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert errors == ""


def test_two_models_share_one_budget(tmp_path):
    from elbowroom.commands.serve import share_memory

    second = copy_model(tmp_path)
    shares = share_memory({"a": None, "b": str(second)}, "128MiB", "float32")
    assert shares["a"] == shares["b"]
    assert sum(shares.values()) <= parse_bytes("128MiB")
