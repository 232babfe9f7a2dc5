"""What each wrapper of csrc/cuda/ptx.cuh must give, written from the PTX ISA alone, and on a card recorded from it.

    PYTHONPATH=tests python -m golden          # on a machine with a GPU and nvcc: rewrites vectors.json

A case has the words that each of a warp's 32 lanes brings, and those that it must receive. The tests compare the
emulator with both `expected` and the recorded vectors, and a GPU with `expected`.
"""

import ctypes
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "kernels.cu"
VECTORS = HERE / "vectors.json"

Words = np.ndarray  # uint32, [32 lanes][words]
LANES = np.arange(32)
GROUP, IN_GROUP = LANES // 4, LANES % 4


@dataclass(frozen=True)
class Case:
    """`function` of kernels.cu. tolerance: of float32 results, over the sum of their terms' sizes; None: bit by bit."""

    function: str
    inputs: Words
    expected: Words
    tolerance: np.ndarray | None = None

    def wrong(self, actual: Words, expected: Words | None = None) -> np.ndarray:
        """Where the lanes' words are not as expected."""
        expected = self.expected if expected is None else expected
        if self.tolerance is None:
            return actual != expected
        a, e = (words.view(np.float32).astype(float) for words in (actual, expected))
        with np.errstate(invalid="ignore"):  # infinity beside infinity
            return ~((a == e) | (np.abs(a - e) <= self.tolerance))


def words(array: np.ndarray) -> Words:
    return np.ascontiguousarray(array).view(np.uint32)


def columns(*arrays: np.ndarray) -> Words:
    """Side by side, each of one word a lane or several."""
    return np.concatenate([np.reshape(a, (32, -1)).astype(np.uint32) for a in arrays], axis=1)


# ---- asynchronous copies: the first source_bytes, then zeros -------------------------------------------------


def copies(function: str) -> Case:
    source = np.random.default_rng(1).integers(0, 256, (32, 16), dtype=np.uint8)
    count = LANES % 17  # 0 … 16 bytes
    expected = np.where(np.arange(16) < count[:, None], source, 0).astype(np.uint8)
    # 16 bytes, the count, and three words more: sources stay aligned
    return Case(function, columns(words(source), count, np.zeros((32, 3))), words(expected))


# ---- ldmatrix: lane 8i + r names row r of matrix i; lane l receives elements 2(l%4) and the next of row l/4 ---


def load_matrix(matrices: int, transposed: bool) -> Case:
    rows = np.random.default_rng(2).integers(0, 2**16, (32, 8), dtype=np.uint16)
    named = LANES * 11 % 32  # a permutation
    expected = np.empty((32, matrices, 2), np.uint16)
    for i in range(matrices):
        matrix = rows[named[8 * i : 8 * i + 8]]
        matrix = matrix.T if transposed else matrix
        for half in range(2):
            expected[:, i, half] = matrix[GROUP, 2 * IN_GROUP + half]
    name = f"load_matrix_{matrices}" + "_transposed" * transposed
    return Case(name, columns(words(rows), named), words(expected).reshape(32, matrices))


# ---- mma.sync: where the ISA places element i of a lane ------------------------------------------------------


def place_16(i: np.ndarray) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """m16n8k16 of 16-bit types: (row, column) of a[0 … 7] and of b[0 … 3]."""
    g, t = GROUP[:, None], IN_GROUP[:, None]
    upper = (i < 2) | ((i >= 4) & (i < 6))
    a = (np.where(upper, g, g + 8), 2 * t + (i & 1) + np.where(i < 4, 0, 8))
    j = i[:4]
    return a, (2 * t + (j & 1) + np.where(j < 2, 0, 8), g + 0 * j)


def place_tf32(i: np.ndarray) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """m16n8k8 of TF32: (row, column) of a[0 … 3] and of b[0 … 1]."""
    g, t = GROUP[:, None], IN_GROUP[:, None]
    a = (np.where(i % 2 == 0, g, g + 8), np.where(i < 2, t, t + 4))
    j = i[:2]
    return a, (np.where(j == 0, t, t + 4), g + 0 * j)


