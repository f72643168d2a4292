"""Every setting that this program reads, in sections, under NeoX's names and with NeoX's defaults; `(ours)` marks what NeoX does not have."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_lite.config.kinds import Amount, Amounts, Count, Counts, Memory, Positive, Prefixes, Section, Share, Size, Sizes, Texts, Whole
from megatron_lite.config.lora import LoraSection

Precision = Literal["fp16", "bfloat16", "fp32"]
Family = Literal["neox", "gptj", "llama"]
Initializer = Literal[
    "normal",
    "scaled_normal",
    "orthogonal",
    "scaled_orthogonal",
    "xavier_uniform",
    "xavier_normal",
    "wang_init",
    "small_init",
    "single_residual_scaled_normal",
]


class ModelSection(Section):
    """What the model is."""

    num_layers: Count = Field(description="transformer blocks")
    hidden_size: Count = Field(description="width of the hidden state")
    num_attention_heads: Count = Field(description="attention heads; must divide hidden_size")
    seq_length: Count = Field(description="tokens in a training sample, and the most a prompt and its completion may have together")
    max_position_embeddings: Count = Field(description="positions the model knows; at least seq_length")
    architecture: Family | None = Field(None, description="(ours) family of the model; null derives neox or llama from the other keys")
    precision: Precision | None = Field(None, description="number format of the weights; null looks at fp16 and bf16")
    weight_quantization: Literal["int8"] | None = Field(
        None, description="(ours) int8 holds the matrices of the blocks in 8 bits, one scale a row; with lora also in training. null holds them in precision"
    )
    num_kv_heads: Count | None = Field(None, description="heads of keys and values, for grouped-query attention; null is num_attention_heads")
    intermediate_size: Count | None = Field(None, description="width of the MLP; null is 4 x hidden_size. Of swiglu a third is the real width, as in NeoX")
    expansion_factor: Positive | None = Field(None, description="width of the MLP as a multiple of hidden_size, where intermediate_size is null")
    mlp_multiple_of: Count = Field(1, description="the width of a swiglu MLP is rounded up to a multiple of this")
    mlp_type: Literal["regular", "llama"] = Field("regular", description="older NeoX's way to ask for swiglu: llama together with activation silu")
    activation: Literal["gelu", "swiglu", "silu"] = Field("gelu", description="of the MLP; silu only together with mlp_type llama")
    bias_gelu_fusion: bool = Field(False, description="true selects the tanh form of GELU; it changes every logit, it is no matter of speed")
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="kind of the norms")
    layernorm_epsilon: Positive = Field(1e-5, description="added to the variance in layernorm")
    rms_norm_epsilon: Positive = Field(1e-8, description="added to the mean square in rmsnorm")
    pos_emb: Literal["rotary", "none", "learned"] = Field("learned", description="positions; must be stated, for NeoX's default 'learned' is not built")
    rotary_pct: Share = Field(1.0, description="share of every head's dimensions that is rotated")
    rotary_emb_base: Positive = Field(10000.0, description="base of the rotary frequencies")
    gpt_j_residual: bool = Field(False, description="attention and MLP read the same input and are added together")
    gpt_j_tied: bool = Field(False, description="one norm for attention and MLP; the family gptj has it")
    no_weight_tying: bool = Field(False, description="the output matrix is a parameter of its own, not the embedding")
    use_bias_in_norms: bool = Field(True, description="norms have a bias; rmsnorm never has one")
    use_bias_in_attn_linear: bool = Field(True, description="the projections of attention have biases")
    use_bias_in_mlp: bool = Field(True, description="the projections of the MLP have biases; in a llama model they never do")
    init_method: Initializer = Field("normal", description="distribution of new weights")
    output_layer_init_method: Initializer = Field("scaled_normal", description="distribution of new weights that write to the residual stream")
    init_method_std: Positive = Field(0.02, description="standard deviation where init_method is normal or scaled_normal")
    hidden_dropout: Share = Field(0.0, description="dropout behind attention and MLP, in training")
    attention_dropout: Share = Field(0.0, description="dropout of attention weights, in training")

    @property
    def gated(self) -> bool:
        """Whether the MLP is swiglu, in either spelling."""
        return self.activation == "swiglu" or (self.activation == "silu" and self.mlp_type == "llama")

    @property
    def family(self) -> Family:
        """The architecture that these settings describe, or the one that is named."""
        if self.architecture is not None:
            return self.architecture
        return "llama" if self.norm == "rmsnorm" or self.gated else "neox"

    @property
    def mlp_width(self) -> int:
        """Columns of the MLP, by NeoX's rules: a gated MLP shares 2/3 of the stated width between its two halves."""
        stated = self.intermediate_size or (int(self.hidden_size * self.expansion_factor) if self.expansion_factor else 4 * self.hidden_size)
        if self.gated and self.mlp_type == "llama":  # before NeoX's generic gates
            return self.intermediate_size or _rounded_up(int(2 * self.hidden_size * 4 / 3), 256)
        if self.gated:
            return _rounded_up(int(stated * 2 / 3), 2 * self.mlp_multiple_of) // 2
        return stated


