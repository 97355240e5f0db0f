"""The C++ kernels against torch in double precision: values, gradients, both types, sizes that do not come out even."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from persistworld_cli.models.cpu.native import attend, build, calls, convolve, feed_forward, gate, linear, norm, outer

pytestmark = pytest.mark.skipif(build.library() is None, reason="needs Linux, AVX2 and g++")
DTYPES = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # of numbers of size 1 to 5
SPATIAL = [(2, 16, 48, 9, 5), (3, 32, 64, 36, 20), (1, 96, 112, 7, 13), (5, 64, 16, 12, 20), (2, 160, 32, 11, 17)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def block(x, weight, bias, norm, added, gain, residual):  # type: ignore[no-untyped-def]
    """What `block_conv` says it is, by torch in double precision."""
    wide = [t.double() for t in (x, weight.flatten(3), bias, added, gain, residual)]
    x, weight, bias, added, gain, residual = wide
    act = functional.silu(functional.group_norm(x, norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps))
    out = functional.conv2d(act, weight, bias, padding=(1, weight.shape[3] // 2))
    if weight.shape[3] == 3:
        return residual + gain[:, None, None, None] * (out + added[:, :, None, None])
    by_frame = added.unflatten(0, (len(x), -1)).transpose(1, 2)[..., None]
    return residual + gain.view(len(x), 1, -1, 1) * (out + by_frame)


def arguments(n: int, cin: int, cout: int, height: int, width: int, taps: tuple[int, ...], dtype: torch.dtype):  # type: ignore[no-untyped-def]
    norm = nn.GroupNorm(4, cin).requires_grad_(False)
    nn.init.normal_(norm.weight, 1, 0.3)
    nn.init.normal_(norm.bias)
    rows = n if taps == (3, 3) else n * height
    x = last((torch.randn(n, cin, height, width) + 2).to(dtype))
    weight = (torch.randn(cout, cin, *taps) / (3 * taps[1] * cin) ** 0.5).to(dtype)
    rest = (
        torch.randn(cout),
        torch.randn(rows, cout),
        torch.rand(rows),
        last(torch.randn(n, cout, height, width).to(dtype)),
    )
    return x, weight, norm, rest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("taps", [(3, 3), (3, 1), (3, 1, 1)])
@pytest.mark.parametrize("size", SPATIAL)
def test_block_conv(size: tuple[int, ...], taps: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, norm, (bias, added, gain, residual) = arguments(*size, taps, dtype)  # type: ignore[arg-type]
    weight = weight.reshape(*weight.shape[:2], *taps)
    out = convolve.block_conv(x, weight, bias, norm.weight, norm.bias, norm.num_groups, norm.eps, added, gain, residual)
    assert out.dtype is dtype and out.is_contiguous(memory_format=torch.channels_last)
    assert (out - block(x, weight, bias, norm, added, gain, residual)).abs().max() < DTYPES[dtype]
    plain = convolve.block_conv(x, weight)
    expected = functional.conv2d(x.double(), weight.double().flatten(3), padding=(1, weight.shape[3] // 2))
    assert (plain - expected).abs().max() < DTYPES[dtype]


@pytest.mark.parametrize("taps", [(3, 3), (3, 1)])
def test_block_conv_gradients(taps: tuple[int, int]) -> None:
    x, weight, norm, (bias, added, gain, residual) = arguments(2, 32, 48, 12, 10, taps, torch.float32)
    inputs = [t.requires_grad_() for t in (x, added, residual)]
    ours = convolve.block_conv(
        x, weight, bias, norm.weight, norm.bias, norm.num_groups, norm.eps, added, gain, residual
    )
    along = torch.randn(ours.shape)
    theirs = block(x, weight, bias, norm, added, gain, residual)
    expected = torch.autograd.grad((theirs * along).sum(), inputs)
    for a, b in zip(torch.autograd.grad((ours * along).sum(), inputs), expected, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_upsampled_conv(dtype: torch.dtype) -> None:
    x, weight, _, (bias, *_) = arguments(2, 32, 48, 9, 10, (3, 3), dtype)
    wide = x.detach().double().requires_grad_()
    expected = functional.conv2d(
        functional.interpolate(wide, scale_factor=2.0, mode="nearest"), weight.double(), bias.double(), padding=1
    )
    out = convolve.upsampled_conv(x.requires_grad_(), weight, bias)
    assert (out - expected).abs().max() < DTYPES[dtype]
    along = torch.randn_like(out)
    (theirs,) = torch.autograd.grad((expected * along).sum(), wide)
    (ours,) = torch.autograd.grad((out * along).sum(), x)
    assert (ours - theirs).abs().max() < DTYPES[dtype] * theirs.abs().max()


def test_a_image_does_not_depend_on_its_neighbours_or_threads() -> None:
    x, weight, norm, _ = arguments(7, 32, 32, 12, 20, (3, 3), torch.float32)
    whole = convolve.block_conv(x, weight, None, norm.weight, norm.bias, 4, 1e-6)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = convolve.block_conv(last(x[3:4]), weight, None, norm.weight, norm.bias, 4, 1e-6)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole[3:4], alone)


def test_a_weight_that_was_written_to_is_packed_again() -> None:
    x, weight, _, _ = arguments(1, 32, 32, 16, 20, (3, 3), torch.float32)
    before = convolve.block_conv(x, weight)
    weight.mul_(2)
    assert (convolve.block_conv(x, weight) - 2 * before).abs().max() < 1e-4
    held = len(calls._derived)
    del weight
    assert len(calls._derived) == held - 1  # what was made of it goes with it


def test_a_weight_for_other_channels_is_refused() -> None:
    x, weight, _, _ = arguments(1, 48, 32, 16, 20, (3, 3), torch.float32)
    for call in (convolve.block_conv, lambda x, w: convolve.upsampled_conv(x, w, None)):
        with pytest.raises(ValueError, match="for 32 channels"):
            call(x[:, :32], weight)
    with pytest.raises(ValueError, match="for 20 channels"):
        linear.linear(torch.randn(256, 20), torch.randn(32, 16), None)


def test_what_the_kernels_leave_to_torch() -> None:
    x, weight, _, _ = arguments(1, 32, 32, 16, 20, (3, 3), torch.float32)
    assert convolve.fits(x, weight)
    assert not convolve.fits(x, weight.requires_grad_())
    with torch.no_grad():
        assert convolve.fits(x, weight)
    assert not convolve.fits(x.half(), weight.detach())
    assert not convolve.fits(x[:, :20], weight.detach()[:, :20])
    assert not convolve.fits(x.to("meta"), weight.detach())
    assert not convolve.fits(x, torch.randn(32, 32, 1, 1))
    assert not attend.fits(torch.randn(2, 300, 64), 2) and not attend.fits(torch.randn(2, 30, 64), 2)  # grad mode


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 48, 9, 5), (1, 32, 40, 47), (2, 64, 5, 6, 31)])
def test_norm_silu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    group_norm = nn.GroupNorm(4, shape[1]).requires_grad_(False)
    nn.init.normal_(group_norm.weight)
    nn.init.normal_(group_norm.bias)
    x = (torch.randn(shape[0], *shape[2:], shape[1]) * 3 + 100).to(dtype).movedim(-1, 1).requires_grad_()
    wide = x.detach().double().requires_grad_()
    expected = functional.silu(
        functional.group_norm(wide, 4, group_norm.weight.double(), group_norm.bias.double(), group_norm.eps)
    )
    out = norm.norm_silu(x, group_norm)
    assert norm.ordered(out) and (out - expected).abs().max() < DTYPES[dtype]
    along = torch.randn_like(out)
    (theirs,) = torch.autograd.grad((expected * along).sum(), wide)
    (ours,) = torch.autograd.grad((out * along).sum(), x)
    assert (ours - theirs).abs().max() < DTYPES[dtype] * theirs.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate(dtype: torch.dtype) -> None:
    both = (torch.randn(3, 7, 96) * 3).to(dtype).requires_grad_()
    wide = both.detach().double().requires_grad_()
    value, gated = wide.chunk(2, dim=-1)
    expected, out = value * functional.gelu(gated), gate.gate(both)
    assert (out - expected).abs().max() < DTYPES[dtype] * expected.abs().max() / 5
    along = torch.randn_like(out)
    (theirs,) = torch.autograd.grad((expected * along).sum(), wide)
    (ours,) = torch.autograd.grad((out * along).sum(), both)
    assert (ours - theirs).abs().max() < DTYPES[dtype] * theirs.abs().max() / 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "heads"), [((3, 180, 64), 2), ((2, 45, 128), 4), ((1, 256, 48), 3), ((2, 11, 7, 96), 2)]
)
def test_attend(shape: tuple[int, ...], heads: int, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(shape).to(dtype) * 2 for _ in range(3))
    split = [t.double().unflatten(-1, (heads, -1)).transpose(1, -2) for t in (q, k, v)]  # (N, heads, [S,] tokens, D)
    expected = functional.scaled_dot_product_attention(*split, scale=0.2).transpose(1, -2).flatten(-2)
    assert (attend.attend(q, k, v, heads, 0.2) - expected).abs().max() < DTYPES[dtype]


@pytest.mark.parametrize("residual", [True, False])
def test_feed_forward(residual: bool) -> None:
    x, norm_weight, norm_bias = torch.randn(333, 48), torch.randn(48), torch.randn(48)
    w1, b1, w2, b2 = torch.randn(256, 48) / 7, torch.randn(256), torch.randn(48, 128) / 11, torch.randn(48)
    wide = [t.double() for t in (x, norm_weight, norm_bias, w1, b1, w2, b2)]
    value, gated = functional.linear(functional.layer_norm(wide[0], (48,), *wide[1:3]), *wide[3:5]).chunk(2, dim=-1)
    expected = functional.linear(value * functional.gelu(gated), *wide[5:]) + residual * wide[0]
    out = feed_forward.feed_forward(x, norm_weight, norm_bias, 1e-5, w1, b1, w2, b2, residual)
    assert (out - expected).abs().max() < 1e-4


@pytest.mark.parametrize("size", [(333, 48, 112), (1, 640, 16), (129, 16, 1040)])
def test_linear(size: tuple[int, int, int]) -> None:
    rows, width, wide = size
    x, weight, bias = torch.randn(3, rows, width), torch.randn(wide, width) / width**0.5, torch.randn(wide)
    wide_x = x.double().requires_grad_()
    expected = functional.linear(wide_x, weight.double(), bias.double())
    out = linear.linear(x.requires_grad_(), weight, bias)
    assert (out - expected).abs().max() < 1e-5
    assert (linear.linear(x, weight, None) - (expected - bias)).abs().max() < 1e-5
    along = torch.randn_like(out)
    (theirs,) = torch.autograd.grad((expected * along).sum(), wide_x)
    (ours,) = torch.autograd.grad((out * along).sum(), x)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("setting", [("PERSISTWORLD_NATIVE", "0"), ("PATH", "/nowhere")])
def test_without_kernels(setting: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*setting)
    assert build.library.__wrapped__() is None


def test_a_compiler_that_fails_is_said_and_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "g++").write_text(
        "#!/bin/sh\n[ $1 = -dumpfullversion ] && echo 1 && exit\necho 'error: broken' >&2\nexit 1\n"
    )
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert build.library.__wrapped__() is None and "broken" in caplog.text
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.mark.parametrize("rows, rank, width", [(700, 16, 48), (1333, 5, 96), (520, 32, 16)])
def test_outer(rows: int, rank: int, width: int) -> None:
    t, x = torch.randn(rows, rank), torch.randn(rows, width)
    assert outer.fits(t, x) and not outer.fits(t.double(), x) and not outer.fits(t, x[:, :-1])
    assert (outer.outer(t, x) - t.double().t() @ x.double()).abs().max() < 1e-3  # of sums of up to 1333 numbers


@pytest.mark.parametrize("across", [1, 3])
@pytest.mark.parametrize("size", [(3, 7, 13), (2, 36, 20), (2, 1, 1), (1, 300, 1), (1, 2, 300)])
def test_conv_weight_gradient(size: tuple[int, int, int], across: int) -> None:
    grad, x = torch.randn(*size, 6), torch.randn(*size, 32)
    ours = outer.conv_weight_gradient(grad, x, (3, across))
    weight = torch.zeros(6, 32, 3, across, dtype=torch.double, requires_grad=True)
    out = functional.conv2d(x.double().movedim(-1, 1), weight, padding=(1, across // 2))
    (expected,) = torch.autograd.grad((out * grad.double().movedim(-1, 1)).sum(), weight)
    assert (ours - expected).abs().max() < 1e-3
