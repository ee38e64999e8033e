"""The package runs where Triton has no wheel (macOS, Windows) and where POSIX is not: nothing of them is required."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ConfigParser()
PACKAGES.read(ROOT / "setup.cfg", encoding="utf-8")
FOLDERS = [ROOT.joinpath(*name.split(".")[1:]) for name in PACKAGES["options"]["packages"].split()]
FILES = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in folder.glob("*.py"))

WITHOUT_TRITON = """
import os, sys
sys.modules["triton"] = None
sys.path.insert(0, "tests")
import torch
from ops import CASES
from small_models import SMALL, small

def refusal(case):
    try:
        case.call(*case.tensors(torch.float32), impl="fused")
    except NotImplementedError as error:
        return str(error)

torch.set_num_threads(1)
reasons = {refusal(case) for case in CASES.values()}
assert None not in reasons, reasons
for name, case in CASES.items():
    tensors = case.tensors()
    out = case.call(*tensors)
    torch.testing.assert_close(out, case.call(*case.tensors(), impl="reference"), msg=name)
    out.sum().backward()
    assert all(t.grad is not None for t in tensors), name
if os.environ["TRITON_INTERPRET"] == "1":  # which asks for Triton on a CPU
    assert any("the package triton is not installed" in reason for reason in reasons), reasons

for name in SMALL:
    model = small(name).train()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters()), name
assert [name for name in sys.modules if name.startswith("triton.")] == []
print(len(CASES), len(SMALL))
"""


@pytest.mark.parametrize("interpreter", ["0", "1"])
def test_every_op_and_every_family_run_without_triton(interpreter):
    environment = {**os.environ, "TRITON_INTERPRET": interpreter}
    command = [sys.executable, "-c", WITHOUT_TRITON]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(int(number) > 9 for number in done.stdout.split())


def test_triton_is_not_required():
    """It comes with torch where it has a wheel."""
    assert "triton" not in PACKAGES["options"]["install_requires"]


# What Python's documentation marks "Availability: Unix" or leaves out on Windows.
NO_MODULE = set("crypt curses fcntl grp nis posix pty pwd readline resource spwd syslog termios tty".split())
NO_NAME = {
    "os": """chown chroot confstr ctermid fchdir fchmod fchown fork forkpty fpathconf fstatvfs getegid geteuid getgid
        getgroups getloadavg getpgid getpgrp getpriority getresgid getresuid getsid getuid killpg lchown lockf
        memfd_create mkfifo mknod nice openpty pathconf pidfd_open pipe2 posix_fadvise posix_fallocate posix_spawn
        posix_spawnp pread preadv pwrite pwritev sched_getaffinity sched_setaffinity sched_yield sendfile setegid
        seteuid setgid setgroups setpgid setpriority setresgid setresuid setsid setuid splice statvfs sync sysconf
        tcgetpgrp tcsetpgrp ttyname uname wait wait3 wait4 waitid WEXITSTATUS WIFEXITED O_CLOEXEC O_DIRECT O_DIRECTORY
        O_DSYNC O_NOFOLLOW O_NONBLOCK O_SYNC""".split(),
    "signal": """SIGALRM SIGBUS SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2 alarm
        getitimer pause pthread_kill pthread_sigmask setitimer sigpending sigwait siginterrupt""".split(),
    "time": ["tzset"],
    "socket": ["AF_UNIX", "socketpair"],
}


GUARDS = ("AttributeError", "ImportError")


def only_on_posix(source: str) -> Iterator[str]:
    """Every name of a source that Windows lacks, but for those that hasattr, sys.platform or a caught error guards."""
    tree = ast.parse(source)
    asked, guarded = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "hasattr":
            asked.add(".".join(ast.unparse(argument).strip("'") for argument in node.args))
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "sys.platform == 'win32'":
            guarded |= {id(inner) for statement in node.orelse for inner in ast.walk(statement)}
        elif isinstance(node, ast.Try) and any(
            word in ast.unparse(handler.type or handler) for handler in node.handlers for word in GUARDS
        ):
            guarded |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in NO_MODULE)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            if node.module.partition(".")[0] in NO_MODULE:
                yield node.module
            yield from (f"{node.module}.{a.name}" for a in node.names if a.name in NO_NAME.get(node.module, ()))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = ast.unparse(node)
            if node.attr in NO_NAME.get(node.value.id, ()) and name not in asked:
                yield name


def test_nothing_is_needed_that_windows_lacks():
    needed = {str(path): [*only_on_posix((ROOT / path).read_text(encoding="utf-8"))] for path in FILES}
    assert len(needed) > 100 and {path: names for path, names in needed.items() if names} == {}


def test_what_windows_lacks_is_found():
    sources = {
        "import os, fcntl\nfrom os import fork, path\nfrom pwd import getpwnam": ["fcntl", "os.fork", "pwd"],
        "def f():\n    return signal.SIGKILL, os.replace, signal.SIGINT": ["signal.SIGKILL"],
        "try:\n    os.sysconf('a')\nexcept (OSError, AttributeError):\n    os.nice(1)": ["os.nice"],
        "try:\n    import fcntl\nexcept ImportError:\n    import pwd": ["pwd"],
        "os.fork() if hasattr(os, 'fork') else os.getuid()": ["os.getuid"],
    }
    assert {source: [*only_on_posix(source)] for source in sources} == sources