def _rounded_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


class ParallelSection(Section):
    """How the model is spread over processes."""

    pipe_parallel_size: Size = Field(0, description="pipeline stages; 0 and 1 are one stage, and 0 also saves without layer files in NeoX")
    model_parallel_size: Count = Field(1, description="parts that every matrix is cut into")
    pipe_stage_layers: Counts | None = Field(
        None,
        description="(ours) blocks of every stage, such as [10, 20, 14]; null deals them evenly, or to unequal GPUs by what they hold and how fast they are",
    )


class LauncherSection(Section):
    """Which machines and devices run the processes."""

    hostfile: Path | None = Field(None, description="file with lines `NAME slots=N`; null uses the devices of this machine")
    include: str | None = Field(None, description="hosts and devices to use: host1@host2:0,2")
    exclude: str | None = Field(None, description="hosts and devices to leave out, written like include")
    num_nodes: Whole = Field(-1, description="use this many of the hosts; -1 is all")
    num_gpus: Count | None = Field(None, description="use this many devices of every host; null is all")
    gpu_memory_limit: Memory | None = Field(None, description="(ours) memory that a process may take of its GPU, such as 10GB; null is all that is free")
    master_addr: str | None = Field(None, description="address of the first host; null is found out")
    master_port: Count = Field(29500, description="port where the processes meet")
    launcher: Literal["pdsh", "openmpi", "mvapich", "slurm", "mpich", "impi"] = Field("pdsh", description="what starts processes on other hosts")
    force_multi: bool = Field(False, description="treat one host as several are treated")
    no_ssh_check: bool = Field(False, description="start without trying whether the hosts answer")
    comment: str | None = Field(None, description="comment of a SLURM job")
    account: str | None = Field(None, description="account of a SLURM job")


class CheckpointSection(Section):
    """Which weights are read, and when they are written."""

    load: Path | None = Field(None, description="folder of the checkpoint to read")
    save: Path | None = Field(None, description="folder that training writes checkpoints to")
    lora_load: Path | None = Field(
        None, description="(ours) folder of low-rank adapters, of a training with lora or in PEFT's format, that are added to the weights in load"
    )
    iteration: Size | None = Field(None, description="step to load; null loads the one that the file `latest` names")
    finetune: bool = Field(False, description="take only the weights: fresh optimizer, iteration 0")
    no_load_optim: bool = Field(False, description="leave out the optimizer's state when loading")
    no_save_optim: bool = Field(False, description="leave out the optimizer's state when saving")
    checkpoint_factor: Count | None = Field(None, description="save every so many steps, or at its powers")
    checkpoint_scale: Literal["linear", "log"] = Field("linear", description="whether checkpoint_factor is a distance or a base")
    extra_save_iters: Sizes | None = Field(None, description="further steps to save at")
    keep_last_n_checkpoints: Count | None = Field(None, description="older checkpoints are deleted; null keeps all")


class TokenizerSection(Section):
    """How text becomes tokens."""

    tokenizer_type: Literal["GPT2BPETokenizer", "HFTokenizer", "SPMTokenizer", "CharLevelTokenizer", "TiktokenTokenizer"] = Field(
        "GPT2BPETokenizer", description="kind of the tokenizer"
    )
    vocab_file: Path | None = Field(None, description="the tokenizer's file; of TiktokenTokenizer the name of an encoding")
    merge_file: Path | None = Field(None, description="merges of GPT2BPETokenizer")
    make_vocab_size_divisible_by: Count = Field(128, description="rows of the embedding are padded to a multiple of this x model_parallel_size")
    padded_vocab_size: Count | None = Field(None, description="rows of the embedding; null derives them")


