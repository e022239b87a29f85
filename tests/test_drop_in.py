"""Pipelines and networks under the names and with the calls that scripts for diffusers use."""

import copy
import inspect
import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import wan
from wan import (
    AutoencoderKLWan,
    AutoTokenizer,
    DiffusionPipeline,
    UMT5EncoderModel,
    UniPCMultistepScheduler,
    WanDMDPipeline,
    WanError,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    export_to_video,
    load_image,
)
from wan.media.video import read_video
from wan.pipeline.parts import ON_EVERY_PART, ON_THE_TRANSFORMER

diffusers = pytest.importorskip("diffusers", reason="needs the extra parity")
transformers = pytest.importorskip("transformers", reason="needs the extra parity")

TEACHER = "builtin:miniature-teacher"
CALL = {
    "prompt": "a large blue star moving up",
    "height": 128,
    "width": 128,
    "num_frames": 5,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "output_type": "latent",
    "seed": 1,
}


@pytest.fixture(scope="module")
def pipe():
    return WanPipeline.from_pretrained(TEACHER, torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("drop_in") / "model"
    pipe.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expected(pipe):
    return pipe(**CALL).frames


def distance(a, b):
    return float((a - b).pow(2).mean().sqrt() / b.pow(2).mean().sqrt())


# --- parts as objects -----------------------------------------------------------------------------


def test_every_public_name_is_there_and_documented():
    for name in wan.__all__:
        assert name == "__version__" or inspect.getdoc(getattr(wan, name)), name


def test_parts_of_diffusers_and_transformers_give_the_same_video(folder, expected):
    """Their objects are recognised by what they have; the weights are shared, not copied."""
    theirs = diffusers.WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    vae = diffusers.AutoencoderKLWan.from_pretrained(folder, subfolder="vae")
    mixed = WanPipeline.from_pretrained(
        folder,
        transformer=theirs,
        vae=vae,
        text_encoder=transformers.UMT5EncoderModel.from_pretrained(
            folder, subfolder="text_encoder"
        ),
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder, subfolder="tokenizer"),
        scheduler=diffusers.UniPCMultistepScheduler.from_pretrained(folder, subfolder="scheduler"),
        torch_dtype=torch.float32,
    )
    assert distance(mixed(**CALL).frames, expected) < 1e-5
    assert mixed.transformer.patch_embedding.weight is theirs.patch_embedding.weight
    built = WanPipeline(**mixed.components, expand_timesteps=True)
    assert distance(built(**CALL).frames, expected) < 1e-5


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer"])
def test_an_object_of_another_kind_is_refused_as_a_part(part):
    with pytest.raises(WanError, match=part):
        WanPipeline.from_pretrained(TEACHER, **{part: 3})
    if part != "tokenizer":
        with pytest.raises(WanError, match=f"{part}: an object of type Linear"):
            WanPipeline(**{part: nn.Linear(1, 1)})


def test_a_part_that_is_none_is_not_loaded_and_named_when_it_is_needed():
    text = WanPipeline.from_pretrained(TEACHER, transformer=None, vae=None)
    assert list(text.modules) == ["text_encoder"]
    embeds, negative = text.encode_prompt("a star", "a circle")
    rest = WanPipeline.from_pretrained(TEACHER, text_encoder=None, tokenizer=None)
    for offload in ("none", "stage", "block"):
        rest.set_offload(offload)
        embedded = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "prompt": None}
        assert rest(**CALL | embedded).frames.isfinite().all()
    with pytest.raises(WanError, match="text_encoder=None: give prompt_embeds"):
        rest("a star")
    with pytest.raises(WanError, match="transformer=None: load the pipeline with it"):
        text("a star")
    rest.vae = None
    with pytest.raises(WanError, match='vae=None: call with output_type="latent"'):
        rest(prompt_embeds=embeds, negative_prompt_embeds=negative)


