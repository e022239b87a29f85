"""Damaged and hostile files against everything that reads one; run `python tests/fuzz.py --help`.

Each case damages one file of a small model, of a LoRA or of a list of prompts, and gives it to the
public function that reads it. Allowed are two ends: a `WanError` with a short, printable message,
or a result. A result of a safetensors file must be what the safetensors library reads.

Cases run in a child process. It has a limit on its memory, and a clock that kills it at a case that
takes too long, also inside a library. So a crash, a hang and a flood each name their case, and
`--only NUMBER` runs that one alone.
"""

import argparse
import faulthandler
import json
import os
import random
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from PIL import Image
from test_pipeline import build, write_tokenizer

from configs.cli import Run, execute
from configs.rerun import RerunConfig
from configs.schema import SampleConfig, SamplerConfig
from infer.diff.compare import compare
from infer.diff.records import read_record
from infer.rerun.request import job_of
from infer.sample.__main__ import LINE, SampleCommand
from infer.sample.jobs import read_jobs
from train.checkpoint import MANIFEST, load_latest, save_checkpoint
from train.clips import listed_clips
from train.data import INDEX, REPORT, folder_cache
from train.metrics import MetricsLog, read_metrics
from train.preprocess import __main__ as preprocess
from wan.errors import MAX_MESSAGE, WanError, visible
from wan.files import read_sealed, unsealed, write_sealed
from wan.lora.files import read_lora
from wan.media.images import load_image
from wan.media.video import read_video
from wan.models.tokenizer import Tokenizer
from wan.pipeline.pipeline import WanDMDPipeline
from wan.weights.checked import read_checked, write_checked
from wan.weights.checkpoint import open_checkpoint
from wan.weights.digests import sha256_file

SECONDS = 10  # a case may take this long
MEMORY = 1 << 30  # and take this many bytes more than the child has at its start
PROMPT = "a small red circle, moving right"


# --- hostile values -------------------------------------------------------------------------------

LONG = "x" * 5000
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -0.0, 1e-300, 1e300, 255, 10**6, 10**10, 2**31),
    *(2**63, 2**64, 10**19, -(10**30), 10**400, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        "x",
        LONG,
        "0",
        "1e9",
        "null",
        "../../../etc/passwd",
        "/etc/passwd",
        "~",
        "\0",
        "\x1b[2J",
    ),
    *("\u202e", "\ud800", "é家", "a\nb", "F32", "F4", "encoder.down_blocks.0.resnets.1"),
    *([], {}, [[]], [0], [1, 2], [1, 2, 3], [0] * 5000, ["x"] * 50, [None], {"a": {"b": [1]}}),
]
NAMES = (
    "encoder.down_blocks.0.resnets.10000000000.conv1.weight",
    "encoder.down_blocks.10000000000.resnets.0.conv1.weight",
    "encoder.downsamples.99999999999.residual.2.weight",
    "blocks.99999999999999999999.attn1.to_q.weight",
    "blocks." + "9" * 400 + ".attn1.to_q.weight",
    *("__metadata__", "", ".", "a..b", "../x", LONG, "\x1b[31m", "quantization_config", "x_scale"),
    *("_class_name", "transformer_2", "timesteps", "boundary_ratio", "lora_alpha", "extra_ids"),
)


