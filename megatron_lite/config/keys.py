"""The keys of NeoX's files that are not settings of ours: handed to DeepSpeed, without effect here, or refused; each with the reason."""

from collections.abc import Callable
from dataclasses import dataclass

# Older names of a key.
RENAMED = {
    "gas": "gradient_accumulation_steps",
    "save_interval": "checkpoint_factor",
}

# Older ways to state another key's value: megatron_lite/config/older.py does the sum.
RESTATED = {
    "warmup_iters": "warmup, as steps instead of a share of lr_decay_iters",
    "decay_lr_to": "min_lr, as a share of the optimizer's learning rate",
}

# Handed over as they are written: they go into DeepSpeed's own configuration.
DEEPSPEED = {
    "optimizer": "type and parameters of the optimizer, the learning rate among them",
    "fp16": "half precision and its loss scale",
    "bf16": "bfloat16",
    "zero_optimization": "ZeRO stage and buffers",
    "communication_data_type": "number format of sums between processes",
    "prescale_gradients": "scale gradients before they are summed",
    "gradient_predivide_factor": "factor of prescale_gradients",
    "sparse_gradients": "sum sparse gradients as such",
    "zero_allow_untested_optimizer": "ZeRO with any optimizer",
    "wall_clock_breakdown": "report the time of forward, backward and step",
    "flops_profiler": "DeepSpeed's profiler",
    "tensorboard": "DeepSpeed's monitor",
    "wandb": "DeepSpeed's monitor",
    "csv_monitor": "DeepSpeed's monitor",
    "comms_logger": "log communication",
    "elasticity": "batch sizes for a changing number of devices",
    "compression_training": "quantization and pruning while training",
    "data_efficiency": "sampling by difficulty",
    "data_types": "number format of accumulated gradients",
    "deepspeed_extra_args": "further DeepSpeed keys",
}


