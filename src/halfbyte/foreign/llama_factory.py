"""LLaMA-Factory's settings: what each key means here.

It owns LLaMA-Factory's names, its list of data sets, and its rules for several keys at once; it must not know how a
recipe is written.

Source: LLaMA-Factory, `src/llamafactory/hparams`, its examples, and `data/README.md`.
"""

from __future__ import annotations

import json
from typing import Any

from halfbyte.foreign import files, preferences, rules
from halfbyte.foreign.draft import Draft
from halfbyte.foreign.keys import (
    UNSET,
    Joint,
    Keys,
    Taken,
    UnreadError,
    flag,
    idle,
    name_list,
    number,
    one_of,
    refused,
    whole,
)

TITLE = "LLaMA-Factory"
SIGNATURE = frozenset(
    {"finetuning_type", "stage", "cutoff_len", "lora_rank", "lora_target", "dataset_dir", "quantization_bit"}
)


def pissa(value: Any) -> object:
    """How an adapter begins where LLaMA-Factory asks for PiSSA."""
    return "pissa" if flag(value) else UNSET


KEYS: Keys = {
    **rules.TRAINER,
    "model_name_or_path": Joint("model"),
    "dataset": Joint("data.train"),
    "eval_dataset": Joint("data.eval"),
    "dataset_dir": Joint("data.train"),
    "finetuning_type": Joint("method"),
    "quantization_bit": Joint("method"),
    "per_device_train_batch_size": Joint("train.batch_size"),
    "packing": Joint("train.packing"),
    "neat_packing": Joint("train.packing"),
    "lora_target": Joint("lora.target_modules"),
    "lr_scheduler_type": Joint("train.schedule"),
    "template": Joint("data.template"),
    "num_train_epochs": Taken("train.epochs", number),
    "cutoff_len": Taken("data.max_length", whole),
    "val_size": Taken("data.eval_fraction", rules.share),
    "per_device_eval_batch_size": Taken("evaluate.batch_size", whole),
    "optim": Taken("train.optimizer", rules.optimizer),
    "lora_rank": Taken("lora.r", whole),
    "lora_alpha": Taken("lora.alpha", number),
    "lora_dropout": Taken("lora.dropout", number),
    "additional_target": Taken("lora.modules_to_save", name_list),
    "pissa_init": Taken("lora.init", pissa),
    "use_dora": Taken("lora.dora", flag),
    "use_rslora": Taken("lora.rank_stabilised", flag),
    "loraplus_lr_ratio": Taken("train.lora_plus_ratio", number),
    "loraplus_lr_embedding": rules.EMBEDDING_RATE,
    "quantization_type": Taken("quantization.format", one_of({"nf4": "nf4", "fp4": "fp4"})),
    "double_quantization": Taken("quantization.double_quant", flag),
    **idle("what is saved is a plain LoRA for the base, decomposed exactly", "pissa_convert pissa_iter"),
    **idle("training is what a run does", "do_train plot_loss print_param_status"),
    **idle(
        "rows are read and tokenised anew",
        "overwrite_cache preprocessing_batch_size tokenized_path cache_dir",
    ),
    **idle(
        "kernels are chosen by halfbyte, see `halfbyte doctor`", "flash_attn enable_liger_kernel use_unsloth*"
    ),
    **idle(
        rules.KEPT,
        "disable_gradient_checkpointing use_reentrant_gc",
    ),
    **idle("norms, losses and what is trained are computed in float32", "upcast_* pure_bf16"),
    "stage": Joint("task"),
    "pref_loss": Joint("task"),
    "pref_beta": Taken("preference.beta", number),
    "simpo_gamma": Taken("preference.margin", number),
    "kto_chosen_weight": Taken("preference.good_weight", number),
    "kto_rejected_weight": Taken("preference.bad_weight", number),
    **refused("this objective is not there", "pref_ftx dpo_label_smoothing pref_bco_weight", 0, 0.0),
    **refused("the reference is the model before training", "ref_model ref_model_adapters"),
    **idle("read by another stage or after training", "ppo_* export_* infer_*"),
    **idle(
        "read by another stage or after training",
        "temperature top_p top_k max_new_tokens num_beams do_predict",
    ),
    **idle(
        "no part of the training", "include_num_input_tokens_seen use_fast_tokenizer low_cpu_mem_usage ray_*"
    ),
    **idle("no part of the training", "use_swanlab compute_accuracy hf_hub_token ms_hub_token media_dir"),
    **refused("only answers are learnt, all of them", "train_on_prompt mask_history"),
    **refused("all rows of a file are used: shorten the file", "max_samples"),
    **refused(
        "files are laid end to end and come in random order", "mix_strategy interleave_probs", "concat"
    ),
    **refused("rows are read whole", "streaming"),
    **refused("4-bit weights are in bitsandbytes' format", "quantization_method", "bnb", "bitsandbytes"),
    **refused("no layer is trained whole beside an adapter", "freeze_trainable_layers"),
    **refused("an adapter begins anew", "adapter_name_or_path create_new_adapter"),
    **refused("this kind of adapter is not there", "use_llama_pro oft_rank"),
    **refused("this optimizer is not there", "use_galore use_apollo use_badam use_muon use_adam_mini"),
    **refused("this attention is not there", "shift_attn rope_scaling mixture_of_depths"),
    **refused(
        "the vocabulary stays as it is",
        "resize_vocab add_tokens add_special_tokens new_special_tokens_config",
    ),
    **refused(
        "a template has the tokenizer's own words for these", "tool_format default_system enable_thinking"
    ),
}

