"""infer.measure: towers with random weights and pairs whose right answer is known, and the flow."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch

from configs.compose import compose_runs
from configs.measurement import MeasureConfig
from infer.measure import measures, run
from infer.measure.__main__ import LINE, main
from infer.measure.measures import agreement, consistency, evenly_spaced, motion, rank_of_own
from infer.measure.run import Store, Towers, Video, find_videos, measure
from infer.measure.towers import CLIP, ImageTower, TowerFolder
from infer.sample.__main__ import LINE as SAMPLE
from infer.sample.__main__ import SampleCommand
from wan.errors import WanError
from wan.media.video import write_video

CPU = torch.device("cpu")
PROMPTS = ("a red circle", "a blue square", "a green star")
WORDS = sorted({word for prompt in PROMPTS for word in prompt.split()})
WIDTH = 16  # of CLIP's common space


def still(seed: int, frames: int = 5):
    """A picture of large patches that stands still: (F, 48, 64, 3) uint8."""
    patches = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.repeat(patches.repeat(16, 0).repeat(16, 1)[None], frames, 0)


@pytest.fixture(scope="module")
def vision():
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory, vision):
    """A CLIP model with random weights whose text projection makes PROMPTS[i] a perfect pair with
    the still picture of seed i."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    folder = tmp_path_factory.mktemp("clip")
    special = {"<unk>": 0, "<bos>": 1, "<eos>": 2}
    vocabulary = special | {word: 3 + number for number, word in enumerate(WORDS)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        "<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    text = {name: vision[name] for name in vision if name not in ("image_size", "patch_size")}
    text |= {"vocab_size": 32, "max_position_embeddings": 12, "eos_token_id": 2, "bos_token_id": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)
    torch.manual_seed(0)
    network = transformers.CLIPModel(config)
    transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    network.save_pretrained(folder)
    loaded = CLIP(TowerFolder.find("clip_model", str(folder)), CPU)
    pictures = torch.cat([loaded.frames(still(seed, 1)) for seed in range(3)])
    with torch.no_grad():
        ids = [loaded.tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in PROMPTS]
        states = torch.cat([loaded.network.text_model(one).pooler_output for one in ids])
        network.text_projection.weight.copy_((torch.linalg.pinv(states) @ pictures).T)
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A still video of each prompt's picture, without compression that matters."""
    folder = tmp_path_factory.mktemp("videos")
    for seed in range(3):
        write_video(folder / f"{seed}.mp4", still(seed), 8)
    return folder


def config_of(clip_folder, **more):
    return MeasureConfig(clip_model=str(clip_folder), device="cpu", **more)


def test_perfect_pairs_agree_fully_and_swapped_ones_rank_last(clip_folder, videos, tmp_path):
    found = Towers(config_of(clip_folder), "cpu")
    for shift in range(3):
        pairs = [Video(videos / f"{i}.mp4", PROMPTS[(i + shift) % 3]) for i in range(3)]
        values = measure(pairs, found, Store(tmp_path / f"{shift}.json")).values
        text = [values[pair.file]["text"] for pair in pairs]
        rank = [values[pair.file]["text_rank"] for pair in pairs]
        if shift == 0:
            assert min(text) > 99  # what is left is compression
            assert rank == [1.0] * 3
        else:
            assert max(text) < 99
            assert max(rank) < 1


def test_the_projection_itself_is_exact(clip_folder):
    clip = CLIP(TowerFolder.find("clip_model", str(clip_folder)), CPU)
    texts, is_cut = clip.texts([*PROMPTS, "a " * 20])
    assert is_cut == [False, False, False, True]
    for i, text in enumerate(texts[:3]):
        assert agreement(clip.frames(still(i)), text[None]) == pytest.approx([100], abs=1e-3)


def test_a_still_video_is_consistent_and_does_not_move(clip_folder, videos, tmp_path):
    found = Towers(config_of(clip_folder), "cpu")
    (values,) = measure(
        [Video(videos / "0.mp4", PROMPTS[0])], found, Store(tmp_path / "m.json")
    ).values.values()
    assert values["consistency"] > 99.9
    assert values["motion"] < 0.5
    assert values["text_rank"] is None  # no other prompt


def test_consistency_is_that_of_frames_with_the_first_and_the_one_before():
    angles = torch.tensor([0.0, 0.3, 1.0]).double()
    frames = torch.stack([angles.cos(), angles.sin()], 1)
    cosines = torch.tensor([0.3, 0.3, 1.0, 0.7]).double().cos()  # with first, before, first, before
    assert consistency(frames) == pytest.approx(100 * float(cosines.mean()))
    assert consistency(frames[:1]) is None


@pytest.mark.parametrize("step", [1, 3])
def test_a_pan_moves_by_its_pixels(step):
    rng = np.random.default_rng(0)
    wide = torch.nn.functional.interpolate(
        torch.from_numpy(rng.random((1, 3, 12, 40))).float(), (96, 320), mode="bicubic"
    ).clamp(0, 1)
    picture = (wide[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    frames = np.stack([picture[:, i * step : i * step + 128] for i in range(6)])
    per_second = 100 * 8 * step / (96**2 + 128**2) ** 0.5
    # The top 5 % lie at the border, where half of what is seen is new.
    assert motion(frames, fps=8) == pytest.approx(per_second, rel=0.25)
    assert motion(frames, fps=16) == pytest.approx(2 * motion(frames, fps=8))
    assert motion(frames[:1], fps=8) is None


def test_rank_and_frames_on_the_way():
    assert rank_of_own([3.0, 1.0, 2.0, 3.0], 0) == pytest.approx((1 + 1 + 0.5) / 3)
    assert rank_of_own([3.0], 0) is None
    assert len(evenly_spaced(still(0, 121), 16)) == 16
    assert len(evenly_spaced(still(0, 5), 16)) == 5


@pytest.mark.parametrize("kind", ["Dinov2", "ViT"])
def test_another_image_tower_embeds_by_its_class_token(kind, tmp_path, vision):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**vision)
    more = {"add_pooling_layer": False} if kind == "ViT" else {}
    network = getattr(transformers, f"{kind}Model")(config, **more).eval()
    network.save_pretrained(tmp_path)
    transformers.BitImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(tmp_path)
    tower = ImageTower(TowerFolder.find("image_tower", str(tmp_path)), "image_tower", CPU)
    pixels = tower.processor(images=list(still(3, 2)), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = network(pixels).last_hidden_state[:, 0]
    expected = expected / expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(tower.frames(still(3, 2)), expected)


def test_what_is_stored_is_not_measured_again_and_what_changed_is(
    clip_folder, videos, tmp_path, monkeypatch
):
    folder = tmp_path / "videos"
    shutil.copytree(videos, folder)
    store = folder / "measures.json"
    pairs = [Video(folder / f"{i}.mp4", PROMPTS[i]) for i in range(3)]
    found = Towers(config_of(clip_folder), "cpu")
    first = measure(pairs, found, Store(store))
    made = []
    once = run.measure_one
    monkeypatch.setattr(run, "measure_one", lambda *a: made.append(a) or once(*a))
    assert measure(pairs, found, Store(store)) == first
    assert not made
    write_video(folder / "1.mp4", still(9), 8)
    (folder / "2.mp4").write_bytes(b"no video")
    again = measure(pairs, found, Store(store))
    assert len(made) == 1
    assert set(again.values) == {folder / "0.mp4", folder / "1.mp4"}
    assert again.values[folder / "1.mp4"] != first.values[folder / "1.mp4"]
    stored = json.loads(store.read_text())
    (network,) = stored["networks"].values()
    assert network["model.safetensors"]
    assert set(stored["videos"]) == {"0.mp4", "1.mp4", "2.mp4"}  # the last is that of before
    # One measure of one video alone takes nothing away.
    measure(
        pairs[:1], Towers(MeasureConfig(measures=["motion"], device="cpu"), "cpu"), Store(store)
    )
    assert json.loads(store.read_text()) == stored
    # Another prompt beside them changes the rank alone, which is taken with the text.
    made.clear()
    write_video(folder / "3.mp4", still(2), 8)
    measure([*pairs[:2], Video(folder / "3.mp4", "a star")], found, Store(store))
    assert [set(wanted) for *_, wanted in made] == [
        {"text", "text_rank"},
        {"text", "text_rank"},
        {"text", "text_rank", "consistency", "motion"},
    ]


def test_networks_that_cannot_judge_are_refused_by_name(clip_folder, tmp_path):
    def refused(folder, match):
        with pytest.raises(WanError, match=match) as caught:
            CLIP(TowerFolder.find("clip_model", str(folder)), CPU)
        assert str(caught.value).startswith("clip_model=")
        assert "\n" not in str(caught.value)

    broken = tmp_path / "clip"
    shutil.copytree(clip_folder, broken)
    weights = broken / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-100])
    with pytest.raises(WanError, match=r"model\.safetensors"):
        TowerFolder.find("clip_model", str(broken))
    weights.rename(broken / "pytorch_model.bin")
    refused(broken, "no .safetensors file")
    (broken / "config.json").unlink()
    refused(broken, r"no config\.json")
    refused(tmp_path / "nowhere", "no such folder")
    from safetensors.torch import load_file, save_file

    state = load_file(clip_folder / "model.safetensors")
    fewer = tmp_path / "fewer"
    shutil.copytree(clip_folder, fewer)
    save_file(
        {name: tensor for name, tensor in state.items() if name != "visual_projection.weight"},
        fewer / "model.safetensors",
        {"format": "pt"},
    )
    refused(fewer, r"its weights lack visual_projection\.weight")
    state["visual_projection.weight"][0] = float("nan")
    save_file(state, fewer / "model.safetensors", {"format": "pt"})
    with pytest.raises(WanError, match="not finite"):
        CLIP(TowerFolder.find("clip_model", str(fewer)), CPU).frames(still(0))


def test_missing_libraries_are_named_before_any_video_is_read(monkeypatch, clip_folder):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(WanError, match=r'motion needs OpenCV: pip install -e "\.\[metrics\]"'):
        Towers(MeasureConfig(measures=["motion"], device="cpu"), "cpu")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(WanError, match=r"need transformers: pip install"):
        Towers(config_of(clip_folder, measures=["text"]), "cpu")


def test_every_measure_says_what_it_means():
    assert set(measures.MEANING) == set(run.COLUMNS)


def test_the_command_groups_by_what_differs_and_names_what_it_leaves_out(tmp_path, capsys):
    words = ["prompt=a red circle", "allow_untrained=true", "num_frames=5", "steps=1,2", "seed=3,4"]
    words += ["height=64", "width=64", f"output_dir={tmp_path / 'videos'}"]
    for one in compose_runs(SAMPLE, words, sweep=True):
        assert not SampleCommand()(one)
    write_video(tmp_path / "stranger.mp4", still(0), 8)
    capsys.readouterr()
    (one,) = compose_runs(LINE, [str(tmp_path), "measures=[motion]"])
    assert main(one) == 0
    printed = capsys.readouterr()
    assert "steps=1" in printed.out
    assert printed.out.count("a red circle") == 4
    assert "| steps=2" in printed.out
    assert "left out: 1 mp4 files without a record" in printed.err
    assert measures.MEANING["motion"] in printed.out
    assert measures.MEANING["text"] not in printed.out


def test_a_folder_without_videos_and_measures_of_captions_are_refused(tmp_path):
    from configs.ablation import AblateConfig

    with pytest.raises(WanError, match=r"no video of infer\.sample"):
        find_videos(tmp_path)
    with pytest.raises(WanError, match="own detectors"):
        AblateConfig(checkpoint="x", measures=["motion"]).check_world()
    with pytest.raises(WanError, match="twice"):
        MeasureConfig(measures=["motion", "motion"])
    with pytest.raises(WanError, match=r"clip_model=x: read by measures=\[text,consistency\] only"):
        MeasureConfig(measures=["motion"], clip_model="x")
    with pytest.raises(WanError, match=r"nowhere: no such file or folder"):
        find_videos(tmp_path / "nowhere")
