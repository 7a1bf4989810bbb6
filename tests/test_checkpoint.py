import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from glow_kernels.errors import CheckpointError, MissingDependencyError
from glow_kernels.training import checkpoint

TENSORS = {"weight": torch.arange(600.0).reshape(20, 30), "count": torch.tensor(3)}
DOCUMENT = {"step": 7, "name": "run", "betas": [0.9, 0.999], "best": None, "nested": {"flag": True}}


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype
        assert torch.equal(actual[name], value), name


def message_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_round_trip_keeps_tensors_and_document(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    tensors = {**TENSORS, "empty": torch.zeros(0, 3), **{str(kind): torch.ones(2, 3, dtype=kind) for kind in kinds}}
    checkpoint.save(path, tensors, DOCUMENT)
    loaded, document = checkpoint.load(path)
    assert_same(loaded, tensors)
    assert document == DOCUMENT
    assert list(tmp_path.iterdir()) == [path]


def test_non_finite_floats_in_the_document_survive(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a", {}, {"best": math.inf, "last": math.nan})
    _, document = checkpoint.load(tmp_path / "a")
    assert document["best"] == math.inf
    assert math.isnan(document["last"])


def test_shared_and_non_contiguous_tensors(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    parameter = nn.Parameter(base)
    tensors = {
        "base": base,
        "parameter": parameter,
        "transposed": base.t(),
        "slice": base[1:],
        "expanded": base[:, :1].expand(3, 5),
        "empty": base[:0],
        "also_empty": base[3:],
    }
    checkpoint.save(tmp_path / "a", tensors, {})
    loaded, _ = checkpoint.load(tmp_path / "a")
    assert_same(loaded, {name: value.detach() for name, value in tensors.items()})


def test_loaded_tensors_do_not_keep_the_file_mapped(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a", TENSORS, {})
    loaded, _ = checkpoint.load(tmp_path / "a")
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc on this system")
    assert loaded
    assert str(tmp_path) not in maps.read_text()


def test_saved_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    checkpoint.save(tmp_path / "a", TENSORS, {})
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("length", [0, 5, 8, 9, 60, 300, -1])
def test_truncated_file(tmp_path: Path, length: int) -> None:
    path = tmp_path / "last.safetensors"
    checkpoint.save(path, TENSORS, DOCUMENT)
    path.write_bytes(path.read_bytes()[:length])
    assert "cut short" in message_of(path)


def test_missing_file(tmp_path: Path) -> None:
    assert "does not exist" in message_of(tmp_path / "none.safetensors")


def test_folder(tmp_path: Path) -> None:
    assert "is a folder" in message_of(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "model.pt"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=zipped)
    assert "not a glow_kernels checkpoint" in message_of(path)


@pytest.mark.parametrize(
    "metadata", [None, {"format": "pt"}, {"glow_kernels": "?"}, {"glow_kernels": "[]"}, {"glow_kernels": "{}"}]
)
def test_foreign_safetensors_file(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file(TENSORS, tmp_path / "a", metadata)
    assert "not a glow_kernels checkpoint" in message_of(tmp_path / "a")


def test_newer_format(tmp_path: Path) -> None:
    content = {"format_version": checkpoint.FORMAT_VERSION + 1, "document": {}}
    save_file(TENSORS, tmp_path / "a", {"glow_kernels": json.dumps(content)})
    message = message_of(tmp_path / "a")
    assert "format 2" in message
    assert "upgrade" in message


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "a"
    checkpoint.save(path, TENSORS, {})
    monkeypatch.setattr("safetensors.safe_open", refuse)
    assert "Permission denied" in message_of(path)


def test_missing_safetensors_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'glow_kernels\[train\]'"):
        checkpoint.save(tmp_path / "a", TENSORS, {})


SAVE_WITHOUT_SPACE = """
import resource, sys, torch
from pathlib import Path
from glow_kernels.errors import CheckpointError
from glow_kernels.training import checkpoint

for available in 0, 100, 3_000_000:
    resource.setrlimit(resource.RLIMIT_FSIZE, (available, resource.RLIM_INFINITY))
    try:
        checkpoint.save(Path(sys.argv[1]), {"weight": torch.zeros(1_000_000)}, {})
    except CheckpointError as error:
        print(error)
"""


def test_full_disk_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    checkpoint.save(path, TENSORS, DOCUMENT)
    before = path.read_bytes()
    result = run_python(SAVE_WITHOUT_SPACE, path)
    assert result.returncode == 0, result.stderr
    messages = result.stdout.splitlines()
    assert len(messages) == 3
    assert all(f"cannot write {path}: File too large; free some space" in message for message in messages)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
def test_failure_at_any_point_keeps_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    path = tmp_path / "last.safetensors"
    checkpoint.save(path, TENSORS, DOCUMENT)
    before = path.read_bytes()
    monkeypatch.setattr(call, fail)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt):
        checkpoint.save(path, {"weight": torch.ones(3)}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot write .*No such file"):
        checkpoint.save(tmp_path / "none" / "a", TENSORS, {})


def test_content_is_synced_before_it_replaces_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a)))
    checkpoint.save(tmp_path / "a", TENSORS, {})
    assert calls == ["fsync", "replace", "fsync"]


def test_files_and_folders_are_closed(tmp_path: Path) -> None:
    opened = Path("/proc/self/fd")
    if not opened.exists():
        pytest.skip("no /proc on this system")
    before = len(list(opened.iterdir()))
    checkpoint.save(tmp_path / "a", TENSORS, {})
    checkpoint.load(tmp_path / "a")
    assert len(list(opened.iterdir())) == before


def test_document_that_is_not_json_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a", TENSORS, {})
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path / "a", {}, {"path": tmp_path})
    assert checkpoint.load(tmp_path / "a")[0].keys() == TENSORS.keys()


# The child saves all the time; the parent kills it at a random moment and looks at what is there.
KILL_DURING_SAVES = """
import os, random, signal, sys, time, torch
from pathlib import Path
from glow_kernels.training import checkpoint

torch.set_num_threads(1)
path, torn = Path(sys.argv[1]), 0
checkpoint.save(path, {"weight": torch.zeros(500_000)}, {"step": 0})
random.seed(0)
for _ in range(25):
    child = os.fork()
    if child == 0:
        for step in range(10**9):
            checkpoint.save(path, {"weight": torch.full((500_000,), float(step))}, {"step": step})
    time.sleep(random.uniform(0.005, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    torn += path.with_name("." + path.name + ".tmp").exists()
    tensors, document = checkpoint.load(path)
    assert tensors["weight"].shape == (500_000,)
    assert (tensors["weight"] == document["step"]).all()
checkpoint.save(path, {}, {})
print(torn)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_during_saves_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    result = run_python(KILL_DURING_SAVES, tmp_path / "last.safetensors")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 0, "no save was interrupted: the test shows nothing"
    assert list(tmp_path.iterdir()) == [tmp_path / "last.safetensors"]


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.99), amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.03),
    "tensor_lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
}


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def make_optimizer(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    layers = [{"params": model[0].parameters(), "weight_decay": 0.5}, {"params": model[2].parameters()}]
    return OPTIMIZERS[kind](layers)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((5, 3), 0.1 * step)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizer_round_trip_is_exact(tmp_path: Path, kind: str) -> None:
    model = make_model(0)
    optimizer = make_optimizer(kind, model)
    train(model, optimizer, 4)
    tensors, document = checkpoint.flatten_optimizer(optimizer)
    checkpoint.save(tmp_path / "a", tensors, {"optimizer": document})

    other = make_model(1)
    other.load_state_dict(model.state_dict())
    restored = make_optimizer(kind, other)
    loaded, whole = checkpoint.load(tmp_path / "a")
    checkpoint.restore_optimizer(restored, loaded, whole["optimizer"])
    assert restored.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    for group, expected in zip(restored.param_groups, optimizer.param_groups, strict=True):
        assert {key: type(value) for key, value in group.items()} == {k: type(v) for k, v in expected.items()}

    train(model, optimizer, 3)
    train(other, restored, 3)
    assert_same(other.state_dict(), model.state_dict())
    assert_same(checkpoint.flatten_optimizer(restored)[0], checkpoint.flatten_optimizer(optimizer)[0])


def test_optimizer_tensors_are_named_by_parameter() -> None:
    model = make_model(0)
    optimizer = make_optimizer("adam", model)
    assert checkpoint.flatten_optimizer(optimizer)[0] == {}
    train(model, optimizer, 1)
    tensors, _ = checkpoint.flatten_optimizer(optimizer)
    assert {"state.0.step", "state.0.exp_avg", "state.3.exp_avg_sq"} <= tensors.keys()


def test_optimizer_state_that_is_no_tensor_survives(tmp_path: Path) -> None:
    model = make_model(0)
    saved, restored = make_optimizer("sgd", model), make_optimizer("sgd", model)
    saved.state[model[0].weight] = {"momentum_buffer": None, "skipped": 3}
    tensors, document = checkpoint.flatten_optimizer(saved)
    checkpoint.save(tmp_path / "a", tensors, {"optimizer": document})
    checkpoint.restore_optimizer(restored, tensors, checkpoint.load(tmp_path / "a")[1]["optimizer"])
    assert restored.state_dict() == saved.state_dict()


def test_optimizer_keeps_the_settings_of_its_machine() -> None:
    model = make_model(0)
    saved = torch.optim.Adam(model.parameters(), lr=0.5, foreach=True)
    train(model, saved, 1)
    restored = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
    checkpoint.restore_optimizer(restored, *checkpoint.flatten_optimizer(saved))
    (group,) = restored.param_groups
    assert (group["lr"], group["foreach"], group["fused"]) == (0.5, None, True)


def test_optimizer_of_another_kind_or_shape_is_refused() -> None:
    model = make_model(0)
    tensors, document = checkpoint.flatten_optimizer(make_optimizer("adam", model))
    with pytest.raises(CheckpointError, match="state of Adam, not of Adamax"):
        checkpoint.restore_optimizer(make_optimizer("adamax", model), tensors, document)
    with pytest.raises(CheckpointError, match="does not fit"):
        checkpoint.restore_optimizer(torch.optim.Adam(model.parameters()), tensors, document)
    with pytest.raises(CheckpointError, match="state of None"):
        checkpoint.restore_optimizer(make_optimizer("adam", model), tensors, None)


def test_weights_round_trip(tmp_path: Path) -> None:
    model, other = make_model(0), make_model(1)
    checkpoint.save(tmp_path / "a", model.state_dict(), {})
    checkpoint.load_weights(other, checkpoint.load(tmp_path / "a")[0], tmp_path / "a")
    assert_same(other.state_dict(), model.state_dict())


def test_weights_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    model = make_model(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tensors = {f"extra.{i}": torch.zeros(1) for i in range(5)}
    tensors |= {"0.weight": torch.zeros(4, 7), "0.bias": torch.ones(4), "2.bias": torch.ones(2)}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_weights(model, tensors, tmp_path / "last.safetensors")
    message = str(caught.value)
    assert str(tmp_path / "last.safetensors") in message
    assert "1 missing (2.weight)" in message
    assert "5 unexpected (extra.0, extra.1, extra.2, ...)" in message
    assert "1 of another shape (0.weight [4, 7] instead of [4, 3])" in message
    assert "\n" not in message
    assert_same(model.state_dict(), before)
