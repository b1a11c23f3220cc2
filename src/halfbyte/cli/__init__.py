"""The command line: one file per verb; each parses, calls the pipeline or one step, and prints.

It owns words and exit codes at the terminal; importing it loads neither torch nor transformers.
"""

from __future__ import annotations


def main() -> None:
    """Entry point of the command `halfbyte`."""
    from halfbyte.cli.app import call

    call()
