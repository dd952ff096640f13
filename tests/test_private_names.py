"""Private names of libraries: all that the source uses, each with its library and its reason.

A library may rename them in any release: this test then says which, and its bound in pyproject.toml
keeps that release away until it passes.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "memfree"
LIGHTNING, DIFFUSERS = "lightning<2.8", "diffusers<0.44"
USED = {
    "_actions": "argparse (standard library): options of a parser, for messages",
    "_average_model": f"{LIGHTNING}: the averaged weights of its EMA callback",
    "_checkpoint_connector": f"{LIGHTNING}: the checkpoint that a training resumes from",
    "_loaded_checkpoint": f"{LIGHTNING}: as above",
    "_diffusers_hook": f"{DIFFUSERS}: hooks of a module, among them caches that guidance spoils",
    "_is_stateful": f"{DIFFUSERS}: whether such a hook is a cache",
    "_execution_device": f"{DIFFUSERS}: where an offloaded pipeline computes",
    "_hf_hook": "accelerate: offloading hooks, which a copy of a decoder leaves out",
    "_hf_": "accelerate: prefix of the weights that it keeps",
    "_old_forward": "accelerate: a module's forward below its hooks",
    "_orig_mod": "torch: the module below torch.compile",
    "_make_submission_file_text": "submitit<1.6: the script of a job",
    "_submitit_command_str": "submitit<1.6: as above",
}
NOT_OF_LIBRARIES = {
    "_exit": "os._exit is documented",
    "_class_name": "a key of diffusers' configuration files",
    "_name_or_path": "a key of transformers' configuration files",
    "_copies": "ours, the end of a metric's name",
    "_sha256": "ours, the end of a field's name",
}


def private(name):
    return name.startswith("_") and not name.startswith("__")


def used_and_defined():
    used, defined = {}, set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and private(node.attr):
                if isinstance(node.ctx, ast.Load):
                    used.setdefault(node.attr, set()).add(str(path.relative_to(SOURCE)))
                else:
                    defined.add(node.attr)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif isinstance(node, ast.arg):
                defined.add(node.arg)
            elif isinstance(node, ast.Constant) and re.fullmatch(r"_[a-z]\w+", str(node.value)):
                used.setdefault(node.value, set()).add(str(path.relative_to(SOURCE)))
    return used, defined


def test_every_private_name_of_a_library_is_listed():
    used, defined = used_and_defined()
    foreign = {name: sorted(files) for name, files in used.items() if name not in defined}
    assert foreign.keys() == USED.keys() | NOT_OF_LIBRARIES.keys(), foreign


def test_their_libraries_are_bounded():
    text = (ROOT / "pyproject.toml").read_text()
    for bound in ("lightning>=2.6,<2.8", "submitit>=1.5.3,<1.6", "diffusers>=0.42,<0.44"):
        assert f'"{bound}"' in text