class DataSection(Section):
    """What training reads."""

    data_path: Path | None = Field(
        None, description="one data set, cut into three by split: the prefix of .bin and .idx, or a file of texts (docs/data.md), which is tokenized once"
    )
    split: str = Field("969, 30, 1", description="parts of data_path for training, validation and test")
    train_data_paths: Prefixes | None = Field(None, description="data sets to train on, named like data_path")
    valid_data_paths: Prefixes | None = Field(None, description="data sets to validate on, named like data_path")
    test_data_paths: Prefixes | None = Field(None, description="data sets to test on, named like data_path")
    train_data_weights: Amounts | None = Field(None, description="shares of train_data_paths")
    valid_data_weights: Amounts | None = Field(None, description="shares of valid_data_paths")
    test_data_weights: Amounts | None = Field(None, description="shares of test_data_paths")
    train_label_data_paths: Prefixes | None = Field(None, description="labels beside train_data_paths; -100 is masked")
    valid_label_data_paths: Prefixes | None = Field(None, description="labels beside valid_data_paths")
    test_label_data_paths: Prefixes | None = Field(None, description="labels beside test_data_paths")
    weight_by_num_documents: bool = Field(False, description="weigh data sets by their size instead of by *_data_weights")
    weighted_sampler_alpha: Amount = Field(1.0, description="how far weight_by_num_documents follows the sizes: 1 fully, 0 not at all")
    pack_impl: Literal["packed", "pack_until_overflow", "unpacked"] = Field("packed", description="how documents fill samples")
    allow_chopped: bool = Field(True, description="false leaves out documents longer than a sample")
    eod_mask_loss: bool = Field(False, description="no loss on what follows the token between documents: the first token of the next one")


class GenerationSection(Section):
    """How text is generated."""

    text_gen_type: Literal["unconditional", "input-file", "interactive"] | None = Field(
        None, description="where prompts come from; null is input-file with sample_input_file, else unconditional"
    )
    sample_input_file: Path | None = Field(None, description="file of prompts (-i)")
    sample_output_file: Path | None = Field(Path("samples.txt"), description="JSON-lines file of results (-o); null is INPUT.output.jsonl")
    num_samples: Count = Field(1, description="texts to generate when unconditional")
    maximum_tokens: Count = Field(64, description="most new tokens of a completion")
    prompt_end: str = Field("\n", description="what separates prompts in the file and ends one in interactive mode")
    temperature: Amount = Field(0.0, description="divides the logits; 0 takes the most likely token")
    top_k: Size = Field(0, description="sample from the k most likely tokens; 0 is off")
    top_p: Share = Field(0.0, description="sample from the most likely tokens that hold this share of probability; 0 is off")
    stop: Texts = Field((), description="(ours) texts that end a completion, which does not contain them")
    recompute: bool = Field(False, description="no cache: every token is computed from the whole text")
    return_logits: bool = Field(False, description="records hold the logits of every new token")
    generation_batch_size: Count = Field(16, description="(ours) prompts that are generated together")
    pipe_schedule: Literal["in-flight", "naive"] = Field(
        "in-flight", description="(ours) in-flight: every stage of a pipeline works on rows of its own; naive: on all rows, one stage after the other"
    )
    sample_interval: Count | None = Field(
        None, description="(ours) in training, steps between completions of sample_input_file's prompts (none: of num_samples empty ones); null makes none"
    )


class EvaluationSection(Section):
    """Which tasks are evaluated, and how."""

    eval_tasks: Texts | None = Field(None, description="tasks of the evaluation harness, wildcards allowed (--eval_tasks)")
    eval_results_prefix: str = Field("", description="begins the name of the result file")
    num_fewshot: Size | None = Field(None, description="(ours) solved examples before every question; null is what the task says, 0 where it is silent")
    limit: Count | None = Field(None, description="(ours) documents per task; null is all of them")
    include_path: Path | None = Field(None, description="(ours) folder of further task definitions")
    log_samples: bool = Field(False, description="(ours) write every question with its answer")
    eval_data_dir: Path | None = Field(None, description="(ours) folder of task data, such as lambada/lambada_test.jsonl in it; null is data")
    eval_cache_dir: Path | None = Field(None, description="(ours) folder of answers that are used again with the same weights; null keeps none")
    eval_batch_tokens: Count | None = Field(None, description="(ours) tokens that are scored at once; null is what suits the device")
    bootstrap_iters: Size = Field(1000, description="(ours) draws to estimate errors that have no formula, such as the perplexity's")

    def results_file(self, at: time.struct_time) -> Path:
        """{prefix}_eval_results_{time}.json, as NeoX names it."""
        stamp = time.strftime("%m-%d-%Y-%H-%M-%S", at)
        return Path(f"{self.eval_results_prefix}_eval_results_{stamp}.json" if self.eval_results_prefix else f"eval_results_{stamp}.json")


