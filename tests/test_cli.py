import pytest

from tokenlearner_keras.cli import main, make_parser


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    assert error.value.code == 0
    assert "tables" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["tables", "--table", "2"], "invalid choice: 2"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.tensorflow
def test_tables(capsys):
    assert main(["tables", "--table", "4"]) == 0
    out = capsys.readouterr().out
    assert "Table 4" in out
    assert "Table 1" not in out
    assert "8 of 8 figures agree to the printed digit." in out


def test_every_command_runs_a_function():
    parser = make_parser()
    commands = next(a for a in parser._actions if a.dest == "command")
    # `train` has a parser of its own, behind the fields of its configuration.
    assert set(commands.choices) > {"tables", "train"}
    for name, command in commands.choices.items():
        assert name == "train" or callable(command.get_default("run"))
