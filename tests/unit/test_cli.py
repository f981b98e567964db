"""The command line without a model: help, usage, and everything that is refused before anything is loaded."""

from __future__ import annotations

import io
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.cli import COMMAND, refused, started

from elbowroom.commands import INTERRUPTED, invoke
from elbowroom.commands.questions import answer, common_length, read_document, read_prompts
from elbowroom.commands.serve import read_models
from elbowroom.errors import RequestError


def test_help_names_every_command(capsys):
    assert invoke(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("run", "serve", "eval", "compare", "bench", "doctor"):
        assert f"\n  {command} " in text


def test_no_arguments_show_the_help(capsys):
    assert invoke([]) == 0
    assert "Commands:" in capsys.readouterr().out


def test_version(capsys):
    from elbowroom import __version__

    assert invoke(["--version"]) == 0
    assert capsys.readouterr().out == f"elbowroom {__version__}\n"


def test_help_imports_no_torch_and_answers_at_once():
    script = "import sys; from elbowroom.commands import invoke; invoke(['--help']); sys.exit('torch' in sys.modules)"
    fastest = 60.0
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
        fastest = min(fastest, time.perf_counter() - started)
    assert fastest < 1.5  # 0.25 s on an idle machine; importing torch alone takes longer


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run"], 2, "PROMPT"),
        (["walk"], 2, "walk"),
        (["run", "x", "--colour"], 2, "--colour"),
        (["run", "x", "--max-tokens", "0"], 2, "--max-tokens"),
        (["run", "x", "--max-tokens", "-3"], 2, "--max-tokens"),
        (["run", "x", "--max-tokens", "many"], 2, "--max-tokens"),
        (["run", "x", "--max-tokens", str(10**12)], 2, "max_tokens"),
        (["run", "x", "--temperature", "nan"], 2, "temperature"),
        (["run", "x", "--temperature", "-1"], 2, "temperature"),
        (["run", "x", "--temperature", "inf"], 2, "temperature"),
        (["run", "x", "--seed", str(10**30)], 2, "seed"),
        (["run", "x", "--file", "/nowhere/at/all.txt"], 2, "/nowhere/at/all.txt"),
        (["run", "x", "--file", "/"], 2, "cannot be read"),
        (["run", ""], 2, "empty"),
        (["run", "-", "-"], 2, "stdin"),
        (["serve", "--port", "70000"], 2, "--port"),
        (["serve", "--model", "=somewhere"], 2, "NAME=DIR"),
        (["run", "x", "--kv-relief", "plain"], 2, "no relief from itself"),
        (["run", "x", "--kv", "snapkv(512)", "--kv-relief", "int8"], 2, "chooses when a prompt ends"),
        (["run", "x", "--kv-relief", "nothing"], 2, "nothing"),
        (["serve", "--model", "a=x", "--model", "a=y"], 2, "two models"),
        (["eval", "retrieval", "--keys", "0"], 2, "--keys"),
        (["eval", "nothing"], 2, "nothing"),
        (["eval", "run"], 2, "--tasks"),
        (["eval", "run", "--tasks", "nothing"], 2, "unknown task 'nothing'"),
        (["eval", "run", "--tasks", "kv,kv"], 2, "--tasks"),
        (["eval", "run", "--tasks", "kv", "--mode", "telepathy"], 2, "--mode"),
        (["eval", "run", "--tasks", "kv", "--retry-errors"], 2, "--out"),
    ],
)
def test_bad_usage_is_refused_in_one_line(capsys, arguments, code, words):
    text = refused(capsys, arguments, code)
    assert words in text
    assert len(text.splitlines()) <= 2


def test_usage_errors_name_the_help_to_read(capsys):
    assert "hint: see elbowroom run --help" in refused(capsys, ["run", "x", "--max-tokens", "0"], 2)


