"""Parameter names: ours <-> the released diffusers layout <-> the released official layout.

The tables are written by hand, one row per parameter, and hold whole names: nothing is replaced
inside a name, so a rule can't hit a name it was not written for. (Official code numbers a block's
norms 1, 3, 2 in their order of use and diffusers numbers them 1, 2, 3, so the one norm that has
parameters is `norm3` there and `norm2` here; the head's `modulation` and a block's `modulation` are
different parameters.) In a table no name occurs twice in a column, which makes it a bijection.

A released VAE numbers its blocks by generation: Wan2.1 counts through all levels of a list, Wan2.2
nests levels. Our names go by level for both, so a VAE's table depends on `VAELevels`.

`*` stands for weight and bias, `#` for the number of a transformer block.
Source: the released configs and key lists; diffusers `scripts/convert_wan_to_diffusers.py`.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from typing import NamedTuple

from wan.errors import WanError

MOST_BLOCKS = 64  # of a VAE's level; the releases have 2
COMPONENTS = ("transformer", "vae", "text_encoder")
LAYOUTS = ("diffusers", "official")

# What wrappers put in front of every name: repacked files, DDP, torch.compile, FSDP, trainers.
PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "diffusion.model.",
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "module.",
    "model.",
    "transformer.",
    "pipe.dit.",
    "dit.",
    "text_encoder.",
)
# The same wrappers around single blocks: segments inside a name, of which no parameter has one.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# Tensors that stand beside a weight `x.weight` as `x.SEGMENT` and are no parameters.
WEIGHT_SCALES = ("scale_weight", "weight_scale")  # its numbers are multiplied with it
INPUT_SCALES = ("scale_input", "input_scale")  # for products in 8 bits, which are not made here
FORMAT = "comfy_quant"  # JSON that names how the weight is stored
# Tensors of a whole file: the mark of ComfyUI's scaled files, and the tokenizer of a text encoder.
SCALED_MARK, SPIECE = "scaled_fp8", "spiece_model"
BESIDE = (*WEIGHT_SCALES, *INPUT_SCALES, FORMAT, SCALED_MARK, SPIECE)

# Second names that files may carry for a tensor: (component, layout) -> {second name: first name}.
# Where both are there, the second one is what the network reads.
ALIASES = {("text_encoder", "diffusers"): {"encoder.embed_tokens.weight": "shared.weight"}}

Row = tuple[str, str, str]  # ours, diffusers, official


class VAELevels(NamedTuple):
    """The two fields of a VAE's config.json that the numbering of its keys depends on."""

    is_residual: bool  # Wan2.2 nests levels; Wan2.1 counts through
    num_res_blocks: int  # residual blocks per encoder level; a decoder level has one more


class KeyLayout(NamedTuple):
    """The naming scheme of a file."""

    layout: str  # one of LAYOUTS
    prefix: str  # in front of every name, often ""
    vae_levels: VAELevels | None  # set if and only if the component is a VAE


# --- the tables -----------------------------------------------------------------------------------

MAX_VAE_LEVELS = 8  # a stride of 128; the released models have 4 levels


