"""Flax models as classifiers: the last linear layer found, its input taken as the features.

logits(x) = phi(x) K + b, where K and b belong to the last `nn.Dense` (Linen) or `nnx.Linear` that
the model executes, and phi, the feature space of arXiv:2202.04052, is the model itself with that
layer replaced by the identity: everything before the layer counts. If anything but an affine step
came after it, the check of every classifier, head(features(images)) == model(images), would fail.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hullgeo import _check
from hullgeo.features import Classifier, LinearHead, Original, assemble, checked_images

# What switches a model to evaluation, as an argument of its call or as an attribute.
_EVALUATION = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "use_running_average": True,
    "inference": True,
}


def from_linen(
    module: Any,
    variables: Mapping[str, Any],
    images: Any,
    *,
    head: str | Sequence[str] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Classifier:
    """A classifier from a Flax Linen module, in evaluation mode.

    Batch statistics are used, not computed, and dropout is off: arguments of the call and
    attributes of the module named `train`, `training`, `is_training`, `deterministic`,
    `use_running_average` or `inference` are set accordingly. What the module writes to its
    collections is dropped. Module and variables stay as they are.

    Args:
      module: a `flax.linen.Module`, images `(n, *image)` to logits `(n, num_classes)`.
      variables: its variables, `{"params": ..., "batch_stats": ...}`; the classifier keeps them as
        leaves. Inside a traced function they may be traced: then only shapes are checked.
      images: a real batch `(n, *image)`, floating point; the first 64 are used for the check.
      head: path of the last layer, `"decoder/logits"` or `("decoder", "logits")`; the last
        `nn.Dense` that is executed if None.
      arguments: more keyword arguments for the module's call; they override the above.

    Returns:
      a `Classifier`. Where the head computes in a narrow type such as bfloat16, features and kernel
      are rounded to it, as in the model, and kept as float32.

    Raises:
      ValueError: for a model that cannot be evaluated so, has no such layer, or does not end in it
        (a softmax, for example), saying what was found and what to pass instead.
    """
    import flax.linen as nn
    from flax.errors import ModifyScopeVariableError

    images = checked_images(images)
    fields = {f.name for f in dataclasses.fields(module)}
    switches = {
        name: value
        for name, value in _EVALUATION.items()
        if name in fields and isinstance(getattr(module, name), bool)
    }
    module = module.clone(**switches) if switches else module
    model = _LinenModel(module, _call_arguments(type(module).__call__, arguments))
    executed: dict[str, Any] = {}
    others: dict[str, None] = {}

    def record(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.method_name == "__call__":
            path = "/".join(context.module.path)
            if isinstance(context.module, nn.Dense):
                executed.pop(path, None)  # the order is that of the last execution
                executed[path] = (args[0] if args else kwargs["inputs"]).dtype, context.module.dtype
            else:
                others[f"{type(context.module).__name__} {path!r}"] = None
        return out

    with _explained("module"), nn.intercept_methods(record):
        try:
            logits = jax.eval_shape(model, variables, images)
        except ModifyScopeVariableError:
            executed.clear()
            model = dataclasses.replace(model, mutable=True)
            logits = jax.eval_shape(model, variables, images)

    path = _choose("module", "nn.Dense", executed, head, list(others))
    params: Any = nn.meta.unbox(variables["params"])
    for step in path.split("/") if path else ():
        params = params[step]
    inputs, dtype = executed[path]
    linear, dtype = _rounded_head(params["kernel"], params.get("bias"), inputs, dtype)
    _check_logits("module", logits, len(images), path, linear)
    features = dataclasses.replace(model, head=path, dtype=dtype)
    with _explained("module", path):
        jax.eval_shape(features, variables, images)
    return assemble(
        features,
        variables,
        linear,
        images,
        Original(
            lambda variables, images: (model(variables, images), {}),
            "module",
            f"the last layer Dense {path!r}",
            dtype,
        ),
    )


def from_nnx(
    model: Any,
    images: Any,
    *,
    head: str | Sequence[str | int] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Classifier:
    """A classifier from a Flax NNX model, in evaluation mode.

    As `from_linen`, for the `nnx.Linear` layers of an NNX model. The classifier holds a copy of the
    model's state: later changes of the model do not reach it, and the model stays as it is.

    Args:
      model: an `nnx.Module`, images `(n, *image)` to logits `(n, num_classes)`.
      images: a real batch `(n, *image)`, floating point; the first 64 are used for the check.
      head: path of the last layer, `"layers/3"` or `("layers", 3)`; the last `nnx.Linear` that is
        executed if None.
      arguments: more keyword arguments for the model's call; they override the switches.

    Returns:
      a `Classifier`, as `from_linen` does.

    Raises:
      ValueError: as `from_linen` does, and for a model that still updates batch statistics or draws
        random numbers.
    """
    from flax import nnx

    images = checked_images(images)
    copy = nnx.clone(model)
    linears, others = {}, []
    for steps, layer in nnx.iter_modules(copy):
        path = "/".join(map(str, steps))
        for name, value in _EVALUATION.items():
            if name in vars(layer) and isinstance(vars(layer)[name], bool | None):
                setattr(layer, name, value)
        if isinstance(layer, nnx.Linear):
            linears[path] = layer
        else:
            others.append(f"{type(layer).__name__} {path!r}")
    graph, state = nnx.split(copy)
    whole = _NNXModel(graph, _call_arguments(model.__call__, arguments))
    executed: dict[str, Any] = {}

    def record(path, call, inputs, *args, **kwargs):
        executed.pop(path, None)  # the order is that of the last execution
        executed[path] = inputs.dtype, linears[path].dtype
        return call(inputs, *args, **kwargs)

    hooks = {path: functools.partial(record, path) for path in linears}
    recording = dataclasses.replace(whole, graph=_hooked(graph, state, hooks))
    with _explained("model"):
        logits = jax.eval_shape(recording, state, images)
    path = _choose("model", "nnx.Linear", executed, head, others)
    bias = linears[path].bias
    linear, dtype = _rounded_head(
        linears[path].kernel[...], None if bias is None else bias[...], *executed[path]
    )
    _check_logits("model", logits, len(images), path, linear)
    without = _hooked(graph, state, {path: _Identity(dtype)})
    features = _NNXModel(without, whole.arguments, widen=True)
    with _explained("model", path):
        jax.eval_shape(features, state, images)
    return assemble(
        features,
        state,
        linear,
        images,
        Original(whole.logits_and_faults, "model", f"the last layer Linear {path!r}", dtype),
    )


@dataclasses.dataclass(frozen=True)
class _LinenModel:
    """`(variables, images)` to logits, or to the input of the layer at `head`."""

    module: Any
    arguments: tuple[tuple[str, Any], ...]
    mutable: bool = False
    head: str | None = None
    dtype: Any = None

    def __call__(self, variables: Any, images: Any) -> Any:
        import flax.linen as nn
        from flax.core import DenyList

        def stop_at_head(call, args, kwargs, context):
            at_head = context.method_name == "__call__" and isinstance(context.module, nn.Dense)
            if at_head and "/".join(context.module.path) == self.head:
                return (args[0] if args else kwargs["inputs"]).astype(self.dtype)
            return call(*args, **kwargs)

        mutable = DenyList(("params", "batch_stats")) if self.mutable else False
        with nn.intercept_methods(stop_at_head):
            out = self.module.apply(variables, images, mutable=mutable, **dict(self.arguments))
        out = out[0] if self.mutable else out
        return out if self.head is None else _widened(out)


@dataclasses.dataclass(frozen=True)
class _NNXModel:
    """`(state, images)` to what the model returns; what it changes in its state is dropped."""

    graph: Any
    arguments: tuple[tuple[str, Any], ...]
    widen: bool = False

    def __call__(self, state: Any, images: Any) -> Any:
        from flax import nnx

        out = nnx.merge(self.graph, state, copy=True)(images, **dict(self.arguments))
        return _widened(out) if self.widen else out

    def logits_and_faults(self, state: Any, images: Any) -> tuple[Any, dict[str, Any]]:
        """The logits, and whether the model is still in training."""
        from flax import nnx

        model, untouched = (nnx.merge(self.graph, state, copy=True) for _ in range(2))
        logits = model(images, **dict(self.arguments))
        faults = {}
        for kind, message in (
            (nnx.BatchStat, "a model that updates its batch statistics"),
            (nnx.RngCount, "a model that draws random numbers"),
        ):
            before, after = (jax.tree.leaves(nnx.state(m, kind)) for m in (untouched, model))
            changed = [jnp.any(a != b) for a, b in zip(before, after, strict=True)]
            faults[message] = jnp.any(jnp.asarray([False, *changed]))
        return logits, faults


@dataclasses.dataclass(frozen=True)
class _Identity:
    """In place of a layer: its input, in the type in which the layer computes."""

    dtype: Any

    def __call__(self, call: Callable[..., Any], inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return inputs.astype(self.dtype)


def _hooked(graph: Any, state: Any, hooks: Mapping[str, Callable[..., Any]]) -> Any:
    """The graph of an NNX model in which `hook(call, inputs)` stands for some layers' `call`."""
    from flax import nnx

    model = nnx.merge(graph, state, copy=True)
    for steps, layer in list(nnx.iter_modules(model)):
        hook = hooks.get("/".join(map(str, steps)))
        if hook is not None:
            object.__setattr__(layer, "__class__", _hookable(type(layer)))
            object.__setattr__(layer, "hook", hook)
    return nnx.split(model)[0]


