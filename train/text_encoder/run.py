"""The miniature's tokenizer and text encoder, trained and exported: `train.text_encoder`."""

import copy
import io
import random
import re
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.cli import INTERRUPTED
from configs.progress import Steps, doing
from configs.training import TextEncoderTrainConfig
from train.artefact import Artefacts, Weights, export_part
from train.kept import KeptRun
from train.loop import run_training, step_generator
from train.metrics import check_mirrors
from train.optim import (
    apply_gradients,
    learning_rate,
    make_optimizers,
    warn_of_warmup,
    with_precision,
)
from train.parallel import ALONE
from train.state import TrainState, load_trainable
from wan.errors import WanError, check_names
from wan.files import expanded, read_json, write_json
from wan.miniature.captions import MORE_WORDS, caption, label_classes
from wan.miniature.world import OBJECT_ATTRIBUTES, sample_scene
from wan.models.tokenizer import Tokenizer
from wan.models.tokenizer_export import write_tokenizer_folder
from wan.models.umt5 import UMT5Config, UMT5Encoder, pad_ids

# B captions, S text positions, D width, V vocabulary, K labels of a word

CLASSES = label_classes()
OWN = [i for i, name in enumerate(CLASSES) if name in OBJECT_ATTRIBUTES]  # of a word's object
IGNORED = -100  # a label that a text or a word does not have
NUM_SENTINELS = 1  # <extra_id_0> stands for a masked token
ATTRIBUTE_GATE, BINDING_GATE = 0.995, 0.99

FILLERS = (
    *("very", "bright", "simple", "flat", "nice", "plain", "solid", "colored", "beautiful"),
    *("slowly", "quickly", "smoothly", "please", "just", "here", "now", "then", "also"),
    *("single", "scene", "picture", "of", "animated", "style", "screen", "cartoon"),
)
FUNCTION_WORDS = {"a", "an", "one", "the", "is", "on", "over", "against", "background"}


@dataclass(frozen=True)
class Example:
    """A text and, for each of its objects, the class index for every entry of `CLASSES`."""

    text: str
    labels: tuple[tuple[int, ...], ...]


def draw_example(rng: random.Random, split: str, disturbed: bool, num_objects: int) -> Example:
    """One caption of a scene of a split; `disturbed` words it in a less orderly way."""
    # Nobody sees the scene, so one frame is enough for the objects to keep inside and apart.
    drawn = caption(sample_scene(rng, split, num_objects, num_frames=1), rng)
    text, objects = drawn.text, drawn.objects
    if disturbed:
        free_order = len(objects) == 1 and objects[0].motion not in ("circling", "still")
        text = disturb(text, rng, free_order)
    return Example(text, tuple(tuple(of[name] for name in CLASSES) for of in drawn.labels()))


def empty_example(rng: random.Random) -> Example:
    """A text that states nothing: "" or filler."""
    words = [_filler(rng) for _ in range(rng.choice((0, 0, 1, 3, 8)))]
    labels = tuple(IGNORED if n == "count" else len(c) - 1 for n, c in CLASSES.items())
    return Example(" ".join(words), (labels,))


def disturb(text: str, rng: random.Random, free_order: bool) -> str:
    """Say the same with other words, fewer words, more words, or in another order.

    Args:
        free_order: any order of the words means the same (one object, whose motion is one word).
    """
    if rng.random() < 0.7:
        for phrase, others in MORE_WORDS.items():
            if rng.random() < 0.6:
                text = re.sub(rf"\b{phrase}\b", rng.choice(others), text)
    words = text.split()
    if rng.random() < 0.3:
        words = [w for w in words if w not in FUNCTION_WORDS or rng.random() < 0.4]
    if free_order and rng.random() < 0.3 and not {"from", "towards"} & set(words):
        rng.shuffle(words)
    if rng.random() < 0.3:
        for _ in range(rng.randint(1, 3)):
            words.insert(rng.randint(0, len(words)), _filler(rng))
    if rng.random() < 0.1:
        return " ".join(words).upper()
    return " ".join(words)


