"""Names of tensors in LoRA files: what each one says about expert, parameter and role.

A name such as `diffusion_model.transformer_2.blocks.0.self_attn.q.lora_A.weight` has three parts,
which are read independently, so that every combination of them is understood:

- the front: words that wrappers and tools put before the network's own name (`diffusion_model.`,
  `base_model.model.`, `_orig_mod.`, `lora_unet_`, `lycoris_`), among them the name of an expert;
- the network's name of a module or parameter, in one of `LAYOUTS`, with dots, underscores or both;
- the suffix, which says what the tensor is: a factor of a pair, alpha, rank, a whole difference.

Names are compared with every dot read as an underscore. No two parameters of a layout then have the
same name, which a test holds.

Sources: the savers of diffusers and peft, FastVideo's extractor and its names of Wan's layers,
kohya's and musubi's trainers, LyCORIS, OneTrainer, ai-toolkit, DiffSynth-Studio, and the readers of
ComfyUI and LightX2V.
"""

import re
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from wan.weights.keys import LAYOUTS as RELEASED_LAYOUTS
from wan.weights.keys import table

EXPERTS = ("transformer", "transformer_2")
LAYOUTS = (*RELEASED_LAYOUTS, "fastvideo")

# Diffusers' names of modules -> FastVideo's names inside a running pipeline; others are equal.
FASTVIDEO_MODULES = {
    "patch_embedding": "patch_embedding.proj",
    "condition_embedder.text_embedder.linear_1": "condition_embedder.text_embedder.fc_in",
    "condition_embedder.text_embedder.linear_2": "condition_embedder.text_embedder.fc_out",
    "condition_embedder.time_embedder.linear_1": "condition_embedder.time_embedder.mlp.fc_in",
    "condition_embedder.time_embedder.linear_2": "condition_embedder.time_embedder.mlp.fc_out",
    "condition_embedder.time_proj": "condition_embedder.time_modulation.linear",
    "blocks.#.attn1.to_q": "blocks.#.to_q",
    "blocks.#.attn1.to_k": "blocks.#.to_k",
    "blocks.#.attn1.to_v": "blocks.#.to_v",
    "blocks.#.attn1.to_out.0": "blocks.#.to_out",
    "blocks.#.attn1.norm_q": "blocks.#.norm_q",
    "blocks.#.attn1.norm_k": "blocks.#.norm_k",
    "blocks.#.attn2.to_out.0": "blocks.#.attn2.to_out",
    "blocks.#.ffn.net.0.proj": "blocks.#.ffn.fc_in",
    "blocks.#.ffn.net.2": "blocks.#.ffn.fc_out",
    "blocks.#.norm2": "blocks.#.self_attn_residual_norm.norm",
}
# Attention processors of older diffusers name the output projection without its place in a list.
OLDER_DIFFUSERS = {f"blocks.#.attn{n}.to_out.0": f"blocks.#.attn{n}.to_out" for n in (1, 2)}

# --- the front ------------------------------------------------------------------------------------

# Words for one expert. Plain `transformer` and `dit` are not among them: files for either expert
# carry these.
EXPERT_WORDS = {
    "transformer_1": EXPERTS[0],
    "high_noise_model": EXPERTS[0],
    "high_noise": EXPERTS[0],
    "transformer_2": EXPERTS[1],
    "dit2": EXPERTS[1],
    "low_noise_model": EXPERTS[1],
    "low_noise": EXPERTS[1],
}
FRONT_WORDS = (
    *EXPERT_WORDS,
    *("base_model", "diffusion_model", "model", "diffusion", "module", "pipe", "network", "net"),
    *("transformer", "dit", "unet", "generator", "lora", "lycoris"),
    *("orig_mod", "fsdp_wrapped_module", "checkpoint_wrapped_module"),
)
FRONT = re.compile(rf"[._]*(?:(?:{'|'.join(FRONT_WORDS)})[._]+)*")
FRONT_WORD = re.compile("|".join(FRONT_WORDS))
# Wrappers of single layers, and of attention in older diffusers: between the network's own words.
INNER_WRAPPER = re.compile(
    r"(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|processor)\."
)

# --- the suffix -----------------------------------------------------------------------------------

# peft puts the adapter's name between the factor and `weight`, which trainers may leave out.
PAIR_SUFFIX = re.compile(
    r"[._](?P<style>lora_|lora\.|lora_linear_layer\.)(?P<side>A|B|down|up)"
    r"(?:\.(?!(?:weight|bias)$)[^.]+)?(?P<leaf>\.weight|\.bias)?$"
)
OTHER_SUFFIX = re.compile(
    r"\.(?P<suffix>alpha|lora_alpha|rank|lora_rank|diff|diff_b|diff_m|diff_param|w_norm|b_norm)$"
)
OTHER_ROLES = {
    "alpha": "alpha",
    "lora_alpha": "alpha",
    "rank": "rank",
    "lora_rank": "rank",
    "diff": "diff",
    "w_norm": "diff",  # LyCORIS' differences of norms
    "diff_b": "diff_bias",
    "b_norm": "diff_bias",
    "diff_m": "diff_table",
    "diff_param": "diff_parameter",
}
PAIR_ROLES = ("down", "up", "up_bias", "alpha", "rank")
DIFF_ROLES = ("diff", "diff_bias", "diff_table", "diff_parameter")


