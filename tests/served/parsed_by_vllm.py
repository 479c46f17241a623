"""Reads commands as `vllm serve` does, without starting anything, and writes what it understood.

Runs in the environment of `make_environment.sh`: `python parsed_by_vllm.py COMMAND ...`, each a JSON list of
words that begins with vllm, serve. An unknown flag ends it.
"""

from __future__ import annotations

import json
import sys

from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser


def main(commands: list[str]) -> None:
    """Parse and write."""
    parser = make_arg_parser(FlexibleArgumentParser())
    found = []
    for command in commands:
        words = parser.parse_args(json.loads(command)[2:])
        found.append({"model": words.model_tag, "dtype": words.dtype, "draft": words.speculative_config})
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