@dataclass(frozen=True)
class Idle:
    """A key without effect: its default in NeoX, which is passed over in silence, as are some others, and why no value changes anything."""

    default: object
    reason: str
    silent: tuple[object, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """A key that asks for what is not built: its default in NeoX, which loads, other values that load, and why the rest does not."""

    default: object
    reason: str
    accepts: Callable[[object], bool] = lambda value: False

    def allows(self, value: object) -> bool:
        return value is None or value == self.default or self.accepts(value)


def _idle(reason: str, **defaults: object) -> dict[str, Idle]:
    return {key: Idle(default, reason) for key, default in defaults.items()}


def _refused(reason: str, **defaults: object) -> dict[str, Refusal]:
    return {key: Refusal(default, reason) for key, default in defaults.items()}


WITHOUT_EFFECT: dict[str, Idle] = {
    **_idle(
        "torch's attention is one fused kernel with a softmax in fp32",
        scaled_upper_triang_masked_softmax_fusion=False,
        scaled_masked_softmax_fusion=False,
        attention_softmax_in_fp32=False,
        apply_query_key_layer_scaling=False,
    ),
    **_idle(
        "kernels are chosen by what the device has; the numbers are the same",
        rope_fusion=False,
        layernorm_fusion=False,
        rmsnorm_fusion=False,
        bias_dropout_fusion=False,
        use_flashattn_swiglu=False,
        fused_kernels_build_path=None,
    ),
    **_idle("the output matrix is read by its shape and always cut by columns", output_layer_parallelism="column"),
    **_idle("rotary frequencies are computed, never read or saved", rotary_save_freqs_buffer=False),
    **_idle("the loss is computed in fp32, which is more exact", fp16_lm_cross_entropy=False),
    **_idle("weights are made or read straight on their device", use_cpu_initialization=False),
    **_idle(
        "torch recomputes activations, and has no such choice; no number changes",
        partition_activations=False,
        contiguous_checkpointing=False,
        checkpoint_in_cpu=False,
        synchronize_each_layer=False,
        profile_backward=False,
        deepspeed_activation_checkpointing=True,
    ),
    **_idle("nccl is used on GPUs and gloo on CPUs", distributed_backend="nccl"),
    **_idle("training always runs through DeepSpeed", deepspeed=True),
    **_idle("processes see in their environment who started them", deepspeed_mpi=False, deepspeed_slurm=False),
    **_idle(
        "the program counts processes itself",
        world_size=None,
        is_pipe_parallel=False,
        local_rank=None,
        rank=None,
        global_num_gpus=None,
        user_script=None,
        git_hash=None,
        config_files=None,
        lazy_mpu_init=False,
        curriculum_seqlen=0,
        detect_nvlink_pairs=False,
    ),
    **_idle(
        "it is left over from Megatron and nothing reads it in NeoX either",
        short_seq_prob=0.1,
        onnx_safe=False,
        deepscale=False,
        deepscale_config=None,
        adlr_autoresume_interval=1000,
        opt_pos_emb_offset=0,
        param_sharing_style="grouped",
        num_unique_layers=None,
    ),
    **_idle("the operating system keeps data in memory", mmap_warmup=False),
    "data_impl": Idle("infer", "the file itself says its format", silent=("mmap",)),
    **_idle("one thread of every process reads ahead", num_workers=2),
    **_idle("of the processes that see a folder one makes the sample maps, and the others wait for them", use_shared_fs=True),
    **_idle(
        "the learning rate follows from the settings and the step alone; no checkpoint holds a schedule",
        override_lr_scheduler=False,
        use_checkpoint_lr_scheduler=False,
    ),
    **_idle("blocks are dealt to the stages evenly, or as pipe_stage_layers says", pipe_partition_method="type:transformer|mlp"),
    **_idle("training has no random state: the order of the data follows from seed, and dropout is not built", no_load_rng=False, no_save_rng=False),
    **_idle("progress is reported every log_interval steps, and by this program only", steps_per_print=10),
    **_idle("checkpoint_activations and checkpoint_num_layers say what is computed again", activation_checkpointing=None),
    **_idle("communication_data_type is what says in which format gradients are summed", fp32_allreduce=False),
    **_idle("--dry-run shows every setting", dump_state=False),
    **_idle("this program writes its checkpoints itself, not DeepSpeed", checkpoint=None),
    **_idle("the norm of the gradient is always reported, as train/grad_norm", log_grad_norm=False),
    **_idle("it belongs to pos_emb rpe, which is refused", rpe_num_buckets=32, rpe_max_distance=128),
    **_idle("it belongs to norm scalenorm, which is refused", scalenorm_epsilon=1e-8),
    **_idle("it belongs to gMLP, which is refused", gmlp_attn_dim=64),
    **_idle("it belongs to sparse attention, which is refused", sparsity_config=None),
    **_idle(
        "it belongs to Mamba, which is refused",
        mamba_selective_scan_fusion=False,
        mamba_causal_conv_fusion=False,
        mamba_inner_func_fusion=False,
        mamba_selective_fp32_params=True,
        mamba_use_bias_in_conv=True,
        mamba_use_bias_in_linears=False,
    ),
    **_idle("it belongs to RWKV, which is refused", dim_att=None, head_size=None, ffn_dim=None),
    **_idle(
        "it belongs to moe_num_experts above 1, which is refused",
        moe_expert_interval=1,
        moe_top_k=1,
        moe_router_type="sinkhorn",
        moe_lbl_in_fp32=False,
        moe_jitter_eps=None,
    ),
    **_idle(
        "it belongs to TransformerEngine, which is refused",
        te_fp8_format="hybrid",
        te_fp8_wgrad=True,
        te_fp8_amax_history_len=1,
        te_fp8_amax_compute_algo="most_recent",
        te_fp8_margin=0,
    ),
    **_idle(
        "it belongs to a train_impl that is refused",
        dpo_fp32=True,
        dpo_reference_free=False,
        dpo_beta=0.1,
        kto_fp32=True,
        kto_beta=0.1,
        kto_desirable_weight=1.0,
        kto_undesirable_weight=1.0,
        z_loss=0.0,
        fp32_reinforce=True,
        kl_impl="mse",
        kl_div_beta=0.1,
        reinforce_leave_one_out=False,
        online_dataserver_ips="localhost",
        online_dataserver_ports=10000,
        weight_server_port=6000,
    ),
    **_idle(
        "it belongs to use_mup, which is refused",
        save_base_shapes=False,
        base_shapes_file=None,
        mup_init_scale=1.0,
        mup_attn_temp=1.0,
        mup_output_temp=1.0,
        mup_embedding_mult=1.0,
        mup_rp_embedding_mult=1.0,
        mup_width_scale=2,
    ),
    **_idle(
        "it belongs to Comet, which is refused",
        comet_workspace=None,
        comet_project=None,
        comet_experiment_name=None,
        comet_tags=None,
        comet_others=None,
        comet_experiment=None,
    ),
    **_idle(
        "it belongs to log_gradient_noise_scale, which is refused",
        gradient_noise_scale_n_batches=5,
        gradient_noise_scale_cpu_offload=False,
    ),
    **_idle("it belongs to a profiler that is refused", profile_step_start=10, profile_step_stop=12, memory_profiling_path=None),
    **_idle("it belongs to s3_path, which is refused", s3_chunk_size=104857600),
    **_idle("one run is reported, from one process", wandb_init_all_ranks=False),
}

WHOLE_CONTEXT = {"global", "flash"}


def _whole_context(value: object) -> bool:
    """Whether an attention_config such as [[["flash"], 24]] names attention over the whole context only."""
    if not isinstance(value, list):
        return False
    entries = [entry[0] if isinstance(entry, list) and entry else entry for entry in value]
    kinds = [kind for entry in entries for kind in (entry if isinstance(entry, list) else [entry])]
    return all(isinstance(kind, str) and kind in WHOLE_CONTEXT for kind in kinds)


def _switched_off(value: object) -> bool:
    """Whether a block such as curriculum_learning is there, but not enabled."""
    return isinstance(value, dict) and not value.get("enabled", False)


REFUSED: dict[str, Refusal] = {
    "attention_config": Refusal(
        None,
        "only attention over the whole context is built (global and flash, which give the same numbers): no sparse patterns, gMLP, RWKV or Mamba",
        _whole_context,
    ),
    "sparse_attention": Refusal(None, "sparse attention is not built"),
    "curriculum_learning": Refusal(None, "curriculum learning is not built", _switched_off),
    "soft_prompt_tuning": Refusal(None, "soft prompts are not built", _switched_off),
    **_refused(
        "windows are not built; leave the key out where seq_length is no more than the window, for then it changes nothing",
        sliding_window_width=None,
    ),
    **_refused("attention and positions run on through the documents of a sample", reset_attention_mask=False, reset_position_ids=False),
    **_refused("a norm of queries and keys is not built", use_qk_layernorm=False),
    **_refused("mixtures of experts are not built; the model has one MLP per block", moe_num_experts=1),
    **_refused("sequence parallelism is not built; leave it false", sequence_parallel=False),
    **_refused(
        "layers of TransformerEngine are not built; leave it false",
        te_columnparallel=False,
        te_rowparallel=False,
        te_layernorm_mlp=False,
        te_mha=False,
        te_fp8_mha=False,
    ),
    **_refused("muP changes the scale of every layer and is not built", use_mup=False, coord_check=False),
    **_refused("only language modelling is built; leave it normal", train_impl="normal"),
    **_refused("only data sets of token streams are built; leave it gpt2", dataset_impl="gpt2"),
    **_refused(
        "preference and reward training are not built",
        train_reward_data_paths=None,
        valid_reward_data_paths=None,
        test_reward_data_paths=None,
        pos_train_data_paths=None,
        neg_train_data_paths=None,
        pos_valid_data_paths=None,
        neg_valid_data_paths=None,
        pos_test_data_paths=None,
        neg_test_data_paths=None,
        pos_train_label_data_paths=None,
        neg_train_label_data_paths=None,
        pos_valid_label_data_paths=None,
        neg_valid_label_data_paths=None,
        pos_test_label_data_paths=None,
        neg_test_label_data_paths=None,
        precompute_model_name=None,
        serve_model_weights=False,
    ),
    **_refused("NeoX derives it from optimizer; write `optimizer: {type: ..., params: {lr: ...}}`", optimizer_type="adam", lr=None),
    **_refused(
        "NeoX derives it from zero_optimization; write it there",
        zero_stage=None,
        zero_reduce_scatter=None,
        zero_contiguous_gradients=None,
        zero_reduce_bucket_size=None,
        zero_allgather_bucket_size=None,
    ),
    **_refused(
        "NeoX reads it from fp16; write it there",
        loss_scale=None,
        dynamic_loss_scale=None,
        loss_scale_window=1000.0,
        hysteresis=2,
        min_scale=1.0,
    ),
    **_refused("NeoX derives it from gradient_clipping; write that", clip_grad=1.0),
    **_refused("NeoX derives it from train_micro_batch_size_per_gpu; write that", batch_size=None),
    **_refused("DeepSpeed's autotuner is not built", autotuning=None, autotuning_run=None),
    **_refused("it belongs to a cluster of NVIDIA's", adlr_autoresume=False),
    **_refused("checkpoints are written to a folder; copy them to S3 with a tool of your own", s3_path=None),
    **_refused("every tensor's name and shape is checked when loading, its logits are not", checkpoint_validation_with_forward_pass=False),
    **_refused("perplexity per character is not built", char_level_ppl=False),
    "use_comet": Refusal(None, "Comet is not built; use metrics.jsonl, wandb or TensorBoard", lambda value: value is False),
    **_refused("this statistic is not built", log_grad_pct_zeros=False, log_param_norm=False, log_optimizer_states=False, log_gradient_noise_scale=False),
    "do_train": Refusal(None, "train.py trains; to measure a checkpoint only, run evaluate.py", lambda value: value is True),
    "scheduler": Refusal(None, "DeepSpeed's schedules are not built; use lr_decay_style, warmup, lr_decay_iters and min_lr"),
    "amp": Refusal(None, "NVIDIA Apex is not used; set precision, or fp16 or bf16", _switched_off),
    **_refused("profilers are run from outside", profile=False, memory_profiling=False),
}

_NORM = "only layernorm and rmsnorm are built"
_POSITIONS = "only rotary positions (or none) are built"
_ACTIVATION = "only gelu and swiglu are built"

# Values of settings of ours that NeoX knows and we do not build.
REFUSED_VALUES: dict[str, dict[object, str]] = {
    "norm": dict.fromkeys(("non_parametric_layernorm", "scalenorm", "te_rmsnorm", "te_layernorm"), _NORM),
    "pos_emb": dict.fromkeys(("sinusoidal", "rpe", "alibi"), _POSITIONS),
    "activation": dict.fromkeys(("geglu", "relu", "softsign", "swish", "mish", "reglu", "bilinear", "glu"), _ACTIVATION),
    "text_gen_type": {"precompute": "log-probabilities for preference training are not built"},
    "tokenizer_type": {"HFGPT2Tokenizer": "it downloads its vocabulary; use GPT2BPETokenizer with vocab_file and merge_file"},
}
