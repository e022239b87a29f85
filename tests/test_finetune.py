"""Fine-tuning end to end on the miniature: from scratch, all weights, LoRA, a clip folder."""

import json
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from configs.training import DataConfig, FinetuneConfig, LoopConfig, LoRAConfig
from train.checkpoint import load_latest
from train.data import LatentCache
from train.finetune.run import finetune, make_train_step, read_settings
from train.optim import EMA, make_optimizers
from train.parallel import ALONE
from train.state import TrainState
from wan import WanPipeline
from wan.errors import WanError
from wan.lora.merge import LoRAMerge, read_lora
from wan.models.attention_config import AttentionConfig
from wan.weights.checkpoint import open_checkpoint
from wan.weights.hub import STUDENT, TEACHER
from wan.weights.load import load_state

DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 1,
    "ffn_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 128,
    "freq_dim": 32,
}


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def settings(tmp_path, cache_dir, **changes) -> FinetuneConfig:
    config = FinetuneConfig(
        output_dir=str(tmp_path / "run"),
        threads=1,
        batch_size=2,
        first_frame_share=0.5,
        data=DataConfig(cache_dir=cache_dir, num_clips=4),
        loop=LoopConfig(steps=4, log_every=1, save_every=2),
    )
    return replace(config, **changes)


