"""folders.py and what finds models by name: where models are looked for, and in which order."""

from pathlib import Path

import pytest

import encoder
import gpt2
import train
from gpt2_support import folders, hub, train_cli


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """An installation with a cache of its own, in an empty current folder."""
    home = tmp_path / "home"
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(folders, "INSTALLED", True)
    monkeypatch.delenv("GPT2_MODELS_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    return home


def make_model(folder):
    """Make a folder which is a model as far as looking for one goes."""
    folder.mkdir(parents=True)
    (folder / "model.bin").touch()
    return folder


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "home/.cache"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "home/.cache"),
        ("linux", {"XDG_CACHE_HOME": "{}/xdg"}, "xdg"),
        ("darwin", {"XDG_CACHE_HOME": "{}/xdg"}, "home/Library/Caches"),
        ("win32", {"LOCALAPPDATA": "{}/local"}, "local"),
        ("win32", {"LOCALAPPDATA": ""}, "home/AppData/Local"),
    ],
)
def test_downloads_of_an_installation_go_to_the_cache(
    installed, tmp_path, monkeypatch, platform, variables, expected
):
    monkeypatch.setattr(folders.sys, "platform", platform)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    monkeypatch.delenv("GPT2_DATASETS_DIR")
    assert folders.default_models_dir() == tmp_path / expected / "gpt2-numpy" / "models"
    assert folders.datasets_dir() == tmp_path / expected / "gpt2-numpy" / "datasets"


def test_models_of_a_checkout_are_in_it(monkeypatch):
    monkeypatch.delenv("GPT2_MODELS_DIR", raising=False)
    assert folders.default_models_dir() == Path(gpt2.__file__).resolve().parent / "models"


def test_data_sets_of_a_checkout_are_in_it_if_it_can_be_written(tmp_path, monkeypatch):
    monkeypatch.delenv("GPT2_DATASETS_DIR")
    assert folders.datasets_dir() == Path(gpt2.__file__).resolve().parent / "datasets"
    monkeypatch.setattr(folders.os, "access", lambda path, mode: False)
    assert folders.datasets_dir() == folders.user_cache_dir() / "datasets"


@pytest.mark.parametrize("is_installed", [False, True])
def test_environment_names_the_folder_of_models(monkeypatch, tmp_path, is_installed):
    monkeypatch.setattr(folders, "INSTALLED", is_installed)
    monkeypatch.setenv("GPT2_MODELS_DIR", str(tmp_path))
    assert folders.default_models_dir() == tmp_path
    monkeypatch.setenv("GPT2_MODELS_DIR", "~/models")
    assert folders.default_models_dir() == Path.home() / "models"
    monkeypatch.setenv("GPT2_DATASETS_DIR", "~/texts")
    assert folders.datasets_dir() == Path.home() / "texts"


def test_trained_models_never_go_to_the_cache(installed, tmp_path):
    cache = folders.default_models_dir()

    def out(*flags):
        args = train.make_parser().parse_args(["--data", "a/fish.txt", *flags])
        return train_cli.out_folder(args)

    assert out("--models_dir", str(cache)) == Path("models/fish")
    assert out("--models_dir", str(tmp_path)) == tmp_path / "fish"
    assert out("--out", "here") == Path("here")


def test_model_is_looked_for_in_four_places(tmp_path, monkeypatch):
    """The one that is found first goes, and then the next one is found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folders, "BUNDLED_DIR", tmp_path / "bundled")
    places = ["mine", "elsewhere/mine", "models/mine", "bundled/mine"]
    made = [make_model(tmp_path / place) for place in places]
    for model in made:
        assert hub.find_model("mine", "elsewhere").resolve() == model
        (model / "model.bin").unlink()
    with pytest.raises(FileNotFoundError) as error:
        hub.find_model("mine", "elsewhere")
    looked = ", ".join(map(str, [*map(Path, places[:3]), tmp_path / "bundled" / "mine"]))
    assert (
        f"no model mine: expected a model file, or a folder with model.bin, at one of {looked}"
        in str(error.value)
    )


def test_places_that_are_the_same_are_named_once(tmp_path, monkeypatch):
    monkeypatch.chdir(folders.PACKAGE.parent)
    with pytest.raises(FileNotFoundError) as error:
        hub.find_model("nonesuch", "models")
    assert str(error.value).count("nonesuch") == 3  # the name, the path, models/nonesuch


def test_alias_of_a_model_is_looked_for_by_its_name(tmp_path):
    assert hub.find_model("gpt2", make_model(tmp_path / "124M").parent) == tmp_path / "124M"


def test_bundled_model_is_found_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert gpt2.load("stories", tmp_path).config.n_vocab == 4096
    assert encoder.load("stories", tmp_path).n_vocab == 4096
    (tmp_path / "stories").mkdir()  # a folder of another kind does not hide the model
    assert encoder.load("stories", tmp_path / "none").n_vocab == 4096
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: no token table in this folder"):
        encoder.load("empty", tmp_path / "none")


def test_model_at_a_path_has_its_own_tokenizer_or_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "124M", "stories"):
        make_model(tmp_path / name)
        with pytest.raises(FileNotFoundError, match=f"{name}: no token table in this folder"):
            encoder.load(name, tmp_path / "none")
        encoder.train("", 257).save(tmp_path / name / "tokenizer.bin")
        assert encoder.load(Path(name), tmp_path / "none").n_vocab == 257


def test_default_model_is_the_bundled_one_without_a_network(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folders.PACKAGE.parent)
    monkeypatch.setattr(hub, "fetch", refuse)
    assert hub.find_default_model(tmp_path).resolve() == folders.BUNDLED_DIR / "stories"
    err = capsys.readouterr().err
    assert "using the bundled model `stories`" in err
    assert err.endswith("python utils.py download 124M\n")
    assert not list(tmp_path.iterdir())  # neither an empty folder nor a lock


def refuse(*args, **kwargs):
    raise ConnectionError("no network")
