"""A decoder's layers that call by themselves, and a peer that answers in many manners."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
import threading
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch

from remoe.kernel.structures import ANSWER, ANSWERED, NOT_POSTED, Decoding, Line, Request
from tests.remoe.kernel.decoder_cases import DecoderCase

__all__ = ["MANNERS", "Manner", "call_by_lines"]

Manner = Literal["whole", "pieces", "other", "longer", "closes", "silent"]
MANNERS: tuple[Manner, ...] = get_args(Manner)
_HEAD = b"as the last time: "
_PATIENCE_NS = {"silent": 1_000_000, "pieces": 200_000_000}


def call_by_lines(case: DecoderCase, manner: Manner) -> tuple[torch.Tensor, int, int]:
    """One row after all layers; how many calls were answered within the step, how many not.

    The first that is not is the last that leaves. Requests have no format here: the kernel knows
    none, and fills in what it is told to.
    """
    ours, theirs = socket.socketpair()
    requests = [_Made(case, count + 1) for count in range(case.shape.top_k)]
    reply = np.empty(len(_HEAD) + 4 * case.shape.width + 18 + 1, np.uint8)
    each = (Request * len(requests))(*(one.request for one in requests))
    line = Line(
        descriptor=ours.fileno(),
        requests=len(requests),
        request=ctypes.addressof(each),
        reply_head=_HEAD,
        reply_head_size=len(_HEAD),
        reply=reply.ctypes.data,
        reply_room=len(reply),
        patience_ns=_PATIENCE_NS.get(manner, 10_000_000_000),
    )
    answers = np.zeros(case.shape.layers, ANSWER)
    others = 0

    def on_stop(step: Decoding) -> bool:
        nonlocal others
        answer = answers[step.layer]
        if answer["state"] == NOT_POSTED:
            return False
        others += 1
        line.descriptor = -1
        return True

    with ours, theirs:
        peer = threading.Thread(target=_serve, args=(theirs, case, requests, manner))
        peer.start()
        hidden, _ = case.together(
            line=ctypes.addressof(line), answers=answers.ctypes.data, on_stop=on_stop
        )
        ours.shutdown(socket.SHUT_RDWR)
        peer.join()
    answered = answers["state"] == ANSWERED
    assert (answers["busy_s"][answered] == answers["ready_for_s"][answered]).all()
    assert set(answers["busy_s"][answered]) <= {0.25}
    return hidden, int(answered.sum()), others


class _Made:
    """A request for so many experts: a buffer that ends with its last field."""

    def __init__(self, case: DecoderCase, experts: int) -> None:
        row_bytes = case.shape.width * case.x.element_size()
        self.hidden_at, self.beside_at = 2, 2 + row_bytes + 7 * experts
        self.bytes = np.zeros(self.beside_at + 1, np.uint8)
        self.request = Request(
            bytes=self.bytes.ctypes.data,
            size=len(self.bytes),
            layer_at=0,
            hidden_at=self.hidden_at,
            experts_at=self.hidden_at + row_bytes,
            gate_at=self.hidden_at + row_bytes + 3 * experts,
            beside_at=self.beside_at,
        )


def _serve(peer: socket.socket, case: DecoderCase, requests: list[_Made], manner: Manner) -> None:
    sizes = [len(one.bytes) for one in requests]
    with contextlib.suppress(OSError):  # whoever has enough closes
        while given := peer.recv(1 << 16):
            count = sizes.index(len(given)) + 1
            row = bytearray(given[2 : 2 + case.shape.width * case.x.element_size()])
            hidden = torch.frombuffer(row, dtype=case.shape.dtype)
            partial = (hidden.float() * count).numpy().tobytes()
            for part in _REPLIES[manner](_HEAD + partial + 2 * (b"\xcb" + struct.pack(">d", 0.25))):
                peer.sendall(part)
            if manner == "closes":
                peer.shutdown(socket.SHUT_WR)


_REPLIES: dict[Manner, Callable[[bytes], list[bytes]]] = {
    "whole": lambda reply: [reply],
    "pieces": lambda reply: [reply[:7], reply[7:]],
    "other": lambda reply: [b"A" + reply[1:]],
    "longer": lambda reply: [reply + b"!"],
    "closes": lambda _: [],
    "silent": lambda _: [],
}
