from __future__ import annotations

import os
import re
import socket
import sys
import tempfile
import time
from pathlib import Path

import pytest

from lopa_lightning.errors import LoPAError
from lopa_lightning.evaluation import sandbox
from lopa_lightning.evaluation.jail.plan import Plan
from lopa_lightning.evaluation.sandbox import (
    Limits,
    Outcome,
    isolation,
    iterate_programs,
    require_permission,
    run_programs,
)
from tests.evaluation.hostile import HOSTILE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are run on Linux only")

ROOT = Path(__file__).resolve().parents[2]
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
            if b"sends the sentinel back" in command or b"jail.supervisor" in command:
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
    if "process namespace" in isolation():
        assert "hunter2" not in outcome.stderr


def test_nothing_is_written_to_the_host(tmp_path: Path) -> None:
    if "read-only file system" not in isolation():
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
    if "read-only file system" not in isolation():
        pytest.skip("this machine gives programs no file system of their own")
    files = ["/etc/passwd", "/etc/hostname", str(ROOT / "pyproject.toml"), f"/proc/{os.getpid()}/environ"]
    (outcome,) = run_programs([f"import os\nassert not [f for f in {files} if os.path.exists(f)]"])
    assert outcome.passed, outcome.stderr


def test_there_is_no_network() -> None:
    if "network namespace" not in isolation():
        pytest.skip("this machine gives programs no network of their own")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        (outcome,) = run_programs([f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)"])
        assert (outcome.status, "unreachable" in outcome.stderr) == ("failed", True)
        with pytest.raises(TimeoutError):
            server.accept()


def test_other_processes_are_not_reached() -> None:
    if "process namespace" not in isolation():
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
    monkeypatch.setattr(sandbox, "_plan", lambda: Plan())
    outcomes = run_programs([fill, fill + "print(os.getcwd(), file=__import__('sys').stderr)"], LIMITS)
    assert [outcome.status for outcome in outcomes] == ["passed", "passed"]
    assert outcomes[1].stderr.startswith(f"{tmp_path}/lopa-sandbox-")
    assert list(tmp_path.iterdir()) == []


# Without namespaces


def test_a_plain_process_still_keeps_the_sentinel_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_plan", lambda: Plan())
    names = [
        "sys_exit",
        "os_exit",
        "patched_builtins",
        "all_that_frames_reach",
        "daemon",
        "endless_loop",
        "huge_errors",
    ]
    outcomes = run_programs([HOSTILE[name].source for name in names] + ["assert True"], LIMITS)
    assert [outcome.status for outcome in outcomes] == [HOSTILE[name].status for name in names] + ["passed"]
    assert outcomes[0].isolation == ("process", "rlimits")
    assert survivors() == []


def test_the_run_goes_on_when_a_supervisor_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_plan", lambda: Plan())
    # The parent is the process that waits for the program, its parent the supervisor.
    kill = (
        "import os, signal\nwith open(f'/proc/{os.getppid()}/stat') as file:\n"
        "    supervisor = int(file.read().rsplit(')', 1)[1].split()[1])\n"
        "os.kill(supervisor, signal.SIGKILL)\n"
    )
    outcomes = run_programs(["assert True", kill, "assert False", "assert True"], LIMITS, workers=1)
    assert [outcome.status for outcome in outcomes] == ["passed", "killed", "failed", "passed"]
    assert outcomes[1].stderr == "sandbox: the supervisor was killed"


# The pool


def test_outcomes_come_in_the_order_of_the_programs() -> None:
    waits = [0.5, 0.0, 0.2, 0.0, 0.1]
    programs = [f"import sys, time\ntime.sleep({wait})\nprint({i}, file=sys.stderr)" for i, wait in enumerate(waits)]
    assert [outcome.stderr for outcome in run_programs(programs, workers=3)] == [f"{i}\n" for i in range(5)]


def test_outcomes_are_there_before_the_last_program_has_run() -> None:
    started = time.monotonic()
    outcomes = iterate_programs(["assert True", "import time\ntime.sleep(60)"], workers=1)
    assert next(outcomes).passed
    outcomes.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 30
    assert survivors() == []


def test_a_program_whose_turn_comes_when_the_run_has_ended_is_not_started() -> None:
    supervisor = sandbox._Supervisor(Plan(), LIMITS)
    supervisor.end()
    with pytest.raises(LoPAError, match="the sandbox has been closed"):
        supervisor.run("import time\ntime.sleep(60)")
    assert supervisor._process is None


def test_a_large_program_arrives_whole() -> None:
    text = "é" * 300_000
    (outcome,) = run_programs([f"text = '{text}'\nassert len(text) == 300000 and set(text) == {{chr(233)}}"])
    assert outcome.passed, outcome.stderr


def test_no_programs_no_outcomes() -> None:
    assert run_programs([]) == []


def test_standard_library_and_main_are_as_in_a_script() -> None:
    program = (
        "import collections, dataclasses, decimal, enum, heapq, itertools, json, pickle, re, typing, unittest\n"
        "@dataclasses.dataclass\nclass Point:\n    x: int\n"
        "assert __name__ == '__main__' and pickle.loads(pickle.dumps(Point(3))) == Point(3)\n"
        "assert collections.namedtuple('P', 'x')(1).x == 1"
    )
    (outcome,) = run_programs([program])
    assert outcome.passed, outcome.stderr


@pytest.mark.parametrize("name", ["seconds", "memory_mb", "processes", "output_kb"])
def test_limits_must_be_above_zero(name: str) -> None:
    with pytest.raises(LoPAError, match=rf"limits\.{name} must be above 0, got 0"):
        Limits(**{name: 0})


def test_the_wall_clock_limit_is_far_above_that_of_cpu_time() -> None:
    assert [Limits().wall_seconds, Limits(cpu_seconds=2).wall_seconds, Limits(seconds=5).wall_seconds] == [120, 24, 5]


def test_at_least_one_worker() -> None:
    with pytest.raises(LoPAError, match="workers must be at least 1, got 0"):
        run_programs(["assert True"], workers=0)


def test_code_runs_only_with_permission() -> None:
    require_permission(True)
    with pytest.raises(LoPAError, match="set allow_code_execution: true") as error:
        require_permission(False)
    assert str(error.value).endswith(", ".join(isolation()))
