"""READ FIRST. A run from rows on disk to a trained adapter with evidence: its steps in order, nothing else.

It owns the order of the steps and what each hands to the next; it must not know how any step works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte import __version__
from halfbyte.config import load_config, refuse_other_settings
from halfbyte.data.check import CheckedDataset, DataReport, check_overlap, check_rows, split_rows
from halfbyte.data.containers import row_files
from halfbyte.data.faults import Reading
from halfbyte.data.fingerprint import Fingerprint
from halfbyte.data.read import read_rows
from halfbyte.data.render import Renderer
from halfbyte.data.tokenise import Tokenised, load_tokenizer, padding_id, tokenise_rows
from halfbyte.data.weigh import file_weights, weigh_rows
from halfbyte.errors import ConfigError, EvaluateError, listed
from halfbyte.evaluate.measure import Measurement, Subject, measure
from halfbyte.evaluate.perplexity import held_out_loss
from halfbyte.govern.manifest import manifest
from halfbyte.govern.run_folder import RunFolder, check_free
from halfbyte.kernels import backends
from halfbyte.model import blocks
from halfbyte.model.adapters import load_adapter
from halfbyte.model.files import open_model_folder
from halfbyte.model.fingerprints import read_fingerprint, refuse_other_template
from halfbyte.model.heads import head_route
from halfbyte.model.isolation import prove_isolation
from halfbyte.model.limits import Limits
from halfbyte.model.precision import computing_dtype
from halfbyte.model.skeleton import build_skeleton
from halfbyte.report.plots import loss_curve
from halfbyte.report.summary import Setting, Summary, compare, side_by_side
from halfbyte.report.watch import Part, Watch
from halfbyte.settings import Config, DataConfig
from halfbyte.train.checkpoint import Checkpoint, last_good
from halfbyte.train.loop import TrainRun, train
from halfbyte.train.memory import activation_budget_bytes
from halfbyte.train.methods import (
    ModelSize,
    autocast_dtype,
    load_base,
    make_trainable,
    result_name,
    saver,
    weights_name,
)
from halfbyte.train.metrics import peak_rss_bytes
from halfbyte.train.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """Rows, ready for the model.

    Attributes:
        tokenizer: The base model's.
        template: Chat format in use.
        fingerprint: Digests of chat format and tokenizer, kept with what is trained.
        reading: Formats of the files, and the faulty rows that were skipped.
        report: What was counted in the files for training, held-out rows included.
        train: Rows to train on.
        held_out: Rows to measure on, none of them trained on; may be empty.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    fingerprint: Fingerprint
    reading: Reading
    report: DataReport
    train: Tokenised
    held_out: Tokenised

    @property
    def truncated(self) -> int:
        """Rows that were cut at `max_length`."""
        return self.train.truncated + self.held_out.truncated

    @property
    def misaligned(self) -> int:
        """Rows in which a token straddles the border of prompt and answer."""
        return self.train.misaligned + self.held_out.misaligned

    def check_fit(self, model: PreTrainedModel) -> None:
        """Refuse rows that the model cannot be given; weights without memory will do.

        Raises:
            DataError: HB212 or HB213, naming every such row.
        """
        Limits.of(model).check([*self.train.examples, *self.held_out.examples])

    def described(self) -> str:
        """The counts in a few words."""
        facts = [
            f"{len(side.examples):,} {name}"
            + f" ({side.truncated:,} cut at max_length)" * bool(side.truncated)
            for name, side in (("to train on", self.train), ("held out", self.held_out))
        ]
        if self.reading.skipped:
            facts.append(f"{len(self.reading.skipped):,} bad rows skipped")
        if self.report.duplicates:
            facts.append(f"{self.report.duplicates:,} duplicates")
        return ", ".join([*facts, f"template {self.template}"])


@dataclass(frozen=True)
class RunResult:
    """What a run left.

    Attributes:
        folder: The run's folder.
        result: Folder inside it that holds what was trained: an adapter in PEFT's format, or a whole model.
        summary: Before and after, time, memory, tokens.
    """

    folder: Path
    result: Path
    summary: Summary


