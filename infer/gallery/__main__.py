"""Show the videos of a folder side by side on one page.

    python -m infer.gallery outputs
    python -m infer.gallery runs/sweep title="4, 8 and 20 steps"

Reads the records that infer.sample wrote beside its videos, in folders inside the folder too, and
writes gallery.html there. The page opens in a browser without a server: clips play in step, rows
and columns are chosen from the settings that vary, and each clip has the command that makes it
again. Nothing else is written, and PyTorch is not needed.
"""

import sys

from configs.cli import Run, run
from configs.command_line import CommandLine
from configs.gallery import GalleryConfig
from configs.progress import doing
from infer.gallery.page import write_page
from infer.gallery.records import find_records, page_of
from wan.errors import WanError
from wan.files import expanded

LINE = CommandLine(
    GalleryConfig, "gallery", text_keys=("title",), path_keys=("folder",), words=("folder",)
)
PAGE = "gallery.html"  # a report's page in that folder is index.html


def main(run: Run[GalleryConfig]) -> None:
    config = run.config
    folder = expanded(config.folder)
    if not folder.is_dir():
        what = "a file, not a folder" if folder.exists() else "no such folder"
        raise WanError(f"folder={config.folder}: {what}")
    with doing("reading the records"):
        records = find_records(folder)
    if not records:
        raise WanError(
            f"{folder}: no record of infer.sample in it; it writes one beside each video"
        )
    with doing("writing the page"):
        page = page_of(records, folder, config.title or folder.resolve().name)
        write_page(folder / PAGE, page)
    print(folder / PAGE)
    print(f"{len(page.clips)} clips", file=sys.stderr)


if __name__ == "__main__":
    run(main, LINE, __doc__ or "")
