"""What the operator tests share: dtypes, layouts, inputs, and comparisons that name the first bad element."""

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels_last", "sliced", "transposed", "offset"]

# Unit roundoff of what a kernel returns.
ROUNDOFF = {torch.float64: 2**-53, torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; a rank without channels_last stays contiguous there."""
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "channels_last":
        if tensor.dim() in (4, 5):
            format = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
            return tensor.contiguous(memory_format=format)
        return tensor.contiguous()
    if layout == "sliced":
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), float("nan"))
        wide[..., 1::2] = tensor
        return wide[..., 1::2]
    if layout == "transposed":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "offset":  # not aligned to any vector
        flat = tensor.new_full((tensor.numel() + 1,), float("nan"))
        flat[1:] = tensor.flatten()
        return flat[1:].view(tensor.shape)
    if layout == "slice":  # of a wider tensor's channels, channels_last, from an odd one on
        n, c, *plane = tensor.shape
        wide = tensor.new_full((n, c + 2, *plane), float("nan")).contiguous(memory_format=torch.channels_last)
        wide[:, 1:-1] = tensor
        return wide[:, 1:-1]
    raise ValueError(layout)


def integers(*shape: int, dtype: torch.dtype, low: int = -4, high: int = 5, seed: int = 0) -> Tensor:
    """Small whole numbers: sums and products of them are exact in every dtype while they stay below 2⁸."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).to(dtype)


def reals(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _report(actual: Tensor, expected: Tensor, bad: Tensor, what: str) -> str:
    index = tuple(int(i) for i in bad.nonzero()[0])
    return (
        f"{what}: {int(bad.sum())} of {bad.numel()} elements are wrong, the first at {index}: "
        f"got {actual[index].item()!r}, expected {expected[index].item()!r}"
    )


def assert_bitwise(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Same shape, dtype and values; NaN equals NaN, and −0 equals 0."""
    assert actual.shape == expected.shape, (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    bad = ~((actual == expected) | (actual.isnan() & expected.isnan()))
    assert not bad.any(), _report(actual, expected, bad, what)


def assert_accurate(
    actual: Tensor,
    exact: Tensor,
    torch_result: Tensor | None = None,
    *,
    ulps: float = 4,
    what: str = "result",
) -> None:
    """Within `ulps` roundoffs of max(|exact|, its mean size), or twice torch's own largest error if that is more.

    exact is the float64 result for the same (already rounded) inputs.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    actual, exact = actual.detach().cpu(), exact.detach().cpu()
    if exact.numel() == 0:
        return
    finite = exact[exact.isfinite()]
    size = finite.abs().mean() if finite.numel() else exact.new_zeros(())
    bound = ulps * ROUNDOFF[actual.dtype] * torch.maximum(exact.abs(), size)
    if torch_result is not None:
        error = (torch_result.detach().cpu().double() - exact).abs()
        error = error[error.isfinite()]
        if error.numel():
            bound = torch.maximum(bound, 2 * error.max())
    difference = (actual.double() - exact).abs()
    same = (difference <= bound) | (actual.double() == exact) | (actual.isnan() & exact.isnan())
    assert same.all(), _report(actual, exact, ~same, what)
