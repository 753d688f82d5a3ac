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
import types
from _functools import partial  # type: ignore[import-not-found]
from _operator import is_
from itertools import compress, repeat

TYPE_CHECKING = False  # typing's own would have to be imported, which takes longer than all of this
if TYPE_CHECKING:
    from typing import Any

SENTINEL_BYTES = 32

# Tripwires: what would show or change the interpreter's own state, by setting a frame to another line, all objects
# there are, hand-made bytecode, raw memory, an interpreter beside this one. No benchmark's program needs them. They
# stop what is written in Python; nothing in one process stops what has reached its memory.
_EVENTS = ("ctypes.", "gc.get_", "sys.settrace", "sys.setprofile", "sys.monitoring.", "cpython.PyInterpreterState_New")
_MODULES = ("_ctypes", "_test", "_xx", "xx", "_interp")


def _guard(events: tuple[str, ...], modules: tuple[str, ...], folder: str) -> Any:
    """Makes an audit hook. None can be removed, and this one uses no name that a program could change under it."""
    size, text, kind, frame = len(folder), str, type, sys._getframe
    refusal, wrong = ImportError, RuntimeError
    # The standard library's own makers of code: imports, from files and frozen, and types.coroutine.
    load, thaw = sys.modules["_frozen_importlib_external"], sys.modules["_frozen_importlib"]
    makers = tuple(f.__code__ for f in (load._compile_bytecode, thaw._call_with_frames_removed, types.coroutine))

    def hook(event: str, arguments: Any) -> None:
        if event.startswith(events):
            raise wrong(event + " is not allowed in the sandbox")
        if event in ("marshal.loads", "code.__new__") and frame(1).f_code not in makers:
            raise wrong("bytecode is not allowed in the sandbox")
        if event == "import":
            name, path = arguments[0], arguments[1]
            if path is not None:  # of a compiled module; its file says what it is, whatever it is imported as
                if kind(path) is not text or path[:size] != folder or "/" in path[size:]:
                    raise refusal("compiled modules other than Python's own are not allowed in the sandbox")
                name = path[size:]
            if kind(name) is not text or name.startswith(modules):
                raise refusal("a module that is not allowed in the sandbox")

    return hook


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
                    map(is_, map(exec, *_program()), repeat(None)),
                ),
            )
        )
    except any_error as error:
        trace = error.__traceback__
        show(kind(error), error, trace and trace.tb_next)
        end(1)
    end(0)


def _program() -> tuple[Any, Any]:
    """Returns the arguments of ``exec``: iterators over the code and over the namespace of a fresh ``__main__``."""
    with open(3, "rb", 0) as file:
        source = file.read()
    module = type(sys)("__main__")
    code = compile(source.decode("utf-8"), "<program>", "exec", dont_inherit=True)
    sys.modules["__main__"] = module
    sys.addaudithook(_guard(_EVENTS, _MODULES, sys.path[-1] + "/"))
    return iter([code].pop, None), iter([module.__dict__].pop, None)


if __name__ == "__main__":
    main()
