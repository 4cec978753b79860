"""Artifacts appear whole or not at all."""

import contextlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from novelret import artifacts
from novelret.artifacts import (
    Manifest,
    fingerprint_array,
    fingerprint_of,
    fingerprint_strings,
    open_output,
    read_manifest,
    write_manifest,
)
from novelret.errors import UserError


def make(out, text, identity="a", force=False, settings=None):
    with open_output(out, identity, force=force, settings=settings) as folder:
        (folder / "content").write_text(text)
        write_manifest(folder, Manifest("labels", {}, {}, identity))


def test_an_artifact_appears_only_when_it_is_whole(tmp_path):
    out = tmp_path / "out"

    def fails():
        with open_output(out, "a", force=False) as folder:
            (folder / "half").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert not out.exists()
    # The same run finds what was done; another one does not.
    with open_output(out, "a", force=False) as folder:
        assert (folder / "half").exists()
        write_manifest(folder, Manifest("labels", {}, {}, "a"))
    assert read_manifest(out, "labels").fingerprint == "a"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_two_do_not_write_one_output(tmp_path):
    out = tmp_path / "out"
    with open_output(out, "a", force=False) as folder:
        (folder / "half").write_text("x")
        for identity in ("a", "b"):
            with pytest.raises(UserError, match="another novelret is at work there"):
                make(out, "second", identity)
        assert (folder / "half").exists()
        write_manifest(folder, Manifest("labels", {}, {}, "a"))
    make(out, "third", force=True)
    assert (out / "content").read_text() == "third"


def test_what_was_half_emptied_is_not_gone_on_from(tmp_path, monkeypatch):
    out = tmp_path / "out"

    def begin(identity):
        with open_output(out, identity, force=False) as folder:
            found = sorted(path.name for path in folder.iterdir())
            (folder / "part").mkdir(exist_ok=True)
            raise ZeroDivisionError(found)

    def killed(_):
        raise KeyboardInterrupt

    with pytest.raises(ZeroDivisionError):
        begin("a")
    with monkeypatch.context() as patch:
        patch.setattr("novelret.artifacts.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            begin("b")
    with pytest.raises(ZeroDivisionError, match=re.escape("['state.json']")):
        begin("a")


def test_what_another_run_made_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    out = tmp_path / "out"
    real = artifacts._alone

    @contextlib.contextmanager
    def late(folder):
        monkeypatch.setattr(artifacts, "_alone", real)
        make(out, "first")
        folder.mkdir()
        with real(folder):
            yield

    monkeypatch.setattr(artifacts, "_alone", late)
    with pytest.raises(UserError, match="exists already"):
        make(out, "second")
    assert (out / "content").read_text() == "first"


def test_force_replaces_only_once_the_new_one_is_whole(tmp_path):
    out = tmp_path / "out"
    make(out, "first")
    with pytest.raises(UserError, match="exists already"):
        make(out, "second")
    with pytest.raises(ZeroDivisionError), open_output(out, "b", force=True):
        raise ZeroDivisionError
    assert (out / "content").read_text() == "first"
    make(out, "second", "b", force=True)
    assert (out / "content").read_text() == "second"


@pytest.mark.parametrize("name", [".", ".."])
def test_the_working_folder_is_not_replaced_under_itself(tmp_path, monkeypatch, name):
    make(tmp_path / "out", "first")
    (tmp_path / "out" / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "out" / ("sub" if name == ".." else ""))
    with pytest.raises(UserError, match="is the folder you are in"):
        make(Path(name), "second", force=True)
    assert (tmp_path / "out" / "content").read_text() == "first"


def test_dear_unfinished_work_is_not_dropped_for_other_settings(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), open_output(out, "a", force=False, settings={"steps": 400}):
        raise ZeroDivisionError
    with pytest.raises(UserError, match=r"steps 400 → 500"):
        make(out, "x", "b", settings={"steps": 500})
    make(out, "x", "b", force=True, settings={"steps": 500})


def test_manifests_of_other_kinds_and_layouts_are_refused(tmp_path):
    make(tmp_path / "out", "x")
    with pytest.raises(UserError, match="is LABELS, expected an INDEX"):
        read_manifest(tmp_path / "out", "index")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(UserError, match="has layout 99"):
        read_manifest(tmp_path / "out", "labels")
    (tmp_path / "out" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        read_manifest(tmp_path / "out", "labels")


def test_fingerprints_tell_apart_what_differs():
    assert fingerprint_strings(["ab", "c"]) != fingerprint_strings(["a", "bc"])
    assert fingerprint_of({"a": 1, "b": 2}) == fingerprint_of({"b": 2, "a": 1})
    assert fingerprint_of(1) != fingerprint_of("1")


def test_an_array_is_known_by_its_values_shape_and_type():
    array = np.arange(12, dtype=np.int64).reshape(3, 4)
    same = (array.astype(">i8"), np.asfortranarray(array), np.hstack([array, array])[:, :4])
    assert {fingerprint_array(other) for other in same} == {fingerprint_array(array)}
    changed = array.copy()
    changed[2, 3] = 0
    different = (changed, array.astype(np.int32), array.reshape(4, 3), array[:2], array[:0])
    assert len({fingerprint_array(other) for other in (array, *different)}) == 6


def test_what_lies_beside_an_output_is_nobodys_to_remove(tmp_path):
    """A backup that somebody made of it, say."""
    out = tmp_path / "out"
    make(tmp_path / "out.old", "a backup")
    make(out, "first")
    make(out, "second", "b", force=True)
    assert (tmp_path / "out.old" / "content").read_text() == "a backup"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.old"]


def test_a_folder_of_somebody_elses_where_it_would_be_made_is_left_alone(tmp_path):
    mine = tmp_path / "out.partial" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    with pytest.raises(UserError, match=r"out\.partial: is where .* would be made"):
        make(tmp_path / "out", "first", force=True)
    assert mine.read_text() == "years of work"
    mine.unlink()
    make(tmp_path / "out", "first")


def test_a_mount_point_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts.os.path, "ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(UserError, match="is a mount point, which cannot be replaced; give a folder inside"):
        make(tmp_path, "first", force=True)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r": cannot be read \("):
        artifacts.fingerprint_file(tmp_path)


def test_an_output_that_is_a_link_is_replaced_where_it_leads(tmp_path):
    (tmp_path / "large-disk").mkdir()
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "large-disk" / "there")
    for text in ("first", "second", "third"):
        make(out, text, text, force=True)
        assert out.is_symlink()
        assert (tmp_path / "large-disk" / "there" / "content").read_text() == text
    assert [path.name for path in (tmp_path / "large-disk").iterdir()] == ["there"]
