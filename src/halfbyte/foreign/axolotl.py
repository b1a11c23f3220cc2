"""axolotl's settings: what each key means here.

It owns axolotl's names and its rules for several keys at once; it must not know how a recipe is written.

Source: axolotl, `src/axolotl/utils/schemas` and its examples.
"""

from __future__ import annotations

from typing import Any

from halfbyte.foreign import files, preferences, rules
from halfbyte.foreign.draft import Draft
from halfbyte.foreign.keys import (
    Joint,
    Keys,
    Refused,
    Taken,
    beginning,
    filled,
    flag,
    idle,
    number,
    refused,
    whole,
)

TITLE = "axolotl"
SIGNATURE = frozenset({"base_model", "micro_batch_size", "sequence_len", "datasets", "num_epochs", "adapter"})

KEYS: Keys = {
    **rules.TRAINER,
    "base_model": Joint("model"),
    "datasets": Joint("data.train"),
    "test_datasets": Joint("data.eval"),
    "adapter": Joint("method"),
    "load_in_4bit": Joint("method"),
    "micro_batch_size": Joint("train.batch_size"),
    "sample_packing": Joint("train.packing"),
    "lora_target_modules": Joint("lora.target_modules"),
    "lora_target_linear": Joint("lora.target_modules"),
    "lr_scheduler": Joint("train.schedule"),
    "chat_template": Joint("data.template"),
    "special_tokens": Joint("data.template"),
    "num_epochs": Taken("train.epochs", number),
    "sequence_len": Taken("data.max_length", whole),
    "val_set_size": Taken("data.eval_fraction", rules.share),
    "eval_batch_size": Taken("evaluate.batch_size", whole),
    "eval_max_new_tokens": Taken("evaluate.max_new_tokens", whole),
    "optimizer": Taken("train.optimizer", rules.optimizer),
    "cosine_min_lr_ratio": Taken("train.min_lr_ratio", number),
    "lora_r": Taken("lora.r", whole),
    "lora_alpha": Taken("lora.alpha", number),
    "lora_dropout": Taken("lora.dropout", number),
    "lora_modules_to_save": Taken("lora.modules_to_save", filled),
    "peft_init_lora_weights": Taken("lora.init", beginning),
    "peft_use_dora": Taken("lora.dora", flag),
    "peft_use_rslora": Taken("lora.rank_stabilised", flag),
    "loraplus_lr_ratio": Taken("train.lora_plus_ratio", number),
    "loraplus_lr_embedding": rules.EMBEDDING_RATE,
    "gradient_checkpointing": Joint("train.activations"),
    "activation_offloading": Joint("train.activations"),
    **idle("kernels are chosen by halfbyte, see `halfbyte doctor`", "flash_* sdp_attention"),
    **idle(
        "kernels are chosen by halfbyte, see `halfbyte doctor`",
        "xformers_attention flex_attention eager_attention lora_mlp_kernel lora_qkv_kernel lora_o_kernel unsloth_*",
    ),
    **idle(
        "the model's folder says what it is",
        "model_type tokenizer_type is_*_derived_model tokenizer_use_fast",
    ),
    **idle(
        "rows are read and tokenised anew, and nothing is padded to a fixed length",
        "dataset_prepared_path dataset_processes dataset_keep_in_memory pad_to_sequence_len skip_prepare_dataset",
    ),
    **idle(
        "packing has no such choice", "eval_sample_packing sample_packing_group_size sample_packing_bin_size"
    ),
    **idle(
        "no part of the training", "strict eval_table_size gc_steps profiler_steps include_tokens_per_second"
    ),
    **idle(
        "no part of the training",
        "use_tensorboard merge_lora lora_on_cpu lora_fan_in_fan_out low_cpu_mem_usage",
    ),
    **idle("a run stops at the first loss that is not finite", "loss_watchdog_*"),
    **idle(
        "a run is one process on one machine",
        "ddp world_size max_memory gpu_memory_limit sequence_parallel_degree",
    ),
    **refused("only answers are learnt", "train_on_inputs"),
    **refused("no layer is trained whole beside an adapter", "unfrozen_parameters", []),
    **refused("an adapter begins anew", "lora_model_dir"),
    **refused("this kind of adapter is not there", "peft_layer_replication relora"),
    **refused(
        "this kind of adapter is not there",
        "lora_target_parameters peft_layers_to_transform peft loftq_config",
    ),
    "rl": Joint("task"),
    "rl_beta": Taken("preference.beta", number),
    "orpo_alpha": Taken("preference.beta", number),
    "simpo_gamma": Taken("preference.margin", number),
    "kto_desirable_weight": Taken("preference.good_weight", number),
    "kto_undesirable_weight": Taken("preference.bad_weight", number),
    **refused("this objective is not there", "cpo_alpha rpo_alpha dpo_label_smoothing", 0, 0.0),
    **refused("this objective is not there", "dpo_use_weighting dpo_norm_loss dpo_padding_free"),
    **refused("this kind of training is not there", "reward_model process_reward_model pretraining_dataset"),
    **refused(
        "the vocabulary stays as it is", "tokens added_tokens_overrides resize_token_embeddings_to_32x"
    ),
    **refused(
        "a template is the tokenizer's, chatml or plain",
        "chat_template_jinja default_system_message eot_tokens",
    ),
    **refused("this attention is not there", "s2_attention use_pose"),
    **refused("rows come in random order", "sample_packing_sequentially curriculum_sampling"),
    **refused("all rows come in random order", "shuffle_merged_datasets", True),
    **refused("all trained weights have one learning rate", "embedding_lr embedding_lr_scale lr_groups"),
    **refused("the schedule has no such part", "cosine_constant_lr_ratio lr_quadratic_warmup"),
    **refused("plugins are not run", "plugins", []),
    **refused("the base is held in 4 bits by bitsandbytes' format", "gptq qat quantization fp8"),
    **refused("give micro_batch_size and gradient_accumulation_steps", "batch_size"),
    **refused("duplicates are counted and kept", "dataset_exact_deduplication"),
    **refused("every row is kept", "min_sample_len"),
    "excess_length_strategy": Refused("rows that are too long are cut at the end", ("truncate",)),
    **refused("the model folder is taken as it is: fetch the revision you mean", "revision_of_model"),
    **refused("the tokenizer is the model folder's", "tokenizer_config"),
}

