"""What compiles kernels for devices that are not here, and judges them; `test_atlas` is about the kernels."""

from __future__ import annotations

import pytest

from bench.aot.checks import Request, problems, results
from bench.aot.targets import NUMBERS, TARGETS, why_skipped

pytest.importorskip("triton")


def compiled(target, numbers, cache, **changes):
    request = {"variants": ["forward/plain"], "batches": [64], "hiddens": [100], "directions": [1], **changes}
    return list(results(Request(target, numbers, **request), cache))


def test_launching_code_that_fails_is_reported_and_not_the_end(tmp_path):
    found = compiled("sm90", ["bf16"], tmp_path, variants=["forward/nothing", "moments/narrow"], hiddens=[64])
    assert "launching fails" in found[0]["problems"][0]
    assert found[0]["kernel"] == "forward/nothing"
    assert found[-1]["problems"] == []


def test_a_layout_that_spills_is_found(tmp_path):
    layout = {"sequence": False, "units": 32, "batch_tile": 128, "inner": 64, "warps": 4, "stages": 2}
    found = compiled(
        "sm90", ["bf16"], tmp_path, variants=["forward/plain"], hiddens=[512], layout={**layout, "resident": False}
    )
    assert any("bytes of stack" in problem for result in found for problem in result["problems"])


def test_a_layout_that_is_too_large_is_found(tmp_path):
    layout = {"sequence": True, "units": 16, "batch_tile": 64, "inner": 1024, "warps": 8, "stages": 1}
    found = compiled(
        "sm86", ["bf16"], tmp_path, variants=["forward/plain"], hiddens=[1024], layout={**layout, "resident": True}
    )
    assert any("bytes of shared memory" in problem for result in found for problem in result["problems"])
    assert any("have to run at the same time" in problem for result in found for problem in result["problems"])


def good():
    """A result without a problem."""
    used = {"shared": 1000, "registers": 64, "stack": 0, "spills": 0, "matrix": {"HMMA": 8}, "instructions": 100}
    constants = {"PRECISION": "ieee", "SYNC": "assert"}
    return {
        "target": "sm90",
        "numbers": "bf16",
        "resources": used,
        "constants": constants,
        "options": {"num_warps": 4},
        "programs": 100,
    }


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"stack": 8}, "spills: 8 bytes"),
        ({"spills": 1}, "spills: 0 bytes of stack, 1"),
        ({"shared": 300_000}, "bytes of shared memory"),
        ({"matrix": {}}, "no matrix instruction"),
        ({"registers": 255, "shared": 200_000, "programs": 133}, "133 programs have to run at the same time, and 132"),
    ],
)
def test_what_is_a_problem(change, expected):
    result = good()
    result["programs"] = change.pop("programs", 100)
    result["resources"] = {**result["resources"], **change}
    found = problems(result)
    assert bool(found) == (expected is not None)
    assert expected is None or expected in " ".join(found)


def test_a_process_that_dies_is_reported(tmp_path, monkeypatch):
    monkeypatch.setitem(TARGETS, "sm00", TARGETS["sm90"]._replace(name="sm00"))  # which the process does not know
    (result,) = compiled("sm00", ["bf16"], tmp_path)
    assert "the compiling process exited with 1: KeyError: 'sm00'" in result["problems"][0]


def test_an_error_of_triton_is_a_problem(tmp_path):
    """It tells the reason, not the outermost call."""
    layout = {"sequence": False, "units": 1 << 19, "batch_tile": 16, "inner": 16, "warps": 4, "stages": 1}
    layout |= {"resident": False}  # a tile of 2²⁵ elements; Triton's largest has 2²⁰
    found = compiled("sm90", ["bf16"], tmp_path, variants=["forward/plain"], hiddens=[8], layout=layout)
    assert "exceeds triton maximum tensor numel" in found[0]["problems"][0]


SASS = """
\t.headerflags\t@"EF_CUDA_TEXMODE_UNIFIED"
.text.forward_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/             @!UP1 UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;
        /*0040*/                   STL [R1+0x4], R5 ;
        /*0050*/               @P2 LDL.LU R5, [R1+0x4] ;
.L_x_1:
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0070*/                   BRA `(.L_x_1) ;
"""
USAGE = "Function forward_kernel:\n  REG:168 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:520 TEXTURE:0 SURFACE:0 SAMPLER:0\n"


def test_resources_of_nvidia_machine_code():
    from bench.aot.compiler import nvidia_resources

    found = nvidia_resources(USAGE, SASS, 73_728)
    assert (found.shared, found.registers, found.stack, found.spills, found.instructions) == (73_728, 168, 8, 2, 8)
    assert found.matrix == {"HMMA": 1, "UTCHMMA": 1, "HGMMA": 1}
    with pytest.raises(ValueError, match="no resource usage"):
        nvidia_resources("cuobjdump: not a cubin", SASS, 0)


AMDGCN = """
forward_kernel:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
\tscratch_store_dword off, v1, s32
\ts_endpgm
    .private_segment_fixed_size: 24
    .sgpr_spill_count: 7
    .vgpr_count:     256
    .vgpr_spill_count: 5
"""


def test_resources_of_amd_assembly():
    from bench.aot.compiler import amd_resources

    found = amd_resources(AMDGCN, 8192)
    assert (found.shared, found.registers, found.stack, found.spills, found.instructions) == (8192, 256, 24, 5, 4)
    assert found.matrix == {"v_mfma_f32_32x32x8_bf16": 1}
    with pytest.raises(ValueError, match=r"no \.vgpr_spill_count"):
        amd_resources(AMDGCN.replace("vgpr_spill_count", "gone"), 0)


def test_what_is_skipped_has_a_reason():
    skipped = {(t, n): why_skipped(TARGETS[t], n) for t in TARGETS for n in NUMBERS if why_skipped(TARGETS[t], n)}
    assert skipped.keys() == {("sm75", "bf16"), ("sm75", "tf32"), ("gfx90a", "tf32"), ("gfx942", "tf32")}