@functools.lru_cache(maxsize=128)
def _hookable(kind: type) -> type:
    """A subclass of an NNX layer; one per layer type, so that equal models have equal graphs."""

    def __call__(self, *args, **kwargs):
        return self.hook(functools.partial(kind.__call__, self), *args, **kwargs)  # type: ignore

    return type(f"Hooked{kind.__name__}", (kind,), {"__call__": __call__})


def _call_arguments(
    call: Callable[..., Any], arguments: Mapping[str, Any] | None
) -> tuple[tuple[str, Any], ...]:
    """The switches to evaluation that the call knows, and the caller's own arguments."""
    known = inspect.signature(call).parameters
    merged = {key: value for key, value in _EVALUATION.items() if key in known}
    return tuple((merged | dict(arguments or {})).items())


@contextlib.contextmanager
def _explained(name: str, head: str | None = None) -> Iterator[None]:
    """What goes wrong inside a user's model, said in terms of the constructor's arguments."""
    from flax.errors import FlaxError

    try:
        yield
    except (FlaxError, TypeError, ValueError) as error:
        expected = "to give logits for images in evaluation mode"
        way_out = "Set what it needs by arguments={...}, or check the images and the variables."
        if head is not None:
            expected = f"to end in the layer {head!r}"
            way_out = "Name the last layer by head=, or use from_callables(features, head, images)."
        raise ValueError(f"Expected {name} {expected}, got: {error} {way_out}") from error


