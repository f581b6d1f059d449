"""Install each wheel in a fresh virtual environment and use it from outside the checkout.

    python .ci/check_wheels.py dist/structmat-0.1.0-py3-none-any.whl ...

The fresh environment sees the dependencies of the running one through a `.pth` file, so nothing is
downloaded. Python does not follow the `.pth` files that it finds in such a folder, so the editable install
there stays out of sight and cannot stand in for a file that the wheel lacks.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"structmat": ROOT / "structmat", "structmat_kernels": ROOT / "kernels" / "structmat_kernels"}

USE = """
import sys
from importlib.metadata import version
from pathlib import Path

import structmat, structmat_kernels

for package in (structmat, structmat_kernels):
    assert Path(package.__file__).is_relative_to(sys.prefix), package.__file__
assert version("structmat") == structmat.__version__, (version("structmat"), structmat.__version__)
"""


def expected_files() -> set[str]:
    """Names, inside a wheel, of every source file of the checkout."""
    names = set()
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("."):
                names.add(f"{package}/{path.relative_to(folder).as_posix()}")
    return names


def check_contents(wheel: Path) -> None:
    """Fail unless the wheel holds exactly the two packages, with their kernels and the typing marker."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    expected = expected_files()
    assert names == expected, f"missing {sorted(expected - names)}, unexpected {sorted(names - expected)}"
    assert "structmat/py.typed" in names, "structmat/py.typed is not there"
    assert any(name.startswith("structmat_kernels/") and name.endswith("/reference.py") for name in names), (
        "no structmat_kernels/<op>/reference.py is there"
    )


def check_use(wheel: Path) -> None:
    """Fail unless the wheel installs, imports from its own folder and has a working `structmat` command."""
    with tempfile.TemporaryDirectory(prefix="structmat-wheel-") as folder:
        fresh = Path(folder) / "venv"
        venv.create(fresh, with_pip=False)
        scripts = fresh / ("Scripts" if sys.platform == "win32" else "bin")
        install = ["-m", "pip", "--quiet", "--disable-pip-version-check", "--python", str(scripts / "python")]
        run([sys.executable, *install, "install", "--no-deps", "--no-index", str(wheel)], folder)
        own = sysconfig.get_paths(vars={"base": str(fresh), "platbase": str(fresh)})["purelib"]
        (Path(own) / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        run([str(scripts / "python"), "-c", USE], folder)
        run([str(scripts / "structmat"), "--help"], folder, quiet=True)


def run(command: list[str], folder: str, quiet: bool = False) -> None:
    """Run a command in `folder`, and stop here with its output if it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=quiet, text=True)
    if done.returncode:
        raise SystemExit(f"{command} failed with {done.returncode}\n{done.stdout or ''}{done.stderr or ''}")


def main() -> None:
    """Check the wheels named on the command line."""
    wheels = [Path(name).resolve() for name in sys.argv[1:]]
    if not wheels:
        raise SystemExit("no wheel was named")
    for wheel in wheels:
        check_contents(wheel)
        check_use(wheel)
        print(f"{wheel.relative_to(ROOT)}: complete, installs and imports")


if __name__ == "__main__":
    main()
