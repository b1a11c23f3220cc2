"""Arguments of transformers' trainer, of TRL, and PEFT's adapter_config.json: what each key means here.

It owns these names and their rules for several keys at once; it must not know how a recipe is written.

Source: transformers `TrainingArguments`; TRL `SFTConfig`, `DPOConfig`, `KTOConfig`, `ModelConfig`, `ScriptArguments`;
PEFT `LoraConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping

from halfbyte.foreign import files, preferences, rules
from halfbyte.foreign.draft import Draft
from halfbyte.foreign.keys import (
    Joint,
    Keys,
    Refused,
    Taken,
    beginning,
    dtype,
    filled,
    flag,
    idle,
    number,
    one_of,
    refused,
    whole,
)

PEFT_TITLE, TRL_TITLE, TRANSFORMERS_TITLE = "PEFT", "TRL", "transformers"
PEFT_SIGNATURE = frozenset({"peft_type"})
TRL_SIGNATURE = frozenset(
    {
        "use_peft",
        "dataset_name",
        "max_seq_length",
        "lora_r",
        "dataset_text_field",
        "packing",
        "loss_type",
        "beta",
    }
)
TRANSFORMERS_SIGNATURE = frozenset({"per_device_train_batch_size", "num_train_epochs", "lr_scheduler_type"})

TRANSFORMERS_KEYS: Keys = {
    **rules.TRAINER,
    "model_name_or_path": Joint("model"),
    "per_device_train_batch_size": Joint("train.batch_size"),
    "lr_scheduler_type": Joint("train.schedule"),
    "train_file": Joint("data.train"),
    "validation_file": Joint("data.eval"),
    "dataset_name": Joint("data.train"),
    "num_train_epochs": Taken("train.epochs", number),
    "per_device_eval_batch_size": Taken("evaluate.batch_size", whole),
    "optim": Taken("train.optimizer", rules.optimizer),
    "block_size": Taken("data.max_length", whole),
    **idle("training is what a run does", "do_train do_predict overwrite_cache prediction_loss_only"),
    **idle(
        "no part of the training", "include_num_input_tokens_seen skip_memory_metrics logging_nan_inf_filter"
    ),
    **idle("the computing type is chosen for the processor, see `dtype`", "torch_dtype"),
    **refused("rows come in random order", "train_sampling_strategy", "random"),
    **refused("the seed decides the order of rows too", "data_seed"),
    **refused("a step has all its passes", "dataloader_drop_last"),
    **refused("fetch the part that you mean", "dataset_config dataset_config_name"),
}
TRL_KEYS: Keys = {
    **TRANSFORMERS_KEYS,
    "use_peft": Joint("method"),
    "load_in_4bit": Joint("method"),
    "packing": Joint("train.packing"),
    "lora_target_modules": Joint("lora.target_modules"),
    "lora_r": Taken("lora.r", whole),
    "lora_alpha": Taken("lora.alpha", number),
    "lora_dropout": Taken("lora.dropout", number),
    "lora_modules_to_save": Taken("lora.modules_to_save", filled),
    "use_dora": Taken("lora.dora", flag),
    "use_rslora": Taken("lora.rank_stabilised", flag),
    "max_length": Taken("data.max_length", whole),
    "max_seq_length": Taken("data.max_length", whole),
    "use_bnb_nested_quant": Taken("quantization.double_quant", flag),
    "dtype": Taken("dtype", dtype),
    **idle(
        "packing has no such choice, and packed rows never see each other", "packing_strategy eval_packing"
    ),
    **idle("nothing is padded that packing can avoid", "padding_free pad_to_multiple_of pad_token"),
    **idle("nothing is measured but the rows held out", "dataset_test_split"),
    **idle("a causal language model is all there is", "lora_task_type"),
    "assistant_only_loss": Refused("only answers are learnt", (True,)),
    "completion_only_loss": Refused("only answers are learnt", (True,)),
    "dataset_train_split": Refused("fetch the part that you mean", ("train",)),
    "dataset_text_field": Refused("rows of text have it in a column of that name", ("text",)),
    "truncation_mode": Refused("rows are cut at the end", ("keep_start",)),
    "loss_type": Joint("task"),
    "beta": Taken("preference.beta", number),
    "desirable_weight": Taken("preference.good_weight", number),
    "undesirable_weight": Taken("preference.bad_weight", number),
    "disable_dropout": Joint("lora.dropout"),
    "loss_weights": Refused("there is one loss", ([1.0],)),
    "f_divergence_type": Refused("the reference is held by its KL divergence", ("reverse_kl",)),
    "ld_alpha": Refused("all tokens of an answer count the same", (1.0,)),
    **refused("this objective is not there", "label_smoothing", 0.0),
    **refused("this objective is not there", "use_weighting reference_free rpo_alpha"),
    **refused("the reference is the model before training", "sync_ref_model force_use_ref_model"),
    **idle(
        "the reference is noted before the first step", "precompute_ref_log_probs precompute_ref_batch_size"
    ),
    **idle(
        "read only with a choice that is refused",
        "f_alpha_divergence_coef discopop_tau ref_model_mixup_alpha ref_model_sync_steps",
    ),
    **refused("rows are read whole", "dataset_streaming"),
    **refused("this kind of adapter is not there", "lora_target_parameters"),
    **refused("a template is the tokenizer's, chatml or plain", "chat_template_path eos_token"),
    **refused("rows have no further arguments", "dataset_kwargs model_init_kwargs"),
}
PEFT_KEYS: Keys = {
    "base_model_name_or_path": Joint("model"),
    "target_modules": Joint("lora.target_modules"),
    "r": Taken("lora.r", whole),
    "lora_alpha": Taken("lora.alpha", number),
    "lora_dropout": Taken("lora.dropout", number),
    "peft_type": Joint("method"),
    "task_type": Refused("a causal language model is all there is", ("CAUSAL_LM",)),
    "bias": Taken("lora.bias", one_of({name: name for name in ("none", "all", "lora_only")})),
    "init_lora_weights": Taken("lora.init", beginning),
    "rank_pattern": Taken("lora.rank_pattern", filled),
    "alpha_pattern": Taken("lora.alpha_pattern", filled),
    "modules_to_save": Taken("lora.modules_to_save", filled),
    "use_dora": Taken("lora.dora", flag),
    "use_rslora": Taken("lora.rank_stabilised", flag),
    **idle("says how PEFT made or loads the file", "inference_mode auto_mapping peft_version megatron_core"),
    **idle("read only with a choice that is refused", "layers_pattern qalora_group_size ensure_weight_tying"),
    **idle("says how a weight is stored, which is seen on loading", "fan_in_fan_out"),
    **idle("says how PEFT runs, not what it computes", "runtime_config"),
    **refused("this kind of adapter is not there", "use_qalora lora_bias use_bdlora"),
    **refused(
        "this kind of adapter is not there", "velora_config monteclora_config kasa_config arrow_config"
    ),
    **refused("A begins at random, B at zero", "loftq_config eva_config corda_config lora_ga_config", {}),
    **refused("no layer is trained whole beside an adapter", "trainable_token_indices", []),
    **refused("all layers of the names given are adapted", "layers_to_transform exclude_modules", []),
    **refused("layers stay as many as they are", "layer_replication megatron_config alora_invocation_tokens"),
    **refused("adapters stand beside layers, not parameters", "target_parameters", []),
    **refused("the model folder is taken as it is: fetch the revision you mean", "revision", "main"),
}

TRANSFORMERS_DEFAULTS = {
    "train.learning_rate": 5e-5,
    "train.epochs": 3.0,
    "seed": 42,
    "data.eval_fraction": 0.0,
}
TRL_DEFAULTS = {
    **TRANSFORMERS_DEFAULTS,
    "data.max_length": 1024,
    "train.learning_rate": 2e-5,
    "lora.r": 16,
    "lora.alpha": 32.0,
    "lora.dropout": 0.05,
    "quantization.double_quant": False,
}
LOSSES = {"sigmoid": "dpo", "kto": "kto"}
TELLING = {
    "dpo": (
        "loss_weights",
        "f_divergence_type",
        "ld_alpha",
        "use_weighting",
        "discopop_tau",
        "reference_free",
    ),
    "kto": ("desirable_weight", "undesirable_weight"),
}
"""Keys that only the arguments of one objective have."""
JUDGED_RATE = 1e-6
"""TRL's learning rate where rows are judged answers."""
PEFT_DEFAULTS = {"lora.r": 8, "lora.alpha": 8.0, "lora.dropout": 0.0}


