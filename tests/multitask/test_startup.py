"""A process that a run starts does without torch.compile, and can use it all the same; a user's is left alone."""

import os
import subprocess
import sys

from multitask.startup import RUN_PROCESS

CODE = """
import sys
import multitask.startup
from multitask.engines import ENGINES
import torch
from multitask.server.optimizers import OPTIMIZERS, make_optimizer

for name in OPTIMIZERS:
    values = [torch.zeros(2), torch.zeros(2)]
    optimizer = make_optimizer(name, *values, weight_decay=0.1)
    for buffer in values:
        buffer.grad = torch.ones(2)
    optimizer.step()
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
torch.distributed.destroy_process_group()
imported = "torch._dynamo.eval_frame" in sys.modules
compiled = torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(2)).tolist()
real = sys.modules["torch._dynamo"]
multitask.startup.put_off_torch_compile()
print(imported, compiled, real.__file__ is not None, sys.modules["torch._dynamo"] is real)
"""
A_USERS_PROCESS = """
import sys
import multitask
loaded = sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "ray", "multitask"})
[getattr(multitask, name) for name in multitask.__all__]
stand_ins = [name for name, module in sys.modules.items() if type(module).__module__ == "multitask.startup"]
print(loaded, stand_ins)
"""
COMMAND = """
import contextlib, io, sys
from jobs import cli
sys.argv = ["multitask", "--help"]
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    cli.main()
import multitask.engines
print("torch._dynamo.eval_frame" in sys.modules)
"""


def run(code: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != RUN_PROCESS} | variables
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_compile_is_imported_when_something_is_compiled() -> None:
    assert run(CODE, **{RUN_PROCESS: "1"}) == "False [2.0, 2.0] True True\n"


def test_importing_the_package_loads_nothing_and_leaves_the_modules_of_a_user_alone() -> None:
    assert run(A_USERS_PROCESS) == "['multitask'] []\n"


def test_the_command_does_without_torch_compile() -> None:
    assert run(COMMAND) == "False\n"
