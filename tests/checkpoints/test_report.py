from tokenlearner_keras.checkpoints import CheckpointReport


def test_text():
    report = CheckpointReport({"a": "b"}, ("head/kernel",), ("x/y", "z"))
    assert str(report).splitlines() == [
        "1 weights matched, 1 of the checkpoint unused, 2 of the model unset.",
        "  unused: head/kernel",
        "  unset: x/y",
        "  unset: z",
    ]