def test_a_part_taken_away_later_does_not_stop_other_settings():
    pipeline = WanPipeline.from_pretrained(TEACHER, torch_dtype=torch.float32)
    embeds, _ = pipeline.encode_prompt("a star", do_classifier_free_guidance=False)
    pipeline.text_encoder = None
    pipeline.to(torch.bfloat16)
    pipeline.enable_model_cpu_offload(device="cpu")
    pipeline.enable_sequential_cpu_offload(device="cpu")
    dtypes = {name: p.dtype for name, p in pipeline.transformer.named_parameters()}
    assert dtypes["blocks.0.ffn.up.weight"] == torch.bfloat16
    assert dtypes["blocks.0.modulation"] == torch.float32
    call = CALL | {"prompt": None, "guidance_scale": 1.0}
    assert pipeline(**call, prompt_embeds=embeds).frames.isfinite().all()


def test_another_text_encoder_makes_other_embeddings():
    """Embeddings are remembered for one encoder with one set of weights."""
    pipeline = WanPipeline.from_pretrained(TEACHER, transformer=None, vae=None)

    def encoded():
        return pipeline.encode_prompt("a star", do_classifier_free_guidance=False)[0]

    first = encoded()
    with torch.no_grad():
        pipeline.text_encoder.final_norm.weight.mul_(2)
    assert torch.equal(encoded(), 2 * first)
    pipeline.text_encoder.final_norm.weight.data.mul_(2)
    assert torch.equal(encoded(), 4 * first)
    other = copy.deepcopy(pipeline.text_encoder)
    with torch.no_grad():
        other.final_norm.weight.div_(4)
    pipeline.text_encoder = other
    assert torch.equal(encoded(), first)
    tokenizer = pipeline.tokenizer
    pipeline.tokenizer = copy.copy(tokenizer)
    pipeline.tokenizer._encode = lambda text: tokenizer._encode(text)[:1]
    assert not torch.equal(encoded(), first)


def test_attributes_that_a_pipeline_does_not_have_are_refused(pipe):
    with pytest.raises(WanError, match="no attribute schedulr; did you mean scheduler"):
        pipe.schedulr = None
    with pytest.raises(WanError, match="no attribute something_else; it has"):
        pipe.something_else = 1


def test_a_pipeline_from_another_one_shares_its_parts(pipe, expected):
    other = WanImageToVideoPipeline.from_pipe(pipe)
    assert other.transformer is pipe.transformer
    assert other.config.expand_timesteps
    call = {name: value for name, value in CALL.items() if name != "prompt"}
    image = Image.new("RGB", (128, 128), (255, 0, 0))
    assert torch.equal(
        other(image, CALL["prompt"], **call).frames, pipe(**CALL, image=image).frames
    )
    assert torch.equal(WanPipeline.from_pipe(other)(**CALL).frames, expected)
    for name in ("last_image", "image_embeds"):
        with pytest.raises(WanError, match=name):
            other(image, CALL["prompt"], **{name: image})
    with pytest.raises(WanError, match="image_encoder"):
        WanImageToVideoPipeline(**pipe.components, image_encoder=nn.Linear(1, 1))


# --- arguments of from_pretrained and save_pretrained ---------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ({"torch_dtype": torch.float16}, "float16 is too narrow"),
        ({"torch_dtype": "float64"}, "choose torch.bfloat16 or torch.float32"),
        ({"dtype": torch.float32, "torch_dtype": torch.bfloat16}, "mean one thing"),
        ({"dtype": {"decoder": torch.float32}}, "unknown decoder"),
        ({"device_map": "balanced"}, 'offload="stage"'),
        ({"device": "tpu"}, "choose auto, cpu, cuda"),
        ({"use_safetensors": False}, "only safetensors"),
        ({"low_cpu_mem_usage": False}, "leave it out"),
        ({"quantization_config": {"load_in_4bit": True}}, 'quantize="int8"'),
        ({"max_memory": {0: "8GB"}}, 'offload="stage"'),
        ({"custom_pipeline": "x"}, "a function of your own"),
        ({"revison": "main"}, "unknown revison"),
        ({"revision": "main"}, "shipped here"),
        ({"boundary_ratio": 0.9}, "give the second one as transformer_2= too"),
    ],
)
def test_what_loading_cannot_do_is_refused_with_what_to_write(arguments, remedy):
    with pytest.raises(WanError, match=remedy.replace("(", r"\(")):
        WanPipeline.from_pretrained(TEACHER, **arguments)


