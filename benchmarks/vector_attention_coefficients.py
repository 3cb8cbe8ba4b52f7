"""Recomputes `tokenlearner_keras/ops/_coefficients.py`.

For each number of terms P and reach Z, the polynomial sum_p c_p w^p / p! (p < P) that
minimises the largest |polynomial(w) - e^w| e^-|w| on [-Z, Z]. The even and the odd part
are fitted apart by Lawson's reweighted least squares in the basis of Poisson
probabilities w^p / p! e^-w. Of the solutions that are exact enough, the one with the
smallest coefficients is kept: large ones would cancel in float32.

    python benchmarks/vector_attention_coefficients.py
"""

from pathlib import Path

import numpy as np
from scipy.stats import poisson

# Below the spacing of float32 at one, 2 ** -23 = 1.19e-7; and for bfloat16 below its
# spacing, 2 ** -8, divided by the largest cancellation that is let through, 16.
TABLES = {
    "COEFFICIENTS": (((35, 21.0), (40, 26.0), (64, 45.0)), 1.1e-7),
    "BFLOAT16_COEFFICIENTS": (((30, 26.0),), 2.0**-12),
}


def fit(num_terms, reach, cutoff, iterations=60):
    """Returns the coefficients and their largest weighted error, for one cutoff."""
    w = reach * np.sin(np.linspace(0, np.pi / 2, 12 * num_terms))
    coefficients, error = np.ones(num_terms), 0.0
    for parity in (0, 1):
        kept = np.arange(parity, num_terms, 2)
        first_left_out = num_terms + (num_terms - parity) % 2
        left_out = np.arange(first_left_out, num_terms + 200, 2)
        basis = poisson.pmf(kept, w[:, None])
        tail = poisson.pmf(left_out, w[:, None]).sum(1)
        weights, best = np.full(w.size, 1 / w.size), (np.inf, None)
        for _ in range(iterations):
            root = np.sqrt(weights)
            solution = np.linalg.lstsq(
                basis * root[:, None], tail * root, rcond=cutoff
            )[0]
            residual = np.abs(basis @ solution - tail)
            if residual.max() < best[0]:
                best = residual.max(), solution
            weights *= residual + 1e-3 * residual.max()
            weights /= weights.sum()
        coefficients[parity::2] += best[1]
        error += best[0]
    return coefficients, error


def main():
    lines = [
        '"""Near-minimax polynomials of the exponential: (terms, reach, coefficients).',
        "",
        "Written by benchmarks/vector_attention_coefficients.py; what they are is said",
        "there.",
        '"""',
    ]
    for name, (sizes, tolerance) in TABLES.items():
        lines += ["", f"{name} = ("]
        for num_terms, reach in sizes:
            lines += [f"    ({num_terms}, {reach}, ("]
            lines += [f"        {c:.15g}," for c in find(num_terms, reach, tolerance)]
            lines += ["    )),"]
        lines += [")"]
    root = Path(__file__).parent.parent
    path = root / "tokenlearner_keras" / "ops" / "_coefficients.py"
    path.write_text("\n".join([*lines, ""]))


def find(num_terms, reach, tolerance):
    """Returns the smallest coefficients that are exact enough."""
    for cutoff in 10.0 ** np.arange(-4, -12, -0.5):
        coefficients, error = fit(num_terms, reach, cutoff)
        if error <= tolerance:
            break
    else:
        raise SystemExit(f"no fit for {num_terms} terms and reach {reach}")
    w = np.linspace(0, reach, 4001)[:, None]
    growth = poisson.pmf(np.arange(num_terms), w) @ np.abs(coefficients)
    print(
        f"{num_terms} terms, reach {reach}: error {error:.2e}, growth "
        f"{growth.max():.3f}, cutoff {cutoff:.0e}",
        flush=True,
    )
    return coefficients


if __name__ == "__main__":
    main()
