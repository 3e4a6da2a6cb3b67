"""The `tprune` command: a group whose commands are imported only when they are called."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import click

COMMANDS = {
    "vit": "Prune the patch tokens of a vision transformer.",
    "vlm": "Prune the visual tokens of a vision-language model.",
    "llm-context": "Prune a language model's prompt tokens and its key-value cache.",
    "llm-weights": "Prune a language model's weights, heads, channels or blocks.",
    "run": "Run a recipe.",
    "sweep": "Compare methods over budgets: a table, plots, a page.",
    "search": "Find the best method and budget under a constraint.",
    "tune": "Find a method's best hyperparameters at one budget.",
    "search-metric": "Evolve a metric to prune a language model's weights by.",
    "predict-recovery": "Foretell how training recovers a pruned model.",
    "compare": "Say how two results differ, protocol first.",
    "methods": "List the methods, or say all about one.",
    "show": "Say what an output folder holds.",
    "eval": "Measure an output folder or a model again, from disk.",
    "bench": "Time dense and pruned models in turn.",
    "zoo": "List and train the built-in models.",
}


class Lazy(click.Group):
    """A group that knows its commands' names and one-line helps, and imports a command to run it."""

    def list_commands(self, context: click.Context) -> list[str]:
        """All names, in the order people look for them."""
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The command's own object."""
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"tprune.commands.{name.replace('-', '_')}").command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in `--help`, without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="tprune")
def command() -> None:
    """Prune transformers: tokens, caches, weights, structure; every method under the same budget.

    \b
      tprune vit --method zero-tprune --keep 0.65 digits-vit
      tprune llm-weights --method wanda --sparsity 0.5 smollm2-135m
      tprune methods
    """


THREADING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
"""On small busy machines OpenMP threads that spin against each other lose more than half their speed."""


def called(words: Sequence[str]) -> str:
    """The command that a command line's `words` call, as its user writes it."""
    found: click.Command | None = command
    path = "tprune"
    for word in words:
        found = found.get_command(click.Context(found), word) if isinstance(found, click.Group) else None
        if found is None:
            break
        path = f"{path} {word}"
    return path


def said(error: click.ClickException, words: Sequence[str]) -> str:
    """What Click found wrong with `words`, in one line as every other mistake, where Click itself takes four."""
    context, message = getattr(error, "ctx", None), error.format_message()
    if context is not None and message == context.get_help():
        return message
    message = " ".join(message.split())
    # Of an option that lacks its value Click does not say whose it is.
    path = called(words) if context is None else context.command_path
    return f"error: {message[0].lower()}{message[1:].rstrip('.')}; see {path} --help"


def main() -> None:
    """The console script: a user's mistake is one line on stderr and exit code 2, anything else 1."""
    from tprune.errors import UserError
    from tprune.models.memory import keep_freed

    keep_freed()
    for name, value in THREADING.items():
        # OpenMP reads these when torch is loaded, which only happens inside a command.
        os.environ.setdefault(name, value)
    if "RANK" in os.environ:
        # Each of the processes that fit together would warn of gradients that it looked for and all found.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        command(prog_name="tprune", standalone_mode=False)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.Abort:
        click.echo("interrupted", err=True)
        sys.exit(1)
    except click.ClickException as error:
        click.echo(said(error, sys.argv[1:]), err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
