"""Batch files: the answers of HTTP, errors by line, and runs that go on where one ended."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.tiny_model import write_tiny_model

from elbowroom.engine.async_llm import AsyncLLM
from elbowroom.engine.build import build_engine
from elbowroom.engine.engine import Engine
from elbowroom.errors import ElbowroomError, IntegrityError, RequestError
from elbowroom.serve import create_app
from elbowroom.serve.batch import BatchOptions, BatchReport, BatchViewer, OutputFailed, forecast_batch, run_batch
from elbowroom.serve.batch.journal import Journal, job_of
from elbowroom.serve.batch.source import BatchInput

MEMORY = "64MiB"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("batch") / "tiny"))


def completion(name: str, prompt: object, **fields: object) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 6, "temperature": 0, **fields}
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}


def chat(name: str, text: str, **fields: object) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 6, "temperature": 0, **fields}
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


def write(path: Path, lines: list[object]) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def run(source: Path, target: Path, model: str, viewer: BatchViewer | None = None, **options: Any) -> BatchReport:
    return run_batch(source, target, BatchOptions(model=model, memory=MEMORY, **options), viewer)


GOOD: list[object] = [
    completion("one", "The same beginning of several prompts, long enough to be worth something: a"),
    completion("two", "The same beginning of several prompts, long enough to be worth something: b", n=2, seed=3),
    chat("three", "Hi", logprobs=True, top_logprobs=2),
    completion("four", ["first of two", "second of two"], echo=True),
    completion("five", [72, 105], temperature=1.0, seed=11, logprobs=1),
]


def texts(lines: list[dict[str, Any]]) -> dict[str, list[str]]:
    bodies = {line["custom_id"]: line["response"]["body"]["choices"] for line in lines}
    return {name: [each.get("text") or each["message"]["content"] for each in body] for name, body in bodies.items()}


def comparable(value: Any) -> Any:
    """Return an answer without what differs between any two of them, and with log-probabilities rounded."""
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, list):
        return [comparable(each) for each in value]
    if isinstance(value, dict):
        differing = ("id", "created", "prompt_tokens_details")
        return {key: comparable(each) for key, each in value.items() if key not in differing}
    return value


def test_a_line_gets_the_answer_that_it_would_get_over_http(tmp_path: Path, model: str) -> None:
    wrong = [completion("long", "x" * 600), completion("none", "x", model="gpt-5"), chat("bad", "x", temperature=-1)]
    source = write(tmp_path / "in.jsonl", [*GOOD, "", *wrong])
    report = run(source, tmp_path / "out.jsonl", model)
    answers = {line["custom_id"]: line for line in read(tmp_path / "out.jsonl")}

    assert (report.num_lines, report.num_answered, report.num_failed) == (8, 5, 3)
    llm = AsyncLLM(build_engine(model, MEMORY))
    try:
        transport = httpx.ASGITransport(create_app({"tiny": llm}))

        async def post(line: dict[str, Any]) -> httpx.Response:
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.post(line["url"], json=line["body"])

        for line in (*GOOD, *wrong):
            assert isinstance(line, dict)
            got, answer = asyncio.run(post(line)), answers[line["custom_id"]]
            assert answer["error"] is None
            assert answer["response"]["status_code"] == got.status_code
            body = answer["response"]["body"]
            if got.status_code == 200:
                assert comparable(body) == comparable(got.json())
            else:
                assert body == got.json()
    finally:
        llm.engine.close()


def test_broken_lines_get_errors_and_the_others_their_answers(tmp_path: Path, model: str) -> None:
    stream = completion("stream", "x", stream=True)
    lines = [
        "{not json",
        "[1, 2]",
        '{"custom_id": "no body", "url": "/v1/completions"}',
        completion("", "x"),
        GOOD[0],
        completion("one", "the id is taken"),
        {"custom_id": "embed", "method": "POST", "url": "/v1/embeddings", "body": {}},
        {"custom_id": "get", "method": "GET", "url": "/v1/completions", "body": {"prompt": "x"}},
        stream,
        '{"custom_id": "huge", "body": "' + "x" * (9 * 2**20) + '"}',
    ]
    source = write(tmp_path / "in.jsonl", lines)
    report = run(source, tmp_path / "out.jsonl", model, sort=True)
    got = read(tmp_path / "out.jsonl")

    assert (report.num_lines, report.num_answered, report.num_failed) == (10, 1, 9)
    assert [line["custom_id"] for line in got] == [
        None, None, "no body", "", "one", "one", "embed", "get", "stream", None,
    ]  # fmt: skip
    codes = [line["error"] and line["error"]["code"] for line in got]
    invalid, url = "invalid_line", "invalid_url"
    assert codes == [invalid] * 4 + [None, "duplicate_custom_id", url, url, None, invalid]
    assert [line["error"]["line"] for line in got if line["error"]] == [1, 2, 3, 4, 6, 7, 8, 10]
    assert got[8]["response"]["status_code"] == 400
    assert got[4]["response"]["body"]["choices"][0]["text"]
    again = run(source, tmp_path / "out.jsonl", model)
    assert (again.num_before, again.num_failed, read(tmp_path / "out.jsonl")) == (10, 9, got)


def test_a_torn_end_is_cut_off_and_only_what_is_missing_runs(tmp_path: Path, model: str) -> None:
    source, target = write(tmp_path / "in.jsonl", GOOD), tmp_path / "out.jsonl"
    run(source, target, model)
    whole = target.read_bytes().splitlines(keepends=True)
    target.write_bytes(b"".join(whole[:2]) + whole[2][:-1])

    report = run(source, target, model)
    assert (report.num_before, report.num_answered) == (2, 5)
    assert target.read_bytes().startswith(b"".join(whole[:2]))
    assert texts(read(target)) == texts(list(map(json.loads, whole)))


@pytest.mark.parametrize("change", ["input", "setting", "foreign", "broken"])
def test_an_output_of_something_else_is_refused_unless_restarted(tmp_path: Path, model: str, change: str) -> None:
    source, target = write(tmp_path / "in.jsonl", GOOD[:2]), tmp_path / "out.jsonl"
    options: dict[str, Any] = {}
    if change == "foreign":
        target.write_text("something of mine\n")
    else:
        run(source, target, model)
    if change == "input":
        write(source, GOOD[:3])
    elif change == "setting":
        options["kv"] = "int8"
    elif change == "broken":
        target.write_text("mine\n" + target.read_text())
    before, beside = target.read_bytes(), sorted(tmp_path.iterdir())
    hint = "input|kv|no output of this batch|no line that this batch wrote"
    with pytest.raises((RequestError, IntegrityError), match=hint) as caught:
        run(source, target, model, **options)

    assert "--restart" in (caught.value.hint or "")
    assert target.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == beside, "a refused run left something behind"
    report = run(source, target, model, restart=True, **options)
    assert (report.num_before, report.num_answered) == (0, len(source.read_text().splitlines()))


def test_two_runs_do_not_write_one_output(tmp_path: Path, model: str) -> None:
    source, target = write(tmp_path / "in.jsonl", GOOD[:1]), tmp_path / "out.jsonl"
    with (
        Journal(target, job_of({"input": "x"})),
        pytest.raises(RequestError, match="another run"),
    ):
        run(source, target, model)


def test_a_full_disk_ends_the_run_and_loses_nothing(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = write(tmp_path / "in.jsonl", GOOD), tmp_path / "out.jsonl"
    real, room = os.pwrite, 1500

    def pwrite(file: int, data: Any, at: int) -> int:
        if Path(f"/proc/self/fd/{file}").readlink() != target:
            return real(file, data, at)
        if at >= room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, bytes(data)[: room - at], at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OutputFailed, match="No space left"):
        run(source, target, model)
    kept = read(target)
    monkeypatch.undo()

    report = run(source, target, model)
    assert report.num_before == len(kept) < 5
    assert sorted(line["custom_id"] for line in read(target)) == ["five", "four", "one", "three", "two"]


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_full_disk_at_the_start_is_said_in_plain_words(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Not even the description of the batch can be written."""
    source, target = write(tmp_path / "in.jsonl", GOOD[:1]), tmp_path / "out.jsonl"

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OutputFailed, match="No space left") as caught:
        run(source, target, model)
    assert "free some space" in (caught.value.hint or "")
    monkeypatch.undo()
    assert run(source, target, model).num_answered == 1


