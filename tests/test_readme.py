"""README's code runs, its links exist, and its commands are commands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cuda_cnn import functional, nn
from cuda_cnn.cli import COMMANDS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""
FUSE = (ROOT / "docs/fuse.md").read_text(encoding="utf-8") if (ROOT / "docs/fuse.md").exists() else ""


@pytest.mark.parametrize("number", range(TEXT.count("```python")))
def test_code_runs(number):
    code = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[number]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_links_exist():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links and all((ROOT / link).exists() for link in links if "://" not in link), links


def test_commands_exist():
    named = set(re.findall(r"cuda-cnn ([a-z]+) ", TEXT))
    assert {"train", "predict", "env"} <= named <= set(COMMANDS)


def test_operators_are_all_listed():
    rows = re.findall(r"^\| `(\w+)`.* \| `(\w+)` \| ", TEXT, re.MULTILINE)
    fused = {"channel_map", "channel_statistics", "conv2d_fused"}  # no layer of their own
    assert all(f"`{name}`" in FUSE or f".{name}(" in FUSE for name in fused)
    assert {f for f, _ in rows} >= set(functional.__all__) - {"cat", "write_channels_"} - fused
    assert all(hasattr(functional, f) and hasattr(nn, m) for f, m in rows)
