"""Every Gluon kernel compiles with this Triton: names go, and others mean something else, between its versions."""

import re
from typing import Any

import pytest

from tests.ops.gluon_compiler import compile_all

HOPPER_SHARED_BYTES = 227 << 10  # that a block may have


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    pytest.importorskip("triton")
    return compile_all(tmp_path_factory.mktemp("gluon"))


def ptx_of(variants: dict[str, dict[str, Any]], name: str) -> str:
    variant = variants[name]
    assert "error" not in variant, variant["error"]
    assert 0 < variant["shared"] <= HOPPER_SHARED_BYTES
    return variant["ptx"]


def count(pattern: str, ptx: str) -> int:
    return len(re.findall(pattern, ptx))


@pytest.mark.parametrize(
    ("name", "key_dim", "copies"),
    [
        ("attend bf16", 512, 32),
        ("attend bf16 with a tail", 576, 36),
        ("attend fp8_d512", 512, 18),
        ("attend fp8_d576", 576, 20),
        ("attend bf16 in pages", 576, 36),
        ("attend fp8_d512 in pages", 512, 18),
        ("attend fp8_d576 in pages", 576, 20),
    ],
)
def test_the_kernel_for_whole_blocks_of_heads_compiles(
    variants: dict[str, dict[str, Any]], name: str, key_dim: int, copies: int
) -> None:
    ptx = ptx_of(variants, name)
    # a thread's part of a block of 64 rows comes 16 bytes at a time, not element by element
    assert count(r"cp\.async\.cg\.shared\.global .*, 0x10,", ptx) == copies
    assert count(r"cp\.async\.c[ag]\.", ptx) == copies
    assert count(r"wgmma\.mma_async", ptx) == key_dim // 16 + 2 * 8  # queries with keys; weights with values, by halves
    assert count(r"cp\.async\.bulk\.tensor", ptx) > 0


@pytest.mark.parametrize("pages", ["", " in pages"])
@pytest.mark.parametrize("name", ["few heads fp8_d512", "few heads fp8_d576"])
def test_the_kernel_for_few_heads_compiles(variants: dict[str, dict[str, Any]], name: str, pages: str) -> None:
    ptx = ptx_of(variants, name + pages)
    assert count(r"cp\.async\.cg\.shared\.global .*, 0x10,", ptx) == 20
    assert count(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16", ptx) > 0


@pytest.mark.parametrize(
    "name",
    [
        "attend bf16",
        "attend bf16 with a tail",
        "attend fp8_d512",
        "attend fp8_d576 in pages",
        "few heads fp8_d512",
        "few heads fp8_d576 in pages",
        "combine for hopper",
    ],
)
def test_a_dependent_launch_waits_before_it_reads(variants: dict[str, dict[str, Any]], name: str) -> None:
    ptx = ptx_of(variants, name)
    waits = [found.start() for found in re.finditer(r"griddepcontrol\.wait", ptx)]
    assert len(waits) == 1
    # the other partitions are let go by barrier 1, and stand behind it
    memory = re.search(r"ld\.global|st\.global|cp\.async|barrier\.sync\s+1\b", ptx)
    assert memory is not None
    assert waits[0] < memory.start()


def test_parts_of_other_kernels_are_combined_by_a_launch_like_any_other(variants: dict[str, dict[str, Any]]) -> None:
    assert "griddepcontrol" not in ptx_of(variants, "combine")


@pytest.mark.parametrize("name", ["scores bf16", "scores fp8_e4m3"])
def test_the_kernel_for_scores_compiles(variants: dict[str, dict[str, Any]], name: str) -> None:
    ptx = ptx_of(variants, name)
    assert count(r"wgmma\.mma_async", ptx) > 0
    assert count(r"cp\.async\.bulk\.tensor", ptx) > 0