def transformers_rule(draft: Draft) -> None:
    """Decide what several keys decide together, and what transformers' trainer would where none does."""
    draft.notes.append("Arguments of the trainer alone: it would train every weight, so method is full.")
    rules.method(draft, adapter=False, in_4bit=False)
    _training(draft, TRANSFORMERS_DEFAULTS, packed=None)


def trl_rule(draft: Draft) -> None:
    """Decide what several keys decide together, and what TRL would where none does."""
    adapter, judged = draft.on("use_peft"), _objective(draft)
    if adapter:
        rules.targets(draft, "lora_target_modules", draft.get("lora_target_modules"))
    else:
        draft.ignore("use_peft is not set, so every weight is trained", "lora_target_modules", "load_in_4bit")
    if draft.get("assistant_only_loss") is None and not judged:
        draft.notes.append(
            "TRL learns whole conversations unless told otherwise; here only answers are learnt."
        )
    packed = draft.on("packing") if draft.get("packing") is not None else None
    rules.defaults(draft, TRL_DEFAULTS | ({"train.learning_rate": JUDGED_RATE} if judged else {}))
    in_4bit = adapter and draft.on("load_in_4bit")
    rules.method(draft, adapter, in_4bit, "use_peft", *(["load_in_4bit"] if adapter else []))
    _training(draft, {}, packed)


