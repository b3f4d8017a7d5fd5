"""fp32 matmuls on a CPU by oneDNN: the same numbers, wherever torch multiplies two matrices, and only where it is faster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from tunesmith import hardware, matmul

pytestmark = pytest.mark.skipif(not matmul.has_onednn(), reason="this build of torch has no oneDNN")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured here, and what is not, stays here."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def onednn() -> Iterator[None]:
    matmul.take_onednn()
    yield
    matmul.leave_onednn()


def products(dtype: torch.dtype, rows: int = 96) -> list[torch.Tensor]:
    """y, and the gradients of x, W and b, of a layer with bias and of one without, in three dimensions."""
    torch.manual_seed(0)
    x, w, b = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((2, rows // 2, 160), (224, 160), (224,)))
    y = torch.cat([F.linear(x, w, b), F.linear(x, w)])
    y.square().sum().backward()
    return [y.detach(), *(one.grad for one in (x, w, b) if one.grad is not None)]


def operators(dtype: torch.dtype, rows: int = 96) -> int:
    """How many matmuls of `products` oneDNN's layer does."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        products(dtype, rows)
    return sum(event.count for event in seen.key_averages() if event.key == "mkldnn::_linear_pointwise")


def test_values_and_gradients_are_those_of_double_precision(onednn: None) -> None:
    for got, wanted in zip(products(torch.float32), products(torch.float64), strict=True):
        assert got.shape == wanted.shape
        assert torch.allclose(got.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_all_large_matmuls_of_forward_and_backward_are_taken_and_given_back() -> None:
    before = products(torch.float32)
    assert operators(torch.float32) == 0
    matmul.take_onednn()
    try:
        matmul.take_onednn()  # a second time is nothing
        assert operators(torch.float32) == 6, "two forward, two for x, two for W"
        assert operators(torch.float32, rows=2) == 0, "too small to pay"
        assert operators(torch.bfloat16) == operators(torch.float64) == 0, "torch's own choice"
    finally:
        matmul.leave_onednn()
    assert operators(torch.float32) == 0
    assert all(torch.equal(one, other) for one, other in zip(before, products(torch.float32), strict=True))


def test_what_is_no_plain_product_stays_as_it_is(onednn: None) -> None:
    torch.manual_seed(0)
    added, left, right = torch.randn(128, 160), torch.randn(128, 160), torch.randn(160, 160)
    assert torch.allclose(torch.addmm(added, left, right, beta=0.5, alpha=2.0), 0.5 * added + 2 * (left @ right), rtol=1e-4, atol=1e-4)
    filled = torch.zeros(128, 160)
    assert torch.mm(left, right, out=filled) is filled and torch.equal(filled, left @ right)
    assert torch.mm(left[:1], right[:, :8], out=filled.new_empty(1, 8)).shape == (1, 8)
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied \(128x160 and 128x160\)"):
        left @ added
    assert (torch.randn(0, 160) @ right).shape == (0, 160)


@pytest.mark.parametrize(("own", "other", "by"), [(2e11, 4e11, " by oneDNN"), (2e11, 2.2e11, ""), (4e11, 2e11, ""), (2e11, 0.0, "")])
def test_the_faster_library_is_taken(own: float, other: float, by: str) -> None:
    hardware.measure_peak("fp32", "cpu", 1)
    cache = hardware.cache_folder() / "peaks.json"
    known = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: other if "by oneDNN" in key else own for key in known}))
    assert hardware.measure_peak("fp32", "cpu", 1) == (max(own, other) if by else own, by)
    try:
        hardware.take_faster_matmul(1)
        assert (operators(torch.float32) > 0) == bool(by)
    finally:
        matmul.leave_onednn()


def test_a_peak_measured_by_one_library_alone_is_measured_again() -> None:
    hardware.measure_peak("fp32", "cpu", 1)
    cache = hardware.cache_folder() / "peaks.json"
    cache.write_text(json.dumps({key: value for key, value in json.loads(cache.read_text()).items() if "oneDNN" not in key}))
    assert hardware.peak_flops("table", hardware.Machine(cpu_name=hardware._cpu_name()), "fp32", 1, measure=False)[0] is None
    hardware.measure_peak("fp32", "cpu", 1)
    assert any("oneDNN" in key for key in json.loads(cache.read_text()))