class TrainingSection(Section):
    """How the model is trained, beside what DeepSpeed's own keys say."""

    seed: Whole = Field(1234, description="start of every random number, in generation too")
    train_batch_size: Count | None = Field(None, description="sequences in a step, of all processes together")
    train_micro_batch_size_per_gpu: Count | None = Field(None, description="sequences that a process computes at once")
    gradient_accumulation_steps: Count = Field(1, description="micro batches in a step")
    train_iters: Count | None = Field(None, description="steps to train")
    train_epochs: Count | None = Field(None, description="passes over the data, instead of train_iters")
    lr_decay_style: Literal["constant", "linear", "cosine", "exponential"] = Field("linear", description="shape of the learning rate after warmup")
    lr_decay_iters: Count | None = Field(None, description="steps until min_lr is reached; null is train_iters")
    lr_decay_fraction: Share | None = Field(None, description="lr_decay_iters as a share of train_iters")
    min_lr: Amount = Field(0.0, description="lowest learning rate")
    warmup: Share = Field(0.01, description="share of lr_decay_iters in which the learning rate rises")
    weight_decay: Amount = Field(0.1, description="decay of matrices; norms and biases have none")
    gradient_clipping: Amount = Field(1.0, description="largest norm of the gradient; 0 is off")
    checkpoint_activations: bool = Field(False, description="compute activations again in the backward pass instead of keeping them")
    checkpoint_num_layers: Count = Field(1, description="blocks whose activations are computed again together")
    eval_interval: Count | None = Field(1000, description="steps between validations")
    eval_iters: Size = Field(100, description="steps of a validation")
    exit_interval: Count | None = Field(None, description="end the program after a step that this divides")
    do_valid: bool | None = Field(None, description="null follows from the data")
    do_test: bool | None = Field(None, description="null follows from the data")
    lora: LoraSection | None = Field(
        None, description="(ours) train low-rank adapters and leave the weights as they are: {rank: 16, alpha: 32, targets: [query_key_value]}"
    )
    hang_timeout_minutes: Amount = Field(30.0, description="(ours) a rank for which the others have waited so long ends the training by name; 0 never")
    use_bnb_optimizer: bool = Field(False, description="Adam keeps its averages in 8 bits; needs the package bitsandbytes")
    check: bool = Field(False, description="(ours) take two steps, validate, save and clear away what was saved: whether all of it works (--check)")


class LoggingSection(Section):
    """What is reported, and where."""

    log_interval: Count = Field(100, description="steps between reports")
    log_dir: Path | None = Field(None, description="folder of the processes' logs")
    peak_theoretical_tflops: Positive | None = Field(None, description="of one device, to report utilization")
    tensorboard_dir: Path | None = Field(None, description="folder of TensorBoard's files, where the package tensorboard is installed")
    use_wandb: bool | None = Field(None, description="report to Weights & Biases; null does where a key is found")
    wandb_project: str = Field("neox", description="project")
    wandb_group: str | None = Field(None, description="group of the run")
    wandb_run_name: str | None = Field(None, description="name of the run")
    wandb_team: str | None = Field(None, description="team that owns the run")
    wandb_host: str = Field("https://api.wandb.ai", description="server")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that was set, checked. `deepspeed` holds DeepSpeed's own keys as they were written; `notes` says which keys have no effect and why."""

    model: ModelSection
    parallel: ParallelSection
    launcher: LauncherSection
    checkpoint: CheckpointSection
    tokenizer: TokenizerSection
    data: DataSection
    generation: GenerationSection
    evaluation: EvaluationSection
    training: TrainingSection
    logging: LoggingSection
    deepspeed: Mapping[str, object]
    precision: Precision
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)

    def where(self, key: str) -> str:
        """Who set a key: "configs/20B.yml line 12", "command line" or "default"."""
        return self.origins.get(key.replace("-", "_"), "default")

    @property
    def generation_mode(self) -> str:
        """text_gen_type, or what NeoX derives where it is silent. A file of prompts that the command line names (-i) is meant, whatever the YAML says."""
        settings = self.generation
        meant = self.where("sample_input_file") == "command line" and self.where("text_gen_type") != "command line"
        if settings.sample_input_file and (meant or settings.text_gen_type is None):
            return "input-file"
        return settings.text_gen_type or "unconditional"

    @property
    def generation_output(self) -> Path | None:
        """The file that generation writes to, if it writes to one."""
        settings = self.generation
        if self.generation_mode == "interactive":
            return None
        return settings.sample_output_file or Path(f"{settings.sample_input_file or 'samples'}.output.jsonl")


SECTIONS: dict[str, type[Section]] = {
    "model": ModelSection,
    "parallel": ParallelSection,
    "launcher": LauncherSection,
    "checkpoint": CheckpointSection,
    "tokenizer": TokenizerSection,
    "data": DataSection,
    "generation": GenerationSection,
    "evaluation": EvaluationSection,
    "training": TrainingSection,
    "logging": LoggingSection,
}
