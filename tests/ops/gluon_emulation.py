"""Gluon on a CPU, as far as the kernel of `hopper_few_heads.py` uses it: what a program computes, not how its threads
share that out. Layouts are ignored, copies arrive when they are waited for and not before, and products are float32
sums of operands as rounded. The partitions of a program are threads, and wait for each other as they do on a device.

So its arithmetic is judged where no device is: f16's range, powers of two, masks, what is stored where, and, as far as
threads that change places often show it, who may write when. Barriers within a partition, banks and the order of sums
are not.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.ops.fresh_modules import import_afresh

_OPS = "streamindex_service.ops"
_OFTEN_S = 1e-5  # between two partitions
_LONGEST_WAIT_S = 60.0  # of a partition for another: longer and they wait for each other
_MODULES = (
    f"{_OPS}.gluon_names",
    f"{_OPS}.sparse_attention.hopper_items",
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

    def reshape(self, shape: tuple[int, ...]) -> Shared:
        """To be read at once: it may be a copy."""
        return Shared(self.tensor.reshape(shape))

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


class _Barrier:
    """An mbarrier: its phase ends with the last of `count` arrivals."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.phase = 0
        self.copies: list[tuple[Shared, Value]] = []  # those that end with this phase


class _Program:
    """What the partitions of a program share. A wait for what never comes fails, and so does every wait after it."""

    def __init__(self) -> None:
        self._barriers: dict[int, _Barrier] = {}
        self._started = threading.local()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self.waited = False  # for the kernel before this one in its stream

    def wait_for_inputs(self) -> None:
        self.waited = True

    def load(self, *arguments: Any, **named: Any) -> Value:
        assert self.waited, "read before the kernel that may write it has ended"
        return _load(*arguments, **named)

    def store(self, *arguments: Any, **named: Any) -> None:
        assert self.waited, "written before the kernel that may read it has ended"
        _store(*arguments, **named)

    def init(self, smem: Shared, count: int) -> None:
        self._barriers[smem.tensor.data_ptr()] = _Barrier(count)

    def arrive(self, smem: Shared, count: int = 1) -> None:
        with self._changed:
            self._count(self._barriers[smem.tensor.data_ptr()], count)

    def wait(self, smem: Shared, phase: Any) -> None:
        barrier, parity = self._barriers[smem.tensor.data_ptr()], int(phase)
        with self._changed:
            ended = self._changed.wait_for(lambda: self._error or barrier.phase % 2 != parity, _LONGEST_WAIT_S)
            assert ended, "the barrier's phase never ends"
            assert not self._error, "another partition has failed"
            for to, value in barrier.copies:
                to.store(value)
            barrier.copies.clear()

    def start_copy(self, smem: Shared, pointer: Pointer, mask: Value) -> None:
        self._copies.append((smem, self.load(pointer, mask, 0)))
        smem.tensor.copy_(_garbage(smem.tensor.dtype, smem.shape))

    def arrive_with_copies(self, smem: Shared, increment_count: bool) -> None:
        assert not increment_count
        with self._changed:
            barrier = self._barriers[smem.tensor.data_ptr()]
            barrier.copies += self._copies
            self._copies.clear()
            self._count(barrier, 128)  # threads

    def specialize(self, partitions: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any) -> None:
        threads = [threading.Thread(target=self._run, args=each, daemon=True) for each in partitions]
        interval_s = sys.getswitchinterval()
        sys.setswitchinterval(_OFTEN_S)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval_s)
        if self._error is not None:
            raise self._error
        assert not any(each.copies for each in self._barriers.values()), "copies are still under way"
        self._barriers.clear()

    @property
    def _copies(self) -> list[tuple[Shared, Value]]:
        """Those that this partition started and that belong to no barrier yet."""
        if not hasattr(self._started, "copies"):
            self._started.copies = []
        return self._started.copies

    def _count(self, barrier: _Barrier, count: int) -> None:
        barrier.pending -= count
        assert barrier.pending >= 0, "more arrivals than a phase has"
        if barrier.pending == 0:
            barrier.phase, barrier.pending = barrier.phase + 1, barrier.count
            self._changed.notify_all()

    def _run(self, partition: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        try:
            partition(*arguments)
            assert not self._copies, "a partition ends with copies that nobody waits for"
        except BaseException as error:  # raised again where the program is
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()


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
        widened = _elements(first)
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


def _language(ids: list[int], programs: list[int], program: _Program) -> dict[str, Any]:
    def nothing(*_: Any, **__: Any) -> None:
        return None

    return {
        **{name: getattr(torch, name) for name in ("int16", "int32", "int64", "float16", "float32", "bfloat16")},
        **dict.fromkeys(
            ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout", "SwizzledSharedLayout",
             "SharedLinearLayout", "DistributedLinearLayout"), nothing,
        ),
        "thread_barrier": lambda: None,
        "warp_specialize": program.specialize,
        "constexpr": lambda x: x,
        "pointer_type": lambda dtype: dtype,
        "program_id": lambda axis: Value(torch.tensor(ids[axis], dtype=torch.int32)),
        "num_programs": lambda axis: programs[axis],
        "static_range": range,
        "arange": lambda start, stop, layout: Value(torch.arange(start, stop, dtype=torch.int32)),
        "zeros": lambda shape, dtype, layout: Value(torch.zeros(shape, dtype=dtype)),
        "full": lambda shape, value, dtype, layout: Value(torch.full(shape, value, dtype=dtype)),
        "expand_dims": lambda x, axis: Value(x.tensor.unsqueeze(axis)),
        "reshape": lambda x, shape: Value(x.tensor.reshape(shape)),
        "permute": lambda x, order: Value(x.tensor.permute(order)),
        "broadcast": lambda a, b: [Value(each) for each in torch.broadcast_tensors(a.tensor, b.tensor)],
        "join": lambda a, b: Value(torch.stack((a.tensor, b.tensor), -1)),
        "convert_layout": lambda x, layout: x,
        "load": program.load,
        "store": program.store,
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


def _numbers(*bounds: Any) -> Iterator[Value]:
    """`range` of a kernel, whose numbers are values."""
    return (Value(torch.tensor(number, dtype=torch.int32)) for number in range(*(int(bound) for bound in bounds)))


def _with_plain_numbers(function: Any) -> Any:
    """What is computed while a kernel is compiled has Python's `range`."""
    names = {**function.__globals__, "range": range}
    return FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)


