"""CUDA without a GPU: project code on fake `cuda:0` tensors, which have shapes, dtypes and devices but no numbers.

    with fake_cuda() as trace:
        model = to_cuda(model)                    # parameters and buffers become fake
        trace.reset()                             # count from here
        model(empty(8, 3, 256, 256))
    trace.waits                                   # Counter of (kind of host wait, "file.py function")

Code that would mix devices raises. `Trace` counts kernels, bytes, FLOP, live storage, large float32 products and host
waits: places where the processor reads a result and so waits for the GPU. It cannot show which attention kernel runs,
a generator on another device, NCCL, layouts of cuDNN, or time.
"""

import collections
import contextlib
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from semdict.train.engine import rng as rng_module

CUDA = torch.device("cuda", 0)
GIB = 2**30
ROOT = Path(__file__).resolve().parent.parent
HARNESS = Path(__file__).name
LARGE = 10**10  # FLOP of a float32 product that counts as large
BLOCK = 512  # bytes that PyTorch's CUDA allocator rounds up to
VIEWS = """view _unsafe_view t transpose permute expand slice select detach unsqueeze squeeze split split_with_sizes
chunk unbind alias as_strided reshape _reshape_alias lift_fresh unfold diagonal narrow"""
EMPTY = "empty new_empty empty_like empty_strided new_empty_strided is_pinned _pin_memory scalar_tensor"
FREE_OF_WORK = {*VIEWS.split(), *EMPTY.split(), "_fused_sdp_choice"}  # operations that start no kernel


