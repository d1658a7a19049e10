"""Which frame of a stack is told as the place of a call: the innermost of the user's."""

from __future__ import annotations

import os

import torch

import fsa_compile
from fsa_compile.lowering.where import innermost

HERE = __file__


def test_a_frame_of_the_demo_is_a_users_frame() -> None:
    api, demo = fsa_compile.api.__file__, fsa_compile.api.__file__.replace("api.py", "demo/model.py")
    frames = [(HERE, 1), (demo, 2), (torch.nn.functional.__file__, 3), (api, 4)]
    assert innermost(frames) == f"{demo}:2"
    assert innermost([(api, 4)]) == f"{api}:4"
    assert innermost([]) is None


def test_a_caller_whose_path_begins_like_the_packages_is_a_users() -> None:
    api = fsa_compile.api.__file__
    package = os.path.dirname(api)
    for caller in (f"{package}_train.py", f"{package}_models/model.py"):
        assert innermost([(HERE, 1), (caller, 2), (api, 3)]) == f"{caller}:2"
