"""The pytest plugin: PyTorch's own tests on these kernels, counted."""

import os
import re
import subprocess
import sys
from pathlib import Path

SUITES = Path(__file__).parent / "suites"


def run_pytest(*arguments, **environment):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "cuda_cnn.testing",
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)


def test_pytorchs_suite_runs_on_our_kernels():
    done = run_pytest(str(SUITES / "pytorch_parts.py"))
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    reached, fell = map(
        int, re.search(r"(\d+) calls reached cuda_cnn's kernels, (\d+) fell", done.stdout).groups()
    )
    assert reached > 1000 and fell > 0
    for name in (
        "convolution",
        "convolution_backward",
        "max_pool2d_with_indices",
        "native_batch_norm",
        "cat",
    ):
        assert re.search(rf"^ +[1-9]\d*  {name}$", done.stdout, re.MULTILINE), done.stdout
    assert "1-D convolution" in done.stdout


def test_the_plugin_can_be_limited_and_adds_up_its_processes(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest, torch\n"
        "@pytest.mark.parametrize('i', [1, 2])\n"
        "def test_it(i):\n"
        "    x = torch.ones(1, 2, 4, 4)\n"
        "    torch.nn.functional.conv2d(x, x)\n"
        "    torch.cat([x, x])\n"
    )
    done = run_pytest(str(tmp_path), "-n", "2", CUDA_CNN_OPS="conv2d,max_pool2d")
    assert "2 calls reached cuda_cnn's kernels, 0 fell back" in done.stdout, done.stdout + done.stderr
    assert "2  convolution\n" in done.stdout and "cat" not in done.stdout
