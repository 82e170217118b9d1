"""The verbs: found quickly, helped well, ended with the right code."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lightning_memsave.cli.main import VERBS, main


def test_the_overview_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {verb} " in out for verb in VERBS)


def test_no_verb_shows_the_overview_and_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: memsave VERB" in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_an_example_and_json(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"memsave {verb}" in out
    assert "xample" in out
    assert "--json" in out


def test_an_unknown_verb_names_the_nearest_and_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["docter"]) == 2
    assert "Did you mean 'doctor'?" in capsys.readouterr().err


def test_an_unknown_option_is_bad_input() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--jsn"])
    assert stop.value.code == 2


def test_our_errors_are_one_message_and_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "no_such_script.py"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("memsave run: there is no script 'no_such_script.py'")
    assert "Traceback" not in err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("memsave 0.")


def test_help_is_instant_as_it_imports_nothing_but_the_standard_library() -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "from lightning_memsave.cli.main import main; main(['--help'])\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert new - set(sys.stdlib_module_names) == {'lightning_memsave'}, new\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_python_dash_m_is_the_same_program() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "lightning_memsave", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert out.startswith("usage: memsave VERB")
