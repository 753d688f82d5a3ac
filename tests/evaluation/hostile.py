"""Programs that cheat, harm or hang; each bounded, so that a broken sandbox costs a test and not the machine."""

from __future__ import annotations

from typing import NamedTuple


class Hostile(NamedTuple):
    """A program, what must become of it (statuses apart by ``|``), and a part of its standard error."""

    source: str
    status: str
    says: str = ""


_FORGE = """
import os
def send(found):
    for part in found:
        try:
            os.write(4, part)
        except OSError:
            pass
    os._exit(0)
"""

HOSTILE = {
    # Ending before the last line
    "sys_exit": Hostile("import sys\nsys.exit(0)\nassert False", "failed", "SystemExit"),
    "os_exit": Hostile("import os\nos._exit(0)\nassert False", "failed", "exit code 0 before its last line"),
    "exit_in_thread_and_wait": Hostile(
        "import os, threading, time\nthreading.Timer(0.1, os._exit, [0]).start()\ntime.sleep(3)\nassert False", "failed"
    ),
    "abort": Hostile("import os\nos.abort()", "killed", "SIGABRT"),
    "replaced_by_optimised_python": Hostile(
        "import os, sys\nos.execv(sys.executable, [sys.executable, '-O', '-c', 'assert False'])", "failed", "before its"
    ),
    "optimise_by_environment": Hostile("import os\nos.environ['PYTHONOPTIMIZE'] = '2'\nassert False", "failed"),
    # Changing what runs after it, or what an assert is
    "patched_builtins": Hostile(
        "import builtins, os, posix, sys\n"
        "for name in ('exec', 'compile', 'next', 'map', 'AssertionError', 'BaseException', 'type', 'isinstance'):\n"
        "    setattr(builtins, name, lambda *a, **k: True)\n"
        "posix.write = os.write = posix._exit = os._exit = lambda *a: 32\n"
        "sys.excepthook = sys.__excepthook__ = lambda *a: None\nassert False",
        "failed",
        "AssertionError",
    ),
    "other_assertion_error": Hostile(
        "import builtins\nclass Quiet(Exception): pass\nbuiltins.AssertionError = Quiet\n"
        "try:\n    assert False\nexcept Quiet:\n    pass",
        "failed",
        "AssertionError",
    ),
    "jump_over_the_asserts": Hostile(
        "import sys\n"
        "def tracer(frame, event, arg):\n"
        "    if event == 'line' and frame.f_lineno == 8:\n        frame.f_lineno = 9\n    return tracer\n"
        "sys._getframe().f_trace = tracer\n"
        "sys.settrace(tracer)\n"
        "assert False\n"
        "x = 1",
        "failed",
        "sys.settrace is not allowed",
    ),
    # Finding or guessing the sentinel
    "forged_output": Hostile(
        "import os\nfor fd in range(64):\n    try:\n        os.write(fd, b'passed' * 8)\n"
        "    except OSError:\n        pass\nos._exit(0)",
        "failed",
    ),
    "read_it_again": Hostile(
        _FORGE + "found = []\nfor fd in range(3, 64):\n    try:\n        os.lseek(fd, 0, 0)\n"
        "        found.append(os.read(fd, 32))\n    except OSError:\n        pass\nsend(found)",
        "failed",
    ),
    "all_that_frames_reach": Hostile(
        _FORGE + "import sys\nhidden = iter([[b'decoydecoydecoydecoydecoydecoy!!'].pop, None])\n"
        "seen, todo, found = set(), [], []\nframe = sys._getframe()\n"
        "while frame:\n    todo += [frame.f_locals, frame.f_globals, frame.f_builtins]\n    frame = frame.f_back\n"
        "frames = len(todo) // 3\n"
        "while todo and len(seen) < 200000:\n"
        "    thing = todo.pop()\n    if id(thing) in seen:\n        continue\n    seen.add(id(thing))\n"
        "    if type(thing) is bytes and len(thing) == 32:\n        found.append(thing)\n"
        "    elif type(thing) is dict:\n        todo += list(thing.values())\n"
        "    elif type(thing) in (list, tuple, set, frozenset):\n        todo += list(thing)\n"
        "    else:\n"
        "        for name in ('__dict__', '__closure__', '__self__', '__func__', '__defaults__', 'cell_contents'):\n"
        "            todo.append(getattr(thing, name, None))\n"
        "        try:\n            todo.append(thing.__reduce__() if hasattr(thing, '__next__') else None)\n"
        "        except TypeError:\n            pass\n"
        "print('looked through', frames, 'frames, found', found, file=sys.stderr)\nsend(found)",
        "failed",
        "looked through 3 frames, found [b'decoydecoydecoydecoydecoydecoy!!']",
    ),
    "all_that_gc_knows": Hostile(
        _FORGE + "import gc\nsend(x for o in gc.get_objects() for x in gc.get_referents(o)\n"
        "     if type(x) is bytes and len(x) == 32)",
        "failed",
        "gc.get_objects is not allowed",
    ),
    "what_the_frame_holds": Hostile(
        _FORGE + "import gc, sys\nsend(x for x in gc.get_referents(sys._getframe().f_back) if type(x) is bytes)",
        "failed",
        "gc.get_referents is not allowed",
    ),
    "raw_memory": Hostile("import ctypes\nctypes.string_at(0)", "failed", "not allowed in the sandbox"),
    "own_memory_as_a_file": Hostile("open('/proc/self/mem', 'rb').seek(1 << 20)\nassert False", "failed"),
    "another_interpreter": Hostile(
        "try:\n    import _interpreters\nexcept ImportError:\n    import _xxsubinterpreters\nassert False",
        "failed",
        "allowed",
    ),
    # Time, memory, output
    "endless_loop": Hostile("while True: pass", "timeout"),
    "endless_loop_that_ignores_signals": Hostile(
        "import signal\nfor number in range(1, 32):\n    try:\n        signal.signal(number, signal.SIG_IGN)\n"
        "    except OSError:\n        pass\nwhile True: pass",
        "timeout",
    ),
    "stopped": Hostile("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "timeout", "still running"),
    "huge_allocation": Hostile("x = bytearray(20 << 30)", "failed", "MemoryError"),
    "huge_allocation_by_children": Hostile(
        "import os, time\nfor _ in range(4):\n    if not os.fork():\n        x = b'1' * (100 << 20)\n"
        "        time.sleep(20)\n        os._exit(0)\ntime.sleep(20)",
        "killed",
        "hold more than 256 MB",
    ),
    "huge_output": Hostile("part = 'x' * (1 << 20)\nfor _ in range(1024):\n    print(part)", "passed"),
    "huge_errors": Hostile(
        "import sys\npart = 'x' * (1 << 20)\nfor _ in range(1024):\n    print(part, file=sys.stderr)",
        "killed",
        "wrote more",
    ),
    "huge_file": Hostile(
        "with open('big', 'wb') as file:\n    for _ in range(64):\n        file.write(bytes(1 << 20))", "failed|killed"
    ),
    "deep_recursion": Hostile("def f(): return f()\nf()", "failed", "RecursionError"),
    "deeper_recursion": Hostile(
        "import sys\nsys.setrecursionlimit(10**8)\nclass A:\n    def __repr__(self): return repr(self)\nrepr(A())",
        "failed|killed",
    ),
    "deep_source": Hostile("x = " + "(" * 5000 + ")" * 5000, "failed"),
    # Processes
    "fork_bomb": Hostile(
        "import os, sys, time\nmade = 0\ntry:\n    for _ in range(300):\n        if not os.fork():\n"
        "            time.sleep(20)\n            os._exit(0)\n        made += 1\n"
        "finally:\n    print('made', made, file=sys.stderr)\n",
        "failed",
        "BlockingIOError",
    ),
    "daemon": Hostile(
        "import os, time\nif not os.fork():\n    os.setsid()\n    if not os.fork():\n        time.sleep(60)\n"
        "    os._exit(0)",
        "passed",
    ),
    "kill_the_parent": Hostile("import os\nos.kill(os.getppid(), 9)\nassert False", "failed|killed"),
    "fork_and_finish_twice": Hostile("import os\nos.fork()", "failed|passed"),
    # Ends that are not quiet
    "bad_del": Hostile(
        "class A:\n    def __del__(self): raise ValueError('del')\na = A()\ndel a", "passed", "ValueError"
    ),
    "bad_atexit": Hostile("import atexit\natexit.register(lambda: 1 / 0)\nassert False", "failed", "AssertionError"),
    "endless_atexit": Hostile(
        "import atexit\ndef f():\n    while True: pass\natexit.register(f)\nassert False", "failed", "AssertionError"
    ),
    "exception_that_exits_when_shown": Hostile(
        "import os\nclass E(Exception):\n    def __str__(self): os._exit(0)\nraise E", "failed"
    ),
    "not_utf8": Hostile("import os\nos.write(2, b'caf\\xe9\\n')", "passed", "caf\ufffd"),
    "not_a_program": Hostile("def f(:", "failed", "SyntaxError"),
    "null_byte": Hostile("x = 1\0", "failed"),
    "lone_surrogate": Hostile("x = '\ud800'", "failed"),
    # Input
    "stdin": Hostile("import sys\nassert sys.stdin.read() == ''", "passed"),
    "input": Hostile("input()", "failed", "EOFError"),
    "descriptors": Hostile(
        "import os, sys\nfound = []\nfor fd in range(64):\n    try:\n        os.fstat(fd)\n        found.append(fd)\n"
        "    except OSError:\n        pass\nassert found == [0, 1, 2, 4], found",
        "passed",
    ),
}
