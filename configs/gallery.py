"""The settings of `python -m infer.gallery`."""

from dataclasses import dataclass

from configs.schema import Options, option


@dataclass
class GalleryConfig(Options):
    """`python -m infer.gallery`: one page of all videos in a folder, from their records."""

    folder: str = option("outputs", "where infer.sample wrote; folders in it are looked at too")
    title: str | None = option(None, "what stands at the top of the page; none: the folder's name")
