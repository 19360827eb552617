"""Run a simulation written in C once per temperature: the Ising model on a square lattice.

Needs a C compiler, nothing else::

    hpcresume submit hpcresume.examples.sweep --array 4 --collect sweep.jsonl -P points=200
    hpcresume collect RUN -o sweep.jsonl --files lattices

Each worker compiles the program once.  Each source is one temperature, with a seed that is
the same on every attempt; its program runs in a directory of its own on the node's disk, and
leaves its last lattice as a picture that belongs to the source.  A time limit shorter than
the sweep is no matter: no temperature is started that would not end, and the next attempt
goes on after the last one that did.

Measured on 2 cores: 200 temperatures in 69 s.
"""

from __future__ import annotations

import subprocess
from typing import Any

import hpcresume as hr

PROGRAM = r"""
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
static unsigned long long state;
static double uniform(void) {
    state ^= state << 13; state ^= state >> 7; state ^= state << 17;
    return (state >> 11) * (1.0 / 9007199254740992.0);
}
int main(int argc, char **argv) {
    if (argc != 6) return 2;
    int n = atoi(argv[1]), sweeps = atoi(argv[2]);
    double t = atof(argv[3]), sum = 0;
    state = strtoull(argv[4], 0, 10) | 1;
    signed char *spin = malloc((size_t)n * n);
    for (int i = 0; i < n * n; i++) spin[i] = 1;
    for (int s = 0; s < sweeps; s++) {
        long m = 0;
        for (int k = 0; k < n * n; k++) {
            int i = (int)(uniform() * n), j = (int)(uniform() * n);
            int around = spin[(i + 1) % n * n + j] + spin[(i + n - 1) % n * n + j]
                       + spin[i * n + (j + 1) % n] + spin[i * n + (j + n - 1) % n];
            int cost = 2 * spin[i * n + j] * around;
            if (cost <= 0 || uniform() < exp(-cost / t)) spin[i * n + j] *= -1;
        }
        for (int k = 0; k < n * n; k++) m += spin[k];
        if (s >= sweeps / 2) sum += fabs((double)m) / n / n;
    }
    FILE *picture = fopen(argv[5], "wb");
    if (!picture) return 3;
    fprintf(picture, "P5\n%d %d\n255\n", n, n);
    for (int k = 0; k < n * n; k++) fputc(spin[k] > 0 ? 255 : 0, picture);
    if (fclose(picture)) return 3;
    printf("%.6f\n", sum / (sweeps - sweeps / 2));
    return 0;
}
"""


class Ising(hr.Stage):
    """The program, compiled once per worker."""

    def __init__(self, size: int, sweeps: int) -> None:
        self.size, self.sweeps = size, sweeps

    def setup(self, worker: hr.Worker) -> None:
        """Compile it into the worker's own directory."""
        source = worker.scratch / "ising.c"
        source.write_text(PROGRAM)
        self.program = worker.scratch / "ising"
        command = ["cc", "-O2", "-o", str(self.program), str(source), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True)

    def process(self, temperature: float, ctx: hr.Context) -> dict[str, Any]:
        """Simulate one temperature; the row is its mean magnetisation."""
        numbers = map(str, [self.size, self.sweeps, temperature, ctx.seed])
        answer = ctx.run([self.program, *numbers, ctx.output("lattice.pgm")], cwd=ctx.scratch)
        return {"temperature": temperature, "magnetisation": float(answer.stdout)}


def pipeline(points: int = 200, size: int = 64, sweeps: int = 5000) -> hr.Pipeline:
    """Return the sweep over ``points`` temperatures from 1.5 to 3.5, around the transition."""

    def temperature(i: int) -> float:
        return round(1.5 + 2.0 * i / max(1, points - 1), 6)

    return hr.Pipeline(
        name="sweep", sources=hr.indexed(points, temperature), stages=[Ising(size, sweeps)]
    )
