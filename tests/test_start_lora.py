"""`lora.start=`: a run goes on with a LoRA file, in any format that inference reads."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_artefact import finetune_config, student_config
from test_distill import TINY
from test_distill import teacher as teacher  # a fixture
from torch import Tensor

from configs.export import ExportConfig
from configs.training import FinetuneConfig, LoopConfig, LoRAConfig
from train.artefact import TrainedLoRA
from train.distill.run import distill, with_lora_ranks
from train.finetune.run import finetune
from train.kept import export_kept
from train.lora import kept_scales, read_start, train_lora
from wan.errors import WanError
from wan.lora.files import ATTENTION, LoRA, read_lora
from wan.lora.merge import lora_state
from wan.models.attention_config import AttentionConfig
from wan.models.dit import WanDiT
from wan.weights.keys import released_name
from wan.weights.safetensors_file import write_tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*matrices of zeros")  # a fresh transformer has

# More than what a new LoRA has (the first), and less; each with a rank and an alpha of its own.
LAYERS = {
    "text_embedding.in_proj": (3, 1.5),
    "blocks.0.self_attention.query": (2, 2.0),
    "blocks.1.ffn.down": (4, 1.0),
}
FACTORS = {"A": ("lora_A", "lora_B"), "down": ("lora_down", "lora_up")}


def pairs(uniform: bool = False) -> dict[str, tuple[Tensor, Tensor, float]]:
    """(down, up, alpha) of `LAYERS`, or with one rank and alpha for all."""
    generator = torch.Generator().manual_seed(0)
    network, found = WanDiT(TINY), {}
    for layer, (own_rank, own_alpha) in LAYERS.items():
        rank, alpha = (2, 3.0) if uniform else (own_rank, own_alpha)
        rows, columns = network.get_parameter(f"{layer}.weight").shape
        down, up = (
            torch.randn(shape, generator=generator) for shape in ((rank, columns), (rows, rank))
        )
        found[layer] = (down, up, alpha)
    return found


def tensors(layout: str, front: str, factors: str, uniform: bool = False) -> dict[str, Tensor]:
    named = {}
    for layer, (down, up, alpha) in pairs(uniform).items():
        stem = released_name("transformer", layout, f"{layer}.weight").removesuffix(".weight")
        stem = front + (stem.replace(".", "_") if front.endswith("_") else stem)
        ends = FACTORS[factors]
        named |= {f"{stem}.{ends[0]}.weight": down, f"{stem}.{ends[1]}.weight": up}
        if not uniform:
            named[f"{stem}.alpha"] = torch.tensor(alpha)
    return named


def kohya(folder: Path) -> Path:
    write_tensors(folder / "a.safetensors", tensors("official", "lora_unet_", "down"))
    return folder / "a.safetensors"


def comfyui(folder: Path) -> Path:
    write_tensors(folder / "a.safetensors", tensors("official", "diffusion_model.", "down"))
    return folder / "a.safetensors"


def diffusers(folder: Path) -> Path:
    named = tensors("diffusers", "transformer.", "A", uniform=True)
    write_tensors(folder / "pytorch_lora_weights.safetensors", named)
    return folder


def peft(folder: Path) -> Path:
    named = tensors("diffusers", "base_model.model.", "A", uniform=True)
    write_tensors(folder / "adapter_model.safetensors", named)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 3}))
    return folder


def assert_equal(one: LoRA, other: LoRA) -> None:
    """To the bit, with the scale multiplied into the second factor."""
    assert one.names == other.names
    for name, pair in one.pairs.items():
        assert torch.equal(pair.down, other.pairs[name].down)
        assert torch.equal(pair.up * pair.scale, other.pairs[name].up * other.pairs[name].scale)


@pytest.mark.parametrize("write", [kohya, comfyui, diffusers, peft])
def test_what_is_exported_before_the_first_step_is_the_file(tmp_path, write):
    config = LoRAConfig(start=str(write(tmp_path)))
    network, start = WanDiT(TINY), read_start(config, TINY)
    train_lora(network, config, start, torch.Generator())
    assert {n for n, p in network.named_parameters() if p.requires_grad} == set(lora_state(network))
    scales = kept_scales(config, json.loads(json.dumps(start.to_json())))
    out = tmp_path / "out.safetensors"
    TrainedLoRA(scales, AttentionConfig()).write(lora_state(network), out)
    assert_equal(read_lora(out), read_lora(config.start))


def started(folder: Path, teacher: Path, start: Path, **changes) -> FinetuneConfig:
    config = finetune_config(folder, teacher, lora=LoRAConfig(start=str(start)))
    return replace(config, loop=LoopConfig(steps=1, save_every=1), **changes)


def test_a_run_goes_on_with_a_file_and_knows_it_again(teacher, tmp_path):
    file = kohya(tmp_path)
    config = started(tmp_path / "still", teacher, file, lr=1e-30)  # too small to move anything
    assert finetune(config) == 0
    assert_equal(read_lora(tmp_path / "still"), read_lora(file))
    config = replace(config, output_dir=str(tmp_path / "run"), lr=1e-2)
    assert finetune(config) == 0
    moved, given = (read_lora(place).pairs for place in (tmp_path / "run", file))
    assert not any(torch.equal(moved[name].down, pair.down) for name, pair in given.items())
    write_tensors(file, {n: t * 0.5 for n, t in tensors("official", "lora_unet_", "down").items()})
    with pytest.raises(WanError, match=r"lora_start\.sha256"):
        finetune(replace(config, loop=LoopConfig(steps=2)))
    file.unlink()  # the checkpoint knows all that an export needs
    export_kept(ExportConfig(str(tmp_path / "run"), output=str(tmp_path / "again")))
    again, end = tmp_path / "again.safetensors", next((tmp_path / "run").glob("*.safetensors"))
    assert again.read_bytes() == end.read_bytes()


def test_a_student_goes_on_with_a_lora(teacher, tmp_path):
    file = kohya(tmp_path)
    config = student_config(tmp_path / "run", teacher)
    student = replace(config.student, lora=LoRAConfig(start=str(file)))
    config = replace(config, student=student, loop=LoopConfig(steps=2, save_every=2), lr=1e-30)
    assert with_lora_ranks(config, TINY).student.lora.rank == 4  # for an estimate, the largest
    assert distill(config) == 0
    assert_equal(read_lora(tmp_path / "run"), read_lora(file))


def test_what_lies_where_a_run_writes_is_refused_by_name(teacher, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    file = LoRAConfig(start=str(kohya(run)))
    own = str(shutil.copytree(teacher, run / "start"))
    config = student_config(run, teacher)
    refused = {
        r"checkpoint=\S+": replace(config, checkpoint=own),
        r"student\.start=\S+": replace(config, student=replace(config.student, start=own)),
        r"student\.lora\.start=\S+": replace(
            config, student=replace(config.student, lora=file, start=None)
        ),
        r"scores\.critic_lora\.start=\S+": replace(
            config, scores=replace(config.scores, critic_lora=file)
        ),
    }
    for option, one in refused.items():
        with pytest.raises(WanError, match=f"^{option} lies in output_dir="):
            distill(one)
    with pytest.raises(WanError, match=r"^lora\.start=\S+ lies in output_dir="):
        finetune(finetune_config(run, teacher, lora=file))
    with pytest.raises(WanError, match=r"^checkpoint=\S+ lies in output_dir="):
        finetune(finetune_config(run, Path(own)))
    assert not (run / "checkpoints").exists()


def also(folder: Path, **more: Tensor) -> str:
    named = {f"diffusion_model.{name.replace('__', '.')}": t for name, t in more.items()}
    write_tensors(
        folder / "also.safetensors", tensors("official", "diffusion_model.", "down") | named
    )
    return str(folder / "also.safetensors")


def test_what_cannot_be_gone_on_with_is_refused_by_name(tmp_path, capsys):
    file = str(kohya(tmp_path))

    def refused(words: str, transformer=TINY, **config) -> None:
        with pytest.raises(WanError, match=words):
            read_start(LoRAConfig(**config), transformer)

    refused(r"lora\.rank=8: .* rank 2, 3, 4, which .*; leave lora\.rank= out", start=file, rank=8)
    refused(r"lora\.alpha=8.0: .* alpha 1, 1.5, 2", start=file, alpha=8.0)
    refused("was made for another model", replace(TINY, ffn_dim=64), start=file)
    bias = also(tmp_path, blocks__0__self_attn__q__diff_b=torch.ones(24))
    refused(r"also changes blocks\.0\.self_attention\.query\.bias; merge it", start=bias)
    down, up = torch.ones(2, 16, 1, 2, 2), torch.ones(24, 2, 1, 1, 1)
    kernel = also(
        tmp_path,
        patch_embedding__lora_down__weight=down,
        patch_embedding__lora_up__weight=up,
    )
    refused(r"also changes patch_embedding\.weight", start=kernel)
    shutil.rmtree(tmp_path)
    refused("no such file", start=file)


def test_another_attention_than_the_file_says_is_warned_of(teacher, tmp_path, capsys):
    named = tensors("diffusers", "transformer.", "A", uniform=True)
    write_tensors(tmp_path / "a.safetensors", named, {ATTENTION: "spatial"})
    config = started(tmp_path / "run", teacher, tmp_path / "a.safetensors")
    finetune(config)
    assert "trained with attention=spatial and goes on with sdpa" in capsys.readouterr().err


def test_a_start_needs_a_base():
    with pytest.raises(WanError, match=r"lora\.start: a LoRA needs a base"):
        FinetuneConfig(from_scratch=True, lora=LoRAConfig(start="x"))
