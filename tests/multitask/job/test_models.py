"""The backbone of a job."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from multitask.job.models import load_backbone
from multitask.spec.schema import JobSpec


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_job_holds_its_backbone_in_float32_whatever_its_weights_file_holds(
    make_spec: Callable[..., JobSpec], tmp_path: Path, dtype: torch.dtype
) -> None:
    spec = make_spec()
    other = load_backbone(spec, weights=None).to(dtype)
    other.save(tmp_path / "weights.safetensors")

    loaded = load_backbone(spec, str(tmp_path / "weights.safetensors")).network.state_dict()

    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32, torch.int64}
    assert all(
        torch.equal(tensor, loaded[name].to(tensor.dtype)) for name, tensor in other.network.state_dict().items()
    )
