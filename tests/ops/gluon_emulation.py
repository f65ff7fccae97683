"""Gluon on a CPU, as far as the kernel of `hopper_few_heads.py` uses it: what a program computes, not how its threads
share that out. Layouts are ignored, copies arrive when they are waited for and not before, and products are float32
sums of operands as rounded.

So its arithmetic is judged where no device is: f16's range, powers of two, masks, what is stored where. Barriers, banks
and the order of sums are not.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.ops.fresh_modules import import_afresh

_OPS = "streamindex_service.ops"
_MODULES = (
    f"{_OPS}.gluon_names",
    f"{_OPS}.sparse_attention.hopper_few_heads_gather",
    f"{_OPS}.sparse_attention.hopper_few_heads_products",
    f"{_OPS}.sparse_attention.hopper_few_heads",
)


class Value:
    """A tensor of a program, or a number."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    type = SimpleNamespace(layout=None)

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Value:
        return Value(self.tensor.view(dtype) if bitcast else self.tensor.to(dtype))

    def __index__(self) -> int:
        return int(self.tensor)

    def __bool__(self) -> bool:
        return bool(self.tensor)


def _bare(x: Any) -> Any:
    return x.tensor if isinstance(x, Value) else x


def _operator(name: str) -> Any:
    def apply(self: Value, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        return Value(getattr(self.tensor, name)(_bare(other)))

    return apply


for _name in ("add", "sub", "mul", "and", "or", "lshift", "rshift", "lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Value, f"__{_name}__", _operator(f"__{_name}__"))
for _name in ("add", "sub", "mul", "and", "or"):
    setattr(Value, f"__r{_name}__", _operator(f"__r{_name}__" if _name in ("add", "sub", "mul") else f"__{_name}__"))
Value.__floordiv__ = lambda self, other: Value(torch.div(self.tensor, _bare(other), rounding_mode="trunc"))
Value.__mod__ = lambda self, other: Value(torch.fmod(self.tensor, _bare(other)))
Value.__truediv__ = lambda self, other: Value(self.tensor / _bare(other))
Value.__rtruediv__ = lambda self, other: Value(other / self.tensor)


class Pointer:
    """Addresses in a tensor: places of elements of `dtype`."""

    def __init__(self, memory: torch.Tensor, places: Any = 0) -> None:
        self.memory, self.places = memory.view(-1), places
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.places + _bare(other))

    def to(self, dtype: torch.dtype) -> Pointer:
        step = dtype.itemsize // self.memory.element_size()
        assert not (torch.as_tensor(self.places) % step).any()
        return Pointer(self.memory.view(dtype), torch.as_tensor(self.places) // step)


class Shared:
    """Shared memory."""

    def __init__(self, tensor: torch.Tensor, layout: Any = None) -> None:
        self.tensor, self.layout, self.shape = tensor, layout, list(tensor.shape)

    def index(self, number: Any) -> Shared:
        return Shared(self.tensor[int(number)])

    def slice(self, start: int, length: int, dim: int) -> Shared:
        return Shared(self.tensor.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.tensor.permute(order))

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        return Shared(self.tensor.view(dtype).view(shape), layout)

    def load(self, layout: Any) -> Value:
        return Value(self.tensor.clone())

    def store(self, value: Value) -> None:
        assert value.tensor.dtype == self.tensor.dtype
        self.tensor.copy_(value.tensor)


def _load(pointer: Pointer, mask: Value | None = None, other: float = 0) -> Value:
    places = torch.as_tensor(pointer.places)
    if mask is None:
        return Value(pointer.memory[places])
    places, here = torch.broadcast_tensors(places, mask.tensor)
    return Value(torch.where(here, pointer.memory[torch.where(here, places, 0)], other).to(pointer.memory.dtype))


def _store(pointer: Pointer, value: Value, mask: Value) -> None:
    assert value.tensor.dtype == pointer.memory.dtype
    places, here, values = torch.broadcast_tensors(pointer.places, mask.tensor, value.tensor)
    pointer.memory[places[here]] = values[here]


class _Copies:
    """Asynchronous copies: until their group is waited for there is nothing where they go."""

    def __init__(self) -> None:
        self._groups: list[list[tuple[Shared, Value]]] = [[]]  # the last is not committed yet

    def start(self, smem: Shared, pointer: Pointer, mask: Value) -> None:
        self._groups[-1].append((smem, _load(pointer, mask, 0)))
        smem.tensor.copy_(_garbage(smem.tensor.dtype, smem.shape))

    def commit(self) -> None:
        self._groups.append([])

    @property
    def nothing(self) -> bool:
        """Whether there is none."""
        return self._groups == [[]]

    def wait(self, pending: int) -> None:
        while len(self._groups) - 1 > pending:
            for smem, value in self._groups.pop(0):
                smem.store(value)


def _elements(words: torch.Tensor) -> torch.Tensor:
    """The four e4m3 of each word, in f16: [*words.shape, 4]."""
    return words.contiguous().view(torch.uint8).view(*words.shape, 4).view(torch.float8_e4m3fn).to(torch.float16)


def _pairs_as_they_stand(elements: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[..., words, 4] to four tensors [..., words]: two words' eight elements, two to each."""
    pairs = elements.reshape(*elements.shape[:-2], -1, 4, 2)
    return tuple(pairs[..., number, :].reshape(elements.shape[:-1]) for number in range(4))


def _asm(text: str, constraints: str, arguments: list[Value], **_: Any) -> tuple[Value, ...]:
    first = arguments[0].tensor
    if "prmt" in text:
        widened = _elements(first) * arguments[1].tensor[..., None]
        return tuple(Value(widened[..., number]) for number in range(4))
    if "e4m3" in text:
        return tuple(Value(each.T) for each in _pairs_as_they_stand(_elements(first.T)))
    fours = first.view(torch.bfloat16).view(*first.shape, 4)
    return tuple(Value(each) for each in _pairs_as_they_stand(fours))


def _mma(a: Value, b: Value, acc: Value) -> Value:
    assert a.tensor.dtype == b.tensor.dtype
    return Value(acc.tensor + a.tensor.float() @ b.tensor.float())


def _reduce(pick: Any, neutral: float) -> Any:
    def apply(x: Value, axis: int) -> Value:
        bare = x.tensor if not x.tensor.is_floating_point() else x.tensor.nan_to_num(neutral, torch.inf, -torch.inf)
        return Value(pick(bare, axis))

    return apply


def _both(function: Any) -> Any:
    def apply(*arguments: Any) -> Value:
        return Value(function(*(torch.as_tensor(_bare(x)) for x in arguments)))

    return apply


def _where(mask: Any, a: Any, b: Any) -> Value:
    return Value(torch.where(_bare(mask), _bare(a), _bare(b)))


def _language(ids: list[int], programs: list[int]) -> dict[str, Any]:
    def nothing(*_: Any, **__: Any) -> None:
        return None

    return {
        **{name: getattr(torch, name) for name in ("int16", "int32", "int64", "float16", "float32", "bfloat16")},
        **dict.fromkeys(
            ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout", "SwizzledSharedLayout",
             "SharedLinearLayout", "DistributedLinearLayout"), nothing,
        ),
        "thread_barrier": lambda: None,
        "constexpr": lambda x: x,
        "pointer_type": lambda dtype: dtype,
        "program_id": lambda axis: Value(torch.tensor(ids[axis])),
        "num_programs": lambda axis: programs[axis],
        "static_range": range,
        "arange": lambda start, stop, layout: Value(torch.arange(start, stop, dtype=torch.int32)),
        "zeros": lambda shape, dtype, layout: Value(torch.zeros(shape, dtype=dtype)),
        "full": lambda shape, value, dtype, layout: Value(torch.full(shape, value, dtype=dtype)),
        "expand_dims": lambda x, axis: Value(x.tensor.unsqueeze(axis)),
        "reshape": lambda x, shape: Value(x.tensor.reshape(shape)),
        "join": lambda a, b: Value(torch.stack((a.tensor, b.tensor), -1)),
        "convert_layout": lambda x, layout: x,
        "load": _load,
        "store": _store,
        "shared_memory_descriptor": Shared,
        "allocate_shared_memory": lambda dtype, shape, layout: Shared(_garbage(dtype, shape), layout),
        "inline_asm_elementwise": _asm,
        "max": _reduce(torch.amax, -torch.inf),
        "min": _reduce(torch.amin, torch.inf),
        "sum": lambda x, axis: Value(x.tensor.sum(axis)),
        "maximum": _both(torch.fmax),
        "minimum": _both(torch.fmin),
        "where": _where,
        **{name: _both(getattr(torch, name)) for name in ("abs", "exp2", "log2", "ceil")},
    }  # fmt: skip


def _garbage(dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    """What nobody wrote: NaN, for each type."""
    return torch.full([*shape[:-1], shape[-1] * dtype.itemsize], 0xFF, dtype=torch.uint8).view(dtype)


class Kernel:
    """`attend_kernel[grid](...)`, program by program."""

    def __init__(self, body: Any, ids: list[int], programs: list[int], under_way: _Copies) -> None:
        self.body, self.ids, self.programs, self.under_way = body, ids, programs, under_way

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        def run(*arguments: Any, num_warps: int, **constants: Any) -> None:
            given = [Pointer(x) if isinstance(x, torch.Tensor) else x for x in arguments]
            self.programs[:] = grid
            for number in range(grid[0] * grid[1]):
                self.ids[:] = [number % grid[0], number // grid[0]]
                self.body(*given, **constants)
                assert self.under_way.nothing, "a program ends and copies to its shared memory are still under way"

        return run


def load_kernel(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the kernel, to be run here: `launch` fills tensors of the CPU."""
    ids, programs = [0, 0], [1, 1]

    under_way = _Copies()

    def jit(function: Any = None, **_: Any) -> Any:
        return (lambda body: Kernel(body, ids, programs, under_way)) if function is None else function

    language = _language(ids, programs)
    copies = {
        "async_copy_global_to_shared": under_way.start,
        "commit_group": under_way.commit,
        "wait_group": under_way.wait,
    }
    path = "triton.experimental.gluon"
    modules = {
        "triton": {},
        "triton.experimental": {},
        path: {"jit": jit, "constexpr_function": lambda function: function},
        f"{path}.language": language,
        f"{path}.language.nvidia": {},
        f"{path}.language.nvidia.ampere": {"mma_v2": _mma},
        f"{path}.language.nvidia.ampere.async_copy": copies,
        f"{path}.language.nvidia.hopper": {},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
    return import_afresh(monkeypatch, *_MODULES)[-1]
