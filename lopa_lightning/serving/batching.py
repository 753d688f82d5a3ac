"""Soft prompts for many requests at a time: vectors are kept, and what waits for an encoder is encoded together."""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lopa_lightning.backbones.chat import question
from lopa_lightning.serving.bundle import Bundle
from lopa_lightning.serving.prompter import LoPAPrompter
from lopa_lightning.serving.requests import ServedPrompter, ServedRequest

_ENTRY = 1000  # bytes that an entry takes beside its values, about
_TOGETHER = 32  # texts at a time
_MOST_WAITING = 1024  # texts; more would wait for seconds


class BusyError(RuntimeError):
    """Too many texts wait for the instance encoder."""


class KeptVectors:
    """Keeps the instance vectors that were used last, of all bundles. One thread at a time uses it.

    Args:
        most_bytes: That it takes, about.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.bytes, self.hits, self.misses = most_bytes, 0, 0, 0
        self._found: OrderedDict[bytes, Tensor] = OrderedDict()

    def get(self, key: bytes) -> Tensor | None:
        """Returns a vector, or None if it is not there."""
        vector = self._found.get(key)
        if vector is None:
            self.misses += 1
            return None
        self._found.move_to_end(key)
        self.hits += 1
        return vector

    def put(self, key: bytes, vector: Tensor) -> None:
        """Keeps a new vector in the place of the ones that were not used for longest."""
        self._found[key] = vector.clone()  # else all that it is a view of would be kept
        self.bytes += vector.nbytes + _ENTRY
        while self.bytes > self.most_bytes:
            _, gone = self._found.popitem(last=False)
            self.bytes -= gone.nbytes + _ENTRY


class KeepingPrompter(LoPAPrompter):
    """A prompter that encodes no text twice.

    Args:
        bundle: See :class:`~lopa_lightning.serving.prompter.LoPAPrompter`.
        kept: Vectors of this prompter and of others.
        others: Of whose instance encoders it uses one, if it is the same.
    """

    def __init__(self, bundle: Bundle, kept: KeptVectors, others: Sequence[LoPAPrompter] = ()) -> None:
        super().__init__(bundle)
        self._kept = kept
        for other in others:
            if self.encoder is not None and _same_encoder(self, other):
                self.encoder = other.encoder

    def vectors(self, encoded: Mapping[str, list[list[int]]]) -> Tensor:
        """Returns instance vectors ``[B, e]``; encodes those that are not kept, equal texts once."""
        keys = [_key(id(self.encoder), row) for row in zip(*encoded.values())]
        found = {key: self._kept.get(key) for key in dict.fromkeys(keys)}
        if missing := [key for key, vector in found.items() if vector is None]:
            rows = [keys.index(key) for key in missing]
            made = super().vectors({name: [values[row] for row in rows] for name, values in encoded.items()})
            for key, vector in zip(missing, made.cpu()):
                found[key] = vector
                self._kept.put(key, vector)
        return torch.stack([vector for key in keys if (vector := found[key]) is not None]).to(self.device)


def _key(encoder: int, row: Sequence[Sequence[int]]) -> bytes:
    return hashlib.sha256(repr(encoder).encode() + b"|".join(array("q", ids).tobytes() for ids in row)).digest()


def _same_encoder(one: LoPAPrompter, other: LoPAPrompter) -> bool:
    """Whether two bundles were trained with one instance encoder, as it was pretrained."""
    if one.encoder is None or other.encoder is None or one.encoder.spec != other.encoder.spec:
        return False
    first, second = (each.bundle.config.identity.get("instance_encoder") for each in (one, other))
    return first == second and not any(each.bundle.part("instance_encoder") for each in (one, other))


@dataclass(frozen=True)
class _Waiting:
    served: ServedPrompter
    given: Any
    read: str | None
    future: asyncio.Future[ServedRequest]


class Batcher:
    """Makes requests in one worker thread. What comes while it works is worked on together, a bundle at a time."""

    def __init__(self) -> None:
        self._waiting: deque[_Waiting] = deque()
        self._thread = ThreadPoolExecutor(1, "lopa-encoder")
        self._work: asyncio.Task[None] | None = None
        self.batches = 0

    def __len__(self) -> int:
        return len(self._waiting)

    async def make(self, served: ServedPrompter, given: Any, read: str | None = None) -> ServedRequest:
        """Makes a request of a bundle.

        Args:
            served: The bundle's.
            given: One chat or text; for a classifier one row.
            read: What the instance encoder reads in place of the chat's last message.

        Raises:
            BusyError: If too many wait.
            LoPAError: See :meth:`~lopa_lightning.serving.requests.ServedPrompter.requests`.
        """
        if len(self._waiting) >= _MOST_WAITING:
            raise BusyError(f"{len(self._waiting)} texts wait for the instance encoder; try again later")
        future: asyncio.Future[ServedRequest] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(served, given, read, future))
        if self._work is None or self._work.done():
            self._work = asyncio.ensure_future(self._run())
        return await future

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown()

    async def _run(self) -> None:
        while self._waiting:
            together, others = list[_Waiting](), deque[_Waiting]()
            for each in self._waiting:
                if each.future.done():  # nobody waits for it any more
                    continue
                fits = len(together) < _TOGETHER and (not together or each.served is together[0].served)
                (together if fits else others).append(each)
            self._waiting = others
            if together:
                self.batches += 1
                made = await asyncio.get_running_loop().run_in_executor(self._thread, _made, together)
                for each, request in zip(together, made):
                    if each.future.done():
                        continue
                    if isinstance(request, Exception):
                        each.future.set_exception(request)
                    else:
                        each.future.set_result(request)


def _made(together: Sequence[_Waiting]) -> list[ServedRequest | Exception]:
    """The requests, or what is wrong with each: one that is refused must not be the others' end."""
    served, given = together[0].served, [each.given for each in together]
    try:
        if served.task is not None:
            return list(served.requests(given))
        read = [question(each.given) if each.read is None else each.read for each in together]
        return list(served.requests(given, read))
    except Exception as error:
        return [error] if len(together) == 1 else [_made([each])[0] for each in together]