def test_dtypes_are_those_asked_for_and_else_those_of_the_device(folder):
    default = WanPipeline.from_pretrained(folder)
    assert default.dtype == torch.float32  # on a CPU
    by_part = {"default": "bfloat16", "vae": torch.float32}
    mixed = WanPipeline.from_pretrained(folder, torch_dtype=by_part, device_map="cpu")
    assert mixed.dtype == torch.bfloat16
    assert {p.dtype for p in mixed.vae.parameters()} == {torch.float32}
    network = WanTransformer3DModel.from_pretrained(
        folder, subfolder="transformer", torch_dtype="bfloat16", low_cpu_mem_usage=True
    )
    assert network.dtype == torch.bfloat16


def test_settings_of_the_model_may_be_given(folder):
    pipeline = WanPipeline.from_pretrained(folder, text_encoder=None, transformer=None)
    pipeline.register_to_config(expand_timesteps=False)
    assert not pipeline.config.expand_timesteps
    with pytest.raises(WanError, match="unknown shift; known are boundary_ratio"):
        pipeline.register_to_config(shift=3)
    with pytest.raises(WanError, match="a model named None"):
        WanPipeline.from_pretrained(None)
    assert not WanPipeline.from_pretrained(folder, expand_timesteps=False).config.expand_timesteps


@pytest.mark.parametrize("save", ["pipeline", "part"])
def test_saving_writes_no_pickles_and_refuses_uploads(pipe, tmp_path, save):
    target = pipe if save == "pipeline" else pipe.transformer
    with pytest.warns(UserWarning, match="safetensors files are written instead"):
        target.save_pretrained(tmp_path / "safe", safe_serialization=False)
    assert list(tmp_path.rglob("*.safetensors"))
    assert not [*tmp_path.rglob("*.bin"), *tmp_path.rglob("*.pt")]
    with pytest.raises(WanError, match="hf upload"):
        target.save_pretrained(tmp_path / "model", push_to_hub=True)
    with pytest.raises(WanError, match="max_shard_size='5 apples'"):
        target.save_pretrained(tmp_path / "model", max_shard_size="5 apples")
    assert not (tmp_path / "model").exists()


