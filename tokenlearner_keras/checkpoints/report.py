import dataclasses


@dataclasses.dataclass(frozen=True)
class CheckpointReport:
    """What became of the weights of a checkpoint and of a model.

    Args:
        matched: Dictionary from the name in the checkpoint to the path of the model's
            variable.
        unused: Names in the checkpoint that the model has no place for.
        unset: Paths of the model's variables that the checkpoint says nothing about;
            they are as they were.
    """

    matched: dict[str, str]
    unused: tuple[str, ...]
    unset: tuple[str, ...]

    def __str__(self):
        lines = [
            f"{len(self.matched)} weights matched, {len(self.unused)} of the "
            f"checkpoint unused, {len(self.unset)} of the model unset."
        ]
        lines += [f"  unused: {name}" for name in self.unused]
        lines += [f"  unset: {path}" for path in self.unset]
        return "\n".join(lines)
