"""The kernel of docs/add-a-kernel.md runs as it stands there, and passes the test that stands there."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "add-a-kernel.md"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3, 700), (2, 5, 1024)])
def test_the_page_s_kernel_passes_the_page_s_test(dtype, shape, device, tmp_path) -> None:
    kernel, test, _ = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    file = tmp_path / "geglu.py"  # a file: Triton reads a kernel's source
    file.write_text(f"{kernel}\n\nimport pytest\n\n{test}", encoding="utf-8")
    spec = importlib.util.spec_from_file_location("geglu_of_the_page", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    module.test_geglu(dtype, shape, device)
    with pytest.raises(ValueError, match="geglu needs a and b alike"):
        module.geglu(torch.ones(2, device=device), torch.ones(3, device=device))
