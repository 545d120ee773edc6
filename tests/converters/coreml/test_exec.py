"""The executor of Core ML files: each operator against coremltools, torch or NumPy; whole files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.converters.coreml import exec as coreml_exec
from edgeq.converters.coreml.decoder import CoreMLDecoderTarget
from edgeq.converters.coreml.exec.blob import KINDS, Reader, Writer
from edgeq.converters.coreml.exec.load import functions, open_file
from edgeq.converters.coreml.exec.weights import Packed
from edgeq.core.errors import FormatError, UnsupportedError, UsageError

coreml = CoreMLDecoderTarget()

ct = pytest.importorskip("coremltools")
torch = pytest.importorskip("torch")

from coremltools.converters.mil.mil import Function, types  # noqa: E402

from tests.coreml_made import (  # noqa: E402
    TARGETS,
    Array,
    F,
    T,
    depth_to_space,
    ints,
    mb,
    package,
    quietly,
    rand,
    reordered,
)


def run(
    folder: Path, build: Callable[..., Any], arrays: Sequence[Array], target: str
) -> list[Array]:
    names = [f"i{n}" for n in range(len(arrays))]
    flags = {n for n, a in zip(names, arrays, strict=True) if a.dtype == bool}
    inputs = {n: a.astype(np.int32) if n in flags else a.copy()
              for n, a in zip(names, arrays, strict=True)}  # fmt: skip

    def body(**v: Any) -> list[Any]:
        # flags go in and out as integers: Core ML has no arrays of them
        given = [mb.cast(x=v[n], dtype="bool") if n in flags else v[n] for n in names]
        found = build(*given)
        found = list(found) if isinstance(found, (tuple, list)) else [found]
        return [mb.cast(x=f, dtype="int32") if f.dtype == types.bool else f for f in found]

    path = package(folder, body, inputs, target=target)
    model = coreml_exec.open_model(path)
    function = model._function(None)
    found = model.machine.run(function, inputs)
    return [found[name] for name in function.block.outputs]


def inferred(build: Callable[..., Any], arrays: Sequence[Array], target: str) -> list[Array]:
    """What coremltools' own NumPy says of constants."""
    with Function({}, opset_version=TARGETS[target]):
        found = build(*(mb.const(val=a.copy()) for a in arrays))  # some are changed in place
        found = list(found) if isinstance(found, (tuple, list)) else [found]
        for v in found:
            assert v.val is not None, "coremltools infers no value"
        return [np.asarray(v.val) for v in found]


def of_one(name: str, **parameters: Any) -> Callable[[Any], Any]:
    return lambda x: getattr(mb, name)(x=x, **parameters)


def of_two(name: str) -> Callable[[Any, Any], Any]:
    return lambda x, y: getattr(mb, name)(x=x, y=y)


def resampled(padding: str) -> Callable[[Any, Any], Any]:
    return lambda x, c: mb.resample(
        x=x, coordinates=c, sampling_mode="bilinear", padding_mode=padding,
        padding_value=np.float32(0), coordinates_mode="normalized_minus_one_to_one",
        align_corners=False,
    )  # fmt: skip


def sampled(mode: str) -> Callable[[Array, Array], Any]:
    return lambda x, c: F.grid_sample(T(x), T(c), "bilinear", mode, align_corners=False)


X = rand(2, 3, 4)
IMG = rand(2, 4, 7, 6)
BOX = ints(0, 2, 1)

