"""What may be given as PROXY: local files and directories, and the hub, a stub of which serves tiny models."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from huggingface_hub import constants

from adlocal.errors import AdlocalError, ConversionError, InputError, ModelError
from adlocal_convert.source.inputs import resolve
from support import families
from support.stub_hub import TOKEN, StubHub, serve

WEIGHTS, GGUFS, SPLIT = "lab/weights", "lab/ggufs", "lab/split"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("weights") / "tiny"
    families.save(families.family_model("llama"), directory)
    (directory / "README.md").write_text("not needed")
    (directory / "pytorch_model.bin").write_text("not needed")
    return directory


@pytest.fixture(scope="module")
def ggufs(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files with the names of quantizations; only the names matter."""
    root = tmp_path_factory.mktemp("ggufs") / "repository"
    (root / "big").mkdir(parents=True)
    for name in ("tiny-Q8_0.gguf", "tiny.q4_k_m.gguf", "tiny-Q4_K_S.gguf", "tiny-IQ8_0.gguf", "mmproj-Q8_0.gguf"):
        shutil.copy(teacher, root / name)
    for name in ("a-BF16.gguf", "b-BF16.gguf"):
        shutil.copy(teacher, root / "big" / name)
    return root


@pytest.fixture(scope="module")
def parts(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher in three parts, as llama-gguf-split writes them."""
    root = tmp_path_factory.mktemp("parts") / "repository"
    root.mkdir()
    reader = gguf.GGUFReader(teacher)
    writer = gguf.GGUFWriter(root / "tiny-F32.gguf", "llama", split_max_tensors=9)
    for field in reader.fields.values():
        if field.name != "general.architecture" and not field.name.startswith("GGUF."):
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert len(list(root.iterdir())) == 3
    return root


@pytest.fixture
def hub(weights: Path, ggufs: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    """A hub, and huggingface_hub set to it and to an empty cache, which it otherwise reads from the environment."""
    with serve() as stub:
        stub.repositories.update({WEIGHTS: weights, GGUFS: ggufs, SPLIT: parts})
        monkeypatch.setattr(constants, "ENDPOINT", stub.endpoint)
        template = stub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its attempts
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield stub


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    (tmp_path / "staging").mkdir()
    return tmp_path / "staging"


def quiet(line: str) -> None:
    """Nobody is told."""


def same_model(found: Path, expected: Path) -> None:
    """The same keys, but for those of a split, and the same tensors."""
    left, right = gguf.GGUFReader(found), gguf.GGUFReader(expected)
    keys = [{f.name: f.contents() for f in r.fields.values() if not f.name.startswith("GGUF.")} for r in (left, right)]
    assert keys[0] == keys[1]
    assert [t.name for t in left.tensors] == [t.name for t in right.tensors]
    assert all(np.array_equal(a.data, b.data) for a, b in zip(left.tensors, right.tensors, strict=True))


def refused(spec: str, staging: Path, kind: type[AdlocalError] = InputError, teacher: Path | None = None) -> str:
    """The message of a refusal, one line, which leaves nothing in staging."""
    with pytest.raises(kind) as caught:
        resolve(spec, teacher, staging, quiet)
    assert list(staging.iterdir()) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_local_gguf_is_taken_where_it_lies(teacher: Path, staging: Path) -> None:
    assert resolve(str(teacher), None, staging, quiet) == teacher


def test_a_local_directory_is_exported(weights: Path, teacher: Path, staging: Path) -> None:
    path = resolve(str(weights), teacher, staging, quiet)

    assert path == staging / "tiny.gguf"
    assert gguf.GGUFReader(path).fields["general.architecture"].contents() == "llama"


def test_safetensors_need_a_teacher(weights: Path, staging: Path) -> None:
    assert "give --teacher TEACHER.gguf" in refused(str(weights), staging)


@pytest.mark.parametrize("i", [1, 3])
def test_any_part_of_a_split_file_stands_for_all(i: int, parts: Path, teacher: Path, staging: Path) -> None:
    path = resolve(str(parts / f"tiny-F32-0000{i}-of-00003.gguf"), None, staging, quiet)

    assert path == staging / "tiny-F32.gguf"
    same_model(path, teacher)


def test_a_missing_part_is_named(parts: Path, staging: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(parts, tmp_path / "parts")
    (copied / "tiny-F32-00002-of-00003.gguf").unlink()

    message = refused(str(copied / "tiny-F32-00001-of-00003.gguf"), staging, ModelError)
    assert "its part tiny-F32-00002-of-00003.gguf is missing; download all 3" in message


def test_parts_of_another_file_are_refused(parts: Path, teacher: Path, staging: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(parts, tmp_path / "parts")
    shutil.copy(copied / "tiny-F32-00001-of-00003.gguf", copied / "tiny-F32-00003-of-00003.gguf")

    assert "tensors, expected 21" in refused(str(copied / "tiny-F32-00001-of-00003.gguf"), staging, ModelError)


def test_a_full_disk_leaves_no_half_merged_file(parts: Path, staging: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", full)
    message = refused(str(parts / "tiny-F32-00001-of-00003.gguf"), staging, ConversionError)
    assert message.endswith("tiny-F32.gguf: No space left on device; give another place")


@pytest.mark.parametrize("spec", ["nothing", "a/b/c", "./tiny", "lab/tiny.gguf", "lab/tiny:Q8_0:more"])
def test_what_is_neither_local_nor_a_hub_id_is_refused(spec: str, staging: Path) -> None:
    assert f"{spec}: no such file or directory, and no hub id; give a GGUF" in refused(spec, staging)


def test_a_local_path_wins_over_a_hub_id(
    hub: StubHub, teacher: Path, staging: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lab").mkdir()
    shutil.copy(teacher, tmp_path / GGUFS)
    monkeypatch.chdir(tmp_path)

    assert resolve(GGUFS, None, staging, quiet) == Path(GGUFS)
    assert hub.requests == []


def test_a_repository_of_safetensors_is_exported(hub: StubHub, teacher: Path, weights: Path, staging: Path) -> None:
    path = resolve(WEIGHTS, teacher, staging, quiet)

    (staging / "local").mkdir()
    assert path.read_bytes() == resolve(str(weights), teacher, staging / "local", quiet).read_bytes()
    fetched = {name.rpartition("/")[2] for method, name, _ in hub.requests if method == "GET" and "/resolve/" in name}
    assert fetched == {"config.json", "model.safetensors"}


def test_a_repository_of_safetensors_needs_a_teacher_before_it_is_downloaded(hub: StubHub, staging: Path) -> None:
    assert "give --teacher TEACHER.gguf" in refused(WEIGHTS, staging)
    assert not any("/resolve/" in name for _, name, _ in hub.requests)


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        ("", "tiny.q4_k_m.gguf"),
        (":tiny-Q4_K_S.gguf", "tiny-Q4_K_S.gguf"),
        (":Q8_0", "tiny-Q8_0.gguf"),
        (":q8_0", "tiny-Q8_0.gguf"),
        (":Q4_K_M", "tiny.q4_k_m.gguf"),
        (":big/b-BF16.gguf", "b-BF16.gguf"),
    ],
)
def test_one_file_of_a_repository(choice: str, name: str, hub: StubHub, teacher: Path, staging: Path) -> None:
    path = resolve(GGUFS + choice, None, staging, quiet)

    assert path.name == name
    assert path.read_bytes() == teacher.read_bytes()


def test_a_split_file_of_a_repository_is_merged(hub: StubHub, teacher: Path, staging: Path) -> None:
    same_model(resolve(SPLIT, None, staging, quiet), teacher)
    (staging / "tiny-F32.gguf").unlink()
    same_model(resolve(f"{SPLIT}:f32", None, staging, quiet), teacher)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            ":none.gguf",
            "no file for none.gguf; give lab/ggufs:FILE with one of big/a-BF16.gguf, big/b-BF16.gguf, tiny-I",
        ),
        (":Q2_K", "no file for Q2_K"),
        (":Q4_K", "no file for Q4_K;"),
        (":BF16", "2 files for BF16; give lab/ggufs:FILE with one of big/a-BF16.gguf, big/b-BF16.gguf"),
    ],
)
def test_a_choice_that_fits_no_file_or_several(choice: str, message: str, hub: StubHub, staging: Path) -> None:
    assert message in refused(GGUFS + choice, staging)


def test_a_repository_without_models(hub: StubHub, staging: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    hub.repositories["lab/empty"] = tmp_path / "empty"

    assert "neither safetensors nor GGUF" in refused("lab/empty", staging)


def test_a_repository_that_does_not_exist(hub: StubHub, staging: Path) -> None:
    assert "lab/nothing: no such local path or hub repository" in refused("lab/nothing", staging)


def test_a_name_that_the_hub_would_not_allow(hub: StubHub, staging: Path) -> None:
    assert "lab/a--b: no valid hub id; give owner/name" in refused("lab/a--b", staging)


@pytest.mark.parametrize("token", [None, "hf_other"])
@pytest.mark.parametrize("spec", [GGUFS, WEIGHTS])
def test_a_gated_repository(
    spec: str, token: str | None, hub: StubHub, teacher: Path, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated.add(spec)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)

    message = refused(spec, staging, teacher=teacher)
    assert (
        message == f"{spec} is gated; accept its licence at {hub.endpoint}/{spec} and set HF_TOKEN to a token of yours"
    )


def test_a_connection_that_is_lost_is_taken_up_again(
    hub: StubHub, teacher: Path, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # what arrived is kept in whole chunks of 10 MB
    hub.cuts["tiny-Q8_0.gguf"] = 2

    path = resolve(f"{GGUFS}:Q8_0", None, staging, quiet)

    assert path.read_bytes() == teacher.read_bytes()
    ranges = [wanted for method, name, wanted in hub.requests if method == "GET" and name.endswith("Q8_0.gguf")]
    assert ranges[0] is None
    assert len([wanted for wanted in ranges if wanted]) == 2


@pytest.mark.parametrize(("spec", "name"), [(f"{GGUFS}:Q8_0", "tiny-Q8_0.gguf"), (WEIGHTS, "model.safetensors")])
def test_a_connection_that_is_lost_for_good(spec: str, name: str, hub: StubHub, teacher: Path, staging: Path) -> None:
    hub.cuts[name], hub.dies_at_a_cut = 1, True

    message = refused(spec, staging, ConversionError, teacher)

    assert f"connection to {hub.endpoint} failed" in message
    assert "try again, a download continues where it stopped" in message
    hub.dead = False
    assert resolve(spec, teacher, staging, quiet).is_file()


def test_no_network_and_nothing_in_the_cache(hub: StubHub, staging: Path) -> None:
    hub.dead = True

    assert f"connection to {hub.endpoint} failed" in refused(GGUFS, staging, ConversionError)


def test_the_hub_is_down(hub: StubHub, staging: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.stub_hub._Handler._about", lambda self, *_: self._send(503, b""))

    assert f"the hub answers 503 for {GGUFS}; try again later" in refused(GGUFS, staging, ConversionError)


@pytest.mark.parametrize("spec", [f"{GGUFS}:Q8_0", WEIGHTS, SPLIT])
@pytest.mark.parametrize("how", ["offline", "dead"])
def test_the_cache_is_enough(
    how: str, spec: str, hub: StubHub, teacher: Path, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve(spec, teacher, staging, quiet).read_bytes()
    hub.requests.clear()
    hub.dead = how == "dead"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "offline")

    assert resolve(spec, teacher, staging, quiet).read_bytes() == first
    assert how == "dead" or hub.requests == []


def test_offline_and_not_in_the_cache(hub: StubHub, staging: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(f"{GGUFS}:Q8_0", None, staging, quiet)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    message = refused(SPLIT, staging, ConversionError)
    assert message == f"{SPLIT} is not in the cache, and HF_HUB_OFFLINE is set; unset it"
    assert "no file for Q4_K_S; give lab/ggufs:FILE with one of tiny-Q8_0.gguf" in refused(f"{GGUFS}:Q4_K_S", staging)


def test_a_full_disk_while_downloading(hub: StubHub, staging: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    message = refused(f"{GGUFS}:Q8_0", staging, ConversionError)
    assert (
        message
        == f"cannot store {GGUFS} in {constants.HF_HUB_CACHE}: No space left on device; free some space, or set HF_HOME"
    )


def test_the_environment_names_hub_cache_and_token(hub: StubHub, teacher: Path, tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads HF_ENDPOINT and HF_HOME when it is imported."""
    hub.gated.add(GGUFS)
    code = "import sys; from adlocal_convert.source.hub import Repository; Repository(sys.argv[1]).fetch([sys.argv[2]])"
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN}

    command = [sys.executable, "-c", code, GGUFS, "tiny-Q8_0.gguf"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert [path.read_bytes() for path in tmp_path.rglob("tiny-Q8_0.gguf")] == [teacher.read_bytes()]