def test_a_document_must_be_text(tmp_path: Path):
    binary, blank = tmp_path / "binary", tmp_path / "blank"
    binary.write_bytes(b"caf\xe9")
    blank.write_text(" \n\n")
    with pytest.raises(RequestError, match=r"not UTF-8 text \(byte 3\)"):
        read_document(str(binary))
    with pytest.raises(RequestError, match="is empty"):
        read_document(str(blank))
    assert read_document(None) == ""


def test_a_dash_reads_stdin(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("grüße?\n".encode())))
    assert read_prompts(["a", "-"]) == ["a", "grüße?"]


def test_stdin_must_be_text(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    with pytest.raises(RequestError, match="stdin is not UTF-8"):
        read_prompts(["-"])


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([[1, 2, 3]], 2),
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2, 3], [1, 2, 3]], 2),
        ([[1, 2, 3], [1, 2]], 1),
        ([[1], [1, 2]], 0),
        ([[5, 1], [6, 1]], 0),
        ([[], [1]], 0),
    ],
)
def test_a_shared_beginning_leaves_a_token_of_every_prompt(prompts, expected):
    assert common_length(prompts) == expected


class FakeOutput:
    ttft_s = 0.25


class FakeSession:
    """Remembers what it read; forks know what they were asked."""

    def __init__(self, read: list[int], asked: list[list[int]]) -> None:
        self.read, self.asked = read, asked

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def fork(self):
        return FakeSession(self.read, self.asked)

    def ask(self, tokens, sampling):
        self.asked.append(tokens)
        return FakeOutput()


class FakeLLM:
    def __init__(self) -> None:
        self.sessions: list[list[int]] = []
        self.asked: list[list[int]] = []

    def session(self, tokens):
        self.sessions.append(tokens)
        return FakeSession(tokens, self.asked)

    def generate(self, prompts, sampling):
        return [FakeOutput() for _ in prompts]


def test_several_questions_read_their_common_text_once():
    llm, moves = FakeLLM(), []
    context = list(range(100))
    answers = answer(llm, [[*context, 7, 8], [*context, 9]], None, lambda done, total: moves.append((done, total)))
    assert llm.sessions == [context]
    assert sorted(llm.asked) == [[7, 8], [9]]
    assert answers.prompt_tokens == 103
    assert answers.ttft_s >= 0.25
    assert moves == [(1, 2), (2, 2)]


def test_unrelated_prompts_need_no_session():
    llm = FakeLLM()
    answers = answer(llm, [[1, 2], [3, 4]], None, lambda done, total: None)
    assert llm.sessions == []
    assert len(answers.outputs) == 2
    assert answers.prompt_tokens == 4


def test_served_models_are_named_by_the_user_or_by_their_directory(tmp_path: Path):
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert read_models([]) == {"builtin": None}
    assert read_models(["x=/some/where", str(tmp_path / "m")]) == {"x": "/some/where", "m": str(tmp_path / "m")}
    assert read_models([str(odd)]) == {"a=b": str(odd)}


def test_a_taken_port_is_reported_before_any_model_is_loaded(capsys, tmp_path: Path):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        # The model does not exist: had it been looked at first, that would be the error.
        text = refused(capsys, ["serve", "--port", port, "--model", str(tmp_path / "none")], 1)
    assert port in text
    assert "hint: choose another one with --port" in text


def test_ctrl_c_ends_with_130_and_no_traceback(capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("elbowroom.commands.questions.read_prompts", interrupt)
    assert invoke(["run", "x"]) == INTERRUPTED
    assert capsys.readouterr().err == ""


def test_what_a_test_starts_is_interrupted_though_the_tests_are_a_background_job():
    """What such a job starts ignores SIGINT: a comparison once went on to its end and succeeded."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = started([sys.executable, "-c", "print(flush=True); input()"], stdin=-1, stdout=-1, stderr=-1)
        with process:
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == -signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_closed_pipe_is_quiet():
    process = subprocess.Popen([*COMMAND, "serve", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert errors == b""
    assert process.returncode in (0, 1)