def metrics(config: FinetuneConfig) -> list[dict]:
    with open(f"{config.output_dir}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def transformer(config: FinetuneConfig) -> dict[str, torch.Tensor]:
    return load_state(open_checkpoint(f"{config.output_dir}/model/transformer"), "transformer")


def test_a_network_from_scratch_becomes_a_folder_the_pipeline_loads(tmp_path, cache_dir):
    sampling = {"height": 64, "width": 64, "num_frames": 5, "fps": 8, "num_inference_steps": 2}
    config = settings(tmp_path, cache_dir, from_scratch=True, dit=DIT, sampling=sampling)
    finetune(config)
    assert all(np.isfinite(line["loss"]) for line in metrics(config))
    pipe = WanPipeline.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    frames = pipe(prompt="a red circle", seed=0, guidance_scale=1.0).frames
    assert frames.shape == (1, 5, 64, 64, 3)
    assert np.isfinite(frames).all()


def test_a_few_step_student_is_trained_only_where_that_is_asked_for(tmp_path, cache_dir):
    config = settings(tmp_path, cache_dir, checkpoint="builtin:miniature", first_frame_share=0.0)
    with pytest.raises(WanError, match=r"would unlearn them.*few_step=true"):
        finetune(config)
    assert not (tmp_path / "run").exists()
    assert read_settings(replace(config, few_step=True), STUDENT).timesteps is not None


class Recorder(torch.nn.Module):
    """In a transformer's place: keeps what it was asked, and answers its one weight everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = torch.nn.Parameter(torch.tensor([0.5]))
        self.asked: list[tuple] = []

    def forward(self, *asked):
        self.asked.append(asked)
        return self.answer.expand_as(asked[0])


CLIPS = torch.randn(64, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
SAID = [f"caption {i}" for i in range(64)]


def one_step(**changes):
    """Losses of a step on 64 clips, and what network and text encoder were asked."""
    texts, dit = [], Recorder()
    loss, _ = whole_step(dit, texts, **changes)
    return loss, dit.asked[0][0], dit.asked[0][1], texts[0]


def whole_step(dit, texts, **changes):
    """Loss of a step of a network on 64 clips, and the norm of its gradient."""

    def encode(captions):
        texts.append(captions)
        return torch.zeros(len(captions), 512, 8), 8

    class Clips:
        batch = staticmethod(lambda step, size, seed: (CLIPS, SAID))

    config = FinetuneConfig(batch_size=64, bfloat16=False, **changes)
    state = TrainState({"dit": dit}, make_optimizers(dit, "adamw", 1e-3), {"dit": EMA(dit, 0.9)})
    values = make_train_step(dit, encode, Clips, config, ALONE)(state)
    return values["loss"], values["grad_norm"]


def test_a_batch_in_parts_is_the_batch():
    """In its draws to the bit; its loss and gradient to rounding."""
    found = {}
    for parts in (1, 4):
        dit, texts = Recorder(), []
        changes = {"caption_dropout": 0.25, "first_frame_share": 1.0}
        numbers = whole_step(dit, texts, gradient_accumulation=parts, **changes)
        assert len(dit.asked) == parts
        asked = [torch.cat([call[i] for call in dit.asked]) for i in (0, 1)]
        found[parts] = asked, [text for part in texts for text in part], numbers
    (asked, texts, numbers), (asked_in_parts, texts_in_parts, numbers_in_parts) = found.values()
    assert all(map(torch.equal, asked, asked_in_parts))
    assert texts == texts_in_parts
    assert numbers_in_parts == pytest.approx(numbers, rel=1e-5)


def test_a_batch_that_cannot_be_cut_is_refused_before_anything_is_made(tmp_path):
    config = FinetuneConfig(
        output_dir=str(tmp_path / "run"), checkpoint="none", batch_size=6, gradient_accumulation=4
    )
    with pytest.raises(WanError, match=r"batch_size=6: .* gradient_accumulation=4; .* 4 and 8"):
        finetune(config)
    assert not (tmp_path / "run").exists()


def test_a_step_asks_for_the_velocity_of_its_clips_at_the_levels_it_says():
    loss, x, timestep, captions = one_step(shift=3.0, caption_dropout=0.0)
    assert captions == SAID
    sigma = (timestep / 1000)[:, None, None, None, None]
    noise = (x - (1 - sigma) * CLIPS) / sigma
    assert noise.mean().abs() < 0.05
    assert noise.std() == pytest.approx(1, abs=0.05)
    assert loss == pytest.approx(float((0.5 - (noise - CLIPS)).square().mean()), rel=1e-3)
    assert sigma.median() == pytest.approx(0.75, abs=0.08)  # 3 / (1 + 3) by the shift
    _, _, unshifted, _ = one_step(shift=1.0, caption_dropout=0.0)
    torch.testing.assert_close(unshifted / 1000, sigma.flatten() / (3 - 2 * sigma.flatten()))


def test_a_first_frame_is_given_clean_at_timestep_zero_and_not_judged():
    loss, x, timestep, _ = one_step(first_frame_share=1.0)
    assert torch.equal(x[:, :, 0], CLIPS[:, :, 0])
    assert (timestep[:, 0] == 0).all()
    assert torch.equal(timestep[:, 1], timestep[:, 2])
    sigma = (timestep[:, 1] / 1000)[:, None, None, None, None]
    noise = ((x - (1 - sigma) * CLIPS) / sigma)[:, :, 1:]
    target = noise - CLIPS[:, :, 1:]
    assert loss == pytest.approx(float((0.5 - target).square().mean()), rel=1e-3)


def test_captions_are_dropped_as_often_as_asked():
    _, _, _, captions = one_step(caption_dropout=0.25)
    kept = [caption for caption in captions if caption]
    assert 40 <= len(kept) <= 56
    assert all(said in ("", text) for said, text in zip(captions, SAID, strict=True))


def test_what_comes_out_is_the_average(tmp_path, cache_dir):
    config = settings(tmp_path, cache_dir, from_scratch=True, dit=DIT, lr=1e-2, ema_decay=0.9)
    finetune(config)
    stored = load_latest(tmp_path / "run" / "checkpoints")
    trained, average = stored["modules"]["dit"], stored["averages"]["dit"]["weights"]
    name = "head.proj.weight"
    assert not torch.equal(trained[name], average[name])
    for name, weight in transformer(config).items():
        torch.testing.assert_close(weight, average[name].to(weight.dtype))


def test_clips_of_one_frame_are_made_whole_whatever_first_frame_share_says(
    tmp_path, cache_dir, monkeypatch
):
    batch = LatentCache.batch

    def pictures(*args):
        latents, captions = batch(*args)
        return latents[:, :, :1], captions

    monkeypatch.setattr(LatentCache, "batch", pictures)
    config = settings(tmp_path, cache_dir, from_scratch=True, dit=DIT, first_frame_share=1.0)
    finetune(config)
    assert all(0 < line["loss"] < 10 for line in metrics(config))


def test_a_run_cut_in_two_gives_the_weights_of_one_run(tmp_path, cache_dir):
    straight = settings(tmp_path / "a", cache_dir, from_scratch=True, dit=DIT)
    finetune(straight)
    halves = settings(tmp_path / "b", cache_dir, from_scratch=True, dit=DIT)
    # The schedule of the learning rate follows from the number of steps, so it must stay the same:
    # the first half ends as a stopped run does, at a checkpoint.
    calls = 0

    def stop_after_two(step):
        def counted(state):
            nonlocal calls
            calls += 1
            if calls == 3:
                raise KeyboardInterrupt
            return step(state)

        return counted

    import train.finetune.run as module

    original = module.make_train_step
    module.make_train_step = lambda *args: stop_after_two(original(*args))
    try:
        with pytest.raises(KeyboardInterrupt):
            finetune(halves)
    finally:
        module.make_train_step = original
    finetune(halves)
    one, two = transformer(straight), transformer(halves)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_all_weights_of_the_miniature_move(tmp_path, cache_dir):
    config = settings(tmp_path, cache_dir, lr=1e-3, ema_decay=0.0)
    finetune(config)
    before = load_state(open_checkpoint(TEACHER / "transformer"), "transformer")
    after = transformer(config)
    still = [n for n in after if torch.equal(before[n].float(), after[n].float())]
    assert still == []


def test_a_lora_leaves_the_base_alone_and_is_written_as_one_file(tmp_path, cache_dir):
    config = settings(tmp_path, cache_dir, lora=LoRAConfig(rank=2), lr=1e-3, ema_decay=0.0)
    finetune(config)
    lora = read_lora(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert lora.pairs
    assert any(pair.up.abs().max() > 0 for pair in lora.pairs.values())
    assert not (tmp_path / "run" / "model").exists()


def test_a_lora_says_what_attention_it_was_trained_with_and_warns_of_another(tmp_path, cache_dir):
    sparse = AttentionConfig("spatial")
    finetune(settings(tmp_path, cache_dir, lora=LoRAConfig(rank=2), attention=sparse))
    lora = read_lora(tmp_path / "run")
    assert lora.attention == "spatial"
    load = partial(WanPipeline.from_pretrained, TEACHER, loras={"transformer": LoRAMerge(lora)})
    with pytest.warns(UserWarning, match=r"safetensors: was trained with attention=spatial"):
        load()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(attention=sparse)


def test_what_a_killed_export_left_is_removed(tmp_path, cache_dir):
    config = settings(tmp_path, cache_dir)
    (tmp_path / "run" / ".model.0123abcd.part" / "vae").mkdir(parents=True)
    (tmp_path / "run" / ".model.0123abcd.tmp").touch()  # its lock went with its process
    finetune(config)
    assert [path.name for path in (tmp_path / "run").glob("*model*")] == ["model"]


def test_a_lora_needs_a_base():
    with pytest.raises(WanError, match="needs a base"):
        FinetuneConfig(from_scratch=True, lora=LoRAConfig(rank=4))


def test_samples_are_read_for_the_world_only():
    with pytest.raises(WanError, match=r"validation_captions=4 with data\.kind=folder"):
        FinetuneConfig(validation_captions=4, data=DataConfig(kind="folder", folder="x"))


def test_samples_have_steps():
    with pytest.raises(WanError, match="validation_steps=0"):
        FinetuneConfig(validation_captions=2, validation_steps=0)


def test_a_folder_of_clips_must_be_named():
    with pytest.raises(WanError, match="the world has no folder"):
        finetune(FinetuneConfig(data=DataConfig(kind="folder")))