DEFAULTS = {
    "data.max_length": 2048,
    "data.eval_fraction": 0.0,
    "train.learning_rate": 5e-5,
    "train.epochs": 3.0,
    "train.warmup_ratio": 0.0,
    "lora.r": 8,
    "lora.dropout": 0.0,
    "seed": 42,
}
# Those of LLaMA-Factory's templates that write what ours do; its llama2 and zephyr have other blanks and messages.
CHAT_FORMATS = {
    "chatml": "chatml",
    "deepseek3": "deepseek",
    "gemma": "gemma",
    "gemma3": "gemma",
    "llama3": "llama3",
    "mistral": "mistral",
    "phi": "phi3",
    "qwen": "qwen2",
}
STAGES = {"sft": "sft", "dpo": "dpo", "kto": "kto"}
OBJECTIVES = {"sigmoid": "dpo", "orpo": "orpo", "simpo": "simpo", "dpo": "dpo"}
PAIR = {"chosen": "chosen", "rejected": "rejected"}
# Columns and tags of a listed data set that are those of our formats.
ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
MESSAGES = {"messages": "messages"}
SHAREGPT = {"messages": "conversations"}
TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}


def rule(draft: Draft) -> None:
    """Decide what several keys decide together, and what LLaMA-Factory would where none does."""
    files.model(draft, "model_name_or_path")
    listed = _listed(draft)
    formats = _rows(draft, "dataset", "data.train", listed) | _rows(
        draft, "eval_dataset", "data.eval", listed
    )
    if len(formats) == 1:
        draft.set("data.format", *formats, "dataset", remark="dataset_info.json")
    kind = draft.get("finetuning_type") or "lora"
    if kind not in ("lora", "full"):
        draft.refuse("finetuning_type", f"{kind!r} is neither lora nor full")
    if kind == "full":
        draft.ignore("method full trains no adapter", "lora_target")
    else:
        rules.targets(draft, "lora_target", draft.get("lora_target") or "all")
        draft.default("lora.alpha", 2 * (draft.value("lora.r") or DEFAULTS["lora.r"]))
    rules.defaults(draft, {k: v for k, v in DEFAULTS.items() if k != "train.warmup_ratio"})
    rules.method(draft, kind != "full", _in_4bit(draft), "finetuning_type", "quantization_bit")
    packed = draft.on("packing") or draft.on("neat_packing")
    rules.passes(draft, "per_device_train_batch_size", 8, "cutoff_len", packed, "packing", "neat_packing")
    rules.schedule(draft, "lr_scheduler_type", "linear")
    if "train.warmup_steps" not in draft.lines:
        draft.default("train.warmup_ratio", DEFAULTS["train.warmup_ratio"])
    rules.optimizer_defaults(draft, "optim")
    rules.chat_format(draft, "template", CHAT_FORMATS)
    _task(draft)
    rules.take_back_unread(draft)
    rules.measuring(draft)