# Those of axolotl's templates that are the model makers' own, as ours are.
CHAT_FORMATS = {
    "chatml": "chatml",
    "deepseek_v3": "deepseek",
    "gemma": "gemma",
    "gemma3": "gemma",
    "llama3": "llama3",
    "mistral_v2v3": "mistral",
    "phi_3": "phi3",
    "qwen_25": "qwen2",
    "tokenizer_default": "tokenizer",
}
OBJECTIVES = {"dpo": "dpo", "simpo": "simpo", "orpo": "orpo", "kto": "kto"}
FORMATS = {
    "alpaca": "alpaca",
    "sharegpt": "sharegpt",
    "completion": "text",
    "chat_template": "messages",
    "chat_template.default": "preference",
    "chat_template.argilla": "preference",
}
# Parts of a data set that say what is so here anyway.
USUAL: dict[str, tuple[object, ...]] = {
    "split": ("train",),
    "ds_type": ("json",),
    "field": ("text",),
    "field_messages": ("messages",),
    "field_chosen": ("chosen",),
    "field_rejected": ("rejected",),
    "message_field_role": ("role",),
    "message_field_content": ("content",),
    "message_property_mappings": ({"role": "role", "content": "content"},),
    "roles_to_train": (["assistant"],),
    "train_on_eos": ("turn",),
}
DEFAULTS = {
    "data.max_length": 512,
    "data.eval_fraction": 0.0,
    "train.epochs": 1.0,
    "lora.dropout": 0.0,
    "seed": 42,
}


