"""The numbers of taehv.json: python tests/golden/taehv.py PATH/taehv.py > tests/golden/taehv.json

It runs the published code (github.com/madebyollin/taehv, commit 1f14a56) on weights and latents
from a formula, so that no random generator matters, and prints what `test_taehv.py` compares.
"""

import importlib.util
import json
import sys

import torch


def scattered(shape, start):
    """Numbers from -1 to 1 without a pattern, from a formula."""
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    waves = torch.sin(count * 12.9898 + (start + 1) * 78.233) * 43758.5453
    return ((waves - waves.floor()) * 2 - 1).view(shape)


def published_weights(shapes):
    """Weights by published name that keep activations at order one, and colours inside [0, 1]."""
    weights = {}
    for start, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        scale = 1.6 * torch.Size(shape[1:]).numel() ** -0.5 if len(shape) > 1 else 0.2
        weights[name] = (scattered(shape, start) * scale).float()
    weights["decoder.22.weight"] *= 0.2
    weights["decoder.22.bias"] += 0.5
    return weights


def latents(channels):
    return (scattered((1, channels, 3, 4, 5), 99) * 4).float()


def summary(video):
    """Mean, deviation and some pixels of a video (1, 3, F, H, W) in [-1, 1]."""
    flat = video.double().flatten()
    picked = flat[:: max(1, len(flat) // 12)][:12]
    per_frame = video.double().mean(dim=(0, 1, 3, 4))
    return {
        "shape": list(video.shape),
        "mean": flat.mean().item(),
        "std": flat.std().item(),
        "pixels": [round(value, 6) for value in picked.tolist()],
        "frames": [round(value, 6) for value in per_frame.tolist()],
    }


def main(path):
    spec = importlib.util.spec_from_file_location("published", path)
    published = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(published)
    results = {}
    for name, options in {
        "taew2_1": {},
        "taew2_2": {"patch_size": 2, "latent_channels": 48},
    }.items():
        for times in ((False, True, True), (False, False, False)):
            model = published.TAEHV(None, decoder_time_upscale=times, **options)
            full = published.TAEHV(None, **options).decoder.state_dict()
            shapes = {f"decoder.{n}": tuple(t.shape) for n, t in full.items()}
            weights = model.patch_tgrow_layers(published_weights(shapes))
            model.load_state_dict(weights, strict=False)
            x = latents(model.latent_channels).transpose(1, 2)
            with torch.no_grad():
                video = model.decode_video(x, parallel=True, show_progress_bar=False)
            key = name if any(times) else f"{name} last_only"
            results[key] = summary(video.transpose(1, 2) * 2 - 1)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
