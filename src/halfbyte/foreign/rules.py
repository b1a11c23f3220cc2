"""Rules that tools of the field share: several keys of theirs that make one setting.

It owns what transformers' trainer, on which those tools are built, means by its keys; it must not know files of rows
or what a tool calls its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from halfbyte.foreign.draft import Draft
from halfbyte.foreign.keys import (
    UNSET,
    Idle,
    Joint,
    Keys,
    Taken,
    UnreadError,
    above_zero,
    clipping,
    dtype,
    flag,
    idle,
    number,
    refused,
    whole,
)

LOGGING_STEPS = 500
"""How often transformers logs, and measures, where nothing says it."""

OPTIMIZERS = {
    "adamw": "adamw adamw_hf adamw_torch adamw_torch_fused adamw_apex_fused",
    "adamw_8bit": "adamw_bnb_8bit adamw_8bit adamw_torch_8bit",
    "paged_adamw": "paged_adamw paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "lion": "lion lion_32bit paged_lion paged_lion_32bit lion_8bit paged_lion_8bit",
    "sgd": "sgd",
}
SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
}

KEPT = "what layers keep for the backward pass follows train.activation_memory_gb, with the same result"
PACKED_APART = "packed rows never see each other here"


def optimizer(value: Any) -> str:
    """Our name of an optimizer of transformers; lion's paged and 8-bit states are theirs alone, its rule is not."""
    for name, theirs in OPTIMIZERS.items():
        if value in theirs.split():
            return name
    if value == "adafactor":
        raise UnreadError("runs there without scaling by each weight's size, which adafactor here does")
    raise UnreadError(f"is none of {', '.join(OPTIMIZERS)} under any of their names")


def steps_between(value: Any) -> object:
    """Steps between two happenings; shares of a run are not counted in steps."""
    read = number(value)
    return whole(read) if read >= 1 else UNSET


def share(value: Any) -> float:
    """A share of the rows; a number of rows is no share."""
    read = number(value)
    if read >= 1:
        raise UnreadError("is a number of rows, and only a share of them can be held out: choose one below 1")
    return read