def transformer_rows() -> Iterator[Row]:
    condition = "condition_embedder"
    yield "patch_embedding.*", "patch_embedding.*", "patch_embedding.*"
    yield "time_embedding.in_proj.*", f"{condition}.time_embedder.linear_1.*", "time_embedding.0.*"
    yield "time_embedding.out_proj.*", f"{condition}.time_embedder.linear_2.*", "time_embedding.2.*"
    yield "time_modulation.*", f"{condition}.time_proj.*", "time_projection.1.*"
    yield "text_embedding.in_proj.*", f"{condition}.text_embedder.linear_1.*", "text_embedding.0.*"
    yield "text_embedding.out_proj.*", f"{condition}.text_embedder.linear_2.*", "text_embedding.2.*"
    yield "blocks.#.modulation", "blocks.#.scale_shift_table", "blocks.#.modulation"
    for ours, diffusers, official in (
        ("blocks.#.self_attention", "blocks.#.attn1", "blocks.#.self_attn"),
        ("blocks.#.cross_attention", "blocks.#.attn2", "blocks.#.cross_attn"),
    ):
        yield f"{ours}.query.*", f"{diffusers}.to_q.*", f"{official}.q.*"
        yield f"{ours}.key.*", f"{diffusers}.to_k.*", f"{official}.k.*"
        yield f"{ours}.value.*", f"{diffusers}.to_v.*", f"{official}.v.*"
        yield f"{ours}.out.*", f"{diffusers}.to_out.0.*", f"{official}.o.*"
        yield f"{ours}.query_norm.weight", f"{diffusers}.norm_q.weight", f"{official}.norm_q.weight"
        yield f"{ours}.key_norm.weight", f"{diffusers}.norm_k.weight", f"{official}.norm_k.weight"
    yield "blocks.#.cross_norm.*", "blocks.#.norm2.*", "blocks.#.norm3.*"
    yield "blocks.#.ffn.up.*", "blocks.#.ffn.net.0.proj.*", "blocks.#.ffn.0.*"
    yield "blocks.#.ffn.down.*", "blocks.#.ffn.net.2.*", "blocks.#.ffn.2.*"
    yield "head.modulation", "scale_shift_table", "head.modulation"
    yield "head.proj.*", "proj_out.*", "head.head.*"


def text_encoder_rows() -> Iterator[Row]:
    block, attention, ffn = "encoder.block.#", "SelfAttention", "DenseReluDense"
    yield "token_embedding.weight", "shared.weight", "token_embedding.weight"
    for ours, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
        yield (
            f"blocks.#.attention.{ours}.weight",
            f"{block}.layer.0.{attention}.{letter}.weight",
            f"blocks.#.attn.{letter}.weight",
        )
    yield (
        "blocks.#.attention.relative_bias.weight",
        f"{block}.layer.0.{attention}.relative_attention_bias.weight",
        "blocks.#.pos_embedding.embedding.weight",
    )
    for ours, diffusers, official in (
        ("gate", "wi_0", "gate.0"),
        ("up", "wi_1", "fc1"),
        ("down", "wo", "fc2"),
    ):
        yield (
            f"blocks.#.ffn.{ours}.weight",
            f"{block}.layer.1.{ffn}.{diffusers}.weight",
            f"blocks.#.ffn.{official}.weight",
        )
    norm = "layer_norm.weight"
    yield "blocks.#.attention_norm.weight", f"{block}.layer.0.{norm}", "blocks.#.norm1.weight"
    yield "blocks.#.ffn_norm.weight", f"{block}.layer.1.{norm}", "blocks.#.norm2.weight"
    yield "final_norm.weight", "encoder.final_layer_norm.weight", "norm.weight"


def vae_rows(levels: VAELevels) -> Iterator[Row]:
    yield "quant_conv.*", "quant_conv.*", "conv1.*"
    yield "post_quant_conv.*", "post_quant_conv.*", "conv2.*"
    for side in ("encoder", "decoder"):
        yield f"{side}.conv_in.*", f"{side}.conv_in.*", f"{side}.conv1.*"
        middle = f"{side}.mid", f"{side}.mid_block", f"{side}.middle"
        yield from resnet_rows(f"{middle[0]}.resnet_in", f"{middle[1]}.resnets.0", f"{middle[2]}.0")
        attention = f"{middle[0]}.attention", f"{middle[1]}.attentions.0", f"{middle[2]}.1"
        for ours, released in (
            ("norm.gamma", "norm.gamma"),
            ("qkv.*", "to_qkv.*"),
            ("proj.*", "proj.*"),
        ):
            yield (
                f"{attention[0]}.{ours}",
                f"{attention[1]}.{released}",
                f"{attention[2]}.{released}",
            )
        yield from resnet_rows(
            f"{middle[0]}.resnet_out", f"{middle[1]}.resnets.1", f"{middle[2]}.2"
        )
        yield f"{side}.norm_out.gamma", f"{side}.norm_out.gamma", f"{side}.head.0.gamma"
        yield f"{side}.conv_out.*", f"{side}.conv_out.*", f"{side}.head.2.*"
        yield from level_rows(side, levels)


