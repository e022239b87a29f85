"""What the page does, without the page: settings typed into a form become videos with records.

Each side of a comparison is a request of `infer.sample`, checked by the same code and made by the
same functions. Both have one prompt, seed and size, so that they start from the same noise.
"""

import queue
import secrets
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from configs.app import AppConfig
from configs.cli import INTERRUPTED, Run
from configs.command_line import preset_names
from configs.compose import compose_runs
from configs.schema import DISTINCT_SEEDS, RANDOM_SEED, SampleConfig
from infer.diff.records import VideoRecord, checked
from infer.gallery.records import text as text_of
from infer.loading import ModelCache, StageBars
from infer.machine import writable_folder
from infer.sample.generate import make_video
from infer.sample.jobs import read_jobs
from infer.sample.line import LINE
from infer.sample.prepare import prepare
from infer.sample.record import DONE, OutputFiles
from wan.errors import WanError, shortened, visible
from wan.files import read_sealed
from wan.models.attention import ATTENTION
from wan.settings import Kinds, check_kinds

MODELS_KEPT = 2  # loaded at a time: one for each side
HISTORY = 50  # videos that are listed
# The settings that a video of the history is shown with, and their kinds.
SHOWN: Kinds = {
    "checkpoint": (str,),
    "sampler.steps": (int,),
    "attention": (str,),
    "guidance_scale": (float, type(None)),
}
STAGES = {"encode": "reading the prompt", "denoise": "denoising", "decode": "decoding"}


@dataclass(frozen=True)
class Shared:
    """What both sides have in common; "" leaves an option to the model's own default."""

    prompt: str
    seed: str = "0"
    height: str = ""
    width: str = ""
    num_frames: str = ""
    allow_untrained: bool = False


@dataclass(frozen=True)
class Side:
    """The settings of one side.

    Attributes:
        steps: a number of steps, or several timesteps with commas between.
    """

    model: str = "mini"
    steps: str = ""
    attention: str = ""
    guidance: str = ""


@dataclass(frozen=True)
class State:
    """How far one side is.

    Attributes:
        text: the stage in words, or the error.
        done: share of the stage, from 0 to 1.
        left: seconds that the stage will still take; None if that is not known.
        step: denoising steps so far; the preview changes with it.
        preview, video, latents, record: files that are there.
        over: nothing more will happen; `failed` says how it ended.
    """

    text: str = "waiting"
    done: float = 0.0
    left: float | None = None
    step: int = 0
    preview: Path | None = None
    video: Path | None = None
    latents: Path | None = None
    record: Path | None = None
    over: bool = False
    failed: bool = False


@dataclass(frozen=True)
class Made:
    """A video of the history."""

    record: Path
    status: str
    prompt: str
    seed: int
    about: str
    video: Path | None
    seconds: float | None


def choices() -> tuple[list[str], list[str]]:
    """The models and the attentions that a form offers."""
    return preset_names("model"), list(ATTENTION)


def options_of(shared: Shared, side: Side, config: AppConfig) -> list[str]:
    """The request of one side, as it would be typed after `python -m infer.sample`."""
    given = {
        "model": side.model,
        "seed": shared.seed,
        "height": shared.height,
        "width": shared.width,
        "num_frames": shared.num_frames,
        "attention": side.attention,
        "guidance_scale": side.guidance,
        "device": config.device,
        "dtype": config.dtype,
        "offload": config.offload,
        "quantize": config.quantize,
    }
    steps = side.steps.strip().strip("[]").strip()
    if "," in steps:
        given["timesteps"] = f"[{steps}]"
    else:
        given["steps"] = steps
    typed = [f"{name}={value.strip()}" for name, value in given.items() if value.strip()]
    prompt = [f"prompt={shared.prompt}", f"output_dir={config.output_dir}"]
    return [*prompt, *typed, f"allow_untrained={str(shared.allow_untrained).lower()}"]


