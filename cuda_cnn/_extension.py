"""Loads the extension module, after a look at whether it fits: importing this registers the operators."""

from cuda_cnn._build_info import build_info, build_note, check_build

check_build()

from cuda_cnn import _C  # noqa: E402

_C.set_build_note(build_note(build_info()))