def run(
    config: Config | str | Path,
    *,
    evaluate: bool = True,
    overwrite: bool = False,
    resume: bool = False,
    watch: Watch | None = None,
) -> RunResult:
    """Train as the settings say and leave the evidence in `output_dir`.

    Args:
        config: Settings, or the path of their YAML file.
        evaluate: Measure the held-out rows before and after.
        overwrite: Replace an earlier run in `output_dir`.
        resume: Go on with the run in `output_dir` from its newest whole checkpoint, to the very weights it would have
            had without a break; without a checkpoint it begins anew.
        watch: Shows progress; None shows nothing.

    Returns:
        Where everything is, and the summary.

    Raises:
        HalfbyteError: With a code for whatever was wrong; see docs/errors.md.
    """
    config = config if isinstance(config, Config) else load_config(config)
    watch = watch or Watch()
    autocast = autocast_dtype(config)
    folder, checkpoint = _open_folder(config, overwrite, resume, watch)

    with _phase("prepare rows", folder, watch) as part:
        rows = prepare(config)
        part.say(rows.described())
    _note_oddities(rows, folder, watch)
    with _phase("load model", folder, watch) as part:
        model = load_base(config, part.progress)
        folder.write_manifest(_manifest(config, rows), same=checkpoint is not None)
        rows.check_fit(model)
    subject = Subject(model, rows.tokenizer, rows.held_out.stop_ids, padding_id(rows.tokenizer))
    measured = partial(
        _measure, subject=subject, rows=rows.held_out, config=config, folder=folder, watch=watch
    )
    _make_ready(model, config)
    before = measured("before") if evaluate else None
    _plan_memory(model, rows, config, folder, watch)

    save = saver(model, rows.tokenizer, config, rows.fingerprint)
    display = watch.training(config.train.log_steps)
    held_out = _held_out_loss(subject, rows.held_out, config)
    how = TrainRun(folder.path, save, config.seed, subject.pad_id, autocast, display, checkpoint, held_out)
    with folder.phase("train"):
        training = train(model, rows.train.examples, config.train, how)
    folder.event("head", **head_route(model)._asdict())
    result = folder / result_name(config)
    with _phase("save", folder, watch) as part:
        save(result)
        part.say(str(result))
    after = measured("after") if evaluate else None

    _draw(training.metrics, folder, watch)
    summary = Summary(
        setting=_setting(config, rows, ModelSize.of(model)),
        changes=compare(before, after, resamples=config.evaluate.bootstrap, seed=config.seed),
        samples=side_by_side(before, after, config.evaluate.samples),
        training=training,
        phase_seconds=dict(folder.seconds),
        peak_rss_bytes=peak_rss_bytes(),
    )
    folder.write_json("summary.json", summary.as_dict())
    folder.event("run", state="done")
    return RunResult(folder.path, result, summary)


def prepare(config: Config) -> Prepared:
    """Read, check, split, render and tokenise the rows; the model itself is not needed.

    Raises:
        DataError: HB201 to HB217, each naming every faulty row.
    """
    data = config.data
    renderer = Renderer(load_tokenizer(config.model), data.template)
    reading = Reading(data.skip_bad_rows)
    checked = _checked(data.train, data, reading)
    if data.eval:
        train_rows, held_out_rows = list(checked.rows), list(_checked(data.eval, data, reading).rows)
        check_overlap(train_rows, held_out_rows)
    else:
        train_rows, held_out_rows = split_rows(checked.rows, data.eval_fraction, config.seed)
    if data.weights is not None:
        train_rows = weigh_rows(train_rows, file_weights(data.train, data.weights), config.seed)
    how = renderer, data.max_length, data.max_truncated
    return Prepared(
        renderer.tokenizer,
        renderer.template,
        Fingerprint.of(renderer),
        reading,
        checked.report,
        tokenise_rows(train_rows, *how),
        tokenise_rows(held_out_rows, *how),
    )


def _checked(paths: list[str], data: DataConfig, reading: Reading) -> CheckedDataset:
    """The rows of some files that can be trained on."""
    return check_rows(read_rows(paths, data.format, reading), reading=reading)


