"""A classifier as features followed by a linear head: logits(x) = phi(x) K + b.

phi(x), the input of the network's last linear layer after everything that precedes it, lies in the
space in which the network separates its classes (arXiv:2202.04052, section 2); `K` (d, num_classes)
and `b` (num_classes,) are Flax's own layout. Every constructor checks the split on real images:
`head(features(images))` has to equal the model's own logits up to rounding.

>>> classifier = from_callables(features, (kernel, bias), images)   # from_linen, from_nnx for Flax
>>> phi = extract_features(classifier, images, batch_size=256)
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hullgeo import _check, _numerics
from hullgeo.parallel import split_over_devices

_CHECKED = 64  # images on which a new classifier is checked


class LinearHead(NamedTuple):
    """The last step of a classifier, z = phi K + b, as a callable pytree.

    Attributes:
      kernel: `(dim, num_classes)`, one column a class.
      bias: `(num_classes,)`.
    """

    kernel: Float[Array, "dim num_classes"]
    bias: Float[Array, "num_classes"]

    def __call__(self, features: Any) -> Float[Array, "*batch num_classes"]:
        """Logits of features `(*batch, dim)`, at full precision in the wider of the two types."""
        dtype = np.result_type(features.dtype, self.kernel.dtype, self.bias.dtype)
        with _numerics.float64():
            features, kernel, bias = (jnp.asarray(a, dtype) for a in (features, *self))
            logits = _numerics.product(features, kernel)
            return logits + jnp.broadcast_to(bias, logits.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A network split where it becomes linear; a pytree that passes through jit, vmap, grad, pmap.

    Attributes:
      features: images `(*batch, *image)`, float in [0, 1], to features `(*batch, dim)`.
      head: features to logits.
    """

    features: jax.tree_util.Partial
    head: LinearHead

    def __call__(self, images: Any) -> Float[Array, "*batch num_classes"]:
        """Logits of images `(*batch, *image)`."""
        return self.head(self.features(images))


def from_arrays(kernel: Any, bias: Any = None) -> Classifier:
    """A classifier whose images are feature vectors already: `features` is the identity.

    Args:
      kernel: `(dim, num_classes)` floating point, one column a class.
      bias: `(num_classes,)`; zeros where there is none.

    Returns:
      a `Classifier` of "images" `(*batch, dim)`; its `head` is what the functions of features and a
      head take.

    Raises:
      ValueError: for shapes that do not fit, other types, fewer than two classes, NaN or infinity.
    """
    return Classifier(
        jax.tree_util.Partial(_AnyBatch(_identity, 1), ()), _checked_head(kernel, bias)
    )


def from_callables(features: Callable[[Any], Any], head: Any, images: Any) -> Classifier:
    """A classifier from plain functions, whatever library they come from.

    Args:
      features: traceable, images `(n, *image)` to features `(n, dim)`. A
        `jax.tree_util.Partial` keeps its parameters visible to jit and grad.
      head: a `LinearHead`, a pair `(kernel, bias)`, or an affine function of features `(n, dim)`
        to logits, whose kernel and bias are then read off.
      images: a real batch `(n, *image)`, floating point, at least one image, on which the parts are
        checked; it also fixes how many trailing axes make one image.

    Returns:
      a `Classifier` that takes images with any leading axes.

    Raises:
      ValueError: for parts that do not fit, and for a head that is not affine.
    """
    images = checked_images(images)
    if not isinstance(features, jax.tree_util.Partial):
        features = jax.tree_util.Partial(_Static(features))
    if not callable(head) or isinstance(head, LinearHead):
        if not isinstance(head, tuple) or len(head) != 2:
            expected = "to be a pair (kernel, bias), a LinearHead or a function"
            _check.fail("head", type(head).__name__, expected)
        return assemble(_call, features, _checked_head(*head), images)
    affine: Any = head
    values: Any = jax.eval_shape(features, images)
    if len(values.shape) != 2:
        _refuse_features(values)
    with jax.default_matmul_precision("highest"):
        origin = jnp.zeros(values.shape[1:], values.dtype)
        kernel = jax.jacfwd(lambda vector: affine(vector[None])[0])(origin).T
        linear = _checked_head(kernel, affine(origin[None])[0])
    model = Original(lambda features, images: (affine(features(images)), {}), "head", "a function")
    return assemble(_call, features, linear, images, model)


class Original(NamedTuple):
    """A model before it was split, against which its parts are checked.

    Attributes:
      logits: `(parameters, images)` to the logits `(n, num_classes)`, and to traced truth values by
        the message with which each refuses the model.
      name: the argument that a refusal names.
      found: what the model was found to end in.
      dtype: the type in which it computes its head.
    """

    logits: Callable[[Any, Any], tuple[Any, dict[str, Any]]]
    name: str
    found: str
    dtype: Any = np.float32