class TensorName(NamedTuple):
    """A name in a LoRA file, taken apart.

    Attributes:
        text: the whole name.
        expert: the expert that its front names; None if it names none.
        module: the network's own part, as written.
        role: "down", "up", "up_bias", "alpha", "rank" or one of `DIFF_ROLES`.
        style: the suffix in words, for people: "lora_A/lora_B", "alpha per layer".
    """

    text: str
    expert: str | None
    module: str
    role: str
    style: str

    @property
    def key(self) -> str:
        """The module's name with underscores for dots."""
        return self.module.replace(".", "_")


def read_name(text: str) -> TensorName | None:
    """Take a name apart; None if its suffix is unknown."""
    if (match := PAIR_SUFFIX.search(text)) is not None:
        down, up = ("A", "B") if match["side"] in "AB" else ("down", "up")
        style = f"{match['style']}{down}/{match['style']}{up}"
        role = "down" if match["side"] == down else "up"
        if match["leaf"] == ".bias":
            if role == "down":
                return None
            role = "up_bias"
    elif (match := OTHER_SUFFIX.search(text)) is not None:
        role = OTHER_ROLES[match["suffix"]]
        style = f"{role} per layer" if role in PAIR_ROLES else "full differences"
    else:
        return None
    stem = INNER_WRAPPER.sub("", text[: match.start()])
    front = FRONT.match(stem + "_")  # a difference of the front alone still has an empty module
    assert front is not None  # it matches the empty text
    words = FRONT_WORD.findall(front.group())
    experts = [EXPERT_WORDS[word] for word in words if word in EXPERT_WORDS]
    return TensorName(text, experts[-1] if experts else None, stem[front.end() :], role, style)


# --- the network's own name -----------------------------------------------------------------------


class Parameter(NamedTuple):
    """A parameter under our name, and its released name with dots."""

    ours: str
    released: str


@cache
def parameters(layout: str) -> dict[str, Parameter]:
    """The parameters of a layout by their names with underscores; `#` is the number of a block."""
    renames = {"fastvideo": FASTVIDEO_MODULES, "diffusers": OLDER_DIFFUSERS}.get(layout, {})
    found = {}
    for released, ours in table("transformer", base_layout(layout)).to_ours.items():
        module, _, leaf = released.rpartition(".")
        parameter = Parameter(ours, released)
        if layout != "fastvideo" or module not in renames:
            found[released.replace(".", "_")] = parameter
        if module in renames:
            found[f"{renames[module]}.{leaf}".replace(".", "_")] = parameter
    return found


def base_layout(layout: str) -> str:
    """The released layout that a layout's names derive from."""
    return layout if layout in RELEASED_LAYOUTS else "diffusers"


BLOCK_NUMBER = re.compile(r"^blocks_(0|[1-9][0-9]{0,3})_")


def find(layout: str, key: str) -> Parameter | None:
    """A parameter by its name in a layout, with underscores for dots; None if there is none."""
    if "#" in key:
        return None
    number = BLOCK_NUMBER.match(key)
    if number is None:
        return parameters(layout).get(key)
    found = parameters(layout).get(f"blocks_#_{key[number.end() :]}")
    return found and Parameter(*(name.replace("#", number[1]) for name in found))


def target(layout: str, name: TensorName) -> Parameter | None:
    """The parameter that a tensor changes, or its pair does; None if the layout has none."""
    key = name.key
    if name.role in ("up_bias", "diff_bias"):
        return find(layout, f"{key}_bias")
    if name.role == "diff_table":
        tables = (f"{key}_modulation", f"{key}_scale_shift_table", key)
        places = [find(layout, one.lstrip("_")) for one in tables]
        return next((p for p in places if p is not None and p.ours.endswith("modulation")), None)
    weight = find(layout, f"{key}_weight")
    if name.role == "diff_parameter" or (name.role == "diff" and weight is None):
        return find(layout, key)  # the name is the parameter's own, such as a modulation table's
    return weight


def best_layout(names: Iterable[TensorName]) -> str:
    """The layout that knows most of the names.

    Layouts are never mixed, because `norm2` is another module in each of the released ones.
    """
    names = list(names)
    return max(LAYOUTS, key=lambda layout: sum(target(layout, n) is not None for n in names))
