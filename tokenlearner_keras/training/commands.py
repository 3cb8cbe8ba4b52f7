"""The command `train`."""

from collections.abc import Sequence
from pathlib import Path

from tokenlearner_keras.training.runs import RUNS, RunConfig, run_training, write_text


def make_train_parser():
    """Returns the parser of `train`: one option for each field of `RunConfig`."""
    try:
        import jsonargparse
    except ImportError as error:
        raise ValueError(
            "The command `train` needs jsonargparse: pip install "
            "'tokenlearner-keras[cli]'"
        ) from error

    parser = jsonargparse.ArgumentParser(
        prog="tokenlearner-keras train",
        description=(
            "Trains as a named recipe says, with what is changed on the command line. "
            "Run the same command again to go on where it was killed. The "
            "configuration is kept in OUTPUT/config.yaml: --config repeats the run."
        ),
    )
    parser.add_argument(
        "--config", action="config", help="a config.yaml to repeat or to begin with"
    )
    parser.add_class_arguments(RunConfig, nested_key=None)
    return parser


def parse_train(arguments: Sequence[str]) -> RunConfig:
    """The configuration of a command line.

    Args:
        arguments: `[RECIPE] [--option value ...]`.

    Returns:
        The settings of the recipe, of `--config` and of the options, in this order.
    """
    arguments = list(arguments)
    parser = make_train_parser()
    if arguments and not arguments[0].startswith("-"):
        recipe = arguments.pop(0)
        if recipe not in RUNS:
            parser.error(f"unknown recipe {recipe!r}; there are {', '.join(RUNS)}")
        parser.set_defaults({"recipe": recipe, **RUNS[recipe]})
    elif "--config" not in " ".join(arguments) and "--help" not in arguments:
        parser.error(f"a recipe is missing; there are {', '.join(RUNS)}")
    parsed = parser.parse_args(arguments)
    values = {name: parsed[name] for name in RunConfig.__dataclass_fields__}
    return RunConfig(**values)


def run_train(arguments: Sequence[str]) -> int:
    """Runs the command `train`.

    Args:
        arguments: The command line after `train`.

    Returns:
        The exit status.
    """
    import yaml

    config = parse_train(arguments)
    text = yaml.safe_dump(vars(config), sort_keys=False)
    print(text, flush=True)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "config.yaml", text)
    run_training(config)
    return 0