def test_a_part_is_saved_over_an_older_one_in_other_shards(pipe, tmp_path):
    pipe.transformer.save_pretrained(tmp_path, max_shard_size="200KB")
    shards = set(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    pipe.transformer.save_pretrained(tmp_path)
    assert [file.name for file in sorted(tmp_path.iterdir())] == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    theirs = diffusers.WanTransformer3DModel.from_pretrained(tmp_path)
    ours = WanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(theirs.proj_out.weight, ours.head.proj.weight)


# --- the call -------------------------------------------------------------------------------------


def test_an_output_is_read_by_attribute_name_and_position(pipe, expected):
    output = pipe(**CALL)
    assert torch.equal(output[0], expected)
    assert torch.equal(output["frames"], expected)
    assert torch.equal(pipe(**CALL, return_dict=False)[0], expected)
    with pytest.raises(KeyError, match="frames"):
        output["videos"]


def test_images_are_pictures_arrays_or_tensors_in_zero_to_one(pipe):
    levels = torch.randint(256, (128, 128, 3), dtype=torch.uint8)
    picture = Image.fromarray(levels.numpy())
    expected = pipe.encode_image(picture, 128, 128)
    forms = [
        levels.numpy(),
        levels.numpy().astype(np.float32) / 255,
        levels.permute(2, 0, 1),
        levels.permute(2, 0, 1).float() / 255,
        levels.permute(2, 0, 1)[None].float() / 255,
        [picture],
    ]
    for form in forms:
        torch.testing.assert_close(pipe.encode_image(form, 128, 128), expected, atol=1e-5, rtol=0)
    with pytest.warns(UserWarning, match=r"taken to be in \[-1, 1\]"):
        signed = pipe.encode_image(levels.permute(2, 0, 1).float() / 127.5 - 1, 128, 128)
    torch.testing.assert_close(signed, expected, atol=1e-5, rtol=0)


def test_a_callback_changes_guidance_and_is_told_what_runs(pipe):
    states = []

    def change(pipeline, step, timestep, tensors):
        states.append((pipeline.num_timesteps, pipeline.do_classifier_free_guidance))
        assert pipeline.current_timestep == timestep
        pipeline._guidance_scale += 1
        return {}

    changed = pipe(**CALL, callback_on_step_end=change).frames
    assert states == [(2, True), (2, True)]
    assert pipe.guidance_scale == CALL["guidance_scale"] + 2
    assert pipe.current_timestep is None
    assert distance(changed, pipe(**CALL).frames) > 1e-3

    def turn_on(pipeline, step, timestep, tensors):
        pipeline._guidance_scale = 4.0

    with pytest.raises(WanError, match="began without guidance"):
        pipe(**CALL | {"guidance_scale": 1.0}, callback_on_step_end=turn_on)


def test_a_callback_object_names_its_own_tensors(pipe):
    class Cut:
        tensor_inputs = ("latents", "prompt_embeds")
        names = None

        def __call__(self, pipeline, step, timestep, tensors):
            Cut.names = set(tensors)
            return tensors

    pipe(**CALL, callback_on_step_end=Cut())
    assert Cut.names == {"latents", "prompt_embeds"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_kwargs": {"mask": 1}}, "attention_kwargs has mask: only scale"),
        ({"attention_kwargs": {"scale": "big"}}, "must be a finite number"),
        ({"num_videos_per_prompt": 0}, "need at least 1"),
        ({"guidance_scale": "3"}, "guidance_scale='3': need a number"),
        ({"shift": "x"}, "shift='x': need a number"),
        ({"max_sequence_length": "a"}, "need a number"),
        ({"timesteps": ["x"], "num_inference_steps": None}, "timesteps='x': need a number"),
        ({"callback_on_step_end": 3}, "need a function"),
        ({"latents": np.zeros(3)}, "latents of type ndarray"),
        ({"num_videos_per_prompt": True}, "need at least 1"),
        ({"image_fit": "pad", "image": Image.new("RGB", (64, 64))}, "choose one of resize, crop"),
    ],
)
def test_what_a_call_cannot_do_is_refused(pipe, arguments, message):
    with pytest.raises(WanError, match=message):
        pipe(**CALL | arguments)


def test_numbers_of_numpy_and_none_are_numbers(pipe, expected):
    call = CALL | {"num_videos_per_prompt": None, "height": np.int64(128)}
    call |= {"guidance_scale": np.float32(3.0), "num_inference_steps": np.int64(2)}
    assert torch.equal(pipe(**call).frames, expected)


def test_a_picture_of_another_shape_is_stretched_or_cropped(pipe):
    levels = np.arange(100 * 200 * 3).astype(np.uint8).reshape(100, 200, 3)
    picture = Image.fromarray(levels)
    stretched, cropped = (
        pipe(**CALL, image=picture, image_fit=fit).frames for fit in ("resize", "crop")
    )
    assert torch.equal(pipe(**CALL, image=picture).frames, stretched)
    assert not torch.equal(stretched, cropped)


def test_the_progress_bar_can_be_set_and_is_silent_where_no_one_sees_it(pipe, capsys):
    pipe(**CALL)
    assert "2/2" not in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=False, desc="steps")
    try:
        pipe(**CALL)
    finally:
        pipe.set_progress_bar_config()
    shown = capsys.readouterr().err
    assert "steps" in shown
    assert "2/2" in shown


# --- settings under diffusers' names --------------------------------------------------------------


def test_a_compiled_transformer_is_a_part(pipe, expected):
    plain = pipe.transformer
    try:
        pipe.transformer = torch.compile(plain, backend="eager")
        assert distance(pipe(**CALL).frames, expected) < 1e-5
        pipe.enable_sequential_cpu_offload(device="cpu")
        assert distance(pipe(**CALL).frames, expected) < 1e-5
    finally:
        pipe.set_offload("none")
        pipe.transformer = plain


