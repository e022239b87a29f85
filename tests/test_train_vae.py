import json
from dataclasses import replace

import pytest
import torch

from configs.export import ExportConfig
from configs.training import LoopConfig, VAETrainConfig
from train.kept import export_kept
from train.vae.run import crop_around_objects, foreground_mask, rendered_clips, train_vae
from wan.errors import WanError
from wan.models.vae import VAEConfig, WanVAE
from wan.weights.checkpoint import open_checkpoint
from wan.weights.digests import list_files
from wan.weights.load import load_module, load_state

TINY = {
    "base_dim": 4,
    "decoder_base_dim": 4,
    "z_dim": 2,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "patch_size": 4,
    "in_channels": 48,
    "out_channels": 48,
}


def settings(tmp_path, **changes) -> VAETrainConfig:
    config = VAETrainConfig(
        output_dir=str(tmp_path),
        threads=1,
        vae=TINY,
        batch_size=2,
        crop_size=32,
        crop_frames=5,
        whole_clip_steps=1,
        whole_clip_batch=1,
        validation_clips=1,
        statistics_clips=8,
        loop=LoopConfig(steps=4, log_every=1, save_every=2),
    )
    return replace(config, **changes)


def test_training_writes_a_released_layout_with_normalised_latents(tmp_path):
    train_vae(settings(tmp_path))
    config = VAEConfig.from_json(json.loads((tmp_path / "vae" / "config.json").read_text()))
    vae = load_module(lambda: WanVAE(config), open_checkpoint(tmp_path / "vae"), "vae")
    with torch.no_grad():
        latents = vae.encode_normalized(rendered_clips(8, seed=2**41))
    # The statistics were taken on these very clips
    assert latents.mean(dim=(0, 2, 3, 4)).abs().max() < 1e-3
    torch.testing.assert_close(latents.std(dim=(0, 2, 3, 4)), torch.ones(2), atol=1e-2, rtol=0)


def test_a_decoder_alone_moves_and_leaves_latents_as_they_are(tmp_path):
    train_vae(settings(tmp_path / "first"))
    start = tmp_path / "first" / "vae"
    train_vae(settings(tmp_path / "second", start=str(start), decoder_only=True, vae={}))
    before, after = (
        load_state(open_checkpoint(folder), "vae") for folder in (start, tmp_path / "second/vae")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in moved)
    settings_of = [
        json.loads((f / "config.json").read_text()) for f in (start, tmp_path / "second/vae")
    ]
    assert settings_of[0] == settings_of[1]
    for run, places in (("first", {}), ("second", {"start": str(start)})):
        export_kept(ExportConfig(str(tmp_path / run), output=str(tmp_path / f"of {run}"), **places))
        files = list_files(tmp_path / run / "vae")
        assert all(
            (tmp_path / f"of {run}" / n).read_bytes() == p.read_bytes() for n, p in files.items()
        )
    with pytest.raises(WanError, match="name its vae/ folder"):
        train_vae(settings(tmp_path / "third", decoder_only=True))


def test_crops_hold_some_of_an_object():
    clips = rendered_clips(2, seed=0)
    crops = crop_around_objects(clips, 3, 48, 9, torch.Generator().manual_seed(0))
    assert crops.shape == (6, 3, 9, 48, 48)
    spread = crops.flatten(2).amax(2) - crops.flatten(2).amin(2)  # more than one colour
    assert (spread.amax(1) > 0.1).all()


def test_the_mask_marks_objects_and_a_border_of_two_pixels():
    clip = torch.full((1, 3, 1, 16, 16), -1.0)
    clip[..., 8, 8] = 1.0
    mask = foreground_mask(clip)[0, 0, 0]
    assert mask.sum() == 25
    assert mask[6:11, 6:11].all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 3}, "multiple of"),
        ({"crop_frames": 8}, "4k \\+ 1"),
        ({"lr": 0.0}, "lr=0"),
        ({"validation_clips": 0}, "validation_clips=0"),
        ({"statistics_clips": 0}, "statistics_clips=0"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, change, message):
    with pytest.raises(WanError, match=message):
        settings(tmp_path, **change)
