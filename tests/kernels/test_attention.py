"""Attention over documents means what the reference says, on every instruction set, and no document sees another."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from halfbyte.errors import KernelError
from halfbyte.kernels import reference
from halfbyte.kernels.attention import attention, attention_backward, attention_forward
from halfbyte.kernels.scope import Saved, Scope

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_SIZES = (1, 8, 33, 64, 80, 128)

# Rounding of a result to its dtype: half a unit in the last place, relative; float16 below its smallest normal
# number is spaced 2^-24 apart.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SUBNORMAL = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}
# Weights and score gradients are rounded to bf16 where bf16 pairs are multiplied.
OPERAND = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 0.0}
# Sums of n float32 products: rounding errors grow like sqrt(n) * 2^-24 of the norms; 4 standard deviations.
SUM = 4 * 2.0**-24
EXPONENTIAL = 2.0**-22  # relative error of 2^x, see native/softmax_rows.hpp


@dataclass(frozen=True)
class Case:
    T: int
    H: int
    Hkv: int
    documents: tuple[tuple[int, int, int], ...]
    causal: bool = True
    window: int | None = None


CASES = (
    Case(1, 1, 1, ((0, 0, 1),)),
    Case(65, 3, 1, ((0, 0, 65), (1, 0, 64))),
    Case(130, 2, 2, ((0, 0, 1), (0, 1, 67), (0, 67, 130), (1, 5, 120))),
    Case(200, 8, 1, ((1, 199, 200), (1, 3, 137), (0, 0, 200))),
    Case(131, 3, 3, ((0, 0, 131), (1, 2, 131)), window=1),
    Case(261, 2, 1, ((0, 0, 261), (1, 0, 130)), window=40),
    Case(261, 2, 1, ((0, 1, 260), (1, 0, 130)), window=64),
    Case(150, 4, 2, ((0, 0, 150), (1, 0, 60)), window=1000),
    Case(140, 3, 1, ((0, 0, 140), (1, 0, 1), (1, 1, 78)), causal=False),
)


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    documents: Tensor
    case: Case
    scale: float

    @classmethod
    def of(cls, case: Case, D: int, dtype: torch.dtype) -> Inputs:
        """Slices of one fused tensor, as a model's single projection of q, k and v makes them."""
        random = torch.Generator().manual_seed(case.T + D)
        fused = torch.randn(2, case.T, case.H + 2 * case.Hkv, D, generator=random).to(dtype)
        q, k, v = fused.split([case.H, case.Hkv, case.Hkv], dim=2)
        dout = torch.randn(2, case.T, case.H, D, generator=random).to(dtype)
        documents = torch.tensor(case.documents, dtype=torch.int32)
        return cls(q, k, v, dout, documents, case, D**-0.5)

    @property
    def how(self) -> dict[str, float | bool | int | None]:
        return {"scale": self.scale, "causal": self.case.causal, "window": self.case.window}

    @property
    def scope(self) -> Scope:
        return Scope(self.documents, self.scale, self.case.causal, self.case.window or 0)

    @property
    def group(self) -> int:
        return self.case.H // self.case.Hkv