def level_rows(side: str, levels: VAELevels) -> Iterator[Row]:
    """The residual blocks of every level, and the resampling behind them."""
    is_encoder = side == "encoder"
    depth = levels.num_res_blocks if is_encoder else levels.num_res_blocks + 1
    resample = "downsample" if is_encoder else "upsample"
    blocks = f"{side}.down_blocks" if is_encoder else f"{side}.up_blocks"
    for level in range(MAX_VAE_LEVELS):
        count = level * (depth + 1)  # entries of the official Wan2.1 list before this level
        if levels.is_residual:
            official = [f"{side}.{resample}s.{level}.{resample}s.{i}" for i in range(depth + 1)]
            diffusers = [f"{blocks}.{level}.resnets.{i}" for i in range(depth)]
            diffusers.append(f"{blocks}.{level}.{resample}r")
        else:
            official = [f"{side}.{resample}s.{count + i}" for i in range(depth + 1)]
            if is_encoder:
                diffusers = [f"{blocks}.{count + i}" for i in range(depth + 1)]
            else:
                diffusers = [f"{blocks}.{level}.resnets.{i}" for i in range(depth)]
                diffusers.append(f"{blocks}.{level}.upsamplers.0")
        for i in range(depth):
            yield from resnet_rows(f"{side}.levels.{level}.resnets.{i}", diffusers[i], official[i])
        ours = f"{side}.levels.{level}.{resample}"
        yield (
            f"{ours}.conv.*",
            f"{diffusers[depth]}.resample.1.*",
            f"{official[depth]}.resample.1.*",
        )
        yield (
            f"{ours}.time_conv.*",
            f"{diffusers[depth]}.time_conv.*",
            f"{official[depth]}.time_conv.*",
        )


def resnet_rows(ours: str, diffusers: str, official: str) -> Iterator[Row]:
    yield f"{ours}.norm1.gamma", f"{diffusers}.norm1.gamma", f"{official}.residual.0.gamma"
    yield f"{ours}.conv1.*", f"{diffusers}.conv1.*", f"{official}.residual.2.*"
    yield f"{ours}.norm2.gamma", f"{diffusers}.norm2.gamma", f"{official}.residual.3.gamma"
    yield f"{ours}.conv2.*", f"{diffusers}.conv2.*", f"{official}.residual.6.*"
    yield f"{ours}.shortcut.*", f"{diffusers}.conv_shortcut.*", f"{official}.shortcut.*"


# --- looking names up -----------------------------------------------------------------------------


class Table(NamedTuple):
    to_ours: dict[str, str]
    to_released: dict[str, str]


@cache
def table(component: str, layout: str, vae_levels: VAELevels | None = None) -> Table:
    """The names of one component in one layout, both ways.

    Raises:
        WanError: unknown component or layout; a VAE without its levels.
    """
    if component not in COMPONENTS:
        raise WanError(f"component {component!r}: must be one of {', '.join(COMPONENTS)}")
    if layout not in LAYOUTS:
        raise WanError(f"layout {layout!r}: must be one of {', '.join(LAYOUTS)}")
    if component == "vae":
        if vae_levels is None:
            raise WanError("the names of a VAE depend on its config: pass vae_levels")
        rows = vae_rows(vae_levels)
    else:
        rows = transformer_rows() if component == "transformer" else text_encoder_rows()
    column = 1 + LAYOUTS.index(layout)
    pairs = [
        (row[0].replace("*", leaf), row[column].replace("*", leaf))
        for row in rows
        for leaf in (("weight", "bias") if row[0].endswith("*") else ("",))
    ]
    to_ours = {released: ours for ours, released in pairs}
    to_released = dict(pairs)
    assert len(to_ours) == len(to_released) == len(pairs), "a name occurs twice"
    return Table(to_ours, to_released)


BLOCK_NUMBER = re.compile(r"(?:^|\.)blocks?\.(0|[1-9][0-9]*)\.")


def look_up(names: dict[str, str], name: str) -> str | None:
    """Translate a name by a table whose names have `#` for the block number."""
    if "#" in name:
        return None
    match = BLOCK_NUMBER.search(name)
    if match is None:
        return names.get(name)
    found = names.get(f"{name[: match.start(1)]}#{name[match.end(1) :]}")
    return None if found is None else found.replace("#", match[1])


