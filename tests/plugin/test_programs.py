"""Programs that `adlocal run` cannot protect: they are refused in words, before they start or as soon as it shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import llama_cpp
import pytest

from adlocal import InputError
from adlocal.plugin import check_program
from support.cli import Cli

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="libraries are preloaded on Linux alone")

# What llama.cpp holds wherever it is linked, because it logs it; kept from the optimizer here.
MARK = "llama_model_load_from_file_impl"
HOLDS = f'const char * volatile mark = "{MARK}";\n'


def compiled(source: str, path: Path, *options: str) -> Path:
    code = path.with_suffix(".c")
    code.write_text(source)
    subprocess.run(["cc", "-o", path, code, *options], check=True, timeout=60)
    return path


def run(bundle: Path, *program: object) -> subprocess.CompletedProcess[str]:
    own = [sys.executable, "-m", "adlocal", "run", "--bundle", bundle, "--", *program]
    return subprocess.run(list(map(str, own)), capture_output=True, text=True, timeout=60)


def test_the_mark_is_llama_cpps() -> None:
    libraries = list(Path(llama_cpp.__file__).parent.rglob("libllama.so"))
    assert libraries
    assert all(MARK.encode() + b"\0" in path.read_bytes() for path in libraries)


def test_a_program_that_holds_llama_cpp_is_stopped_before_it_begins(tiny_bundle: Path, tmp_path: Path) -> None:
    main = '#include <stdio.h>\nint main(void) { puts("began"); return mark == 0; }\n'
    done = run(tiny_bundle, compiled(HOLDS + main, tmp_path / "server"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("adlocal: server holds llama.cpp and calls it directly")
    assert run(tiny_bundle, compiled(main.replace("mark == 0", "0"), tmp_path / "other")).stdout == "began\n"


def test_a_library_that_holds_llama_cpp_is_stopped_when_it_is_used(tiny_bundle: Path, tmp_path: Path) -> None:
    library = compiled(HOLDS + "int answer(void) { return mark != 0; }\n", tmp_path / "libheld.so", "-shared", "-fPIC")
    code = f"import ctypes; print(ctypes.CDLL({str(library)!r}).answer())"
    done = run(tiny_bundle, sys.executable, "-c", code)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"adlocal: {library} holds llama.cpp and calls it directly")


def test_two_llama_cpps_in_one_program_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    """The second one stands in: it defines the function by which llama.cpp is found."""
    second = compiled(
        "void * llama_init_from_model(void) { return 0; }\n", tmp_path / "libsecond.so", "-shared", "-fPIC"
    )
    use = "llama_cpp.llama_model_load_from_file(b'nowhere', llama_cpp.llama_model_default_params())"
    code = f"import ctypes, llama_cpp; ctypes.CDLL({str(second)!r}); {use}"
    done = run(tiny_bundle, sys.executable, "-c", code)
    assert done.returncode == 1
    assert "adlocal: two llama.cpps are loaded" in done.stderr


def test_a_static_program_is_refused(tmp_path: Path, tiny_bundle: Path, cli: Cli) -> None:
    path = compiled("int main(void) { return 0; }\n", tmp_path / "program", "-static")
    done = cli("run", "--bundle", tiny_bundle, "--", path)
    assert done.status == 2
    assert done.message().startswith(f"adlocal run: {path}: linked statically")


def test_a_program_of_musl_is_refused(tmp_path: Path) -> None:
    path = compiled(
        "int main(void) { return 0; }\n", tmp_path / "program", "-Wl,--dynamic-linker=/lib/ld-musl-x86_64.so.1"
    )
    with pytest.raises(InputError, match=r"made for musl \(/lib/ld-musl-x86_64"):
        check_program(path)


def test_a_program_of_another_machine_is_refused(tmp_path: Path) -> None:
    path = compiled("int main(void) { return 0; }\n", tmp_path / "program")
    binary = bytearray(path.read_bytes())
    binary[18] = 183  # aarch64
    path.write_bytes(binary)
    with pytest.raises(InputError, match="made for another machine"):
        check_program(path)


def test_a_program_with_its_owners_rights_is_refused(tmp_path: Path) -> None:
    path = compiled("int main(void) { return 0; }\n", tmp_path / "program")
    check_program(path)
    path.chmod(0o4755)
    with pytest.raises(InputError, match="setuid"):
        check_program(path)


def test_scripts_are_their_interpreters(tmp_path: Path) -> None:
    path = tmp_path / "script"
    path.write_text("#!/bin/sh\n")
    check_program(path)