def test_a_directory_is_no_output(tmp_path: Path, model: str) -> None:
    source, target = write(tmp_path / "in.jsonl", GOOD[:1]), tmp_path / "out"
    target.mkdir()
    with pytest.raises(RequestError, match="is a directory"):
        run(source, target, model)
    assert sorted(tmp_path.iterdir()) == [source, target]


def test_fields_that_mean_nothing_in_a_batch_are_refused_and_kv_is_heeded(tmp_path: Path, model: str) -> None:
    long = "abc " * 40
    lines: list[object] = [
        completion("urgent", "x", priority=-1),
        completion("soon", "x", deadline_s=2.0),
        chat("own", "x", admission="greedy"),
        completion("zero", "x", priority=0, admission=None),
        completion("usual", long, max_tokens=30),
        completion("rounded", long, max_tokens=30, kv="bfp(n=16)"),
    ]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    run(source, target, model, sort=True, kv_choices=("bfp(n=16)",))

    got = {line["custom_id"]: line["response"] for line in read(target)}
    assert [response["status_code"] for response in got.values()] == [400, 400, 400, 200, 200, 200]
    errors = [got[name]["body"]["error"] for name in ("urgent", "soon", "own")]
    assert [error["param"] for error in errors] == ["priority", "deadline_s", "admission"]
    assert "--admission" in errors[2]["message"]
    usual, rounded = (got[name]["body"]["choices"][0]["text"] for name in ("usual", "rounded"))
    assert usual != rounded


