"""Deterministic weights and inputs, decided from key name and shape alone.

Every number comes from numpy's PCG64 bit generator through
``Generator.standard_normal`` in float64; scaling is done in float64 and the
result is cast to float32 last.  Seed of a tensor is ``zlib.crc32`` of its full
state-dict key (utf-8).

Rules, first match wins (``z`` is the standard normal draw of the full shape):

====  =======================================  ================================
kind  which                                    value
====  =======================================  ================================
nbt   key ends with ``num_batches_tracked``    int64 zero(s)
var   key ends with ``running_var``            0.5 + |z|
mean  key ends with ``running_mean``           0.1 * z
int   any other non-floating dtype             not generated ('computed')
mat   ndim >= 2                                z * sqrt(1 / prod(shape[1:]))
nw    ndim <= 1 and key ends with ``.weight``  1 + 0.1 * z
nb    ndim <= 1 and key ends with ``.bias``    0.1 * z
gam   any other ndim <= 1                      0.5 + 0.1 * z
====  =======================================  ================================

An optional ``mul`` mapping {key suffix: factor} multiplies the drawn value of
every key ending with that suffix (first match in insertion order).  It is only
used where the plain rules make an official model overflow; the JSON of a
variant says so in ``det.mul``.  An optional ``gain`` multiplies every tensor
with ndim >= 2; the ``hot`` sections (BatchNorm nets) state the gain they used.
"""

import zlib

import numpy as np
import torch

_TORCH = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
    "uint8": torch.uint8,
}


def det_kind(key, shape, dtype="float32"):
    dtype = str(dtype).replace("torch.", "")
    if key.endswith("num_batches_tracked"):
        return "nbt"
    if key.endswith("running_var"):
        return "var"
    if key.endswith("running_mean"):
        return "mean"
    if not dtype.startswith(("float", "bfloat")):
        return "int"
    if len(shape) >= 2:
        return "mat"
    if key.endswith(".weight"):
        return "nw"
    if key.endswith(".bias"):
        return "nb"
    return "gam"


def det_tensor(key, shape, kind=None, mul=None):
    """Value of one tensor as a float32 array (int64 for kind 'nbt')."""
    shape = tuple(int(s) for s in shape)
    kind = kind or det_kind(key, shape)
    if kind == "nbt":
        return np.zeros(shape, np.int64)
    if kind == "int":
        raise ValueError(f"{key}: integer buffers are computed by the model, not generated")
    z = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape)
    z = np.asarray(z, np.float64)
    if kind == "var":
        v = 0.5 + np.abs(z)
    elif kind == "mean":
        v = 0.1 * z
    elif kind == "mat":
        v = z * np.sqrt(1.0 / np.prod(shape[1:], dtype=np.float64))
    elif kind == "nw":
        v = 1.0 + 0.1 * z
    elif kind == "nb":
        v = 0.1 * z
    elif kind == "gam":
        v = 0.5 + 0.1 * z
    else:
        raise ValueError(kind)
    if mul is not None:
        v = v * mul
    return np.asarray(v, dtype=np.float32).reshape(shape)


def det_state_dict(shapes, mul=None, gain=1.0):
    """``shapes``: {key: (shape, dtype)} or the JSON's [[key, shape, dtype], ...].

    Integer buffers are left out, so load with ``strict=False`` only if the
    model has such buffers (the JSON lists them under ``computed``).
    """
    if not isinstance(shapes, dict):
        shapes = {k: (s, d) for k, s, d in shapes}
    out = {}
    for key, (shape, dtype) in shapes.items():
        kind = det_kind(key, shape, dtype)
        if kind == "int":
            continue
        f = next((f for suf, f in (mul or {}).items() if key.endswith(suf)), None)
        if kind == "mat" and gain != 1.0:
            f = gain * (1.0 if f is None else f)
        v = det_tensor(key, shape, kind, f)
        t = torch.from_numpy(np.array(v)).reshape(tuple(shape))
        name = str(dtype).replace("torch.", "")
        if v.dtype != np.int64 and name in _TORCH:
            t = t.to(_TORCH[name])
        out[key] = t
    return out


def det_input(shape, seed):
    """Standard normal input, float32."""
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(tuple(shape)).astype(np.float32)


def sample_index(n, k=64):
    return np.linspace(0, n - 1, k).astype(int)
