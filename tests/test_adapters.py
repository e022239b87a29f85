"""LoRA adapters on loaded networks: against diffusers and peft, and exact to the merged result."""

import copy
import warnings

import pytest
import torch
from test_lora import (
    WIDTH,
    numbers,
    run,
    state_of,
    tiny_diffusers,
    tiny_dit,
    trained,
    write,
)
from test_offload import tokenizer_folder  # noqa: F401  (a fixture)
from test_pipeline import PROMPT, SIZE, build, distance, seeded
from torch import Tensor, nn

from wan.errors import WanError
from wan.lora.adapters import adapters_of
from wan.lora.files import parse_lora
from wan.lora.merge import LoRAMerge, fold_lora, merge_lora, read_lora
from wan.lora.source import find_lora, only_lora
from wan.pipeline.adapters import PipelineAdapters
from wan.pipeline.pipeline import WanPipeline
from wan.runtime.offload import streaming, visiting
from wan.weights.quantize import quantize

QUERY = "blocks.0.attn1.to_q"
BLOCKS = [
    f"blocks.{n}.{layer}"
    for n in (0, 1)
    for layer in ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "attn2.to_v")
]


class Model(PipelineAdapters):
    """A pipeline's transformers and nothing else."""

    def __init__(self, **networks: nn.Module) -> None:
        self._networks = networks

    def networks(self) -> dict[str, nn.Module]:
        return self._networks


def file_of(layers: list[str], seed: int, rank: int = 3, front: str = "transformer.") -> dict:
    """A LoRA file that changes these layers, by diffusers' names."""
    tensors = {}
    for i, layer in enumerate(layers):
        stem = f"{front}{layer}"
        tensors[f"{stem}.lora_A.weight"] = numbers(rank, WIDTH, seed=seed + 2 * i)
        tensors[f"{stem}.lora_B.weight"] = numbers(WIDTH, rank, seed=seed + 2 * i + 1)
    return tensors


FILES = {
    "a": file_of(BLOCKS, 100),
    "b": file_of(BLOCKS[:5], 200, rank=2),
    "c": file_of(BLOCKS[3:], 300),
    "d": file_of(BLOCKS, 400),
}


def theirs(two: bool = False):
    """diffusers' loader on the tiny networks."""
    loaders = pytest.importorskip("diffusers.loaders")
    pytest.importorskip("peft")
    pipe = loaders.WanLoraLoaderMixin()
    pipe.hf_device_map = None
    pipe.transformer = tiny_diffusers()
    pipe.transformer_2 = tiny_diffusers() if two else None
    parts = {"transformer": pipe.transformer, "transformer_2": pipe.transformer_2}
    pipe.components = {part: network for part, network in parts.items() if network is not None}
    return pipe


def ours(two: bool = False) -> Model:
    networks = {"transformer": tiny_dit()}
    if two:
        networks["transformer_2"] = tiny_dit()
    return Model(**networks)


