"""Promises of LoRA's variants kept with the real PEFT: the same start, the same losses, files both ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from peft.utils.loftq_utils import loftq_init
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from halfbyte.errors import ModelError
from halfbyte.model.adapters import load_adapter, save_adapter
from halfbyte.model.beside import trained_modules
from halfbyte.model.loading import load
from halfbyte.model.lora import adapted_modules, adapters_disabled, add_lora
from halfbyte.model.lora_spec import LoraSpec
from halfbyte.quant.weight import QuantSpec
from halfbyte.settings import TrainConfig
from halfbyte.train.optimizer import build_optimizer

# PEFT asks transformers by an old name, and says of tied weights what the settings' documentation says here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning"),
]

Shared = Callable[[str], Path]

STEPS = 5

# Both sides compute the same formula in float32 in another order: a relative difference of 2⁻²⁴ for each of some 10³
# roundings between input and loss. Adam divides by the gradient's size, which carries it through the steps.
LOSS_TOLERANCE = 1e-4

# The same roundings on logits of the order of 1 to 10. A wrong scale, order or norm is off by more than 0.1.
LOGIT_TOLERANCE = 1e-4

# What training and random adapters must change at least, so that equality says something.
CLEARLY = 0.01

PATTERNS: dict[str, Any] = {
    "rank_pattern": {"k_proj": 2, r"layers\.0\.mlp\..*": 5, "model.layers.1.self_attn.q_proj": 3},
    "alpha_pattern": {"(up|down)_proj": 3.0, "v_proj": 20},
}
# Each variant in our words and in PEFT's.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dora": ({"dora": True}, {"use_dora": True}),
    "rslora": ({"rank_stabilised": True}, {"use_rslora": True}),
    "gaussian": ({"init": "gaussian"}, {"init_lora_weights": "gaussian"}),
    "pissa": ({"init": "pissa"}, {"init_lora_weights": "pissa"}),
    "patterns": (PATTERNS, PATTERNS),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]}),
    "dora, patterns, all modules": (
        {"dora": True, "rank_stabilised": True, **PATTERNS, "modules_to_save": ["embed_tokens", "norm"]},
        {"use_dora": True, "use_rslora": True, **PATTERNS, "modules_to_save": ["embed_tokens", "model.norm"]},
    ),
}
R, ALPHA = 4, 6


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def tiny(folder: Path) -> Path:
    """A random Llama, its weights large enough that its answers depend on what is read."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=101,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(50 if "embed" in name else 5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=["tiny", "models/base-11m"])
def folder(request: pytest.FixtureRequest, shared: Shared, tmp_path: Path) -> Path:
    return tiny(tmp_path / "tiny") if request.param == "tiny" else shared(request.param)


def reference(folder: Path) -> PreTrainedModel:
    """The 16-bit base as transformers loads it, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def theirs_of(folder: Path, settings: dict[str, Any], *, targets: Any = "all-linear") -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM", **settings)
    return peft.get_peft_model(reference(folder), config)


def ours_of(folder: Path, settings: dict[str, Any], **quantised: QuantSpec) -> PreTrainedModel:
    model = load(folder, quantization=quantised.get("quantization"), dtype=torch.float32)
    add_lora(model, LoraSpec(R, ALPHA, **settings), seed=0)
    return model


def tokens(model: Any, step: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(model.config.vocab_size, (2, 17), generator=generator)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(tokens(model)).logits
    return out


def off(got: Any, expected: Any) -> float:
    """Largest difference between two models' logits; NaN is as far as can be."""
    return float((logits(got) - logits(expected)).abs().max().nan_to_num(torch.inf))


def copy_start(theirs: Any, ours: PreTrainedModel) -> None:
    """Give our adapters the random values that PEFT's began with."""
    values = dict(theirs.named_parameters())
    for name, layer in adapted_modules(ours).items():
        for matrix, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            parameter.data.copy_(values[f"base_model.model.{name}.{matrix}.default.weight"])


