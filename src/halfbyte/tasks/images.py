"""Classification of images: to tell what one shows.

It owns how labelled images become batches, a loss and metrics; it must not know how a step is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from halfbyte.data.check import check_overlap, split_rows
from halfbyte.data.examples import Listed
from halfbyte.data.faults import Reading
from halfbyte.data.fingerprint import Fingerprint
from halfbyte.data.images.batch import ImageCollator, ImageExample
from halfbyte.data.images.idx import IMAGES, labels_file
from halfbyte.data.images.pixels import FILE, Kept, Preprocessor
from halfbyte.data.images.read import ImageReport, read_images, refuse_two_labels
from halfbyte.data.labels import label_names, refuse_unknown, train_labels
from halfbyte.evaluate.classes import Answered, measured_classes
from halfbyte.evaluate.measure import Measurement
from halfbyte.model.adapters import load_adapter
from halfbyte.model.encoders import document_logits
from halfbyte.model.files import open_model_folder
from halfbyte.model.heads import Objective
from halfbyte.model.mode import measured
from halfbyte.model.precision import computing_dtype
from halfbyte.model.purpose import Head, stored_labels
from halfbyte.model.skeleton import build_skeleton
from halfbyte.model.vision import Sight
from halfbyte.tasks.task import Prepared, Progress, Task
from halfbyte.train.labelled import LabelLoss
from halfbyte.train.methods import load_base, saver

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from halfbyte.data.images.row import ImageRow
    from halfbyte.settings import Config


class ImagesTask(Task[ImageExample]):
    """A vision transformer with a class for each label.

    Images lie side by side in a batch, all of one size, so that nothing is packed or padded.

    Args:
        config: Settings of the run.
        rows: Its images.
        preprocess: How pixels become the model's input.
        labels: Names of the classes, in the order of their numbers.
    """

    def __init__(
        self,
        config: Config,
        rows: Prepared[ImageExample],
        preprocess: Preprocessor,
        labels: tuple[str, ...],
    ) -> None:
        side_by_side = config.train.model_copy(update={"packing": False})
        super().__init__(config.model_copy(update={"train": side_by_side}), rows)
        self.preprocess, self.labels = preprocess, labels
        self.collate: Callable[[Sequence[ImageExample]], Any] = ImageCollator(preprocess)

    @classmethod
    def prepare(
        cls, config: Config, *, held_out_only: bool = False, progress: Progress | None = None
    ) -> Self:
        """Read every image once, check and share out, and number the labels as the base does where it has the same.

        Raises:
            DataError: HB203 to HB241, each naming every faulty image.
            ModelError: HB360 or HB361 for a model that is not shown such images.
        """
        folder = open_model_folder(config.model)
        head = Head("classify_images")
        sight = Sight.of(build_skeleton(folder, computing_dtype(config.dtype), head))
        preprocess = Preprocessor.read(folder.path, sight.channels)
        sight.check(preprocess, folder.path)
        reading = Reading(config.data.skip_bad_rows)
        read = partial(read_images, reading=reading, progress=progress)
        train, held_out = _sides(config, read, reading, held_out_only)
        if held_out_only:
            labels = label_names(row.label for row in held_out)
        else:
            labels = train_labels(train)
            refuse_unknown(held_out, labels)
            known = stored_labels(folder.path)
            labels = known if set(known) == set(labels) else labels
        to_train, to_measure = (
            Listed([ImageExample(row, sight.tokens) for row in side]) for side in (train, held_out)
        )
        height, width = sight.size
        rows = Prepared(
            to_train,
            to_measure,
            ImageReport.of([*train, *held_out]),
            reading,
            f"{height} x {width} pixels",
            Fingerprint.of_pixels(preprocess),
        )
        return cls(config, rows, preprocess, labels)

    def head(self, seed: int | None) -> Head:
        """What stands on the model; with a seed it may begin anew."""
        return Head("classify_images", self.labels, seed)

    @property
    def trained_head(self) -> Head:
        """What stands on the model, which may begin anew."""
        return self.head(self.config.seed)

    def skeleton(self) -> PreTrainedModel:
        """The model with weights that take no memory."""
        folder, dtype = open_model_folder(self.config.model), computing_dtype(self.config.dtype)
        return build_skeleton(folder, dtype, self.head(None))

    def load(self, progress: Progress | None = None) -> PreTrainedModel:
        """The model as its method holds it, with the folder's head for these labels, or a new one."""
        return load_base(self.config, progress, self.head(self.config.seed))

    def load_trained(self, adapter: Path | None, progress: Progress | None = None) -> PreTrainedModel:
        """The model with the head that was trained, for the labels it was trained with.

        Raises:
            DataError: HB232 naming every image whose label was never trained on.
            ModelError: HB351 where neither adapter nor folder holds a trained head.
        """
        if trained := stored_labels(adapter or Path(self.config.model)):
            refuse_unknown(list(self.rows.held_out), trained)
            self.labels = trained
        base = load_base(self.config, progress, self.head(self.config.seed if adapter else None))
        if adapter is not None:
            load_adapter(base, adapter)
        return base

    def check_fit(self, model: PreTrainedModel) -> None:
        """Refuse images that the model is not shown: HB361."""
        Sight.of(model).check(self.preprocess, Path(self.config.model))

    @cached_property
    def loss(self) -> LabelLoss:
        """Cross-entropy of the classes."""
        train = self.config.train
        return LabelLoss(self._numbers(), Objective(train.label_smoothing, train.z_loss))

    def measure(self, model: PreTrainedModel, progress: Progress | None = None) -> Measurement:
        """Accuracy, macro-F1, Matthews' correlation and loss; nothing without held-out images."""
        if not len(self.rows.held_out):
            return Measurement(())
        resamples, seed = self.config.evaluate.bootstrap, self.config.seed
        return measured_classes(self._answered(model, progress), self.labels, resamples=resamples, seed=seed)

    def held_out_loss(self, model: PreTrainedModel) -> float:
        """Nats per image."""
        return self._answered(model).loss

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write the adapter with its head, or model and image processor, with the fingerprint of its steps."""
        assert self.rows.fingerprint is not None, "images are prepared for a model"
        kept = Kept((Path(self.config.model) / FILE).read_text(encoding="utf-8"))
        saver(model, kept, self.config, self.rows.fingerprint)(folder)

    def titles(self, example: ImageExample) -> tuple[str, ...]:
        """Its label."""
        return (f"label {example.label}",)

    def form(self) -> str:
        """Size and labels of the images."""
        counts = self.rows.report.labels
        return f"{self.rows.template}; labels {', '.join(f'{name} {n:,}' for name, n in counts.items())}"

    def facts(self) -> dict[str, int | str]:
        """What a rehearsal prints."""
        words = ("template", "truncated_rows", "misaligned_rows")
        own = {name: fact for name, fact in super().facts().items() if name not in words}
        return own | {"image": self.rows.template, "labels": ", ".join(self.labels)}

    def files(self) -> list[Path]:
        """The files that name or hold many images; single images are told by the digest of the rows."""
        data = self.config.data
        found = []
        for place in map(Path, [*data.train, *(data.eval or ())]):
            inside = sorted(place.iterdir()) if place.is_dir() else [place]
            for file in inside:
                if IMAGES.fullmatch(file.name):
                    found += [file, labels_file(file)]
                elif not place.is_dir():
                    found.append(file)
        return found

    def _numbers(self) -> dict[str, int]:
        """Number of each image's class, by the row's id."""
        number = {label: at for at, label in enumerate(self.labels)}
        return {e.id: number[e.label] for side in (self.rows.train, self.rows.held_out) for e in side}

    def _answered(self, model: PreTrainedModel, progress: Progress | None = None) -> Answered:
        """What a model takes the distinct held-out images for."""
        first: dict[str, ImageExample] = {}
        for example in self.rows.held_out:
            first.setdefault(example.id, example)
        rows, size = list(first.values()), self.config.evaluate.batch_size

        def parts() -> Iterator[tuple[Sequence[ImageExample], NDArray[np.float64]]]:
            for begin in range(0, len(rows), size):
                part = rows[begin : begin + size]
                logits = document_logits(model, self.collate(part))
                yield part, torch.log_softmax(logits.double(), dim=1).cpu().numpy()
                if progress is not None:
                    progress(begin + len(part), len(rows))

        with measured(model):
            return Answered.of(parts(), self._numbers())


def _sides(
    config: Config, read: Callable[[list[str]], list[ImageRow]], reading: Reading, held_out_only: bool
) -> tuple[list[ImageRow], list[ImageRow]]:
    """The images to train on and those held out, none with another image's pixels and another label."""
    data = config.data
    if held_out_only:
        return [], refuse_two_labels(read(data.eval or data.train), reading)
    if data.eval:
        train, held_out = read(data.train), read(data.eval)
        single = {row.content for row in refuse_two_labels([*train, *held_out], reading)}
        train, held_out = ([row for row in side if row.content in single] for side in (train, held_out))
        check_overlap(train, held_out)
        return train, held_out
    return split_rows(refuse_two_labels(read(data.train), reading), data.eval_fraction, config.seed)
