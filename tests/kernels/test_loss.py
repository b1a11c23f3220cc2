"""Promises of the output head and its loss as one operation: float64's numbers, chunk by chunk, and refusals."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from halfbyte.errors import KernelError
from halfbyte.kernels import loss
from halfbyte.kernels.loss import HeadLoss, chunk_rows, head_loss, token_losses

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SETTINGS: dict[str, dict[str, float]] = {
    "plain": {},
    "all": {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 6.0, "logit_scale": 0.7},
}
DIVISOR = 41.0

# One rounding to a dtype, relative.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Sums in float32 in any order: errors grow like sqrt(K) of a term; 4 standard deviations.
SUM = 4 * 2.0**-24
# What a row's loss and its gradient may be off for a given row of logits, in nats and relative to p: test_loss_rows
# derives (range + 24) x 2^-24 and less; the logits here range over less than 60, and bending doubles it.
ROW = 256 * 2.0**-24
# float16 gradients below the smallest normal number are spaced 2^-24 apart.
SUBNORMAL = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}


class Case:
    """Hidden states, head and targets, the exact loss and gradients for them, and how far off they may be."""

    def __init__(
        self, dtype: torch.dtype, P: int, *, H: int = 24, V: int = 203, settings: str = "plain"
    ) -> None:
        generator = torch.Generator().manual_seed(P)
        self.hidden = torch.randn(P, H, generator=generator).to(dtype).requires_grad_()
        self.weight = torch.randn(V, H, generator=generator).to(dtype).requires_grad_()
        self.bias = (
            torch.randn(V, generator=generator).to(dtype).requires_grad_() if settings == "all" else None
        )
        self.targets = torch.randint(0, V, (P,), generator=generator)
        self.settings = SETTINGS[settings]
        self._exact()

    def inputs(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def computed(self) -> HeadLoss:
        return head_loss(
            self.hidden, self.weight, self.targets, bias=self.bias, divisor=DIVISOR, **self.settings
        )

    def _exact(self) -> None:
        scale, cap = self.settings.get("logit_scale", 1.0), self.settings.get("softcap")
        smoothing, z_loss = self.settings.get("label_smoothing", 0.0), self.settings.get("z_loss", 0.0)
        wide = [x.detach().double().requires_grad_() for x in self.inputs()]
        x = wide[0] @ wide[1].T + (wide[2] if self.bias is not None else 0.0)
        z = cap * torch.tanh(scale * x / cap) if cap else scale * x
        self.nll = F.cross_entropy(z, self.targets, reduction="none")
        self.cross_entropy = self.nll.sum() / DIVISOR
        objective = F.cross_entropy(z, self.targets, reduction="sum", label_smoothing=smoothing)
        self.objective = (objective + z_loss * torch.logsumexp(z, 1).square().sum()) / DIVISOR
        dlogits, *self.gradients = torch.autograd.grad(self.objective, [x, *wide])
        with torch.no_grad():
            self._bounds(wide, x, torch.softmax(z, 1), dlogits)

    def _bounds(self, wide: list[Tensor], x: Tensor, p: Tensor, dlogits: Tensor) -> None:
        hidden, weight, dtype = *wide[:2], self.hidden.dtype
        product = SUM * hidden.shape[1] ** 0.5 * hidden.norm(dim=1)[:, None] * weight.norm(dim=1)
        narrow = 0.0 if dtype is torch.float32 else ROUNDING[dtype]
        off = product.amax(1) + ROW  # of any logit of a row
        self.nll_bound = 2 * off
        slope = 1 + 2 * self.settings.get("z_loss", 0.0) * torch.logsumexp(x, 1).abs()
        self.loss_bound = (
            float((self.nll_bound * slope).sum()) / DIVISOR + ROUNDING[torch.float32] * self.objective
        )
        # Probabilities move by their share of twice that; the bending's slope by no more than the logit itself.
        moved = (4 * off * slope)[:, None] * p / DIVISOR + 2 * off[:, None] * dlogits.abs()
        g = moved + ROUNDING[dtype] * dlogits.abs() + SUBNORMAL[dtype]
        if self.settings.get("softcap"):
            g = g + off[:, None] * (p + torch.finfo(torch.float32).eps) / DIVISOR
            g[torch.arange(len(g)), self.targets] += off / DIVISOR
        sums = dlogits.abs() @ weight.abs(), dlogits.abs().T @ hidden.abs(), dlogits.abs().sum(0)
        errors = g @ weight.abs(), g.T @ hidden.abs(), g.sum(0)
        # Sums in float32, those of the weight rounded to 16 bits chunk by chunk, and the result once.
        self.gradient_bounds = [
            error
            + (SUM + (narrow if i == 1 else 0.0)) * total
            + 1.01 * ROUNDING[dtype] * exact.abs()
            + SUBNORMAL[dtype]
            for i, (error, total, exact) in enumerate(zip(errors, sums, self.gradients, strict=False))
        ]

    def check(self) -> None:
        found = self.computed()
        assert abs(found.objective - self.objective) <= self.loss_bound
        assert abs(found.cross_entropy - self.cross_entropy) <= self.loss_bound
        got = torch.autograd.grad(found.objective, self.inputs())
        for x, gradient, exact, bound in zip(
            self.inputs(), got, self.gradients, self.gradient_bounds, strict=True
        ):
            assert gradient.dtype == x.dtype
            excess = ((gradient.double() - exact).abs() / bound).max()
            assert excess <= 1, f"off by {excess:.3g} times the bound"


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients_are_right_to_rounding(backend: str, dtype: torch.dtype, settings: str) -> None:
    for P, H, V in ((1, 1, 1), (5, 24, 203), (17, 33, 515)):
        Case(dtype, P, H=H, V=V, settings=settings).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("P", [1, 15, 16, 17, 31, 32, 33, 50])
def test_chunks_of_sixteen_rows_change_nothing(
    P: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK_BYTES", 1)
    Case(dtype, P, settings="all").check()


def test_vocabularies_wider_than_a_panel_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "PANEL", 64)
    Case(torch.bfloat16, 20, settings="all").check()


def test_a_gradient_that_forgets_the_last_row_of_a_chunk_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = loss._hidden_grad

    def wrong(dlogits: Tensor, weight: Tensor, out: Tensor) -> None:
        dlogits[-1] = 0
        right(dlogits, weight, out)

    Case(torch.bfloat16, 40).check()
    monkeypatch.setattr(loss, "_hidden_grad", wrong)
    with pytest.raises(AssertionError, match="times the bound"):
        Case(torch.bfloat16, 40).check()


def test_a_divisor_applied_after_rounding_to_float16_would_be_seen() -> None:
    """Gradients of a step of a million tokens would be zeros in float16, or 16 times too coarse."""
    case = Case(torch.bfloat16, 9)
    found = head_loss(case.hidden, case.weight, case.targets, divisor=DIVISOR * 2.0**60)
    (gradient,) = torch.autograd.grad(found.objective, case.hidden)
    (expected,) = torch.autograd.grad(case.computed().objective, case.hidden)
    assert torch.equal(gradient.float() * 2.0**60, expected.float())  # powers of two: to the bit


@pytest.mark.parametrize("settings", SETTINGS)
def test_gradcheck_in_float64(settings: str) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = ((6, 5), (11, 5), (11,))
    hidden, weight, bias = (
        torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes
    )
    targets = torch.randint(0, 11, (6,), generator=generator)

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return head_loss(hidden, weight, targets, bias=bias, divisor=7.0, **SETTINGS[settings]).objective

    assert torch.autograd.gradcheck(compute, (hidden, weight, bias))


def test_a_second_derivative_is_refused() -> None:
    case = Case(torch.float32, 3)
    (gradient,) = torch.autograd.grad(case.computed().objective, case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad|once_differentiable"):
        torch.autograd.grad(gradient.sum(), case.hidden)


def test_registration_passes_torch_s_own_checks() -> None:
    case = Case(torch.float32, 5, settings="all")
    terms = (0.1, 0.01, 6.0, 0.7)
    inputs = (case.hidden, case.weight, case.targets, case.bias)
    plain = [None if x is None else x.detach() for x in inputs]
    for op, arguments in (
        (torch.ops.halfbyte.head_loss, (*inputs, *terms, 3.0, [True, True, True])),
        (torch.ops.halfbyte.head_loss, (*plain, *terms, 3.0, [False, False, False])),
        (torch.ops.halfbyte.token_losses, (*plain, *terms[2:], False)),
        (torch.ops.halfbyte.token_losses, (case.hidden, *plain[1:], *terms[2:], True)),
    ):
        assert set(torch.library.opcheck(op.default, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_of_each_token_are_the_parts_of_the_loss(
    backend: str, dtype: torch.dtype, settings: str
) -> None:
    case = Case(dtype, 33, settings=settings)
    bend = {
        name: case.settings.get(name, default) for name, default in (("softcap", None), ("logit_scale", 1.0))
    }
    with torch.no_grad():
        nll = token_losses(case.hidden, case.weight, case.targets, bias=case.bias, **bend)
    assert nll.dtype == torch.float64
    assert not nll.requires_grad
    assert ((nll - case.nll).abs() <= case.nll_bound).all()
    assert nll.sum().item() / DIVISOR == pytest.approx(case.computed().cross_entropy.item(), rel=2.0**-22)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_function_of_the_losses_has_its_gradient(
    backend: str, dtype: torch.dtype, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK_BYTES", 1)  # several chunks
    case = Case(dtype, 37)
    hidden, weight, bias = (
        x.detach() for x in (case.hidden, case.weight, torch.linspace(-1, 1, len(case.weight)))
    )

    def function(nll: Tensor) -> Tensor:  # of two groups of tokens, as a preference of one over the other is
        return torch.nn.functional.softplus(nll[:20].sum() - nll[20:].sum() * 1.5) + nll[3] ** 2

    hidden.requires_grad_()
    (got,) = torch.autograd.grad(
        function(token_losses(hidden, weight, case.targets, bias=bias, softcap=softcap)), hidden
    )
    wide = hidden.detach().double().requires_grad_()
    logits = wide @ weight.to(dtype).double().T + bias.double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    exact_nll = torch.nn.functional.cross_entropy(logits, case.targets, reduction="none")
    (exact,) = torch.autograd.grad(function(exact_nll), wide)
    # Rounded when the row's own gradient is stored and when it is scaled; sums of V terms in float32 before.
    eps = torch.finfo(dtype).eps
    assert (got.double() - exact).abs().max() <= (4 * eps + len(weight) * 2.0**-22) * exact.abs().max()
    assert exact.abs().max() > 0


def test_a_weight_that_trains_has_no_losses_of_tokens() -> None:
    case = Case(torch.float32, 5)
    with pytest.raises(KernelError, match="HB402.*token_losses: weight.*without gradient"):
        token_losses(case.hidden, case.weight, case.targets)


def test_only_the_gradients_wanted_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("_hidden_grad", "_weight_grad"):
        right = getattr(loss, name)
        monkeypatch.setattr(loss, name, lambda *a, n=name, f=right: (calls.append(n), f(*a)))
    case = Case(torch.bfloat16, 9)
    frozen = case.weight.detach()
    with torch.no_grad():
        token_losses(case.hidden, case.weight, case.targets)
        head_loss(case.hidden, case.weight, case.targets, divisor=1.0)
    head_loss(case.hidden.detach(), frozen, case.targets, divisor=1.0)
    assert calls == []
    head_loss(case.hidden, frozen, case.targets, divisor=1.0).objective.backward()
    assert calls == ["_hidden_grad"]
    head_loss(case.hidden.detach(), case.weight, case.targets, divisor=1.0).objective.backward()
    assert calls == ["_hidden_grad", "_weight_grad"]


def test_a_float32_weight_gets_a_float32_gradient_from_16_bit_states() -> None:
    case = Case(torch.bfloat16, 40)
    weight = case.weight.detach().float().requires_grad_()
    head_loss(case.hidden, weight, case.targets, divisor=DIVISOR).objective.backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    bound = case.gradient_bounds[1]
    assert ((weight.grad.double() - case.gradients[1]).abs() <= bound).all()


def test_autocast_does_not_change_the_products() -> None:
    case = Case(torch.float32, 9)
    with torch.autocast("cpu", torch.bfloat16):
        case.check()


def test_strides_and_an_unscaled_backward_do_not_matter() -> None:
    case = Case(torch.float32, 9)
    spread = torch.stack([case.hidden.detach(), case.hidden.detach()], dim=2)[..., 0]
    spread.requires_grad_()
    assert not spread.is_contiguous()
    found = head_loss(spread, case.weight, torch.stack([case.targets] * 2, dim=1)[:, 0], divisor=DIVISOR)
    (found.objective * 3).backward()
    assert torch.equal(found.objective, case.computed().objective)
    assert spread.grad is not None
    bound = 3 * case.gradient_bounds[0] * 1.01
    assert ((spread.grad - 3 * case.gradients[0]).abs() <= bound).all()


def test_no_rows_have_no_loss_and_no_gradient() -> None:
    hidden = torch.empty(0, 8, requires_grad=True)
    found = head_loss(hidden, torch.randn(5, 8), torch.empty(0, dtype=torch.int64), divisor=1.0)
    assert found.objective == found.cross_entropy == 0
    found.objective.backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 8)
    assert token_losses(hidden, torch.randn(5, 8), torch.empty(0, dtype=torch.int64)).shape == (0,)


def test_nan_in_one_hidden_state_makes_the_loss_nan(backend: str) -> None:
    case = Case(torch.bfloat16, 40)
    with torch.no_grad():
        case.hidden[23, 5] = math.nan
    found = case.computed()
    assert found.objective.isnan()
    assert found.cross_entropy.isnan()
    nll = token_losses(case.hidden, case.weight.detach(), case.targets)
    assert nll.isnan().nonzero().tolist() == [[23]]


def test_chunks_are_bounded_by_bytes_and_even() -> None:
    for P, V in ((1, 1), (4096, 128256), (2049, 32000), (100, 10**7), (7, 10**9)):
        rows = chunk_rows(P, V, 4)
        assert 1 <= rows <= P
        assert rows * V * 4 <= loss.CHUNK_BYTES or rows <= loss.LEAST_ROWS
        chunks = math.ceil(P / rows)
        assert rows == math.ceil(P / chunks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.randn(5, 7)}, r"weight is torch.float32 \(9, 8\).*expected \(V, 7\)"),
        ({"hidden": torch.randn(5)}, r"hidden is torch.float32 \(5,\).*expected \(P, H\)"),
        ({"hidden": torch.ones(5, 8, dtype=torch.int64)}, "hidden is torch.int64"),
        ({"hidden": torch.randn(5, 8, device="meta")}, "hidden.*meta.*on cpu"),
        ({"weight": torch.randn(9, 8).half()}, "weight is torch.float16"),
        ({"weight": torch.empty(0, 8)}, r"weight is torch.float32 \(0, 8\)"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, r"targets is torch.int64 \(4,\).*expected \(5,\)"),
        ({"targets": torch.zeros(5, dtype=torch.int32)}, "targets is torch.int32"),
        ({"targets": torch.tensor([0, 8, 9, -1, 0])}, r"targets\[2\] is 9, expected a token from 0 to 8"),
        ({"targets": torch.tensor([0, 8, 0, -100, 9])}, r"targets\[3\] is -100"),
        ({"bias": torch.randn(8)}, r"bias is torch.float32 \(8,\).*expected \(9,\)"),
        ({"divisor": 0.0}, "divisor is 0.0, expected a finite number above 0"),
        ({"divisor": math.nan}, "divisor is nan"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"z_loss": -1.0}, "z_loss is -1.0"),
        ({"softcap": 0.0}, "softcap is 0.0, expected a finite number above 0, or None"),
        ({"logit_scale": 0.0}, "logit_scale is 0.0"),
    ],
)
def test_unfit_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.randn(5, 8),
        "weight": torch.randn(9, 8),
        "targets": torch.zeros(5, dtype=torch.int64),
        "divisor": 1.0,
    } | change
    with pytest.raises(KernelError, match=f"HB402.*head_loss: {message}|HB402.*{message}"):
        head_loss(**arguments)
    for name in ("divisor", "label_smoothing", "z_loss"):
        arguments.pop(name, None)
    if not {"divisor", "label_smoothing", "z_loss"} & set(change):
        with pytest.raises(KernelError, match=f"HB402.*{message}"):
            token_losses(**arguments)


MEASURED = """
import sys, torch
from torch.nn import functional as F
from halfbyte.kernels.loss import head_loss

def kib(name):
    return int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1])

torch.set_num_threads(1)
side, P, V, H = sys.argv[1], *map(int, sys.argv[2:])
hidden, weight = torch.randn(P, H, requires_grad=True), torch.randn(V, H)
targets = torch.randint(0, V, (P,))
head_loss(hidden[:2], weight[:32], targets[:2] % 32, divisor=1.0).objective.backward()  # libraries loaded
before = kib("VmRSS")
assert kib("VmHWM") - before < 4096, "the peak so far would hide the loss"
if side == "ours":
    head_loss(hidden, weight, targets, divisor=P).objective.backward()
else:
    F.cross_entropy(hidden @ weight.T, targets).backward()
print((kib("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_logits_of_a_batch_never_exist() -> None:
    P, V, H = 512, 128_256, 16

    def peak(side: str) -> int:
        command = [sys.executable, "-c", MEASURED, side, *map(str, (P, V, H))]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    # One chunk, the gradient, and 16 MiB for what the products pack and the allocator keeps.
    assert peak("ours") <= loss.CHUNK_BYTES + 2 * P * H * 4 + (16 << 20)
    # The way of autograd: logits, their log-softmax and its gradient. This is what the measure has to see.
    assert peak("theirs") >= 3 * P * V * 4
