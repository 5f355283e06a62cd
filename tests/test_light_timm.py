"""Networks of timm without PyTorch's compiler, which comes when something asks for more of it."""

import subprocess
import sys

BUILDING = """
import sys
import torch
from csflow.model import Backbone

disable = torch.compiler.disable
Backbone("tf_efficientnet_lite0")
assert "torch._dynamo" not in sys.modules
assert torch.compiler.disable is disable
assert "torch._dynamo.utils" not in sys.modules
"""
COMPILING = "assert torch.compile(torch.nn.Linear(2, 3), backend='eager')(torch.ones(1, 2)).shape == (1, 3)"
LOADING = """
import sys
from csflow.model_directory import read_model
from csflow.storage import Location

files = read_model(Location(sys.argv[1]))
files.head()
files.detector()
assert "torch._dynamo" not in sys.modules
"""
ASKING_FOR_MORE = """
import sys
from csflow.model.light_timm import UTILS, _without_compiler

with _without_compiler():
    assert "torch._dynamo" not in sys.modules
    from torch._dynamo.utils import counters
import torch._dynamo
assert counters is torch._dynamo.utils.counters
"""


def succeeds(program: str, *arguments: str) -> None:
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_network_is_built_without_the_compiler_which_can_be_used_afterwards():
    succeeds(BUILDING + COMPILING)


def test_a_model_is_loaded_without_the_compiler(model):
    succeeds(LOADING, str(model))


def test_what_a_later_release_may_ask_of_the_compiler_loads_it():
    succeeds(ASKING_FOR_MORE)
