"""Rules about the structure that are easier to check than to remember. Directions of imports: see pyproject.toml."""

import ast
from pathlib import Path

import lmu_hf

ROOT = Path(lmu_hf.__file__).parent


def test_model_files_import_flat():
    """transformers copies the files beside a checkpoint, flat: only ``from .x import y`` survives that."""
    for path in (path for path in (ROOT / "model").glob("*.py") if path.name != "__init__.py"):  # which does not travel
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, f"{path.name}: import from outside the folder"
                assert node.module, f"{path.name}: write 'from .x import y'"
                assert "." not in node.module, f"{path.name}: nested import"
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("lmu_hf") for alias in node.names), f"{path.name}: absolute import"
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert not node.module.startswith("lmu_hf"), f"{path.name}: absolute import"


def test_files_stay_small():
    long = {str(p.relative_to(ROOT)): n for p in ROOT.rglob("*.py") if (n := len(p.read_text().splitlines())) > 450}
    assert not long, f"a file of this size is usually two ideas: {long}"


def test_every_public_name_is_there_and_documented():
    for name in lmu_hf.__all__:
        assert getattr(lmu_hf, name).__doc__, name
        assert name in dir(lmu_hf)