def change(model: Any) -> None:
    """Move everything that trains to where an adapter changes every answer."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            size = float(parameter.detach().abs().mean()) or 0.1
            parameter.data += 0.5 * size * torch.randn(parameter.shape, generator=generator)


def train(model: Any, optimizer: torch.optim.Optimizer | None = None) -> list[float]:
    """The losses of a few steps of AdamW, or the optimizer given, each on other tokens."""
    model.train()
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(STEPS):
        ids = tokens(model, step % 2)
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("variant", VARIANTS)
def test_five_steps_have_peft_s_losses_and_lead_to_the_same_model(folder: Path, variant: str) -> None:
    ours_settings, their_settings = VARIANTS[variant]
    theirs, ours = theirs_of(folder, their_settings), ours_of(folder, ours_settings)
    if ours_settings.get("init") != "pissa":  # which has the same values by itself
        copy_start(theirs, ours)
    assert off(ours, theirs.eval()) <= LOGIT_TOLERANCE, "the starts differ"
    trained = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in theirs.parameters() if p.requires_grad)

    expected, got = train(theirs), train(ours)
    worst = max(abs(a - b) / b for a, b in zip(got, expected, strict=True))
    print(f"\n{variant}: losses {got[0]:.5f} to {got[-1]:.5f}, at most {worst:.1e} from PEFT's")
    assert expected[0] - expected[-1] > CLEARLY * expected[0], "nothing was learnt"
    assert worst <= LOSS_TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_loads_what_we_trained_on_the_original_folder(
    folder: Path, tmp_path: Path, variant: str
) -> None:
    ours = ours_of(folder, VARIANTS[variant][0])
    base = reference(folder)
    with adapters_disabled(ours):
        assert off(ours, base) <= LOGIT_TOLERANCE, "without its adapter it is not its base"
    change(ours)
    assert off(ours, base) > 10 * CLEARLY, "the adapter does nothing"
    save_adapter(ours, tmp_path / "adapter", base=str(folder))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert off(theirs, ours) <= LOGIT_TOLERANCE

    back = load(folder, quantization=None, dtype=torch.float32, adapter=tmp_path / "adapter")
    assert off(back, ours) <= LOGIT_TOLERANCE
    save_adapter(back, tmp_path / "again", base=str(folder))
    for file in sorted((tmp_path / "adapter").iterdir()):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "pissa"])
def test_we_load_what_peft_trained(folder: Path, tmp_path: Path, variant: str) -> None:
    theirs = theirs_of(folder, VARIANTS[variant][1]).eval()
    change(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load(folder, quantization=None, dtype=torch.float32)
    before = logits(ours)
    load_adapter(ours, tmp_path / "adapter")
    assert off(ours, theirs) <= LOGIT_TOLERANCE
    assert (logits(ours) - before).abs().max() > 10 * CLEARLY, "the adapter does nothing"
    assert set(trained_modules(ours)) == {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if isinstance(module, peft.utils.ModulesToSaveWrapper)
    }


class OnTheCpu(TorchFunctionMode):
    """PEFT computes LoftQ on a GPU alone; what goes there stays here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def here(value: Any) -> Any:
            return "cpu" if str(value) == "cuda" else value

        if func is torch.Tensor.to:
            args = tuple(map(here, args))
            kwargs = {key: here(value) for key, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def test_five_steps_from_loftq_have_peft_s_losses(shared: Shared) -> None:
    folder = shared("models/base-11m")
    settings = {
        "init_lora_weights": "loftq",
        "loftq_config": peft.LoftQConfig(loftq_bits=4, loftq_iter=1),
        "target_modules": "all-linear",
    }
    with OnTheCpu():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=R, lora_alpha=R, task_type="CAUSAL_LM", **settings)
        theirs = peft.get_peft_model(reference(folder), config)
    ours = load(folder, quantization=None, dtype=torch.float32)
    add_lora(ours, LoraSpec(R, R, init="loftq"), seed=0)
    plain = load(folder, quantization=None, dtype=torch.float32)
    assert off(ours, plain) > LOGIT_TOLERANCE, "nothing was quantised"
    expected, got = train(theirs), train(ours)
    worst = max(abs(a - b) / b for a, b in zip(got, expected, strict=True))
    print(f"\nloftq: losses {got[0]:.5f} to {got[-1]:.5f}, at most {worst:.1e} from PEFT's")
    assert expected[0] - expected[-1] > CLEARLY * expected[0], "nothing was learnt"
    assert worst <= LOSS_TOLERANCE


def test_five_steps_of_lora_plus_have_peft_s_losses(folder: Path) -> None:
    theirs, ours = theirs_of(folder, {}), ours_of(folder, {})
    copy_start(theirs, ours)
    config = TrainConfig(learning_rate=1e-3, lora_plus_ratio=8.0, weight_decay=0.01)
    plus = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.01
    )
    expected, got = train(theirs, plus), train(ours, build_optimizer(ours, config))
    worst = max(abs(a - b) / b for a, b in zip(got, expected, strict=True))
    print(f"\nlora+: losses {got[0]:.5f} to {got[-1]:.5f}, at most {worst:.1e} from PEFT's")
    assert expected[0] - expected[-1] > CLEARLY * expected[0], "nothing was learnt"
    assert worst <= LOSS_TOLERANCE