# name, builder over values, inputs, oracle over arrays (None: coremltools' own inference)
CASES: list[tuple[str, Callable[..., Any], list[Array], Callable[..., Any] | None]] = [
    *[(n, of_one(n), [rand(3, 5, low=0.1)], None)
      for n in ("abs", "ceil", "cos", "exp", "exp2", "floor", "round", "sign", "sin", "sqrt",
                "square", "tan", "tanh", "atan", "sinh", "cosh", "relu", "relu6",
                "sigmoid", "softplus", "softsign", "erf")],
    *[(n, of_one(n), [np.float32([-0.9, 0.0, 0.5])], None)
      for n in ("asin", "acos", "atanh")],
    *[(n, of_two(n), [rand(2, 3, low=1), rand(3, low=2)],
       None)
      for n in ("add", "sub", "mul", "real_div", "floor_div", "maximum", "minimum", "pow", "mod",
                "greater", "greater_equal", "less", "less_equal", "equal", "not_equal")],
    *[(n, of_two(n),
       [np.array([True, False, True]), np.array([True, True, False])], None)
      for n in ("logical_and", "logical_or", "logical_xor")],
    ("logical_not", lambda x: mb.logical_not(x=x), [np.array([True, False])], None),
    ("silu", lambda x: mb.silu(x=x), [X], lambda x: F.silu(T(x))),
    ("gelu", lambda x: mb.gelu(x=x), [X], lambda x: F.gelu(T(x))),
    ("gelu tanh", lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"), [X],
     lambda x: F.gelu(T(x), approximate="tanh")),
    ("gelu sigmoid", lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"), [X], None),
    ("elu", lambda x: mb.elu(x=x, alpha=0.7), [X], lambda x: F.elu(T(x), 0.7)),
    ("leaky_relu", lambda x: mb.leaky_relu(x=x, alpha=0.1), [X], lambda x: F.leaky_relu(T(x), 0.1)),
    ("prelu", lambda x: mb.prelu(x=x, alpha=np.float32([0.1, 0.2, 0.3])), [rand(2, 3, 4, 4)],
     lambda x: F.prelu(T(x), torch.tensor([0.1, 0.2, 0.3]))),
    ("clip", lambda x: mb.clip(x=x, alpha=-0.5, beta=0.5), [X], None),
    ("clamped_relu", lambda x: mb.clamped_relu(x=x, alpha=0.3, beta=0.8), [X], None),
    ("linear_activation", lambda x: mb.linear_activation(x=x, alpha=2.0, beta=1.0), [X], None),
    ("scaled_tanh", lambda x: mb.scaled_tanh(x=x, alpha=2.0, beta=0.5), [X], None),
    ("sigmoid_hard", lambda x: mb.sigmoid_hard(x=x, alpha=0.2, beta=0.5), [X], None),
    ("softplus_parametric", lambda x: mb.softplus_parametric(
        x=x, alpha=np.float32([1, 2, 3]), beta=np.float32([3, 2, 1])), [rand(1, 3, 2, 2)], None),
    ("threshold", lambda x: mb.threshold(x=x, alpha=0.2), [X], None),
    ("thresholded_relu", lambda x: mb.thresholded_relu(x=x, alpha=0.2), [X], None),
    ("log", lambda x: mb.log(x=x, epsilon=1e-3), [rand(4, low=0.0)], None),
    ("rsqrt", lambda x: mb.rsqrt(x=x, epsilon=1e-3), [rand(4, low=0.0)], None),
    ("inverse", lambda x: mb.inverse(x=x, epsilon=1e-3), [rand(4, low=0.5)], None),
    ("cast", lambda x: mb.cast(x=x, dtype="int32"), [X * 3], None),
    ("select", lambda c, a, b: mb.select(cond=c, a=a, b=b), [X > 0, X, -X], None),
    ("softmax", lambda x: mb.softmax(x=x, axis=1), [X], lambda x: F.softmax(T(x), 1)),
    # reductions: coremltools' inference of means fails with new NumPy, torch's does not
    *[(n, of_one(n, axes=[0, 2], keep_dims=True),
       [rand(2, 3, 4, low=0.1)], f)
      for n, f in {
          "reduce_sum": lambda x: T(x).sum((0, 2), True),
          "reduce_mean": lambda x: T(x).mean((0, 2), True),
          "reduce_max": lambda x: T(x).amax((0, 2), True),
          "reduce_min": lambda x: T(x).amin((0, 2), True),
          "reduce_prod": lambda x: T(x).prod(0, True)[0].prod(1, True)[None],
          "reduce_l1_norm": lambda x: T(x).abs().sum((0, 2), True),
          "reduce_l2_norm": lambda x: T(x).norm(dim=(0, 2), keepdim=True),
          "reduce_log_sum": lambda x: T(x).sum((0, 2), True).log(),
          "reduce_log_sum_exp": lambda x: T(x).logsumexp((0, 2), True),
          "reduce_sum_square": lambda x: (T(x) ** 2).sum((0, 2), True),
      }.items()],
    ("reduce_mean flat", lambda x: mb.reduce_mean(x=x, axes=[1]), [X], lambda x: T(x).mean(1)),
    ("reduce_argmax", lambda x: mb.reduce_argmax(x=x, axis=1), [X], lambda x: T(x).argmax(1)),
    ("reduce_argmin", lambda x: mb.reduce_argmin(x=x, axis=-1, keep_dims=True), [X],
     lambda x: T(x).argmin(-1, True)),
    # shapes
    ("reshape", lambda x: mb.reshape(x=x, shape=[4, -1]), [X], None),
    ("reshape keeps", lambda x: mb.reshape(x=x, shape=[0, -1]), [X], lambda x: x.reshape(2, -1)),
    ("transpose", lambda x: mb.transpose(x=x, perm=[2, 0, 1]), [X], None),
    ("expand_dims", lambda x: mb.expand_dims(x=x, axes=[0, 2]), [X], None),
    ("squeeze", lambda x: mb.squeeze(x=x, axes=[1]), [rand(3, 1, 2)], None),
    ("flatten2d", lambda x: mb.flatten2d(x=x, axis=2), [X], None),
    ("concat", lambda x, y: mb.concat(values=[x, y], axis=1), [X, -X], None),
    ("concat one", lambda x: mb.concat(values=[x], axis=0), [X], None),
    ("concat interleave", lambda x, y: mb.concat(values=[x, y], axis=0, interleave=True),
     [rand(2, 3), rand(2, 3, seed=1)], lambda x, y: np.stack([x[0], y[0], x[1], y[1]])),
    ("stack", lambda x, y: mb.stack(values=[x, y], axis=1), [X, -X], None),
    ("split", lambda x: mb.split(x=x, num_splits=2, axis=2), [X], None),
    ("split sizes", lambda x: mb.split(x=x, split_sizes=[1, 3], axis=-1), [X], None),
    ("tile", lambda x: mb.tile(x=x, reps=[1, 2, 3]), [X], None),
    ("pad", lambda x: mb.pad(x=x, pad=[1, 2, 0, 3], constant_val=0.5), [X], None),
    ("pad reflect", lambda x: mb.pad(x=x, pad=[1, 2], mode="reflect"), [X], None),
    ("pad replicate", lambda x: mb.pad(x=x, pad=[1, 2], mode="replicate"), [X], None),
    ("slice_by_index", lambda x: mb.slice_by_index(
        x=x, begin=[0, 1, 3], end=[2, 3, 0], stride=[1, 1, -2]), [X], None),
    ("slice masks", lambda x: mb.slice_by_index(
        x=x, begin=[1, 1, 0], end=[2, 0, 2], begin_mask=[False, False, True],
        end_mask=[False, True, False], squeeze_mask=[True, False, False]), [X], None),
    ("slice_by_size", lambda x: mb.slice_by_size(x=x, begin=ints(0, 1, 1), size=ints(2, 1, -1)),
     [X], None),
    ("slice_update", lambda x, u: mb.slice_update(x=x, update=u, begin=[0, 1, 0], end=[2, 2, 4]),
     [X, rand(2, 1, 4)], lambda x, u: np.concatenate([x[:, :1], u, x[:, 2:]], 1)),
    ("reverse", lambda x: mb.reverse(x=x, axes=[0, 2]), [X], None),
    ("reverse_sequence", lambda x: mb.reverse_sequence(
        x=x, lengths=ints(1, 3), seq_axis=1, batch_axis=0), [X],
     lambda x: np.stack([x[0], x[1][::-1]])),
    ("sliding_windows", lambda x: mb.sliding_windows(x=x, axis=1, size=2, stride=1), [X],
     lambda x: T(x).unfold(1, 2, 1).movedim(-1, 2)),
    ("depth_to_space", lambda x: mb.depth_to_space(x=x, block_size=2), [rand(1, 8, 2, 3)],
     lambda x: depth_to_space(x, 2)),
    ("space_to_depth", lambda x: mb.space_to_depth(x=x, block_size=2), [rand(1, 2, 4, 6)],
     lambda x: _space_to_depth(x, 2)),
    ("pixel_shuffle", lambda x: mb.pixel_shuffle(x=x, upscale_factor=2), [rand(2, 8, 2, 3)],
     lambda x: F.pixel_shuffle(T(x), 2)),
    ("pixel_unshuffle", lambda x: mb.pixel_unshuffle(x=x, downscale_factor=np.uint32(2)),
     [rand(2, 2, 4, 6)], lambda x: F.pixel_unshuffle(T(x), 2)),
    ("space_to_batch", lambda x: mb.space_to_batch(
        x=x, block_shape=[2, 3], paddings=[[0, 1], [1, 2]]), [rand(2, 2, 3, 6)],
     lambda x: _space_to_batch(x)),
    ("batch_to_space", lambda x: mb.batch_to_space(
        x=x, block_shape=[2, 3], crops=[[0, 1], [1, 2]]), [_b2s := rand(12, 2, 2, 3)],
     lambda x: _batch_to_space(x)),
    ("shape", lambda x: mb.shape(x=x), [X], None),
    # gather and scatter
    ("gather", lambda x: mb.gather(x=x, indices=BOX, axis=1), [X], None),
    ("gather batched", lambda x: mb.gather(
        x=x, indices=np.array([[2, 0], [1, 1]], np.int32), axis=1, batch_dims=1), [X], None),
    ("gather_along_axis", lambda x: mb.gather_along_axis(
        x=x, indices=np.array([[1, 0, 0], [0, 1, 1]], np.int32), axis=0), [rand(2, 3)], None),
    ("gather_nd", lambda x: mb.gather_nd(x=x, indices=np.array([[1, 2], [0, 0]], np.int32)), [X],
     lambda x: x[[1, 0], [2, 0]]),
    ("gather_nd batched", lambda x: mb.gather_nd(
        x=x, indices=np.array([[[2]], [[0]]], np.int32), batch_dims=1), [X],
     lambda x: np.stack([x[0, [2]], x[1, [0]]])),
    ("scatter", lambda x, u: mb.scatter(data=x, indices=ints(2, 0), updates=u, axis=0, mode="add"),
     [rand(3, 4), rand(2, 4)],
     lambda x, u: T(x).index_add(0, torch.tensor([2, 0]), T(u))),
    ("scatter axis 1", lambda x, u: mb.scatter(
        data=x, indices=ints(2, 0), updates=u, axis=1, mode="update"), [rand(3, 4), rand(3, 2)],
     lambda x, u: T(x).index_copy(1, torch.tensor([2, 0]), T(u))),
    ("scatter_along_axis", lambda x, u: mb.scatter_along_axis(
        data=x, indices=np.array([[2, 0, 1, 1]], np.int32), updates=u, axis=0, mode="add"),
     [rand(3, 4), rand(1, 4)],
     lambda x, u: T(x).scatter_add(0, torch.tensor([[2, 0, 1, 1]]), T(u))),
    ("scatter_nd", lambda x, u: mb.scatter_nd(
        data=x, indices=np.array([[0, 1], [2, 2]], np.int32), updates=u, mode="max"),
     [rand(3, 4), rand(2, low=2.0)],
     lambda x, u: T(x).index_put((torch.tensor([0, 2]), torch.tensor([1, 2])), T(u))),
    # made, counted, ordered
    ("band_part", lambda x: mb.band_part(x=x, lower=1, upper=0), [rand(4, 5)], None),
    ("cumsum", lambda x: mb.cumsum(x=x, axis=1), [X], None),
    ("cumsum odd", lambda x: mb.cumsum(x=x, axis=1, exclusive=True, reverse=True), [X],
     lambda x: T(x).flip(1).cumsum(1).flip(1) - T(x)),
    ("fill", lambda x: mb.add(x=x, y=mb.fill(shape=[2, 3, 4], value=2.0)), [X], lambda x: x + 2),
    ("fill_like", lambda x: mb.fill_like(ref_tensor=x, value=2.0), [X], lambda x: 0 * x + 2),
    ("non_zero", lambda x: mb.non_zero(x=x), [np.float32([[0, 1], [2, 0]])], None),
    ("one_hot", lambda x: mb.one_hot(indices=x, one_hot_vector_size=4, axis=0), [ints(1, 3)],
     lambda x: F.one_hot(T(x).long(), 4).T),
    ("range_1d", lambda x: mb.range_1d(
        start=np.int32(1), end=mb.squeeze(x=x, axes=[0]), step=np.int32(2)), [ints(8)],
     lambda x: np.arange(1, 8, 2)),
    ("topk", lambda x: mb.topk(x=x, k=2, axis=1), [X], lambda x: tuple(T(x).topk(2, 1))),
    ("topk ascending", lambda x: mb.topk(x=x, k=2, axis=-1, ascending=True), [X],
     lambda x: tuple(T(x).topk(2, -1, largest=False))),
    ("argsort", lambda x: mb.argsort(x=x, axis=1), [X], None),
    # products
    ("matmul", lambda x, y: mb.matmul(x=x, y=y, transpose_y=True), [X, rand(5, 4)], None),
    ("matmul both", lambda x, y: mb.matmul(x=x, y=y, transpose_x=True, transpose_y=True),
     [rand(2, 4, 3), rand(2, 5, 4)], None),
    ("linear", lambda x: mb.linear(x=x, weight=rand(5, 4), bias=rand(5)), [X], None),
    ("einsum", lambda x, y: mb.einsum(values=(x, y), equation="nchw,nwhr->nchr"),
     [rand(2, 3, 4, 5), rand(2, 5, 4, 3)], lambda x, y: np.einsum("nchw,nwhr->nchr", x, y)),
    ("attention", lambda q, k, v, m: mb.scaled_dot_product_attention(
        query=q, key=k, value=v, attn_mask=m),
     [rand(1, 2, 3, 4), rand(1, 2, 5, 4), rand(1, 2, 5, 6), rand(3, 5)],
     lambda q, k, v, m: F.scaled_dot_product_attention(T(q), T(k), T(v), T(m))),
    # windows
    ("conv", lambda x: mb.conv(x=x, weight=rand(6, 4, 3, 3), bias=rand(6), strides=[2, 1],
                               pad_type="custom", pad=[1, 1, 0, 0], dilations=[1, 2]), [IMG],
     lambda x: F.conv2d(T(x), T(rand(6, 4, 3, 3)), T(rand(6)), (2, 1), (1, 0), (1, 2))),
    ("conv groups", lambda x: mb.conv(x=x, weight=rand(8, 2, 3, 2), groups=2), [IMG],
     lambda x: F.conv2d(T(x), T(rand(8, 2, 3, 2)), groups=2)),
    ("conv same", lambda x: mb.conv(x=x, weight=rand(5, 4, 3, 3), pad_type="same"), [IMG],
     lambda x: F.conv2d(T(x), T(rand(5, 4, 3, 3)), padding="same")),
    ("conv same even", lambda x: mb.conv(x=x, weight=rand(5, 4, 2, 2), pad_type="same"), [IMG],
     lambda x: F.conv2d(F.pad(T(x), (0, 1, 0, 1)), T(rand(5, 4, 2, 2)))),
    ("conv same_lower", lambda x: mb.conv(x=x, weight=rand(5, 4, 2, 2), pad_type="same_lower"),
     [IMG], lambda x: F.conv2d(F.pad(T(x), (1, 0, 1, 0)), T(rand(5, 4, 2, 2)))),
    ("conv1d", lambda x: mb.conv(x=x, weight=rand(5, 3, 2)), [rand(2, 3, 7)],
     lambda x: F.conv1d(T(x), T(rand(5, 3, 2)))),
    ("conv3d", lambda x: mb.conv(x=x, weight=rand(5, 3, 2, 2, 2)), [rand(1, 3, 4, 5, 4)],
     lambda x: F.conv3d(T(x), T(rand(5, 3, 2, 2, 2)))),
    ("conv_transpose", lambda x: mb.conv_transpose(
        x=x, weight=rand(4, 3, 3, 2), bias=rand(6), strides=[2, 3], groups=2, pad_type="custom",
        pad=[1, 1, 0, 0], dilations=[1, 2]), [IMG],
     lambda x: F.conv_transpose2d(T(x), T(rand(4, 3, 3, 2)), T(rand(6)), (2, 3), (1, 0), 0, 2,
                                  (1, 2))),
    ("conv_transpose valid", lambda x: mb.conv_transpose(x=x, weight=rand(4, 3, 3, 3),
                                                         strides=[2, 2]), [IMG],
     lambda x: F.conv_transpose2d(T(x), T(rand(4, 3, 3, 3)), stride=2)),
    ("max_pool", lambda x: mb.max_pool(x=x, kernel_sizes=[3, 2], strides=[2, 2], pad_type="custom",
                                       pad=[1, 1, 0, 0]), [IMG],
     lambda x: F.max_pool2d(T(x), (3, 2), 2, (1, 0))),
    ("max_pool ceil", lambda x: mb.max_pool(x=x, kernel_sizes=[3, 3], strides=[2, 2],
                                            pad_type="valid", ceil_mode=True), [IMG],
     lambda x: F.max_pool2d(T(x), 3, 2, ceil_mode=True)),
    ("avg_pool", lambda x: mb.avg_pool(x=x, kernel_sizes=[3, 3], strides=[2, 2], pad_type="custom",
                                       pad=[1, 1, 1, 1]), [IMG],
     lambda x: F.avg_pool2d(T(x), 3, 2, 1)),
    # Core ML divides by the whole kernel, PyTorch leaves out what ceil_mode adds; the numbers are
    # Core ML's own, published in a pull request of coremltools (2844)
    ("avg_pool ceil", lambda x: mb.avg_pool(
        x=x, kernel_sizes=[2, 2], strides=[3, 3], pad_type="valid", ceil_mode=True),
     [np.arange(49, dtype=np.float32).reshape(1, 1, 7, 7)],
     lambda x: np.array([[[[4, 7, 4.75], [25, 28, 15.25], [21.25, 22.75, 12]]]], np.float32)),
    ("avg_pool ceil inside", lambda x: mb.avg_pool(
        x=x, kernel_sizes=[2, 2], strides=[3, 3], pad_type="valid", ceil_mode=True,
        exclude_padding_from_average=True),
     [np.arange(49, dtype=np.float32).reshape(1, 1, 7, 7)],
     lambda x: np.array([[[[4, 7, 9.5], [25, 28, 30.5], [42.5, 45.5, 48]]]], np.float32)),
    ("avg_pool inside", lambda x: mb.avg_pool(
        x=x, kernel_sizes=[3, 3], pad_type="custom", pad=[1, 1, 1, 1],
        exclude_padding_from_average=True), [IMG],
     lambda x: F.avg_pool2d(T(x), 3, 1, 1, count_include_pad=False)),
    ("l2_pool", lambda x: mb.l2_pool(x=x, kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid"),
     [IMG], lambda x: F.lp_pool2d(T(x), 2, 2)),
    # norms
    ("batch_norm", lambda x: mb.batch_norm(
        x=x, mean=rand(4), variance=rand(4, low=0.5), gamma=rand(4, seed=1), beta=rand(4, seed=2)),
     [IMG], lambda x: F.batch_norm(T(x), T(rand(4)), T(rand(4, low=0.5)), T(rand(4, seed=1)),
                                   T(rand(4, seed=2)))),
    ("instance_norm", lambda x: mb.instance_norm(x=x, gamma=rand(4), beta=rand(4, seed=1)), [IMG],
     lambda x: F.instance_norm(T(x), weight=T(rand(4)), bias=T(rand(4, seed=1)))),
    ("layer_norm", lambda x: mb.layer_norm(x=x, axes=[1, 2], gamma=rand(3, 4), beta=rand(3, 4)),
     [X], lambda x: F.layer_norm(T(x), (3, 4), T(rand(3, 4)), T(rand(3, 4)))),
    ("l2_norm", lambda x: mb.l2_norm(x=x), [IMG], None),
    ("local_response_norm", lambda x: mb.local_response_norm(x=x, size=3, alpha=0.1, beta=0.6,
                                                             k=1.5), [IMG],
     lambda x: F.local_response_norm(T(x), 3, 0.1, 0.6, 1.5)),
    # images
    ("resize_bilinear", lambda x: mb.resize_bilinear(
        x=x, target_size_height=5, target_size_width=9, sampling_mode="UNALIGN_CORNERS"), [IMG],
     lambda x: F.interpolate(T(x), (5, 9), mode="bilinear")),
    ("resize_bilinear aligned", lambda x: mb.resize_bilinear(
        x=x, target_size_height=5, target_size_width=9, sampling_mode="STRICT_ALIGN_CORNERS"),
     [IMG], lambda x: F.interpolate(T(x), (5, 9), mode="bilinear", align_corners=True)),
    ("resize_nearest", lambda x: mb.resize_nearest_neighbor(
        x=x, target_size_height=14, target_size_width=9), [IMG],
     lambda x: F.interpolate(T(x), (14, 9), mode="nearest")),
    ("upsample_bilinear", lambda x: mb.upsample_bilinear(
        x=x, scale_factor_height=2, scale_factor_width=3, align_corners=False), [IMG],
     lambda x: F.interpolate(T(x), scale_factor=(2, 3), mode="bilinear")),
    ("upsample_nearest", lambda x: mb.upsample_nearest_neighbor(
        x=x, scale_factor_height=2, scale_factor_width=2), [IMG],
     lambda x: F.interpolate(T(x), scale_factor=2)),
    ("resize", lambda x: mb.resize(
        x=x, shape=ints(3, 0), resized_dims=np.uint32(2), sampling_mode="UNALIGN_CORNERS"), [IMG],
     lambda x: F.interpolate(T(x), (3, 6), mode="bilinear")),
    ("crop", lambda x: mb.crop(x=x, crop_height=[1, 2], crop_width=[0, 1]), [IMG],
     lambda x: x[:, :, 1:5, :5]),
    *[(f"resample {pad}", resampled(pad), [IMG, rand(2, 3, 5, 2)], sampled(mode))
      for pad, mode in (("constant", "zeros"), ("border", "border"), ("symmetric", "reflection"))],
    ("affine", lambda x, m: mb.affine(
        x=x, transform_matrix=m, output_height=4, output_width=5, sampling_mode="bilinear",
        padding_mode="constant", padding_value=np.float32(0),
        coordinates_mode="normalized_minus_one_to_one", align_corners=True),
     [IMG, rand(2, 6)],
     lambda x, m: F.grid_sample(T(x), F.affine_grid(T(m.reshape(2, 2, 3)), (2, 4, 4, 5), True),
                                align_corners=True)),
    ("quantize", lambda x: mb.quantize(
        input=x, zero_point=np.int8(3), scale=np.float32(0.05), output_dtype="int8"), [X], None),
    ("quantize channels", lambda x: mb.dequantize(
        input=mb.quantize(input=x, zero_point=np.uint8([100, 120, 130]),
                          scale=np.float32([0.05, 0.02, 0.1]), output_dtype="uint8", axis=1),
        zero_point=np.uint8([100, 120, 130]), scale=np.float32([0.05, 0.02, 0.1]), axis=1), [X],
     lambda x: _fake_quantized(x)),
]  # fmt: skip


def _space_to_depth(x: Array, b: int) -> Array:
    return np.concatenate([x[:, :, i::b, j::b] for i in range(b) for j in range(b)], axis=1)


def _space_to_batch(x: Array) -> Array:
    padded = np.pad(x, [(0, 0), (0, 0), (0, 1), (1, 2)])
    return np.concatenate([padded[:, :, i::2, j::3] for i in range(2) for j in range(3)])


def _batch_to_space(x: Array) -> Array:
    out = np.zeros((2, 2, 4, 9), x.dtype)
    for at, (i, j) in enumerate((i, j) for i in range(2) for j in range(3)):
        out[:, :, i::2, j::3] = x[2 * at : 2 * at + 2]
    return out[:, :, :3, 1:7]


def _fake_quantized(x: Array) -> Any:
    return torch.fake_quantize_per_channel_affine(
        T(x), torch.tensor([0.05, 0.02, 0.1]), torch.tensor([100, 120, 130], dtype=torch.int32),
        1, 0, 255,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "build", "arrays", "oracle"), CASES, ids=[c[0] for c in CASES])
def test_an_operator(
    name: str,
    build: Callable[..., Any],
    arrays: list[Array],
    oracle: Callable[..., Any] | None,
    tmp_path: Path,
) -> None:
    found = run(tmp_path, build, arrays, "ios18")
    if oracle is None:
        right = inferred(build, arrays, "ios18")
    else:
        given = oracle(*arrays)
        right = [np.asarray(v) for v in (given if isinstance(given, tuple) else (given,))]
    assert len(found) == len(right)
    for a, b in zip(found, right, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a.astype(np.float64), b.astype(np.float64), rtol=2e-5, atol=2e-5)


# --- constants --------------------------------------------------------------------------------


def kind(name: str) -> Any:
    return types.nptype_from_builtin(getattr(types, name))


def codes(bits: int, *shape: int, signed: bool = False) -> Array:
    values = np.random.default_rng(bits).integers(0, 1 << bits, shape)
    if signed:
        values = values - (1 << (bits - 1))
    return values.astype(np.int8 if signed else np.uint8).astype(
        kind(f"{'int' if signed else 'uint'}{bits}")
    )


def half(*shape: int) -> Array:
    return rand(*shape, low=0.5).astype(np.float16)


def looked_up(bits: int) -> Callable[[], Any]:
    return lambda: mb.constexpr_lut_to_dense(
        indices=codes(bits, 6, 7), lut=half(1, 1, 1 << bits, 1)
    )


def looked_up16(bits: int) -> Callable[[], Any]:
    return lambda: mb.constexpr_lut_to_dense(
        indices=_bits(codes(bits, 5, 7), bits), lut=half(1 << bits), shape=np.uint32([5, 7])
    )


MASK = (np.random.default_rng(0).random((4, 6)) < 0.6).astype(np.uint8)
ONES = int(MASK.sum())

CONSTANTS: list[tuple[str, str, Callable[[], Any]]] = [
    ("int4 blocks", "ios18", lambda: mb.constexpr_blockwise_shift_scale(
        data=codes(4, 6, 8, signed=True), scale=half(6, 2))),
    ("int4 blocks of rows, odd", "ios18", lambda: mb.constexpr_blockwise_shift_scale(
        data=codes(4, 6, 5, signed=True), scale=half(3, 1))),
    ("uint4 offsets", "ios18", lambda: mb.constexpr_blockwise_shift_scale(
        data=codes(4, 6, 8), scale=half(6, 4), offset=codes(4, 6, 4))),
    ("int8 of a convolution", "ios18", lambda: mb.constexpr_blockwise_shift_scale(
        data=codes(8, 4, 6, 3, 3, signed=True), scale=half(4, 2, 1, 1))),
    *[(f"lut of {bits} bits", "ios18", looked_up(bits))
      for bits in (1, 2, 3, 4, 6)],
    ("lut by groups", "ios18", lambda: mb.constexpr_lut_to_dense(
        indices=codes(2, 6, 4), lut=half(3, 2, 4, 1))),
    ("lut of vectors across rows", "ios18", lambda: mb.constexpr_lut_to_dense(
        indices=codes(2, 3, 4), lut=half(1, 1, 4, 2), vector_axis=np.int32(0))),
    ("lut of vectors along rows", "ios18", lambda: mb.constexpr_lut_to_dense(
        indices=codes(2, 3, 4), lut=half(3, 1, 4, 3), vector_axis=np.int32(1))),
    ("lut, then scales", "ios18", lambda: mb.constexpr_blockwise_shift_scale(
        data=mb.constexpr_lut_to_dense(indices=codes(4, 6, 8), lut=half(1, 1, 16, 1)),
        scale=half(6, 2))),
    ("sparse", "ios18", lambda: mb.constexpr_sparse_to_dense(
        nonzero_data=half(ONES), mask=MASK.astype(kind("uint1")))),
    ("sparse of a lut", "ios18", lambda: _sparse_of(mb.constexpr_lut_to_sparse(
        indices_mask=MASK.astype(kind("uint1")), indices_nonzero_data=codes(2, ONES),
        lut=half(1, 1, 4, 1)))),
    ("sparse of scales", "ios18", lambda: _sparse_of(mb.constexpr_sparse_blockwise_shift_scale(
        data_mask=MASK.astype(kind("uint1")), nonzero_data=codes(8, ONES, signed=True),
        scale=half(4, 1)))),
    ("affine of rows", "ios16", lambda: mb.constexpr_affine_dequantize(
        quantized_data=codes(8, 6, 8, signed=True).astype(np.int8), zero_point=np.int8(3),
        scale=half(6), axis=0)),
    ("affine of columns", "ios16", lambda: mb.constexpr_affine_dequantize(
        quantized_data=codes(8, 6, 8).astype(np.uint8),
        zero_point=np.arange(8).astype(np.uint8), scale=half(8), axis=-1)),
    *[(f"iOS 16 lut of {bits} bits", "ios16", looked_up16(bits))
      for bits in (1, 2, 4, 6)],
    ("iOS 16 sparse", "ios16", lambda: mb.constexpr_sparse_to_dense(
        nonzero_data=half(ONES), mask=_bits(MASK, 1), shape=np.uint32([4, 6]))),
]  # fmt: skip


def _sparse_of(parts: Any) -> Any:
    mask, values = parts
    return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=mask)


