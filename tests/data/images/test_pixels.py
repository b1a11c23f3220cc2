"""Promises of the pixels: bit by bit what transformers' own processors make, and no step left out without a word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from transformers.image_utils import load_image
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from halfbyte.data.images.decode import decode
from halfbyte.data.images.pixels import FILE, Preprocessor, grey
from halfbyte.errors import DataError

PROCESSORS = {"ViT": ViTImageProcessorPil, "DeiT": DeiTImageProcessorPil}
Written = Callable[..., Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Writes a preprocessor_config.json into a folder."""

    def write(**settings: Any) -> Path:
        (tmp_path / FILE).write_text(json.dumps(settings))
        return tmp_path

    return write


def photo(height: int, width: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("ViT", {}),
        ("ViT", {"size": {"height": 17, "width": 31}}),
        (
            "ViT",
            {
                "size": 32,
                "resample": 3,
                "image_mean": [0.485, 0.456, 0.406],
                "image_std": [0.229, 0.224, 0.225],
            },
        ),
        ("ViT", {"size": 32, "resample": 0}),
        ("ViT", {"size": 32, "resample": 1}),
        ("ViT", {"size": 32, "do_normalize": False}),
        ("ViT", {"size": 32, "do_rescale": False}),
        ("ViT", {"size": 32, "rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}),
        ("ViT", {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 24, "width": 80}}),
        ("DeiT", {}),
        ("DeiT", {"size": 40, "crop_size": 33}),
        ("DeiT", {"size": 33, "crop_size": {"height": 40, "width": 31}}),
    ],
)
def test_every_pixel_is_the_one_transformers_makes(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    oracle = PROCESSORS[family](**settings)
    oracle.save_pretrained(tmp_path)
    ours = Preprocessor.read(tmp_path, 3)
    for height, width in ((37, 53), (300, 41), (32, 32), (1, 1)):
        pixels = photo(height, width)
        expected = np.asarray(oracle(PIL.Image.fromarray(pixels))["pixel_values"][0], np.float32)
        found = ours(pixels)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
        assert ours.size is None or found.shape[1:] == ours.size


def test_grey_models_get_what_transformers_makes_of_a_grey_image(written: Written) -> None:
    settings = {"size": {"height": 9, "width": 9}, "image_mean": [0.1307], "image_std": [0.3081]}
    grey_pixels = photo(28, 28)[:, :, 0]
    oracle = ViTImageProcessorPil(**settings)
    expected = oracle(PIL.Image.fromarray(grey_pixels), input_data_format="channels_first")["pixel_values"][0]
    ours = Preprocessor.read(written(image_processor_type="ViTImageProcessor", **settings), 1)
    np.testing.assert_array_equal(ours(np.repeat(grey_pixels[:, :, None], 3, axis=2)), expected)


def test_colours_become_grey_as_pillow_makes_them() -> None:
    pixels = photo(64, 65)
    np.testing.assert_array_equal(grey(pixels), np.asarray(PIL.Image.fromarray(pixels).convert("L")))
    same = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    np.testing.assert_array_equal(grey(same)[0], np.arange(256))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK"])
def test_files_are_decoded_as_transformers_loads_them(mode: str, tmp_path: Path) -> None:
    suffix = "jpg" if mode == "CMYK" else "png"
    file = tmp_path / f"image.{suffix}"
    image = PIL.Image.fromarray(photo(21, 34)).convert(mode)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(file, exif=exif)
    expected = np.asarray(load_image(str(file)))
    assert expected.shape == (34, 21, 3)
    np.testing.assert_array_equal(decode(file), expected)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor"),
        ({"do_pad": True}, "do_pad"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order"),
        ({"size": {"shortest_edge": 224}}, "shortest_edge"),
        ({"size": 0}, "size is 0"),
        ({"size": "224"}, "size is '224'"),
        ({"resample": 9}, "resample is 9"),
        ({"do_resize": "yes"}, "do_resize is 'yes'"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std"),
        ({"rescale_factor": None}, "rescale_factor"),
    ],
)
def test_a_step_that_is_not_done_here_is_refused(
    settings: dict[str, Any], named: str, written: Written
) -> None:
    with pytest.raises(DataError, match=f"HB240.*{named}"):
        Preprocessor.read(written(**settings), 3)


def test_settings_that_do_nothing_are_no_fault(written: Written) -> None:
    folder = written(feature_extractor_type="ViTFeatureExtractor", do_pad=False, crop_pct=None, size=12)
    assert Preprocessor.read(folder, 3).size == (12, 12)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_folder_without_a_processor_is_refused(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / FILE).write_text(text)
    with pytest.raises(DataError, match="HB240"):
        Preprocessor.read(tmp_path, 3)


def test_the_digest_tells_every_difference(written: Written) -> None:
    digests = {
        Preprocessor.read(written(**settings), 3).digest
        for settings in ({}, {"size": 32}, {"resample": 3}, {"do_normalize": False}, {"rescale_factor": 0.5})
    }
    assert len(digests) == 5
    assert Preprocessor.read(written(size={"height": 224, "width": 224}), 3).digest in digests
