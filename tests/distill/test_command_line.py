"""The command line dispatches, and a user's own method goes through all of it."""

import pytest

from adderops.distill import main
from adderops.distill.runs import COMMANDS


def test_the_command_line_dispatches(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: python -m adderops.distill {command} ")
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)
