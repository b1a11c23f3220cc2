"""Promises of our attention in real models: eager's numbers whatever the mask, and no document sees another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from halfbyte.errors import ModelError
from halfbyte.kernels import native
from halfbyte.model import attention, documents, public
from halfbyte.model.isolation import prove_isolation

Shared = Callable[[str], Path]
MODELS = ("base-11m", "stories260K-hf", "capp-gpt-hf")
B, T = 3, 70
LENGTHS = (13, 1, 40, 16)
# Eager's own float32 rounding is the measure: ours rounds as often, in another order.
TIMES_EAGER = 4.0

pytestmark = pytest.mark.skipif(native.module() is None, reason="native kernels are not built")


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_choices", {})


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, shared: Shared) -> PreTrainedModel:
    return public.load(shared(f"models/{request.param}"), dtype=torch.float32)


def tiny(kind: Any = MistralForCausalLM, **settings: Any) -> PreTrainedModel:
    """A model of random weights, of a family with windows."""
    config = {MistralForCausalLM: MistralConfig, LlamaForCausalLM: LlamaConfig}[kind](
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    made: PreTrainedModel = kind(config).eval()
    assert attention.use(made)
    return made


def tokens(model: PreTrainedModel, rows: int = B, length: int = T) -> Tensor:
    return torch.randint(model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def inputs(case: str, model: PreTrainedModel) -> tuple[dict[str, Any], Tensor]:
    """Arguments of a forward pass, and which of its (B, T) tokens are none of the padding."""
    ids = tokens(model)
    mask = torch.ones(B, T, dtype=torch.long)
    if case == "right":
        mask[1, 50:] = mask[2, 1:] = 0
    if case == "left":
        mask[1, :21] = mask[2, : T - 1] = 0
    if case == "holes":
        mask[1, 20:23] = mask[2, :3] = mask[2, 9] = 0
    if case not in {"packed", "positions"}:
        given = {} if case == "whole" else {"attention_mask": mask}
        return {"input_ids": ids, **given, "use_cache": False}, mask.bool()
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    bounds = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    names = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 40, "max_length_k": 40}
    packed = {"input_ids": ids[:1], "position_ids": positions, "use_cache": False}
    return packed | (names if case == "packed" else {}), mask[:1].bool()


def three_ways(model: PreTrainedModel, run: Callable[[], Tensor]) -> Iterator[Tensor]:
    """What ours gives in float32, eager in float32, sdpa in float64 (eager's softmax is float32 always)."""
    for name, dtype in ((attention.NAME, torch.float32), ("eager", torch.float32), ("sdpa", torch.float64)):
        model.set_attn_implementation(name)
        model.to(dtype)
        yield run().double()


def assert_as_exact_as_eager(ours: Tensor, eager: Tensor, exact: Tensor) -> None:
    off, allowed = (ours - exact).abs().max(), TIMES_EAGER * (eager - exact).abs().max()
    assert off <= allowed, f"{off:.3g} off, eager {allowed / TIMES_EAGER:.3g}"


@pytest.mark.parametrize("case", ["whole", "right", "left", "holes", "packed", "positions"])
def test_logits_are_eager_s(model: PreTrainedModel, case: str) -> None:
    given, kept = inputs(case, model)
    with torch.no_grad():
        ours, eager, exact = three_ways(model, lambda: model(**given).logits)
    assert_as_exact_as_eager(ours[kept], eager[kept], exact[kept])
    backend = "sdpa" if case == "holes" else attention.NAME
    assert {choice.backend for choice in attention.choices()} == {backend}


@pytest.mark.parametrize("case", ["right", "left", "packed"])
def test_lora_gradients_are_eager_s(model: PreTrainedModel, case: str) -> None:
    public.add_lora(model, r=4)
    random = torch.Generator().manual_seed(2)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.05)
    given, kept = inputs(case, model)
    labels = given["input_ids"].masked_fill(~kept, -100)

    def gradients() -> Tensor:
        logits = model(**given).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, trained)])

    ours, eager, exact = three_ways(model, gradients)
    assert exact.abs().max() > 0
    assert_as_exact_as_eager(ours, eager, exact)