def _filler(rng: random.Random) -> str:
    if rng.random() < 0.6:
        return rng.choice(FILLERS)
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 7)))


def draw_examples(
    seed: int,
    stream: str,
    count: int,
    disturbed: float,
    split: str = "train",
    two_objects: float = 0.3,
) -> list[Example]:
    """`count` examples of a named stream of random captions, a function of the arguments.

    Args:
        disturbed, two_objects: shares of such captions.
    """
    rng = random.Random(f"{seed}/{stream}")
    return [
        draw_example(rng, split, rng.random() < disturbed, 1 + (rng.random() < two_objects))
        for _ in range(count)
    ]


# Tokenizer -----------------------------------------------------------------------------------


def train_spiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece unigram model with UMT5's layout of ids; one unknown character is <unk>.

    Text is folded to lower case by the model's own normalisation table. All printable ASCII
    characters are pieces, whatever the texts hold.
    """
    out = io.BytesIO()
    characters = "".join(c for c in map(chr, range(33, 127)) if not c.isupper())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=out,
        model_type="unigram",
        vocab_size=vocab_size,
        hard_vocab_limit=False,  # a limit: few words may need fewer pieces
        required_chars=characters,
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        num_threads=1,  # the same pieces on every machine
        minloglevel=2,
    )
    return out.getvalue()


def make_tokenizer(config: TextEncoderTrainConfig, folder: Path) -> Tokenizer:
    """Train the tokenizer on captions and write its folder; read it if it is there already.

    Raises:
        WanError: the one that is there was made with other settings.
    """
    record = folder.with_name("tokenizer_settings.json")
    names = ("seed", "tokenizer_captions", "vocab_size")
    settings = {name: getattr(config, name) for name in names}
    if not (folder / "tokenizer_config.json").is_file():
        write_json(record, settings)
        with doing(f"training the tokenizer on {config.tokenizer_captions} captions"):
            examples = draw_examples(config.seed, "tokenizer", config.tokenizer_captions, 0.7)
            spiece = train_spiece((example.text for example in examples), config.vocab_size)
        write_tokenizer_folder(spiece, folder, NUM_SENTINELS)
    elif not config.loop.allow_changes and (before := read_json(record)) != settings:
        raise WanError(
            f"{folder}: made with {before}, now asked for {settings}; choose another "
            "output_dir=, or loop.allow_changes=true to go on with that tokenizer"
        )
    return Tokenizer.from_folder(folder)


# Model ---------------------------------------------------------------------------------------


def initialize(encoder: UMT5Encoder) -> None:
    """T5's initialisation, but with position biases that tell before from after.

    Every matrix keeps the variance of its input, scores start at 1. Heads look in turn at earlier
    tokens, at later ones, at neighbours and everywhere: from T5's tiny random biases the order of
    the words (which adjective belongs to which object) takes most of the training to be noticed.
    """
    config = encoder.config
    half = config.relative_attention_num_buckets // 2  # keys before the query, then keys after it
    even, low, distance = torch.zeros(half), torch.full((half,), -4.0), torch.arange(half).float()
    looks = torch.stack(
        [
            torch.cat([even, low]),
            torch.cat([low, even]),
            torch.cat([-distance, -distance]),
            torch.cat([even, even]),
        ],
        dim=1,
    )
    nn.init.normal_(encoder.token_embedding.weight)
    for name, weight in encoder.named_parameters():
        if name.endswith("query.weight"):
            nn.init.normal_(weight, std=(config.d_model * config.d_kv) ** -0.5)
        elif name.endswith("relative_bias.weight"):
            weight.data.copy_(looks[:, torch.arange(config.num_heads) % 4])
        elif weight.ndim == 2 and not name.startswith("token_embedding"):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    # The final norm's weight stays 1: every token leaves the encoder with unit mean square.
    encoder.final_norm.weight.requires_grad_(False)


class Heads(nn.Module):
    """The heads that the encoder is trained through; not part of the model that ships."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.labels = nn.Linear(config.d_model, sum(map(len, CLASSES.values())))
        self.words = nn.Linear(config.d_model, config.vocab_size)