def _choose(
    name: str,
    kind: str,
    executed: Mapping[str, Any],
    head: str | Sequence[str | int] | None,
    others: Sequence[str],
) -> str:
    """The path of the head among the layers that the model executed."""
    if head is not None:
        path = head if isinstance(head, str) else "/".join(map(str, head))
        _check.one_of("head", path, executed)
        return path
    if not executed:
        shown = ", ".join(others[:8]) + (", ..." if len(others) > 8 else "")
        _check.fail(
            name,
            f"no {kind}, but {shown}",
            f"to execute an {kind} as its last layer",
            "Split it by hand with from_callables(features, head, images).",
        )
    return list(executed)[-1]


def _check_logits(name: str, logits: Any, size: int, path: str, head: LinearHead) -> None:
    shape = (size, head.kernel.shape[-1])
    if getattr(logits, "shape", None) != shape:
        _check.fail(
            name,
            f"outputs of shape {jax.tree.map(jnp.shape, logits)}",
            f"to return what its last linear layer {path!r} returns, an array {shape}",
            "Wrap it, name another layer by head=, or use from_callables(features, head, images).",
        )


def _rounded_head(kernel: Any, bias: Any, inputs: Any, dtype: Any) -> tuple[LinearHead, Any]:
    """The numbers with which a layer computes, and its type; wide enough for exact conversion."""
    if dtype is None:
        dtype = np.result_type(inputs, kernel.dtype)
    bias = jnp.zeros(kernel.shape[-1], kernel.dtype) if bias is None else bias
    return LinearHead(*(_widened(jnp.asarray(a).astype(dtype)) for a in (kernel, bias))), dtype


def _widened(array: Any) -> Any:
    """At least float32."""
    return array.astype(np.promote_types(array.dtype, np.float32))
