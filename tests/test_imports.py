"""Who may import whom, read from the syntax trees: the layering of the package as a test."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "unisparse_np"

FOUNDATION = {"errors", "config", "problem", "trace", "arrays"}
# Every part of the package and the parts it may import, lazily or not. A part is a folder or a file of unisparse_np.
MAY_IMPORT = {
    "version": set(),
    "errors": set(),
    "config": {"errors"},
    "config_file": {"config", "errors"},
    "problem": {"config", "errors"},
    "trace": {"problem", "config", "errors"},
    "arrays": {"errors"},
    "parallel": {"errors"},
    "reference": FOUNDATION,
    "gpu": FOUNDATION,
    "gpu.cupy_kernels": FOUNDATION,
    "gpu.numba_kernels": FOUNDATION,
    "attention": {"reference", "gpu", "parallel", *FOUNDATION},
    "comparison": {"attention", "reference", "gpu", "parallel", *FOUNDATION},
    "model": {"attention", "parallel", *FOUNDATION},
    "evaluation": {"model", "attention", "config_file", "version", *FOUNDATION},
    "inspection": {"model", "comparison", "attention", "reference", *FOUNDATION},
    "__init__": {"attention", "comparison", "model", "parallel", "version", *FOUNDATION},
    "cli": {"evaluation", "inspection", "config_file", "model", "comparison", "attention", "parallel", "version", *FOUNDATION},
    "__main__": {"cli"},
}
ONLY_IMPORTED_IN = {"cupy": "gpu.cupy_kernels", "numba": "gpu.numba_kernels"}


def part_of(module: str) -> str:
    """`gpu.cupy_kernels.compress` -> `gpu.cupy_kernels`; `model.llama` -> `model`."""
    return max((part for part in MAY_IMPORT if module == part or module.startswith(part + ".")), key=len, default=module)


def imports_of(source: str, module: str, is_package: bool) -> list[str]:
    """Every module that a source text imports, absolute; `from x import y` gives x.y, as y may be a module."""
    here = [PACKAGE.name, *(module.split(".") if module != "__init__" else [])]
    folder = here if is_package else here[:-1]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            found += [f"{prefix}.{alias.name}" for alias in node.names]
    return found


def imports_in(path: Path) -> list[str]:
    return imports_of(path.read_text(encoding="utf-8"), name_of(path), path.name == "__init__.py")


def all_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """`model/llama.py` -> `model.llama`; `model/__init__.py` -> `model`; the package's own __init__ keeps its name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


@pytest.mark.parametrize("path", all_files(), ids=name_of)
def test_a_module_imports_only_what_lies_below_it(path: Path) -> None:
    part = part_of(name_of(path))
    assert part in MAY_IMPORT, f"{path.name} is a new part of the package: give it a line in MAY_IMPORT"
    for module in imports_in(path):
        if module.split(".")[0] != PACKAGE.name:
            continue
        imported = part_of(module.removeprefix(PACKAGE.name + "."))
        assert imported == part or imported in MAY_IMPORT[part], f"{name_of(path)} imports {module}: {part} may not import {imported}"


@pytest.mark.parametrize("path", all_files(), ids=name_of)
def test_gpu_libraries_are_imported_only_by_their_backend(path: Path) -> None:
    for module in imports_in(path):
        home = ONLY_IMPORTED_IN.get(module.split(".")[0])
        assert home is None or part_of(name_of(path)) == home, f"{name_of(path)} imports {module}, which only {home} may"


def test_relative_imports_are_resolved() -> None:
    source = "from ..model import llama\nimport cupy\nfrom unisparse_np.cli import main\nfrom . import scores\nfrom .select import keep\n"
    expected = [
        "unisparse_np.model.llama",
        "cupy",
        "unisparse_np.cli.main",
        "unisparse_np.reference.scores",
        "unisparse_np.reference.select.keep",
    ]
    assert imports_of(source, "reference.compress", is_package=False) == expected
    assert imports_of(source, "reference", is_package=True) == expected
    assert [part_of(module.removeprefix("unisparse_np.")) for module in expected] == ["model", "cupy", "cli", "reference", "reference"]


def modules_after(statement: str) -> set[str]:
    """The modules that are loaded in a fresh interpreter after one statement."""
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent).stdout.split())


def test_importing_the_package_is_cheap() -> None:
    loaded = modules_after("import unisparse_np")
    for heavy in ("cupy", "numba", "tokenizers", "jinja2", "gguf", "matplotlib", "click", "torch"):
        assert heavy not in loaded, f"`import unisparse_np` loads {heavy}"


def test_help_loads_no_model_code() -> None:
    loaded = modules_after("import unisparse_np.cli.generate, unisparse_np.cli.eval, unisparse_np.cli.tune, unisparse_np.cli.env")
    for heavy in ("cupy", "numba", "tokenizers", "jinja2", "unisparse_np.model.llama"):
        assert heavy not in loaded, f"the command line loads {heavy} before it is needed"


def test_the_package_imports_no_deep_learning_framework() -> None:
    for path in all_files():
        for module in imports_in(path):
            assert module.split(".")[0] not in {"torch", "transformers", "triton", "jax", "tensorflow"}, f"{name_of(path)} imports {module}"