def test_attention_backends_have_diffusers_names(pipe, expected):
    try:
        for name in ("native", "_native_math", "_native_flash"):
            pipe.transformer.set_attention_backend(name)
            assert distance(pipe(**CALL).frames, expected) < 1e-4
        with pytest.raises(WanError, match="attention backend 'flex': known are native"):
            pipe.transformer.set_attention_backend("flex")
    finally:
        pipe.transformer.reset_attention_backend()


def test_switches_without_effect_say_so(pipe):
    with pytest.warns(UserWarning, match="one by one"):
        pipe.disable_vae_slicing()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.enable_vae_slicing()
        pipe.enable_xformers_memory_efficient_attention()
        pipe.disable_xformers_memory_efficient_attention()
        pipe.disable_attention_slicing()
        pipe.maybe_free_model_hooks()
    pipe.vae.disable_slicing()
    for options in (
        {"offload_type": "row_level"},
        {"num_blocks_per_group": 3},
        {"offload_to_disk_path": "here"},
        {"exclude_modules": ["vae"]},
    ):
        with pytest.raises(WanError):
            pipe.enable_group_offload("cpu", **options)
    assert pipe.offload == "none"


def test_a_model_of_any_class_is_loaded_as_what_it_is(folder, tmp_path):
    for name, kind in ((TEACHER, WanPipeline), ("builtin:miniature", WanDMDPipeline)):
        loaded = DiffusionPipeline.from_pretrained(name, torch_dtype=torch.bfloat16, vae=None)
        assert type(loaded) is kind
        assert loaded.dtype == torch.bfloat16
    part = folder / "transformer"
    DiffusionPipeline.from_pretrained(folder, transformer=part, local_files_only=True)
    with pytest.raises(WanError, match="unknown revison"):
        DiffusionPipeline.from_pretrained(TEACHER, revison="main")


def test_videos_are_processed_by_hand_as_diffusers_does(pipe, folder):
    theirs = diffusers.WanPipeline.from_pretrained(folder)
    assert pipe.vae_scale_factor_spatial == theirs.vae_scale_factor_spatial
    assert pipe.vae_scale_factor_temporal == theirs.vae_scale_factor_temporal
    video = torch.rand(2, 3, 2, 8, 8) * 2.2 - 1.1
    for kind in ("np", "pt"):
        expected = theirs.video_processor.postprocess_video(video, output_type=kind)
        found = pipe.video_processor.postprocess_video(video, output_type=kind)
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=1e-6)
    picture = Image.fromarray(np.arange(32 * 48 * 3).astype(np.uint8).reshape(32, 48, 3))
    expected = theirs.video_processor.preprocess(picture, height=64, width=32)
    found = pipe.video_processor.preprocess(picture, height=64, width=32)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


# --- networks alone -------------------------------------------------------------------------------


def test_the_transformer_answers_both_calls(pipe, folder):
    theirs = diffusers.WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    x = torch.randn(2, 16, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 7, pipe.transformer.config.text_dim)
    call = {"hidden_states": x, "encoder_hidden_states": text}
    per_token = torch.linspace(0, 900, 32).expand(2, -1)
    with torch.no_grad():
        for timestep in (torch.tensor([300, 700]), per_token):
            expected = theirs(**call, timestep=timestep).sample
            ours = pipe.transformer(**call, timestep=timestep)
            assert distance(ours.sample, expected) < 1e-5
            assert torch.equal(ours[0], ours.sample)
            by_place = pipe.transformer(x, timestep, text, return_dict=False)
            assert torch.equal(by_place[0], ours.sample)
    for wrong in (
        {"encoder_hidden_states_image": text},
        {"attention_kwargs": {"scale": 2.0}},
        {"latents": x},
    ):
        with pytest.raises(WanError):
            pipe.transformer(**call, timestep=torch.tensor([1, 2]), **wrong)
    with pytest.raises(WanError, match="needs hidden_states"):
        pipe.transformer(hidden_states=x, timestep=torch.tensor([1, 2]))


