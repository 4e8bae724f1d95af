"""How the parts may know each other: no circle of modules, layers of packages, one name a file.

Imports inside functions count: what a function imports, its module depends on.
"""

import ast
import subprocess
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {"fp8repro": ROOT / "fp8repro", "fp8repro.kernels": ROOT / "kernels"}
# From the command line down. A package imports from lower layers only; packages of one layer do not know each other.
LAYERS = (
    {"cli"},
    {"reproduce", "bench"},
    {"training", "results"},
    {"paper"},
    {"precision", "data"},
    {"kernels"},
    {"engines", "models"},
    {"settings"},
    {"numerics"},
    {"cache", "fields"},
    {"errors", "tabular"},
)
# The engines choose Triton's kernels where there is a GPU, inside of functions; the kernels share the engines' guards
# and the protocol of a product.
MUTUAL = {("engines", "kernels")}


def modules() -> dict[str, Path]:
    """Every module of the installed package and its file; what the package itself offers is on top of all."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    del found["fp8repro"]
    return found


def imported(path: Path, known: set[str]) -> set[str]:
    """The modules of ours that a file imports anywhere; a name taken from a package may be a module of it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner & known or {str(node.module)}
    return names & known


MODULES = modules()
IMPORTS = {name: imported(path, set(MODULES)) for name, path in MODULES.items()}


def package(module: str) -> str:
    return module.split(".")[1]


def test_no_module_imports_itself_through_others() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        raise AssertionError(f"circle: {' <- '.join(error.args[1])}") from None


def test_packages_import_from_lower_layers_only() -> None:
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    arrows = {(package(a), package(b)) for a, found in IMPORTS.items() for b in found if package(a) != package(b)}
    wrong = {(a, b) for a, b in arrows if level[a] >= level[b]} - MUTUAL
    assert sorted(wrong) == []


def test_what_is_still_allowed_is_still_there() -> None:
    arrows = {(package(a), package(b)) for a, found in IMPORTS.items() for b in found}
    assert sorted(MUTUAL - arrows) == []


def test_a_file_name_says_which_file() -> None:
    repeated = {"__init__.py", "__main__.py", "launch.py", "device.py", "device_tma.py"}
    names = Counter(path.name for path in MODULES.values() if path.name not in repeated)
    assert [name for name, count in names.items() if count > 1] == []


def test_a_training_loop_of_ones_own_waits_for_torch_alone() -> None:
    heavy = ("torchvision", "torch._dynamo", "hydra", "triton", "matplotlib", "sklearn")
    program = f"import sys; from fp8repro import inject, MasterWeights; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