# Arguments of transformers' trainer, which axolotl, LLaMA-Factory and TRL take under the same names.
TRAINER: Keys = {
    "learning_rate": Taken("train.learning_rate", number),
    "gradient_accumulation_steps": Taken("train.gradient_accumulation_steps", whole),
    "max_steps": Taken("train.max_steps", above_zero),
    "weight_decay": Taken("train.weight_decay", number),
    "adam_beta1": Taken("train.beta1", number),
    "adam_beta2": Taken("train.beta2", number),
    "adam_epsilon": Taken("train.eps", number),
    "max_grad_norm": Taken("train.max_grad_norm", clipping),
    "label_smoothing_factor": Taken("train.label_smoothing", number),
    "neftune_noise_alpha": Taken("train.neftune_alpha", number),
    "logging_steps": Taken("train.log_steps", steps_between),
    "save_steps": Taken("train.save_steps", steps_between),
    "seed": Taken("seed", whole),
    "output_dir": Taken("output_dir", str),
    "bnb_4bit_quant_type": Taken("quantization.format"),
    "bnb_4bit_use_double_quant": Taken("quantization.double_quant", flag),
    "bnb_4bit_compute_dtype": Taken("dtype", dtype),
    "save_total_limit": Taken("train.save_total_limit", above_zero),
    "eval_strategy": Joint("train.eval_steps"),
    "evaluation_strategy": Joint("train.eval_steps"),
    "eval_steps": Joint("train.eval_steps"),
    "load_best_model_at_end": Joint("train.keep"),
    "metric_for_best_model": Joint("train.keep"),
    "greater_is_better": Joint("train.keep"),
    "early_stopping_patience": Joint("train.early_stopping_patience"),
    "lr_scheduler_kwargs": Joint("train.min_lr_ratio"),
    "warmup_steps": Joint("train.warmup_steps"),
    "warmup_ratio": Joint("train.warmup_ratio"),
    **idle(
        "the computing type is chosen for the processor, see `dtype`; what is trained is float32",
        "bf16 fp16 bfloat16 float16 tf32 bf16_full_eval fp16_full_eval fp16_opt_level half_precision_backend",
    ),
    **idle(
        KEPT,
        "gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing activation_offloading",
    ),
    **idle(
        "attention and kernels are chosen by halfbyte, see `halfbyte doctor`", "attn_implementation use_cache"
    ),
    **idle(
        "kernels are chosen by halfbyte, see `halfbyte doctor`", "torch_compile* use_liger_kernel liger_*"
    ),
    **idle(
        "a run is one process on one machine",
        "deepspeed* fsdp* ddp_* local_rank accelerator_config device_map",
    ),
    **idle("rows are read once, before training", "dataloader_* preprocessing_num_workers dataset_num_proc"),
    **idle(
        "nothing is sent to a service",
        "report_to run_name wandb_* mlflow_* comet_* swanlab_* hub_* push_to_hub",
    ),
    **idle(
        "held-out rows are measured before and after training, and where train.eval_steps says",
        "do_eval evals_per_epoch eval_accumulation_steps eval_on_start eval_delay",
    ),
    **idle(
        "a run leaves its folder whole, and train.save_steps decides on checkpoints",
        "save_strategy save_only_model save_safetensors saves_per_epoch overwrite_output_dir",
    ),
    **idle(
        "the log has every step",
        "logging_dir logging_strategy logging_first_step log_level disable_tqdm debug",
    ),
    **idle("rows keep the columns they need", "remove_unused_columns"),
    **idle("no code of a model's folder is run", "trust_remote_code"),
    **refused("a run begins anew, from the base model", "resume_from_checkpoint"),
    **refused("rows come in random order", "group_by_length", "random"),
    **refused("the optimizer has no further arguments", "optim_args optim_target_modules"),
    **refused("the batch is as large as is set", "auto_find_batch_size"),
    **refused("the base is held in 4 bits or in 16", "load_in_8bit"),
    **refused("the model folder is taken as it is: fetch the revision you mean", "model_revision", "main"),
}


def method(draft: Draft, adapter: bool, in_4bit: bool, *sources: str) -> None:
    """Decide the method, and take back what it would not read."""
    chosen = ("qlora" if in_4bit else "lora") if adapter else "full"
    said = [key for key in sources if draft.get(key) is not None]
    draft.set("method", chosen, *said, remark="" if said else draft.by_default)
    if chosen != "qlora":
        draft.drop_section("quantization.", f"nothing is held in 4 bits by method {chosen}")
    if chosen == "full":
        draft.drop_section("lora.", "method full trains no adapter")
        draft.drop_section("train.lora_plus_ratio", "method full trains no adapter")


def passes(
    draft: Draft, size: str, default_size: int, length: str, packed: bool | None, *packing: str
) -> None:
    """Decide how many rows or tokens a pass has.

    Args:
        draft: Gets the settings; has `data.max_length`.
        size: Their key for rows per pass; packed, each row is `length` tokens long.
        default_size: What it is where it is missing.
        length: Their key for tokens per row.
        packed: Whether rows are packed; None where nothing says so, and they are not.
        packing: Keys that say it.
    """
    given = draft.read_as(size, whole)
    rows = default_size if given is None else given
    said = [key for key in packing if draft.get(key) is not None]
    keys = [key for key in (size, length) if draft.get(key) is not None]
    default = draft.by_default
    if not packed:
        draft.set("train.batch_size", rows, *([size] if given else []), remark="" if given else default)
        draft.set("train.packing", False, *said, remark="" if said else default)
        return
    tokens = rows * draft.value("data.max_length")
    draft.set("train.packing", True, *said, remark=PACKED_APART)
    draft.set("train.batch_tokens", tokens, *keys, remark=f"{rows} × {draft.value('data.max_length')} tokens")