def _bits(values: Array, bits: int) -> Array:
    planes = (values.reshape(-1, 1).astype(np.uint8) >> np.arange(bits)) & 1
    return np.packbits(planes.reshape(-1).astype(np.uint8), bitorder="little")


@pytest.mark.parametrize(("name", "target", "build"), CONSTANTS, ids=[c[0] for c in CONSTANTS])
def test_a_compressed_constant(
    name: str, target: str, build: Callable[[], Any], tmp_path: Path
) -> None:
    right = []

    def body(x: Any) -> Any:
        constant = build()
        right.append(np.asarray(constant.op.materialized_val_inference()).astype(np.float32))
        y = mb.cast(x=constant, dtype="fp32")
        return [y, mb.add(x=x, y=y)]

    size = {"int8 of a convolution": (4, 6, 3, 3)}.get(name)
    with Function({}, opset_version=TARGETS[target]):
        shape = size or build().shape
    path = package(tmp_path, body, {"x": np.zeros(shape, np.float32)}, target=target)
    found = coreml_exec.execute(path, {"x": np.zeros(shape, np.float32)})
    # coremltools multiplies in float16
    np.testing.assert_allclose(found["out0"], right[0], rtol=2e-3, atol=1e-6)
    np.testing.assert_array_equal(found["out0"], found["out1"])
    machine = coreml_exec.machine.Machine("float16")
    rounded = machine.run(coreml_exec.open_model(path).programs["main"], {"x": np.zeros(shape)})
    np.testing.assert_array_equal(rounded["out0"], found["out0"].astype(np.float16))


