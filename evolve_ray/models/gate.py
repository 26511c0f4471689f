"""The model gate: checks a model folder before anything costs time, without reading its weights.

The model is built on torch's meta device from the headers of the weight files, so transformers itself says whether every tensor
has its place. A run, an evaluation and a scorer pass the same gate.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evolve_ray.errors import UserError, first_line
from evolve_ray.models import folders
from evolve_ray.models.chat import Chat
from evolve_ray.models.round_trip import round_trip
from evolve_ray.refine.rendering import Rendering
from evolve_ray.store import rows
from evolve_ray.store.files import write_atomic

VERSION = 1
CACHE = "models.json"  # in the run directory: what the gate found, by content hash
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
LOSSY = {("F32", "bfloat16"), ("F64", "bfloat16"), ("F64", "float32"), ("F16", "bfloat16")}
SCALED_ROPE = ("linear", "dynamic", "ntk", "yarn")  # kinds whose positions are `factor` times those in config.json


@dataclass(frozen=True)
class Need:
    """What the recipe asks of a model.

    `field` is the option that names the model. `length` is the longest sequence in tokens and `length_field` its option.
    A `classifier` is a reward model; `output` is the output that is the score, None if no option says which.
    """

    field: str
    length: int
    length_field: str
    dtype: str = "float32"
    classifier: bool = False
    output: int | None = None
    rendering: Rendering = dataclasses.field(default_factory=Rendering)


@dataclass(frozen=True)
class Model:
    """What the gate found. `dropout` are the options of config.json that make training random; training switches them off."""

    family: str
    layers: int
    dtype: str
    positions: int | None
    ends: list[str]
    dropout: dict[str, float]
    outputs: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """One line: "Llama, 32 layers, bfloat16, ends with <|eot_id|>, 131,072 positions"."""
        parts = [self.family, f"{self.layers} layers", self.dtype]
        parts += ["ends with " + " or ".join(self.ends)] if self.outputs is None else [f"{self.outputs} outputs"]
        parts += [f"{self.positions:,} positions"] if self.positions else ["no limit of positions"]
        return ", ".join([*parts, *self.notes]).replace("1 layers", "1 layer").replace(" 1 outputs", " 1 output")


def check(folder: Path, content_hash: str, need: Need, run: Path) -> Model:
    """Checks a model folder, or returns what an earlier call found for the same content and the same need.

    Raises UserError with one line for each fault.
    """
    import importlib.metadata

    versions = [VERSION, importlib.metadata.version("transformers")]
    asked = dataclasses.asdict(dataclasses.replace(need, field="", length_field=""))
    key = rows.digest([content_hash, asked, versions])
    cache = run / CACHE
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(cache.read_bytes())
    if key not in known:
        known[key] = dataclasses.asdict(inspect(folder, need))
        write_atomic(cache, json.dumps(known, indent=1, ensure_ascii=False).encode())
    return Model(**{**known[key], "notes": tuple(known[key]["notes"])})


def inspect(folder: Path, need: Need) -> Model:
    """Checks a model folder. Raises UserError with one line for each fault."""
    where = f"{need.field}: {folder}"
    written = folders.read_model_config(folder, need.field)
    config = load_config(folder, where)
    check_class(config, written, where, need)
    dtypes = file_dtypes(folder, where)
    if written.get("quantization_config") or not dtypes <= set(DTYPES):
        method = (written.get("quantization_config") or {}).get("quant_method") or " and ".join(sorted(dtypes - set(DTYPES)))
        raise UserError(f"{where}: its weights are quantised ({method}), so they cannot be trained; use the model that is not")
    model, faults = load_on_meta(folder, where, need)
    text_config = config.get_text_config()
    chat = Chat(folder, need.field, need.rendering)
    faults += vocabulary_faults(model, chat, where)
    trip_faults, trip_notes = round_trip(chat, where)
    if need.classifier:  # it writes nothing, so what its tokenizer changes is only named
        trip_notes += [fault.removeprefix(f"{where}: ").partition("; ")[0] for fault in trip_faults]
    else:
        faults += trip_faults
    positions = position_limit(model, config)
    if positions and need.length > positions:
        faults.append(f"{need.length_field}: is {need.length}, but {folder} has {positions} positions; lower it")
    ends, end_faults = end_tokens(folder, chat, where)
    faults += end_faults
    if faults:
        raise UserError("\n".join(faults))
    lossy = [f"{DTYPES[dtype]} rounded to {need.dtype}" for dtype in sorted(dtypes) if (dtype, need.dtype) in LOSSY]
    dropout = dropout_options(config)
    notes = [*lossy, *([f"dropout off ({', '.join(dropout)})"] if dropout else []), *trip_notes]
    if need.classifier and text_config.pad_token_id is not None and text_config.pad_token_id == chat.end_id:
        notes.append("pad token = end token, so the score is read at the token before the end token")
    return Model(
        family=type(model).__name__.partition("For")[0].removesuffix("LMHeadModel"),
        layers=text_config.num_hidden_layers,
        dtype=" and ".join(DTYPES[dtype] for dtype in sorted(dtypes)),
        positions=positions,
        ends=ends,
        dropout=dropout,
        outputs=config.num_labels if need.classifier else None,
        notes=tuple(notes),
    )


def load_config(folder: Path, where: str) -> Any:
    """The configuration as transformers reads it."""
    from transformers import AutoConfig

    try:
        with quiet():
            return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # transformers and its validators raise many types
        raise UserError(f"{where}/config.json: transformers cannot read it: {first_line(error)}") from None


def check_class(config: Any, written: dict, where: str, need: Need) -> None:
    """Raises UserError unless transformers has the wanted kind of model for this configuration, and it was saved as such."""
    from transformers.models.auto import modeling_auto as auto

    architectures = written.get("architectures") or []
    if need.classifier:
        classes = auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        kind, advice = "a sequence classifier", "use a reward model that was saved as ...ForSequenceClassification"
    else:
        classes, kind = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "a causal language model"
        advice = "use a decoder-only model such as Llama, Qwen or Gemma"
    names = {name for value in classes.values() for name in ([value] if isinstance(value, str) else value)}
    fits = config.model_type in classes and not getattr(config, "is_encoder_decoder", False)
    if not fits or not architectures or not set(architectures) <= names:
        raise UserError(f"{where}: is not {kind} (architectures {architectures}); {advice}")
    if not need.classifier:
        return
    labels = config.num_labels
    if need.output is None and labels != 1:
        shown = ", ".join(f"{number}: {label}" for number, label in sorted(config.id2label.items()))
        raise UserError(f"{where}: has {labels} outputs ({shown}); set scorer.output to the one that is the score")
    if need.output is not None and not 0 <= need.output < labels:
        raise UserError(f"scorer.output: is {need.output}, but {where} has outputs 0 to {labels - 1}")


def file_dtypes(folder: Path, where: str) -> set[str]:
    """The number types of all tensors in the weight files, as safetensors names them."""
    from safetensors import SafetensorError, safe_open

    dtypes: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(file), "pt") as tensors:
                dtypes |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{where}/{file.name}: is damaged or incomplete: {first_line(error)}; download it again") from None
    return dtypes - {"I64", "I32", "BOOL"}  # buffers


def load_on_meta(folder: Path, where: str, need: Need) -> tuple[Any, list[str]]:
    """(the model without memory for its weights, one fault for each kind of tensor that has no place)."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    model_class = AutoModelForSequenceClassification if need.classifier else AutoModelForCausalLM
    try:
        with quiet():
            model, report = model_class.from_pretrained(
                str(folder), device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False
            )
    except Exception as error:  # transformers raises many types
        raise UserError(f"{where}: transformers cannot load it: {first_line(error)}") from None
    name, faults = type(model).__name__, []
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    resized = sorted(report["mismatched_keys"])
    if missing:
        faults.append(
            f"{where}: its weight files lack {shorten(missing)} of {name}, which would be random; use a complete checkpoint"
        )
    if unexpected:
        faults.append(
            f"{where}: its weight files hold {shorten(unexpected)}, which {name} does not use; use a checkpoint that was saved "
            f"as {name}"
        )
    if resized:
        key, in_file, in_model = resized[0]
        faults.append(
            f"{where}: {shorten([entry[0] for entry in resized])}: {key} has shape {list(in_file)} in the weight files and "
            f"{list(in_model)} by config.json; use the config.json that belongs to the weights"
        )
    return model, faults


