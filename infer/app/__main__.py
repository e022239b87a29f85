"""Serve a local page for experiments with prompts and settings.

    python -m infer.app
    python -m infer.app device=cuda offload=stage output_dir=trials
    python -m infer.app port=8000

Two settings can be compared side by side, from the same noise. The page shows a preview after each
step and the time that is left, and lists what was made before. Models stay loaded between
runs. Everything lands in output_dir with its record, as from infer.sample. It listens at 127.0.0.1
unless host= says otherwise, and serves no file outside output_dir. It needs the extra `app`:
pip install -e ".[app]". Ctrl-C ends it.
"""

import importlib.util

from configs.app import AppConfig
from configs.cli import Run, run
from configs.command_line import CommandLine
from configs.progress import loading_pytorch
from infer.processes import Processes
from wan.errors import WanError

LINE = CommandLine(AppConfig, "app", text_keys=(), path_keys=("output_dir",))


def main(run: Run[AppConfig]) -> None:
    if Processes.started().size > 1:
        raise WanError("infer.app serves one page from one process: start it without torchrun")
    if importlib.util.find_spec("gradio") is None:
        raise WanError('infer.app needs gradio: pip install -e ".[app]"')
    with loading_pytorch():
        from infer.app.page import serve
        from infer.app.studio import Studio
    serve(Studio(run.config), run.config)


if __name__ == "__main__":
    run(main, LINE, __doc__ or "")
