"""Silent failures of resized vocabularies (13 in the project's list), each planted, and seen; PEFT is the judge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import halfbyte as hb
from halfbyte.config import load_config
from halfbyte.errors import DataError, ModelError
from halfbyte.pipeline import run

Shared = Callable[[str], Path]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

NEW = ("<note>", "</note>", "<cite>")
LOGIT_TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def small(shared: Shared, tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    shutil.copytree(shared("models/stories260K-hf"), folder)
    return folder


def with_new_tokens(folder: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.add_tokens([AddedToken(token, special=True) for token in NEW]) == len(NEW)
    return tokenizer


def dense(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def resized(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(0)
    model.resize_token_embeddings(model.config.vocab_size + len(NEW), mean_resizing=False)
    return model


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[1, 40, 512, 77, 514, 513, 9]])
    with torch.no_grad():
        out: torch.Tensor = model.eval()(ids).logits
    return out


def settings(folder: Path, tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": f"<note>{i}</note> says", "completion": f" <cite> {i}"} for i in range(24)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {
        "model": str(folder),
        "output_dir": str(tmp_path / "run"),
        "dtype": "float32",
        "method": "lora",
        "lora": {"r": 2, "modules_to_save": ["embed_tokens"]},
        "data": {"train": str(file), "eval_fraction": 0.25},
        "train": {"max_steps": 2, "learning_rate": 1e-2},
    }


def test_hostile_13_tokens_that_only_the_tokenizer_has_stop_the_run(small: Path, tmp_path: Path) -> None:
    with_new_tokens(small).save_pretrained(small)
    with pytest.raises(DataError, match=r"HB213[\s\S]*512[\s\S]*a folder of the model that was resized"):
        run(load_config(None, (), settings(small, tmp_path)), evaluate=False)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_hostile_13_a_model_resized_in_memory_takes_and_saves_no_adapter(
    small: Path, tmp_path: Path, quantization: Any
) -> None:
    model = resized(hb.load(small, quantization=quantization, dtype="float32"))
    with pytest.raises(ModelError, match=r"HB347 .*515 tokens, its folder 512[\s\S]*modules_to_save"):
        hb.add_lora(model)
    model = hb.load(small, quantization=quantization, dtype="float32")
    hb.add_lora(model)
    resized(model)
    with pytest.raises(ModelError, match="HB347 "):
        hb.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_hostile_13_without_the_refusal_another_model_would_answer(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault elsewhere: the adapter loads without a word, on embeddings that are random again."""
    for place in ("lora", "adapters"):
        monkeypatch.setattr(f"halfbyte.model.{place}.refuse_resized", lambda model: None)
    model = resized(hb.load(small, dtype="float32"))
    hb.add_lora(model)
    hb.save_adapter(model, tmp_path / "adapter")
    torch.manual_seed(1)
    theirs = dense(small)
    theirs.resize_token_embeddings(515, mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    assert (logits(theirs) - logits(model)).abs().max() > 10 * LOGIT_TOLERANCE


def test_hostile_13_a_resized_folder_is_tuned_and_loads_in_peft(small: Path, tmp_path: Path) -> None:
    """The remedy that the errors name."""
    larger = tmp_path / "larger"
    resized(dense(small)).save_pretrained(larger)
    with_new_tokens(small).save_pretrained(larger)
    run(load_config(None, (), settings(larger, tmp_path)), evaluate=False)
    adapter = Path(settings(larger, tmp_path)["output_dir"]) / "adapter"
    ours = hb.load(larger, dtype="float32", adapter=adapter)
    theirs = peft.PeftModel.from_pretrained(dense(larger), adapter)
    assert (logits(theirs) - logits(ours)).abs().max() <= LOGIT_TOLERANCE
    assert (logits(dense(larger)) - logits(ours)).abs().max() > 10 * LOGIT_TOLERANCE


def test_hostile_13_an_adapter_that_peft_saved_of_a_resized_model_is_refused(
    small: Path, tmp_path: Path
) -> None:
    theirs = peft.get_peft_model(
        resized(dense(small)), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    )
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(ModelError, match=r"HB347 .*embed_tokens"):
        hb.load(small, dtype="float32", adapter=tmp_path / "adapter")
