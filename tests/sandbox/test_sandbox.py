from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from lopa_lightning.errors import LoPAError
from lopa_lightning.sandbox import run as sandbox
from lopa_lightning.sandbox import walls
from lopa_lightning.sandbox.run import (
    WALLS,
    Limits,
    Outcome,
    isolation,
    isolation_line,
    require_permission,
    run_programs,
)
from tests.sandbox.hostile import HOSTILE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are run on Linux only")

ROOT = Path(__file__).resolve().parents[2]
PLAIN = ("process", "rlimits")
LANDLOCKED = ("Landlock", "system call filter")
NAMESPACES = "process and network namespaces"
LIMITS = Limits(seconds=5, cpu_seconds=1, memory_mb=256, processes=24, file_mb=16, output_kb=256)


def survivors() -> list[int]:
    """Processes of the sandbox that this process still has, or that nobody has."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            if b"sends the sentinel back" in command or b"sandbox.supervisor" in command:
                parents[int(entry.name)] = parent
    owners = dict(parents)
    for pid in owners:
        while owners[pid] in parents:
            owners[pid] = parents[owners[pid]]
    return [pid for pid, owner in owners.items() if owner in (os.getpid(), 1)]


@pytest.fixture(scope="module")
def hostile() -> dict[str, Outcome]:
    """All of them in one run, and after them programs that must not notice."""
    harmless = ["assert 1 + 1 == 2"] * 4
    outcomes = run_programs([program.source for program in HOSTILE.values()] + harmless, LIMITS)
    assert survivors() == []
    assert {outcome.status for outcome in outcomes[len(HOSTILE) :]} == {"passed"}
    return dict(zip(HOSTILE, outcomes))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_end_as_they_must(hostile: dict[str, Outcome], name: str) -> None:
    outcome, expected = hostile[name], HOSTILE[name]
    assert outcome.status in expected.status.split("|"), outcome
    assert expected.says in outcome.stderr
    assert outcome.isolation == isolation()
    assert len(outcome.stderr) < 5000
    assert outcome.seconds < LIMITS.wall_seconds + 15


def test_a_fork_bomb_stops_at_the_limit(hostile: dict[str, Outcome]) -> None:
    if not {NAMESPACES, "unprivileged user"} & set(isolation()):
        pytest.skip("on this machine the kernel counts processes of others too")
    made = re.search(r"made (\d+)", hostile["fork_bomb"].stderr)
    assert made is not None
    assert 0 < int(made[1]) < LIMITS.processes


# What is on the host


def test_the_environment_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOPA_TEST_TOKEN", "hunter2-in-the-environment")
    look = (
        "import glob, os, sys\nprint(dict(os.environ), file=sys.stderr)\n"
        "for name in glob.glob('/proc/*/environ'):\n    try:\n"
        "        print([p for p in open(name).read().split('\\0') if 'LOPA_TEST' in p], file=sys.stderr)\n"
        "    except OSError:\n        pass\n"
        "assert sorted(os.environ) == ['HOME', 'LANG', 'PATH', 'TMPDIR'], sorted(os.environ)"
    )
    (outcome,) = run_programs([look])
    assert outcome.passed, outcome.stderr
    if NAMESPACES in isolation():
        assert "hunter2" not in outcome.stderr


def test_nothing_is_written_to_the_host(tmp_path: Path) -> None:
    if "own file system" not in isolation():
        pytest.skip("this machine gives programs no file system of their own")
    home = Path.home()
    places = [home, ROOT, ROOT / "lopa_lightning", tmp_path, Path("/tmp"), Path("/usr/lib"), Path("/"), Path("/dev")]
    (outcome,) = run_programs(
        [
            f"import os, sys\nfor place in {[str(place) for place in places]} + [os.path.expanduser('~'), '.']:\n"
            "    try:\n        os.makedirs(place, exist_ok=True)\n"
            "        with open(place + '/lopa-was-here', 'w') as file:\n            file.write('x')\n"
            "        print('wrote', place, file=sys.stderr)\n    except OSError:\n        pass\n"
        ]
    )
    assert outcome.passed
    written = [line.removeprefix("wrote ") for line in outcome.stderr.splitlines()]
    assert "." in written  # so a program has somewhere to write
    assert all(place == "." or place.startswith("/tmp") for place in written)
    assert not [place for place in places if (place / "lopa-was-here").exists()]


def test_files_of_the_host_are_not_read() -> None:
    if "own file system" not in isolation():
        pytest.skip("this machine gives programs no file system of their own")
    files = ["/etc/passwd", "/etc/hostname", str(ROOT / "pyproject.toml"), f"/proc/{os.getpid()}/environ"]
    (outcome,) = run_programs([f"import os\nassert not [f for f in {files} if os.path.exists(f)]"])
    assert outcome.passed, outcome.stderr


def test_there_is_no_network() -> None:
    if not {NAMESPACES, "system call filter"} & set(isolation()):
        pytest.skip("this machine gives programs no network of their own, and filters no calls")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        (outcome,) = run_programs([f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)"])
        assert (outcome.status, "OSError" in outcome.stderr) == ("failed", True)
        with pytest.raises(TimeoutError):
            server.accept()


def test_the_network_namespace_alone_has_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    if NAMESPACES not in isolation():
        pytest.skip("this machine gives programs no network of their own")
    monkeypatch.setattr(sandbox, "isolation", lambda: (NAMESPACES,))
    (outcome,) = run_programs(["import socket\nsocket.create_connection(('127.0.0.1', 9), 2)"])
    assert (outcome.status, "unreachable" in outcome.stderr) == ("failed", True)


def test_other_processes_are_not_reached() -> None:
    if NAMESPACES not in isolation():
        pytest.skip("this machine gives programs no process namespace")
    kill_all = "import os\ntry:\n    os.kill(-1, 9)\nexcept OSError:\n    pass\n"
    kill_host = f"import os\nos.kill({os.getpid()}, 9)"
    outcomes = run_programs([kill_all, kill_host, "assert True"])
    assert [outcome.status for outcome in outcomes[1:]] == ["failed", "passed"]
    assert "ProcessLookupError" in outcomes[1].stderr


def test_programs_are_not_root() -> None:
    (outcome,) = run_programs(["import os\nassert os.getuid() != 0 and os.geteuid() != 0 and 0 not in os.getgroups()"])
    assert outcome.passed or "unprivileged user" not in isolation()


def test_no_temporary_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = "import os\nfor _ in range(50):\n    os.mkdir('d')\n    os.chdir('d')\nopen('f', 'w').close()\n"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sandbox, "isolation", lambda: PLAIN)
    outcomes = run_programs([fill, fill + "print(os.getcwd(), file=__import__('sys').stderr)"], LIMITS)
    assert [outcome.status for outcome in outcomes] == ["passed", "passed"]
    assert outcomes[1].stderr.startswith(f"{tmp_path}/lopa-sandbox-")
    assert list(tmp_path.iterdir()) == []


def test_programs_have_the_standard_library_of_this_python() -> None:
    program = "import os, sys\nassert (sys.prefix, os.path.realpath(os.__file__)) == {!r}, (sys.prefix, os.__file__)"
    (outcome,) = run_programs([program.format((sys.base_prefix, os.path.realpath(os.__file__)))])
    assert outcome.passed, outcome.stderr


def test_what_lies_under_the_temporary_folder_is_seen_in_the_own_file_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if "own file system" not in isolation():
        pytest.skip("this machine gives programs no file system of their own")
    python = Path(tempfile.mkdtemp(dir="/tmp"), "python")
    python.write_text("there")
    monkeypatch.setattr(walls, "_READABLE", (str(python.parent),))
    if (child := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            walls._leave_host(["own file system"], None)
            walls._enter_root(str(tmp_path), 1)
            Path("/tmp/new").write_text("x")
            with pytest.raises(OSError, match="Read-only"):
                python.write_text("x")
            os._exit(python.read_text() == "there")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    shutil.rmtree(python.parent)


def test_threads_start_however_many_processes_the_user_has() -> None:
    others = [subprocess.Popen(["sleep", "60"]) for _ in range(LIMITS.processes)]
    try:
        program = "import threading\nthread = threading.Thread(target=int)\nthread.start()\nthread.join()"
        outcomes = [run_programs([program], LIMITS)[0], _behind(LANDLOCKED, program)]
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert [outcome.status for outcome in outcomes] == ["passed", "passed"], outcomes


# Without namespaces


def _behind(names: tuple[str, ...], program: str) -> Outcome:
    return sandbox._run([program], LIMITS, 1, names)[0]


def test_a_plain_process_still_keeps_the_sentinel_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "isolation", lambda: PLAIN)
    names = ["sys_exit", "os_exit", "patched_builtins", "all_that_frames_reach", "daemon", "real_time_signal"]
    outcomes = run_programs([HOSTILE[name].source for name in names] + ["assert True"], LIMITS)
    assert [outcome.status for outcome in outcomes] == [HOSTILE[name].status for name in names] + ["passed"]
    assert outcomes[0].isolation == ("process", "rlimits")
    assert survivors() == []


def test_landlock_and_the_filter_do_without_namespaces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not set(LANDLOCKED) <= set(isolation()):
        pytest.skip("this machine has no Landlock or no system call filter")
    monkeypatch.setattr(sandbox, "isolation", lambda: LANDLOCKED)
    (tmp_path / "secret").write_text("secret")
    names = ["own_memory_as_a_file", "clean_python_reads_its_parent", "clean_python_reads_its_child"]
    names += ["calls_that_lead_out", "huge_files_in_memory", "socket_between_machines"]
    files = f"import os\nopen('mine', 'w').close()\nos.remove('mine')\nopen({str(tmp_path / 'secret')!r})"
    written = f"open({str(tmp_path / 'new')!r}, 'w')"
    outcomes = run_programs([*(HOSTILE[name].source for name in names), files, written], LIMITS)
    assert [outcome.status for outcome in outcomes] == [HOSTILE[name].status for name in names] + ["failed"] * 2
    for name, outcome in zip(names, outcomes):
        assert HOSTILE[name].says in outcome.stderr
    assert all("PermissionError" in outcome.stderr and "secret" in outcome.stderr for outcome in outcomes[-2:-1])
    assert "PermissionError" in outcomes[-1].stderr
    assert os.listdir(tmp_path) == ["secret"]


@pytest.mark.slow
def test_a_fork_bomb_is_ended_where_the_kernel_counts_others_too() -> None:
    assert _behind((), HOSTILE["fork_bomb"].source).status in ("failed", "killed")
    assert survivors() == []


def test_the_run_goes_on_when_a_supervisor_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "isolation", lambda: PLAIN)
    # Above the program are two processes that wait for it, above them the supervisor.
    kill = (
        "import os, signal\nabove = os.getppid()\nfor _ in range(2):\n    with open(f'/proc/{above}/stat') as file:\n"
        "        above = int(file.read().rsplit(')', 1)[1].split()[1])\n"
        "os.kill(above, signal.SIGKILL)\n"
    )
    outcomes = run_programs(["assert True", kill, "assert False", "assert True"], LIMITS, workers=1)
    assert [outcome.status for outcome in outcomes] == ["passed", "killed", "failed", "passed"]
    assert outcomes[1].stderr == "sandbox: the supervisor was killed"


# The pool


def test_outcomes_come_in_the_order_of_the_programs() -> None:
    waits = [0.5, 0.0, 0.2, 0.0, 0.1]
    programs = [f"import sys, time\ntime.sleep({wait})\nprint({i}, file=sys.stderr)" for i, wait in enumerate(waits)]
    assert [outcome.stderr for outcome in run_programs(programs, workers=3)] == [f"{i}\n" for i in range(5)]


def test_an_interrupted_run_leaves_no_process_and_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = time.monotonic()
    interrupt = threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGINT])
    interrupt.start()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run_programs(["import time\ntime.sleep(60)"] * 3, workers=2)
    assert list(tmp_path.iterdir()) == []
    assert time.monotonic() - started < 30
    assert survivors() == []


def test_a_large_program_arrives_whole() -> None:
    text = "é" * 300_000
    (outcome,) = run_programs([f"text = '{text}'\nassert len(text) == 300000 and set(text) == {{chr(233)}}"])
    assert outcome.passed, outcome.stderr


def test_no_programs_no_outcomes() -> None:
    assert run_programs([]) == []


def test_the_standard_library_and_main_are_as_in_a_script() -> None:
    program = (
        "import asyncio, socket, sqlite3, ssl, subprocess, tempfile, uuid\n"
        "async def answer(): return 42\nassert asyncio.run(answer()) == 42\n"
        "assert subprocess.run(['/bin/echo', 'x'], capture_output=True).stdout == b'x\\n'\n"
        "import collections, dataclasses, decimal, enum, heapq, itertools, json, pickle, re, typing, unittest\n"
        "@dataclasses.dataclass\nclass Point:\n    x: int\n"
        "assert __name__ == '__main__' and pickle.loads(pickle.dumps(Point(3))) == Point(3)\n"
        "assert collections.namedtuple('P', 'x')(1).x == 1"
    )
    (outcome,) = run_programs([program])
    assert outcome.passed, outcome.stderr


@pytest.mark.parametrize(("name", "value"), [("seconds", 0), ("memory_mb", -1), ("seconds", float("inf"))])
def test_limits_must_be_above_zero_and_finite(name: str, value: float) -> None:
    with pytest.raises(LoPAError, match=rf"limits\.{name} must be above 0 and finite, got {value}"):
        Limits(**{name: value})  # type: ignore[arg-type]


def test_the_wall_clock_limit_is_far_above_that_of_cpu_time() -> None:
    assert [Limits().wall_seconds, Limits(cpu_seconds=2).wall_seconds, Limits(seconds=5).wall_seconds] == [120, 24, 5]


def test_at_least_one_worker() -> None:
    with pytest.raises(LoPAError, match="workers must be at least 1, got 0"):
        run_programs(["assert True"], workers=0)


def test_code_runs_only_with_permission() -> None:
    require_permission(True)
    with pytest.raises(LoPAError, match="set allow_code_execution: true") as error:
        require_permission(False)
    assert str(error.value).endswith(isolation_line())


def test_one_line_says_what_isolates_programs_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "isolation", lambda: (*PLAIN, *WALLS)[:6])
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert isolation_line() == (
        "programs are isolated by: process, rlimits, process and network namespaces, own file system, Landlock, "
        "system call filter; without unprivileged user they can act as this user: root"
    )


def test_elsewhere_than_on_linux_it_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.isolation.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    for call in (isolation, isolation_line, lambda: run_programs(["assert True"])):
        with pytest.raises(LoPAError, match=r"generated programs can be run on Linux only, not on darwin$"):
            call()
