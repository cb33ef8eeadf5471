"""What is asked of a replica's engine, before it says that it is ready."""

from pathlib import Path

import pytest
from upath import UPath

from models.settings import InputError
from models.torch_engine import TorchEngine
from serve.model import ServedModel
from serve.settings import ServeSettings
from tests.small_classifiers import make_classifier


def test_an_export_is_not_compiled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="engine is onnx, which is not compiled; set compile to false"):
        ServeSettings(engine="onnx", compile=True)
    folder = UPath(make_classifier(tmp_path))
    exported = ServedModel("airline", "f00d", folder, onnx=folder)
    with pytest.raises(
        InputError, match=r"^serve\.compile is true, but airline has an ONNX export, .* serve\.engine=torch"
    ):
        exported.check(ServeSettings(compile=True))
    exported.check(ServeSettings(compile=True, engine="torch"))
    ServedModel("airline", "f00d", folder).check(ServeSettings(compile=True))


def test_what_cannot_be_compiled_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ServedModel("airline", "f00d", UPath(make_classifier(tmp_path)))

    def fail(*_: object) -> None:
        raise RuntimeError("Python.h is missing\nand so on")

    monkeypatch.setattr(TorchEngine, "forward", fail)
    with pytest.raises(
        InputError, match=r"^serve\.compile is true, .* here \(Python\.h is missing\); set it to false\.$"
    ):
        model.load(ServeSettings(compile=True))
    with pytest.raises(RuntimeError, match=r"Python\.h"):
        model.load(ServeSettings())