@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_begins_as_peft_s_on_a_dense_base(shared: Shared, iterations: int) -> None:
    folder = shared("models/base-11m")
    weights = reference(folder).state_dict()
    ours = load(folder, quantization=None, dtype=torch.float32)
    # PEFT leaves the scale out, which is right for a scale of 1.
    spec = LoraSpec(8, 8, target_modules=["k_proj"], init="loftq", init_iterations=iterations)
    add_lora(ours, spec, seed=0)
    for name, layer in adapted_modules(ours).items():
        with OnTheCpu():
            base, A, B = loftq_init(weights[f"{name}.weight"], 4, 8, iterations)
        # From the second round on, a number on the border of two codes may fall either way.
        same = (layer.base.weight == base).float().mean()
        assert same == 1 if iterations == 1 else same > 0.999
        change = layer.lora_B @ layer.lora_A
        assert (change - B @ A).norm() <= (1e-5 if iterations == 1 else 1e-2) * change.norm()


@pytest.mark.parametrize("variant", ["dora", "pissa", "patterns"])
def test_layers_stored_the_other_way_round_go_both_ways(shared: Shared, tmp_path: Path, variant: str) -> None:
    folder = shared("models/capp-gpt-hf")
    patterns = {"rank_pattern": {"c_attn": 2}, "alpha_pattern": {"mlp.c_proj": 3}}
    ours_settings, their_settings = VARIANTS[variant] if variant != "patterns" else (patterns, patterns)
    ours = ours_of(folder, ours_settings)
    theirs = theirs_of(folder, {**their_settings, "fan_in_fan_out": True}).eval()
    if variant == "pissa":
        assert off(ours, theirs) <= LOGIT_TOLERANCE
    change(ours)
    save_adapter(ours, tmp_path / "ours", base=str(folder))
    loaded = peft.PeftModel.from_pretrained(reference(folder), tmp_path / "ours").eval()
    assert off(loaded, ours) <= LOGIT_TOLERANCE
    assert off(ours, reference(folder)) > 10 * CLEARLY
    if variant != "pissa":
        change(theirs)
        theirs.save_pretrained(tmp_path / "theirs")
        back = load(folder, quantization=None, dtype=torch.float32, adapter=tmp_path / "theirs")
        assert off(back, theirs) <= LOGIT_TOLERANCE


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_peft_answers_with_a_4_bit_run_s_adapter_as_the_16_bit_model_would(
    shared: Shared, tmp_path: Path, init: Any
) -> None:
    folder = shared("models/base-11m")
    ours = ours_of(folder, {"init": init, "init_iterations": 3}, quantization=QuantSpec())
    train(ours)
    save_adapter(ours, tmp_path / "adapter", base=str(folder))
    theirs = peft.PeftModel.from_pretrained(reference(folder), tmp_path / "adapter").eval()
    dense = load(folder, quantization=None, dtype=torch.float32, adapter=tmp_path / "adapter")
    assert off(theirs, dense) <= LOGIT_TOLERANCE

    def distance(model: Any) -> float:
        return float((logits(theirs) - logits(model)).square().mean())

    plain = load(folder, quantization=QuantSpec(), dtype=torch.float32)
    print(f"\n{init}: mean squared distance {distance(ours):.3g}, untrained {distance(plain):.3g}")
    assert distance(ours) < 0.1 * distance(plain)


@pytest.mark.parametrize(
    "setting",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"layers_to_transform": [0]},
        {"exclude_modules": ["k_proj"]},
        {"trainable_token_indices": [1, 2]},
        {"layer_replication": [[0, 2], [1, 2]]},
    ],
    ids=lambda setting: "-".join(map(str, *setting.items())),
)
def test_what_peft_saves_and_we_do_not_support_is_named(tmp_path: Path, setting: dict[str, Any]) -> None:
    folder = tiny(tmp_path / "tiny")
    targets: Any = ["q_proj", "v_proj", "k_proj"]
    theirs_of(folder, setting, targets=targets).save_pretrained(tmp_path / "adapter")
    model = load(folder, quantization=None, dtype=torch.float32)
    with pytest.raises(ModelError, match="HB324") as caught:
        load_adapter(model, tmp_path / "adapter")
    assert next(iter(setting)) in caught.value.what
