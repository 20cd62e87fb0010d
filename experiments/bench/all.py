"""Every benchmark, one after the other: python experiments/bench/all.py --quick"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    scripts = [path for path in sorted(HERE.glob("*.py")) if path.stem not in ("all", "common", "ratios")]
    return max(subprocess.run([sys.executable, str(path), *sys.argv[1:]], check=False).returncode for path in scripts)


if __name__ == "__main__":
    sys.exit(main())
