"""Strength and guard: one value, from the caller, the calibration or the defaults, and no copy that drifts."""

from __future__ import annotations

import pickle
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adlocal import AntidistillationLlama, Bundle, InputError
from adlocal.settings import DEFAULT_GUARD, DEFAULT_STRENGTH, Settings, resolve


def test_settings_are_checked_wherever_they_are_made() -> None:
    for strength, guard in ((-1.0, 0.1), (float("nan"), 0.1), (float("inf"), 0.1), (True, 2.0), (1.0, -0.1)):
        with pytest.raises(InputError, match="give"):
            Settings(strength, guard)
    with pytest.raises(InputError, match="strength='strong'"):
        Settings().but("strong")  # type: ignore[arg-type]


def test_what_is_not_given_stays() -> None:
    settings = Settings(2.0, 0.1)
    assert settings.but() == settings
    assert settings.but(strength=3) == Settings(3.0, 0.1)
    assert settings.but(guard=0) == Settings(2.0, 0.0)
    assert [Settings(strength, 0.1).protects for strength in (0.0, 1e-6)] == [False, True]


def test_defaults_and_arguments(tiny_bundle: Path, tiny_llama: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert resolve(bundle, tiny_llama, None, None) == Settings(DEFAULT_STRENGTH, DEFAULT_GUARD)
    assert resolve(bundle, tiny_llama, 3, None) == Settings(3.0, DEFAULT_GUARD)
    assert resolve(bundle, tiny_llama, None, 0.2) == Settings(DEFAULT_STRENGTH, 0.2)
    with pytest.raises(InputError, match=f"bundle {tiny_bundle} has no calibration; run `adlocal calibrate"):
        resolve(bundle, tiny_llama, "calibrated", 0.2)


def test_a_pickle_keeps_what_is_in_force(tiny_llama: Path, tiny_bundle: Path) -> None:
    """Not what the model was opened with: protection would silently fall."""
    options: dict[str, Any] = {"n_ctx": 64, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    with closing(AntidistillationLlama(str(tiny_llama), bundle=tiny_bundle, strength=1, **options)) as llm:
        llm.strength, llm.guard = 5, 0.2
        stored = pickle.dumps(llm)
    with closing(pickle.loads(stored)) as again:
        assert (again.strength, again.guard) == (5.0, 0.2)
        assert again.pair.bundle == Bundle.open(tiny_bundle)


def test_a_bundle_knows_where_it_lies(tiny_bundle: Path, adapter_bundle: Path) -> None:
    for directory, names in (
        (tiny_bundle, ("proxy-plus.gguf", "proxy-minus.gguf")),
        (adapter_bundle, ("proxy-base.gguf", "proxy-adapter.gguf")),
    ):
        bundle = Bundle.open(str(directory))
        assert bundle.directory == directory
        assert bundle.files == tuple(directory / name for name in names)
        assert bundle.proxy == bundle.files[0]


def test_a_model_opens_its_bundle_once(tiny_llama: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    original = Bundle.open.__func__  # type: ignore[attr-defined]

    def counted(cls: type[Bundle], directory: object) -> Any:
        opened.append(directory)
        return original(cls, directory)

    monkeypatch.setattr(Bundle, "open", classmethod(counted))
    AntidistillationLlama(str(tiny_llama), bundle=tiny_bundle, n_ctx=64, n_threads=1, verbose=False).close()
    assert opened == [tiny_bundle]
