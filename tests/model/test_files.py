"""Promises of opening a model folder: what is unsafe or damaged is refused by name before anything is built."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from halfbyte.errors import ModelError
from halfbyte.model.files import open_model_folder

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a config and no weights yet."""
    home = tmp_path / "model"
    home.mkdir()
    write_json(home / "config.json", CONFIG)
    return home


def write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value))


def write_weights(file: Path, *names: str) -> None:
    save_file({name: torch.ones(2, 2) for name in names}, file)


def write_shards(folder: Path, weight_map: object) -> None:
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    write_weights(folder / "one.safetensors", "a", "b")
    write_weights(folder / "two.safetensors", "c", "unlisted")


def refused(folder: Path, code: str, named: str) -> None:
    with pytest.raises(ModelError) as caught:
        open_model_folder(folder)
    assert caught.value.code == code
    assert named in caught.value.what
    assert caught.value.where
    assert caught.value.fix


def test_whole_and_sharded_weights_are_listed(folder: Path) -> None:
    write_shards(folder, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    opened = open_model_folder(folder)
    assert list(opened.tensors) == ["a", "b", "c"]
    assert opened.config == CONFIG
    write_weights(folder / "model.safetensors", "whole")
    assert list(open_model_folder(folder).tensors) == ["whole"]


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "HB301", "no such folder")


def test_a_file_instead_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "HB301", "no such folder")


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    write_weights(tmp_path / "model.safetensors", "a")
    refused(tmp_path, "HB301", "no config.json")


def test_an_adapter_given_as_a_model_is_called_one(tmp_path: Path) -> None:
    write_json(tmp_path / "adapter_config.json", {})
    refused(tmp_path, "HB301", "an adapter")


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"", b"[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    refused(folder, "HB301", "JSON" if content != b"[1]" else "list")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", CONFIG | {"auto_map": {"AutoModel": "evil.Model"}}),
        ("config.json", CONFIG | {"text_config": {"deep": [{"auto_map": {"AutoConfig": "evil.Config"}}]}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}),
        ("generation_config.json", {"auto_map": "evil"}),
        ("processor_config.json", {"auto_map": {}}),
    ],
)
def test_code_of_the_folders_own_is_refused_wherever_it_is_named(
    folder: Path, file: str, content: dict[str, Any]
) -> None:
    write_weights(folder / "model.safetensors", "a")
    open_model_folder(folder)
    write_json(folder / file, content)
    refused(folder, "HB302", "auto_map")


def test_an_escaped_auto_map_is_seen_too(folder: Path) -> None:
    write_weights(folder / "model.safetensors", "a")
    (folder / "config.json").write_text('{"\\u0061uto_map": {"AutoModel": "evil.Model"}}')
    refused(folder, "HB302", "evil.Model")


class Canary:
    """Whoever unpickles it creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.pkl"])
def test_pickled_weights_are_refused_and_never_opened(folder: Path, tmp_path: Path, name: str) -> None:
    sprung = tmp_path / "sprung"
    (folder / name).write_bytes(pickle.dumps(Canary(sprung)))
    refused(folder, "HB303", name)
    assert not sprung.exists()
    pickle.loads((folder / name).read_bytes())
    assert sprung.exists(), "the canary does not sing, so the test shows nothing"


def test_pickled_weights_beside_safetensors_are_left_alone(folder: Path) -> None:
    write_weights(folder / "model.safetensors", "a")
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert list(open_model_folder(folder).tensors) == ["a"]


def test_an_index_of_pickled_shards_is_refused(folder: Path) -> None:
    write_shards(folder, {"a": "pytorch_model.bin"})
    refused(folder, "HB303", "pytorch_model.bin")


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    refused(folder, "HB306", "model.safetensors")


def test_a_missing_shard_is_named(folder: Path) -> None:
    write_shards(folder, {"a": "one.safetensors", "c": "two.safetensors"})
    (folder / "two.safetensors").unlink()
    refused(folder, "HB306", "two.safetensors")


def test_a_tensor_that_no_shard_holds_is_named(folder: Path) -> None:
    write_shards(folder, {"a": "one.safetensors", "gone": "two.safetensors"})
    refused(folder, "HB304", "gone")


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, "one.safetensors"])
def test_an_index_that_maps_no_names_to_files_is_refused(folder: Path, weight_map: object) -> None:
    write_shards(folder, weight_map)
    refused(folder, "HB304", "weight_map")


@pytest.mark.parametrize(
    "outside",
    [
        "../outside.safetensors",
        "sub/../../outside.safetensors",
        "{tmp}/outside.safetensors",
        "..\\outside.safetensors",
        "C:\\outside.safetensors",
        "link.safetensors",
        "linked_folder/outside.safetensors",
        "nul\0.safetensors",
    ],
)
def test_an_index_that_points_outside_its_folder_is_refused(
    folder: Path, tmp_path: Path, outside: str
) -> None:
    write_weights(tmp_path / "outside.safetensors", "a")
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (folder / "linked_folder").symlink_to(tmp_path)
    write_shards(folder, {"a": outside.format(tmp=tmp_path)})
    refused(folder, "HB305", "outside the folder")


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "config.json"])
def test_a_file_of_the_folder_that_links_outside_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / "outside"
    write_json(target, CONFIG)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    refused(folder, "HB305", name)


def test_links_that_stay_inside_are_followed(folder: Path) -> None:
    write_weights(folder / "real.safetensors", "a")
    (folder / "model.safetensors").symlink_to("real.safetensors")
    assert list(open_model_folder(folder).tensors) == ["a"]


def test_the_links_of_the_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    write_json(blobs / "1", CONFIG)
    write_weights(blobs / "2", "a")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    (snapshot / "model.safetensors").symlink_to("../../blobs/2")
    assert list(open_model_folder(snapshot).tensors) == ["a"]


def test_a_damaged_shard_is_refused_by_name(folder: Path) -> None:
    write_shards(folder, {"a": "one.safetensors"})
    shard = folder / "one.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(ModelError) as caught:
        open_model_folder(folder)
    assert caught.value.code == "HB307"
    assert caught.value.where == str(shard)