def assemble(
    function: Callable[[Any, Any], Any],
    parameters: Any,
    head: LinearHead,
    images: Any,
    original: Original | None = None,
) -> Classifier:
    """The parts put together and checked on real images; constructors end here.

    Args:
      function: `(parameters, images)` of one leading axis to features `(n, dim)`.
      parameters: a pytree.
      head: the linear head.
      images: as `checked_images` returns them.
      original: what the parts have to reproduce, where there is such a thing.

    Returns:
      a `Classifier`. Inside a traced function only shapes are checked.

    Raises:
      ValueError: where the original is not the head after the features.
    """
    batched = jax.tree_util.Partial(_AnyBatch(_Static(function), images.ndim - 1), parameters)

    @jax.jit  # one program, so that both sides see the same rounding
    def evaluate(batched, parameters, images):
        with jax.default_matmul_precision("highest"):
            return batched(images), original and original.logits(parameters, images)

    values, evaluated = evaluate(batched, parameters, images)
    if values.ndim != 2:
        _refuse_features(values)
    dim = values.shape[1]
    _check.shape("kernel", head.kernel, (dim, None), f"({dim}, num_classes)")
    if original is not None:
        _check_agreement(head, values, evaluated, original)
    return Classifier(batched, head)


def extract_features(
    classifier: Classifier,
    images: Any,
    *,
    batch_size: int = 256,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = False,
) -> Float[np.ndarray, "n dim"]:
    """Features of many images, a batch at a time.

    Only one batch is on the device at a time (and the one before it on its way back); every batch
    is padded to one size, so that one program is compiled.

    Args:
      classifier: whose features.
      images: an array `(n, *image)`, floating point, or an iterable of such arrays of any lengths.
      batch_size: images per batch, over all devices together.
      devices: split each batch over these; None for the default device.
      progress: show a progress bar.

    Returns:
      `(n, dim)`, in the order of the images. A NaN in an image shows in that image's features only,
      where the network treats its images independently.

    Raises:
      ValueError: for no images, integers, axes that do not fit, and bad options.
    """
    _check.at_least("batch_size", batch_size, 1)
    if devices is not None and len(devices) == 0:
        _check.fail("devices", devices, "to hold at least one device", "Pass None for the default.")
    from tqdm.auto import tqdm

    image_ndim = getattr(classifier.features.func, "image_ndim", None)
    total = len(images) if hasattr(images, "shape") else None
    parts: list[Any] = []
    size = 0
    with tqdm(total=total, unit="image", disable=not progress) as bar:
        for batch in _batches(images, batch_size, image_ndim):
            size = len(batch)
            padding = [(0, batch_size - size)] + [(0, 0)] * (batch.ndim - 1)
            padded = np.pad(batch, padding, mode="edge") if size < batch_size else batch
            if devices is None:
                found = _jitted_features(classifier, padded)
            else:
                found = split_over_devices(_features_of, classifier, padded, devices)
            if parts:
                parts[-1] = np.asarray(parts[-1])  # waits for the batch before, not for this one
            parts.append(found)
            bar.update(size)
    if not parts:
        _check.fail("images", "no images", "to hold at least one image")
    parts[-1] = np.asarray(parts[-1])[:size]
    return np.concatenate(parts)


def _features_of(classifier: Classifier, images: Any) -> Any:
    return classifier.features(images)


_jitted_features = jax.jit(_features_of)


def _batches(images: Any, size: int, image_ndim: int | None) -> Iterator[Any]:
    """Batches of exactly `size` images, but for the last."""
    if hasattr(images, "shape"):
        _check_image_array(images, image_ndim)
        for start in range(0, len(images), size):
            yield images[start : start + size]
        return
    if not isinstance(images, Iterable):
        _check.fail("images", images, "to be an array (n, *image) or an iterable of them")
    rest = None
    for chunk in images:
        _check_image_array(chunk, image_ndim)
        rest = np.asarray(chunk) if rest is None else np.concatenate([rest, chunk])
        while len(rest) >= size:
            yield rest[:size]
            rest = rest[size:]
    if rest is not None and len(rest):
        yield rest


def _identity(parameters: Any, images: Any) -> Any:
    return images


def _call(function: Callable[[Any], Any], images: Any) -> Any:
    return function(images)


@dataclasses.dataclass(frozen=True, eq=False)
class _Static:
    """A function as a key of compiled programs: by value, or by identity where it has no hash."""

    function: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> Any:
        try:
            hash(self.function)
        except TypeError:
            return id(self.function)
        return self.function


