"""Show the videos of a folder side by side on one page.

    python -m infer.gallery outputs
    python -m infer.gallery runs/sweep title="4, 8 and 20 steps"

Reads the records that infer.sample wrote beside its videos, in folders inside the folder too, and
writes index.html there. The page opens in a browser without a server: clips play in step, rows and
columns are chosen from the settings that vary, and each clip has the command that makes it again.
Nothing else is written, and PyTorch is not needed.
"""

import sys

from configs.cli import Run, run
from configs.command_line import CommandLine
from configs.gallery import GalleryConfig
from infer.gallery.page import write_page
from infer.gallery.records import find_records, page_of
from wan.errors import WanError
from wan.files import expanded

LINE = CommandLine(
    GalleryConfig, "gallery", text_keys=("title",), path_keys=("folder",), words=("folder",)
)


def main(run: Run[GalleryConfig]) -> None:
    config = run.config
    folder = expanded(config.folder)
    if not folder.is_dir():
        raise WanError(f"folder={config.folder}: no such folder")
    records = find_records(folder)
    if not records:
        raise WanError(
            f"{folder}: no record of infer.sample in it; it writes one beside each video"
        )
    page = page_of(records, folder, config.title or folder.resolve().name)
    write_page(folder / "index.html", page)
    print(folder / "index.html")
    print(f"{len(page.clips)} clips", file=sys.stderr)


if __name__ == "__main__":
    run(main, LINE, __doc__ or "")
