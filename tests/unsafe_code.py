"""Which lines of Python would run code from a file, or let an archive choose where it writes."""

from __future__ import annotations

import ast
import re

FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "cloudpickle", "dill", "joblib", "runpy", "code"}
FORBIDDEN_CALLS = re.compile(
    r"eval|exec|compile|os\.(system|popen)|.*\.unpack_archive|yaml\.(?!safe_load$)\w*load\w*|.*\.load_library"
    r"|torch\.(jit\.load|hub\..*|package\..*)|.*(add_safe_globals|register_custom_ops_library)"
)
FORBIDDEN_ARGUMENTS = {"allow_pickle=True", "weights_only=False", "shell=True", "trust_remote_code=True"}
# A call of these names has to say that it reads data only.
DEMANDED_ARGUMENTS = {"torch.load": "weights_only=True", "extract": "filter='data'", "extractall": "filter='data'"}


def runs_what_it_reads(node: ast.AST) -> bool:
    """Whether an import or a call could run what a file says."""
    if isinstance(node, ast.Import):
        return any(name.name.split(".")[0] in FORBIDDEN_MODULES for name in node.names)
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").split(".")[0] in FORBIDDEN_MODULES
    if not isinstance(node, ast.Call):
        return False
    called, arguments = ast.unparse(node.func), {ast.unparse(argument) for argument in node.keywords}
    demanded = DEMANDED_ARGUMENTS.get(called) or DEMANDED_ARGUMENTS.get(called.split(".")[-1])
    return bool(
        FORBIDDEN_CALLS.fullmatch(called)
        or arguments & FORBIDDEN_ARGUMENTS
        or (demanded is not None and demanded not in arguments)
    )
