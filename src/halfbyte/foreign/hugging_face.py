"""Arguments of transformers' trainer, of TRL, and PEFT's adapter_config.json: what each key means here.

It owns these names and their rules for several keys at once; it must not know how a recipe is written.

Source: transformers `TrainingArguments`; TRL `SFTConfig`, `ModelConfig`, `ScriptArguments`; PEFT `LoraConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping

from halfbyte.foreign import files, rules
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
    {"use_peft", "dataset_name", "max_seq_length", "lora_r", "dataset_text_field", "packing"}
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
    "loss_type": Refused("the loss is cross-entropy", ("nll",)),
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
PEFT_DEFAULTS = {"lora.r": 8, "lora.alpha": 8.0, "lora.dropout": 0.0}


def transformers_rule(draft: Draft) -> None:
    """Decide what several keys decide together, and what transformers' trainer would where none does."""
    draft.notes.append("Arguments of the trainer alone: it would train every weight, so method is full.")
    rules.method(draft, adapter=False, in_4bit=False)
    _training(draft, TRANSFORMERS_DEFAULTS, packed=None)


def trl_rule(draft: Draft) -> None:
    """Decide what several keys decide together, and what TRL would where none does."""
    adapter = draft.on("use_peft")
    if adapter:
        rules.targets(draft, "lora_target_modules", draft.get("lora_target_modules"))
    else:
        draft.ignore("use_peft is not set, so every weight is trained", "lora_target_modules", "load_in_4bit")
    if draft.get("assistant_only_loss") is None:
        draft.notes.append(
            "TRL learns whole conversations unless told otherwise; here only answers are learnt."
        )
    packed = draft.on("packing") if draft.get("packing") is not None else None
    rules.defaults(draft, TRL_DEFAULTS)
    in_4bit = adapter and draft.on("load_in_4bit")
    rules.method(draft, adapter, in_4bit, "use_peft", *(["load_in_4bit"] if adapter else []))
    _training(draft, {}, packed)


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
