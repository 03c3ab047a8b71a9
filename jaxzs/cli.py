"""The command line: `jaxzs COMMAND`. Each command is a typed options class and a function that runs it.

Nothing heavy is imported before a command is known, so that `jaxzs --help` answers at once.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxzs._version import __version__
from jaxzs.commands import FAILED, FINISHED, INTERRUPTED, terminal


class Command(NamedTuple):
    """A command and what it is for. Where it lives follows from its name: `jaxzs.commands.NAME.run(NameOptions)`."""

    name: str
    help: str

    @property
    def module(self) -> str:
        return f"jaxzs.commands.{self.name}"

    @property
    def options(self) -> str:
        return f"{self.name.title()}Options"

    @property
    def run(self) -> str:
        return "run"


_PURPOSES = {
    "demo": "see all three families at work, offline, on images that come with the package",
    "classify": "label the images of a folder, zero-shot or with proxies learned from them",
    "tune": "tune textual, visual or joint prompts on few labels and pseudolabels",
    "tag": "find every class that is seen in each image, and where, without training",
    "segment": "label every pixel of each image, from tags that are found or given, without training",
    "extract": "encode images once into a feature store that every method reads",
    "evaluate": "measure many models, data sets, settings and methods in one table",
    "report": "make tables and plots of the records of runs, published numbers beside",
    "datasets": "list the data sets whose class names and templates are known, or show one",
    "convert": "read a checkpoint of any layout and write it as another one",
    "app": "open a page in the browser that does this with images dropped into it",
    "bench": "measure how fast this machine runs each part",
}
COMMANDS = {name: Command(name, purpose) for name, purpose in _PURPOSES.items()}


# tyro's own flag, but each command is a parser of its own: only here are all of them known.
_COMPLETION = "--tyro-print-completion"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0 finished; 1 finished, but some inputs could not be used (they are listed); 2 wrong input; 130 interrupted
    (what is kept is said).
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        terminal.say(_overview())
        return FINISHED
    if arguments[0] in ("-V", "--version"):
        terminal.say(f"jaxzs {__version__}")
        return FINISHED
    name, *rest = arguments
    if name not in COMMANDS and name != _COMPLETION:
        return _unknown(name)
    try:
        if name == _COMPLETION:
            return _completion(arguments)
        with _warnings_as_notices(name, quiet="--quiet" in rest):  # options are not parsed yet
            return _run(name, rest)
    except SystemExit as stop:  # tyro has answered --help, or has named a wrong option
        return stop.code if isinstance(stop.code, int) else FAILED
    except BrokenPipeError:  # the reader of our output went away, e.g. `| head`
        sys.stderr.close()  # else Python tells of the broken pipe when it ends
        return FINISHED
    except KeyboardInterrupt as stop:
        kept = stop.args[0] if stop.args else "nothing is kept"  # what `Run.measured` has said
        terminal.warn(f"\njaxzs {name}: interrupted; {kept}")
        return INTERRUPTED
    except Exception as error:
        message = terminal.explained(error)
        if message is None:
            raise
        terminal.warn(f"jaxzs {name}: {message}")
        return FAILED


def _unknown(name: str) -> int:
    import difflib

    close = difflib.get_close_matches(name, COMMANDS, n=1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    terminal.warn(f"jaxzs: no command {name!r}; {meant}one of {', '.join(COMMANDS)}")
    return FAILED


@contextlib.contextmanager
def _warnings_as_notices(name: str, *, quiet: bool) -> Iterator[None]:
    """Warnings of the library in one line, without the place in its source; none with --quiet."""

    def show(message: Warning | str, *_: object) -> None:
        if not quiet:
            terminal.warn(f"jaxzs {name}: note: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _run(name: str, arguments: list[str]) -> int:
    import tyro

    from jaxzs.commands.computing import computing

    # Read only now: `jaxzs --help`, and every other command, do without this one's imports.
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    options = tyro.cli(
        getattr(module, command.options),
        args=arguments,
        prog=f"jaxzs {name}",
        description=command.help[0].upper() + command.help[1:] + ".",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    with contextlib.ExitStack() as around:
        around.enter_context(terminal.ticking())
        with terminal.clock("starting", disable=options.no_progress):
            around.enter_context(computing(options))  # imports jax
        return getattr(module, command.run)(options)


def _completion(arguments: list[str]) -> int:
    """`jaxzs --tyro-print-completion bash|zsh` prints a script for the shell, with every command and its options."""
    import tyro

    options = {name: getattr(importlib.import_module(one.module), one.options) for name, one in COMMANDS.items()}
    try:
        tyro.extras.subcommand_cli_from_dict(
            options, prog="jaxzs", args=arguments, config=(tyro.conf.FlagCreatePairsOff,)
        )
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else FINISHED
    return FINISHED


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: jaxzs COMMAND [options]      jaxzs COMMAND --help",
            "",
            "Get the most out of CLIP without labels.",
            "",
            *lines,
            "",
            "Everything runs offline on the embedded demo checkpoint; with --model a HuggingFace CLIP,",
            "e.g. --model openai/clip-vit-base-patch32, or a folder with one.",
            "",
            "Completion of commands and options: jaxzs --tyro-print-completion bash (or zsh) > FILE; source FILE",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
