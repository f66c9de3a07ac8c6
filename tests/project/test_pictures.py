"""The program that makes the pictures of the documentation trains, and its logs hold what they show."""

import importlib.util
import pathlib

from tests.helpers.tensorboard_pages import Pages
from tests.helpers.writer_calls import images, texts

MAKE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "images" / "make.py"


def test_the_runs_hold_what_the_pictures_show(tmp_path):
    spec = importlib.util.spec_from_file_location("make", MAKE)
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    make.train(tmp_path / "narrow", 4, 1e-2)
    shown, said = images(tmp_path / "narrow"), texts(tmp_path / "narrow")
    assert list(shown["confusion_matrix"]) == list(said["note"])
    assert any(name.startswith("mistakes/") for name in shown)
    assert "| hidden | Dense |" in said["model_summary"][0]
    rows, _ = Pages(tmp_path).hparams()
    assert (rows["narrow"][0]["model/width"], rows["narrow"][0]["learning_rate"]) == (4, 0.01)
    assert 0 < rows["narrow"][1]["best/eval/accuracy"] <= 1
    assert (tmp_path / "narrow" / "projector_config.pbtxt").exists()
    assert {page.stem for page in MAKE.parent.glob("*.png")} == {*make.PAGES, "tensorboard"}
