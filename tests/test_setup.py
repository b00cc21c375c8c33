"""The set-up script: what it refuses, which flags it chooses, and how it words a crash."""

import ast
import signal
import sys
from pathlib import Path

import pytest

import setup


def fake_compiler(folder: Path, macro: str) -> Path:
    """Write a `cc` that predefines one macro when asked with `-march=native`."""
    path = folder / "cc"
    path.write_text(f'#!/bin/sh\ncase "$*" in *-march=native*) echo "#define {macro} 1";; esac\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("version", [(3, 6, 15), (3, 9, 18)])
def test_old_python_is_refused_with_a_remedy(version: tuple[int, ...]) -> None:
    with pytest.raises(setup.SetupError, match=r"Python 3\.\d\.\d+ is too old.*PYTHON="):
        setup.check_python(version)


def test_old_python_can_read_the_script() -> None:
    tree = ast.parse(Path(setup.__file__).read_text(), feature_version=(3, 6))
    assert "check_python" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_amx_is_kept_out_where_the_compiler_would_use_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", str(fake_compiler(tmp_path, "__AMX_TILE__")))
    monkeypatch.setenv("CFLAGS", "-O2")
    monkeypatch.delenv("CXXFLAGS", raising=False)
    assert setup.build_flags() == {"CFLAGS": f"-O2 {setup.NO_AMX}", "CXXFLAGS": setup.NO_AMX}


def test_flags_are_left_alone_without_amx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", str(fake_compiler(tmp_path, "__AVX512F__")))
    assert setup.build_flags() == {}


@pytest.mark.parametrize("variable", ["CC", "CXX"])
def test_missing_compiler_is_named(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "no-such-compiler")
    with pytest.raises(setup.SetupError, match=r"no-such-compiler.*build-essential"):
        setup.check_compilers()


@pytest.mark.parametrize("killer", [signal.SIGILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_crash_is_told_in_words_with_the_rebuild_command(killer: signal.Signals) -> None:
    child = f"import os, sys; print('tile config', file=sys.stderr, flush=True); os.kill(os.getpid(), {killer:d})"
    with pytest.raises(setup.SetupError) as problem:
        setup.smoke_check([sys.executable, "-c", child], {"CFLAGS": setup.NO_AMX})
    words = str(problem.value)
    assert f"crashes ({killer.name}" in words
    assert "Its last words: tile config" in words
    assert f"CFLAGS='{setup.NO_AMX}' .venv/bin/python -m pip install --force-reinstall" in words


def test_a_failing_smoke_test_is_told_with_its_last_words() -> None:
    with pytest.raises(setup.SetupError, match=r"(?s)fails on a quantized model.*said 'Q'"):
        setup.smoke_check([sys.executable, "-c", "import sys; sys.exit(\"said 'Q'\")"], {})


def test_a_passing_smoke_test_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    setup.smoke_check([sys.executable, "-c", "print('noise')"], {})
    assert capfd.readouterr() == ("", "")
