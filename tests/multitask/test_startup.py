"""A process that trains does without torch.compile, and can use it all the same."""

import subprocess
import sys

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


def test_torch_compile_is_imported_when_something_is_compiled() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)

    assert done.stdout == "False [2.0, 2.0] True True\n", done.stderr