class Watch(StageBars):
    """Tells the page how far a video is, and stops it where the page asks for that."""

    def __init__(self, side: "SideRun", stop: threading.Event) -> None:
        super().__init__()
        self._side, self._stop = side, stop
        self._stage, self._began = "", 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Note how far a stage is.

        Raises:
            KeyboardInterrupt: the page asks to stop; what was reached is kept as after Ctrl-C.
        """
        if stage != self._stage:
            self._stage, self._began = stage, time.monotonic()
        spent = time.monotonic() - self._began
        self._side.tell(
            text=STAGES.get(stage, stage),
            done=done / max(total, 1),
            left=spent / done * (total - done) if done else None,
            **({"step": done} if stage == "denoise" else {}),
        )
        if self._stop.is_set():
            raise KeyboardInterrupt

    def close(self) -> None:
        pass


@dataclass
class SideRun:
    """One side while it is made; `told` gets its number whenever its state changes."""

    number: int
    run: Run[SampleConfig] | None
    told: "queue.Queue[int | None]"
    state: State = field(default_factory=State)
    files: OutputFiles | None = None

    def tell(self, **changes: Any) -> None:
        if self.files is not None and self.files.preview.exists():
            changes["preview"] = self.files.preview
        self.state = replace(self.state, **changes)
        self.told.put(self.number)

    def begin(self, files: OutputFiles) -> None:
        self.files = files
        self.tell(record=files.record)

    def fail(self, text: str) -> None:
        self.tell(text=text, left=None, over=True, failed=True)


class Studio:
    """Runs, one at a time, on models that stay loaded between them."""

    def __init__(self, config: AppConfig) -> None:
        self.config = config
        self.output = writable_folder(config.output_dir).resolve()
        self._models: dict[str, ModelCache] = {}  # by preset, the last used one last
        self._busy = threading.Lock()
        self._stop = threading.Event()

    def cancel(self) -> None:
        """Stop the run after the step at hand; what it reached is kept."""
        self._stop.set()

    def generate(self, shared: Shared, sides: Sequence[Side]) -> Iterator[list[State]]:
        """Make a video for each side; yields the state of all sides whenever one changes.

        The options of all sides are checked before the first one is made, and what a model cannot
        do before its weights are read. Errors are states, not exceptions. A random seed is drawn
        once, so that both sides still start from the same noise.
        """
        seed = secrets.randbelow(DISTINCT_SEEDS - 1)
        told: queue.Queue[int | None] = queue.Queue()
        runs = [SideRun(number, None, told) for number in range(len(sides))]
        if not self._busy.acquire(blocking=False):
            yield [State("another run is still at work", over=True, failed=True) for _ in sides]
            return
        thread: threading.Thread | None = None
        try:
            self._stop.clear()
            for one, side in zip(runs, sides, strict=True):
                try:
                    options = [*options_of(shared, side, self.config), "preview=true"]
                    (run,) = compose_runs(LINE, options)
                    drawn = run.config.seed == RANDOM_SEED
                    one.run = with_seed(run, seed) if drawn else run
                    read_jobs(one.run.config, one.run.sources)
                except (WanError, OSError) as error:
                    one.fail(one_line(error))
            if not any(one.state.failed for one in runs):
                thread = threading.Thread(target=self._work, args=(runs, sides), daemon=True)
                thread.start()
                while told.get() is not None:
                    yield [one.state for one in runs]
            yield [one.state for one in runs]
        finally:
            if thread is not None:
                self.cancel()  # a page that was closed leaves no work behind
                thread.join()
            self._busy.release()

    def _work(self, runs: Sequence[SideRun], sides: Sequence[Side]) -> None:
        try:
            for one, side in zip(runs, sides, strict=True):
                if self._stop.is_set():
                    one.fail("stopped before it began")
                    continue
                try:
                    self._make(one, side)
                except (WanError, OSError) as error:
                    one.fail(one_line(error))
                except Exception as error:  # a page must say so too
                    one.fail(f"{type(error).__name__}: {one_line(error)}")
        finally:
            runs[0].told.put(None)

    def _make(self, one: SideRun, side: Side) -> None:
        assert one.run is not None
        one.tell(text="loading the model")
        jobs = read_jobs(one.run.config, one.run.sources)
        notes: list[str] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            session = self._prepared(one.run, jobs, side.model)
            notes += [one_line(w.message) for w in caught if isinstance(w.message, UserWarning)]
        (request,) = session.requests
        watch = Watch(one, self._stop)
        story = make_video(session, request, request.config.seed, watch, one.begin)
        files, record = story.files, story.record
        one.tell(
            text="; ".join([outcome(story.code, record), *notes]),
            done=1.0,
            left=None,
            over=True,
            failed=story.code not in (0, INTERRUPTED),
            video=files.video if files.video.exists() else None,
            latents=files.latents if files.latents.exists() else None,
            record=files.record,
        )

    def _prepared(self, run: Run[SampleConfig], jobs: Any, model: str) -> Any:
        """The session of a side; where memory is short, other models make room for its own.

        Raises:
            WanError: see `prepare`; nothing of the model was loaded if it does not fit.
        """
        cache = self._models.pop(model, None) or ModelCache()
        while len(self._models) >= MODELS_KEPT:
            del self._models[next(iter(self._models))]
        try:
            session = prepare(run, jobs, cache)
        except WanError:
            if not self._models:
                raise
            self._models.clear()
            session = prepare(run, jobs, cache)
        self._models[model] = cache
        return session

    def history(self) -> list[Made]:
        """The newest `HISTORY` videos of the output folder, the newest first."""
        found = []
        for path in sorted(self.output.glob("[0-9]*_s[0-9]*.json"), reverse=True):
            try:
                found.append(made(path))
            except (WanError, OSError):
                continue  # damaged, or not a record: `infer.diff` would say so
            if len(found) == HISTORY:
                break
        return found


def with_seed(run: Run[SampleConfig], seed: int) -> Run[SampleConfig]:
    """A run whose seed was drawn; its record says so."""
    source = f"random (seed={RANDOM_SEED})"
    config = replace(run.config, seed=seed)
    return replace(run, config=config, sources=run.sources | {"seed": source})


def outcome(code: int, record: dict[str, Any]) -> str:
    """How a video ended, in words."""
    if code == INTERRUPTED:
        return f"stopped after {record['steps_done']} steps; the latents are kept"
    if code:
        return str(record["status"]).removeprefix("failed: ")
    return f"done in {record['seconds']['total']:.1f} s"


def made(path: Path) -> Made:
    """A line of the history from a record, which may be a stranger's.

    Raises:
        OSError: there is no such file.
        WanError: it is no record, or damaged.
    """
    record = VideoRecord(path, checked(read_sealed(path), path), path)
    values, settings = record.values, record.settings
    check_kinds(settings, SHOWN, str(path), ("checkpoint", "sampler.steps", "attention"))
    times = values.get("seconds", {})
    check_kinds(times, {"total": (float,)}, str(path))
    about = [settings["checkpoint"], f"{settings['sampler.steps']} steps", settings["attention"]]
    if (guidance := settings.get("guidance_scale")) not in (None, 1.0):
        about.append(f"guidance {text_of(guidance)}")
    name = (values.get("video") or {}).get("file")
    video = path.parent / Path(str(name)).name
    return Made(
        path,
        str(values.get("status", DONE)),
        values["prompt"],
        values["seed"],
        ", ".join(about),
        video if name and video.is_file() else None,
        times.get("total"),
    )


def one_line(error: Any) -> str:
    """An error as commands print it."""
    text = error.on_command_line if isinstance(error, WanError) else str(error)
    return " ".join(shortened(visible(text)).split())
