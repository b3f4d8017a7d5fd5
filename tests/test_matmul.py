"""fp32 matmuls on a CPU by another library: the same numbers, wherever torch multiplies two matrices, and only where it is faster."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from tunesmith import hardware, matmul, peaks
from tunesmith.matmul import Library, Term

HALVES = matmul.library(" by bf16 halves")
ERROR = {" by oneDNN": 2e-6, HALVES.name: 2e-5}
"""Of a product's norm. Two halves of 8 bits leave 2^-17 of a number, 4 to 5e-6 of a product; a gradient is a product of products."""


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured here, and what is not, stays here."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(params=matmul.LIBRARIES, ids=lambda one: one.name.strip())
def chosen(request: pytest.FixtureRequest) -> Library:
    if not request.param.is_here():
        pytest.skip(f"nothing multiplies{request.param.name} on this CPU")
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def taken(chosen: Library) -> Iterator[Library]:
    matmul.take(chosen)
    yield chosen
    matmul.give_back()


def products(dtype: torch.dtype, rows: int = 192) -> list[torch.Tensor]:
    """y, and the gradients of x, W and b, of a layer with bias and of one without, in three dimensions."""
    torch.manual_seed(0)
    x, w, b = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((2, rows // 2, 160), (224, 160), (224,)))
    y = torch.cat([F.linear(x, w, b), F.linear(x, w)])
    y.square().sum().backward()
    return [y.detach(), *(one.grad for one in (x, w, b) if one.grad is not None)]


class Counted:
    """A library, and what it is asked for."""

    def __init__(self, library: Library):
        self.library, self.calls = library, 0

    def product(self, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        self.calls += 1
        return self.library.product(left, right, bias)

    def add(self, *given: object) -> object:
        self.calls += 1
        return self.library.add(*given)  # type: ignore[arg-type]

    def during(self, dtype: torch.dtype, rows: int = 192) -> int:
        before = self.calls
        products(dtype, rows)
        return self.calls - before


def counted(library: Library) -> tuple[Counted, Library]:
    counter = Counted(library)
    return counter, Library(library.name, library.is_exact, library.is_here, library.suits, counter.product, counter.add)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def test_values_and_gradients_are_those_of_double_precision(taken: Library) -> None:
    for got, wanted in zip(products(torch.float32), products(torch.float64), strict=True):
        assert got.shape == wanted.shape
        assert off(got, wanted) < ERROR[taken.name]


def test_all_large_matmuls_of_forward_and_backward_are_taken_and_given_back(chosen: Library) -> None:
    before = products(torch.float32)
    counter, library = counted(chosen)
    matmul.take(library)
    try:
        matmul.take(library)  # a second time is nothing
        assert counter.during(torch.float32) == 6, "two forward, two for x, two for W"
        assert counter.during(torch.float32, rows=2) == 0, "too small to pay"
        assert counter.during(torch.bfloat16) == counter.during(torch.float64) == 0, "torch's own choice"
    finally:
        matmul.give_back()
    assert counter.during(torch.float32) == 0
    assert all(torch.equal(one, other) for one, other in zip(before, products(torch.float32), strict=True))


def test_what_is_no_plain_product_is_right_too(taken: Library) -> None:
    torch.manual_seed(0)
    added, left, right = torch.randn(128, 160), torch.randn(128, 160), torch.randn(160, 160)
    wanted = 0.5 * added.double() + 2 * (left.double() @ right.double())
    assert off(torch.addmm(added, left, right, beta=0.5, alpha=2.0), wanted) < ERROR[taken.name]
    mine = added.clone()
    assert torch.addmm(mine, left, right, beta=0.5, alpha=2.0, out=mine) is mine and off(mine, wanted) < ERROR[taken.name]
    apart = torch.empty(128, 160)
    assert off(torch.addmm(added, left, right, beta=0.5, alpha=2.0, out=apart), wanted) < ERROR[taken.name]
    filled, tall = torch.full((128, 160), float("nan")), torch.zeros(160, 128).t()
    assert torch.mm(left, right, out=filled) is filled and torch.equal(filled, left @ right)
    assert off(torch.mm(left, right, out=tall), filled) < ERROR[taken.name]
    assert torch.mm(left[:1], right[:, :8], out=filled.new_empty(1, 8)).shape == (1, 8)
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied \(128x160 and 128x160\)"):
        left @ added
    assert (torch.randn(0, 160) @ right).shape == (0, 160)


SIZES = [(1, 1, 1), (5, 33, 7), (16, 32, 16), (17, 31, 33), (96, 1, 97), (48, 384, 576), (354, 1600, 96), (530, 2100, 65), (100, 900, 1040)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_halves_take_every_size_and_layout(size: tuple[int, int, int]) -> None:
    if not HALVES.is_here():
        pytest.skip("no AMX here")
    rows, depth, columns = size
    torch.manual_seed(0)
    for flip_left, flip_right in ((False, False), (False, True), (True, False), (True, True)):
        left = torch.randn(depth, rows).t() if flip_left else torch.randn(rows, depth)
        right = torch.randn(columns, depth).t() if flip_right else torch.randn(depth, columns)
        room = torch.full((rows, columns + 5), float("nan"))
        room[:, :columns] = start = torch.randn(rows, columns)
        HALVES.add(room[:, :columns], left, right, 0.5, 2.0)
        # Of what is added up, not of the sum: a product of few numbers may be next to nothing.
        scale = 2 * (left.double().abs() @ right.double().abs()) + start.double().abs()
        wanted = 0.5 * start.double() + 2 * (left.double() @ right.double())
        assert float(((room[:, :columns].double() - wanted).abs() / scale).max()) < 2**-15
        assert room[:, columns:].isnan().all(), "beside it nothing is written"
        assert off(HALVES.product(left, right, None), left.double() @ right.double()) < 2e-4
        empty = torch.full((rows, columns), float("nan"))
        HALVES.add(empty, left, right, 0.0, 1.0)
        assert torch.equal(empty, HALVES.product(left, right, None)), "with beta 0 what was there is not read"


@pytest.mark.parametrize("bias", [False, True])
def test_a_sum_of_products_is_the_same_by_whatever_library(taken: Library, bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, down, up = torch.randn(130, 700), torch.randn(200, 700), torch.randn(130, 40), torch.randn(200, 40)
    terms = [Term(x[:, :650], weight[:, :650].t()), Term(down[:, 3:20], up[:, 3:20].t(), 0.25), Term(down, up.t())]
    added, kept = torch.randn(200) if bias else None, down.clone()
    wanted = sum(by * (left.double() @ right.double()) for left, right, by, _ in terms) + (0 if added is None else added.double())
    assert off(matmul.added_up(terms, added), wanted) < ERROR[taken.name]
    assert torch.equal(down, kept), "what is scaled is a copy"
    halves = [Term(left.bfloat16(), right.bfloat16(), by) for left, right, by, _ in terms]
    assert matmul.added_up(halves).dtype is torch.bfloat16


@pytest.mark.parametrize("size", [(96, 96, 96), (97, 1600, 130), (531, 576, 192), (384, 800, 2048)], ids=str)
def test_a_weight_in_tiles_gives_the_same_bits(size: tuple[int, int, int]) -> None:
    if not HALVES.is_here():
        pytest.skip("no AMX here")
    rows, inputs, outputs = size
    torch.manual_seed(0)
    x, y, weights = torch.randn(rows, inputs), torch.randn(rows, outputs), [torch.randn(outputs, inputs) for _ in range(2)]
    narrow = [Term(torch.randn(rows, 20), torch.randn(20, columns), 0.5) for columns in (outputs, inputs)]
    made, threads = matmul.in_tiles(weights), torch.get_num_threads()
    matmul.take(HALVES)
    try:
        for weight, tiles in zip(weights, made, strict=True):
            for torch_threads in (1, 2, 3):
                torch.set_num_threads(torch_threads)
                there, back = Term(x, weight.t()), Term(y, weight)
                for plain, more, side in ((there, narrow[0], tiles.there), (back, narrow[1], tiles.back)):
                    wanted, found = (matmul.added_up([one, more]) for one in (plain, plain._replace(tiles=side)))
                    assert torch.equal(wanted, found)
                    assert off(found, plain.left.double() @ plain.right.double() + 0.5 * more.left.double() @ more.right.double()) < 2e-5
    finally:
        torch.set_num_threads(threads)
        matmul.give_back()


def test_halves_give_the_same_bits_whatever_threads_share() -> None:
    if not HALVES.is_here():
        pytest.skip("no AMX here")
    torch.manual_seed(0)
    left, right, threads = torch.randn(200, 300), torch.randn(300, 250), torch.get_num_threads()
    try:
        found = []
        for torch_threads in (1, 2, 3):
            torch.set_num_threads(torch_threads)
            found.append(HALVES.product(left, right, None))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_halves_never_hide_what_is_not_finite(bad: float) -> None:
    if not HALVES.is_here():
        pytest.skip("no AMX here")
    left, right = torch.randn(128, 128), torch.randn(128, 128)
    left[3, 5] = bad
    found = HALVES.product(left, right, None)
    assert not found[3].isfinite().any()
    assert found[:3].isfinite().all() and found[4:].isfinite().all()


def overwrite(found: dict[str, float], lead: float | None = None) -> None:
    """The peaks that are kept, by library, and what others are ahead of torch's own by (None: as their peaks say)."""
    cache = hardware.cache_folder() / "peaks.json"
    kept = {}
    for key in json.loads(cache.read_text()):
        by = next((name for name in found if name and name in key), "")
        kept[key] = (lead or found[by] / found[""]) if key.endswith(peaks.LEAD) else found[by]
    cache.write_text(json.dumps(kept))


@pytest.mark.skipif(not matmul.has_onednn(), reason="this build of torch has no oneDNN")
@pytest.mark.parametrize(("lead", "by"), [(2.0, " by oneDNN"), (1.2, " by oneDNN"), (1.05, ""), (0.5, "")])
def test_the_library_that_is_faster_turn_by_turn_is_taken(lead: float, by: str) -> None:
    """Torch's own best, of a moment when nobody disturbed it, says less: on a CPU of the fourth EPYC generation it hid a lead of a fifth."""
    peaks.measure_peak("fp32", "cpu", 1)
    overwrite({"": 2e11, " by oneDNN": 2.1e11}, lead)
    assert peaks.measure_peak("fp32", "cpu", 1) == (2.1e11 if by else 2e11, by)
    try:
        peaks.take_faster_matmul("fp32", 1)
        assert bool(matmul._taken) == bool(by)
    finally:
        matmul.give_back()


@pytest.mark.skipif(not matmul.has_onednn(), reason="this build of torch has no oneDNN")
def test_a_peak_measured_by_one_library_alone_is_measured_again() -> None:
    peaks.measure_peak("fp32", "cpu", 1)
    cache = hardware.cache_folder() / "peaks.json"
    cache.write_text(json.dumps({key: value for key, value in json.loads(cache.read_text()).items() if "oneDNN" not in key}))
    assert peaks.peak_flops("table", hardware.Machine(cpu_name=hardware.cpu_name()), "fp32", 1, measure=False)[0] is None
    peaks.measure_peak("fp32", "cpu", 1)
    assert any("oneDNN" in key for key in json.loads(cache.read_text()))


def test_halves_count_with_high_alone() -> None:
    peaks.measure_peak("tf32", "cpu", 1)
    cache = hardware.cache_folder() / "peaks.json"
    known = json.loads(cache.read_text())
    assert {key.split(" | ")[2] for key in known} == {"fp32", "fp32 by oneDNN", "fp32 by bf16 halves in tiles"}
    overwrite({"": 2e11, " by oneDNN": 2e11, HALVES.name: 9e11})
    assert peaks.measure_peak("fp32", "cpu", 1) == (2e11, "")
    assert peaks.measure_peak("tf32", "cpu", 1) == ((9e11, HALVES.name) if HALVES.is_here() else (2e11, "")), "without AMX high is highest"


def test_what_was_measured_and_is_gone_is_not_taken_and_what_has_come_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def halves(here: bool) -> Library:
        return Library(HALVES.name, False, lambda: here, HALVES.suits, lambda left, right, bias: left @ right, HALVES.add)

    monkeypatch.setattr(matmul, "LIBRARIES", (halves(False),))
    assert peaks.measure_peak("tf32", "cpu", 1)[1] == ""
    cache = hardware.cache_folder() / "peaks.json"
    known = json.loads(cache.read_text())
    assert [value for key, value in known.items() if "halves" in key] == [0.0, 0.0], "its peak and its lead"
    monkeypatch.setattr(matmul, "LIBRARIES", (halves(True),))
    peaks.measure_peak("tf32", "cpu", 1)
    assert all(value > 0 for key, value in json.loads(cache.read_text()).items() if "halves" in key), "a compiler has come"
    overwrite({"": 2e11, HALVES.name: 9e11})
    monkeypatch.setattr(matmul, "LIBRARIES", (halves(False),))
    assert peaks.measure_peak("tf32", "cpu", 1) == (2e11, ""), "it has gone"


def test_torchs_own_is_measured_whoever_multiplies(chosen: Library) -> None:
    counter, library = counted(chosen)
    matmul.take(library)
    try:
        with matmul.torchs_own():
            assert counter.during(torch.float32) == 0
        assert counter.during(torch.float32) == 6
    finally:
        matmul.give_back()