def test_gradient_checkpointing_changes_no_gradient(pipe):
    network = copy.deepcopy(pipe.transformer).requires_grad_(True)
    x, text = torch.randn(1, 16, 1, 4, 4), torch.randn(1, 3, network.config.text_dim)
    gradients = []
    for switch in (network.disable_gradient_checkpointing, network.enable_gradient_checkpointing):
        switch()
        network.zero_grad()
        network(x, torch.tensor([500.0]), text).square().mean().backward()
        gradients.append(network.blocks[0].ffn.up.weight.grad.clone())
    assert network.is_gradient_checkpointing
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_autoencoder_encodes_and_decodes_as_diffusers_does(pipe, folder):
    theirs = diffusers.AutoencoderKLWan.from_pretrained(folder, subfolder="vae").eval()
    video = torch.rand(2, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected, found = theirs.encode(video).latent_dist, pipe.vae.encode(video).latent_dist
        assert distance(found.mode(), expected.mode()) < 1e-5
        assert distance(found.std, expected.std) < 1e-5
        draws = [one.sample(torch.Generator().manual_seed(1)) for one in (found, expected)]
        assert distance(*draws) < 1e-5
        z = expected.mode()
        assert distance(pipe.vae.decode(z).sample, theirs.decode(z).sample) < 1e-5
        pipe.vae.enable_slicing()
        sliced = pipe.vae.decode(z, return_dict=False)[0]
        pipe.vae.disable_slicing()
        assert distance(sliced, theirs.decode(z).sample) < 1e-5
        assert distance(pipe.vae(video).sample, theirs(video).sample) < 1e-5
    assert pipe.vae.config.scale_factor_spatial == theirs.config.scale_factor_spatial
    with pytest.raises(WanError, match="must be square"):
        pipe.vae.enable_tiling(tile_sample_min_height=64)
    with pytest.raises(WanError, match="multiples of"):
        pipe.vae.enable_tiling(65, 65)


def test_networks_are_made_from_single_settings():
    settings = {
        "base_dim": 3,
        "z_dim": 16,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    }
    vae, theirs = AutoencoderKLWan(**settings), diffusers.AutoencoderKLWan(**settings)
    assert vae.num_parameters() == theirs.num_parameters()
    again = AutoencoderKLWan.from_config(theirs.config)
    assert again.config == vae.config
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 32}
    network = WanTransformer3DModel(**sizes, text_dim=32, qk_norm="rms_norm_across_heads")
    expected = diffusers.WanTransformer3DModel(**sizes, text_dim=32)
    assert network.num_parameters() == expected.num_parameters()
    assert network.device.type == "cpu"
    with pytest.raises(WanError, match="qk_norm"):
        WanTransformer3DModel(**sizes, qk_norm=None)


def test_the_text_encoder_answers_as_transformers_does(pipe, folder):
    theirs = transformers.UMT5EncoderModel.from_pretrained(folder, subfolder="text_encoder")
    ids, mask = torch.tensor([[5, 9, 1, 0]]), torch.tensor([[1, 1, 1, 0]])
    encoder = UMT5EncoderModel.from_pretrained(
        folder, subfolder="text_encoder", dtype=torch.float32
    )
    with torch.no_grad():
        expected = theirs(ids, mask).last_hidden_state[:, :3]
        found = encoder(ids, mask)
        again = encoder(input_ids=ids, attention_mask=mask, return_dict=False)[0]
    assert distance(found.last_hidden_state[:, :3], expected) < 1e-5
    assert torch.equal(found[0], again)


def test_the_tokenizer_answers_as_transformers_does(pipe, folder):
    theirs = transformers.AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
    ours = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)
    texts = ["a small red circle", "a large blue star moving up on a brown background"]
    for given, options in (
        (texts[0], {}),
        (texts, {"padding": True, "return_tensors": "pt"}),
        (texts, {"padding": "max_length", "max_length": 6, "truncation": True}),
        (texts[1], {"max_length": 4, "truncation": True, "return_tensors": "pt"}),
        (texts, {"add_special_tokens": False, "padding": "longest"}),
    ):
        found, expected = ours(given, **options), theirs(given, **options)
        for name in ("input_ids", "attention_mask"):
            np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(expected[name]))
        assert found.input_ids is found["input_ids"]
    assert len(ours) == len(theirs)
    assert (ours.pad_token_id, ours.eos_token_id) == (theirs.pad_token_id, theirs.eos_token_id)
    assert type(pipe.tokenizer) is AutoTokenizer
    with pytest.raises(WanError, match="give padding=True"):
        ours(texts, return_tensors="pt")
    with pytest.raises(WanError, match="return_tensors: unknown np"):
        ours(texts, return_tensors="np")