def _task(draft: Draft) -> None:
    """Decide the task: the stage, and of stage dpo the loss."""
    if str(draft.get("stage")).lower() == "dpo":
        preferences.task(draft, OBJECTIVES, "pref_loss", "stage")
    else:
        preferences.task(draft, STAGES, "stage")
        draft.ignore("read by another stage", "pref_loss")


def _in_4bit(draft: Draft) -> bool:
    bits = draft.get("quantization_bit")
    if bits not in (None, 4):
        draft.refuse("quantization_bit", f"{bits!r}: the base is held in 4 bits or in 16")
    return bool(bits == 4)


def _listed(draft: Draft) -> dict[str, Any]:
    """What dataset_info.json says of each data set, its files made paths; empty where there is no such file."""
    folder = str(draft.get("dataset_dir") or "data")
    found = files.local(draft, f"{folder}/dataset_info.json")
    if draft.get("dataset_dir") is not None:
        draft.ignore("read for dataset_info.json" if found else "holds no dataset_info.json", "dataset_dir")
    if found is None:
        return {}
    try:
        listed = json.loads(found.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        draft.refuse("dataset_dir", f"{found} cannot be read: {error}")
        return {}
    entries = {name: entry for name, entry in listed.items() if isinstance(entry, dict)}
    return {
        name: entry | ({"file_name": str(found.parent / entry["file_name"])} if "file_name" in entry else {})
        for name, entry in entries.items()
    }


def _rows(draft: Draft, key: str, setting: str, listed: dict[str, Any]) -> set[str]:
    """Decide the files of data sets by name; their formats."""
    value = draft.get(key)
    if value is None:
        return set()
    names: list[str] = []
    formats: set[str] = set()
    for name in name_list(value):
        entry = listed.get(name, {})
        names.append(entry.get("file_name", name))
        if not entry:
            continue
        try:
            formats.add(_format(entry))
        except UnreadError as error:
            draft.refuse(f"{key}.{name}", f"dataset_info.json: {error}")
    files.rows(draft, setting, names, key)
    return formats


def _format(entry: dict[str, Any]) -> str:
    """Our format of a listed data set."""
    columns, tags = entry.get("columns", {}), entry.get("tags", {})
    if more := set(entry) - {"file_name", "formatting", "columns", "tags", "ranking"}:
        raise UnreadError(f"{', '.join(sorted(more))}: rows are read as their format says")
    judgement = {name: column for name, column in columns.items() if name in (*PAIR, "kto_tag")}
    if judgement:
        columns = {name: column for name, column in columns.items() if name not in judgement}
        entry = entry | {"columns": columns}
        if entry.pop("ranking", False) and judgement == PAIR and _format(entry):
            return "preference"
        if judgement == {"kto_tag": "label"} and _format(entry):
            return "kto"
        raise UnreadError(
            "its columns of judgements are not those of a format here: see docs/errors.md, HB202"
        )
    if entry.get("ranking"):
        raise UnreadError("ranking: it names no columns chosen and rejected")
    if entry.get("formatting", "alpaca") == "alpaca" and columns.items() <= ALPACA.items() and not tags:
        return "alpaca"
    if (
        entry.get("formatting") == "sharegpt"
        and columns == MESSAGES
        and tags.items() >= TAGS.items() - {("system_tag", "system")}
    ):
        return "messages"
    if entry.get("formatting") == "sharegpt" and columns in ({}, SHAREGPT) and not tags:
        return "sharegpt"
    raise UnreadError("its columns are not those of a format here: see docs/errors.md, HB202")