def shorten(names: list[str]) -> str:
    """`3 tensors (a, b, ...)`."""
    more = ", ..." if len(names) > 2 else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({', '.join(names[:2])}{more})"


def vocabulary_faults(model: Any, chat: Chat, where: str) -> list[str]:
    """A fault if a token of the tokenizer has no row in the embedding."""
    size = model.get_input_embeddings().num_embeddings
    token, token_id = max(chat.tokenizer.get_vocab().items(), key=lambda item: item[1])
    if token_id < size:
        return []
    return [
        f"{where}: its tokenizer does not fit the model: token {token!r} has id {token_id}, but the embedding has {size} rows; "
        "use the model's own tokenizer"
    ]


def position_limit(model: Any, config: Any) -> int | None:
    """The longest sequence that the model was built for; None if its configuration has no limit."""
    import torch

    text_config = config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    rope = getattr(text_config, "rope_parameters", None) or {}
    if rope.get("rope_type") in SCALED_ROPE:
        original = rope.get("original_max_position_embeddings") or limit
        limit = max(limit, int(original * rope.get("factor", 1.0)))
    for name, module in model.named_modules():
        # RoBERTa and its relatives count positions from the padding index on.
        if isinstance(module, torch.nn.Embedding) and "position" in name and module.padding_idx is not None:
            limit = min(limit, module.num_embeddings - module.padding_idx - 1)
    return limit


def end_tokens(folder: Path, chat: Chat, where: str) -> tuple[list[str], list[str]]:
    """(the tokens that end a response, faults of generation_config.json)."""
    ids = list(chat.stop_ids)
    path = folder / "generation_config.json"
    if path.exists():
        try:
            listed = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            return [], [f"{where}/generation_config.json: is not a JSON object: {first_line(error)}"]
        ids += listed if isinstance(listed, list) else [] if listed is None else [listed]
    bad = [token_id for token_id in ids if not isinstance(token_id, int) or not 0 <= token_id < len(chat.tokenizer)]
    if bad:
        return [], [f"{where}/generation_config.json: eos_token_id {bad[0]!r} is no token of the tokenizer; correct it"]
    return [chat.tokenizer.convert_ids_to_tokens(token_id) for token_id in dict.fromkeys([chat.end_id, *ids])], []


def dropout_options(config: Any, prefix: str = "") -> dict[str, float]:
    """`{name: value}` of every option of a configuration that makes a training forward random and is not 0."""
    found: dict[str, float] = {}
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and name != "generation_config":
            found |= dropout_options(value, f"{prefix}{name}.")
        elif is_random(name, value):
            found[prefix + name] = value
    return found


def is_random(name: str, value: Any) -> bool:
    """Whether an attribute of a configuration or module is a dropout or a noise that is not 0."""
    return isinstance(value, float) and value != 0 and any(word in name for word in ("drop", "jitter", "noise"))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' progress bars and load reports off the terminal: the gate reports all that they say."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