def test_a_scheduler_is_found_by_the_name_of_a_model(pipe):
    scheduler = UniPCMultistepScheduler.from_pretrained(
        TEACHER, subfolder="scheduler", local_files_only=True, flow_shift=7.0
    )
    assert scheduler.config == {**pipe.scheduler.config, "flow_shift": 7.0}
    assert type(pipe.scheduler) is UniPCMultistepScheduler
    with pytest.raises(WanError, match="only safetensors"):
        UniPCMultistepScheduler.from_pretrained(TEACHER, use_safetensors=False)


def test_a_network_comes_from_a_single_file(folder, pipe):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    for config in (None, folder / "transformer", pipe.transformer.config):
        network = WanTransformer3DModel.from_single_file(
            file, config=config, torch_dtype=torch.float32
        )
        assert torch.equal(network.head.proj.weight, pipe.transformer.head.proj.weight)
    with pytest.raises(WanError, match='subfolder="transformer"'):
        WanTransformer3DModel.from_pretrained(folder)


# --- pictures and videos --------------------------------------------------------------------------


def test_pictures_come_as_pillow_images(tmp_path):
    picture = Image.new("RGB", (6, 4), (10, 20, 30))
    picture.save(tmp_path / "a.png")
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), picture):
        loaded = load_image(given)
        assert loaded.size == (6, 4)
        assert loaded.getpixel((0, 0)) == (10, 20, 30)
    assert load_image(picture, convert_method=lambda one: one.convert("L")).mode == "L"
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "b.png")
    with pytest.raises(WanError, match="transparent"):
        load_image(Image.new("RGBA", (2, 2), (0, 0, 0, 0)))
    with pytest.raises(WanError, match="can't be fetched"):
        load_image("http://127.0.0.1:9/none.png")


def test_videos_are_written_from_any_frames(tmp_path):
    levels = np.full((5, 32, 48, 3), 128, dtype=np.uint8)
    floats = levels.astype(np.float32) / 255
    forms = [levels, floats, list(floats), [Image.fromarray(one) for one in levels]]
    forms.append(torch.from_numpy(floats).permute(0, 3, 1, 2))
    for form in forms:
        path = export_to_video(form, tmp_path / "a.mp4", fps=16)
        frames, info = read_video(path)
        assert info.fps == 16
        assert np.abs(frames.astype(int) - 128).max() <= 3
    assert export_to_video(levels).endswith(".mp4")
    good, bad = (export_to_video(levels, tmp_path / f"{q}.mp4", quality=q) for q in (9, 0))
    assert good != bad
    for wrong, message in (
        ({"video_frames": []}, "empty"),
        ({"video_frames": floats[None]}, "one by one"),
        ({"video_frames": floats * 3}, r"\[0, 1\]"),
        ({"video_frames": levels, "quality": 11}, "quality"),
        ({"video_frames": levels, "output_video_path": tmp_path / "no" / "a.mp4"}, "no folder"),
        ({"video_frames": levels, "macro_block_size": 64}, "macro_block_size"),
    ):
        with pytest.raises(WanError, match=message):
            export_to_video(**wrong)


def test_a_student_takes_what_a_script_gives_a_base_model():
    student = WanDMDPipeline.from_pretrained("builtin:miniature", torch_dtype=torch.float32)
    call = {"prompt": "a star", "num_frames": 5, "output_type": "latent"}
    torch.manual_seed(0)
    first = student(**call, guidance_scale=1.0, num_inference_steps=3).frames
    torch.manual_seed(0)
    assert torch.equal(student(**call, num_videos_per_prompt=None)[0], first)


