"""`import fuser` is light."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def loaded_by(code: str) -> set[str]:
    program = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("code", ["import fuser", "import fuser.ir.masks", "import fuser; fuser.masks.Causal()"])
def test_importing_masks_loads_no_compiler(code: str) -> None:
    # What torch itself loads is not fuser's to avoid.
    added = loaded_by(code) - loaded_by("import torch, numpy")
    heavy = {"torch._dynamo", "torch._inductor", "torch.export", "transformers", "matplotlib", "jinja2", "rich"}
    assert added & heavy == set()
    assert not any(
        name.startswith(("fuser.codegen", "fuser.kernels", "fuser.search", "fuser.frontend.capture")) for name in added
    )


def test_bare_import_loads_only_the_face() -> None:
    added = loaded_by("import fuser")
    assert {name for name in added if name.split(".")[0] == "fuser"} == {"fuser"}
    assert "torch" not in added


def test_the_command_line_starts_without_torch() -> None:
    assert "torch" not in loaded_by("import fuser.cli")


def test_every_exported_name_exists() -> None:
    import fuser

    for name in fuser.__all__:
        assert getattr(fuser, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = fuser.nothing_like_this
