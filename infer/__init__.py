"""Commands that run the models."""

import os.path
import sys

if sys.argv[:1] == ["-m"]:  # `python -m` is looking for a command; nothing happens in a library
    # Where the user stands may lie a configs/ or a train.py of their own.
    if not sys.flags.safe_path and sys.path[0] != os.path.dirname(os.path.dirname(__file__)):
        del sys.path[0]
    from configs.start import begin

    begin()