def our_name(
    component: str, layout: str, name: str, vae_levels: VAELevels | None = None
) -> str | None:
    """Our name of a released parameter (prefix taken off); None if it is not one of Wan's."""
    return look_up(table(component, layout, vae_levels).to_ours, name)


def released_name(
    component: str, layout: str, name: str, vae_levels: VAELevels | None = None
) -> str:
    """The released name of one of our parameters.

    Raises:
        WanError: not a parameter name of this component.
    """
    found = look_up(table(component, layout, vae_levels).to_released, name)
    if found is None:
        raise WanError(f"{name}: not a parameter of our {component}")
    return found


# --- which layout is this, and is it Wan's at all -------------------------------------------------


def detect_layout(component: str, names: Collection[str]) -> KeyLayout:
    """Layout, common prefix and (VAE) numbering of a checkpoint's names.

    Raises:
        WanError: it is another kind of checkpoint or component; the message names it.
    """
    names = [name for name in names if not stands_beside(name)]
    prefix = common_prefix(names)
    bare = [bare_name(name, prefix) for name in names]
    refuse_foreign(component, bare)
    found = {c: best_layout(c, bare) for c in COMPONENTS}
    likeliest = max(COMPONENTS, key=lambda c: (found[c].num_known, c == component))
    if likeliest != component or not found[component].num_known:
        known = found[likeliest].num_known
        hint = f"the names are those of a {likeliest}" if known else "no name is one of Wan's"
        shown = ", ".join(sorted(names)[:3]) or "no tensors at all"
        raise WanError(f"not a {component} checkpoint: {hint} ({shown}, ...)")
    return KeyLayout(found[component].layout, prefix, found[component].vae_levels)


def common_prefix(names: Collection[str]) -> str:
    """The known wrapper prefixes that stand in front of every name."""
    prefix = ""
    while names:
        step = next((p for p in PREFIXES if all(n.startswith(p, len(prefix)) for n in names)), None)
        if step is None:
            break
        prefix += step
    return prefix


def bare_name(name: str, prefix: str) -> str:
    """A name without the common prefix and the wrappers inside it."""
    return ".".join(s for s in name.removeprefix(prefix).split(".") if s not in WRAPPERS)


def stands_beside(name: str) -> bool:
    """True for a tensor that is no parameter but belongs to a weight or to the file."""
    return name.rpartition(".")[2] in BESIDE


class Match(NamedTuple):
    """How many names of a checkpoint a layout knows. (Components share a few names.)"""

    num_known: int
    layout: str
    vae_levels: VAELevels | None


def best_layout(component: str, names: Collection[str]) -> Match:
    """The layout of a component that knows most of the names."""
    matches = []
    for layout in LAYOUTS:
        vae_levels = detect_vae_levels(layout, names) if component == "vae" else None
        known = 0
        if component != "vae" or vae_levels is not None:
            known = sum(our_name(component, layout, n, vae_levels) is not None for n in names)
        matches.append(Match(known, layout, vae_levels))
    return max(matches, key=lambda match: match.num_known)


def detect_vae_levels(layout: str, names: Collection[str]) -> VAELevels | None:
    """Generation and blocks per level, from the encoder's names; None if it has none."""
    entries = r"encoder\.down_blocks" if layout == "diffusers" else r"encoder\.downsamples"
    nested = r"\.0\.(?:resnets|downsamples)\.(\d+)\.(?:conv1|residual)\."
    flat = r"\.(\d+)\.(?:conv1|residual)\."
    resample = r"\.(\d+)\.resample\."

    # A table has a row for each block, so a number from a file must not decide how many.
    def numbers(pattern: str) -> set[int]:
        found = (re.match(entries + pattern, name) for name in names)
        numbers = {int(match[1]) for match in found if match is not None}
        return {number for number in numbers if number < MOST_BLOCKS}

    if blocks := numbers(nested):
        return VAELevels(True, max(blocks) + 1)
    if blocks := numbers(flat):
        # The first level ends at the first resampling; a single level has none.
        return VAELevels(False, min(numbers(resample), default=max(blocks) + 1))
    return None