def object_of(tokenizer: Tokenizer, example: Example, num_tokens: int) -> list[int]:
    """The object that each of a text's tokens is about: 0 or 1 in the text's order, -1 for neither.

    Two objects are told apart by the word between them. That word and the end of such a text are
    about neither, as is the padding up to `num_tokens`.
    """
    text = len(tokenizer(example.text).ids)
    if len(example.labels) == 1:
        return [0] * text + [-1] * (num_tokens - text)
    first, between, _ = re.split(r"(?i)\b(and)\b", example.text, maxsplit=1)
    before, joint = (len(tokenizer(part).ids) - 1 for part in (first, between))
    after = text - 1 - before - joint
    return [0] * before + [-1] * joint + [1] * after + [-1] * (num_tokens - text + 1)


def token_labels(number: Tensor, examples: list[Example]) -> Tensor:
    """Labels (B, S, K) of tokens that are about object `number` (B, S) of their texts."""
    both = torch.tensor([[e.labels[0], e.labels[-1]] for e in examples])  # (B, 2, K)
    labels = both[torch.arange(len(examples))[:, None], number.clamp(min=0)]
    labels[..., OWN] = labels[..., OWN].masked_fill(number[..., None] < 0, IGNORED)
    return labels


def label_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropies of all labels: (..., sum of classes), (..., K) -> (K,)."""
    parts = logits.flatten(0, -2).split([len(c) for c in CLASSES.values()], dim=-1)
    columns = labels.flatten(0, -2).unbind(-1)
    losses = [
        F.cross_entropy(p, c, ignore_index=IGNORED) for p, c in zip(parts, columns, strict=True)
    ]
    return torch.stack(losses)


def label_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Which labels the largest logit gets right: (B, K) bool; an ignored label counts as right."""
    parts = logits.split([len(c) for c in CLASSES.values()], dim=-1)
    guesses = torch.stack([part.argmax(-1) for part in parts], dim=-1)
    return (guesses == labels) | (labels == IGNORED)


def make_train_step(
    encoder: UMT5Encoder, heads: Heads, tokenizer: Tokenizer, config: TextEncoderTrainConfig
) -> Callable[[TrainState], dict[str, float]]:
    """One step: each token of whole captions tells the labels of what it is about, and masked ones
    tell which words are hidden."""
    mask_id = tokenizer("<extra_id_0>").ids[0]
    num_masked = config.batch_size // 4
    parameters = [*encoder.parameters(), *heads.parameters()]

    def train_step(state: TrainState) -> dict[str, float]:
        generator = step_generator(config.seed, state.step)
        rng = random.Random(f"{config.seed}/step/{state.step}")
        name = f"step/{state.step}"
        examples = draw_examples(config.seed, name, config.batch_size, 0.5, two_objects=0.5)
        for row in range(0, config.batch_size, 32):
            examples[row] = empty_example(rng)
        ids, mask = pad_ids([tokenizer(example.text).ids for example in examples])
        number = [object_of(tokenizer, example, ids.shape[1]) for example in examples]
        labels = token_labels(torch.tensor(number), examples)
        # Captions with hidden words can't know all labels, so they only guess the words.
        hidden = (torch.rand(ids.shape, generator=generator) < 0.2) & mask
        hidden[num_masked:] = False
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(config.bfloat16)):
            states = encoder(ids.masked_fill(hidden, mask_id), mask)
            label_logits = heads.labels(states[num_masked:])
            word_logits = heads.words(states[hidden])
        real = mask[num_masked:]  # no padding
        label_loss = label_losses(label_logits[real].float(), labels[num_masked:][real]).mean()
        if hidden.any():
            word_loss = F.cross_entropy(word_logits.float(), ids[hidden])
        else:  # in a small batch; the mean of nothing is no number
            word_loss = word_logits.float().sum()
        loss = label_loss + config.word_weight * word_loss
        loss.backward()
        lr = learning_rate(state.step, config.lr, config.loop.steps, config.warmup, final=0.02)
        norm = apply_gradients(state.optimizers, parameters, lr, config.grad_clip)
        return {
            "loss": loss.item(),
            "label_loss": label_loss.item(),
            "word_loss": word_loss.item(),
            "grad_norm": norm,
        }

    return train_step