@pytest.mark.parametrize("window", [1, 5, 64, 1000])
@pytest.mark.parametrize("case", ["whole", "left", "packed"])
def test_windows_are_eager_s(case: str, window: int) -> None:
    model = tiny(sliding_window=window)
    given, kept = inputs(case, model)
    with torch.no_grad():
        ours, eager, exact = three_ways(model, lambda: model(**given).logits)
    assert_as_exact_as_eager(ours[kept], eager[kept], exact[kept])
    assert {choice.backend for choice in attention.choices()} == {attention.NAME}


def test_generation_with_a_cache_gives_the_same_tokens(model: PreTrainedModel) -> None:
    mask = torch.ones(B, 9, dtype=torch.long)
    mask[1, :4] = 0
    written = []
    for name in (attention.NAME, "eager"):
        model.set_attn_implementation(name)
        written.append(
            model.generate(
                tokens(model, length=9),
                attention_mask=mask,
                max_new_tokens=12,
                do_sample=False,
                pad_token_id=0,
            )
        )
    assert torch.equal(*written)
    assert {choice.backend for choice in attention.choices()} == {attention.NAME, "sdpa"}


def test_no_mask_of_t_times_t_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(sliding_window=5)
    made: list[Tensor | None] = []
    mask = attention.mask

    def kept(**how: Any) -> Tensor | None:
        made.append(mask(**how))
        return made[-1]

    monkeypatch.setitem(attention.AttentionMaskInterface._global_mapping, attention.NAME, kept)
    for case in ("right", "left", "packed"):
        model(**inputs(case, model)[0])
    assert len(made) == 3
    assert all(short is not None and short.shape[1:] == (4,) for short in made)


def test_documents_are_found_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(LlamaForCausalLM)
    found: list[object] = []
    restarts = documents.from_numbers
    monkeypatch.setattr(documents, "from_numbers", lambda numbers: found.append(numbers) or restarts(numbers))
    given, _ = inputs("positions", model)
    model(
        **given | {"use_cache": True}
    )  # with a cache, transformers makes no packed mask: positions alone tell
    assert len(found) == 1
    given["position_ids"][0, 5] += 1  # the same tensor, changed
    model(**given | {"use_cache": True})
    assert len(found) == 2


@pytest.mark.parametrize(
    ("feature", "backend"),
    [
        ({"dropout": 0.5}, "sdpa"),
        ({"softcap": 20.0}, "eager"),
        ({"output_attentions": True}, "eager"),
        ({"s_aux": torch.zeros(4)}, "eager"),
        ({"is_causal": False, "sliding_window": 3}, "sdpa"),
    ],
)
def test_what_our_kernel_lacks_goes_to_transformers_with_the_same_mask(
    monkeypatch: pytest.MonkeyPatch, feature: dict[str, Any], backend: str
) -> None:
    layer = tiny(LlamaForCausalLM).model.layers[0].self_attn
    heads = [torch.randn(2, count, 9, 8) for count in (4, 2, 2)]
    short = torch.tensor([[0, 0, 4, 0], [0, 4, 9, 0], [1, 2, 9, 3]], dtype=torch.int32)
    short[:, 3] = 3
    given: list[Tensor] = []

    def spy(*arguments: Any, **_: Any) -> tuple[Tensor, None]:
        given.append(arguments[4])
        return arguments[1].transpose(1, 2), None

    monkeypatch.setattr(attention, "sdpa_attention_forward", spy)
    monkeypatch.setattr("transformers.models.llama.modeling_llama.eager_attention_forward", spy)
    attention.attention(layer, *heads, short, **feature)
    (seen,) = given
    allowed = seen if seen.dtype == torch.bool else seen == 0
    causal = feature.get("is_causal", True)
    for b, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(9), torch.arange(9)).tolist():
        together = any(
            b == row and first <= min(i, j) and max(i, j) < end for row, first, end, _ in short.tolist()
        )
        assert allowed[b, 0, i, j] == ((together and i - j < 3 and (j <= i or not causal)) or i == j)
    assert [choice.backend for choice in attention.choices()] == [backend]