class Trace(TorchDispatchMode):
    """What the code under it would do to a GPU. `selected` (rows -> entries) sizes the results of boolean masks."""

    def __init__(self, selected: float = 0.7) -> None:
        super().__init__()
        self.selected = selected  # share of True in a mask
        self.storages: dict[int, tuple[weakref.ref, int]] = {}
        self.live = 0
        self.reset()

    def reset(self) -> None:
        """Start to count anew; storage that is alive stays counted."""
        self.waits: collections.Counter[tuple[str, str]] = collections.Counter()
        self.float32_products: collections.Counter[str] = collections.Counter()  # large ones: FLOP by place
        self.attention: collections.Counter[str] = collections.Counter()
        self.flops: collections.Counter[str] = collections.Counter()  # by dtype of the operands
        self.kernels = self.bytes = 0
        self.base = self.peak = self.live

    def grown(self) -> int:
        """Bytes of GPU memory at the peak above those that were alive at the last reset."""
        return self.peak - self.base

    def waited(self) -> set[str]:
        """The places of all host waits, "file.py function"."""
        return {place for _, place in self.waits}

    def wait(self, kind: str) -> None:
        """Count a host wait at the innermost line of the project."""
        self.waits[kind, place()] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if (
            func.namespace == "aten" and func.overloadpacket not in flop_registry
        ):  # operations that inference mode passes on whole: linear, conv2d
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        name = func.overloadpacket.__name__
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(tensor.device.type == "cuda" for tensor in inputs):
            out = func(*args, **kwargs)
        else:
            out = self._data_dependent(name, args, kwargs)
            if out is NotImplemented:
                out = func(*args, **kwargs)
        outs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self._copies(name, args, kwargs, outs)
        if any(tensor.device.type == "cuda" for tensor in [*inputs, *outs]):
            self._store(outs)
            self._count(name, func, args, kwargs, inputs, outs, out)
        return out

    def _data_dependent(self, name: str, args: tuple, kwargs: dict) -> Any:
        """Results whose value or shape depends on numbers, which a GPU has to send to the host first."""
        if name in ("_local_scalar_dense", "item", "is_nonzero"):
            self.wait("item")
            return {torch.bool: True}.get(args[0].dtype, 0.7 if args[0].dtype.is_floating_point else 1)
        shapes = {
            "bincount": lambda: (kwargs.get("minlength") or args[2],),
            "nonzero": lambda: (self._entries(args[0]), args[0].ndim),
            "masked_select": lambda: (self._entries(args[1]),),
        }
        if name in shapes:
            self.wait(name)
            dtype = args[0].dtype if name == "masked_select" else torch.int64
            return args[0].new_empty(shapes[name](), dtype=dtype)
        masks = _masks(args) if name in ("index", "index_put", "index_put_", "_index_put_impl_") else []
        if not masks:
            return NotImplemented
        self.wait("boolean index")
        if name == "index":
            return args[0].new_empty((self._entries(masks[0]), *args[0].shape[masks[0].ndim :]))
        return args[0].clone() if name == "index_put" else args[0]

    def _entries(self, mask: Tensor) -> int:
        return max(1, round(mask.numel() * self.selected))

    def _copies(self, name: str, args: tuple, kwargs: dict, outs: list[Tensor]) -> None:
        """Copies between host and GPU; the host waits unless they are asynchronous."""
        if name not in ("_to_copy", "copy_", "_copy_from"):
            return
        source, target = (args[1], args[0]) if name == "copy_" else (args[0], outs[0])
        kinds = source.device.type, target.device.type
        if kinds[0] == kinds[1] or "cuda" not in kinds:
            return
        non_blocking = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
        if not non_blocking:
            self.wait("copy to the host" if kinds[0] == "cuda" else "copy to the GPU")

    def _store(self, outs: list[Tensor]) -> None:
        """Follow the life of each new storage on the GPU."""
        for tensor in outs:
            if tensor.device.type != "cuda":
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self.storages:
                continue
            size = -(-storage.nbytes() // BLOCK) * BLOCK

            def gone(_ref: Any, key: int = key) -> None:
                if key in self.storages:
                    self.live -= self.storages.pop(key)[1]

            self.storages[key] = (weakref.ref(storage, gone), size)
            self.live += size
            self.peak = max(self.peak, self.live)

    def _count(
        self, name: str, func: Any, args: tuple, kwargs: dict, inputs: list[Tensor], outs: list[Tensor], out: Any
    ) -> None:
        if name in FREE_OF_WORK or func.namespace == "prim":
            return
        self.kernels += 1
        new = [tensor for tensor in outs if not any(tensor is other for other in inputs)]
        self.bytes += sum(_bytes(tensor) for tensor in [*inputs, *new] if tensor.device.type == "cuda")
        if func.overloadpacket in flop_registry:
            flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
            dtype = str(inputs[0].dtype).removeprefix("torch.")
            if dtype == "float32" and torch.backends.cuda.matmul.fp32_precision == "tf32":
                dtype = "tf32"
            self.flops[dtype] += flops
            if dtype == "float32" and flops >= LARGE:
                self.float32_products[place()] += flops


def _masks(args: tuple) -> list[Tensor]:
    """The boolean tensors among the indices of aten's index operations."""
    return [index for index in args[1] if index is not None and index.dtype == torch.bool]


def _bytes(tensor: Tensor) -> int:
    """Bytes that a kernel reads or writes; expanded dimensions count once."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride != 0 else 1
    return size


def place() -> str:
    """The innermost function of the project that is running, "folder/file.py function"."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.name != HARNESS and "site-packages" not in path.parts:
            return f"{path.relative_to(ROOT).as_posix().removeprefix('semdict/')} {frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A fake tensor on the GPU."""
    return torch.empty(*shape, dtype=dtype, device=CUDA)


def to_cuda(module: nn.Module) -> nn.Module:
    """`module.to("cuda")` for fake tensors: parameters and buffers are replaced, tied ones stay tied."""
    memo: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, old in list(part._parameters.items()):
            if old is not None and id(old) not in memo:
                new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=CUDA)
                memo[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad)
            if old is not None:
                part._parameters[name] = memo[id(old)]
        for name, old in list(part._buffers.items()):
            if old is not None:
                part._buffers[name] = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=CUDA)
    return module


class DriverlessMode(FakeTensorMode):
    """Fake tensors of a GPU without its driver, although torch.cuda says that there is a GPU."""

    avoid_device_init = True


@contextlib.contextmanager
def fake_cuda(selected: float = 0.7) -> Iterator[Trace]:
    """Fake tensors on `cuda:0` and a `Trace` of what is done to them; restores everything that it patches."""
    trace = Trace(selected)
    with pytest.MonkeyPatch.context() as patch:
        _pretend_a_gpu(patch, trace)
        with DriverlessMode(allow_non_fake_inputs=True), trace:
            yield trace


class FakeEvent:
    """torch.cuda.Event: waiting for it is a host wait."""

    trace: Trace

    def __init__(self, **_: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None:
        self.trace.wait("event")


def _pretend_a_gpu(patch: pytest.MonkeyPatch, trace: Trace) -> None:
    """Answers of torch that would need a driver."""
    patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: 1)
    patch.setattr(torch.cuda, "current_device", lambda: 0)
    patch.setattr(torch.cuda, "mem_get_info", lambda *_: (78 * GIB, 80 * GIB))
    patch.setattr(torch.cuda, "synchronize", lambda *_: trace.wait("synchronize"))
    patch.setattr(torch.cuda, "Event", type("Event", (FakeEvent,), {"trace": trace}))
    patch.setattr(Tensor, "pin_memory", lambda tensor, *_: tensor)
    patch.setattr(Tensor, "backward", lambda loss, *_, **__: backward(loss))
    patch.setattr(Tensor, "numpy", _numpy(Tensor.numpy))
    patch.setattr(FakeTensor, "__deepcopy__", _deepcopy, raising=False)
    patch.setattr(nn.functional, "scaled_dot_product_attention", _attention(trace))
    patch.setattr(rng_module, "BatchGenerator", CudaLikeGenerator)