def test_the_second_expert_may_be_given_with_its_boundary(folder):
    """Two experts out of one release, as scripts put them together."""

    def run(library):
        experts = [
            library.WanTransformer3DModel.from_pretrained(
                folder, subfolder="transformer", torch_dtype=torch.float32
            )
            for _ in range(2)
        ]
        with torch.no_grad():
            for parameter in experts[1].parameters():
                parameter.mul_(0.97)
        given = dict(zip(("transformer", "transformer_2"), experts, strict=True))
        pipeline = library.WanPipeline.from_pretrained(
            folder, **given, boundary_ratio=0.9, torch_dtype=torch.float32
        )
        call = {n: v for n, v in CALL.items() if n != "seed"}
        return pipeline(
            **call | {"num_inference_steps": 4, "guidance_scale_2": 2.0},
            generator=torch.Generator().manual_seed(1),
        ).frames

    assert distance(run(wan), run(diffusers)) < 1e-4
    second = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    with pytest.raises(WanError, match="give boundary_ratio too"):
        WanPipeline.from_pretrained(folder, transformer_2=second)


def test_a_pipeline_loaded_in_inference_mode_runs(expected):
    with torch.inference_mode():
        pipeline = WanPipeline.from_pretrained(TEACHER, torch_dtype=torch.float32)
    assert torch.equal(pipeline(**CALL).frames, expected)


def test_a_pickled_pipeline_gives_the_same_video(expected):
    pipeline = WanPipeline.from_pretrained(TEACHER, torch_dtype=torch.float32)
    assert torch.equal(pickle.loads(pickle.dumps(pipeline))(**CALL).frames, expected)


@pytest.mark.parametrize("name", sorted(ON_EVERY_PART | ON_THE_TRANSFORMER))
def test_a_method_without_effect_says_what_to_do_instead(pipe, name):
    assert hasattr(diffusers.WanTransformer3DModel, name), "no method that scripts call"
    with pytest.raises(WanError, match=f"{name} is not supported here: "):
        getattr(pipe.transformer, name)("anything")
    assert hasattr(pipe.vae, name) == (name in ON_EVERY_PART)


def test_loops_by_hand_name_a_cache_and_image_pipelines_prepare_noise_alone(pipe):
    with pipe.transformer.cache_context("cond"):
        pass
    with pytest.raises(WanError, match=r"batch_size comes first, not a Tensor; .* encode_image"):
        pipe.prepare_latents(torch.zeros(1, 3, 128, 128), 1, 16, 128, 128, 5)


def test_from_pipe_takes_a_dtype_and_refuses_unknown_names():
    pipeline = WanPipeline.from_pretrained(TEACHER, torch_dtype=torch.float32)
    other = WanImageToVideoPipeline.from_pipe(pipeline, torch_dtype=torch.bfloat16)
    assert other.dtype == torch.bfloat16
    assert other.transformer is pipeline.transformer
    assert WanPipeline.from_pipe(other).dtype == torch.bfloat16
    with pytest.raises(WanError, match=r"from_pipe: unknown boundry_ratio; known are .*boundary"):
        WanPipeline.from_pipe(pipeline, boundry_ratio=0.9)


def test_a_device_map_of_one_device_is_that_device():
    for device in ("cpu", torch.device("cpu")):
        vae = AutoencoderKLWan.from_pretrained(TEACHER, subfolder="vae", device_map={"": device})
        assert vae.device.type == "cpu"
    with pytest.raises(WanError, match="spreads the parts over devices"):
        WanPipeline.from_pretrained(TEACHER, device_map={"vae": "cpu", "transformer": 0})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"height": 128.0}, r"height=128.0: need a whole number, such as int"),
        ({"num_frames": "5"}, r"num_frames='5': need a whole number"),
        ({"generator": 3, "seed": None}, r"generator=3: need a torch.Generator .* as seed="),
        ({"attention_kwargs": 0.5}, r"attention_kwargs=0.5: need a mapping"),
        ({"callback_on_step_end": lambda *_: 5}, r"callback returned a int: it must return a dict"),
    ],
)
def test_an_argument_of_another_type_is_refused_by_name(pipe, given, message):
    with pytest.raises(WanError, match=message):
        pipe(**CALL | given)
