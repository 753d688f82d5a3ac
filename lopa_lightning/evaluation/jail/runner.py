"""Runs one program, and sends the sentinel back if its last line was reached.

The first code in the child process, given to the interpreter as text. Descriptor 3 holds the sentinel
and the program, descriptor 4 takes the sentinel back; beside the standard three, no other is open.

While the program runs, the sentinel must not be found. So it has no name: an iterator takes it off a list
that is empty afterwards, and ``compress`` keeps it on the C stack while it asks for its selector, which is
what ``exec`` returned. Neither frames nor the garbage collector lead there. If the program raises, the
sentinel is dropped with the iterator; if it ends the process, nobody is left to send it. What follows the
program's last line are builtins that the same iterators hold, which nothing it patches can reach.
"""

from __future__ import annotations

import posix
import sys
from _functools import partial  # type: ignore[import-not-found]
from _operator import is_
from itertools import compress, repeat

TYPE_CHECKING = False  # typing's own would have to be imported, which takes longer than all of this
if TYPE_CHECKING:
    from typing import Any

SENTINEL_BYTES = 32

# What would show or change the interpreter's own state: setting a frame to another line, all objects there
# are, hand-made bytecode, raw memory, an interpreter beside this one. No benchmark's program needs them.
_DENIED_EVENTS = frozenset(
    {"sys.settrace", "sys.setprofile", "gc.get_objects", "gc.get_referrers", "gc.get_referents", "code.__new__"}
)
_DENIED_MODULES = frozenset(
    {
        *("_ctypes", "_ctypes_test", "_testcapi", "_testinternalcapi", "_testlimitedcapi", "_testmultiphase"),
        *("_interpreters", "_xxsubinterpreters"),
    }
)


def _guard(events: frozenset[str], modules: frozenset[str], prefix: str) -> Any:
    """An audit hook. None can be removed, and this one uses no name that a program could change under it."""
    size, text, kind, refusal, wrong = len(prefix), str, type, ImportError, RuntimeError

    def hook(event: str, arguments: Any) -> None:
        if event in events:
            raise wrong(event + " is not allowed in the sandbox")
        if event == "import":
            name, path = arguments[0], arguments[1]
            if kind(name) is not text or name in modules:
                raise refusal("a module that is not allowed in the sandbox")
            if path is not None and (kind(path) is not text or path[:size] != prefix or "/../" in path):
                raise refusal("compiled modules other than Python's own are not allowed in the sandbox")

    return hook


def _read_all(descriptor: int) -> bytes:
    parts = []
    while part := posix.read(descriptor, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def main() -> None:
    """Runs the program that descriptor 3 holds after the sentinel; never returns."""
    # By names of its own: the program can change those of builtins.
    show, end, kind, any_error = sys.__excepthook__, posix._exit, type, BaseException
    try:
        next(
            map(
                partial(posix.write, 4),
                compress(
                    iter([posix.read(3, SENTINEL_BYTES)].pop, None),
                    map(is_, map(exec, *_program(_read_all(3))), repeat(None)),
                ),
            )
        )
    except any_error as error:
        trace = error.__traceback__
        show(kind(error), error, trace and trace.tb_next)
        end(1)
    end(0)


def _program(source: bytes) -> tuple[Any, Any]:
    """The arguments of ``exec``: iterators over the code and over the namespace of a fresh ``__main__``."""
    posix.close(3)
    module = type(sys)("__main__")
    code = compile(source.decode("utf-8"), "<program>", "exec", dont_inherit=True)
    sys.modules["__main__"] = module
    sys.addaudithook(_guard(_DENIED_EVENTS, _DENIED_MODULES, sys.base_exec_prefix + "/"))
    return iter([code].pop, None), iter([module.__dict__].pop, None)


if __name__ == "__main__":
    main()