def _objective(draft: Draft) -> bool:
    """Decide the task, by the loss or by keys that only one objective has; whether its rows are judged answers."""
    given = {task: [key for key in keys if draft.get(key) is not None] for task, keys in TELLING.items()}
    told = {task: keys for task, keys in given.items() if keys}
    loss = draft.get("loss_type")
    name = loss[0] if isinstance(loss, list) and len(loss) == 1 else loss
    if name == "nll":
        draft.ignore("asks for nothing at this value", "loss_type")
    elif loss is not None and str(name) not in LOSSES:
        draft.refuse("loss_type", f"{loss!r} is none of nll, {', '.join(LOSSES)}")
    elif loss is not None:
        draft.set("task", LOSSES[str(name)], "loss_type")
    elif not told and draft.get("beta") is not None:
        draft.refuse("beta", "DPO's, KTO's or another's: say which, with loss_type sigmoid or kto")
    for task, keys in told.items():
        draft.set("task", task, *keys)
    chosen = str(draft.value("task") or "sft")
    preferences.settle(draft, chosen)
    if chosen != "sft":
        _dropout(draft)
    else:
        draft.ignore("read by another objective", "disable_dropout")
    return chosen != "sft"


def _dropout(draft: Draft) -> None:
    """Where answers are judged, TRL sets all dropout to 0, the adapter's too, unless told not to."""
    if draft.get("disable_dropout") is None or draft.on("disable_dropout"):
        draft.drop_section("lora.dropout", "disable_dropout, TRL's default here, sets it to 0")
        draft.set("lora.dropout", 0.0, *["disable_dropout"][: draft.get("disable_dropout") is not None])
    else:
        draft.ignore("dropout is what lora.dropout says", "disable_dropout")


def _training(draft: Draft, defaults: Mapping[str, object], packed: bool | None) -> None:
    files.model(draft, "model_name_or_path")
    for keys, setting in (("train_file", "dataset_name"), "data.train"), (("validation_file",), "data.eval"):
        given = [key for key in keys if draft.get(key) is not None]
        if given:
            files.rows(draft, setting, [str(draft.get(key)) for key in given], *given)
    rules.defaults(draft, defaults)
    rules.passes(draft, "per_device_train_batch_size", 8, "max_length", packed, "packing")
    rules.schedule(draft, "lr_scheduler_type", "linear")
    if "train.warmup_steps" not in draft.lines:
        draft.default("train.warmup_ratio", 0.0)
    rules.optimizer_defaults(draft, "optim")
    rules.take_back_unread(draft)
    rules.measuring(draft)


def peft_rule(draft: Draft) -> None:
    """Decide what several keys decide together, and what PEFT would where none does."""
    files.model(draft, "base_model_name_or_path")
    rules.targets(draft, "target_modules", draft.get("target_modules"))
    rules.defaults(draft, PEFT_DEFAULTS)
    if draft.get("peft_type") != "LORA":
        draft.refuse("peft_type", "LoRA is the one kind of adapter here")
    rules.method(draft, True, False, "peft_type")
    draft.notes.append(
        "An adapter's file does not say how its base was held: set method to qlora for 4 bits."
    )