def rehearse(config: Config, overwrite: bool = False) -> tuple[Prepared, Plan]:
    """Everything of a run that can fail before the weights are read; nothing is written.

    Args:
        config: Settings.
        overwrite: Whether an earlier run in `output_dir` is to be replaced.

    Returns:
        The rows, and the steps that training would have.

    Raises:
        HalfbyteError: What the run would have raised.
    """
    check_free(Path(config.output_dir), overwrite)
    autocast_dtype(config)
    model_folder = open_model_folder(config.model)
    rows = prepare(config)
    rows.check_fit(build_skeleton(model_folder, computing_dtype(config.dtype)))
    return rows, Plan.of([len(e.input_ids) for e in rows.train.examples], config.train, config.seed)


def evaluate(config: Config, adapter: Path | None = None, *, watch: Watch | None = None) -> Measurement:
    """Measure a model on the rows of `data.eval`; nothing is written.

    Args:
        config: Model, how it is held, rows and what to measure.
        adapter: LoRA adapter in PEFT's format to put on top.
        watch: Shows progress; None shows nothing.

    Raises:
        HalfbyteError: With a code for whatever was wrong.
    """
    watch = watch or Watch()
    with watch.part("prepare rows") as part:
        renderer = Renderer(load_tokenizer(config.model), config.data.template)
        reading = Reading(config.data.skip_bad_rows)
        checked = _checked(config.data.eval or config.data.train, config.data, reading)
        rows = tokenise_rows(checked.rows, renderer, config.data.max_length, config.data.max_truncated)
        part.say(f"{len(rows.examples):,} rows, {rows.truncated:,} cut at max_length")
        part.say(f"template {renderer.template}")
    if reading.skipped:
        watch.note(f"{len(reading.skipped):,} bad rows skipped" + listed(list(map(str, reading.skipped))))
    _check_template([Path(config.model), *([adapter] if adapter else [])], renderer, config, watch)
    with watch.part("load model") as part:
        model = load_base(config, part.progress)
        Limits.of(model).check(rows.examples)
        if adapter is not None:
            load_adapter(model, adapter)
    subject = Subject(model, renderer.tokenizer, rows.stop_ids, padding_id(renderer.tokenizer))
    with watch.part("measure") as part:
        measured = measure(subject, rows.examples, config.evaluate, config.seed, part.progress)
        part.say(measured.described())
    return measured


def _open_folder(
    config: Config, overwrite: bool, resume: bool, watch: Watch
) -> tuple[RunFolder, Checkpoint | None]:
    """The run's folder, and the checkpoint to go on from."""
    path = Path(config.output_dir)
    if not resume:
        folder, checkpoint = RunFolder.create(path, overwrite), None
    else:
        folder = RunFolder.reopen(path)
        refuse_other_settings(config, load_config(folder / "config.yaml"))
        checkpoint, refused = last_good(path)
        for why in refused:
            watch.note(f"A checkpoint is refused: {why}.")
        if checkpoint is None:
            watch.note("There is no checkpoint to go on from: the run begins anew.")
            folder = RunFolder.create(path, overwrite=True)
        else:
            watch.note(f"Going on after step {checkpoint.state.step:,} of {checkpoint.state.total_steps:,}.")
            folder.event("resume", checkpoint=checkpoint.folder.name, refused=refused)
    folder.write_text("config.yaml", config.to_yaml())
    return folder, checkpoint


def _check_template(folders: list[Path], renderer: Renderer, config: Config, watch: Watch) -> None:
    """Refuse, or tell where that is allowed, that model or adapter was trained with other text than is used now."""
    used = Fingerprint.of(renderer)
    for folder in folders:
        told = refuse_other_template(folder, used, allowed=config.evaluate.allow_template_mismatch)
        if told:
            watch.note(f"{folder} was {told}.")
    if len(folders) > 1 and read_fingerprint(folders[-1]) is None:
        watch.note(
            f"{folders[-1]} does not say with which chat format and tokenizer it was trained: "
            "whether they are those in use is not checked."
        )


@contextmanager
def _phase(name: str, folder: RunFolder, watch: Watch) -> Iterator[Part]:
    """A part of the run, in its log and on the console."""
    with folder.phase(name), watch.part(name) as part:
        yield part


def _make_ready(model: PreTrainedModel, config: Config) -> None:
    """Refuse what can be refused before anything is measured; a fresh adapter answers as its base or the original."""
    make_trainable(model, config)
    if config.train.packing:
        prove_isolation(model)  # training proves it again


