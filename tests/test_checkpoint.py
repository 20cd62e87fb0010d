import os
import pickle
import sys

import pytest
import torch

from csgd import InputError
from csgd.checkpoint import load_checkpoint, load_weights, save_checkpoint, save_weights, write_json
from tests import nets


def test_weights_come_back_bit_by_bit_tied_ones_too(tmp_path):
    model = nets.Tied()
    save_weights(tmp_path / "net.safetensors", model.state_dict())
    loaded = load_weights(tmp_path / "net.safetensors")
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


def test_torch_files_bare_nested_and_wrapped(tmp_path):
    state = nets.Plain().state_dict()
    for saved in (state, {"state_dict": state, "epoch": 3}, {f"module.{k}": v for k, v in state.items()}):
        torch.save(saved, tmp_path / "net.pt")
        assert load_weights(tmp_path / "net.pt").keys() == state.keys()


def test_weights_are_told_by_their_content(tmp_path):
    state = nets.Plain().state_dict()
    save_weights(tmp_path / "net.safetensors", state)
    torch.save({f"_orig_mod.module.{key}": value for key, value in state.items()}, tmp_path / "net.pt")
    (tmp_path / "net.safetensors").rename(tmp_path / "safe.pth")
    (tmp_path / "net.pt").rename(tmp_path / "pickled.safetensors")
    for name in ("safe.pth", "pickled.safetensors"):
        assert load_weights(tmp_path / name).keys() == state.keys()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize(
    "content, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS, not the weights"),
        (b"\n<!DOCTYPE html><html></html>", "is a web page, not weights"),
        (b"layer 0.5\n" * 9, "of an unknown format"),
    ],
)
def test_what_are_no_weights_is_told_by_its_name(tmp_path, content, message, suffix):
    path = tmp_path / f"net.{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_weights(path)


def test_the_keys_of_what_holds_more_than_weights_are_told(tmp_path):
    torch.save({"model": nets.Plain().state_dict(), "epoch": 3}, tmp_path / "net.pt")
    with pytest.raises(InputError, match="does not hold a state_dict, but 'model', 'epoch'; save the state_dict alone"):
        load_weights(tmp_path / "net.pt")


def test_a_checkpoint_replaces_the_last_one_and_keeps_it(tmp_path):
    path = tmp_path / "checkpoints" / "last.pt"
    for epoch in (1, 2):
        save_checkpoint(path, {"epoch": epoch})
    assert torch.load(path)["epoch"] == 2
    assert torch.load(path.with_suffix(".pt.previous"))["epoch"] == 1
    assert sorted(p.name for p in path.parent.iterdir()) == ["last.pt", "last.pt.previous"]


def test_a_checkpoint_gives_way_to_the_one_before_and_none_that_can_be_read_is_told(tmp_path, caplog):
    path = tmp_path / "last.pt"
    assert load_checkpoint(path) is None
    for epoch in (1, 2):
        save_checkpoint(path, {"epoch": epoch})
    path.write_bytes(path.read_bytes()[:500])
    assert load_checkpoint(path) == {"epoch": 1}
    assert f"{path} is damaged" in caplog.text
    path.with_suffix(".pt.previous").write_bytes(b"")
    with pytest.raises(InputError, match=f"resume=auto: '{path}' .* and '{path}.previous' .* cannot be read"):
        load_checkpoint(path)


def test_what_is_no_checkpoint_and_a_link_to_nothing_are_no_start_from_zero(tmp_path, caplog):
    path = tmp_path / "last.pt"
    for held in ([1, 2], None):
        torch.save(held, path)
        with pytest.raises(InputError, match=f"it holds a {type(held).__name__}, which is no checkpoint of a run"):
            load_checkpoint(path)
    path.unlink()
    path.symlink_to(tmp_path / "unmounted" / "last.pt")
    with pytest.raises(InputError, match=r"No such file or directory: '.*last.pt'\) cannot be read"):
        load_checkpoint(path)
    torch.save({"epoch": 1}, path.with_suffix(".pt.previous"))
    assert load_checkpoint(path) == {"epoch": 1}
    assert f"{path} is damaged" in caplog.text


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.safetensors", b"\x10\0\0\0\0\0\0\0{}", "is damaged or of an unknown format"),
        ("a.pt", b"PK\x03\x04 cut short", "is damaged or of an unknown format"),
        ("a.pt", b"", "is damaged or of an unknown format"),
        ("a.pt", pickle.dumps(object(), protocol=2), "is a pickle of more than tensors"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_weights(tmp_path / name)


def test_a_whole_module_and_a_truncated_file_are_refused(tmp_path):
    torch.save(nets.Plain(), tmp_path / "module.pt")
    with pytest.raises(InputError, match="is a pickle of more than tensors"):
        load_weights(tmp_path / "module.pt")
    torch.save(nets.Plain().state_dict(), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:2000])
    with pytest.raises(InputError, match="is damaged or of an unknown format"):
        load_weights(tmp_path / "cut.pt")
    for held in ([1, 2], {1: torch.ones(1)}):
        torch.save(held, tmp_path / "other.pt")
        with pytest.raises(InputError, match="does not hold a state_dict"):
            load_weights(tmp_path / "other.pt")
    with pytest.raises(InputError, match="is not a file"):
        load_weights(tmp_path / "missing.pt")


@pytest.mark.skipif(sys.platform != "linux", reason="it asks /proc for the name of an open file")
@pytest.mark.parametrize("write", [save_checkpoint, save_weights, write_json])
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, write):
    """A loss of power may otherwise keep the new name and lose what it names."""
    done, fsync, rename = [], os.fsync, os.replace

    def synced(number):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    def renamed(source, target):
        done.append((os.path.basename(source), os.path.basename(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write(tmp_path / "file.pt", {"weight": torch.ones(3)} if write is not write_json else {"weight": 3})
    assert done == ["file.writing", ("file.writing", "file.pt")]
