"""The order of the house: a room imports from its own layer and from those below, and no file imports in a circle."""
import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / 'timm_kd'
LAYERS = [
    {'errors', 'version', 'files', 'process'},
    {'losses', 'teacher', 'replay'},
    {'teacher_cache'},
    {'data', 'task', 'meters', 'engine'},
    {'cli', 'run', 'hub', 'report'},
    {'setup', 'loop'},
    {'train', 'fill', 'demo'},
]
LEVELS = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def imports() -> dict[str, set[str]]:
    """Return the modules of the package that each one imports, for type checking and inside functions too."""
    files = {path: path.relative_to(PACKAGE.parent).with_suffix('').parts for path in PACKAGE.rglob('*.py')}
    modules = {path: '.'.join(parts).removesuffix('.__init__') for path, parts in files.items()}
    found = {name: set() for name in modules.values()}
    for path, name in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                above = '.'.join(files[path][:-node.level])
                source = f'{above}.{node.module}' if node.module else above
                full = (f'{source}.{alias.name}' for alias in node.names)
                found[name].update(target if target in found else source for target in full)
    return found


def test_no_file_imports_in_a_circle():
    list(TopologicalSorter(imports()).static_order())


def test_rooms_import_from_their_layer_and_those_below():
    # The package itself only gives names away; a `__main__` is a command line and stands on top.
    commands = {name for name in imports() if name == 'timm_kd' or name.endswith('__main__')}
    for name, targets in imports().items():
        for target in targets - commands if name not in commands else ():
            room, below = name.split('.')[1], target.split('.')[1]
            assert LEVELS[below] <= LEVELS[room], f'{name} imports {target}'