class Exact:
    """Results in float64 and how far a right result may be away, all (B, H, T, …) inside."""

    def __init__(self, inputs: Inputs, out: Tensor | None = None) -> None:
        self.dtype, self.group = inputs.q.dtype, inputs.group
        T, D = inputs.q.shape[1], inputs.q.shape[3]
        q, dout = (t.double().transpose(1, 2) for t in (inputs.q, inputs.dout))
        k, v = (t.double().transpose(1, 2).repeat_interleave(self.group, 1) for t in (inputs.k, inputs.v))
        seen = inputs.scope.visible(2, T)[:, None]
        scores = (q @ k.mT * inputs.scale).masked_fill(~seen, -torch.inf)
        weights = torch.softmax(scores, -1).masked_fill(~seen, 0.0)  # (B, H, T, T)
        norms = q.norm(dim=-1).max() * k.norm(dim=-1).max() * inputs.scale
        # A score's error is a weight's relative error; so is that of the logarithm of the sum, which has the
        # scores' size. Both enter twice: once as the score and once as what is subtracted from it.
        off_weight = 2 * (SUM * D**0.5 * norms + 3 * 2.0**-24 * norms + EXPONENTIAL)
        in_sum = OPERAND[self.dtype] + off_weight + SUM * T**0.5
        self.out, self.off_out = weights @ v, in_sum * (weights @ v.abs())
        if out is None:
            return
        out64 = out.double().transpose(1, 2)
        dweights = dout @ v.mT
        dscores = weights * (dweights - (dout * out64).sum(-1, keepdim=True))
        products = dout.norm(dim=-1, keepdim=True) * (
            v.norm(dim=-1)[:, :, None] + out64.norm(dim=-1, keepdim=True)
        )
        off_dscores = in_sum * dscores.abs() + weights * SUM * D**0.5 * products
        self.dq, self.off_dq = dscores @ k * inputs.scale, off_dscores @ k.abs() * inputs.scale
        self.dk, self.off_dk = dscores.mT @ q * inputs.scale, off_dscores.mT @ q.abs() * inputs.scale
        self.dv, self.off_dv = weights.mT @ dout, in_sum * (weights.mT @ dout.abs())

    def check(self, name: str, got: Tensor) -> None:
        exact, off = getattr(self, name), getattr(self, f"off_{name}")
        if got.shape[2] < exact.shape[1]:
            exact, off = (t.unflatten(1, (-1, self.group)).sum(2) for t in (exact, off))
        exact, off = exact.transpose(1, 2), off.transpose(1, 2)
        bound = ROUNDING[self.dtype] * exact.abs() * 1.01 + off + SUBNORMAL[self.dtype]
        excess = (got.double() - exact).abs() - bound
        assert torch.isfinite(got).all(), name
        assert excess.max() <= 0, f"{name} is off by {excess.max():.3g} more than allowed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", HEAD_SIZES)
