"""What a kernel needs and this Triton lacks is known before it is chosen."""

import importlib

import pytest

from streamindex_service.ops.sparse_attention import AttentionKernel
from streamindex_service.ops.sparse_attention import api as attention_api
from streamindex_service.ops.topk import api as topk_api
from tests.ops.fresh_modules import import_afresh

pytest.importorskip("triton")

OPS = "streamindex_service.ops"
MODULES = (
    f"{OPS}.gluon_names",
    f"{OPS}.sparse_attention.hopper_gather",
    f"{OPS}.sparse_attention.hopper",
    f"{OPS}.sparse_attention.hopper_few_heads_gather",
    f"{OPS}.sparse_attention.hopper_few_heads_products",
    f"{OPS}.sparse_attention.hopper_few_heads",
    f"{OPS}.topk.hopper",
)
GLUON = "triton.experimental.gluon.language"
COPIES, TILES = f"{GLUON}.nvidia.ampere.async_copy", f"{GLUON}.nvidia.hopper.tma"
LOADS = ("async_load", "async_copy_global_to_shared")
BOTH = {AttentionKernel.HOPPER, AttentionKernel.HOPPER_FEW_HEADS}


def stub(*args: object, _semantic: object = None, **kwargs: object) -> None:
    """As Triton 3.9 leaves behind."""
    raise RuntimeError("has been removed; call another")


def owner_of(path: str) -> object:
    try:
        return importlib.import_module(path)
    except ImportError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def chosen(monkeypatch: pytest.MonkeyPatch) -> tuple[frozenset[AttentionKernel], bool]:
    """The attention kernels, and whether the score kernel, that may be chosen with this Triton as it is now."""
    import_afresh(monkeypatch, *MODULES)
    return attention_api.gluon_kernels.__wrapped__(), topk_api.has_gluon.__wrapped__()


@pytest.mark.parametrize("stays", [False, True], ids=["gone", "a stub"])
@pytest.mark.parametrize(
    ("owner", "names", "kernels", "scores"),
    [
        (COPIES, LOADS, set(), True),
        (COPIES, ("commit_group",), {AttentionKernel.HOPPER_FEW_HEADS}, True),
        (COPIES, ("mbarrier_arrive",), set(), True),
        (TILES, LOADS, {AttentionKernel.HOPPER_FEW_HEADS}, False),
        (GLUON, ("barrier", "thread_barrier"), set(), False),
        (f"{GLUON}.shared_memory_descriptor", ("reinterpret", "_reinterpret"), set(), True),
    ],
    ids=["load_async", "commit_group", "mbarrier_arrive", "load_tile", "barrier", "view"],
)
def test_kernels_without_something_they_need_are_not_chosen(
    monkeypatch: pytest.MonkeyPatch, owner: str, names: tuple[str, ...], kernels: set, scores: bool, stays: bool
) -> None:
    assert chosen(monkeypatch) == (BOTH, True)
    for name in names:
        if stays:
            monkeypatch.setattr(owner_of(owner), name, stub, raising=False)
        else:
            monkeypatch.delattr(owner_of(owner), name, raising=False)
    assert chosen(monkeypatch) == (kernels, scores)


@pytest.mark.parametrize("other", ["gone", "a stub"])
@pytest.mark.parametrize(
    ("owner", "names", "shared_name"),
    [
        (COPIES, LOADS, "load_async"),
        (TILES, LOADS, "load_tile"),
        (GLUON, ("barrier", "thread_barrier"), "barrier"),
    ],
)
def test_either_name_will_do(
    monkeypatch: pytest.MonkeyPatch, owner: str, names: tuple[str, str], shared_name: str, other: str
) -> None:
    def works(smem: object = None, pointer: object = None, mask: object = None) -> None:
        """What a Triton has under one of the names."""

    for present, absent in (names, names[::-1]):
        with monkeypatch.context() as patch:
            patch.setattr(owner_of(owner), present, works, raising=False)
            if other == "a stub":
                patch.setattr(owner_of(owner), absent, stub, raising=False)
            else:
                patch.delattr(owner_of(owner), absent, raising=False)
            names_now, *_ = import_afresh(patch, *MODULES)
            assert getattr(names_now, shared_name) is works
            assert chosen(patch) == (BOTH, True)


def test_what_the_interpreter_puts_in_place_is_no_stub() -> None:
    """Once anything was interpreted in this process, functions of Triton's language take any arguments too."""
    from streamindex_service.ops.gluon_names import missing

    here = type("Here", (), {"patched": staticmethod(lambda *args, member=None, **kwargs: None), "stub": stub})
    assert missing((here, ("patched",))) == []
    assert missing((here, ("stub", "gone"))) == ["stub", "gone"]
