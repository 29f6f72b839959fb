"""The place of our operators among the translations of `torch.onnx.export(..., dynamo=True)`.

Those are in onnxscript, which takes a second to import, so that the operators join them when somebody imports them.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

_TRANSLATIONS = "onnxscript.function_libs.torch_lib.ops"


def register() -> None:
    """Makes `torch.onnx.export(model, args, dynamo=True)` translate the operators."""
    if _TRANSLATIONS in sys.modules:
        _join_translations()
    else:
        sys.meta_path.insert(0, _JoinOnImport())


def _join_translations() -> None:
    from onnxscript.function_libs.torch_lib.registration import torch_op

    from adderops._onnx import adder_conv2d

    torch_op("adderops::adder_conv2d", trace_only=True)(adder_conv2d)


class _JoinOnImport(MetaPathFinder):
    """Finds the module of translations as it would be found without this, and joins them once it has run."""

    def find_spec(self, name, path=None, target=None):
        if name != _TRANSLATIONS:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None:
            run = spec.loader.exec_module

            def run_and_join(module) -> None:
                run(module)
                _join_translations()

            spec.loader.exec_module = run_and_join
        return spec
