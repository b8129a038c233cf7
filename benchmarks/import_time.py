"""What `import hullgeo` costs above `import jax`.

    python -m benchmarks.import_time

Fresh processes, medians. On two busy cores of a cloud machine: about 60 ms above 1.2 s of jax.
"""

import argparse
import statistics
import subprocess
import sys

CHILD = """
import time
start = time.perf_counter()
import jax, jax.numpy
middle = time.perf_counter()
import hullgeo
end = time.perf_counter()
print(middle - start, end - middle)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=11)
    runs = parser.parse_args().runs
    pairs = []
    for _ in range(runs):
        done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, check=True)
        pairs.append([float(number) for number in done.stdout.split()])
    jax_time, hullgeo_time = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"import jax {jax_time:.0f} ms, import hullgeo after it {hullgeo_time:.0f} ms")
    print(f"(medians of {runs} processes)")


if __name__ == "__main__":
    main()
