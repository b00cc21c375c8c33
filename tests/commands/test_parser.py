"""The parser of `adlocal`: what it lets choose, and that the converter knows each choice."""

from __future__ import annotations

import argparse
import inspect

import pytest

from adlocal.bundle import ADAPTER, HALVES
from adlocal.bundle.choices import PARAMS, QUALITIES
from adlocal.commands.parser import make_parser
from adlocal.errors import InputError
from adlocal_convert.bundle import presets
from adlocal_convert.options import Options, checked


def parsed(*argv: str) -> argparse.Namespace:
    return make_parser().parse_args(["convert", "proxy.gguf", "--traces", "t.jsonl", "--out", "nowhere", *argv])


def options(args: argparse.Namespace) -> Options:
    return Options(args.proxy, {}, args.out, format=args.format, quality=args.quality, params=args.params)


@pytest.mark.parametrize("quality", QUALITIES)
def test_every_quality_has_a_preset(quality: str) -> None:
    assert isinstance(presets.QUALITIES[parsed("--quality", quality).quality], presets.Preset)


def test_every_preset_can_be_chosen() -> None:
    assert tuple(presets.QUALITIES) == QUALITIES


@pytest.mark.parametrize("format", [HALVES, ADAPTER])
@pytest.mark.parametrize("params", [None, *PARAMS])
def test_the_converter_takes_every_format_and_selection(format: str, params: str | None) -> None:
    """But selections that an adapter cannot carry, which it refuses in words of its own."""
    args = parsed("--format", format, *([] if params is None else ["--params", params]))
    if format == ADAPTER and params not in (None, "linear"):
        with pytest.raises(InputError, match="an adapter carries"):
            checked(options(args))
    else:
        assert checked(options(args)).params in PARAMS


def test_the_defaults_are_the_converters() -> None:
    args, defaults = parsed(), inspect.signature(Options).parameters
    assert (args.format, args.quality, args.batch_size) == tuple(
        defaults[name].default for name in ("format", "quality", "batch_size")
    )


@pytest.mark.parametrize("option", ["--format", "--quality", "--params"])
def test_anything_else_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(option, "best")
    assert "invalid choice: 'best'" in capsys.readouterr().err
