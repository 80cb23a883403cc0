"""The `flashcore` command. One file a subcommand; this one only puts them together and turns errors into exit codes."""

import sys

import typer
from rich.console import Console

from flashcore.errors import FlashCoreError

app = typer.Typer(
    name="flashcore",
    help="Fused attention kernels: what this machine can run, how right it is and how fast.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; an error that FlashCore raises on purpose becomes one line on stderr and exit code 2."""
    from flashcore.cli import bench, debug, evidence, explain, info, inspect, ladder, profile, search, verify

    for command in (info, explain, bench, ladder, debug, profile, search, verify, inspect, evidence):
        command.register(app)
    try:
        app()
    except FlashCoreError as error:
        Console(stderr=True).print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