def _plan_memory(
    model: PreTrainedModel, rows: Prepared, config: Config, folder: RunFolder, watch: Watch
) -> None:
    """Decide what layers keep for the backward pass, and say which run fused."""
    lengths = [len(example.input_ids) for example in rows.train.examples]
    tokens = Plan.of(lengths, config.train, config.seed).order.most_tokens
    budget = activation_budget_bytes(config.train.activation_memory_gb)
    with _phase("plan memory", folder, watch) as part:
        for kind in blocks.describe(model):
            folder.event("layers", **kind._asdict())
            if not kind.fused:
                part.say(f"{kind.layers} {kind.type} are not fused: {kind.why}")
        plan = blocks.plan_memory(model, tokens, budget)
        if plan is not None:
            folder.event("memory", tokens=tokens, **plan.as_dict())
            part.say(plan.described())


def _measure(
    when: str, subject: Subject, rows: Tokenised, *, config: Config, folder: RunFolder, watch: Watch
) -> Measurement:
    """Measure the held-out rows and write what came out, item by item."""
    with _phase(f"measure {when}", folder, watch) as part:
        measured = measure(subject, rows.examples, config.evaluate, config.seed, part.progress)
        measured.write(folder / "eval", when)
        part.say(measured.described())
    return measured


def _held_out_loss(subject: Subject, rows: Tokenised, config: Config) -> Callable[[], float] | None:
    """What measures the held-out loss while training; None where there are no held-out rows.

    Raises:
        ConfigError: HB102 where the settings need some.
    """
    if rows.examples:
        size, pad_id = config.evaluate.batch_size, subject.pad_id
        found = partial(held_out_loss, subject.model, rows.examples, batch_size=size, pad_id=pad_id)
        return lambda: found(resamples=100).loss.value  # of the intervals nothing is kept
    if config.train.eval_steps is not None:
        fix = "name data.eval, set data.eval_fraction above 0, or leave train.eval_steps out"
        raise ConfigError("HB102", "no rows are held out to measure", where="train.eval_steps", fix=fix)
    return None


def _note_oddities(rows: Prepared, folder: RunFolder, watch: Watch) -> None:
    """Write down which rows were skipped, and say what would make a low loss mislead."""
    if rows.reading.skipped:
        folder.write_text("bad_rows.jsonl", rows.reading.as_json_lines())
    if rows.misaligned:
        watch.note(
            f"In {rows.misaligned:,} rows a token straddles the border of prompt and answer: the model never "
            "learns how such an answer begins, and answers from other tokens than it was trained on. "
            "Mostly a blank at the end of the prompt is to blame; move it to the answer's beginning."
        )


def _manifest(config: Config, rows: Prepared) -> dict[str, Any]:
    """What the run is made from."""
    files = row_files([*config.data.train, *(config.data.eval or ())])
    facts = {
        "method": config.method,
        "template": rows.template,
        **rows.fingerprint.as_dict(),
        "kernels": [choice._asdict() for choice in backends.describe()],
    }
    return manifest(__version__, config.seed, Path(config.model), files, facts)


def _draw(metrics: Path, folder: RunFolder, watch: Watch) -> None:
    """Draw the loss curve, or say what is missing for it: a finished run is not lost for a picture."""
    try:
        loss_curve(metrics, folder / "loss")
    except EvaluateError as error:
        if error.code != "HB606":
            raise
        watch.note(f"No loss curve: {error.what}. To do: {error.fix}")


def _setting(config: Config, rows: Prepared, size: ModelSize) -> Setting:
    """What was run, for the summary."""
    return Setting(
        model=config.model,
        method=config.method,
        template=rows.template,
        weights=weights_name(config),
        scales=config.quantization.scales if config.method == "qlora" else None,
        trainable_parameters=size.trainable,
        parameters=size.total,
        weight_bytes=size.nbytes,
        train_rows=len(rows.train.examples),
        held_out_rows=len(rows.held_out.examples),
        truncated_rows=rows.truncated,
        misaligned_rows=rows.misaligned,
        skipped_rows=len(rows.reading.skipped),
    )