def _deepcopy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """copy.deepcopy of a fake tensor, which torch refuses."""
    if id(tensor) not in memo:
        new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    return memo[id(tensor)]


def _numpy(real: Any) -> Any:
    """Zeros stand for the numbers of a fake tensor on the host."""

    def numpy(tensor: Tensor, **kwargs: Any) -> np.ndarray:
        if isinstance(tensor, FakeTensor):
            return np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        return real(tensor, **kwargs)

    return numpy


class CudaLikeGenerator(rng_module.BatchGenerator):
    """A generator of the CPU that says it is one of the GPU: a generator of a GPU needs a driver."""

    def __new__(cls, device: torch.device | str = "cpu") -> "CudaLikeGenerator":
        return super().__new__(cls)

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.named = torch.device(device)

    @property
    def device(self) -> torch.device:
        return CUDA if self.named.type == "cuda" else self.named


def _attention(trace: Trace) -> Any:
    """The kernel that CUDA's dispatcher takes: flash for half precision without a mask, else efficient."""
    aten = torch.ops.aten

    def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if torch.is_autocast_enabled("cuda"):
            q, k, v = (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in (q, k, v))
        width = q.shape[-1]
        if q.dtype in (torch.bfloat16, torch.float16) and attn_mask is None and width <= 256 and width % 8 == 0:
            trace.attention["flash"] += 1
            return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
        trace.attention[f"efficient {str(q.dtype).removeprefix('torch.')}"] += 1
        return aten._scaled_dot_product_efficient_attention(
            q, k, v, attn_mask, q.requires_grad, dropout_p, is_causal, scale=scale
        )[0]

    return attend


def backward(loss: Tensor) -> None:
    """Reverse pass over `loss.grad_fn`: torch's own engine asks the driver for a context."""
    root = loss.grad_fn
    uses: collections.Counter[Any] = collections.Counter()
    seen, stack = {root}, [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                uses[node] += 1
                if node not in seen:
                    seen.add(node)
                    stack.append(node)
    gradients: dict[Any, dict[int, Tensor]] = {root: {0: torch.ones_like(loss)}}
    ready = [root]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            outs = _apply(node, gradients.pop(node, {}))
            for (above, position), gradient in zip(node.next_functions, outs, strict=False):
                if above is None:
                    continue
                if gradient is not None:
                    _add(gradients.setdefault(above, {}), position, _fitted(gradient, above, position))
                uses[above] -= 1
                if uses[above] == 0:
                    ready.append(above)
            del outs


def _apply(node: Any, gradients: dict[int, Tensor]) -> list[Tensor | None]:
    """Gradients of a node's inputs; those of a leaf are added to its `grad`."""
    if type(node).__name__ == "AccumulateGrad":
        if gradients:
            leaf = node.variable
            leaf.grad = gradients[0] if leaf.grad is None else leaf.grad + gradients[0]
        return []
    if not gradients:
        return [None] * len(node.next_functions)
    custom = isinstance(node, torch.autograd.function.BackwardCFunction)
    metadata = node._input_metadata
    incoming = [gradients.get(i) for i in range(len(metadata))]
    if custom:
        incoming = [
            torch.zeros(tuple(meta.shape), dtype=meta.dtype, device=meta.device) if part is None else part
            for part, meta in zip(incoming, metadata, strict=True)
        ]
    outs = node.apply(*incoming) if custom else node(*incoming)
    return list(outs) if isinstance(outs, tuple | list) else [outs]


def _add(sums: dict[int, Tensor], position: int, gradient: Tensor) -> None:
    sums[position] = sums[position] + gradient if position in sums else gradient


def _fitted(gradient: Tensor, node: Any, position: int) -> Tensor:
    """As torch's engine: summed over broadcast dimensions and in the dtype of the tensor that it belongs to."""
    try:
        meta = node._input_metadata[position]
    except (AttributeError, IndexError):
        return gradient
    if tuple(gradient.shape) != tuple(meta.shape):
        gradient = gradient.sum_to_size(tuple(meta.shape))
    return gradient.to(meta.dtype) if gradient.dtype != meta.dtype else gradient
