import json
import subprocess
import sys

import pytest
import torch

from cuda_cnn import _C, cli, env, functional


def test_json_tells_what_was_built(capsys):
    assert cli.main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["build"]["torch"] == report["versions"]["torch"] == torch.__version__
    assert report["build"]["cuda"] is _C.with_cuda and report["build"]["why"]
    assert report["cpu"]["instruction_set"] in report["cpu"]["instruction_sets"]
    assert set(report["operators"]) == set(env.SELF_TESTS)
    assert all(set(results) >= set(_C.cpu_isas()) for results in report["operators"].values())


def test_text_names_the_same(capsys):
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and _C.cpu_isa() in text and "All is well." in text
    assert all(name in text for name in env.SELF_TESTS)


@pytest.mark.parametrize("name", env.SELF_TESTS)
def test_every_operator_passes_wherever_it_runs(name):
    cuda = ["cuda"] if _C.with_cuda and torch.cuda.is_available() else []
    assert env.self_test(name) == dict.fromkeys([*_C.cpu_isas(), *cuda], "ok")


@pytest.mark.parametrize("what", ["value", "gradient", "raises", "nan"])
def test_a_wrong_operator_fails(monkeypatch, capsys, what):
    right = functional.local_response_norm

    def wrong(x, *parameters):
        if what == "raises":
            raise RuntimeError("deliberately broken")
        y = right(x, *parameters)
        if what == "nan":
            return y * float("nan")
        return y * 1.001 if what == "value" else y + 1e-3 * (x - x.detach())

    monkeypatch.setattr(functional, "local_response_norm", wrong)
    assert cli.main(["env"]) == 1
    text = capsys.readouterr().out
    assert "failed: " in text and "FAILED" in text
    assert {"value": "output", "gradient": "gradient 0", "raises": "deliberately broken", "nan": "nan"}[
        what
    ] in text


def test_instruction_set_is_restored_and_refused():
    before = _C.cpu_isa()
    env.self_test("local_response_norm")
    assert _C.cpu_isa() == before
    with pytest.raises(ValueError, match="instruction set mmx is not in this build"):
        _C.set_cpu_isa("mmx")


@pytest.mark.parametrize("isa", _C.cpu_isas())
def test_environment_variable_chooses_the_instruction_set(isa, monkeypatch):
    monkeypatch.setenv("CUDA_CNN_CPU_ISA", isa)
    command = [sys.executable, "-m", "cuda_cnn", "env", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert json.loads(result.stdout)["cpu"]["instruction_set"] == isa
