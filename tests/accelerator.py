"""A pretend accelerator: device `pretend`, whose tensors hold CPU data, say they lie elsewhere, and count transfers.

It stands in for a GPU where there is none. Every operation runs on the CPU data behind the tensors. What a GPU would
refuse is refused: an operation on tensors of both sides raises what CUDA raises, but for those that CUDA takes, which
are CPU tensors of no dimension in pointwise operations and CPU indices. `.numpy()` fails as it does on a GPU.

Importing this module gives torch the device for the rest of the process; no tensor goes there unless it is named.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretend"
MIXED = "Expected all tensors to be on the same device"  # as the error begins

aten = torch.ops.aten
_CROSSES = {aten.copy_.default, aten._copy_from.default, aten._to_copy.default}
_INDEXES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
_TAKES_SCALARS = {  # besides pointwise operations: a CPU tensor of no dimension does as a value
    aten.fill_.Tensor,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
}
_FACTORIES = ("empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step", "linspace", "eye")


class Transfer(NamedTuple):
    """A tensor that crossed: whether to the device, its shape, its dtype. A number read by Python has no dimension."""

    inward: bool
    shape: tuple[int, ...]
    dtype: torch.dtype


_watchers: list[list[Transfer]] = []


@contextmanager
def counted() -> Iterator[list[Transfer]]:
    """Collects the transfers of all threads while it is open."""
    transfers: list[Transfer] = []
    _watchers.append(transfers)
    try:
        yield transfers
    finally:
        _watchers.remove(transfers)


def _count(inward: bool, tensor: Tensor) -> None:
    for transfers in _watchers:
        transfers.append(Transfer(inward, tuple(tensor.shape), tensor.dtype))


class PretendTensor(Tensor):
    """A tensor on the device.

    held  its data, a CPU tensor of the same shape and strides
    """

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "PretendTensor":
        strided = held.layout == torch.strided
        with torch.inference_mode(False):  # views of a module's weights must not be inference tensors
            return Tensor._make_wrapper_subclass(
                cls,
                held.size(),
                strides=held.stride() if strided else None,
                storage_offset=held.storage_offset() if strided else 0,
                dtype=held.dtype,
                device=torch.device(NAME, 0),
            )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __repr__(self) -> str:
        return f"PretendTensor({self.held})"

    def tolist(self) -> Any:  # torch's own takes no sub-class
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._has_compatible_shallow_copy_type.default:
            return False  # so that `Module.to` puts new parameters in
        if func._can_decompose():  # in inference mode these come here whole
            return func.decompose(*args, **kwargs)
        # 1. no mixing, but where CUDA does
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        strangers = [tensor for tensor in tensors if not isinstance(tensor, cls)]
        if strangers and func not in _CROSSES:
            if func in _INDEXES and isinstance(args[0], cls):
                indices = [index for index in args[1] if index is not None and not isinstance(index, cls)]
                for index in indices:
                    _count(True, index)  # CUDA moves these, too
                strangers = [tensor for tensor in strangers if not any(tensor is index for index in indices)]
            takes_scalars = torch.Tag.pointwise in func.tags or func in _TAKES_SCALARS
            if any(tensor.dim() or not takes_scalars for tensor in strangers):
                devices = ", ".join(sorted({str(tensor.device) for tensor in tensors}))
                raise RuntimeError(f"{MIXED}, but found at least two devices, {devices}! (in {func})")
        # 2. the same on the CPU data
        before = [(tensor, tensor.shape) for tensor in tensors if isinstance(tensor, cls)]
        target = kwargs.get("device")
        if target is not None and torch.device(target).type == NAME:
            kwargs = kwargs | {"device": "cpu"}
        out = func(*pytree.tree_map(_bare, args), **pytree.tree_map(_bare, kwargs))
        for tensor, shape in before:
            if tensor.held.shape != shape:
                raise NotImplementedError(f"the pretend accelerator can't change a tensor's shape in place ({func})")
        # 3. what crossed, and the result on its side
        if func is aten.copy_.default:
            target_tensor, source = args[:2]
            if isinstance(target_tensor, cls) != isinstance(source, cls):
                _count(isinstance(target_tensor, cls), source)
            return target_tensor
        if target is not None and torch.device(target).type == "cpu":
            _count(False, out)
            return out
        wrappers = {id(tensor.held): tensor for tensor, _ in before}  # what is changed in place stays itself
        return pytree.tree_map(lambda leaf: _wrap(leaf, wrappers), out)


def _bare(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, PretendTensor) else leaf


def _wrap(leaf: Any, wrappers: dict[int, PretendTensor]) -> Any:
    """A result on the device; a number leaves it."""
    if isinstance(leaf, Tensor):
        return wrappers[id(leaf)] if id(leaf) in wrappers else PretendTensor(leaf)
    if isinstance(leaf, bool | int | float):
        _count(False, torch.tensor(leaf))
    return leaf


def _factory(operation: Any) -> Callable[..., PretendTensor]:
    def create(*args: Any, device: Any = None, **options: Any) -> PretendTensor:
        return PretendTensor(operation(*args, device="cpu", **options))

    return create


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """`copy_` where the sub-class is not looked at, as within `torch.tensor(..., device=...)`."""
    _count(isinstance(target, PretendTensor), source)
    _bare(target).copy_(_bare(source))
    return target


def _read_number(tensor: PretendTensor) -> Any:
    """`item` where the sub-class is not looked at, as within `torch.tensor` of a list of tensors."""
    _count(False, tensor)
    return tensor.held.item()


class _Unlisted(_DummyBackendModule):
    """The device is there for who names it: torch, asked which accelerators there are, goes on saying none."""

    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 0


_setup_privateuseone_for_python_backend(rename=NAME, backend_module=_Unlisted())
_library = torch.library.Library("aten", "IMPL")  # its kernels go when it goes
for _name in _FACTORIES:
    _operation, _, _overload = _name.partition(".")
    _library.impl(_name, _factory(getattr(getattr(aten, _operation), _overload or "default")), "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
_library.impl("_local_scalar_dense", _read_number, "PrivateUse1")
