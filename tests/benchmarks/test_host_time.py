"""host_time.py reports the difference of two checkouts over a wide step, and refuses a folder that is no checkout."""

import subprocess
import sys

from paths import ROOT

SCRIPT = ROOT / "benchmarks" / "steps" / "host_time.py"


def test_the_difference_is_of_medians_over_the_wide_step():
    """Medians of 30 and 33 ms differ by 3 ms, which is 1 % of 300 ms; the outliers of a busy machine do not count."""
    runs = {"other": (0.030, 0.029, 9.0), "this": (0.033, 0.034, 0.0)}
    row = {name: [{"wall": wall, "cpu": wall / 2} for wall in walls] for name, walls in runs.items()}
    program = f"import host_time; print(host_time.line_of({dict(row, mode='zerolite2', wide_seconds=0.3)!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=SCRIPT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['zerolite2', '30.00 / 33.00', '15.00 / 16.50', '300', '+1.00 %']"


def test_a_folder_without_zerolite_is_refused(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--against", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and "holds no zerolite" in done.stderr