# Gates ---------------------------------------------------------------------------------------


@torch.no_grad()
def encode_examples(
    encoder: UMT5Encoder, tokenizer: Tokenizer, examples: list[Example]
) -> Iterator[Tensor]:
    """The token states of each example, (s, D)."""
    for start in range(0, len(examples), 250):
        batch = examples[start : start + 250]
        ids, mask = pad_ids([tokenizer(example.text).ids for example in batch])
        yield from (states[m] for states, m in zip(encoder(ids, mask), mask, strict=True))


def pooled_states(
    encoder: UMT5Encoder, tokenizer: Tokenizer, examples: list[Example], pooling: str
) -> tuple[Tensor, Tensor]:
    """One vector for one object of each caption, (B, D), and its labels (B, K).

    pooling: "mean" of the tokens about the object, or "token": one of them, each in turn.
    """
    vectors, labels = [], []
    states = encode_examples(encoder, tokenizer, examples)
    for row, (example, tokens) in enumerate(zip(examples, states, strict=True)):
        turn, wanted = divmod(row, len(example.labels))
        about = torch.tensor(object_of(tokenizer, example, len(tokens)))
        own = tokens[about == wanted]
        vectors.append(own.mean(0) if pooling == "mean" else own[turn % len(own)])
        labels.append(example.labels[wanted])
    return torch.stack(vectors), torch.tensor(labels)