def test_sorting_keeps_every_line_and_a_broken_sort_changes_nothing(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = write(tmp_path / "in.jsonl", GOOD), tmp_path / "out.jsonl"
    run(source, target, model)
    unsorted = target.read_bytes()
    assert [line["custom_id"] for line in read(target)] != ["one", "two", "three", "four", "five"]

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputFailed, match="sort"):
        run(source, target, model, sort=True)
    monkeypatch.undo()
    assert target.read_bytes() == unsorted
    run(source, target, model, sort=True)

    assert [line["custom_id"] for line in read(target)] == ["one", "two", "three", "four", "five"]
    assert sorted(target.read_bytes().splitlines()) == sorted(unsorted.splitlines())


def test_the_order_and_a_small_cache_change_no_answer(tmp_path: Path, model: str) -> None:
    shared = "a document that every question reads again and again, " * 4
    lines: list[object] = [completion(f"{n}", f"{shared[: 60 * (1 + n % 3)]} question {n}") for n in range(24)]
    source, found = write(tmp_path / "in.jsonl", lines), list[dict[str, list[str]]]()
    for order, kv_bytes in (("planned", None), ("arrival", None), ("planned", 9 * 65536)):
        target = tmp_path / "out.jsonl"
        report = run(source, target, model, order=order, kv_bytes=kv_bytes, restart=True)
        assert report.forecast is not None
        found.append(texts(read(target)))
        if order == "planned":
            assert report.computed_tokens <= report.forecast.computed_tokens * 1.1

    assert found[0] == found[1] == found[2]


def test_a_failing_step_is_tried_again_request_by_request(tmp_path: Path, model: str) -> None:
    """A request that breaks the model does not take those with it that ran beside it."""
    poison = completion("poison", "@" * 40)
    source = write(tmp_path / "in.jsonl", [*GOOD, poison])

    def break_it(engine: Engine) -> None:
        executor = engine.parts.core.executor
        submit = executor.submit

        def failing(plan: Any) -> int:
            if any(row.tokens is not None and list(row.tokens)[:3] == [64, 64, 64] for row in plan.rows):
                raise ValueError("the model broke")
            return submit(plan)

        executor.submit = failing  # type: ignore[method-assign]

    report = run(source, tmp_path / "out.jsonl", model, BatchViewer(engine=break_it))
    answers = {line["custom_id"]: line["response"]["status_code"] for line in read(tmp_path / "out.jsonl")}

    assert (report.num_answered, report.num_failed) == (5, 1)
    assert answers.pop("poison") == 500
    assert set(answers.values()) == {200}


def test_a_forecast_writes_nothing(tmp_path: Path, model: str) -> None:
    source = write(tmp_path / "in.jsonl", [*GOOD, "{"])
    found, refused = forecast_batch(source, BatchOptions(model=model, memory=MEMORY))

    assert (found.num_prompts, refused) == (6, 1)
    assert found.new_tokens == 6 * 7
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_files_that_cannot_be_used_are_refused(tmp_path: Path, model: str) -> None:
    source = write(tmp_path / "in.jsonl", GOOD[:1])
    for wrong in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(RequestError):
            run(wrong, tmp_path / "out.jsonl", model)
    for target in (source, tmp_path / "no" / "out.jsonl"):
        with pytest.raises(ElbowroomError):
            run(source, target, model)
    assert read(source) == GOOD[:1]


def test_lines_are_found_again_by_number(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"first\n\n" + b"x" * 30 + b"\nfourth")
    lines = BatchInput(path, 10)

    assert list(lines.lines()) == [(1, b"first\n"), (3, None), (4, b"fourth")]
    assert [lines.read(number) for number in (4, 3, 1)] == [b"fourth", None, b"first\n"]
    lines.close()


def test_a_large_plan_is_taken_from_the_kv_cache(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, capacities = write(tmp_path / "in.jsonl", GOOD), list[int]()
    for small in (2**30, 0):
        monkeypatch.setattr("elbowroom.serve.batch.job._SMALL_PLAN_BYTES", small)
        report = run(source, tmp_path / "out.jsonl", model, restart=True)
        assert report.forecast is not None
        assert report.num_answered == 5
        capacities.append(report.forecast.kv_bytes)

    assert 0 < capacities[0] - capacities[1] < 100_000
