"""Records vectors.json on the card at hand, whether or not it agrees; returns 1 where it does not."""

import json
import sys
import tempfile
from pathlib import Path

import torch

from . import CASES, VECTORS, compile_for, run_on_card, to_text


def main() -> int:
    if not torch.cuda.is_available():
        print("golden: no GPU here", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
        library = compile_for(architecture, Path(folder) / "golden.so")
        if library is None:
            print("golden: no nvcc here", file=sys.stderr)
            return 2
        outputs = {name: run_on_card(library, case) for name, case in CASES.items()}
    vectors = {
        name: {"inputs": to_text(case.inputs), "outputs": to_text(outputs[name])}
        for name, case in CASES.items()
    }
    about = {"device": torch.cuda.get_device_name(), "architecture": architecture, "cuda": torch.version.cuda}
    VECTORS.write_text(json.dumps({**about, "vectors": vectors}, indent=1) + "\n")
    wrong = {name: int(case.wrong(outputs[name]).sum()) for name, case in CASES.items()}
    for name, count in wrong.items():
        print(f"{'differs' if count else 'as expected':12} {name}" + f": {count} words" * bool(count))
    print(f"wrote {VECTORS}")
    return 1 if any(wrong.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
