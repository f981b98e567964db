"""The command line: one file a subcommand, its docstring is the help.

This package imports neither torch nor any other room before a command needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from elbowroom import __version__
from elbowroom.commands import batch, bench, calibrate, compare, doctor, evaluate, run, serve
from elbowroom.errors import ElbowroomError

# typer exports no base class of its usage errors; BadParameter derives from UsageError, which derives from it.
_USAGE_BASE: type[Exception] = typer.BadParameter.__mro__[2]
INTERRUPTED = 130
"""Exit code after Ctrl-C."""

app = typer.Typer(
    name="elbowroom",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command("run")(run.run)
app.command("serve")(serve.serve)
app.command("batch")(batch.batch)
app.add_typer(evaluate.app, name="eval")
app.command("compare")(compare.compare)
app.command("calibrate")(calibrate.calibrate)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Run and serve language models inside a stated memory budget."""
    if version:
        typer.echo(f"elbowroom {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def invoke(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; errors are printed on stderr, never raised."""
    try:
        code = app(list(arguments), prog_name="elbowroom", standalone_mode=False)
        sys.stdout.flush()
    except ElbowroomError as error:
        return _complain(error.message, error.hint, error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return 1
    except _USAGE_BASE as error:
        return _complain(error.format_message(), _usage_hint(error), getattr(error, "exit_code", 2))  # type: ignore[attr-defined]
    return code if isinstance(code, int) else 0


def main() -> None:
    """Run the command line of this process and exit."""
    sys.exit(invoke(sys.argv[1:]))


def _complain(message: str, hint: str | None, code: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    if hint:
        sys.stderr.write(f"hint: {hint}\n")
    return code


def _usage_hint(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f"see {'elbowroom' if context is None else context.command_path} --help"


def _discard_output() -> None:
    """Nobody reads stdout any more: let the interpreter flush into nothing when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