def test_unusual_tensors_go_to_sdpa() -> None:
    layer = tiny(LlamaForCausalLM).model.layers[0].self_attn
    q, k, v = (torch.randn(2, count, 9, 8) for count in (4, 2, 2))
    expected = attention.attention(layer, q, k, v, None)[0]
    wider = torch.cat([v, v], dim=3)
    assert torch.allclose(attention.attention(layer, q, k, wider, None)[0][..., :8], expected, atol=1e-6)
    assert (
        attention.attention(layer, q[:, :, -2:], k, v, torch.ones(2, 1, 2, 9, dtype=torch.bool))[0].shape[1]
        == 2
    )
    assert [choice.why for choice in attention.choices()][1:] == [
        "values of another size than keys",
        "keys from a cache",
    ]


def test_a_feature_without_eager_attention_is_refused() -> None:
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(ModelError, match="HB330.*Linear asks for capped scores"):
        attention.attention(nn.Linear(1, 1), q, q, q, None, softcap=3.0)


def test_models_with_attention_of_their_own_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(LlamaForCausalLM)
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    assert not attention.use(model)
    monkeypatch.undo()
    monkeypatch.setattr(attention, "native_module", lambda: None)
    assert not attention.use(model)
    monkeypatch.undo()
    monkeypatch.setattr(attention, "_eager_function", lambda owner: None)
    assert not attention.use(model)
    assert model.config._attn_implementation == "sdpa"


def test_loaded_models_use_it_and_saved_settings_do_not_name_it(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    assert model.config._attn_implementation == attention.NAME
    model.config.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()


def test_mask_functions_are_read_exactly_or_not_at_all() -> None:
    of, m = documents.pattern_of, documents.masking_utils
    packed = torch.tensor([[0, 0, 1]])
    assert of(m.causal_mask_function) == (0, None, True)
    assert of(m.sliding_window_causal_mask_function(7)) == (7, None, True)
    assert of(m.bidirectional_mask_function) == (0, None, False)
    both = of(m.and_masks(m.sliding_window_causal_mask_function(7), m.packed_sequence_mask_function(packed)))
    assert both is not None
    assert both.window == 7
    assert both.packed is packed
    for unknown in (
        m.sliding_window_bidirectional_mask_function(7),
        m.sliding_window_overlay(7),
        m.or_masks(m.causal_mask_function, m.bidirectional_mask_function),
        m.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long)),
        m.and_masks(m.causal_mask_function, lambda b, h, i, j: j > 0),
    ):
        assert of(unknown) is None


def test_documents_of_bounds_positions_and_padding() -> None:
    bounds = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    assert documents.from_bounds(bounds, 9).tolist() == [[0, 0, 3], [0, 3, 7]]
    assert documents.from_positions(torch.arange(5)[None], 2, 5) is None
    assert documents.from_positions(torch.arange(5)[None] + 3, 2, 5) is None
    assert documents.from_positions(torch.zeros(3, 2, 5), 2, 5) is None
    found = documents.from_positions(torch.tensor([[0, 1, 0, 0, 1], [4, 5, 6, 7, 8]]), 2, 5)
    assert found is not None
    assert found.tolist() == [[0, 0, 2], [0, 2, 3], [0, 3, 5], [1, 0, 5]]
    padded = documents.from_padding(torch.tensor([[0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]), 3, 4)
    assert padded is not None
    assert padded.tolist() == [[0, 2, 4, 0], [1, 0, 1, 0]]
    assert documents.from_padding(torch.tensor([[1, 0, 1, 1]]), 1, 4) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_documents_are_proven_apart(model: PreTrainedModel, dtype: torch.dtype) -> None:
    prove_isolation(model.to(dtype).train())
    assert model.training


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_proof_holds_for_transformers_own_attention_too(implementation: str) -> None:
    model = tiny(LlamaForCausalLM)
    model.set_attn_implementation(implementation)
    prove_isolation(model)