def rule(draft: Draft) -> None:
    """Decide what several keys decide together, and what axolotl would where none does."""
    files.model(draft, "base_model")
    formats = _rows(draft, "datasets", "data.train") | _rows(draft, "test_datasets", "data.eval")
    if len(formats) == 1:
        draft.set("data.format", *formats, "datasets")
    adapter = draft.get("adapter")
    if adapter is not None and adapter not in ("lora", "qlora"):
        draft.refuse("adapter", f"{adapter!r} is neither lora nor qlora")
    if adapter is not None:
        _targets(draft)
    else:
        draft.ignore("method full trains no adapter", "lora_target_modules", "lora_target_linear")
    rules.defaults(draft, DEFAULTS)
    rules.method(draft, adapter is not None, draft.on("load_in_4bit"), "adapter", "load_in_4bit")
    packed = draft.on("sample_packing") if draft.get("sample_packing") is not None else None
    rules.passes(draft, "micro_batch_size", 1, "sequence_len", packed, "sample_packing")
    rules.schedule(draft, "lr_scheduler", "cosine")
    rules.optimizer_defaults(draft, "optimizer")
    _activations(draft)
    _template(draft)
    preferences.task(draft, OBJECTIVES, "rl")
    rules.take_back_unread(draft)
    rules.measuring(draft, by_steps=True)
    if draft.get("excess_length_strategy") is None:
        draft.notes.append(
            "axolotl leaves out rows beyond sequence_len; here they are cut at the end, and counted."
        )


def _targets(draft: Draft) -> None:
    if draft.on("lora_target_linear"):
        draft.set("lora.target_modules", "all-linear", "lora_target_linear")
        draft.ignore("lora_target_linear adapts all linear layers", "lora_target_modules")
    else:
        draft.ignore("asks for nothing at this value", "lora_target_linear")
        rules.targets(draft, "lora_target_modules", draft.get("lora_target_modules"))


def _activations(draft: Draft) -> None:
    """Decide whether layers may wait on disk; what is offloaded to main memory is there already."""
    on_disk = {"gradient_checkpointing": "offload_disk", "activation_offloading": "disk"}
    for key, value in on_disk.items():
        if draft.get(key) == value:
            draft.set(
                "train.activations", "disk", key, remark="done where it is quicker, with the same result"
            )
        else:
            draft.ignore(rules.KEPT, key)


def _rows(draft: Draft, key: str, setting: str) -> set[str]:
    """Decide the files of a list of data sets; their formats."""
    listed = draft.get(key)
    if listed is None:
        return set()
    if not isinstance(listed, list) or not all(
        isinstance(entry, dict) and "path" in entry for entry in listed
    ):
        draft.refuse(key, "is no list of mappings with a path each")
        return set()
    names: list[str] = []
    formats: set[str] = set()
    for number_, entry in enumerate(listed):
        data_files = entry.get("data_files") or []
        names += [data_files] if isinstance(data_files, str) else data_files or [str(entry["path"])]
        kind = entry.get("type")
        if isinstance(kind, str) and kind in FORMATS:
            formats.add(FORMATS[kind])
        elif kind is not None:
            draft.refuse(f"{key}[{number_}].type", f"{kind!r} is none of {', '.join(FORMATS)}")
        for part, value in entry.items():
            if part not in {"path", "type", "data_files"} and not _usual(part, value):
                draft.refuse(f"{key}[{number_}].{part}", f"{value!r}: rows are read as their format says")
    files.rows(draft, setting, names, key)
    if "alpaca" in formats:
        draft.notes.append(
            "type alpaca: axolotl writes Alpaca's own words around a row, here the row is a turn of a chat."
        )
    return formats


def _usual(part: str, value: Any) -> bool:
    """Whether a part of a data set says what is so here anyway."""
    if part == "roles":
        return isinstance(value, dict) and all(set(names) == {role} for role, names in value.items())
    return value is None or value in USUAL.get(part, ())


def _template(draft: Draft) -> None:
    """Decide the chat format, and weigh special tokens: padding is masked, whatever its token."""
    rules.chat_format(draft, "chat_template", CHAT_FORMATS)
    tokens = draft.get("special_tokens")
    if tokens is None:
        return
    if isinstance(tokens, dict) and {key for key, token in tokens.items() if token is not None} <= {
        "pad_token"
    }:
        draft.ignore("padding is masked, whatever its token", "special_tokens")
    else:
        draft.refuse(
            "special_tokens", "only pad_token may be set: the vocabulary and its tokens stay as they are"
        )
