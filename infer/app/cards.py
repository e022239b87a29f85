"""States and videos as HTML. Whatever people typed is escaped."""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from configs.progress import duration
from infer.app.studio import Made, State

Link = Callable[[Path], str]  # file -> its address on the page

STYLE = """
.sides, .made {display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr))}
.card {border: 1px solid #8886; border-radius: 8px; padding: .75rem; min-width: 0}
.card video, .card img {width: 100%; max-height: 50vh; object-fit: contain; border-radius: 4px;
  background: #8882; image-rendering: auto}
.card progress {width: 100%; margin: .5rem 0}
.card p {margin: .25rem 0; overflow-wrap: anywhere}
.failed {color: #c22}
.small {font-size: .85em; opacity: .8}
footer {display: none !important}
"""


def side_cards(states: Sequence[State], names: Sequence[str], link: Link) -> str:
    """The sides next to each other; on a narrow page below each other."""
    cards = [side_card(state, name, link) for state, name in zip(states, names, strict=True)]
    return f'<div class="sides">{"".join(cards)}</div>'


def side_card(state: State, name: str, link: Link) -> str:
    parts = [f"<b>{escape(name)}</b>"]
    if state.video is not None:
        parts.append(player(state.video, link))
    elif state.preview is not None:  # another address after each step, so that it is loaded again
        alt = f"what step {state.step} predicts"
        parts.append(f'<img src="{link(state.preview)}?step={state.step}" alt="{alt}">')
    left = "" if state.left is None else f", {duration(state.left)} left"
    kind = ' class="failed"' if state.failed else ""
    parts.append(f"<p{kind}>{escape(state.text)}{left}</p>")
    if not state.over:
        parts.append(f'<progress value="{state.done:.3f}" max="1"></progress>')
    files = [("record", state.record), ("latents", state.latents)]
    links = [f'<a href="{link(path)}" target="_blank">{n}</a>' for n, path in files if path]
    parts.append(f'<p class="small">{" · ".join(links)}</p>')
    return f'<div class="card">{"".join(parts)}</div>'


def player(video: Path, link: Link) -> str:
    return f'<video src="{link(video)}" controls loop autoplay muted playsinline></video>'


def history_cards(videos: Sequence[Made], link: Link) -> str:
    """All videos, the newest first; one is loaded when it is played."""
    if not videos:
        return "<p>Nothing has been made here so far.</p>"
    return f'<div class="made">{"".join(made_card(video, link) for video in videos)}</div>'


def made_card(video: Made, link: Link) -> str:
    took = "" if video.seconds is None else f", {video.seconds:.1f} s"
    shown = f"<p>{escape(video.status)}</p>"
    if video.video is not None:
        shown = f'<video src="{link(video.video)}" controls loop muted preload="metadata"></video>'
    return (
        f'<div class="card">{shown}<p>{escape(video.prompt)}</p>'
        f'<p class="small">{escape(video.about)}, seed {video.seed}{took}</p>'
        f'<p class="small"><a href="{link(video.record)}" target="_blank">record</a></p></div>'
    )
