"""What the compiler makes of the built-in models is what it made of them before."""

from __future__ import annotations

import golden
import pytest


@pytest.mark.parametrize(("example", "target"), golden.CASES, ids=map("-".join, golden.CASES))
def test_every_stage_of_a_built_in_model_is_as_recorded(example: str, target: str) -> None:
    if example != "transformer-encoder":
        pytest.importorskip("transformers")
    before = golden.recorded()[example][target]
    now = golden.hashes(golden.stages(example, target))
    assert list(now) == list(before)
    changed = [
        f"{stage} of {example} on {target}\n{golden.difference(before[stage], now[stage])}"
        for stage in now
        if now[stage] != before[stage]
    ]
    assert not changed, "\n".join(["`make golden` records what changed:", *changed])


def test_every_built_in_model_and_kind_of_target_is_recorded() -> None:
    assert {example.model for example in golden.EXAMPLES.values()} == set(golden.zoo.CONFIGURATIONS)
    assert {(example, target) for example, targets in golden.recorded().items() for target in targets} == set(
        golden.CASES
    )


def test_sources_have_the_code_of_all_headers_that_they_include_and_no_comments() -> None:
    text = golden.stages("transformer-encoder", "avx2")["sources"]
    for header in ("abi.h", "simd.h", "attention/kernel.h", "attention/softmax.h"):
        assert f"\n{header}\n#pragma once\n" in text
    assert "//" not in text and "/*" not in text and "\n\n" not in text
    gpu = golden.stages("transformer-encoder", "sm_90")["sources"]
    assert "\ncuda/attention/kernel.cuh\n#pragma once\n" in gpu and "\ncuda/emulator.h\n" not in gpu


def test_a_difference_names_the_lines_that_changed() -> None:
    first, second = (golden.hashes({"plan": f"kernel0 {n}\nkernel1 3\n"})["plan"] for n in (1, 2))
    assert golden.difference(first, second).split("\n")[1:] == ["    -kernel0 1", "    +kernel0 2"]
    assert "never made here" in golden.difference(None, second)
