"""What other trainers and servers call their options, and ours of the same meaning: for suggestions, nothing is accepted by them.

Sources: Hugging Face's TrainingArguments, example scripts and `generate`; nanoGPT; Lightning; vLLM; torchrun.
"""

from collections.abc import Collection, Mapping

# Our options, best first, of which the first counts that the command at hand has (with a value where one is meant): their names.
_NAMES: Mapping[str, str] = {
    "optim.learning_rate": "lr learning_rate base_lr peak_lr max_lr step_size",
    "optim.final": "min_lr min_lr_ratio final_lr lr_end eta_min",
    "optim.schedule": "lr_scheduler lr_scheduler_type scheduler decay_lr lr_schedule lr_decay",
    "optim.warmup": "warmup warmup_steps warmup_iters warmup_ratio num_warmup_steps warmup_fraction",
    "optim.weight_decay": "wd decay weight_decay l2",
    "optim.name": "optim optimizer optimiser opt optimizer_name",
    "optim.beta1": "adam_beta1 beta_1 momentum b1",
    "optim.beta2": "adam_beta2 beta_2 b2",
    "optim.eps": "adam_epsilon epsilon adam_eps",
    "optim.clip": "max_grad_norm grad_clip gradient_clip_val clip clip_grad clip_grad_norm gradient_clipping",
    "optim.average": "ema ema_decay",
    "data.epochs": "epoch epochs num_epochs num_train_epochs max_epochs n_epochs",
    "train.steps": (
        "steps max_steps max_iters iters iterations num_steps train_steps total_steps num_training_steps lr_decay_iters"
    ),
    "train.eval_every": (
        "eval_steps eval_interval eval_every eval_freq evaluation_strategy eval_strategy val_check_interval "
        "check_val_every_n_epoch save_steps save_strategy save_interval save_every checkpoint_every"
    ),
    "train.eval_rows limit": "eval_iters max_eval_samples limit_val_batches eval_samples",
    "train.log_every": "logging_steps log_interval log_freq log_every log_every_n_steps",
    "train.keep": "save_total_limit keep_checkpoints max_checkpoints save_top_k",
    "train.patience": "early_stopping_patience early_stop",
    "train.metric": "metric_for_best_model monitor",
    "data.batch_size batch_size slots": (
        "bs batch batch_size batchsize train_batch_size per_device_train_batch_size per_gpu_train_batch_size "
        "micro_batch_size global_batch_size eval_batch_size per_device_eval_batch_size max_num_seqs max_batch_size"
    ),
    "train.accumulate": "gradient_accumulation_steps accumulate_grad_batches grad_accum grad_accumulation accumulation_steps",
    "model.remat": "gradient_checkpointing activation_checkpointing checkpoint_activations grad_checkpoint",
    "model.dtype=bfloat16 dtype=bfloat16": (
        "fp16 bf16 amp mixed_precision half precision autocast half_precision_backend bfloat16 float16 use_amp torch_dtype"
    ),
    "model.dtype=float32 dtype=float32": "fp32 float32 full_precision",
    "tune.base=int8": "load_in_8bit",
    "tune.base=nf4": "load_in_4bit qlora",
    "tune.lora.rank": "lora_r lora_rank lora r use_lora use_peft",
    "tune.lora.alpha": "lora_alpha",
    "tune.lora.targets": "target_modules lora_target_modules",
    "parallel.data mesh": (
        "gpus num_gpus n_gpu n_gpus devices ngpus world_size nproc_per_node num_devices num_processes dp dp_size "
        "data_parallel_size ddp tpus"
    ),
    "parallel.fsdp": "fsdp zero deepspeed zero_stage",
    "parallel.tensor": "tp tp_size tensor_parallel_size tensor_parallel tensor_model_parallel_size",
    "parallel.stage": "pp pp_size pipeline_parallel_size pipeline_parallel stages",
    "parallel.context": "cp context_parallel_size sequence_parallel_size",
    "parallel.expert": "ep expert_parallel_size enable_expert_parallel",
    "hosts.count": "nnodes num_nodes",
    "hosts.index": "local_rank node_rank rank",
    "hosts.coordinator": "master_addr coordinator",
    "data.prefetch": "num_workers dataloader_num_workers workers dataloader_prefetch_factor",
    "out runs": (
        "output_dir out_dir save_dir outdir checkpoint_dir logging_dir log_dir default_root_dir save_path output "
        "output_path output_file"
    ),
    "name": "run_name experiment_name exp_name wandb_run_name overwrite_output_dir overwrite force",
    "name model.init_from": "served_model_name model_name",
    "model.init_from": (
        "model model_name_or_path pretrained_model_name_or_path model_path checkpoint pretrained ckpt ckpt_path base_model"
    ),
    "data.train data file": (
        "train_file train_data train_path train_dataset training_data dataset dataset_name data_path data_dir data_file"
    ),
    "data.validation data file": (
        "validation_file val_file eval_file dev_file valid_file val_data eval_data validation_data test_file eval_dataset"
    ),
    "file": "input inputs input_file infile predict_file",
    "data.rows.subset": "dataset_config dataset_config_name",
    "data.rows.columns.text columns": "text_column text_column_name sentence_column text_col",
    "data.rows.columns.label columns": "label_column label_column_name label_col",
    "data.rows.limit limit": "max_train_samples max_samples limit_train_batches",
    "data.holdout.fraction": "val_split validation_split test_size val_size eval_split",
    "data.tokenizer.path": "tokenizer tokenizer_name tokenizer_path",
    "task.kind task": "task_name task_type objective",
    "task.label_smoothing": "label_smoothing_factor smoothing",
    "data.grouped": "group_by_length bucket_by_length",
    "seed": "random_seed data_seed manual_seed seed_everything",
    "seeds": "num_seeds n_seeds",
    "model.layers": "n_layer n_layers num_layers num_hidden_layers depth encoder_layers",
    "model.heads": "n_head n_heads num_heads num_attention_heads",
    "model.kv_heads": "num_key_value_heads n_kv_head num_kv_heads",
    "model.width": "n_embd d_model hidden_size embed_dim hidden_dim dim embedding_size",
    "model.mlp_width": "intermediate_size d_ff ffn_dim n_inner mlp_dim",
    "model.head_width": "head_dim d_kv",
    "model.positions context length": "max_position_embeddings n_positions n_ctx context_length",
    "model.kernel": "attn_implementation attention flash_attn flash_attention use_flash_attention",
    "model.dropout": "dropout_rate hidden_dropout_prob attention_dropout resid_pdrop",
    "task.labels": "num_labels labels label_names num_classes",
    "data.tokenizer.vocab_size vocab_size": "vocab n_vocab",
    "data.length length context max_tokens": (
        "max_length max_len maxlen max_seq_length max_seq_len seq_len seq_length sequence_length block_size cutoff_len "
        "max_source_length max_tokens_per_sample pad_to_max_length"
    ),
    "context length data.length": "max_model_len",
    "task.target_length max_tokens": "max_target_length target_length",
    "max_tokens task.decode.max_tokens": (
        "max_new_tokens max_gen_len n_predict num_tokens max_output_tokens generation_max_length"
    ),
    "beams task.decode.beams": "num_beams beam_size beam beam_width generation_num_beams",
    "min_tokens task.decode.min_tokens": "min_length min_new_tokens min_len",
    "temperature": "temp t do_sample greedy sample",
    "prompt text": "start text input_text query",
    "top_p": "nucleus p",
    "top_k": "k",
    "system": "system_prompt system_message",
    "task.decode.n_best max_n": "num_return_sequences num_samples n",
    "draft": "assistant_model draft_model speculative_model",
    "draft_tokens": "num_speculative_tokens num_assistant_tokens",
    "lookup": "prompt_lookup_num_tokens",
    "json_schema": "guided_json schema",
    "regex": "guided_regex",
    "cache model.cache": "kv_cache_dtype kv_cache",
    "host": "listen address bind",
    "api_key": "key token",
}
# Advice where no option stands for a name: the names.
_ADVICE: Mapping[str, str] = {
    "the same command resumes its run, and the best checkpoint is the one that is used": (
        "resume resume_from_checkpoint resume_from always_save_checkpoint load_best_model_at_end"
    ),
    "every step is compiled: there is nothing to switch on": "compile torch_compile jit",
    "JAX chooses the device: set the environment variable JAX_PLATFORMS to cpu, cuda or tpu": (
        "device use_cpu no_cuda cuda cpu use_gpu gpu use_cuda device_map accelerator platform backend tpu use_mps_device"
    ),
    "every run writes TensorBoard files and metrics.jsonl into its folder": (
        "wandb wandb_log wandb_project report_to use_wandb tensorboard"
    ),
    "`jaxlm export RUN DIR` writes a folder that `hf upload` takes": "push_to_hub hub_model_id hub_token",
    "the commands are train, evaluate and predict": "do_train do_eval do_predict eval_only",
    "code that comes with a model is never run": "trust_remote_code",
}
_OPTIONS = {name: options.split() for options, names in _NAMES.items() for name in names.split()}
_SENTENCES = {name: sentence for sentence, names in _ADVICE.items() for name in names.split()}


def meant(name: str, allowed: Collection[str]) -> str | None:
    """The option of `allowed` that means what `name` (underscored, perhaps dotted) means elsewhere, as `option` or `option=value`;
    None for a name that is not known."""
    found = _OPTIONS.get(name.rsplit(".", 1)[-1], [])
    return next((option for option in found if option.partition("=")[0] in allowed and option != name), None)


def advice(name: str) -> str | None:
    """A sentence for a name that no option of ours stands for."""
    return _SENTENCES.get(name.rsplit(".", 1)[-1])
