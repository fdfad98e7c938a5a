"""`metaft COMMAND ...`, the same as `python -m metaft.COMMAND ...`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from metaft._version import __version__
from metaft.errors import no_such
from metaft.support.output import of_command

COMMANDS = {
    "meta_train": "learn an initialisation from few-shot episodes",
    "evaluate": "meta-test a finished run",
    "choose": "rank what your images could begin with",
    "adapt": "fine-tune an initialisation to your images",
    "search": "try settings of adapt or meta_train, and keep the best",
    "compare": "put finished runs beside one another",
    "predict": "label images with what adapt made",
    "look": "make a page of pictures and tables on a run or a start",
    "compress": "make what adapt made smaller and faster",
    "export": "write what adapt made as a file that runs without metaft",
}


@of_command()
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: the command's own; 2 for a command that does not exist."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: metaft COMMAND [options]    (metaft COMMAND --help lists a command's options)\n")
        for name, does in COMMANDS.items():
            print(f"  {name:<12}{does}")
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    name = argv[0].replace("-", "_")
    if name not in COMMANDS:
        print(
            f"metaft: error: {no_such('command', argv[0], COMMANDS, near=name)}",
            file=sys.stderr,
        )
        return 2
    # A command is imported only when it is called: none should wait for another's libraries.
    return importlib.import_module(f"metaft.{name}").main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
