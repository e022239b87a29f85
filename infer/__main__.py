"""The list of the commands: `python -m infer`."""

import sys
from pathlib import Path

from configs.command_list import list_commands

if __name__ == "__main__":
    sys.exit(list_commands(Path(__file__).parent, sys.argv[1:]))