class Foreign(NamedTuple):
    """A kind of checkpoint that is not a plain base model, and the names that give it away."""

    kind: str
    remedy: str
    segments: tuple[str, ...] = ()  # whole dotted segments
    starts: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()

    def shows_in(self, name: str) -> bool:
        return (
            name.startswith(self.starts)
            or name.endswith(self.ends)
            or not set(self.segments).isdisjoint(name.split("."))
        )


PLAIN_WEIGHTS = "the float32, bfloat16 or float16 weights, or fp8 ones with a scale per weight"
ANYWHERE = (
    Foreign(
        "a LoRA",
        "it changes a base model: give the base here; infer.sample takes this file as lora=, and a "
        "pipeline in Python by load_lora_weights",
        segments=("lora_A", "lora_B", "lora_down", "lora_up", "lora_linear_layer", "dora_scale"),
        starts=("lora_", "lycoris_"),
        ends=(".diff", ".diff_b", ".diff_m", ".diff_param", "lora.down.weight", "lora.up.weight"),
    ),
    Foreign(
        "a quantised checkpoint",
        f"use {PLAIN_WEIGHTS}",
        segments=(
            *("weight_scale_2", "weight_scale_inv", "weight_packed", "qweight", "qzeros", "g_idx"),
            *("wscales", "SCB", "absmax", "quant_map", "quant_state", "_data", "block_scale"),
        ),
    ),
    Foreign(
        "a whole pipeline in one file",
        "give the components as separate files, or a folder in a released layout",
        starts=(
            "first_stage_model.",
            "cond_stage_model.",
            "conditioner.",
            "text_encoders.",
            "vae.",
        ),
    ),
    Foreign(
        "a training state",
        "give the exported weights of the model",
        starts=("optimizer.", "optim.", "lr_scheduler.", "exp_avg"),
    ),
)
SUPPORTED = "only text-to-video and TI2V models are supported"
FOREIGN = {
    "transformer": (
        *ANYWHERE,
        Foreign(
            "a VACE model (vace_blocks)",
            SUPPORTED,
            starts=("vace_blocks.", "vace_patch_embedding."),
        ),
        Foreign(
            "a model with video sparse attention (to_gate_compress)",
            "use a checkpoint that was trained with full attention",
            segments=("to_gate_compress", "gate_compress"),
        ),
        Foreign(
            "a Wan2.2 Animate model",
            SUPPORTED,
            segments=("face_adapter", "face_encoder", "motion_encoder", "pose_patch_embedding"),
        ),
        Foreign(
            "a speech-to-video model",
            SUPPORTED,
            segments=(
                *("audio_injector", "casual_audio_encoder", "audio_proj", "audio_cross_attn"),
                *("frame_packer", "trainable_cond_mask"),
            ),
        ),
        Foreign(
            "a camera- or control-conditioned model",
            SUPPORTED,
            starts=("control_adapter.", "ref_conv."),
        ),
        Foreign(
            "a Wan2.1 image-to-video model (image keys)",
            SUPPORTED,
            segments=(
                *("img_emb", "image_embedder"),
                *("add_k_proj", "add_v_proj", "norm_added_k", "k_img", "v_img", "norm_k_img"),
            ),
        ),
    ),
    "vae": ANYWHERE,
    "text_encoder": (
        *ANYWHERE,
        Foreign(
            "a T5 with its decoder",
            "give the encoder half (UMT5EncoderModel)",
            starts=("decoder.block.", "lm_head."),
        ),
        Foreign("a CLIP model", "Wan reads text with UMT5", starts=("text_model.", "visual.")),
    ),
}


def refuse_foreign(component: str, names: Iterable[str]) -> None:
    """Recognise a checkpoint of another kind by its names (prefix taken off).

    Raises:
        WanError: naming the kind, a tensor that shows it, and what to give instead.
    """
    names = sorted(names)
    for foreign in FOREIGN[component]:
        example = next((name for name in names if foreign.shows_in(name)), None)
        if example is not None:
            raise WanError(
                f"not a plain {component}: this is {foreign.kind}, see {example}; {foreign.remedy}"
            )