def test_result_and_gradients_are_right_to_rounding(isa, D, dtype):
    for case in CASES:
        inputs = Inputs.of(case, D, dtype)
        out, lse = attention_forward(inputs.q, inputs.k, inputs.v, inputs.documents, **inputs.how)
        exact = Exact(inputs, out)
        exact.check("out", out)
        grads = attention_backward(
            inputs.dout, inputs.q, inputs.k, inputs.v, out, lse, inputs.documents, **inputs.how
        )
        for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
            assert grad.is_contiguous()
            exact.check(name, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_documents_wide_heads_and_many_of_them(isa, dtype):
    for case, D in (
        (Case(600, 2, 1, ((0, 0, 600), (1, 40, 577))), 64),
        (Case(300, 6, 2, ((0, 0, 300),)), 256),
        (Case(200, 2, 2, tuple((1, i, i + 4) for i in range(0, 200, 5))), 33),
    ):
        inputs = Inputs.of(case, D, dtype)
        out, lse = attention_forward(inputs.q, inputs.k, inputs.v, inputs.documents, **inputs.how)
        exact = Exact(inputs, out)
        exact.check("out", out)
        grads = attention_backward(
            inputs.dout, inputs.q, inputs.k, inputs.v, out, lse, inputs.documents, **inputs.how
        )
        for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
            exact.check(name, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_agrees_with_its_own_formula(dtype):
    inputs = Inputs.of(CASES[2], 33, dtype)
    out, lse = reference.attention(inputs.q, inputs.k, inputs.v, inputs.scope)
    exact = Exact(inputs, out)
    exact.check("out", out)
    grads = reference.attention_grad(inputs.dout, Saved(inputs.q, inputs.k, inputs.v, out, lse), inputs.scope)
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
        exact.check(name, grad)


def test_the_saved_logarithms_are_the_reference_s(isa):
    for case in CASES:
        inputs = Inputs.of(case, 33, torch.float32)
        _, lse = attention_forward(inputs.q, inputs.k, inputs.v, inputs.documents, **inputs.how)
        _, expected = reference.attention(
            inputs.q.double(), inputs.k.double(), inputs.v.double(), inputs.scope
        )
        # A score of size s is off by s * 2^-24 and sqrt(D) roundings of its terms; the largest here is below 16.
        torch.testing.assert_close(lse.double(), expected, atol=16 * SUM * 33**0.5, rtol=0.0)


@pytest.mark.parametrize("wrong", ["leak", "late", "scale", "group"])
def test_the_bounds_notice_a_planted_bug(wrong):
    inputs = Inputs.of(CASES[2], 64, torch.bfloat16)
    q, k, v, documents, how = inputs.q, inputs.k, inputs.v, inputs.documents, dict(inputs.how)
    if wrong == "leak":  # two documents taken for one
        documents = torch.tensor([[0, 0, 1], [0, 1, 130], [1, 5, 120]], dtype=torch.int32)
    if wrong == "late":  # a document that begins one token late
        documents = torch.tensor([[0, 0, 1], [0, 1, 67], [0, 68, 130], [1, 5, 120]], dtype=torch.int32)
    if wrong == "scale":
        how["scale"] *= 1.02
    if wrong == "group":  # heads read each other's keys
        k = k.flip(2)
    out = attention(q, k, v, documents, **how)
    with pytest.raises(AssertionError, match="off by"):
        Exact(inputs).check("out", out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_document_is_the_same_to_the_bit_whatever_stands_beside_it(isa, dtype):
    inputs = Inputs.of(CASES[2], 64, dtype)
    documents, how = inputs.documents, inputs.how
    first, other = slice(1, 67), slice(67, 130)

    def run(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (t.detach().clone().requires_grad_() for t in (q, k, v))
        out = attention(q, k, v, documents, **how)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), inputs.dout)

    before = run(inputs.q, inputs.k, inputs.v, documents)
    changed = [t.clone() for t in (inputs.q, inputs.k, inputs.v)]
    for tensor in changed:
        tensor[0, first] = float("nan")
    after = run(*changed, documents)
    leaking = torch.tensor([[0, 0, 1], [0, 1, 130], [1, 5, 120]], dtype=torch.int32)
    leaked = run(*changed, leaking)
    for untouched, touched, planted in zip(before, after, leaked, strict=True):
        assert torch.equal(untouched[0, other], touched[0, other])
        assert torch.equal(untouched[1], touched[1])
        assert touched[0, first].isnan().any()
        assert not torch.equal(untouched[0, other], planted[0, other])


def test_padding_gets_zeros_and_no_gradient(backend):
    inputs = Inputs.of(Case(70, 2, 1, ((0, 3, 60), (1, 10, 11))), 8, torch.float32)
    q, k, v = (t.detach().clone().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    outside = torch.ones(2, 70, dtype=torch.bool)
    outside[0, 3:60] = outside[1, 10] = False
    with torch.no_grad():
        for tensor in (q, k, v):
            tensor[outside] = 1e3 if backend == "reference" else float("nan")
    out, lse = attention_forward(q, k, v, inputs.documents, **inputs.how)
    assert (out[outside] == 0).all()
    assert (lse.transpose(1, 2)[outside] == -torch.inf).all()
    for grad in torch.autograd.grad(out, (q, k, v), inputs.dout):
        assert (grad[outside] == 0).all()
        assert torch.isfinite(grad).all()


def test_scores_of_any_size_stay_finite_and_nan_stays_nan(isa):
    q = torch.tensor([1e4, -1e4, 0.0, 1e4]).reshape(1, 4, 1, 1)
    k = torch.tensor([1.0, -1.0, 1e4, -1e4]).reshape(1, 4, 1, 1)
    v = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1)
    documents = torch.tensor([[0, 0, 4]], dtype=torch.int32)
    assert attention(q, k, v, documents, scale=1.0).flatten().tolist() == [1.0, 2.0, 2.0, 3.0]
    q[0, 1] = float("nan")
    assert attention(q, k, v, documents, scale=1.0).isnan().flatten().tolist() == [False, True, False, False]


def test_threads_do_not_change_a_bit(isa):
    inputs = Inputs.of(
        Case(330, 6, 2, ((0, 0, 330), (1, 0, 70), (1, 75, 76), (1, 80, 330))), 33, torch.bfloat16
    )
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            q, k, v = (t.detach().clone().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
            out = attention(q, k, v, inputs.documents, **inputs.how)
            results.append((out, *torch.autograd.grad(out, (q, k, v), inputs.dout)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradcheck_in_float64():
    inputs = Inputs.of(Case(7, 4, 2, ((0, 0, 3), (0, 3, 7), (1, 1, 6)), window=2), 5, torch.float64)
    tensors = tuple(t.detach().clone().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    for how in ({}, {"window": 2}, {"causal": False}):
        assert torch.autograd.gradcheck(
            lambda *qkv, how=how: attention(*qkv, inputs.documents, scale=0.4, **how), tensors
        )


def test_registration_passes_torch_s_own_checks(isa):
    inputs = Inputs.of(CASES[1], 8, torch.float32)
    q, k, v = (t.detach().clone().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    how = (inputs.documents, 0.3, True, 0)
    checked = torch.library.opcheck(torch.ops.halfbyte.attention.default, (q, k, v, *how))
    assert set(checked.values()) == {"SUCCESS"}
    out, lse = attention_forward(inputs.q, inputs.k, inputs.v, inputs.documents, scale=0.3)
    saved = (inputs.dout, inputs.q, inputs.k, inputs.v, out, lse, *how)
    checked = torch.library.opcheck(torch.ops.halfbyte.attention_grad.default, saved)
    assert set(checked.values()) == {"SUCCESS"}


def test_what_is_saved_does_not_grow_with_the_square_of_the_tokens():
    inputs = Inputs.of(CASES[3], 8, torch.float32)
    q, k, v = (t.detach().clone().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        attention(q, k, v, inputs.documents, **inputs.how)
    B, T, H, _ = q.shape
    assert sorted(saved) == sorted([t.numel() for t in (q, k, v, q, inputs.documents)] + [B * H * T])


def test_an_expanded_gradient_is_taken(isa):
    inputs = Inputs.of(CASES[1], 8, torch.float32)
    q = inputs.q.detach().clone().requires_grad_()
    (summed,) = torch.autograd.grad(attention(q, inputs.k, inputs.v, inputs.documents, scale=1.0).sum(), q)
    out = attention(q, inputs.k, inputs.v, inputs.documents, scale=1.0)
    (expected,) = torch.autograd.grad(out, q, torch.ones_like(out))
    assert torch.equal(summed, expected)


def test_a_second_derivative_is_refused():
    inputs = Inputs.of(CASES[1], 8, torch.float32)
    q = inputs.q.detach().clone().requires_grad_()
    out = attention(q, inputs.k, inputs.v, inputs.documents, scale=1.0)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(KernelError, match="HB402.*second derivative"):
        grad.sum().backward()


def test_unfit_arguments_are_refused():
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    documents = torch.tensor([[0, 0, 5], [1, 0, 5]], dtype=torch.int32)

    def refused(pattern: str, q=q, k=k, v=k, documents=documents, **how: object) -> None:
        with pytest.raises(KernelError, match=f"HB402.*{pattern}"):
            attention(q, k, v, documents, **{"scale": 1.0, **how})

    refused(r"q is .*expected a non-empty \(B, T, H, D\)", q=q[0])
    refused("q is torch.int64", q=torch.ones(2, 5, 4, 8, dtype=torch.int64))
    refused(r"k is .*expected \(2, 5, Hkv, 8\)", k=torch.randn(2, 5, 3, 8))
    refused(r"k is .*expected \(2, 5, Hkv, 8\)", k=torch.randn(2, 4, 2, 8))
    refused(r"v is .*expected \(2, 5, 2, 8\)", v=torch.randn(2, 5, 1, 8))
    refused("v is torch.bfloat16.*expected torch.float32", v=k.bfloat16())
    refused("k is .*next to each other, not 5 apart", k=torch.randn(2, 2, 8, 5).permute(0, 3, 1, 2))
    refused("q is .*on meta, expected a tensor on the CPU", q=q.to("meta"))
    refused("documents is .*int64", documents=documents.long())
    refused("documents is .*expected", documents=documents[0])
    refused(
        r"document \[2, 0, 5\] lies outside", documents=documents + torch.tensor([1, 0, 0], dtype=torch.int32)
    )
    refused(r"document \[0, 0, 6\] lies outside", documents=torch.tensor([[0, 0, 6]], dtype=torch.int32))
    refused(r"document \[0, 3, 3\] .*empty", documents=torch.tensor([[0, 3, 3]], dtype=torch.int32))
    overlapping = torch.tensor([[0, 3, 5], [1, 0, 5], [0, 0, 4]], dtype=torch.int32)
    refused(r"\[0, 0, 4\] and \[0, 3, 5\] overlap", documents=overlapping)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        refused("scale is", scale=scale)
    refused("window is 0", window=0)
    refused("window is 3 with causal False", window=3, causal=False)
    out, lse = attention_forward(q, k, k, documents, scale=1.0)
    for name, changed in {
        "dout": (out[:1], out, lse),
        "out": (out, out.bfloat16(), lse),
        "lse": (out, out, lse[:1]),
    }.items():
        with pytest.raises(KernelError, match=f"HB402.*{name} is"):
            attention_backward(changed[0], q, k, k, changed[1], changed[2], documents, scale=1.0)
