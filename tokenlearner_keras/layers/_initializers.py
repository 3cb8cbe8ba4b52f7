def clone_initializer(initializer):
    """Returns a fresh copy of a Keras initializer; other callables as they are.

    A seeded initializer object that is used twice would give the same values twice.
    """
    return initializer.clone() if hasattr(initializer, "clone") else initializer
