"""What the compiled library is given and fills in: the structures of native/kernel.h."""

from __future__ import annotations

import ctypes

import numpy as np

__all__ = [
    "ANSWER",
    "ANSWERED",
    "BROKEN",
    "DTYPES",
    "NOT_POSTED",
    "POSTED",
    "Attention",
    "Decoding",
    "Elsewhere",
    "Layer",
    "Line",
    "Matrix",
    "Norm",
    "Projection",
    "Projections",
    "Request",
    "Routed",
    "Router",
]

DTYPES = {np.dtype(np.float32): 0, np.dtype(np.uint16): 1, np.dtype(np.float16): 2}
"""The library's number of a stored type; uint16 is bfloat16."""


class Matrix(ctypes.Structure):
    _fields_ = (("values", ctypes.c_void_p), ("dtype", ctypes.c_int64))


class Projection(ctypes.Structure):
    _fields_ = (
        ("weights", Matrix),
        ("bias", ctypes.c_void_p),
        ("columns", ctypes.c_int64),
        ("output", ctypes.c_void_p),
    )


class Projections(ctypes.Structure):
    _fields_ = (
        ("width", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("input", Matrix),
        ("projection", ctypes.c_void_p),
    )


class Routed(ctypes.Structure):
    _fields_ = (
        ("hidden", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("activation", ctypes.c_int64),
        ("alpha", ctypes.c_float),
        ("limit", ctypes.c_float),
        ("experts", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("spared", ctypes.c_int64),
        ("table", ctypes.c_void_p),
        ("index", ctypes.c_void_p),
        ("gate", ctypes.c_void_p),
        ("input", Matrix),
        ("output", ctypes.c_void_p),
    )


class Norm(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("input", Matrix),
        ("weight", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
        ("output", ctypes.c_void_p),
    )


class Attention(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("requests", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("rotated", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("query", ctypes.c_void_p),
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("cosine", ctypes.c_void_p),
        ("sine", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("write", ctypes.c_void_p),
        ("row_ends", ctypes.c_void_p),
        ("read_ends", ctypes.c_void_p),
        ("read", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
    )


class Router(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("experts", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("normalized", ctypes.c_int64),
        ("gate_dtype", ctypes.c_int64),
        ("logits", Matrix),
        ("index", ctypes.c_void_p),
        ("gate", ctypes.c_void_p),
    )


class Request(ctypes.Structure):
    _fields_ = (
        ("bytes", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("layer_at", ctypes.c_int64),
        ("hidden_at", ctypes.c_int64),
        ("experts_at", ctypes.c_int64),
        ("gate_at", ctypes.c_int64),
        ("beside_at", ctypes.c_int64),
    )


class Line(ctypes.Structure):
    _fields_ = (
        ("descriptor", ctypes.c_int64),
        ("requests", ctypes.c_int64),
        ("request", ctypes.c_void_p),
        ("reply_head", ctypes.c_char_p),  # given bytes, it keeps them alive
        ("reply_head_size", ctypes.c_int64),
        ("reply", ctypes.c_void_p),
        ("reply_room", ctypes.c_int64),
        ("patience_ns", ctypes.c_int64),
        ("polling", ctypes.c_void_p),
        ("missed", ctypes.c_int64),
    )


ANSWER = np.dtype(
    [
        ("state", np.int64),
        ("routes", np.int64),
        ("received", np.int64),
        ("waited_s", np.float64),
        ("busy_s", np.float64),
        ("ready_for_s", np.float64),
    ]
)
"""What became of a layer's call; its states are the next four."""
NOT_POSTED, BROKEN, POSTED, ANSWERED = range(4)


class Layer(ctypes.Structure):
    _fields_ = (
        ("input_norm", Norm),
        ("query_norm", Norm),
        ("key_norm", Norm),
        ("experts_norm", Norm),
        ("inputs", Projections),
        ("output", Projections),
        ("logits", Projections),
        ("attention", Attention),
        ("router", Router),
        ("experts", Routed),
        ("line", ctypes.c_void_p),
        ("number", ctypes.c_int64),
    )


class Elsewhere(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("experts", ctypes.c_int64),
        ("routes", ctypes.c_int64),
        ("token", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("expert", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("row_index", ctypes.c_void_p),
        ("gate_weight", ctypes.c_void_p),
    )


class Decoding(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("layers", ctypes.c_int64),
        ("watched", ctypes.c_int64),
        ("spared", ctypes.c_int64),
        ("layer", ctypes.c_int64),
        ("stopped", ctypes.c_int64),
        ("each", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("normed", ctypes.c_void_p),
        ("added", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("partial", ctypes.c_char_p),  # given bytes, it keeps them alive
        ("index", ctypes.c_void_p),
        ("gate", ctypes.c_void_p),
        ("requests", ctypes.c_int64),
        ("rotated", ctypes.c_int64),
        ("cosine", ctypes.c_void_p),
        ("sine", ctypes.c_void_p),
        ("write", ctypes.c_void_p),
        ("row_ends", ctypes.c_void_p),
        ("read_ends", ctypes.c_void_p),
        ("read", ctypes.c_void_p),
        ("elsewhere", Elsewhere),
        ("answers", ctypes.c_void_p),
    )