def _to_the_end(x: torch.Tensor) -> torch.Tensor:
    """What it is the beginning of."""
    left = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return x.as_strided((left,), (1,), x.storage_offset())


class Kernel:
    """`attend_kernel[grid](...)`, program by program."""

    def __init__(self, body: Any, ids: list[int], programs: list[int], program: _Program) -> None:
        self.body, self.ids, self.programs, self.program = body, ids, programs, program

    def __getitem__(self, grid: tuple[int]) -> Any:
        def run(*arguments: Any, num_warps: int, launch_pdl: bool = False, **constants: Any) -> None:
            given = [Pointer(x) if isinstance(x, torch.Tensor) else x for x in arguments]
            if constants["PLACED"]:  # rows, and scales beside them, may lie anywhere behind the anchor
                given[1:3] = (Pointer(_to_the_end(x)) for x in arguments[1:3])
            self.programs[:] = grid
            for number in range(grid[0]):
                self.ids[:] = [number]
                self.program.waited = not launch_pdl
                self.body(*given, **constants)

        return run


def load_kernel(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the kernel, to be run here: `launch` fills tensors of the CPU."""
    ids, programs, program = [0], [1], _Program()

    def jit(function: Any = None, **_: Any) -> Any:
        return (lambda body: Kernel(body, ids, programs, program)) if function is None else function

    language = _language(ids, programs, program)
    copies = {"async_copy_global_to_shared": program.start_copy, "mbarrier_arrive": program.arrive_with_copies}
    mbarrier = SimpleNamespace(init=program.init, wait=program.wait, arrive=program.arrive, MBarrierLayout=lambda: None)
    path = "triton.experimental.gluon"
    modules = {
        "triton": {},
        "triton.experimental": {},
        path: {"jit": jit, "constexpr_function": _with_plain_numbers},
        f"{path}.language": language,
        "triton.language": {},
        "triton.language.extra": {},
        "triton.language.extra.cuda": {"gdc_wait": program.wait_for_inputs},
        f"{path}.language.nvidia": {},
        f"{path}.language.nvidia.ampere": {"mma_v2": _mma},
        f"{path}.language.nvidia.ampere.async_copy": copies,
        f"{path}.language.nvidia.hopper": {"mbarrier": mbarrier, "fence_async_shared": lambda: None},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
    kernels = import_afresh(monkeypatch, *_MODULES)
    for kernel in kernels:
        vars(kernel)["range"] = _numbers
    return kernels[-1]