def run_diffusers(network: nn.Module, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(1, 4, 2, 4, 4, generator=generator)
    context = torch.randn(1, 5, 16, generator=generator)
    options = {"attention_kwargs": {"scale": scale}}
    timestep = torch.tensor([300.0])
    return network(latents, timestep, context, return_dict=False, **options)[0]


def tensors_of(name: str) -> dict[str, Tensor]:
    """Copies, since peft keeps the tensors that it is given and swaps their values."""
    return {key: tensor.clone() for key, tensor in FILES[name].items()}


def load(name: str, second: bool = False, **options):
    def step(pipe):
        into = {"load_into_transformer_2": True} if second else {}
        pipe.load_lora_weights(tensors_of(name), **({"adapter_name": name} | into | options))

    return step


def call(method: str, *arguments, **options):
    return lambda pipe: getattr(pipe, method)(*arguments, **options)


SCRIPTS = {
    "one": [load("a")],
    "the last one loaded is the active one": [load("a"), load("b")],
    "default names": [
        lambda pipe: pipe.load_lora_weights(tensors_of("a")),
        lambda pipe: pipe.load_lora_weights(tensors_of("b")),
        call("set_adapters", ["default_0", "default_1"], [0.5, None]),
    ],
    "two with strengths": [load("a"), load("b"), call("set_adapters", ["a", "b"], [0.3, -0.7])],
    "one strength for two": [load("a"), load("c"), call("set_adapters", ["c", "a"], 0.4)],
    "no strengths": [load("a"), call("set_adapters", "a", 0.4), call("set_adapters", ["a"])],
    "strength of parts": [load("a"), call("set_adapters", "a", {"transformer": 0.6})],
    "strength of layers": [
        load("a"),
        call("set_adapters", ["a"], [{"transformer": {"blocks.0": 0.3, "attn2": 2.0, "": 0.7}}]),
    ],
    "strength 0": [load("a"), call("set_adapters", ["a"], [0.0])],
    "off": [load("a"), call("disable_lora")],
    "off and on": [load("a"), load("c"), call("disable_lora"), call("enable_lora")],
    "on after a change": [
        load("a"),
        load("b"),
        call("disable_lora"),
        call("set_adapters", ["a"], [0.5]),
        call("enable_lora"),
    ],
    "deleted": [
        load("a"),
        load("b"),
        call("set_adapters", ["a", "b"]),
        call("delete_adapters", "a"),
    ],
    "the active one deleted": [load("c"), load("a"), load("b"), call("delete_adapters", "b")],
    "all deleted": [load("a"), load("b"), call("delete_adapters", ["a", "b"])],
    "unloaded": [load("a"), load("b"), call("unload_lora_weights")],
    "loaded again": [
        load("a"),
        call("unload_lora_weights"),
        load("a"),
        call("set_adapters", "a", 2),
    ],
    "fused": [load("a"), call("fuse_lora")],
    "fused with a scale": [load("a"), load("b"), call("fuse_lora", lora_scale=0.4)],
    "both fused": [
        load("a"),
        load("b"),
        call("set_adapters", ["a", "b"], [0.5, 2]),
        call("fuse_lora"),
    ],
    "some fused": [
        load("a"),
        load("b"),
        call("set_adapters", ["a", "b"]),
        call("fuse_lora", adapter_names=["b"]),
    ],
    "a fused layer alone hides others": [
        load("b"),
        load("a"),
        call("fuse_lora", adapter_names=["b"]),
        call("set_adapters", ["a"], 2),
    ],
    "unfused": [load("a"), call("fuse_lora"), call("unfuse_lora")],
    "unfused and weighed": [
        load("a"),
        call("fuse_lora"),
        call("unfuse_lora"),
        call("set_adapters", ["a"], [0.2]),
    ],
    "fused for good": [load("a"), call("fuse_lora"), call("unload_lora_weights")],
    "fused for good, and another": [
        load("a"),
        call("fuse_lora", lora_scale=0.5),
        call("unload_lora_weights"),
        load("b"),
        call("set_adapters", ["b"], [0.5]),
    ],
    "unfused too late": [
        load("a"),
        call("fuse_lora"),
        call("unload_lora_weights"),
        call("unfuse_lora"),
    ],
    "fused and off": [load("a"), call("fuse_lora"), call("disable_lora")],
    "fused, off and on": [load("a"), call("fuse_lora"), call("disable_lora"), call("enable_lora")],
    "another in its place": [
        load("a"),
        load("d", adapter_name="a", hotswap=True),
    ],
    "another in its place, weighed": [
        load("a"),
        call("set_adapters", ["a"], [0.5]),
        load("d", adapter_name="a", hotswap=True),
    ],
    "fused and deleted": [load("a"), call("fuse_lora"), call("delete_adapters", "a")],
}


@pytest.mark.filterwarnings("ignore")  # both warn of the same; see the tests of warnings below
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_step_of_a_script_gives_diffusers_numbers(name):
    mine, reference = ours(), theirs()
    for step in SCRIPTS[name]:
        step(mine)
        step(reference)
        expected = run_diffusers(reference.transformer)
        torch.testing.assert_close(run(mine.networks()["transformer"]), expected, rtol=0, atol=2e-5)
        assert mine.get_list_adapters() == reference.get_list_adapters()
        assert mine.get_active_adapters() == list(reference.get_active_adapters())
        assert mine.num_fused_loras == reference.num_fused_loras
        assert mine.fused_loras == reference.fused_loras


TWO_EXPERTS = {
    "one each": [load("a"), load("b", second=True)],
    "set together": [
        load("a"),
        load("b", second=True),
        call("set_adapters", ["a", "b"], [0.5, 2.0]),
    ],
    "by part": [
        load("a"),
        load("a", second=True),
        call("set_adapters", ["a"], [{"transformer": 3.0, "transformer_2": 1.5}]),
    ],
    "one expert alone": [load("a", second=True), call("set_adapters", "a", {"transformer_2": 0.5})],
    "one is left out": [load("a"), load("b", second=True), call("set_adapters", ["b"])],
    "fused": [
        load("a"),
        load("b", second=True),
        call("fuse_lora", components=["transformer", "transformer_2"], lora_scale=0.5),
        call("unload_lora_weights"),
    ],
    "the default component": [
        load("a"),
        load("a", second=True),
        call("fuse_lora"),
        call("unfuse_lora"),
    ],
    "deleted in both": [load("a"), load("a", second=True), call("delete_adapters", "a")],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TWO_EXPERTS)
def test_two_experts_give_diffusers_numbers(name):
    mine, reference = ours(two=True), theirs(two=True)
    for step in TWO_EXPERTS[name]:
        step(mine)
        step(reference)
        for part, network in mine.networks().items():
            expected = run_diffusers(getattr(reference, part))
            torch.testing.assert_close(run(network), expected, rtol=0, atol=2e-5, msg=part)
        assert mine.get_list_adapters() == reference.get_list_adapters()
        assert mine.num_fused_loras == reference.num_fused_loras


@pytest.mark.filterwarnings("ignore")
def test_loading_unfuses_as_in_peft():
    mine, reference = ours(), theirs()
    for pipe in (mine, reference):
        load("a")(pipe)
        pipe.fuse_lora()
        load("c")(pipe)
    expected = run_diffusers(reference.transformer)
    torch.testing.assert_close(run(mine.networks()["transformer"]), expected, rtol=0, atol=2e-5)
    assert mine.num_fused_loras == 0  # diffusers still counts it


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_scale_of_a_call_gives_diffusers_numbers_and_ends_with_it(scale):
    mine, reference = ours(), theirs()
    for pipe in (mine, reference):
        load("a")(pipe)
        load("b")(pipe)
        pipe.set_adapters(["a", "b"], [0.5, 1.5])
    (network,) = mine.networks().values()
    before = state_of(network)
    with mine.adapters.scaled(scale):
        expected = run_diffusers(reference.transformer, scale)
        torch.testing.assert_close(run(network), expected, rtol=0, atol=2e-5)
    assert_same_bits(network, before)


# --- exact ----------------------------------------------------------------------------------------


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().view(torch.uint8).numpy().tobytes()


def assert_same_bits(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Equal bit for bit, the sign of zeros included."""
    for name, parameter in network.named_parameters():
        assert bits(parameter) == bits(state[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_exactly_the_merged_lora(tmp_path, dtype):
    path = write(tmp_path / "a.safetensors", FILES["a"])
    merged, network = tiny_dit().to(dtype), tiny_dit().to(dtype)
    merge_lora(merged, read_lora(path), 0.7)
    model = Model(transformer=network)
    model.load_lora_weights(path, adapter_name="a")
    model.set_adapters("a", 0.7)
    assert_same_bits(network, dict(merged.named_parameters()))


def test_several_adapters_are_summed_in_float32_and_rounded_once():
    network = tiny_dit().to(torch.bfloat16)
    weight = network.get_parameter("blocks.0.self_attention.query.weight")
    start = weight.detach().clone()
    model = Model(transformer=network)
    model.load_lora_weights(FILES["a"], "a")
    model.load_lora_weights(FILES["b"], "b")
    model.set_adapters(["a", "b"], [0.5, -2.0])
    pairs = [parse_lora(FILES[name]).pairs for name in "ab"]
    changes = [found["blocks.0.self_attention.query.weight"].delta() for found in pairs]
    expected = start.float() + 0.5 * changes[0] + -2.0 * changes[1]
    assert torch.equal(weight, expected.bfloat16())


@pytest.mark.parametrize(
    "steps",
    [
        [load("a"), call("set_adapters", "a", 0.0)],
        [load("a"), call("unload_lora_weights")],
        [load("a"), load("b"), call("delete_adapters", ["b", "a"])],
        [load("a"), call("disable_lora")],
        [load("a"), call("set_adapters", [])],
        [load("a"), call("fuse_lora", lora_scale=0.3), call("unfuse_lora"), call("disable_lora")],
    ],
)
def test_without_an_adapter_the_weights_are_the_old_ones_bit_for_bit(steps):
    network = tiny_dit().to(torch.bfloat16)
    with torch.no_grad():  # adding zero would make it plus zero
        network.get_parameter("blocks.0.self_attention.query.weight").fill_(-0.0)
    before = state_of(network)
    model = Model(transformer=network)
    for step in steps:
        step(model)
    assert_same_bits(network, before)


def test_unfusing_gives_the_weights_from_before_bit_for_bit():
    network = tiny_dit().to(torch.bfloat16)
    model = Model(transformer=network)
    model.load_lora_weights(FILES["a"], "a")
    before = state_of(network)
    model.fuse_lora(lora_scale=3.0)
    assert not torch.equal(
        state_of(network)["blocks.0.self_attention.query.weight"],
        before["blocks.0.self_attention.query.weight"],
    )
    model.unfuse_lora()
    assert_same_bits(network, before)


def test_whole_differences_are_switched_too():
    network = tiny_dit()
    before = state_of(network)
    delta = numbers(1, 6, WIDTH)
    model = Model(transformer=network)
    model.load_lora_weights({"diffusion_model.blocks.0.diff_m": delta}, "m")
    model.set_adapters("m", 0.5)
    assert torch.equal(network.blocks[0].modulation, before["blocks.0.modulation"] + 0.5 * delta)
    model.unload_lora_weights()
    assert_same_bits(network, before)


def test_weights_are_written_in_place_and_originals_let_go():
    network = tiny_dit()
    parameters = dict(network.named_parameters())
    model = Model(transformer=network)
    model.load_lora_weights(FILES["a"], "a")
    adapters = adapters_of(network)
    assert len(adapters._originals) == len(BLOCKS)
    assert all(network.get_parameter(name) is p for name, p in parameters.items())
    model.disable_lora()
    assert not adapters._originals


def test_tensors_that_change_after_loading_change_no_adapter():
    model, expected = ours(), ours()
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors_of("a").items()}
    model.load_lora_weights(tensors, "a")
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.zero_()
    load("a")(expected)
    for one in (model, expected):
        one.set_adapters("a", 0.5)
    assert_same_bits(model.networks()["transformer"], state_of(expected.networks()["transformer"]))


def test_a_file_that_is_cut_after_loading_changes_no_adapter(tmp_path):
    path = write(tmp_path / "a.safetensors", FILES["a"])
    model, expected = ours(), ours()
    model.load_lora_weights(path, "a")
    with path.open("r+b") as file:  # a mapped file would kill the process here
        file.truncate(1000)
    load("a")(expected)
    for one in (model, expected):
        one.set_adapters("a", 0.5)
    assert_same_bits(model.networks()["transformer"], state_of(expected.networks()["transformer"]))


def test_only_an_adapter_that_is_there_can_be_hotswapped():
    model = ours()
    load("a")(model)
    with pytest.raises(WanError, match="unknown y"):
        model.load_lora_weights(FILES["b"], "y", hotswap=True)
    model.fuse_lora()
    with pytest.raises(WanError, match="unfuse_lora"):
        model.load_lora_weights(FILES["b"], "a", hotswap=True)


def test_adapters_go_with_their_network():
    model = ours()
    model.load_lora_weights(FILES["a"], "a")
    first = model.networks()["transformer"]
    model._networks["transformer"] = tiny_dit()
    assert model.get_list_adapters() == {}
    with pytest.raises(WanError, match="none is loaded"):
        model.set_adapters("a")
    assert Model(transformer=first).get_list_adapters() == {"transformer": ["a"]}


def test_a_copied_network_has_adapters_of_its_own():
    network = tiny_dit()
    before = state_of(network)
    model = Model(transformer=network)
    model.load_lora_weights(FILES["a"], "a")
    changed = state_of(network)
    twin = copy.deepcopy(network)
    Model(transformer=twin).unload_lora_weights()
    assert_same_bits(twin, before)
    assert_same_bits(network, changed)
    assert model.get_active_adapters() == ["a"]


def test_a_compiled_network_is_changed_inside():
    network = tiny_dit()
    wrapped = torch.compile(network, backend="eager")
    Model(transformer=wrapped).load_lora_weights(FILES["a"], "a")
    assert Model(transformer=network).get_active_adapters() == ["a"]


def test_factors_move_without_a_change_of_weights():
    model = ours()
    model.load_lora_weights(FILES["a"], "a")
    (network,) = model.networks().values()
    before = state_of(network)
    model.set_lora_device(["a"], "cpu")
    assert_same_bits(network, before)


# --- during a call --------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", ["none", "stage", "block"])
def test_a_callback_may_change_adapters(tokenizer_folder, offload):  # noqa: F811
    """The next step runs with the new weights, keys and values of the text included."""
    tensors = file_of(["blocks.0.attn2.to_k", "blocks.1.attn1.to_q"], 5)

    def pipeline(strength: float):
        pipe = build(tokenizer_folder)
        pipe.load_lora_weights(tensors, "a")
        pipe.set_adapters("a", strength)
        return pipe

    def latents(pipe, callback=None):
        names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
        options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
        return pipe(PROMPT, **SIZE, seed=1, output_type="latent", **options).frames

    def switch(pipe, step, timestep, tensors):
        if step == 0:
            pipe.set_adapters("a", 5.0)

    pipe, strong = pipeline(1.0), pipeline(5.0)
    pipe.set_offload(offload)
    switched = latents(pipe, switch)
    assert torch.equal(latents(pipe), latents(strong))  # the change outlasts the call
    weights = state_of(strong.transformer)

    def exchange(pipe, step, timestep, tensors):
        if step == 0:  # new embeddings have their keys and values computed anew
            pipe.transformer.load_state_dict(weights)
            return {name: tensors[name] for name in ("prompt_embeds", "negative_prompt_embeds")}
        return None

    expected = latents(pipeline(1.0), exchange)
    assert torch.equal(switched, expected)
    assert not torch.equal(switched, latents(strong))


def test_a_video_with_adapters_on_both_experts_equals_diffusers(tokenizer_folder, tmp_path):  # noqa: F811
    """Strengths by expert, and a callback that lowers them while the video is made."""
    diffusers = pytest.importorskip("diffusers")
    build(tokenizer_folder, two_experts=True).save_pretrained(tmp_path / "a14b")
    reference = diffusers.WanPipeline.from_pretrained(tmp_path / "a14b", dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    mine = WanPipeline.from_pretrained(tmp_path / "a14b", dtype=torch.float32)
    path = write(tmp_path / "a.safetensors", FILES["a"])
    names = ["high", "low"]

    def weaker(pipe, step, timestep, tensors):
        if step in (1, 3):
            pipe.set_adapters(names, [1.0, 0.5])
        return tensors

    settings = {
        **SIZE,
        "num_inference_steps": 5,
        "guidance_scale": 4.0,
        "max_sequence_length": 16,
        "output_type": "latent",
        "callback_on_step_end": weaker,
    }
    latents = []
    for pipe in (mine, reference):
        pipe.load_lora_weights(str(path), adapter_name="high")
        pipe.load_lora_weights(tensors_of("b"), adapter_name="low", load_into_transformer_2=True)
        pipe.set_adapters(names, [{"transformer": 3.0}, 1.5])
        latents.append(pipe(PROMPT, generator=seeded(), **settings).frames)
        plain = settings | {"callback_on_step_end": None}
        pipe.disable_lora()
        latents.append(pipe(PROMPT, generator=seeded(), **plain).frames)
    assert distance(latents[0], latents[2]) <= 1e-4
    assert distance(latents[1], latents[3]) <= 1e-4
    assert distance(latents[0], latents[1]) > 0.01


@pytest.mark.filterwarnings("ignore")
def test_a_script_that_fuses_each_expert_gives_diffusers_videos(tokenizer_folder, tmp_path):  # noqa: F811
    """The order of calls that people use for pairs of few-step LoRAs; and the scale of a call."""
    diffusers = pytest.importorskip("diffusers")
    build(tokenizer_folder, two_experts=True).save_pretrained(tmp_path / "a14b")
    reference = diffusers.WanPipeline.from_pretrained(tmp_path / "a14b", dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    mine = WanPipeline.from_pretrained(tmp_path / "a14b", dtype=torch.float32)
    settings = {
        **SIZE,
        "num_inference_steps": 5,
        "guidance_scale": 4.0,
        "max_sequence_length": 16,
        "output_type": "latent",
    }
    made = []
    for pipe in (mine, reference):
        pipe.load_lora_weights(tensors_of("a"), adapter_name="few")
        second = {"load_into_transformer_2": True}
        pipe.load_lora_weights(tensors_of("b"), adapter_name="few_2", **second)
        pipe.set_adapters(["few", "few_2"], adapter_weights=[1.0, 1.0])
        scale = {"attention_kwargs": {"scale": 0.5}}
        videos = [pipe(PROMPT, generator=seeded(), **settings, **scale).frames]
        pipe.fuse_lora(adapter_names=["few"], lora_scale=3.0, components=["transformer"])
        pipe.fuse_lora(adapter_names=["few_2"], lora_scale=1.0, components=["transformer_2"])
        pipe.unload_lora_weights()
        videos.append(pipe(PROMPT, generator=seeded(), **settings).frames)
        videos.append(pipe(PROMPT, generator=seeded(), **settings, **scale).frames)
        made.append(videos)
    for video, expected in zip(*made, strict=True):
        assert distance(video, expected) <= 1e-5
    assert distance(made[0][0], made[0][1]) > 1e-3
    assert torch.equal(made[0][1], made[0][2])  # what is fused has no scale


@pytest.mark.parametrize("away", [visiting, streaming])
def test_changes_while_weights_are_away_wait(away):
    network = tiny_dit()
    before = state_of(network)
    adapters = adapters_of(network)
    with adapters.scaled(1.0):
        with away(network, torch.device("cpu")):
            adapters.add("a", parse_lora(FILES["a"]))
            assert adapters.pending
        assert_same_bits(network, before)
        adapters.apply(now=True)
        assert not adapters.pending
    merged = tiny_dit()
    merge_lora(merged, parse_lora(FILES["a"]))
    assert_same_bits(network, state_of(merged))


# --- refusals and warnings ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([load("a"), load("a")], "in use already; choose another name"),
        ([call("set_adapters", "a")], "unknown a; none is loaded"),
        ([load("a"), call("set_adapters", ["a", "z"])], "unknown z; there are a"),
        ([load("a"), call("set_adapters", ["a"], [1.0, 2.0])], "1 adapter_names and 2"),
        ([load("a"), call("set_adapters", "a", float("nan"))], "must be a finite number"),
        ([load("a"), call("set_adapters", "a", "high")], "must be a finite number"),
        ([load("a"), call("delete_adapters", "z")], "unknown z; there are a"),
        ([load("a"), call("fuse_lora", components=[])], "components: empty"),
        ([load("a"), call("fuse_lora", components=["unet"])], "unknown unet"),
        ([load("a"), call("fuse_lora", adapter_names=["z"])], "unknown z"),
        (
            [load("a", second=True)],
            r"_2=True\): the transformers .* transformer$",
        ),
        ([load("a", use_safetensors=False)], "only .safetensors"),
        ([call("load_lora_weights", "no/such/file.safetensors")], "no such file or folder"),
        ([call("load_lora_weights", file_of([QUERY], 1, front="vae."))], "none of Wan's"),
    ],
)
def test_wrong_requests_change_nothing(steps, message):
    model = ours()
    for step in steps[:-1]:
        step(model)
    (network,) = model.networks().values()
    before, names = state_of(network), model.get_list_adapters()
    with pytest.raises(WanError, match=message):
        steps[-1](model)
    assert_same_bits(network, before)
    assert model.get_list_adapters() == names


def test_quantised_weights_are_refused_with_what_to_write():
    model = ours()
    quantize(model.networks()["transformer"], "int8")
    with pytest.raises(WanError, match=r"from_pretrained\(\.\., loras="):
        load("a")(model)


def test_a_merge_into_a_network_with_adapters_is_refused():
    model = ours()
    load("a")(model)
    with pytest.raises(WanError, match="unload_lora_weights"):
        merge_lora(model.networks()["transformer"], parse_lora(FILES["b"]))
    model.unload_lora_weights()
    merge_lora(model.networks()["transformer"], parse_lora(FILES["b"]))


def test_an_overflow_is_refused_by_safe_fusing():
    model = ours()
    huge = {name: tensor * 1e25 for name, tensor in FILES["a"].items()}
    model.load_lora_weights(huge, "a")
    with pytest.raises(WanError, match="not finite once fused"):
        model.fuse_lora(safe_fusing=True)
    assert model.num_fused_loras == 0


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([load("a"), load("b"), call("delete_adapters", "b")], "'a' is active now"),
        ([load("a"), call("fuse_lora"), load("b")], "a: no longer fused"),
        (
            [load("a"), load("b"), call("fuse_lora"), call("set_adapters", "a")],
            "'a' has no effect in layers where b is fused",
        ),
        ([load("a"), call("fuse_lora"), call("fuse_lora")], "'a' is fused already"),
        ([call("fuse_lora")], "no LoRA adapter to fuse"),
        ([load("a"), call("disable_lora"), load("b")], "adapters are switched off; call enable"),
        ([load("a"), call("set_adapters", "a", {"unet": 1.0})], "unet are ignored"),
    ],
)
def test_what_has_no_effect_is_warned_of(steps, message):
    model = ours()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in steps[:-1]:
            step(model)
    with pytest.warns(UserWarning, match=message):
        steps[-1](model)


def test_a_strength_for_a_part_without_the_adapter_is_warned_of():
    model = ours(two=True)
    load("a")(model)
    with pytest.warns(UserWarning, match="'a' has no weights for transformer_2"):
        model.set_adapters("a", {"transformer": 0.5, "transformer_2": 0.5})


def test_a_file_of_the_other_expert_is_refused_and_one_for_both_gives_each_its_half():
    model = ours(two=True)
    low = file_of(BLOCKS, 7, front="transformer_2.")
    with pytest.raises(WanError, match="names say transformer_2"):
        model.load_lora_weights(low, "low")
    both = FILES["a"] | low
    model.load_lora_weights(both, "x")
    model.load_lora_weights(both, "x", load_into_transformer_2=True)
    for part, tensors in (("transformer", FILES["a"]), ("transformer_2", low)):
        merged = tiny_dit()
        merge_lora(merged, parse_lora(tensors))
        assert_same_bits(model.networks()[part], state_of(merged))


def test_merging_while_loading_checks_the_expert_too(tokenizer_folder, tmp_path):  # noqa: F811
    build(tokenizer_folder, two_experts=True).save_pretrained(tmp_path / "a14b")
    low = LoRAMerge(parse_lora(file_of(BLOCKS, 7, front="transformer_2.")))
    with pytest.raises(WanError, match="names say transformer_2"):
        WanPipeline.from_pretrained(tmp_path / "a14b", loras={"transformer": low})
    pipe = WanPipeline.from_pretrained(
        tmp_path / "a14b", dtype=torch.float32, loras={"transformer_2": [low, low]}
    )
    plain = WanPipeline.from_pretrained(tmp_path / "a14b", dtype=torch.float32)
    plain.load_lora_weights(file_of(BLOCKS, 7), "low", load_into_transformer_2=True)
    plain.set_adapters("low", 2.0)
    for name, value in state_of(pipe.transformer_2).items():
        torch.testing.assert_close(plain.transformer_2.get_parameter(name), value)


# --- files ----------------------------------------------------------------------------------------


def test_files_are_found_by_path_folder_and_weight_name(tmp_path):
    folder = tmp_path / "loras"
    folder.mkdir()
    path = write(folder / "pytorch_lora_weights.safetensors", FILES["a"])
    assert find_lora(str(path)) == find_lora(folder) == path
    assert find_lora(tmp_path, subfolder="loras") == path
    other = write(folder / "b.safetensors", FILES["b"])
    assert find_lora(folder) == path
    assert find_lora(folder, "b.safetensors") == other
    assert find_lora(tmp_path, "b.safetensors", "loras") == other
    with pytest.raises(FileNotFoundError, match=r"c\.safetensors"):
        find_lora(folder, "c.safetensors")
    with pytest.raises(WanError, match="say nothing"):
        find_lora(path, "b.safetensors")
    with pytest.raises(WanError, match="no such file or folder, and not a hub id"):
        find_lora("loras/missing.safetensors")
    with pytest.raises(WanError, match="can't be fetched"):
        find_lora("someone/some-lora", "a.safetensors", local_files_only=True, cache_dir=tmp_path)


def test_a_repository_in_the_hubs_cache_is_found_without_the_network(tmp_path):
    repository = tmp_path / "models--someone--style"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    folder = repository / "snapshots" / commit / "wan"
    folder.mkdir(parents=True)
    path = write(folder / "style.safetensors", FILES["a"])
    options = {"cache_dir": tmp_path, "local_files_only": True}
    assert find_lora("someone/style", "style.safetensors", "wan", **options) == path
    assert find_lora("someone/style", "wan/style.safetensors", **options) == path
    assert find_lora("someone/style", subfolder="wan", **options) == path
    with pytest.raises(WanError, match="exactly one"):
        find_lora("someone/style", **options)
    model = ours()
    model.load_lora_weights("someone/style", weight_name="wan/style.safetensors", **options)
    assert model.get_active_adapters() == ["default_0"]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["README.md", "style.safetensors"], "style.safetensors"),
        (
            ["x/pytorch_lora_weights.safetensors", "x/a.safetensors"],
            "pytorch_lora_weights.safetensors",
        ),
        (["adapter_model.safetensors", "b.safetensors"], "adapter_model.safetensors"),
    ],
)
def test_the_one_lora_of_a_repository_is_found(files, found):
    assert only_lora("a/b", files, "x/" if files[0].startswith("x/") else "") == found
    with pytest.raises(WanError, match="name its file with weight_name="):
        only_lora("a/b", ["a.safetensors", "b.safetensors"], "")


def test_saved_layers_are_read_by_diffusers_and_back(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    dit = trained()
    settings = {"r": 4, "lora_alpha": 8, "target_modules": {"to_q"}}
    bare = {name.removeprefix("transformer."): tensor for name, tensor in FILES["a"].items()}
    Model.save_lora_weights(tmp_path / "one", bare, transformer_lora_adapter_metadata=settings)
    diffusers.WanPipeline.save_lora_weights(
        tmp_path / "theirs", bare, transformer_lora_adapter_metadata=dict(settings)
    )
    mine, reference = (
        read_lora(tmp_path / name / "pytorch_lora_weights.safetensors")
        for name in ("one", "theirs")
    )
    for name, pair in reference.pairs.items():
        assert torch.equal(pair.delta(), mine.pairs[name].delta())
        assert pair.scale == 8 / 3
    Model.save_lora_weights(
        tmp_path,
        transformer_lora_layers=dit,
        transformer_2_lora_layers=bare,
        weight_name="b.safetensors",
    )
    fold_lora(dit)
    network = tiny_dit()
    merge_lora(network, read_lora(tmp_path / "b.safetensors", "transformer"))
    for name, value in state_of(dit).items():
        torch.testing.assert_close(network.get_parameter(name), value, rtol=1e-6, atol=1e-6)
    low = read_lora(tmp_path / "b.safetensors", "transformer_2")
    assert set(low.pairs) == set(mine.pairs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to save"),
        ({"transformer_lora_layers": {"a.b": torch.ones(2)}}, "no LoRA"),
        ({"transformer_lora_layers": FILES["a"], "safe_serialization": False}, "only .safetensors"),
        (
            {"transformer_lora_layers": FILES["a"], "weight_name": "a.bin"},
            "must end in",
        ),
        ({"transformer_lora_adapter_metadata": {"r": 4}}, "without transformer_lora_layers"),
    ],
)
def test_what_cannot_be_saved_is_refused(tmp_path, options, message):
    with pytest.raises(WanError, match=message):
        Model.save_lora_weights(tmp_path, **options)
    assert not list(tmp_path.iterdir())