@dataclasses.dataclass(frozen=True)
class _AnyBatch:
    """`function(parameters, images)` of one leading axis, made to take any number of them."""

    function: Callable[[Any, Any], Any]
    image_ndim: int

    def __call__(self, parameters: Any, images: Any) -> Any:
        if images.ndim < self.image_ndim:
            _check.fail(
                "images.shape", images.shape, f"to end in the {self.image_ndim} axes of an image"
            )
        batch = images.shape[: images.ndim - self.image_ndim]
        flat = images.reshape(math.prod(batch), *images.shape[len(batch) :])
        features = self.function(parameters, flat)
        return features.reshape(*batch, *features.shape[1:])


def checked_images(images: Any) -> Any:
    """A few real images `(n, *image)` on which to check a classifier."""
    _check_image_array(images)
    if images.shape[0] == 0:
        _check.fail("images.shape", images.shape, "to hold at least one image")
    _check.all_finite("images", images[:_CHECKED])
    return images[:_CHECKED]


def _check_image_array(images: Any, image_ndim: int | None = None) -> None:
    if not hasattr(images, "dtype"):
        _check.fail("images", type(images).__name__, "to be an array (n, *image)")
    _check.rank_at_least("images", images, 2, "(n, *image)")
    if image_ndim is not None and images.ndim != 1 + image_ndim:
        way_out = "Pass a single image as image[None]."
        _check.fail("images.shape", images.shape, f"to have 1 + {image_ndim} axes", way_out)
    if not jnp.issubdtype(images.dtype, np.floating):
        _check.fail(
            "images.dtype",
            str(images.dtype),
            "to be floating point in [0, 1]",
            "Divide by 255 first: (images / 255).astype('float32').",
        )


def _refuse_features(values: Any) -> None:
    _check.fail(
        "features(images).shape",
        values.shape,
        "to be (n, dim)",
        "Flatten the features of an image to one vector.",
    )


def _checked_head(kernel: Any, bias: Any) -> LinearHead:
    """A head whose parts fit each other; zeros for a bias of None."""
    kernel = kernel if hasattr(kernel, "dtype") else np.asarray(kernel)
    _check.floating("kernel", kernel)
    _check.shape("kernel", kernel, (None, None), "(dim, num_classes)")
    bias = np.zeros(kernel.shape[1], kernel.dtype) if bias is None else bias
    bias = bias if hasattr(bias, "dtype") else np.asarray(bias)
    _check.floating("bias", bias)
    _check.shape("bias", bias, (kernel.shape[1],), f"(num_classes,) = ({kernel.shape[1]},)")
    if kernel.shape[1] < 2:
        _check.fail(
            "kernel.shape",
            kernel.shape,
            "to have at least two columns, one a class",
            "For one logit z of two classes pass the kernel of (0, z).",
        )
    _check.all_finite("kernel", kernel)
    _check.all_finite("bias", bias)
    return LinearHead(kernel, bias)


def _check_agreement(head: LinearHead, values: Any, evaluated: Any, original: Original) -> None:
    """The original's logits against the head's, up to the rounding of the original's type."""
    (logits, faults), (_, name, found, dtype) = evaluated, original
    way_out = (
        "Return logits from the model, name another layer by head=, or split it by hand with "
        "from_callables(features, head, images)."
    )
    if not all(map(_check.is_concrete, jax.tree.leaves((head, values, logits, faults)))):
        return
    for message, fault in faults.items():
        if fault:
            switch = "Pass what switches it in the call, e.g. arguments={'is_train': False}."
            _check.fail(name, message, "to be in evaluation mode", switch)
    expected, phi, kernel, bias = (np.asarray(a, np.float64) for a in (logits, values, *head))
    error = np.abs(phi @ kernel + bias - expected)
    terms = np.abs(phi) @ np.abs(kernel) + np.abs(bias)
    eps = max(float(jnp.finfo(kind).eps) for kind in (logits.dtype, dtype))
    sums_to_one = expected.min() >= 0 and np.abs(expected.sum(-1) - 1).max() < 0.01
    if not np.isfinite(expected).all():
        reason = "its outputs for real images are not finite; look at its parameters"
    elif sums_to_one:
        reason = "its outputs sum to 1, so it ends in a softmax"
    elif not (error <= (8 + np.sqrt(phi.shape[1])) * eps * terms).all():
        reason = f"its outputs differ from the logits of that layer by up to {error.max():.3g}"
    else:
        return
    _check.fail(name, f"{found}; {reason}", "to end in a linear layer", way_out)
