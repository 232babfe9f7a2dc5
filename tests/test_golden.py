"""Wrappers of PTX instructions against the ISA's text and against what a card was seen to do: tests/golden."""

import re

import golden
import numpy as np
import pytest
import torch
from emulation import Engine, Unavailable
from emulation.build import KERNELS, ROOT, build


@pytest.fixture(scope="module")
def engine() -> Engine:
    try:
        return Engine(build("planted", KERNELS))
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    return golden.compile_for(architecture, tmp_path_factory.mktemp("golden") / "golden.so") or pytest.skip(
        "no nvcc"
    )


def emulate(engine: Engine, case: golden.Case, inputs: golden.Words) -> golden.Words:
    source = torch.from_numpy(inputs.view(np.int32).copy())
    result = torch.zeros(case.expected.shape, dtype=torch.int32)
    with engine.options(races=True, bounds=True), engine.registered([source, result]):
        assert golden.call(engine.library, case, result.data_ptr(), source.data_ptr()), engine.report
    return result.numpy().view(np.uint32)


def assert_as(case: golden.Case, actual: golden.Words, expected: golden.Words) -> None:
    bad = np.argwhere(case.wrong(actual, expected))
    assert not len(bad), (
        f"{case.function}: {len(bad)} words of {actual.size} differ, first lane {bad[0][0]} word {bad[0][1]}: "
        f"{actual[tuple(bad[0])]:08x}, expected {expected[tuple(bad[0])]:08x}"
    )


@pytest.mark.parametrize("name", golden.CASES)
def test_emulation_is_what_the_isa_says(engine, name):
    case = golden.CASES[name]
    assert_as(case, emulate(engine, case, case.inputs), case.expected)


@pytest.mark.parametrize("name", golden.CASES)
def test_emulation_is_what_a_card_did(engine, name):
    vectors = golden.recorded()
    if vectors is None:
        pytest.skip("no vectors have been recorded on a card yet")
    case, seen = golden.CASES[name], vectors[name]
    assert_as(case, emulate(engine, case, seen["inputs"]), seen["outputs"])


@pytest.mark.parametrize("name", golden.CASES)
def test_card_is_what_the_isa_says(card, name):
    case = golden.CASES[name]
    assert_as(case, golden.run_on_card(card, case), case.expected)


def test_every_wrapper_has_a_case():
    text = (ROOT / "csrc/cuda/ptx.cuh").read_text()
    wrappers = set(re.findall(r"^__device__ __forceinline__ \w+ (\w+)\(", text, re.MULTILINE))
    assert "mma_bf16" in wrappers and "load_matrix" in wrappers
    kernels = golden.SOURCE.read_text()
    assert {name for name in wrappers if f"ptx::{name}" not in kernels} == set()


def test_a_wrong_layout_would_be_seen():
    """Every operand's element counts: exchanging two neighbouring words of one lane changes what is expected."""
    for kind, place in (("bf16", golden.place_16(np.arange(8))), ("tf32", golden.place_tf32(np.arange(4)))):
        for row, column in place:
            pairs = set(zip(row.ravel().tolist(), column.ravel().tolist(), strict=True))
            assert len(pairs) == row.size, f"{kind}: two elements in one place"


def test_nvcc_compiles_the_kernels(tmp_path):
    if golden.find_nvcc() is None:
        pytest.skip("no nvcc on this machine")
    assert golden.compile_for("sm_80", tmp_path / "golden.so")