def schedule(draft: Draft, key: str, default: str) -> None:
    """Decide schedule and warm-up: transformers' `constant` has none, and some schedules have arguments."""
    theirs = draft.get(key) or default
    if not isinstance(theirs, str) or theirs not in SCHEDULES:
        draft.refuse(key, f"{theirs!r} is none of {', '.join(SCHEDULES)}")
        draft.ignore(f"read by {key} alone", "lr_scheduler_kwargs")
    else:
        sources = [key] if draft.get(key) is not None else []
        draft.set(
            "train.schedule",
            SCHEDULES[theirs],
            *sources,
            remark="" if sources else draft.by_default,
        )
        try:
            _schedule_arguments(draft, theirs)
        except UnreadError as error:
            draft.refuse("lr_scheduler_kwargs", f"{draft.get('lr_scheduler_kwargs')!r} {error}")
    if theirs == "constant":
        draft.ignore("constant is without warm-up there", "warmup_steps", "warmup_ratio")
        draft.set("train.warmup_ratio", 0.0, key, remark="constant is without warm-up there")
    else:
        _warmup(draft)


def _schedule_arguments(draft: Draft, theirs: str) -> None:
    name = "lr_scheduler_kwargs"
    arguments = draft.get(name)
    given = dict(arguments) if isinstance(arguments, dict) else {}
    peak, total = draft.value("train.learning_rate"), draft.value("train.max_steps")
    lowest = given.pop("min_lr_rate" if theirs != "warmup_stable_decay" else "min_lr_ratio", None)
    if theirs == "cosine_with_min_lr" and lowest is None and peak and "min_lr" in given:
        lowest = number(given.pop("min_lr")) / peak
    if lowest is not None:
        draft.set("train.min_lr_ratio", number(lowest), name)
    if theirs == "warmup_stable_decay":
        decay = given.pop("num_decay_steps", None)
        if decay is None or not total:
            draft.refuse(name, "a decay in steps needs max_steps beside it: set train.decay_ratio yourself")
        else:
            draft.set("train.decay_ratio", whole(decay) / total, name)
    if given or (arguments is not None and not isinstance(arguments, dict)):
        draft.refuse(name, f"{', '.join(given) or repr(arguments)}: no argument of a schedule here")
    elif arguments == {}:
        draft.ignore("asks for nothing at this value", name)


def _warmup(draft: Draft) -> None:
    """Steps beat the ratio where they are not 0; less than one is a ratio in newer versions of transformers."""
    for name in ("warmup_steps", "warmup_ratio"):
        given = draft.get(name)
        if given is None:
            continue
        if "train.warmup_steps" in draft.lines:
            draft.ignore("warmup_steps beats it", name)
            continue
        read = draft.read_as(name, number)
        if read is None:
            continue
        if name == "warmup_ratio" or 0 < read < 1:
            draft.set("train.warmup_ratio", read, name)
        elif read < 1:
            draft.ignore("not set at this value", name)
        elif (steps := draft.read_as(name, whole)) is not None:
            draft.set("train.warmup_steps", steps, name)


def optimizer_defaults(draft: Draft, key: str) -> None:
    """Say what an optimizer's other names leave out, and what transformers gives lion."""
    theirs = str(draft.get(key) or "")
    if draft.value("train.optimizer") == "lion" and "8bit" in theirs:
        draft.notes.append(f"{key}: {theirs} keeps its state in 8 bits; here it has 32.")
    if draft.value("train.optimizer") == "lion":
        draft.default("train.beta2", 0.999)
        draft.drop_section("train.eps", "lion does not read it")
    if draft.value("train.optimizer") == "sgd":
        for setting in ("train.beta1", "train.beta2", "train.eps"):
            draft.drop_section(setting, "sgd does not read it")