def fit_probe(vectors: Tensor, labels: Tensor, steps: int = 300) -> nn.Linear:
    """A linear classifier of every label on frozen vectors: (B, D), (B, K)."""
    probe = nn.Linear(vectors.shape[1], sum(map(len, CLASSES.values())))
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.Adam(probe.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        label_losses(probe(vectors), labels).sum().backward()
        optimizer.step()
    return probe


def measure_gates(
    encoder: UMT5Encoder, tokenizer: Tokenizer, config: TextEncoderTrainConfig
) -> dict[str, float]:
    """Accuracy of linear probes on captions that training did not draw, unless by chance.

    For the mean of the tokens about an object and for single tokens: `attributes`, the worst
    label's accuracy on captions of scenes with unseen combinations, which a caption may leave
    partly unsaid; `binding`, all attributes of the object right, on two-object captions;
    `disturbed`, the worst label on disturbed captions.
    """
    n = config.probe_captions
    sets = {
        "attributes": draw_examples(config.seed, "gate", n, 0.0, split="heldout"),
        "binding": draw_examples(config.seed, "binding", n, 0.0, split="heldout", two_objects=1.0),
        "disturbed": draw_examples(config.seed, "disturbed", n, 1.0, split="any"),
    }
    fit_on = draw_examples(config.seed, "probe", 2 * n, 0.5)
    measured = {}
    poolings = ("mean", "token")
    with Steps("probes fitted or read", len(poolings) * (1 + len(sets))) as steps:
        for pooling in poolings:
            probe = fit_probe(*pooled_states(encoder, tokenizer, fit_on, pooling))
            steps.add()
            for name, examples in sets.items():
                vectors, labels = pooled_states(encoder, tokenizer, examples, pooling)
                hits = label_hits(probe(vectors), labels)
                whole = name == "binding"
                rate = hits[:, OWN].all(1).float() if whole else hits.float().mean(0)
                measured[f"{name}_{pooling}"] = float(rate.mean() if whole else rate.min())
                steps.add()
    return measured


def output_statistics(
    encoder: UMT5Encoder, tokenizer: Tokenizer, examples: list[Example]
) -> dict[str, float]:
    """Mean square of the encoder's outputs, and the share of it that is the same in all tokens."""
    states = torch.cat(list(encode_examples(encoder, tokenizer, examples)))
    return {
        "output_mean_square": float(states.square().mean()),
        "output_constant_share": float(states.mean(0).square().mean() / states.square().mean()),
    }


def passed(measured: dict[str, float]) -> bool:
    """Whether both gates hold for the pooled and for the single tokens."""
    return all(
        measured[f"attributes_{pooling}"] >= ATTRIBUTE_GATE
        and measured[f"binding_{pooling}"] >= BINDING_GATE
        for pooling in ("mean", "token")
    )


def encoder_config(config: TextEncoderTrainConfig, vocab_size: int) -> UMT5Config:
    """The settings in `encoder`; an unknown name is an error."""
    known = {field.name for field in fields(UMT5Config)} - {"vocab_size"}
    check_names("encoder", sorted(config.encoder), sorted(known))
    return UMT5Config(vocab_size=vocab_size, **config.encoder)


@dataclass(frozen=True)
class TrainedEncoder:
    """The `text_encoder/` of a model, without the heads; an artefact of the run.

    Attributes:
        encoder: has the weights that are not trained; the others are written over.
    """

    encoder: UMT5Encoder
    final: str = "text_encoder"
    ending: str = ""

    def write(self, weights: Weights, place: Path) -> None:
        prefix = "encoder."
        own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        load_trainable(self.encoder, own)
        export_part(self.encoder, place, "text_encoder")

    def num_bytes(self, weights: Weights) -> int:
        return 4 * sum(weight.numel() for weight in self.encoder.parameters())


def left_by(run: KeptRun) -> Artefacts:
    """What becomes of the text encoder of a run, by what the run's folder holds."""
    config = run.config(TextEncoderTrainConfig)
    tokenizer = Tokenizer.from_folder(run.folder / "tokenizer")
    encoder = UMT5Encoder(encoder_config(config, tokenizer.vocab_size))
    initialize(encoder)
    return Artefacts("both", [TrainedEncoder(encoder)])


def train_text_encoder(config: TextEncoderTrainConfig) -> int:
    """Train both parts, measure the gates, and write `tokenizer/` and `text_encoder/`.

    Raises:
        WanError: a gate was missed; the report and the weights are written all the same.
    """
    check_mirrors(config.loop)
    folder = expanded(config.output_dir)
    config = with_precision(config, folder, ALONE)
    folder.mkdir(parents=True, exist_ok=True)
    warn_of_warmup(config.loop.steps, config.warmup)
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    tokenizer = make_tokenizer(config, folder / "tokenizer")
    encoder = UMT5Encoder(encoder_config(config, tokenizer.vocab_size))
    initialize(encoder)
    heads = Heads(encoder.config)
    both = nn.ModuleDict({"encoder": encoder, "heads": heads})
    state = TrainState({"both": both}, make_optimizers(both, config.optimizer, config.lr))

    def on_save(state: TrainState) -> dict[str, float]:
        return measure_gates(encoder, tokenizer, config)

    train_step = make_train_step(encoder, heads, tokenizer, config)
    left = Artefacts("both", [TrainedEncoder(copy.deepcopy(encoder))])
    if not run_training(
        state,
        train_step,
        config.loop,
        folder,
        asdict(config),
        on_save,
        artefacts=left,
        schema=type(config),
    ):
        return INTERRUPTED
    left.write_end(state, folder, ALONE)
    measured = measure_gates(encoder, tokenizer, config)
    measured |= output_statistics(
        encoder, tokenizer, draw_examples(config.seed, "gate", config.probe_captions, 0.0)
    )
    report = folder / "text_encoder_report.json"
    write_json(report, {**measured, "passed": passed(measured)})
    print("  ".join(f"{name} {value:.4f}" for name, value in measured.items()))
    if not passed(measured):
        raise WanError(
            f"the text encoder misses a gate (attributes {ATTRIBUTE_GATE}, binding {BINDING_GATE}; "
            f"numbers in {report}): train longer, with a larger loop.steps in another output_dir"
        )
    return 0