class Damage:
    """A seeded source of damage for texts, JSON and bytes."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def bytes(self, content: bytes) -> bytes:
        """Cut, flip, repeat, insert or overwrite bytes."""
        some, pick = bytearray(content), self.random
        for _ in range(pick.choice((1, 1, 2, 5, 20))):
            at = pick.randrange(len(some) + 1)
            kind = pick.randrange(6)
            if kind == 0:
                del some[at:]
            elif kind == 1 and some:
                some[at % len(some)] ^= 1 << pick.randrange(8)
            elif kind == 2:
                some[at:at] = some[at : at + pick.randrange(200)]
            elif kind == 3:
                some[at:at] = pick.randbytes(pick.randrange(1, 20))
            elif kind == 4:
                some[at : at + 8] = struct.pack("<Q", pick.getrandbits(pick.choice((8, 33, 64))))
            else:
                del some[at : at + pick.randrange(1, 50)]
        return bytes(some)

    def json(self, values: Any) -> bytes:
        """Change entries of a JSON value, or its text."""
        pick = self.random
        if pick.random() < 0.15:
            return self.bytes(json.dumps(values).encode())
        if pick.random() < 0.05:
            deep = pick.choice((40, 900, 100_000))
            return b'{"a":' * deep + b"1" + b"}" * deep
        for _ in range(pick.choice((1, 1, 1, 2, 4))):
            values = self._changed(values)
        text = json.dumps(values)
        if pick.random() < 0.1 and (found := re.search(r'"[^"]+": [^,{}\[\]]+', text)):
            text = text.replace(found[0], f"{found[0]}, {found[0]}", 1)  # a key twice
        if pick.random() < 0.1:
            text = re.sub(r"(?<=[\s\[:,])\d+(?=[\s,\]}])", self._digits, text, count=1)
        return text.encode()

    def _digits(self, found: re.Match[str]) -> str:
        return self.random.choice(("9" * 30, "9" * 5000, "1e400", "-" + found[0], found[0] + ".5"))

    def _changed(self, values: Any) -> Any:
        """A copy with one entry, at any depth, replaced, removed, renamed or added."""
        pick = self.random
        children = list(values) if isinstance(values, dict) else list(range(len(values or ())))
        inner = [k for k in children if isinstance(values[k], dict | list) and values[k]]
        if inner and pick.random() < 0.6:
            key = pick.choice(inner)
            changed: Any = dict(values) if isinstance(values, dict) else list(values)
            changed[key] = self._changed(values[key])
            return changed
        value = pick.choice(VALUES)
        if isinstance(values, list):
            changed = list(values)
            at = pick.randrange(len(changed) + 1)
            changed[at : at + pick.randrange(2)] = [value] * pick.randrange(3)
            return changed
        changed = dict(values)
        key = pick.choice(children) if children else "a"
        kind = pick.randrange(5)
        if kind == 0:
            changed.pop(key, None)
        elif kind == 1:
            changed[pick.choice(NAMES)] = changed.pop(key, value)
        elif kind == 2:
            changed[pick.choice(NAMES)] = value
        else:
            changed[key] = value
        return changed

    def safetensors(self, content: bytes) -> bytes:
        """Change the header as JSON, its length, or any byte of the file."""
        if self.random.random() < 0.25:
            return self.bytes(content)
        length = int.from_bytes(content[:8], "little")
        header = self.json(json.loads(content[8 : 8 + length]))
        stated = len(header)
        if self.random.random() < 0.05:
            stated = self.random.choice((0, 1, stated + 1, stated - 1, 2**40, 2**64 - 1))
        return struct.pack("<Q", stated) + header + content[8 + length :]


# --- what is read ---------------------------------------------------------------------------------


class Target:
    """One kind of file: how it is damaged, and what reads it.

    Attributes:
        name: for the table.
        damage: the damaged files of a case, as a function of the folder and the source of damage.
        read: reads them; raises a WanError, or returns.
    """

    def __init__(
        self, name: str, damage: Callable[[Path, Damage], None], read: Callable[[Path], None]
    ) -> None:
        self.name, self.damage, self.read = name, damage, read


def damaged_json(name: str) -> Callable[[Path, Damage], None]:
    def damage(folder: Path, how: Damage) -> None:
        values = json.loads((folder / name).read_bytes())
        (folder / name).write_bytes(how.json(values))

    return damage


def damaged_weights(name: str) -> Callable[[Path, Damage], None]:
    def damage(folder: Path, how: Damage) -> None:
        (folder / name).write_bytes(how.safetensors((folder / name).read_bytes()))

    return damage


def damaged_bytes(name: str) -> Callable[[Path, Damage], None]:
    def damage(folder: Path, how: Damage) -> None:
        (folder / name).write_bytes(how.bytes((folder / name).read_bytes()))

    return damage


def damaged_folder(folder: Path, how: Damage) -> None:
    """Make a file of the model something else: gone, empty, a folder, a pipe, a link or another."""
    pick = how.random
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    files = [f for part in parts for f in sorted((folder / part).iterdir())]
    files += [folder / "model_index.json", folder / "sampling_defaults.json"]
    for _ in range(pick.choice((1, 1, 2))):
        file, other = pick.choice(files), pick.choice(files)
        content = other.read_bytes() if other.is_file() else b""
        if file.exists() or file.is_symlink():
            shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
        kind = pick.randrange(8)
        if kind == 0:
            file.write_bytes(b"")
        elif kind == 1:
            file.mkdir()
        elif kind == 2:
            os.mkfifo(file)
        elif kind == 3:
            file.symlink_to(pick.choice(("/dev/zero", "/etc/passwd", "nowhere", file.name, "..")))
        elif kind == 4:
            file.write_bytes(content)
        elif kind == 5:
            file.write_bytes(bytes(1000))
        elif kind == 6:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(os.path.relpath(file))  # such a name may have 107 bytes


def read_model(folder: Path) -> None:
    pipe = WanDMDPipeline.from_pretrained(folder, dtype=torch.float32)
    assert pipe.transformer is not None


def read_like_the_library(folder: Path) -> None:
    """Open a file as a checkpoint; what is accepted must be what the safetensors library reads."""
    path = folder / "weights.safetensors"
    checkpoint = open_checkpoint(path)
    ours = checkpoint.map()
    theirs = safetensors.torch.load_file(path)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        other = theirs[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert raw(tensor).equal(raw(other)), name


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def read_index(folder: Path) -> None:
    open_checkpoint(folder / "sharded")


def read_tokenizer(folder: Path) -> None:
    ids = Tokenizer.from_folder(folder / "tokenizer")(PROMPT * 3).ids
    assert all(type(one) is int for one in ids)


def read_spiece(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    read_tokenizer(folder)


def read_a_lora(folder: Path) -> None:
    lora = read_lora(folder / "lora")
    for change in (*lora.pairs.values(), *lora.deltas.values()):
        assert bool(torch.isfinite(change.delta()).all())


def read_prompts(folder: Path) -> None:
    config = SampleConfig(
        checkpoint=str(folder), prompt_file=str(folder / "prompts.txt"), sampler=SamplerConfig()
    )
    sources = dict.fromkeys(vars(config), "default")
    assert list(read_jobs(config, sources).each())


def damaged_record(folder: Path, how: Damage) -> None:
    """A record whose digest is right or missing, so that only its content can give it away."""
    values = json.loads((folder / RECORD).read_bytes())
    del values["digest"]
    (folder / RECORD).write_bytes(how.json(values))


def read_a_record(folder: Path) -> None:
    record = read_record(str(folder / RECORD))
    assert compare(record, record).levels
    job_of(record, RerunConfig(output_dir=str(folder)))


def read_an_mp4(folder: Path) -> None:
    (folder / RECORD).unlink()
    read_record(str(folder / "video.mp4"))
    frames, info = read_video(folder / "video.mp4")
    assert frames.shape[1:] == (info.height, info.width, 3)


def damaged_run(folder: Path, how: Damage) -> None:
    """A checkpoint of training, in half of the cases with digests that are right again."""
    (step,) = (folder / "run").glob("step-*")
    names = sorted(path.name for path in step.iterdir())
    path = step / how.random.choice(names)
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        path.write_bytes(how.safetensors(content))
    else:
        path.write_bytes(how.json(json.loads(content)))
    if path.name != MANIFEST and how.random.random() < 0.5:
        manifest = read_sealed(step / MANIFEST)
        manifest["sha256"] = {name: sha256_file(step / name) for name in manifest["sha256"]}
        write_sealed(step / MANIFEST, manifest)


def read_run(folder: Path) -> None:
    state = load_latest(folder / "run")
    assert isinstance(state, dict)


def damaged_data(folder: Path, how: Damage) -> None:
    """The index or the report of preprocessed clips, with digests that are right again."""
    index, report = folder / "data" / INDEX, folder / "data" / REPORT
    values = read_sealed(index)
    if how.random.random() < 0.5:
        lines = [json.loads(line) for line in report.read_text().splitlines()]
        report.write_bytes(b"\n".join(how.json(line) for line in lines) + b"\n")
        values["report_sha256"] = sha256_file(report)
        write_sealed(index, values)
    else:
        index.write_bytes(how.json(values))


def read_data(folder: Path) -> None:
    assert folder_cache(folder / "data", None).shapes


def read_clip_list(folder: Path) -> None:
    for name in ("clips.jsonl", "clips.csv"):
        assert all(isinstance(clip.name, str) for clip in listed_clips(folder / name))


def damaged_lists(folder: Path, how: Damage) -> None:
    damaged_bytes(how.random.choice(("clips.jsonl", "clips.csv")))(folder, how)


def read_pictures(folder: Path) -> None:
    for name in ("picture.png", "picture.jpg"):
        assert load_image(folder / name).shape[0] == 3


def damaged_pictures(folder: Path, how: Damage) -> None:
    damaged_bytes(how.random.choice(("picture.png", "picture.jpg")))(folder, how)


def read_store(folder: Path) -> None:
    assert read_checked(folder / "store.safetensors")


def read_log(folder: Path) -> None:
    assert all(isinstance(row["step"], int) for row in read_metrics(folder / "metrics.jsonl"))


RECORD = "video.json"
CONFIGS = (
    *("model_index.json", "transformer/config.json", "vae/config.json", "text_encoder/config.json"),
    *("scheduler/scheduler_config.json", "sampling_defaults.json"),
)
TARGETS = (
    Target("safetensors header", damaged_weights("weights.safetensors"), read_like_the_library),
    Target("index of shards", damaged_json("sharded/model.safetensors.index.json"), read_index),
    *(Target(name, damaged_json(name), read_model) for name in CONFIGS),
    Target("shared_parts.json", damaged_json("shared_parts.json"), read_model),
    *(
        Target(f"weights of {part}", damaged_weights(f"{part}/{file}.safetensors"), read_model)
        for part, file in (
            ("transformer", "diffusion_pytorch_model"),
            ("vae", "diffusion_pytorch_model"),
            ("text_encoder", "model"),
        )
    ),
    Target("model's folder", damaged_folder, read_model),
    Target("tokenizer.json", damaged_json("tokenizer/tokenizer.json"), read_tokenizer),
    Target("tokenizer_config.json", damaged_json("tokenizer/tokenizer_config.json"), read_spiece),
    Target("spiece.model", damaged_bytes("tokenizer/spiece.model"), read_spiece),
    Target("LoRA", damaged_weights("lora/adapter_model.safetensors"), read_a_lora),
    Target("adapter_config.json", damaged_json("lora/adapter_config.json"), read_a_lora),
    Target("prompt file", damaged_bytes("prompts.txt"), read_prompts),
    Target("record of a video", damaged_record, read_a_record),
    Target("mp4", damaged_bytes("video.mp4"), read_an_mp4),
    Target("picture", damaged_pictures, read_pictures),
    Target("list of clips", damaged_lists, read_clip_list),
    Target("checkpoint of training", damaged_run, read_run),
    Target("preprocessed clips", damaged_data, read_data),
    Target("metrics of training", damaged_bytes("metrics.jsonl"), read_log),
    Target("tensors of a store", damaged_weights("store.safetensors"), read_store),
)


def run_preprocess(run: Run[Any]) -> int:
    return preprocess.main(run)


def write_samples(folder: Path) -> None:
    """Write the sound files that the cases damage."""
    write_tokenizer(folder / "tokenizer")
    build(folder / "tokenizer", WanDMDPipeline, timesteps=(1000, 757, 522)).save_pretrained(folder)
    words = [f"checkpoint={folder}", f"prompt={PROMPT}", f"output_dir={folder}", "device=cpu"]
    if code := execute(SampleCommand(), LINE, "", words):
        raise RuntimeError(f"infer.sample ended with {code}")
    for ending in (".mp4", ".json"):
        (path,) = (one for one in folder.glob(f"*{ending}") if one.name[0].isdigit())
        path.rename(folder / f"video{ending}")
    values = unsealed(json.loads((folder / RECORD).read_text()), RECORD)
    values["video"]["file"] = "video.mp4"
    values["settings"]["checkpoint"]["value"] = "."  # beside the record
    write_sealed(folder / RECORD, values)
    (folder / "shared_parts.json").write_text('{"vae": "vae"}')
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "blocks.0.attn1.to_q.weight": torch.randn(4, 3, generator=generator),
        "a": torch.arange(6, dtype=torch.int64).reshape(2, 3),
        "b.c": torch.randn(5, generator=generator).bfloat16(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.0),
    }
    safetensors.torch.save_file(tensors, folder / "weights.safetensors", {"format": "pt"})
    (folder / "sharded").mkdir()
    shards = [f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)]
    names = sorted(tensors)
    for shard, own in zip(shards, (names[:2], names[2:]), strict=True):
        safetensors.torch.save_file({n: tensors[n] for n in own}, folder / "sharded" / shard)
    index = {n: shards[n in names[2:]] for n in names}
    (folder / "sharded" / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    )
    (folder / "lora").mkdir()
    layers = ("blocks.0.attn1.to_q", "blocks.1.ffn.net.2", "condition_embedder.time_proj")
    lora = {
        f"transformer.{layer}.lora_{half}.weight": torch.randn(2, 2, generator=generator)
        for layer in layers
        for half in "AB"
    }
    safetensors.torch.save_file(lora, folder / "lora" / "adapter_model.safetensors")
    settings = {"r": 2, "lora_alpha": 4, "alpha_pattern": {"blocks.1": 8}, "peft_type": "LORA"}
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    write_checked(folder / "store.safetensors", tensors, {"about": "a store"})
    save_checkpoint(folder / "run", 3, {"step": 3, "modules": {"a": tensors}, "lists": [1, None]})
    log = MetricsLog(folder, 0)
    for step in (1, 2, 3):
        log.write(step, loss=0.5 / step, name="x")
    log.close()
    (folder / "clips.jsonl").write_text('{"video": "a.mp4", "prompt": "a"}\n' * 2)
    (folder / "clips.csv").write_text('video,prompt\na.mp4,"a, b"\nb.mp4,c\n')
    pixels = torch.randint(0, 256, (12, 16, 3), generator=generator, dtype=torch.uint8)
    for ending in ("png", "jpg"):
        Image.fromarray(pixels.numpy()).save(folder / f"picture.{ending}")
    (folder / "one").mkdir()
    shutil.copy(folder / "picture.png", folder / "one")
    (folder / "one" / "picture.txt").write_text(PROMPT)
    words = [f"checkpoint={folder}", f"clips={folder / 'one'}", f"output_dir={folder / 'data'}"]
    more = ["sizes=[1x16x16]", "max_upscale=4", "device=cpu", "max_text_tokens=16"]
    if code := execute(run_preprocess, preprocess.LINE, "", [*words, *more]):
        raise RuntimeError(f"train.preprocess ended with {code}")
    (folder / "prompts.txt").write_text(
        f'{PROMPT}\n{{"prompt": "a cat", "seed": 3, "steps": 2, "fps": 8.5}}\n\n'
        '{"prompt": "two", "timesteps": [1000, 500], "image": "cat.png"}\n'
    )


# --- running --------------------------------------------------------------------------------------


def run_case(number: int, seed: int, sample: Path, folder: Path) -> str:
    """Run one case in a folder of its own: "refused", "read", or what went wrong."""
    target = TARGETS[number % len(TARGETS)]
    shutil.copytree(sample, folder)
    target.damage(folder, Damage(seed * 1_000_003 + number))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(folder)
    except WanError as error:
        message = str(error)
        if len(message) > MAX_MESSAGE or message != visible(message):
            return f"a message of {len(message)} characters: {message[:200]!r}"
        return "refused"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return traceback.format_exc()
    finally:
        shutil.rmtree(folder)
    return "read"


def run_cases(numbers: list[int], seed: int) -> None:
    """The child: run cases under the limits and print a line of JSON for each."""
    torch.set_num_threads(1)
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what anything else prints
    with tempfile.TemporaryDirectory() as place:
        sample = Path(place) / "sample"
        sample.mkdir()
        write_samples(sample)
        for target in TARGETS:  # everything that is loaded late is loaded before the limit is set
            shutil.copytree(sample, Path(place) / "sound")
            target.read(Path(place) / "sound")
            shutil.rmtree(Path(place) / "sound")
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for number in numbers:
            name = TARGETS[number % len(TARGETS)].name
            print(json.dumps({"number": number, "target": name}), file=report)
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            outcome = run_case(number, seed, sample, Path(place) / "case")
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps({"outcome": outcome}), file=report)


Table = dict[str, Counter[str]]  # target -> how many cases ended how


def fuzz(numbers: list[int], seed: int, program: Path = Path(__file__)) -> tuple[Table, list[str]]:
    """Run cases in children, a new one after each that died.

    Args:
        program: what the child runs with the option --child.

    Returns:
        The outcomes by target, and a report of each case that failed.
    """
    table: Table = defaultdict(Counter)
    failures = []

    def note(case: dict[str, Any], outcome: str) -> None:
        failed = outcome not in ("read", "refused")
        table[case["target"]]["failed" if failed else outcome] += 1
        if failed:
            failures.append(f"case {case['number']} ({case['target']}): {outcome}")

    left = list(numbers)
    while left:
        command = [sys.executable, str(program), "--seed", str(seed), "--child"]
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        output, errors = child.communicate(json.dumps(left).encode())
        running = None
        for line in map(json.loads, output.splitlines()):
            if "outcome" in line:
                note(running, line["outcome"])
                running = None
            else:
                running = line
                left.remove(line["number"])
        if running is not None:
            note(running, f"exit code {child.returncode}: {errors.decode()[-3000:]}")
        elif child.returncode or not output:
            raise RuntimeError(f"the child failed outside a case: {errors.decode()[-3000:]}")
    return table, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this case alone")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_cases(json.load(sys.stdin), options.seed)
        return 0
    numbers = list(range(options.cases)) if options.only is None else [options.only]
    start = time.monotonic()
    table, failures = fuzz(numbers, options.seed)
    print(*failures, sep="\n\n")
    print(f"| file | cases | refused | read | failed |\n|{'---|' * 5}")
    for name, row in table.items():
        counts = (sum(row.values()), row["refused"], row["read"], row["failed"])
        print(f"| {name} | {' | '.join(map(str, counts))} |")
    print(f"{len(numbers)} cases of seed {options.seed} in {time.monotonic() - start:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
