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

# Run by a clean Python: looks for the sentinel in the memory of another process, and sends it.
_SCAN = """
import ctypes, os, struct, sys
pid, near, kind = map(int, sys.argv[1:])
class Part(ctypes.Structure):
    _fields_ = [('base', ctypes.c_void_p), ('size', ctypes.c_size_t)]
buffer, size = ctypes.create_string_buffer(1 << 16), 1 << 16
read, mark = ctypes.CDLL(None).process_vm_readv, struct.pack('qq', kind, 32)
here = ctypes.byref(Part(ctypes.addressof(buffer), size))
for start in range((near & -size) - (8 << 20), near + (8 << 20), size):
    if read(pid, here, 1, ctypes.byref(Part(start, size)), 1, 0) == size:
        at = buffer.raw.find(mark)
        while at >= 0:
            found = buffer.raw[at + 24 : at + 56]
            if sum(byte > 127 for byte in found) > 6:
                os.write(4, found)
                os._exit(0)
            at = buffer.raw.find(mark, at + 1)
"""

# Run by a clean Python: says which calls that lead out of the limits the kernel still takes.
_CALLS = """
import ctypes, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
word = ctypes.create_string_buffer(8)
def opens(family):
    try:
        return socket.socket(family).fileno()
    except OSError:
        return -1
print('works:', [name for name, result in {
    'shmget': libc.shmget(0, 4096, 0o1600), 'semget': libc.semget(0, 1, 0o1600), 'msgget': libc.msgget(0, 0o1600),
    'memfd_create': libc.memfd_create(b'x', 0), 'ptrace': libc.ptrace(0, 0, 0, 0), 'unshare': libc.unshare(1 << 28),
    'process_vm_readv': libc.process_vm_readv(1, None, 0, None, 0, 0), 'pidfd_open': libc.syscall(434, 1, 0),
    'io_uring_setup': -(libc.syscall(425, 1, None) == -1 and ctypes.get_errno() == 38),
    'clone_new_user': libc.syscall({'x86_64': 56}.get(__import__('os').uname().machine, 220), 1 << 28 | 17, 0, 0, 0, 0),
    'keyctl': libc.syscall({'x86_64': 250}.get(__import__('os').uname().machine, 219), 0, -4, 1),
    **{f'socket of family {family}': opens(family) for family in (1, 2, 10, 16, 17, 38, 40)},
}.items() if result != -1], file=sys.stderr)
"""

HOSTILE = {
    # Ending before the last line
    "sys_exit": Hostile("import sys\nsys.exit(0)\nassert False", "failed", "SystemExit"),
    "os_exit": Hostile("import os\nos._exit(0)\nassert False", "failed", "exit code 0 before its last line"),
    "exit_in_thread_and_wait": Hostile(
        "import os, threading, time\nthreading.Timer(0.1, os._exit, [0]).start()\ntime.sleep(3)\nassert False", "failed"
    ),
    "abort": Hostile("import os\nos.abort()", "killed", "SIGABRT"),
    "real_time_signal": Hostile("import os\nos.kill(os.getpid(), 40)", "killed", "ended by signal 40"),
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
    "jump_by_monitoring": Hostile(
        "import sys\n"
        "def line(code, number):\n"
        "    if number == 8:\n        sys._getframe(1).f_lineno = 9\n"
        "sys.monitoring.use_tool_id(4, 'x')\nsys.monitoring.register_callback(4, sys.monitoring.events.LINE, line)\n"
        "sys.monitoring.set_events(4, sys.monitoring.events.LINE)\n"
        "assert sys is None\nx = 1",
        "failed",
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
    "own_memory_as_a_file": Hostile("open('/proc/self/mem', 'rb')", "failed", "/proc/self/mem"),
    "clean_python_reads_its_parent": Hostile(
        f"import os, sys\nSCAN = {_SCAN!r}\n"
        "os.spawnv(os.P_WAIT, sys.executable, [sys.executable, '-c', SCAN, str(os.getpid()), str(id(bytes(32))), "
        "str(id(bytes))])\nos._exit(0)",
        "failed",
    ),
    "clean_python_reads_its_child": Hostile(
        f"import os, sys, time\nSCAN = {_SCAN!r}\nif (child := os.fork()) == 0:\n    time.sleep(20)\n    os._exit(0)\n"
        "os.execv(sys.executable, [sys.executable, '-c', SCAN, str(child), str(id(bytes(32))), str(id(bytes))])",
        "failed",
    ),
    "raw_memory_under_another_name": Hostile(
        "import _imp, glob, importlib.machinery, sys\npath = glob.glob(sys.path[-1] + '/_ctypes.*')\n"
        "if path:\n    _imp.create_dynamic(importlib.machinery.ModuleSpec('x._ctypes', None, origin=path[0]))\n"
        "else:\n    import _ctypes",
        "failed",
        "not allowed in the sandbox",
    ),
    "another_interpreter_under_another_name": Hostile(
        "import _imp, glob, importlib.machinery, sys\nfor name in ('_interpreters', '_xxsubinterpreters'):\n"
        "    for path in glob.glob(sys.path[-1] + f'/{name}.*'):\n"
        "        _imp.create_dynamic(importlib.machinery.ModuleSpec('q.' + name, None, origin=path)).create()\n"
        "if not path:\n    import _interpreters",
        "failed",
        "not allowed in the sandbox",
    ),
    "handmade_bytecode": Hostile(
        "import marshal\nexec(marshal.loads(marshal.dumps(compile('x = 1', '', 'exec'))))",
        "failed",
        "bytecode is not allowed",
    ),
    "changed_bytecode": Hostile(
        "def f(): pass\nf.__code__ = f.__code__.replace(co_code=f.__code__.co_code)",
        "failed",
        "bytecode is not allowed",
    ),
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
    "huge_allocation_by_children_of_a_thread": Hostile(
        "import os, threading, time\ndef fork():\n    for _ in range(4):\n        if not os.fork():\n"
        "            x = b'1' * (100 << 20)\n            time.sleep(20)\n            os._exit(0)\n    time.sleep(20)\n"
        "threading.Thread(target=fork).start()\ntime.sleep(20)",
        "killed",
        "hold more than 256 MB",
    ),
    "huge_files_in_memory": Hostile(
        "import os, time\nfor _ in range(40):\n    os.write(os.memfd_create('x'), bytes(8 << 20))", "failed", "OSError"
    ),
    "calls_that_lead_out": Hostile(
        f"import os, sys\nos.spawnv(os.P_WAIT, sys.executable, [sys.executable, '-I', '-S', '-c', {_CALLS!r}])",
        "passed",
        "works: []",
    ),
    "socket_between_machines": Hostile("import socket\nsocket.socket(40, socket.SOCK_STREAM)", "failed", "OSError"),
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
        "failed|killed",
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