def measuring(draft: Draft, by_steps: bool = False) -> None:
    """Decide when held-out rows are measured while training, and what follows from it.

    Args:
        draft: Gets the settings; has decided what is held out.
        by_steps: Whether `eval_steps` alone is enough, without a strategy beside it.
    """
    keys = [
        key for key in ("eval_strategy", "evaluation_strategy", "eval_steps") if draft.get(key) is not None
    ]
    strategy = draft.get("eval_strategy") or draft.get("evaluation_strategy")
    if strategy is None and by_steps and draft.get("eval_steps") is not None:
        strategy = "steps"
    held_out = "data.eval" in draft.lines or draft.value("data.eval_fraction")
    said = draft.read_as("eval_steps", number) or draft.read_as("logging_steps", number)
    steps = said or LOGGING_STEPS
    if strategy == "steps" and held_out and steps >= 1:
        draft.set("train.eval_steps", int(steps), *keys)
    else:
        draft.ignore("held-out rows, where there are any, are measured before and after", *keys)
    _best(draft)


def _best(draft: Draft) -> None:
    """Decide which weights are kept, and whether training ends early: by the held-out loss, if it is measured."""
    measured = "train.eval_steps" in draft.lines
    if draft.on("load_best_model_at_end") and not measured:
        draft.refuse("load_best_model_at_end", "needs rows held out and a number of eval_steps, at least 1")
    elif draft.on("load_best_model_at_end"):
        draft.set("train.keep", "best", "load_best_model_at_end")
    else:
        draft.ignore("asks for nothing at this value", "load_best_model_at_end")
    if draft.get("metric_for_best_model") not in (None, "loss", "eval_loss") or draft.on("greater_is_better"):
        draft.refuse("metric_for_best_model", "the held-out loss decides")
    draft.ignore("the held-out loss decides", "metric_for_best_model", "greater_is_better")
    if (patience := draft.read_as("early_stopping_patience", whole)) is None:
        return
    if measured:
        draft.set("train.early_stopping_patience", patience, "early_stopping_patience")
    else:
        draft.refuse("early_stopping_patience", "needs rows held out and a number of eval_steps, at least 1")


def take_back_unread(draft: Draft) -> None:
    """Take back what a recipe would not read beside its other settings, and say if nothing is held out."""
    if "train.max_steps" in draft.lines:
        draft.drop_section("train.epochs", "max_steps beats it")
    if "data.eval" in draft.lines:
        draft.drop_section("data.eval_fraction", "the held-out rows have a file of their own")
    elif not draft.value("data.eval_fraction"):
        draft.notes.append(
            "Nothing is held out, as there: set data.eval_fraction to measure before and after."
        )


def targets(draft: Draft, key: str, value: Any) -> None:
    """Decide which layers are adapted, from a list, names with commas between them, or a word for all."""
    words = {"all-linear", "all", "all_linear"}
    names = [value] if isinstance(value, str) else value
    if isinstance(value, str) and value in words:
        draft.set("lora.target_modules", "all-linear", key)
    elif value is None:
        draft.refuse(key, "is missing, and PEFT then chooses by the model's type: name the layers")
    elif not isinstance(names, list) or any(set(str(name)) & set("*()[]|\\^$+?") for name in names):
        draft.refuse(key, f"{value!r} is no list of names")
    else:
        draft.set(
            "lora.target_modules", [part.strip() for name in names for part in str(name).split(",")], key
        )


def defaults(draft: Draft, settings: Mapping[str, Any]) -> None:
    """Decide, as the other tool would, what no key decides."""
    for setting, value in settings.items():
        draft.default(setting, value)


EMBEDDING_RATE = Idle("adapters stand beside linear layers only, never beside embeddings")


def chat_format(draft: Draft, key: str, ours: Mapping[str, str]) -> None:
    """Decide the chat format by another tool's name for it.

    Args:
        draft: The recipe in the making.
        key: The key that names it.
        ours: Their names of formats that write what ours of that name write; any other is left to the model's own.
    """
    name = draft.get(key)
    if name is None:
        return
    found = ours.get(name) if isinstance(name, str) else None
    draft.set("data.template", found or "auto", key)
    if found is None:
        draft.notes.append(f"{key} {name}: the model's own template is used; see it with halfbyte data show.")
