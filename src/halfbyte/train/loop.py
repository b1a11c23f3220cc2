"""The training loop: from examples to trained weights, with a record of every step.

It owns the order of things during training; it must not know rows, model folders, evaluation or the command
line.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from halfbyte.data.order import Packed, Pass, Position, Usage, steps
from halfbyte.data.pack import collate, pack
from halfbyte.errors import TrainError
from halfbyte.model.heads import Objective
from halfbyte.model.isolation import prove_isolation
from halfbyte.model.mode import trained
from halfbyte.system import give_back_freed_memory
from halfbyte.train.checkpoint import (
    Checkpoint,
    TrainerState,
    checkpoint_folder,
    last_good,
    prune,
    read_checkpoint,
    write_checkpoint,
)
from halfbyte.train.display import Display, Shown, Silent
from halfbyte.train.interrupt import CtrlC, TrainInterrupted
from halfbyte.train.memory import Tidy
from halfbyte.train.metrics import MetricsFile, StepRecord, peak_rss_bytes
from halfbyte.train.neftune import embedding_noise
from halfbyte.train.noise import NoiseMeter
from halfbyte.train.optimizer import (
    build_optimizer,
    clip_gradients,
    set_learning_rate,
    trainable_parameters,
)
from halfbyte.train.paging import PageFile
from halfbyte.train.plan import Plan, unit_lengths
from halfbyte.train.schedule import learning_rate_factor
from halfbyte.train.state import capture, random_state, restore
from halfbyte.train.step import BatchLoss, RowNames, StepLoss, TokenLoss, accumulate
from halfbyte.train.trial import Trial, try_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from halfbyte.data.examples import ExampleSet, Learnable
    from halfbyte.data.pack import Batch
    from halfbyte.settings import TrainConfig


@dataclass(frozen=True)
class TrainRun:
    """Where a training run writes, and what it is given besides model, examples and settings.

    Args:
        folder: Gets metrics.jsonl and checkpoints/.
        save: Writes the trained weights into the folder it is given (an adapter, or a whole model).
        seed: Decides the order of rows and dropout; the same seed gives the same weights, bit by bit.
        pad_id: Token id to fill short rows with; it is masked, so any id will do.
        collate: Makes the batch of some examples; None packs or pads them, as the settings have it.
        autocast: Computing dtype of the forward pass where it differs from the weights', else None.
        display: Shows progress.
        resume: Checkpoint to go on from; None begins.
        held_out_loss: Measures the loss of held-out rows, nats per trained token; None where there are none.
        loss: What is minimised; None means the loss of tokens, as the settings have it.
        is_proven: Whether `prove_isolation` was just passed by this very model.
        tried: Told what the trial on the largest batch took.
    """

    folder: Path
    save: Callable[[Path], None]
    seed: int = 0
    pad_id: int = 0
    collate: Callable[[Sequence[Any]], Batch] | None = None
    autocast: torch.dtype | None = None
    display: Display = field(default_factory=Silent)
    resume: Checkpoint | None = None
    held_out_loss: Callable[[], float] | None = None
    loss: StepLoss | None = None
    is_proven: bool = False
    tried: Callable[[Trial], None] = lambda _: None


@dataclass(frozen=True)
class TrainResult:
    """What training did.

    Args:
        steps: Optimizer steps done.
        epochs: Passes over the data, fractional.
        first_loss: Loss of the first step, before any update, nats per trained token.
        last_loss: Loss of the last step, before its update.
        tokens: Tokens seen, without padding.
        trained_tokens: Tokens that carried loss.
        best_step: Step after which the held-out loss was lowest; None where it was not measured while training.
        best_loss: That loss.
        usage: How full the passes were.
        seconds: Wall time.
        tokens_per_s: `tokens` by `seconds`.
        peak_rss_bytes: Largest resident memory of the process so far; None where the system does not say.
        metrics: The metrics.jsonl file.
    """

    steps: int
    epochs: float
    first_loss: float
    last_loss: float
    tokens: int
    trained_tokens: int
    best_step: int | None
    best_loss: float | None
    usage: Usage
    seconds: float
    tokens_per_s: float
    peak_rss_bytes: int | None
    metrics: Path


def train(
    model: PreTrainedModel, examples: ExampleSet[Learnable], config: TrainConfig, run: TrainRun
) -> TrainResult:
    """Train the model's trainable parameters on the examples, in place.

    Ctrl-C finishes the micro-batch at hand, drops its unfinished step and saves a checkpoint.

    Args:
        model: Causal language model with float32 trainable parameters.
        examples: Each with something to learn; those that the loss judges together stand next to each other.
        config: Settings of the training.
        run: Where to write, seed, display.

    Returns:
        What was done; the metrics of every step are in the file it names.

    Raises:
        ModelError: HB317 where rows are to be packed and the model cannot keep them apart.
        TrainError: HB501 or HB502 at the first loss or gradient that is not finite, with the weights of the
            step before saved; HB504, HB505 for what cannot be trained; HB511 for a checkpoint of another run.
            HB513 where memory does not suffice for the largest batch, which is tried before the first step; HB514
            and HB515 where the disk does not hold the optimizer's pages.
        TrainInterrupted: HB503 after Ctrl-C.
    """
    loop = _Loop(model, config, run, examples)
    with (
        trained(model),
        CtrlC() as ctrl_c,
        MetricsFile(run.folder / "metrics.jsonl", after=loop.done) as metrics,
        loop.noise,
        Shown(run.display, loop.plan.total_steps) as display,
    ):
        run.tried(loop.try_largest())
        for step in loop.steps():
            record = loop.measured(loop.step(step, ctrl_c))
            metrics.write(record)
            display.step(record)
            loop.keep()
            if loop.should_stop:
                break
        if config.keep == "best":
            loop.go_back_to_best()
    give_back_freed_memory()
    return loop.result()


def rehearse(
    model: PreTrainedModel, examples: ExampleSet[Learnable], config: TrainConfig, run: TrainRun
) -> Trial:
    """Do what `train` does before its first step, and time the largest batch; nothing is written or changed.

    Args:
        model: As for `train`.
        examples: As for `train`.
        config: As for `train`.
        run: As for `train`.

    Returns:
        What a step on the largest batch takes, when it is not the first.

    Raises:
        ModelError: HB317.
        TrainError: HB504, HB505, HB513, HB514.
    """
    loop = _Loop(model, config, run, examples)
    with trained(model):
        loop.try_largest()
        return loop.try_largest()


@dataclass(frozen=True)
class _Step:
    """The data of one optimizer step: its micro-batches, their room in tokens, and the position after it."""

    batches: list[Batch]
    room: int
    after: Position


class _Loop:
    """The state of one run between steps: the optimizer, random generators, counters and clock."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: TrainConfig,
        run: TrainRun,
        examples: ExampleSet[Learnable],
    ) -> None:
        self.model, self.config, self.run, self.examples = model, config, run, examples
        self.loss: StepLoss = run.loss or TokenLoss(Objective(config.label_smoothing, config.z_loss))
        self.plan = plan = Plan.of(unit_lengths(examples, self.loss.members), config, run.seed)
        if config.packing and not run.is_proven:
            prove_isolation(model)
        self.rows = RowNames(examples)
        self.collate: Callable[[Sequence[Any]], Batch] = run.collate or (
            pack if config.packing else partial(collate, pad_id=run.pad_id)
        )
        self.optimizer = build_optimizer(model, config, partial(PageFile, run.folder))
        self.noise = NoiseMeter(trainable_parameters(model).values(), config.gradient_accumulation_steps)
        self.state = TrainerState.beginning(plan.total_steps, run.seed, examples.sha256)
        torch.manual_seed(run.seed)
        if run.resume is not None:
            self._go_on_from(run.resume)
        self.tidy = Tidy()
        self.random = random_state()
        self.began = time.perf_counter() - self.state.seconds

    def _go_on_from(self, checkpoint: Checkpoint) -> None:
        checkpoint.refuse_other_run(self.state)
        restore(checkpoint.tensors, trainable_parameters(self.model), self.optimizer)
        self.state = checkpoint.state

    @property
    def done(self) -> int:
        """Optimizer steps done."""
        return self.state.step

    def steps(self) -> Iterator[_Step]:
        """The data of each optimizer step that is left, over as many epochs as it takes."""
        per_step, order = self.config.gradient_accumulation_steps, self.plan.order
        left = self.plan.total_steps - self.done
        for passes, after in itertools.islice(steps(order, per_step, self.state.position), left):
            yield _Step(list(map(self.batch, passes)), sum(map(order.room, passes)), after)

    def batch(self, units: Pass) -> Batch:
        """The batch of some units."""
        each = self.loss.members
        return self.collate([self.examples[each * unit + k] for unit in units for k in range(each)])

    def try_largest(self) -> Trial:
        """A step on the largest batch there can be, without a trace."""
        batch = self.batch(self.plan.order.largest)
        return try_step(self.model, batch, self.config, self.loss, self.run.autocast)

    def step(self, step: _Step, ctrl_c: CtrlC) -> StepRecord:
        """One optimizer step; the weights change only if all of it went well."""
        step_began = time.perf_counter()
        config, plan = self.config, self.plan
        lr = config.learning_rate * learning_rate_factor(self.done, plan.total_steps, plan.warmup, config)
        try:
            loss, grad_norm = self._gradient(step.batches, ctrl_c)
        except TrainInterrupted:
            raise
        except TrainError as error:
            kept = (
                f"; the weights after step {self.done} are in {self.checkpoint('stopped')}"
                if self.done
                else ""
            )
            raise self._stopped(error, kept) from error
        set_learning_rate(self.optimizer, lr)
        try:
            self.optimizer.step()
        except TrainError as error:  # some weights have moved already, so that only a checkpoint is good
            good = last_good(self.run.folder).checkpoint
            kept = f"; the last good checkpoint is {good.folder}" if good else "; there is no checkpoint yet"
            raise self._stopped(error, kept) from error
        self.optimizer.zero_grad(set_to_none=True)
        self.tidy.after_step()
        return self._note(step, loss, grad_norm, lr, time.perf_counter() - step_began)

    def _stopped(self, error: TrainError, kept: str) -> TrainError:
        """The error, with the step it ended and what is left of the run."""
        where = f"step {self.done + 1} of {self.plan.total_steps}, {error.where}"
        return TrainError(error.code, error.what, where=where, fix=error.fix + kept)

    def _gradient(self, micro_batches: list[Batch], ctrl_c: CtrlC) -> tuple[BatchLoss, float]:
        """The step's loss and clipped gradient norm, the gradient left in the parameters."""
        divisor = self.loss.divisor(micro_batches, self.rows)
        device = next(self.model.parameters()).device.type
        shares = []
        self.noise.begin()
        for number, batch in enumerate(micro_batches):
            draw = (self.run.seed, self.done, number)
            noise = embedding_noise(self.model, self.config.neftune_alpha, batch, draw)
            with noise, torch.autocast(device, self.run.autocast) if self.run.autocast else nullcontext():
                shares.append(accumulate(self.model, batch, divisor, self.rows, self.loss))
            if shares[-1].objective:  # there is none without a trained token
                self.noise.passed(self.loss.divisor([batch], self.rows) / divisor)
            if ctrl_c.requested:
                self._stop()
        loss = BatchLoss.total(shares)
        norm = clip_gradients(self.optimizer, self.config.max_grad_norm)
        if not math.isfinite(norm):
            raise TrainError(
                "HB502",
                f"the gradient's norm is {norm} at a loss of {loss.objective:.4f}",
                where=f"rows {self.rows.of(micro_batches)}",
                fix="lower train.learning_rate, or compute in float32 (dtype: float32)",
            )
        return loss, norm

    def _stop(self) -> None:
        """Save what the finished steps made and leave."""
        saved = self.checkpoint("interrupted")
        raise TrainInterrupted(
            "HB503",
            f"stopped by Ctrl-C after {self.done} of {self.plan.total_steps} steps",
            where=str(saved),
            fix="everything so far is saved there; go on with the same command and --resume",
        )

    def _note(self, step: _Step, loss: BatchLoss, grad_norm: float, lr: float, step_s: float) -> StepRecord:
        """Count a finished step."""
        before = self.state
        tokens = sum(batch.tokens for batch in step.batches)
        trained = sum(batch.trained_tokens for batch in step.batches)
        documents = sum(len(batch.documents) for batch in step.batches)
        self.random = random_state()
        self.state = replace(
            before,
            step=before.step + 1,
            first_loss=loss.loss if before.first_loss is None else before.first_loss,
            loss=loss.loss,
            epoch=(before.documents + documents) / len(self.examples),
            tokens=before.tokens + tokens,
            trained_tokens=before.trained_tokens + trained,
            documents=before.documents + documents,
            passes=before.passes + len(step.batches),
            room=before.room + step.room,
            seconds=time.perf_counter() - self.began,
            position=step.after,
        )
        return StepRecord(
            step=self.state.step,
            epoch=self.state.epoch,
            loss=loss.loss,
            lr=lr,
            grad_norm=grad_norm,
            trained_tokens=trained,
            tokens=tokens,
            documents=documents,
            fill=tokens / step.room,
            tokens_per_s=tokens / step_s,
            seconds=self.state.seconds,
            peak_rss_bytes=peak_rss_bytes(),
            objective=None if self.loss == TokenLoss() or loss.rewards else loss.objective,
            **{f"reward_{name}": value for name, value in loss.rewards._asdict().items()}
            if loss.rewards
            else {},
            **noise._asdict() if (noise := self.noise.of_step(grad_norm)) else {},
        )

    def measured(self, record: StepRecord) -> StepRecord:
        """The record with the held-out loss, where it is due."""
        every, measure = self.config.eval_steps, self.run.held_out_loss
        if every is None or measure is None or (self.done % every and self.done != self.plan.total_steps):
            return record
        loss, best = measure(), self.state.best_loss
        if best is None or loss < best:
            self.state = replace(self.state, best_step=self.done, best_loss=loss, not_better=0)
        else:
            self.state = replace(self.state, not_better=self.state.not_better + 1)
        self.random = random_state()
        return replace(record, held_out_loss=loss)

    def keep(self) -> None:
        """Write the checkpoints that are due after a step."""
        if self.config.keep == "best" and self.state.best_step == self.done:
            self.checkpoint("best")
        every = self.config.save_steps
        if every and self.done % every == 0 and self.done < self.plan.total_steps:
            self.checkpoint("save_steps")

    @property
    def should_stop(self) -> bool:
        """Whether the held-out loss has not become lower for as long as the settings allow."""
        patience = self.config.early_stopping_patience
        return patience is not None and self.state.not_better >= patience

    def go_back_to_best(self) -> None:
        """Put the weights of the lowest held-out loss into the model."""
        assert self.state.best_step is not None, "settings that keep the best measure the last step"
        if self.state.best_step != self.done:
            best = read_checkpoint(checkpoint_folder(self.run.folder, self.state.best_step))
            restore(best.tensors, trainable_parameters(self.model), self.optimizer)

    def checkpoint(self, reason: str) -> Path:
        """Save all that going on takes, as it stands after the last finished step."""
        folder = checkpoint_folder(self.run.folder, self.done)
        if folder.exists():  # save_steps just wrote this very state
            return folder
        tensors = capture(trainable_parameters(self.model), self.optimizer, self.random)
        write_checkpoint(folder, self.run.save, replace(self.state, reason=reason), tensors)
        if self.config.save_total_limit is not None:
            best = self.state.best_step if self.config.keep == "best" else None
            prune(self.run.folder, self.config.save_total_limit, best)
        return folder

    def result(self) -> TrainResult:
        """The sums of the run."""
        state = self.state
        assert state.first_loss is not None, "a plan has at least one step"
        assert state.loss is not None
        return TrainResult(
            steps=state.step,
            epochs=state.epoch,
            first_loss=state.first_loss,
            last_loss=state.loss,
            tokens=state.tokens,
            trained_tokens=state.trained_tokens,
            best_step=state.best_step,
            best_loss=state.best_loss,
            usage=Usage(
                state.passes,
                state.documents / state.passes,
                self.plan.order.batch_tokens if isinstance(self.plan.order, Packed) else None,
                state.tokens / state.room,
            ),
            seconds=state.seconds,
            tokens_per_s=state.tokens / state.seconds,
            peak_rss_bytes=peak_rss_bytes(),
            metrics=self.run.folder / "metrics.jsonl",
        )