def place_sum() -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of d[0 … 3]."""
    i = np.arange(4)
    return np.where(i < 2, GROUP[:, None], GROUP[:, None] + 8), 2 * IN_GROUP[:, None] + (i & 1)


ENCODE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "bf16": lambda x: (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16),
    "fp16": lambda x: x.astype(np.float16).view(np.uint16),
    "tf32": lambda x: x.astype(np.float32).view(np.uint32),
}
FRACTION_BITS = {"bf16": 7, "fp16": 10, "tf32": 10}


def mma(kind: str, whole: bool) -> Case:
    """Small whole numbers, whose sums are exact in any order; else reals, within what float32 sums may lose."""
    depth = 8 if kind == "tf32" else 16
    generator = np.random.default_rng(3)

    def numbers(*shape: int) -> np.ndarray:
        if whole:
            return generator.integers(-16, 17, shape).astype(float)
        bits = 2.0 ** FRACTION_BITS[kind]
        return np.round(generator.uniform(-1, 1, shape) * bits) / bits

    a, b, d = numbers(16, depth), numbers(depth, 8), numbers(16, 8)
    place = place_tf32(np.arange(4)) if kind == "tf32" else place_16(np.arange(8))
    inputs = columns(
        words(ENCODE[kind](a[place[0]])),
        words(ENCODE[kind](b[place[1]])),
        words(d[place_sum()].astype(np.float32)),
    )
    expected = words((d + a @ b).astype(np.float32)[place_sum()])
    # The hardware may truncate each addition at 2^-23 of the largest term or more: no rounding is promised.
    tolerance = None if whole else (2.0**-20 * (np.abs(d) + np.abs(a) @ np.abs(b)))[place_sum()]
    return Case(f"mma_{kind}", inputs, expected, tolerance)


# ---- conversions ---------------------------------------------------------------------------------------------

# Signed zeros, infinities, NaNs, the largest numbers, ties to even and away from zero, subnormal numbers.
EDGES = (
    "00000000 80000000 7f800000 ff800000 7fc00000 7f800001 7f7fffff ff7fffff 3f800000 3f801000 3f803000 3f800fff "
    "3f808000 3f818000 3f807fff 3f808001 477fefff 477ff000 477fe000 38800000 387fe000 33000000 33000001 33800000 "
    "33c00000 00800000 007fffff 00000001 c0490fdb 40490fdb 3eaaaaab 4b800001"
)
BITS = np.array([int(text, 16) for text in EDGES.split()], np.uint32)
FLOATS = BITS.view(np.float32)


def round_tf32() -> Case:
    magnitude, sign = BITS & 0x7FFFFFFF, BITS & 0x80000000
    rounded = sign | ((magnitude + 0x1000) & 0xFFFFE000)  # half a unit away from zero, then cut
    expected = np.where(magnitude > 0x7F800000, 0x7FFFFFFF, np.where(magnitude == 0x7F800000, BITS, rounded))
    return Case("round_tf32", columns(BITS), columns(expected))


def to_bf16(bits: np.ndarray) -> np.ndarray:
    rounded = (bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFF, rounded).astype(np.uint32)


def to_fp16(floats: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        halves = floats.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(floats), 0x7FFF, halves).astype(np.uint32)


def pack(kind: str) -> Case:
    high = np.roll(BITS, 7)
    convert = to_bf16 if kind == "bf16" else lambda bits: to_fp16(bits.view(np.float32))
    return Case(f"pack_{kind}", columns(BITS, high), columns(convert(BITS) | convert(high) << 16))


def unpack_fp16() -> Case:
    halves = np.array([0, 1, 0x3FF, 0x400, 0x3C00, 0x3C01, 0x7BFF, 0x7C00], np.uint16)
    halves = np.concatenate([halves, halves | 0x8000, np.arange(16, dtype=np.uint16) * 2017 + 5])
    halves = np.where((halves & 0x7FFF) > 0x7C00, 0x5555, halves).astype(np.uint16)  # NaNs have no one result
    return Case(
        "unpack_fp16", columns(halves), words(halves.view(np.float16).astype(np.float32)).reshape(32, 1)
    )


def sqrt_approx() -> Case:
    inputs = np.where((BITS & 0x80000000 == 0) & ~np.isnan(FLOATS), FLOATS, 2.0).astype(np.float32)
    exact = np.sqrt(inputs.astype(float))
    tolerance = np.where(np.isfinite(exact), exact * 2.0**-22, 0)[:, None]
    return Case("sqrt_approx", columns(words(inputs)), columns(words(exact.astype(np.float32))), tolerance)


# ---- shared memory and shuffles ------------------------------------------------------------------------------


def shared_access() -> Case:
    inputs = np.random.default_rng(4).integers(0, 2**32, (32, 4), dtype=np.uint32)
    turned = inputs[:, ::-1]
    return Case("shared_access", inputs, columns(inputs, turned, turned, turned))


def shuffle() -> Case:
    values = np.random.default_rng(5).integers(0, 2**32, 32, dtype=np.uint32)
    lane = (LANES * 7 + 3) % 32
    up, down = values[np.maximum(LANES - 1, 0)], values[np.minimum(LANES + 1, 31)]
    exchanged = [values[LANES ^ distance] for distance in (16, 8, 4, 2, 1)]
    return Case("shuffle", columns(values, lane), columns(values[lane], up, down, *exchanged))


CASES: dict[str, Case] = {
    **{name: copies(name) for name in ("copy_16", "copy_8", "copy_4")},
    **{case.function: case for case in (load_matrix(n, t) for n in (1, 2, 4) for t in (False, True))},
    **{f"mma_{kind}": mma(kind, whole=True) for kind in ENCODE},
    **{f"mma_{kind} of reals": mma(kind, whole=False) for kind in ENCODE},
    "round_tf32": round_tf32(),
    **{f"pack_{kind}": pack(kind) for kind in ("bf16", "fp16")},
    "unpack_fp16": unpack_fp16(),
    "sqrt_approx": sqrt_approx(),
    "shared_access": shared_access(),
    "shuffle": shuffle(),
}


# ---- on a card -----------------------------------------------------------------------------------------------


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def compile_for(architecture: str, library: Path) -> ctypes.CDLL | None:
    """kernels.cu through nvcc, for "sm_90" or so; None where there is no nvcc."""
    nvcc = find_nvcc()
    if nvcc is None:
        return None
    flags = ["-shared", "-Xcompiler", "-fPIC", f"-arch={architecture}", "-I", str(HERE.parents[1] / "csrc")]
    subprocess.run([nvcc, *flags, str(SOURCE), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def run_on_card(library: ctypes.CDLL, case: Case) -> Words:
    import torch

    inputs = torch.from_numpy(case.inputs.astype(np.int64)).to(torch.int64).cuda().to(torch.int32)
    result = torch.zeros(case.expected.shape, dtype=torch.int32, device="cuda")
    call(library, case, result.data_ptr(), inputs.data_ptr())
    torch.cuda.synchronize()
    return result.cpu().numpy().view(np.uint32)


def call(library: ctypes.CDLL, case: Case, result: int, inputs: int) -> bool:
    function = getattr(library, f"golden_{case.function}")
    function.restype = ctypes.c_bool
    return function(ctypes.c_void_p(inputs), ctypes.c_void_p(result))


def to_text(array: Words) -> list[str]:
    """A lane a line."""
    return [" ".join(f"{word:08x}" for word in lane) for lane in array]


def from_text(lines: list[str]) -> Words:
    return np.array([[int(word, 16) for word in line.split()] for line in lines], np.uint32)


def recorded() -> dict[str, dict[str, Words]] | None:
    """For each case the inputs and outputs that a card was seen to give; None: nobody has recorded any."""
    if not VECTORS.exists():
        return None
    vectors = json.loads(VECTORS.read_text())["vectors"]
    return {name: {key: from_text(lines) for key, lines in both.items()} for name, both in vectors.items()}
