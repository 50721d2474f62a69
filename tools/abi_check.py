"""One wheel on several versions of torch: `python tools/abi_check.py dist/*.whl --torch 2.10.0 2.13.0`.

For each version an environment is made (of the Python that runs this), that torch and the wheel are installed, and
every op runs on small inputs against its reference. Takes what the index's torch takes, gigabytes where it is one with
CUDA. Exits with 1 if a version fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCH = ["2.10.0", "2.11.0", "2.13.0"]
TOOLS = ["numpy", "pytest", "hypothesis"]


def passes(wheel: Path, torch: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:  # not the checkout: what is imported is the wheel's
        subprocess.run([sys.executable, "-m", "venv", f"{folder}/env"], check=True)
        python = f"{folder}/env/bin/python"
        install = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
        subprocess.run([*install, f"torch=={torch}", *TOOLS], check=True)
        subprocess.run([*install, "--no-deps", str(wheel)], check=True)
        check = "import mfac_kernels as mk; print({k: mk.build_info()[k] for k in ('torch', 'torch_built')})"
        tests = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), str(ROOT / "tests/ops/test_samples.py")]
        commands = [[python, "-c", check], [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]]
        return all(subprocess.run(command, cwd=folder, check=False).returncode == 0 for command in commands)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=lambda text: Path(text).resolve())
    parser.add_argument("--torch", nargs="+", default=TORCH, help="versions (default: %(default)s)")
    options = parser.parse_args()
    failed = [torch for torch in options.torch if not passes(options.wheel, torch)]
    print(f"{options.wheel.name}: " + (f"failed on torch {failed}" if failed else f"runs on torch {options.torch}"))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
