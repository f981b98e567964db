"""``elbowroom run``: answer prompts inside a memory budget and show where the bytes went."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from elbowroom.commands.options import KV, Dtype, Json, Memory, Model, Progress, Relief, Store

if TYPE_CHECKING:
    from elbowroom.commands.questions import Answers
    from elbowroom.commands.report import RunReport


def run(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="One or more prompts; - reads stdin.")],
    model: Model = None,
    memory: Memory = "80%",
    kv: KV = "plain",
    kv_relief: Relief = None,
    kv_store: Store = "paged",
    dtype: Dtype = "auto",
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Most new tokens of each answer.")] = 48,
    temperature: Annotated[float, typer.Option(metavar="T", help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Repeats a sampling.", show_default=False)] = None,
    file: Annotated[
        str | None,
        typer.Option(metavar="DOC", help="Text put in front of every prompt and read once.", show_default=False),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help="Use the chat template; by default if there is one.", show_default=False),
    ] = None,
    json: Json = False,
    progress: Progress = None,
) -> None:
    """Answer prompts, then show the memory budget and who used it.

    Several prompts share what they begin with: a text given by --file is read once, and every prompt is asked in its
    own fork of that context.
    """
    from elbowroom.commands.questions import answer, encode_prompts, read_document, read_prompts
    from elbowroom.commands.report import RunReport
    from elbowroom.commands.terminal import progress_bar, wants_progress
    from elbowroom.models.directory import find_model, read_ahead

    texts, document, shown = read_prompts(prompts), read_document(file), wants_progress(progress)
    read_ahead(find_model(model))
    begin = time.perf_counter()
    from elbowroom.engine.llm import LLM
    from elbowroom.engine.sampling_params import SamplingParams

    imports_s = time.perf_counter() - begin
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    with progress_bar("loading", shown, in_bytes=True) as bar:
        llm = LLM(model, memory, kv, dtype, kv_relief=kv_relief, kv_store=kv_store, progress=bar)
    with llm:
        ids = encode_prompts(llm.tokenizer, document, texts, chat)
        with progress_bar("answering", shown) as bar:
            answers = answer(llm, ids, sampling, bar)
        report = RunReport.of(llm.engine, answers.ttft_s, imports_s)
    if json:
        _print_json(answers, report)
    else:
        _print_text(texts, answers)
        report.print()


def _print_text(prompts: list[str], answers: Answers) -> None:
    for prompt, output in zip(prompts, answers.outputs, strict=True):
        text = output.outputs[0].text
        typer.echo(text if len(prompts) == 1 else f"{prompt}\n  {text.strip()}")


def _print_json(answers: Answers, report: RunReport) -> None:
    from elbowroom.commands.terminal import print_json

    samples = [output.outputs[0] for output in answers.outputs]
    texts = [sample.text for sample in samples]
    shown = {"text": texts[0]} if len(texts) == 1 else {"text": "\n".join(texts), "texts": texts}
    print_json(
        {
            **shown,
            "prompt_tokens": answers.prompt_tokens,
            "generated_tokens": sum(len(sample.token_ids) for sample in samples),
            "finish_reason": samples[0].finish_reason,
            **({} if len(samples) == 1 else {"finish_reasons": [sample.finish_reason for sample in samples]}),
            **report.to_json(),
        }
    )