def test_a_table_that_is_itself_quantized(tmp_path: Path) -> None:
    indices, levels, scale = codes(4, 6, 8), codes(8, 1, 1, 16, 1, signed=True), half(1, 1, 1, 1)

    def body(x: Any) -> Any:
        lut = mb.constexpr_blockwise_shift_scale(data=levels, scale=scale)
        dense = mb.constexpr_lut_to_dense(indices=indices, lut=lut)
        return mb.add(x=x, y=mb.cast(x=dense, dtype="fp32"))

    zeros = np.zeros((6, 8), np.float32)
    found = coreml_exec.execute(package(tmp_path, body, {"x": zeros}), {"x": zeros})["out0"]
    table = levels.astype(np.float32).reshape(-1) * np.float32(scale.item())
    np.testing.assert_array_equal(found, table[indices.astype(int)])


def test_a_product_with_a_packed_matrix_is_the_same_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, scale = codes(4, 30, 64, signed=True), half(30, 2)

    def body(x: Any) -> Any:
        return mb.linear(
            x=x,
            weight=mb.constexpr_blockwise_shift_scale(data=data, scale=scale.astype(np.float32)),
        )

    x = rand(3, 64)
    path = package(tmp_path, body, {"x": x})
    function = coreml_exec.open_model(path).programs["main"]
    monkeypatch.setattr("edgeq.converters.coreml.exec.ops_nn.BLOCK", 7 * 64)
    packed = coreml_exec.machine.Machine(keep_bytes=0).run(function, {"x": x})["out0"]
    kept = coreml_exec.machine.Machine().run(function, {"x": x})["out0"]
    dense = data.astype(np.float32) * np.repeat(scale.astype(np.float32), 32, axis=1)
    np.testing.assert_allclose(kept, x @ dense.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(packed, kept, rtol=1e-6, atol=1e-6)


# --- weight.bin -------------------------------------------------------------------------------


def _numbers(entry: Any, count: int) -> Array:
    if entry.dtype in (np.float16, np.float32):
        return rand(count).astype(entry.dtype)
    low = -(1 << (entry.bits - 1)) if np.iinfo(entry.dtype).min else 0
    span = 1 << entry.bits
    values = low + np.arange(count, dtype=np.int64) * 7 % span
    return values.astype(entry.dtype)


@pytest.mark.parametrize("count", [1, 7, 64, 129])
def test_coremltools_reads_our_weight_file_and_we_its(count: int, tmp_path: Path) -> None:
    from coremltools.libmilstoragepython import _BlobStorageReader, _BlobStorageWriter

    ours, theirs = tmp_path / "ours.bin", tmp_path / "theirs.bin"
    writer, other = Writer(ours), _BlobStorageWriter(str(theirs))
    names = {"fp16": "fp16", "fp32": "float"}
    places = {}
    for name, entry in KINDS.items():
        values = _numbers(entry, count)
        at = writer.begin(name, count)
        step = 8 if entry.bits < 8 else 3
        for first in range(0, count, step):
            writer.write(values[first : first + step])
        given = values.view(np.uint16) if name == "fp16" else values
        places[name] = at, getattr(other, f"write_{names.get(name, name)}_data")(given), values
    writer.close()
    del other
    assert ours.read_bytes() == theirs.read_bytes()
    back, mine = _BlobStorageReader(str(ours)), Reader(ours)
    for name, (at, there, values) in places.items():
        assert at == there
        found = getattr(back, f"read_{names.get(name, name)}_data")(at)
        np.testing.assert_array_equal(np.asarray(found).view(values.dtype), values)
        blob = mine.blob(at, name, count)
        np.testing.assert_array_equal(blob.read(), values)
        np.testing.assert_array_equal(blob.read(count // 3, count - 1), values[count // 3 : -1])
    assert [b[1] for b in mine.blobs()] == list(KINDS)


def test_a_damaged_weight_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weight.bin"
    writer = Writer(path)
    at = writer.begin("int8", 100)
    with pytest.raises(ValueError, match="more numbers"):
        writer.write(np.zeros(101, np.int8))
    writer.write(np.zeros(100, np.int8))
    writer.close()
    with pytest.raises(FormatError, match="holds int8, the program says fp16"):
        Reader(path).blob(at, "fp16", 100)
    with pytest.raises(FormatError, match="100 bytes, 101 numbers"):
        Reader(path).blob(at, "int8", 101)
    with pytest.raises(FormatError, match="no blob at 96"):
        Reader(path).blob(96, "int8", 100)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match="cut short"):
        Reader(path).blob(at, "int8", 100)
    path.write_bytes(bytes(64))
    with pytest.raises(FormatError, match="version 0"):
        Reader(path)
    path.write_bytes(b"x")
    with pytest.raises(FormatError, match="too short"):
        Reader(path)


# --- recurrent --------------------------------------------------------------------------------


@pytest.mark.parametrize("both", [False, True])
def test_lstm_is_torchs(both: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.LSTM(5, 4, bidirectional=both)
    x, ways = rand(6, 2, 5), 2 if both else 1
    h, c = rand(ways, 2, 4), rand(ways, 2, 4, seed=1)
    right = net(T(x), (T(h), T(c)))
    order = (0, 1, 3, 2)  # torch: input, forget, cell, output
    given = {}
    for tail, mine in (("l0", ""), ("l0_reverse", "_back"))[:ways]:
        given["weight_ih" + mine] = reordered(getattr(net, f"weight_ih_{tail}"), order)
        given["weight_hh" + mine] = reordered(getattr(net, f"weight_hh_{tail}"), order)
        bias = getattr(net, f"bias_ih_{tail}") + getattr(net, f"bias_hh_{tail}")
        given["bias" + mine] = reordered(bias, order)
    side = [np.concatenate(list(s), -1) for s in (h, c)]
    found = run(
        tmp_path,
        lambda x, h, c: mb.lstm(
            x=x, initial_h=h, initial_c=c, output_sequence=True,
            direction="bidirectional" if both else "forward", **given,
        ),
        [x, *side],
        "ios16",
    )  # fmt: skip
    np.testing.assert_allclose(found[0], right[0].detach(), atol=1e-5)
    for mine, theirs in zip(found[1:], right[1], strict=True):
        np.testing.assert_allclose(mine, np.concatenate(list(theirs.detach()), -1), atol=1e-5)


def test_gru_is_torchs_and_rnn_backwards_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, h = rand(6, 2, 5), rand(2, 4)
    net = torch.nn.GRU(5, 4)
    order = (0, 2, 1)  # torch: reset, update, new
    found = run(
        tmp_path,
        lambda x, h: mb.gru(
            x=x, initial_h=h, weight_ih=reordered(net.weight_ih_l0, order),
            weight_hh=reordered(net.weight_hh_l0, order),
            bias=reordered(net.bias_hh_l0, order), input_bias=reordered(net.bias_ih_l0, order),
            reset_after=True, output_sequence=True,
        ),
        [x, h],
        "ios18",
    )  # fmt: skip
    right = net(T(x), T(h[None]))
    np.testing.assert_allclose(found[0], right[0].detach(), atol=1e-5)
    np.testing.assert_allclose(found[1], right[1][0].detach(), atol=1e-5)
    plain = torch.nn.RNN(5, 4)
    found = run(
        tmp_path,
        lambda x, h: mb.rnn(
            x=x, initial_h=h, weight_ih=plain.weight_ih_l0.detach().numpy(),
            weight_hh=plain.weight_hh_l0.detach().numpy(), direction="reverse",
            bias=(plain.bias_ih_l0 + plain.bias_hh_l0).detach().numpy(), output_sequence=True,
        ),
        [x, h],
        "ios16",
    )  # fmt: skip
    right = plain(T(x[::-1]), T(h[None]))
    np.testing.assert_allclose(found[0], right[0].detach().numpy()[::-1], atol=1e-5)


# --- boxes ------------------------------------------------------------------------------------


def test_overlapping_boxes_are_suppressed(tmp_path: Path) -> None:
    boxes = np.float32([[[1, 1, 2, 2], [1.2, 1, 2, 2], [5, 5, 2, 2], [9, 9, 1, 1]]])
    scores = np.float32([[[0.6], [0.9], [0.8], [0.1]]])
    found = run(
        tmp_path,
        lambda b, s: mb.non_maximum_suppression(
            boxes=b, scores=s, iou_threshold=0.5, score_threshold=0.2, max_boxes=3
        ),
        [boxes, scores],
        "ios16",
    )
    np.testing.assert_array_equal(found[2], [[1, 2, -1]])
    np.testing.assert_array_equal(found[3], [2])
    np.testing.assert_array_equal(found[0][0, :2], boxes[0, [1, 2]])


def test_crop_resize_samples_between_the_corners(tmp_path: Path) -> None:
    roi = np.float32([1, 1, 5, 4]).reshape(1, 1, 4, 1, 1)
    found = run(
        tmp_path,
        lambda x, r: mb.crop_resize(
            x=x, roi=r, target_height=9, target_width=7, sampling_mode="STRICT_ALIGN_CORNERS"
        ),
        [IMG, roi],
        "ios16",
    )[0]
    right = F.interpolate(T(IMG[:, :, 1:6, 1:5]), (9, 7), mode="bilinear", align_corners=True)
    np.testing.assert_allclose(found[0], right, atol=1e-5)


# --- flow, lists and states -------------------------------------------------------------------


def test_branches_and_loops(tmp_path: Path) -> None:
    def body(x: Any, n: Any) -> Any:
        big = mb.greater(x=mb.reduce_sum(x=x), y=np.float32(0))
        y = mb.cond(pred=big, _true_fn=lambda: mb.mul(x=x, y=2.0), _false_fn=lambda: mb.abs(x=x))
        count = mb.squeeze(x=n, axes=[0])
        z = mb.while_loop(
            _cond=lambda i, v: mb.less(x=i, y=count),
            _body=lambda i, v: (mb.add(x=i, y=1), mb.add(x=v, y=x)),
            loop_vars=(mb.const(val=np.int32(0)), y),
        )
        return [y, z[1]]

    for sign in (1.0, -1.0):
        x = np.float32([1, 2, 3]) * np.float32(sign)
        path = package(tmp_path, body, {"x": x, "n": ints(3)})
        found = coreml_exec.execute(path, {"x": x, "n": ints(3)})
        first = 2 * x if sign > 0 else np.abs(x)
        np.testing.assert_array_equal(found["out0"], first)
        np.testing.assert_array_equal(found["out1"], first + 3 * x)


def test_lists(tmp_path: Path) -> None:
    def body(x: Any) -> Any:
        ls = mb.make_list(init_length=2, elem_shape=(3,))
        ls = mb.list_write(ls=ls, index=0, value=x)
        ls = mb.list_write(ls=ls, index=1, value=mb.mul(x=x, y=2.0))
        ls = mb.list_scatter(
            ls=ls, indices=ints(1), value=mb.expand_dims(x=mb.mul(x=x, y=3.0), axes=[0])
        )
        return [mb.list_gather(ls=ls, indices=ints(1, 0)), mb.list_read(ls=ls, index=1)]

    x = rand(3)
    found = run(tmp_path, body, [x], "ios16")
    np.testing.assert_allclose(found[0], [3 * x, x], rtol=1e-6)
    np.testing.assert_allclose(found[1], 3 * x, rtol=1e-6)


def test_a_state_is_kept_between_predictions(tmp_path: Path) -> None:
    def body(x: Any, total: Any) -> Any:
        before = mb.read_state(input=total)
        after = mb.coreml_update_state(state=total, value=mb.add(x=before, y=x))
        return [before, mb.mul(x=after, y=np.float16(2))]

    x = np.float16([1, 2, 3])
    path = package(tmp_path, body, {"x": x}, {"total": (3,)})
    model = coreml_exec.open_model(path)
    state = model.new_state()
    for n in range(3):
        found = model.predict({"x": x}, state=state)
        np.testing.assert_array_equal(found["out0"], n * x)
        np.testing.assert_array_equal(found["out1"], 2 * (n + 1) * x)
    np.testing.assert_array_equal(model.predict({"x": x})["out0"], 0 * x)  # a state of its own
    assert model.describe().functions["main"].states == {"total": "state of fp16[3]"}


@pytest.mark.parametrize("read_again", [False, True])
def test_slices_of_a_state_are_overwritten_if_nothing_reads_them(
    read_again: bool, tmp_path: Path
) -> None:
    """With and without, results are equal, and what was given before stays."""

    def body(x: Any, total: Any) -> Any:
        before = mb.read_state(input=total)
        if read_again:
            kept = mb.slice_by_index(x=before, begin=[0, 0], end=[2, 3])
        changed = mb.slice_update(x=before, update=x, begin=[1, 0], end=[2, 3])
        after = mb.coreml_update_state(state=total, value=changed)
        twice = mb.slice_update(x=after, update=mb.add(x=x, y=x), begin=[0, 0], end=[1, 3])
        last = mb.coreml_update_state(state=total, value=twice)
        return [mb.add(x=kept, y=last)] if read_again else [mb.identity(x=last)]

    x = np.float16([[1, 2, 3]])
    file = open_file(package(tmp_path, body, {"x": x}, {"total": (2, 3)}))
    function = functions(file)["main"]
    given: dict[bool, list[Any]] = {}
    for overwrite in (False, True):
        machine = coreml_exec.machine.Machine(overwrite=overwrite)
        state = machine.new_state(function)
        given[overwrite] = [
            next(iter(machine.run(function, {"x": n * x}, state).values())) for n in (1, 2, 3)
        ]
    for plain, over in zip(given[False], given[True], strict=True):
        np.testing.assert_array_equal(over, plain)


def test_float16_arithmetic_rounds_after_every_operator(tmp_path: Path) -> None:
    x, y = rand(64).astype(np.float16), rand(64, seed=1).astype(np.float16)
    path = package(
        tmp_path, lambda x, y: mb.add(x=mb.mul(x=x, y=y), y=mb.exp(x=x)), {"x": x, "y": y}
    )
    rounded = coreml_exec.execute(path, {"x": x, "y": y}, arithmetic="float16")["out0"]
    product = (x.astype(np.float32) * y).astype(np.float16)
    right = product + np.exp(x.astype(np.float32)).astype(np.float16)
    assert rounded.dtype == np.float16
    np.testing.assert_array_equal(rounded, right)
    exact = coreml_exec.execute(path, {"x": x, "y": y})["out0"]
    assert exact.dtype == np.float32
    assert (exact != rounded).any()
    with pytest.raises(UsageError, match="use 'float32' or 'float16'"):
        coreml_exec.execute(path, {"x": x, "y": y}, arithmetic="bf16")  # type: ignore[arg-type]


# --- other people's files ---------------------------------------------------------------------


def _cnn(x: Any) -> Any:
    x = mb.conv(x=x, weight=rand(8, 1, 3, 3), bias=rand(8), pad_type="same")
    x = mb.batch_norm(
        x=x, mean=rand(8), variance=rand(8, low=0.5), gamma=rand(8, seed=1), beta=rand(8, seed=2)
    )
    x = mb.max_pool(x=mb.relu(x=x), kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid")
    x = mb.conv(x=x, weight=rand(16, 8, 3, 3), pad_type="valid")
    x = mb.reduce_mean(x=x, axes=[2, 3], keep_dims=False)
    return mb.softmax(x=mb.linear(x=x, weight=rand(64, 16), bias=rand(64)), axis=-1, name="out")


def _torch_cnn(x: Array) -> Array:
    y = F.conv2d(T(x), T(rand(8, 1, 3, 3)), T(rand(8)), padding=1)
    scale = {"weight": T(rand(8, seed=1)), "bias": T(rand(8, seed=2))}
    y = F.batch_norm(y, T(rand(8)), T(rand(8, low=0.5)), **scale)
    y = F.max_pool2d(F.relu(y), 2)
    y = F.conv2d(y, T(rand(16, 8, 3, 3))).mean((2, 3))
    return np.asarray(F.softmax(F.linear(y, T(rand(64, 16)), T(rand(64))), -1))


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A classifier as coremltools converts it, default passes, float16."""

    @mb.program(input_specs=[mb.TensorSpec((1, 1, 10, 12))], opset_version=ct.target.iOS18)
    def program(x: Any) -> Any:
        return _cnn(x)

    labels = ct.ClassifierConfig([f"class {i}" for i in range(64)])
    return quietly(
        lambda: ct.convert(
            program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True,
            classifier_config=labels,
        )
    )  # fmt: skip


def test_a_classifier_that_coremltools_converted(cnn: Any, tmp_path: Path) -> None:
    path = tmp_path / "cnn.mlpackage"
    cnn.save(str(path))
    x = rand(1, 1, 10, 12)
    found = coreml_exec.execute(path, {"x": x})
    right = _torch_cnn(x)
    assert found["classLabel"] == f"class {int(right.argmax())}"
    values = next(v for v in found.values() if isinstance(v, dict))
    np.testing.assert_allclose(list(values.values()), right[0], atol=2e-3)
    done = coreml.execute(path)
    assert done.ops["conv"] == 2
    assert done.inputs == {"x": (1, 1, 10, 12)}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["palette", "int4", "int8", "pruned"])
def test_what_coremltools_compressed_is_what_it_decompresses(
    cnn: Any, how: str, tmp_path: Path
) -> None:
    import coremltools.optimize.coreml as cto

    if how == "palette":
        palette = cto.OpPalettizerConfig(
            mode="uniform", nbits=4, granularity="per_grouped_channel", group_size=4,
            weight_threshold=64,
        )  # fmt: skip
        config, method = cto.OptimizationConfig(palette), cto.palettize_weights
    elif how == "pruned":
        sparse = cto.OpMagnitudePrunerConfig(target_sparsity=0.5, weight_threshold=64)
        config, method = cto.OptimizationConfig(sparse), cto.prune_weights
    else:
        grain = {"granularity": "per_block", "block_size": 8} if how == "int4" else {}
        linear = cto.OpLinearQuantizerConfig(mode="linear", dtype=how, weight_threshold=64, **grain)
        config, method = cto.OptimizationConfig(linear), cto.linear_quantize_weights
    small = quietly(lambda: method(cnn, config))
    small.save(str(tmp_path / "small.mlpackage"))
    quietly(lambda: cto.decompress_weights(small)).save(str(tmp_path / "large.mlpackage"))
    x = {"x": rand(1, 1, 10, 12)}
    described = coreml_exec.describe(tmp_path / "small.mlpackage").functions["main"].ops
    assert any(op.startswith("constexpr_") for op in described)
    # in float16, as coremltools rounds what it decompresses
    small_says, large_says = (
        coreml_exec.execute(tmp_path / f"{name}.mlpackage", x, arithmetic="float16")
        for name in ("small", "large")
    )
    assert small_says == large_says


# --- refusals ---------------------------------------------------------------------------------


def test_what_cannot_be_executed_is_named(tmp_path: Path) -> None:
    path = package(
        tmp_path, lambda x: mb.add(x=x, y=mb.random_normal(shape=ints(3), seed=1)), {"x": rand(3)}
    )
    assert coreml_exec.describe(path).unsupported == ("random_normal",)
    with pytest.raises(UnsupportedError, match=r"operator random_normal \('random_normal_0'"):
        coreml_exec.execute(path, {"x": rand(3)})


def test_wrong_inputs_are_refused(tmp_path: Path) -> None:
    path = package(tmp_path, lambda x: mb.exp(x=x), {"x": rand(3)})
    with pytest.raises(UsageError, match="unknown input 'y'"):
        coreml_exec.execute(path, {"y": rand(3)})
    with pytest.raises(UsageError, match=r"'x' is missing: float32 \[3\]"):
        coreml_exec.execute(path, {})
    with pytest.raises(UsageError, match=r"'x' has shape \[4\]; the model takes float32 \[3\]"):
        coreml_exec.execute(path, {"x": rand(4)})
    with pytest.raises(UsageError, match="unknown function 'decode'"):
        coreml_exec.execute(path, {"x": rand(3)}, function="decode")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = package(tmp_path, lambda x: mb.add(x=x, y=rand(400)), {"x": rand(400)})
    weights = next(path.rglob("weight.bin"))
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(FormatError, match="cut short"):
        coreml_exec.describe(path)
    weights.unlink()
    with pytest.raises(FormatError, match=r"weight\.bin cannot be read"):
        coreml_exec.describe(path)
    next(path.rglob("model.mlmodel")).write_bytes(b"\xff" * 20)
    with pytest.raises(FormatError, match="is not a Core ML model"):
        coreml_exec.describe(path)
    (path / "Manifest.json").write_text("{}")
    with pytest.raises(FormatError, match=r"Manifest\.json names no model"):
        coreml_exec.describe(path)
    with pytest.raises(FormatError, match="cannot be read"):
        coreml_exec.describe(tmp_path / "absent.mlmodel")
    empty = tmp_path / "empty.mlmodel"
    empty.write_bytes(b"")
    with pytest.raises(FormatError, match="has no model type"):
        coreml_exec.describe(empty)


def test_rows_that_are_looked_up_are_those_of_the_whole() -> None:
    whole = np.arange(60, dtype=np.float32).reshape(20, 3)
    asked: list[tuple[int, int]] = []

    def rows(start: int, stop: int) -> NDArray[Any]:
        asked.append((start, stop))
        return whole[start:stop]

    packed = Packed(whole.shape, np.float32, rows)
    for indices in ([[3, 3], [19, -1]], 7, []):
        where = np.array(indices, np.int32)
        np.testing.assert_array_equal(packed.taken(where), np.take(whole, where, axis=0))
    assert set(asked) == {(3, 4), (19, 20), (7, 8)}
    with pytest.raises(IndexError):
        packed.taken(np.array([20]))


def test_packages_are_read_without_all_of_coremltools() -> None:
    """It imports PyTorch and scikit-learn where they are installed: hundreds of megabytes."""
    code = """
import sys
from edgeq.converters.coreml.exec.load import library, protobuf
alone = protobuf().Model_pb2.Model
assert "coremltools" not in sys.modules
assert library().proto.Model_pb2.Model is alone
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
