"""The page: fields, buttons and two places for HTML. What they do is in `infer.app.studio`."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

# Before gradio is imported, which reads them once: nothing is reported to anybody.
os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
import gradio as gr

from configs.app import AppConfig
from infer.app.cards import STYLE, history_cards, side_cards
from infer.app.studio import Shared, Side, Studio, choices
from wan.errors import WanError

FONTS = ["system-ui", "sans-serif"]  # those of the machine: none is fetched
TITLE = "wan-few-step"
DEFAULT = "default"  # what an empty field stands for
EXAMPLE = "a large red circle moving right on a gray background"


def link(path: Path) -> str:
    """The address at which gradio serves a file of the output folder."""
    return "/gradio_api/file=" + quote(os.fsencode(path.resolve()))


def build(studio: Studio) -> gr.Blocks:
    """The page of a studio."""
    models, names = choices()
    attentions = [(DEFAULT, ""), *((name, name) for name in names)]

    def side_fields(name: str) -> list[Any]:
        with gr.Column(min_width=280), gr.Group():
            with gr.Row():
                model = gr.Dropdown(models, value="mini", label=f"{name}: model", min_width=120)
                attention = gr.Dropdown(
                    attentions, value="", label=f"{name}: attention", min_width=120
                )
            with gr.Row():
                steps = gr.Textbox(
                    "", label=f"{name}: steps, or timesteps", placeholder=DEFAULT, min_width=120
                )
                guidance = gr.Textbox(
                    "", label=f"{name}: guidance", placeholder=DEFAULT, min_width=120
                )
        return [model, steps, attention, guidance]

    def generate(*values: Any) -> Iterator[tuple[str, str]]:
        typed, seed, height, width, frames = map(text, values[:5])
        shared = Shared(typed, seed, height, width, frames, allow_untrained=bool(values[5]))
        compared = bool(values[6])
        sides = [Side(*map(text, values[7:11])), Side(*map(text, values[11:15]))]
        sides = sides if compared else sides[:1]
        names = ["A", "B"][: len(sides)]
        for states in studio.generate(shared, sides):
            yield side_cards(states, names, link), gr.skip()
        yield side_cards(states, names, link), history_cards(studio.history(), link)

    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        prompt = gr.Textbox(EXAMPLE, label="prompt", lines=1, elem_id="prompt")
        with gr.Row():
            common = [
                gr.Textbox(value, label=label, placeholder=DEFAULT, min_width=120)
                for label, value in (("seed", "0"), ("height", ""), ("width", ""), ("frames", ""))
            ]
        with gr.Row():
            untrained = gr.Checkbox(False, label="let a student do what it was not trained for")
            compare = gr.Checkbox(
                False, label="compare two settings from the same noise", elem_id="compare"
            )
        with gr.Row():
            first = side_fields("A")
            with gr.Row(visible=False) as other:
                second = side_fields("B")
        with gr.Row():
            start = gr.Button("generate", variant="primary", elem_id="generate")
            stop = gr.Button("stop and keep what there is", elem_id="stop")
        result = gr.HTML(elem_id="result")
        with gr.Accordion("made so far", open=True):
            history = gr.HTML(elem_id="history")
        compare.change(lambda shown: gr.Row(visible=shown), compare, other)
        start.click(
            generate,
            [prompt, *common, untrained, compare, *first, *second],
            [result, history],
            show_progress="hidden",
            concurrency_limit=4,  # a second run is told that one is at work
        )
        stop.click(studio.cancel, None, None, queue=False)
        page.load(lambda: history_cards(studio.history(), link), None, history)
    return page


def text(value: Any) -> str:
    return "" if value is None else str(value)


def serve(studio: Studio, config: AppConfig, wait: bool = True) -> gr.Blocks:
    """Serve the page until Ctrl-C, or in other threads without `wait`.

    Raises:
        WanError: the address or the port cannot be used.
    """
    ipv6 = ":" in config.host
    try:
        family = socket.AF_INET6 if ipv6 else socket.AF_INET
        with socket.create_server((config.host, config.port), family=family):
            pass
    except OSError as error:
        raise WanError(
            f"host={config.host} port={config.port}: {error.strerror}; give another port=, or as "
            "host= an address of this machine"
        ) from error
    host = f"[{config.host}]" if ipv6 else config.host  # as in an address of the web
    page = build(studio)
    page.queue()
    page.launch(
        server_name=host,
        server_port=config.port,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        allowed_paths=[str(studio.output)],
        max_file_size=0,  # nothing is uploaded
        css=STYLE,
        theme=gr.themes.Base(font=FONTS, font_mono=["monospace"]),
    )
    print(f"http://{host}:{config.port} shows the page; Ctrl-C ends it", flush=True)
    if wait:
        page.block_thread()
    return page
